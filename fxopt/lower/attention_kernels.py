"""Attention by kernels of ours, as another way beside the library's call: the tuner decides."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace

import torch

from fxopt.ir import ops
from fxopt.ir.attention_backends import enabled_backends
from fxopt.ir.quantized_attention import FLOAT8, SCALED_ATTENTION, STORED
from fxopt.ir.region import (
    Alias,
    Alternatives,
    Attention,
    Call,
    Factors,
    Ref,
    Region,
    ScoredAttention,
    Step,
    Strided,
    Way,
    refs,
)
from fxopt.lower.attention_calls import OPS, TENSORS, AttentionCall, find_attention
from fxopt.lower.calls import overload_name
from fxopt.lower.copies import Copy, Matrices
from fxopt.lower.lowering import Lowered
from fxopt.lower.products import strided
from fxopt.lower.scored_attention import OPS as SCORED_OPS
from fxopt.lower.scored_attention import scored_step
from fxopt.lower.uses import Uses
from fxopt.lower.written_attention import find_written_attention

NAME = "attention_kernels"
"""What switches this off (FXOPT_DISABLE)."""

LIBRARY, KERNEL = "library", "kernel"

DTYPES = (torch.float16, torch.bfloat16)
MASK_DTYPES = (*DTYPES, torch.float32, torch.bool)
MOST_FEATURES, FEATURES_MULTIPLE = 256, 8
FEW_ROWS_OF_FLOAT32 = 16
"""Rows of scores (positions times heads of a group) that share their keys: so many are one tile, and memory decides though
float32 is multiplied without tensor cores."""

FEWEST_FEATURES_OF_FLOAT8 = 32
"""What tensor cores take at a time."""

SCALED = overload_name(SCALED_ATTENTION)

MOST_ELEMENTS = 2**31
"""What offsets within a head, and within the mask of one batch, stay below; a tile may reach so many rows further."""

TILE_ROWS = 128


def with_attention_kernels(lowered: Lowered) -> Lowered:
    """`lowered`, already scheduled, with `Alternatives` for each attention on a GPU that kernels of ours can compute.

    That is a call, or two products with a softmax between them.

    A library's forward in training belongs to its backward and stays. As when backends are chosen, deterministic algorithms
    and a single enabled backend leave what torch has backends for to torch: what is measured may change. Attention with
    changed scores in training has ops of ours for both (`scored_attention.py`).
    """
    if not any(spec.device.type == "cuda" for spec in lowered.buffers.values()):
        return lowered
    steps: list[Step | None] = list(lowered.steps)
    uses = Uses(lowered)
    for k, call in enumerate(lowered.steps):
        scored = scored_step(call, lowered, uses.views) if isinstance(call, Call) and call.op in SCORED_OPS else None
        if isinstance(call, Call) and scored is not None:
            steps[k] = _beside((call,), scored, lowered, uses.views)
    if torch.are_deterministic_algorithms_enabled() or len(enabled_backends()) < 2:
        return replace(lowered, steps=[s for s in steps if s is not None])

    def put(numbers: Sequence[int], own: Attention) -> bool:
        apart = tuple(s for k in numbers if isinstance(s := lowered.steps[k], Call | Region))
        together = _alternatives(apart, own, lowered, uses.views)
        if together is not None:
            for k in numbers:
                steps[k] = together if k == numbers[-1] else None
        return together is not None

    for found in find_attention(lowered):
        if found.device.type == "cuda" and len(found.results) == 1:
            k = next(k for k, step in enumerate(steps) if step is found.call)
            own = _kernel(found, lowered, uses.views)
            if own is not None and not any(put(*seen) for seen in _without_copies(k, own, uses)):
                put((k,), own)
    for k, step in enumerate(lowered.steps):
        own = _narrow_kernel(step, lowered, uses.views) if isinstance(step, Call) and step.op == SCALED else None
        if own is not None and (_has_factors_of_heads(own) or not any(put(*s) for s in _without_copies(k, own, uses))):
            put((k,), own)
    for written in find_written_attention(lowered):
        put(written.steps, written.step)
    return replace(lowered, steps=[s for s in steps if s is not None])


def _without_copies(k: int, own: Attention, uses: Uses) -> Iterator[tuple[list[int], Attention]]:
    """`own`, which computes what call number `k` does, on keys and values as they lie where they are copied from, and the
    steps in whose place it stands: the call and the copies that nobody else reads. Nothing where they are not copied alike.

    Models repeat keys and values for the query heads that share them (`repeat_kv`), since not every backend takes groups.
    """
    made = [uses.copies.get(x.buffer) for x in (own.key, own.value)]
    for group in dict.fromkeys(loop[0] for _, copy in filter(None, made) for loop in (*copy.loops, (1,))):
        seen = [_where_copied_from(x, copy[1], group) for x, copy in zip((own.key, own.value), made, strict=True) if copy]
        if len(seen) < 2 or seen[0] is None or seen[1] is None:
            continue
        copying = sorted({step for step, _ in filter(None, made)})
        parts = [*(j for j in copying if uses.is_for(j, (*copying, k))), k]
        if copying[-1] < k and not any(uses.is_written_over(j, parts) for j in copying):
            key, value = seen[0], seen[1]
            given = {name: spec for name, spec in own.buffers.items() if name not in (own.key.buffer, own.value.buffer)}
            given |= {x.buffer: uses.buffers[x.buffer] for x in (own.query, key, value)}
            yield parts, replace(own, key=key, value=value, buffers=given)


def _where_copied_from(x: Strided, copy: Copy, group: int) -> Strided | None:
    """`x` [B, H, T, E], which `copy` makes, as the tensor [B, H / group, T, E] whose heads it has `group` times;
    None if it has not."""
    (batch, heads, rows, width), (outer, inner, row, column) = x.shape, x.strides
    evenly = batch == 1 or heads == 1 or outer == inner * heads
    if not evenly or heads % group:
        return None
    stride = outer if heads == 1 else inner
    matrices = Matrices(x.buffer, x.offset, ((batch * heads, stride),), row, column).through(copy, rows, width)
    strides = None if matrices is None else matrices.split(batch, heads // group, group)
    if matrices is None or strides is None or (group > 1 and strides[2] != 0):
        return None
    if min(*strides, matrices.row, matrices.column) < 0:  # copied in reverse order
        return None
    shape = (batch, heads // group, rows, width)
    return Strided(matrices.buffer, shape, (*strides[:2], matrices.row, matrices.column), matrices.offset)


def _alternatives(
    apart: tuple[Call | Region, ...], own: Attention | None, lowered: Lowered, views: Mapping[str, Alias]
) -> Alternatives | None:
    """The steps `apart` and `own`, which computes the same; None where the templates do not take that."""
    return None if own is None or not _is_eligible(own) else _beside(apart, own, lowered, views)


def _beside(
    apart: tuple[Call | Region, ...], own: Attention | ScoredAttention, lowered: Lowered, views: Mapping[str, Alias]
) -> Alternatives:
    calls = [step for step in apart if isinstance(step, Call)]
    named = [n for call in calls for n in (*refs((call.args, call.kwargs)), *filter(None, call.outputs))]
    used = dict.fromkeys(n for n in named if n in views)
    names = [*(views[n].of if n in views else n for n in named)]
    names += [n for step in apart if isinstance(step, Region) for n in step.buffers]
    buffers = own.buffers | {n: lowered.buffers[n] for n in names}
    ways = (Way(LIBRARY, apart), Way(KERNEL, (own,)))
    return Alternatives(own.name, ways, buffers, tuple(views[n] for n in used))


def _kernel(found: AttentionCall, lowered: Lowered, views: Mapping[str, Alias]) -> Attention | None:
    """`found` as a step of kernels, or None where something of it is symbolic."""
    names = {name: ref.name for name, ref in _references(found.call).items()}
    tensors = {name: strided(of, lowered.buffers, views) for name, of in (*names.items(), ("out", found.call.outputs[0]))}
    query, key, value, mask, out = (tensors.get(name) for name in (*TENSORS, "out"))
    if query is None or key is None or value is None or out is None or (mask is None and "attn_mask" in names):
        return None
    if mask is not None:
        mask = _broadcast(mask, (*query.shape[:3], key.shape[2]))
    settings = found.settings
    scale = query.shape[3] ** -0.5 if settings.scale is None else settings.scale
    buffers = {x.buffer: lowered.buffers[x.buffer] for x in (query, key, value, mask, out) if x is not None}
    name, origins = f"{out.buffer}.attention", (found.call.origin,)
    return Attention(name, query, key, value, mask, out, settings.is_causal, scale, buffers, origins)


def _narrow_kernel(call: Call, lowered: Lowered, views: Mapping[str, Alias]) -> Attention | None:
    """A call of `fxopt::scaled_attention` as a step of kernels, or None where something of it is symbolic."""
    names = [a.name for a in ops.schema(SCALED_ATTENTION).arguments]
    given = dict(zip(names, call.args, strict=False)) | call.kwargs
    tensors = {name: strided(x.name, lowered.buffers, views) for name, x in given.items() if isinstance(x, Ref)}
    query, key, value, mask = (tensors.get(name) for name in TENSORS)
    out = strided(call.outputs[0], lowered.buffers, views)
    if query is None or key is None or value is None or out is None or None in tensors.values():
        return None
    if mask is not None:
        mask = _broadcast(mask, (*query.shape[:3], key.shape[2]))
    of_query, of_key, of_value = (tensors.get(f"{name}_scale") for name in TENSORS[:3])
    if of_query is not None and of_query.offset:
        return None
    factors = Factors(
        None if of_query is None else of_query.buffer,
        None if of_key is None else _rows_of(_broadcast(of_key, (*key.shape[:3], 1))),
        None if of_value is None else _rows_of(_broadcast(of_value, (*value.shape[:3], 1))),
    )
    scale = query.shape[3] ** -0.5 if given["scale"] is None else float(given["scale"])
    used = [x.buffer for x in (query, key, value, mask, out) if x is not None]
    buffers = {name: lowered.buffers[name] for name in (*used, *factors.buffers)}
    name, origins, causal = f"{out.buffer}.attention", (call.origin,), bool(given["is_causal"])
    return Attention(name, query, key, value, mask, out, causal, scale, buffers, origins, factors=factors)


def _has_factors_of_heads(own: Attention) -> bool:
    """Whether keys or values have factors of their own in each head, which then has to be read as it is numbered."""
    factors = () if own.factors is None else (own.factors.key, own.factors.value)
    return any(x is not None and (x.strides[1] or x.strides[2]) for x in factors)


def _rows_of(x: Strided) -> Strided:
    """Without the last dimension."""
    return replace(x, shape=x.shape[:3], strides=x.strides[:3])


def _references(call: Call) -> dict[str, Ref]:
    """The tensors that `call` is given, by the names of the schema."""
    names = [a.name for a in ops.schema(OPS[call.op]).arguments]
    given = dict(zip(names, call.args, strict=False)) | call.kwargs
    return {name: given[name] for name in TENSORS if isinstance(given.get(name), Ref)}


def _broadcast(mask: Strided, shape: tuple[int, ...]) -> Strided:
    missing = len(shape) - len(mask.shape)
    sizes, strides = (1,) * missing + mask.shape, (0,) * missing + mask.strides
    return replace(mask, shape=shape, strides=tuple(0 if s == 1 else t for s, t in zip(sizes, strides, strict=True)))


def _has_types(own: Attention) -> bool:
    """Whether the operands have the result's dtype; with factors, such as `fxopt::scaled_attention` takes."""
    query, *rest = (own.buffers[x.buffer].dtype for x in (own.query, own.key, own.value))
    if own.dtype not in DTYPES and (own.dtype != torch.float32 or own.factors is not None):
        return False
    if own.factors is None:
        return query == own.dtype and all(dtype == own.dtype for dtype in rest) and own.value.strides[3] == 1
    if any(not own.buffers[name].dtype.is_floating_point for name in own.factors.buffers):
        return False
    if query != FLOAT8:
        return query == own.dtype and all(dtype in STORED for dtype in rest)
    narrowest = min(own.key.shape[3], own.value.shape[3])
    return all(dtype == FLOAT8 for dtype in rest) and narrowest >= FEWEST_FEATURES_OF_FLOAT8


def _is_eligible(own: Attention) -> bool:
    """Whether types, sizes and layouts are such as the templates take."""
    query, key, value, mask = own.query, own.key, own.value, own.mask
    if not _has_types(own):
        return False
    if mask is not None and (own.causal or own.buffers[mask.buffer].dtype not in MASK_DTYPES):
        return False
    if not all((*query.shape, *key.shape, *value.shape)) or query.shape[1] % key.shape[1]:
        return False
    if own.dtype not in DTYPES and query.shape[2] * (query.shape[1] // key.shape[1]) > FEW_ROWS_OF_FLOAT32:
        return False
    if any(w > MOST_FEATURES or w % FEATURES_MULTIPLE for w in (key.shape[3], value.shape[3])):
        return False
    if query.strides[3] != 1 or 1 not in value.strides[2:] or 1 not in key.strides[2:] or not 0.0 < own.scale < float("inf"):
        return False
    tensors = (query, key, value, own.out)
    reach = [(x.shape[2] + TILE_ROWS) * x.strides[2] + MOST_FEATURES * x.strides[3] for x in tensors]
    if mask is not None:
        reach.append(sum((n + TILE_ROWS) * s for n, s in zip(mask.shape[1:], mask.strides[1:], strict=True)))
    return all(n < MOST_ELEMENTS for n in reach)
