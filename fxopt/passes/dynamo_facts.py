"""What early passes may know about nodes of Dynamo's graph, whose values are in meta["example_value"]."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import fx

from fxopt.passes.context import Context

_PLAIN = frozenset({"FakeTensor", "Parameter", "Buffer"})


def example(node: Any) -> torch.Tensor | None:
    """The FakeTensor of a node; None for anything that is not a tensor."""
    value = node.meta.get("example_value") if isinstance(node, fx.Node) else None
    return value if isinstance(value, torch.Tensor) else None


def is_special(value: torch.Tensor) -> bool:
    """Subclasses bring operations of their own; under torch.func's transforms Dynamo's example is a wrapped tensor."""
    return type(value).__name__ not in _PLAIN or value.is_nested or value.layout != torch.strided


def with_grad_mode(context: Context) -> Iterator[tuple[fx.Node, bool]]:
    """Every node with whether gradients are recorded where it stands."""
    enabled = torch.is_grad_enabled()
    for node in context.nodes:
        if node.op == "call_function" and getattr(node.target, "__name__", "") == "_set_grad_enabled":
            enabled = node.args[0] is not False
        yield node, enabled
