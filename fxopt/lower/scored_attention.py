"""Attention in training (`ir/scored_attention_op.py`) by kernels of ours, beside the eager forms of its ops."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch

from fxopt.ir import ops
from fxopt.ir.region import Alias, Call, Ref, ScoredAttention, Strided
from fxopt.ir.scored_attention_op import SCORED
from fxopt.lower.calls import overload_name
from fxopt.lower.lowering import Lowered
from fxopt.lower.products import strided

OPS = {overload_name(op): op for op in SCORED}

DTYPES = (torch.float16, torch.bfloat16)
ADDEND_DTYPES = (*DTYPES, torch.float32)
MOST_FEATURES, FEATURES_MULTIPLE = 128, 8
"""With 256, both gradients took 1.4 ms where all that is written out takes 0.76 (`benchmarks/attention_training.py`)."""

MOST_ELEMENTS = 2**31
"""What offsets within a head, and within the mask of one, stay below; a tile may reach so many rows further."""

TILE_ROWS = 128


def scored_step(call: Call, lowered: Lowered, views: Mapping[str, Alias]) -> ScoredAttention | None:
    """`call`, one of `OPS`, as a step of kernels; None where something of it is symbolic, or such as the templates do not
    take."""
    names = [a.name for a in ops.schema(OPS[call.op]).arguments]
    given: dict[str, Any] = dict(zip(names, call.args, strict=False)) | call.kwargs
    operands = {n: strided(x.name, lowered.buffers, views) for n, x in given.items() if isinstance(x, Ref)}
    results = [None if n is None else strided(n, lowered.buffers, views) for n in call.outputs]
    known = {n: _broadcast(x) if n in ("bias", "mask") else x for n, x in operands.items() if x is not None}
    stored = tuple(x for x in results if x is not None)
    band = given["band"]
    literals = (*(given[n] for n in ("scale", "cap", "fill")), *(band or ()), given.get("parts", 1), given.get("drop", 0.0))
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
        parts=int(given.get("parts", 1)),
        origins=(call.origin,),
        drop=float(given.get("drop", 0.0)),
    )
    return own if _is_eligible(own) else None


def _broadcast(x: Strided) -> Strided:
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
    tensors = [x for x in (*own.operands.values(), *own.results) if len(x.shape) >= 4]
    if not all(0 not in x.shape for x in tensors) or query.shape[1] % key.shape[1]:
        return False
    if any(w > MOST_FEATURES or w % FEATURES_MULTIPLE for w in (key.shape[3], value.shape[3])):
        return False
    if min((s for x in (*own.operands.values(), *own.results) for s in x.strides), default=0) < 0:
        return False
    reach = [sum((n + TILE_ROWS) * s for n, s in zip(x.shape[-2:], x.strides[-2:], strict=True)) for x in tensors]
    return max(reach) < MOST_ELEMENTS
