"""Before autograd: floats that modules hold are literals, guarded.

With `torch.compile(dynamic=True)` Dynamo takes every float for one that may change from call to call, and makes an input of
it: scales of attention, probabilities of dropout, epsilons. What a module holds changes seldom; with a guard, as Dynamo has
it otherwise, another value is another compilation, and then an input. Floats that are arguments stay inputs.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import fx

from fxopt.passes.context import Context


def module_floats(context: Context) -> None:
    for node in context.nodes:
        if context.exhausted:
            return
        if node.op != "call_method" or node.target != "item" or not _is_steady(node.args[0]):
            continue
        value = node.meta.get("example_value")
        if isinstance(value, float | torch.SymFloat):
            context.spend("literal", node)
            _replace(node, float(value))
            context.graph.gm.graph.erase_node(node)


def _is_steady(source: Any) -> bool:
    """Whether an input is marked as a float of a module's that has not changed so far."""
    return isinstance(source, fx.Node) and source.op == "placeholder" and bool(source.meta.get("steady_float"))


def _replace(node: fx.Node, value: float) -> None:
    def given(n: fx.Node) -> Any:
        return value if n is node else n

    for user in list(node.users):
        user.args = fx.node.map_arg(user.args, given)
        user.kwargs = fx.node.map_arg(user.kwargs, given)
