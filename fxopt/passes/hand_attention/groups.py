"""Keys and values that are repeated for the query heads of a group (`repeat_kv`), as they were before."""

from __future__ import annotations

import operator
from typing import Any

import torch
from torch import fx

from fxopt.passes.dynamo_facts import example
from fxopt.passes.hand_attention.products import Operand, bind

UNSQUEEZE = frozenset({torch.unsqueeze, "unsqueeze"})
TRANSPOSE = frozenset({torch.transpose, "transpose"})
RESHAPE = frozenset({torch.reshape, torch.flatten, "reshape", "flatten"})
REPEAT = frozenset({torch.repeat_interleave, "repeat_interleave"})


def shared_heads(operand: Operand, transposed: bool = False) -> fx.Node | None:
    """The tensor [B, G, T, E] whose heads `operand` [B, H, T, E], or [B, H, E, T] if `transposed`, has H / G times each, one
    after the other; None where it is not known to be made so."""
    node: Any = operand.node
    shown = example(node)
    if operand.order is not None or shown is None or shown.dim() != 4:
        return None
    if transposed:
        if node.target not in TRANSPOSE or {d % 4 for d in _literals(node.args[1:])} != {2, 3}:
            return None
        node = node.args[0]
    source = _repeated(node) if node.target in REPEAT else _expanded(node)
    before, after = example(source), example(node)
    if source is None or before is None or after is None or before.dim() != 4 or after.dim() != 4:
        return None
    batch, heads, *matrix = after.shape
    return source if before.shape[0] == batch and list(before.shape[2:]) == matrix and heads % before.shape[1] == 0 else None


def _literals(given: Any) -> list[int]:
    return [x for x in given if isinstance(x, int)]


def _repeated(node: fx.Node) -> fx.Node | None:
    given = bind(node, ("input", "repeats", "dim"))
    return given["input"] if isinstance(given.get("repeats"), int) and given.get("dim") in (1, -3) else None


def _expanded(node: fx.Node) -> fx.Node | None:
    """What `node` is a reshaped expansion of along a new dimension after the heads."""
    expand = node.args[0] if node.target in RESHAPE and node.args else None
    unsqueeze = expand.args[0] if isinstance(expand, fx.Node) and expand.target == "expand" else None
    wide, flat = example(expand), example(node)
    if not isinstance(unsqueeze, fx.Node) or wide is None or flat is None or wide.dim() != 5 or flat.dim() != 4:
        return None
    if list(flat.shape) != [wide.shape[0], wide.shape[1] * wide.shape[2], *wide.shape[3:]]:
        return None
    narrow, source = example(unsqueeze), unsqueeze.args[0]
    if narrow is None or list(narrow.shape) != [*wide.shape[:2], 1, *wide.shape[3:]] or not _adds_a_dimension(unsqueeze):
        return None
    return source if isinstance(source, fx.Node) else None


def _adds_a_dimension(node: fx.Node) -> bool:
    """Whether a call puts a dimension after the first two of four."""
    if node.target in UNSQUEEZE:
        return bind(node, ("input", "dim")).get("dim") in (2, -3)
    index = node.args[1] if node.target is operator.getitem else None
    if not isinstance(index, tuple) or index[:3] != (slice(None), slice(None), None):
        return False
    return all(x in (slice(None), Ellipsis) for x in index[3:])
