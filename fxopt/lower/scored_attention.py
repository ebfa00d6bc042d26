"""Attention in training (`ir/scored_attention_op.py`) by kernels of ours, beside the eager forms of its ops."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch

from fxopt.ir import ops
from fxopt.ir.exprs import Int, ask
from fxopt.ir.region import Alias, Call, Ref, ScoredAttention, Size, View
from fxopt.ir.scored_attention_op import SCORED
from fxopt.lower.calls import overload_name
from fxopt.lower.lowering import Lowered
from fxopt.lower.products import as_view

OPS = {overload_name(op): op for op in SCORED}

DTYPES = (torch.float16, torch.bfloat16)
ADDEND_DTYPES = (*DTYPES, torch.float32)
MOST_FEATURES, FEATURES_MULTIPLE = 128, 8
"""With 256, both gradients took 1.4 ms where all that is written out takes 0.76 (`benchmarks/attention_training.py`)."""

MOST_ELEMENTS = 2**31
"""What offsets within a head, and within the mask of one, stay below where they are literals; a tile may reach so many rows
further."""

TILE_ROWS = 128


def scored_step(call: Call, lowered: Lowered, views: Mapping[str, Alias]) -> ScoredAttention | None:
    """`call`, one of `OPS`, as a step of kernels; None where something of it is such as the templates do not take."""
    names = [a.name for a in ops.schema(OPS[call.op]).arguments]
    given: dict[str, Any] = dict(zip(names, call.args, strict=False)) | call.kwargs
    operands = {n: _view(x.name, lowered, views) for n, x in given.items() if isinstance(x, Ref)}
    results = [_view(n, lowered, views) for n in call.outputs]
    known = {n: _broadcast(x) if n in ("bias", "mask") else x for n, x in operands.items() if x is not None}
    stored = tuple(x for x in results if x is not None)
    band, parts = given["band"], given.get("parts", 1)
    literals = (*(given[n] for n in ("scale", "cap", "fill")), *(band or ()), given.get("drop", 0.0))
    if len(known) < len(operands) or len(stored) < len(results) or not stored:
        return None
    if not all(isinstance(x, int | float) for x in literals):
        return None
    own = ScoredAttention(
        name=f"{stored[0].buffer}.attention",
        op=call.op.partition("::")[2].partition(".")[0],
        operands=known,
        results=stored,
        scale=float(given["scale"]),
        cap=float(given["cap"]),
        fill=float(given["fill"]),
        band=None if band is None else (int(band[0]), int(band[1])),
        buffers={x.buffer: lowered.buffers[x.buffer] for x in (*known.values(), *stored)},
        parts=parts.expr if isinstance(parts, Size) else int(parts),
        origins=(call.origin,),
        drop=float(given.get("drop", 0.0)),
    )
    return own if _is_eligible(own) else None


def _view(name: str | None, lowered: Lowered, views: Mapping[str, Alias]) -> View | None:
    view = None if name is None else as_view(name, lowered.buffers, views)
    return None if view is None else View(view.of, view.shape, view.strides, view.offset)


def _broadcast(x: View) -> View:
    return replace(x, strides=tuple(0 if size == 1 else s for size, s in zip(x.shape, x.strides, strict=True)))


def _is_eligible(own: ScoredAttention) -> bool:
    """Whether types and sizes are such as the templates take."""
    query, key, value = (own.operands[n] for n in ("query", "key", "value"))
    half = [x for n in ("grad", "query", "key", "value") if (x := own.operands.get(n)) is not None]
    if own.dtype not in DTYPES or any(own.buffers[x.buffer].dtype != own.dtype for x in half):
        return False
    bias, mask = (own.operands.get(n) for n in ("bias", "mask"))
    if bias is not None and own.buffers[bias.buffer].dtype not in ADDEND_DTYPES:
        return False
    if mask is not None and own.buffers[mask.buffer].dtype not in (*ADDEND_DTYPES, torch.bool):
        return False
    heads, groups, widths = query.shape[1], key.shape[1], (key.shape[3], value.shape[3])
    if not isinstance(heads, int) or not isinstance(groups, int) or heads % groups:
        return False
    if any(not isinstance(w, int) or w > MOST_FEATURES or w % FEATURES_MULTIPLE for w in widths):
        return False
    tensors = [x for x in (*own.operands.values(), *own.results) if len(x.shape) >= 4]
    if not all(_is_at_least(1, n) for x in tensors for n in x.shape):
        return False
    if not all(_is_at_least(0, s) for x in (*own.operands.values(), *own.results) for s in x.strides):
        return False
    return all(_reach(x) < MOST_ELEMENTS for x in tensors)


def _is_at_least(least: int, x: Int) -> bool:
    return ask("<=", least, x) is True


def _reach(x: View) -> int:
    """What offsets within a head stay below; 0 where symbolic sizes have them computed in int64."""
    numbers = [n for n in (*x.shape[-2:], *x.strides[-2:]) if isinstance(n, int)]
    if len(numbers) < 4:
        return 0
    rows, columns, row, column = numbers
    return (rows + TILE_ROWS) * row + (columns + TILE_ROWS) * column
