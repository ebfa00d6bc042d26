"""Values of Dynamo's graph that follow from sizes alone, such as masks made of position indices: computed, on the CPU."""

from __future__ import annotations

import operator
from collections.abc import Iterable
from functools import cached_property
from typing import Any

import torch
from torch import fx

from fxopt.passes.in_place import WrittenMemory

MAX_ELEMENTS = 1 << 22
"""Larger tensors are not computed at compile time."""

FUNCTIONS: frozenset[Any] = frozenset(
    {
        *(torch.arange, torch.ones, torch.zeros, torch.full, torch.tensor),
        *(torch.ones_like, torch.zeros_like, torch.full_like),
        *(torch.tril, torch.triu, torch.transpose, torch.where, torch.masked_fill),
        *(torch.logical_and, torch.logical_or, torch.logical_not),
        *(torch.add, torch.sub, torch.mul, torch.div, torch.sqrt, torch.abs, torch.cumsum, torch.diff),
        *(operator.add, operator.sub, operator.mul, operator.truediv, operator.neg, operator.getitem),
        *(operator.ge, operator.gt, operator.le, operator.lt, operator.eq, operator.ne),
        *(operator.and_, operator.or_, operator.invert),
    }
)
METHODS = frozenset(
    "expand view reshape unsqueeze squeeze transpose permute bool float tril triu contiguous expand_as to new_ones "
    "new_zeros new_full logical_not masked_fill abs neg cumsum".split()
)


class Sizes:
    """What is known of the nodes of one graph. A node that an in-place call may have changed is not known."""

    def __init__(self, nodes: Iterable[fx.Node]) -> None:
        self._nodes = tuple(nodes)
        self._values: dict[fx.Node, torch.Tensor | None] = {}

    @cached_property
    def _written(self) -> WrittenMemory:
        return WrittenMemory(self._nodes)

    def value(self, node: fx.Node) -> torch.Tensor | None:
        """The tensor that `node` is on every call, on the CPU; None where it depends on more than sizes, or is large."""
        if node not in self._values:
            self._values[node] = self._compute(node)
        return self._values[node]

    def number(self, x: Any) -> float | None:
        """A literal, or a tensor without dimensions whose value is known, as a number."""
        if isinstance(x, int | float) and not isinstance(x, bool):
            return float(x)
        shown = x.meta.get("example_value") if isinstance(x, fx.Node) else None
        value = self.value(x) if isinstance(shown, torch.Tensor) and shown.dim() == 0 else None
        return None if value is None else float(value)

    def _compute(self, node: fx.Node) -> torch.Tensor | None:
        if not _allowed(node) or node in self._written or not _small(node.meta.get("example_value")):
            return None
        inputs = {a: self.value(a) for a in node.all_input_nodes}
        if any(value is None for value in inputs.values()):
            return None

        def given(x: Any) -> Any:
            return inputs[x] if isinstance(x, fx.Node) else _on_cpu(x)

        args: Any = fx.node.map_aggregate(node.args, given)
        return _call(node, args, {name: fx.node.map_aggregate(x, given) for name, x in node.kwargs.items()})


def _allowed(node: fx.Node) -> bool:
    return node.target in FUNCTIONS if node.op == "call_function" else node.op == "call_method" and node.target in METHODS


def _small(example: Any) -> bool:
    if not isinstance(example, torch.Tensor):
        return False
    return all(isinstance(s, int) for s in example.shape) and example.numel() <= MAX_ELEMENTS


def _on_cpu(x: Any) -> Any:
    """An argument as it is, but for devices."""
    named = isinstance(x, str) and x.partition(":")[0] in ("cuda", "cpu")
    return torch.device("cpu") if named or isinstance(x, torch.device) else x


def _call(node: fx.Node, args: Any, kwargs: Any) -> torch.Tensor | None:
    try:
        with torch.no_grad():
            value = getattr(args[0], str(node.target))(*args[1:], **kwargs) if node.op == "call_method" else None
            value = node.target(*args, **kwargs) if node.op == "call_function" else value  # type: ignore[operator]
    except (RuntimeError, TypeError, ValueError, IndexError):
        return None
    return value if isinstance(value, torch.Tensor) and not hasattr(value, "fake_mode") else None
