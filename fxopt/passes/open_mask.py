"""Before autograd: an attention mask that hides nothing is no mask.

Models build a mask from position indices for every kind of attention, and under a tracer they cannot look whether it hides
anything; for encoders it is true everywhere. Fused attention kernels take no mask much faster than one of ones, and some
take none at all, so it matters to know before a backend is chosen. Only masks computed from sizes alone are looked at, by
computing them: on the CPU, where they are small.
"""

from __future__ import annotations

import operator
from typing import Any

import torch
from torch import fx

from fxopt.passes.attention import PARAMETERS, SPELLINGS
from fxopt.passes.context import Context

MAX_ELEMENTS = 1 << 22
"""Larger masks are not computed at compile time."""

FUNCTIONS: frozenset[Any] = frozenset(
    {
        *(torch.arange, torch.ones, torch.zeros, torch.full, torch.tril, torch.triu, torch.logical_and, torch.logical_or),
        *(operator.add, operator.sub, operator.mul, operator.getitem, operator.and_, operator.or_, operator.invert),
        *(operator.ge, operator.gt, operator.le, operator.lt, operator.eq, operator.ne),
    }
)
METHODS = frozenset("expand view reshape unsqueeze squeeze transpose permute bool tril triu contiguous expand_as".split())


def open_mask(context: Context) -> None:
    for node in context.nodes:
        if context.exhausted:
            return
        if node.op != "call_function" or node.target not in SPELLINGS:
            continue
        mask = _mask(node)
        if isinstance(mask, fx.Node) and _hides_nothing(mask):
            context.spend("hides_nothing", node)
            _remove_mask(node)


def _mask(node: fx.Node) -> Any:
    position = PARAMETERS.index("attn_mask")
    return node.args[position] if len(node.args) > position else node.kwargs.get("attn_mask")


def _remove_mask(node: fx.Node) -> None:
    position = PARAMETERS.index("attn_mask")
    if len(node.args) > position:
        node.args = (*node.args[:position], None, *node.args[position + 1 :])
    else:
        node.kwargs = {**node.kwargs, "attn_mask": None}


def _hides_nothing(mask: fx.Node) -> bool:
    example = mask.meta.get("example_value")
    if not isinstance(example, torch.Tensor) or example.dtype != torch.bool or not _small(example):
        return False
    value = _evaluate(mask, {})
    return isinstance(value, torch.Tensor) and value.dtype == torch.bool and bool(value.all())


def _small(example: torch.Tensor) -> bool:
    return all(isinstance(s, int) for s in example.shape) and example.numel() <= MAX_ELEMENTS


def _evaluate(node: fx.Node, known: dict[fx.Node, Any]) -> Any:
    """The node's value from sizes alone, on the CPU; None where it depends on anything else."""
    if node in known:
        return known[node]
    allowed = node.target in FUNCTIONS if node.op == "call_function" else node.op == "call_method" and node.target in METHODS
    inputs = [_evaluate(a, known) for a in node.all_input_nodes] if allowed else []
    known[node] = None
    if allowed and all(isinstance(x, torch.Tensor) for x in inputs) and not _symbolic(node):
        args, kwargs = fx.node.map_arg((node.args, dict(node.kwargs)), lambda n: known[n])
        known[node] = _call(node, args, {**kwargs, "device": "cpu"} if "device" in kwargs else kwargs)
    return known[node]


def _symbolic(node: fx.Node) -> bool:
    example = node.meta.get("example_value")
    return not isinstance(example, torch.Tensor) or not _small(example)


def _call(node: fx.Node, args: Any, kwargs: Any) -> Any:
    try:
        with torch.no_grad():
            value = getattr(args[0], str(node.target))(*args[1:], **kwargs) if node.op == "call_method" else None
            value = node.target(*args, **kwargs) if node.op == "call_function" else value  # type: ignore[operator]
    except (RuntimeError, TypeError, ValueError, IndexError):
        return None
    return None if hasattr(value, "fake_mode") else value
