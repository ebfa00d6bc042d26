"""Before autograd: one spelling for calls that mean the same, so that early patterns need not list them all.

Methods and operators on plain tensors become the torch function of the same name and signature. Nothing else changes: no
in-place method, no variadic one, and nothing on tensor subclasses, whose `__torch_function__` could tell the difference.
"""

from __future__ import annotations

import operator
from collections.abc import Callable
from typing import Any

import torch
from torch import fx

from fxopt.passes.context import Context

METHODS: dict[str, Callable[..., Any]] = {
    "matmul": torch.matmul,
    "bmm": torch.bmm,
    "baddbmm": torch.baddbmm,
    "softmax": torch.softmax,
    "transpose": torch.transpose,
    "masked_fill": torch.masked_fill,
    "mul": torch.mul,
    "div": torch.div,
    "add": torch.add,
    "sub": torch.sub,
}
"""Tensor method -> function with the same parameters."""

OPERATORS: dict[Any, Callable[..., Any]] = {
    operator.matmul: torch.matmul,
    operator.mul: torch.mul,
    operator.truediv: torch.div,
    operator.add: torch.add,
    operator.sub: torch.sub,
}
"""Python operator -> the function it calls when its first operand is a tensor."""

_PLAIN = {"Tensor", "FakeTensor", "Parameter", "Buffer"}


def canonical_calls(context: Context) -> None:
    for node in context.nodes:
        if context.exhausted:
            return
        function = _function(node)
        if function is None or not all(_is_plain(a) for a in node.all_input_nodes):
            continue
        context.spend(function.__name__, node)
        node.op, node.target = "call_function", function


def _function(node: fx.Node) -> Callable[..., Any] | None:
    if node.op == "call_method":
        return METHODS.get(str(node.target)) if _holds_tensor(node.args[0]) else None
    if node.op == "call_function" and node.target in OPERATORS:
        return OPERATORS[node.target] if _holds_tensor(node.args[0]) else None
    return None


def _example(node: Any) -> Any:
    return node.meta.get("example_value", node.meta.get("val")) if isinstance(node, fx.Node) else None


def _holds_tensor(node: Any) -> bool:
    return isinstance(_example(node), torch.Tensor)


def _is_plain(node: fx.Node) -> bool:
    example = _example(node)
    return not isinstance(example, torch.Tensor) or type(example).__name__ in _PLAIN
