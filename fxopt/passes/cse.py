"""Common subexpressions: a pure call with the arguments of an earlier one becomes that one.

Random and uninitialised tensors are never merged, nor are two results that both leave the graph (they must not alias).
"""

from __future__ import annotations

from collections.abc import Hashable
from typing import Any

from torch import fx

from fxopt.ir import ops
from fxopt.passes.context import Context
from fxopt.passes.facts import same_tensor


def cse(context: Context) -> None:
    first: dict[Hashable, fx.Node] = {}
    for node in context.nodes:
        if node.op != "call_function" or not ops.may_merge(node.target):
            continue
        if context.exhausted:
            return
        key = _key(node)
        earlier = first.get(key)
        if earlier is None or not _same_value(node, earlier) or not context.replace(ops.name_of(node.target), node, earlier):
            first[key] = earlier or node


def _same_value(node: fx.Node, earlier: fx.Node) -> bool:
    if isinstance(node.meta.get("val"), tuple | list):
        return True
    return same_tensor(node, earlier) if ops.is_overload(node.target) and not ops.is_symbolic(node.target) else True


def _key(node: fx.Node) -> Hashable:
    args = [hashable(a) for a in node.args]
    if ops.is_overload(node.target) and not node.kwargs and len(args) == 2 and ops.name_of(node.target) in ops.COMMUTATIVE:
        args.sort(key=repr)
    return node.target, tuple(args), tuple(sorted((k, hashable(v)) for k, v in node.kwargs.items()))


def hashable(argument: Any) -> Hashable:
    """An argument as a key that tells 1, 1.0 and True apart, and 0.0 from -0.0."""
    if isinstance(argument, fx.Node):
        return ("node", argument.name)
    if isinstance(argument, tuple | list):
        return ("list", *(hashable(a) for a in argument))
    if isinstance(argument, dict):
        return ("dict", *((k, hashable(v)) for k, v in argument.items()))
    return (type(argument).__name__, repr(argument))
