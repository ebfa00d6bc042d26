"""Which nodes of Dynamo's graph write into their arguments: there, unlike in ATen graphs, calls mutate freely."""

from __future__ import annotations

import inspect
import operator
from collections.abc import Callable, Iterable
from typing import Any

from torch import fx

from fxopt.ir import ops

OPERATORS: frozenset[Callable[..., Any]] = frozenset(
    {
        *(operator.setitem, operator.delitem, operator.iadd, operator.isub, operator.imul, operator.itruediv),
        *(operator.ifloordiv, operator.imod, operator.ipow, operator.iand, operator.ior, operator.ixor),
        *(operator.imatmul, operator.ilshift, operator.irshift),
    }
)
SPECIAL_METHODS = frozenset(f"__{function.__name__}__" for function in OPERATORS)


def writes(node: fx.Node) -> bool:
    """Whether a call may change the memory of an argument; true also for what cannot be looked into."""
    if node.op == "call_method":
        return _ends_in_underscore(str(node.target)) or node.target in SPECIAL_METHODS
    if node.op != "call_function":
        return node.op == "call_module"
    if node.kwargs.get("out") is not None or node.target in OPERATORS or ops.is_higher_order(node.target):
        return True
    if ops.is_overload(node.target):
        return ops.is_mutating(node.target)
    return _ends_in_underscore(getattr(node.target, "__name__", "")) or _has_true(node, "inplace")


def written(nodes: Iterable[fx.Node]) -> set[fx.Node]:
    """Every node whose memory some call may change: what in-place calls are given, and what that was made of."""
    found: set[fx.Node] = set()
    stack = [argument for node in nodes if writes(node) for argument in node.all_input_nodes]
    while stack:
        node = stack.pop()
        if node not in found:
            found.add(node)
            stack.extend(node.all_input_nodes)
    return found


def _ends_in_underscore(name: str) -> bool:
    return name.endswith("_") and not name.endswith("__")


def _has_true(node: fx.Node, parameter: str) -> bool:
    """Whether a Python function is called with a parameter of this name set (builtins have no signature to ask)."""
    try:
        given = inspect.signature(node.target).bind_partial(*node.args, **node.kwargs)  # type: ignore[arg-type]
    except (TypeError, ValueError):
        return bool(node.kwargs.get(parameter))
    return bool(given.arguments.get(parameter))
