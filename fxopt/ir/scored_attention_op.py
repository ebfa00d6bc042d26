"""Attention whose scores are changed before the softmax, with a gradient, as ops that store no scores.

Importing the module registers

    fxopt::scored_attention(query, key, value, bias, mask, seed=None, *, scale, cap, fill, band, drop=0.0)
        -> (out, exact, most, inverse)
    fxopt::scored_attention_query(grad, query, key, value, bias, mask, most, inverse, total, seed=None, *, ...) -> Tensor
    fxopt::scored_attention_key_value(...the same...) -> (Tensor, Tensor)
    fxopt::scored_attention_bias(..., total, parts, seed=None, *, ...) -> Tensor

over query [B, H, S, E], key [B, G, T, E] and value [B, G, T, Ev] of one floating dtype, H a multiple of G. A score is made
in float32, in this order:

    s = scale * (query . key); s = cap * tanh(s) if cap is not 0
    s = s + bias; s = s + mask, or of a boolean mask s where it is true and `fill` elsewhere
    s = -inf where key number - row number lies outside of `band` = [least, most]

`bias` and `mask`, both optional, are [b, 1 or H, 1 or S, 1 or T] with b a divisor of B: batch n has number n % b of them (so
windows of an image follow each other). Of these only the bias is differentiable, if it has all of S and T.

With a `seed`, an int64 scalar, each probability becomes zero with probability `drop`, and is otherwise divided by 1 - drop:
`keeps` says which, a pure function of the seed and of what the score is of. So the backward drops the same, and nothing of
it is saved.

`most` and `inverse`, float32 [B, H, S] (float64 for float64), are each row's greatest score and the inverse of its sum of
exp(s - most): apart, since in a logarithm of their product scores as low as the least float would absorb the sum, and rows
that such a mask hides throughout, which are uniform in eager, would have wrong gradients. A row of minus infinity is NaN, as
in a softmax. `exact` is the result before it is rounded, in their dtype. `total`, [B, H, S], is the sum over features of
grad * exact. It is subtracted from products of grad and single values: where these have much in common, a rounded
result would leave more error than gradient.

The gradients of query, of key and value, and of bias are three ops, so that each is one kernel and none is computed in vain;
the last one has `parts` summands [parts, b, 1 or H, S, T], in float32. The eager forms here follow the same formulas with
stored scores. Differentiable once.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from fxopt.errors import GradientError
from fxopt.ir.attention_backends import grouped, ungrouped
from fxopt.ir.random_ops import philox

_OPERANDS = "Tensor query, Tensor key, Tensor value, Tensor? bias, Tensor? mask"
_BACKWARD = f"Tensor grad, {_OPERANDS}, Tensor most, Tensor inverse, Tensor total"
_RULE = "Tensor? seed=None, *, float scale, float cap, float fill, int[]? band, float drop=0.0"
SCHEMAS = {
    "scored_attention": f"({_OPERANDS}, {_RULE}) -> (Tensor, Tensor, Tensor, Tensor)",
    "scored_attention_query": f"({_BACKWARD}, {_RULE}) -> Tensor",
    "scored_attention_key_value": f"({_BACKWARD}, {_RULE}) -> (Tensor, Tensor)",
    "scored_attention_bias": f"({_BACKWARD}, SymInt parts, {_RULE}) -> Tensor",
}

BIAS_PROGRAMS = 1024
"""How many programs of 64 x 64 scores the gradient of a bias is divided into, where batches allow it."""

BIAS_BYTES = 64 << 20
"""What its summands may take."""


@dataclass(frozen=True)
class _Scored:
    """Scores [B, H, S, T], their derivative with respect to the product (a factor), and where they were not filled."""

    scores: Tensor
    slope: Tensor | float
    kept: Tensor | None


def _product(a: Tensor, b: Tensor) -> Tensor:
    """a [B, H, M, K] @ b [B, H, K, N], in float32 at least: of half operands on a GPU by tensor cores, for which `a` is
    rounded to the type of `b`."""
    if _has_wide_sums(b):
        rows = a.to(b.dtype).reshape(-1, *a.shape[2:])
        return torch.bmm(rows, b.reshape(-1, *b.shape[2:]), out_dtype=torch.float32).unflatten(0, a.shape[:2])
    wide = torch.promote_types(b.dtype, torch.float32)
    return a.to(wide) @ b.to(wide)


def _has_wide_sums(x: Tensor) -> bool:
    """Whether torch has products of `x` with results in float32."""
    return x.is_cuda and x.dtype in (torch.float16, torch.bfloat16)


def _over_batches(x: Tensor, count: int) -> Tensor:
    return x if x.shape[0] in (1, count) else x.repeat(count // x.shape[0], 1, 1, 1)


def _scored(
    query: Tensor,
    key: Tensor,
    bias: Tensor | None,
    mask: Tensor | None,
    scale: float,
    cap: float,
    fill: float,
    band: list[int] | None,
) -> _Scored:
    scores = _product(query, ungrouped(query, key).mT).mul_(scale)
    slope: Tensor | float = scale
    if cap:
        scores = scores.tanh_()
        slope = (1 - scores * scores).mul_(cap * scale)
        scores = scores * cap
    if bias is not None:
        scores = scores.add_(_over_batches(bias, len(query)))
    kept = None
    if mask is not None and mask.dtype == torch.bool:
        kept = _over_batches(mask, len(query))
        scores = torch.where(kept, scores, fill)
    elif mask is not None:
        scores = scores.add_(_over_batches(mask, len(query)))
    if band is not None:
        rows, keys = (torch.arange(n, device=query.device) for n in scores.shape[-2:])
        away = keys - rows.unsqueeze(-1)
        scores = scores.masked_fill_((away < band[0]) | (away > band[1]), -math.inf)
    return _Scored(scores, slope, kept)


def dropped_below(drop: float) -> int:
    """A probability is dropped if its 32 random bits are below this number."""
    return min(round(drop * 2**32), 2**32 - 1)


_MIXING = (0x7FEB352D, 0x846CA68B - 2**32)


def _mixed(x: Tensor) -> Tensor:
    """The bits of int32 `x`, which it overwrites, so that each depends on all: "lowbias32" (Wellons, "Prospecting for hash
    functions", 2018)."""
    for shift, factor in zip((16, 15), _MIXING, strict=True):
        x = x.bitwise_xor_((x >> shift).bitwise_and_((1 << (32 - shift)) - 1)).mul_(factor)
    return x.bitwise_xor_((x >> 16).bitwise_and_(0xFFFF))


def keeps(seed: Tensor, drop: float, numbers: Tensor, rows: int, keys: int) -> Tensor:
    """Where dropout keeps something, boolean [*numbers.shape, rows, keys], of the heads with these numbers (batch * H +
    head, int64).

    Philox makes two words for each head; with these, numbers of rows and of keys are hashed, and both together once more. So
    a kernel has the bits of a block in any order for ten instructions each, where Philox itself takes sixty.
    """
    of_rows, of_keys = (
        _mixed(torch.arange(count, device=seed.device, dtype=torch.int32) ^ word.to(torch.int32).unsqueeze(-1))
        for count, word in zip((rows, keys), philox(seed.reshape(()), numbers)[:2], strict=True)
    )
    least = -(2**31)
    return _mixed(of_rows.unsqueeze(-1) ^ of_keys.unsqueeze(-2)).bitwise_xor_(least) >= dropped_below(drop) + least


MOST_SCORES = 1 << 26
"""Of the eager forms at a time."""

_WHOLE = ContextVar("whole", default=False)


@contextmanager
def in_one_piece() -> Iterator[None]:
    """In the block, eager forms store all scores, however many there are."""
    token = _WHOLE.set(True)
    try:
        yield
    finally:
        _WHOLE.reset(token)


_Whole = slice(None)
_Piece = tuple[slice, slice, slice]
"""Batches, heads and groups of them."""


def _pieces(query: Tensor, key: Tensor) -> Iterator[_Piece]:
    """All of the scores, in pieces of about MOST_SCORES."""
    (batch, heads, rows, _), (groups, keys) = query.shape, key.shape[1:3]
    if _WHOLE.get() or batch * heads * rows * keys <= MOST_SCORES:
        yield _Whole, _Whole, _Whole
        return
    members = heads // groups
    each = max(1, MOST_SCORES // (rows * keys * members))
    for b in range(batch):
        for g in range(0, groups, each):
            yield slice(b, b + 1), slice(g * members, (g + each) * members), slice(g, g + each)


def _part(x: Tensor, batches: slice, heads: slice) -> Tensor:
    """These batches and heads of `x`: itself for all of them."""
    return x if batches == _Whole else x[batches, heads]


def _of_piece(x: Tensor | None, batches: slice, heads: slice) -> Tensor | None:
    """What of a bias or mask belongs to a piece."""
    if x is None or batches == _Whole:
        return x
    number = batches.start % x.shape[0]
    return x[number : number + 1, heads if x.shape[1] > 1 else _Whole]


def _kept_share(piece: _Piece, query: Tensor, key: Tensor, seed: Tensor | None, drop: float) -> Tensor | None:
    """By what dropout multiplies the probabilities of a piece; None where nothing is dropped."""
    if seed is None:
        return None
    (batch, heads, rows, _), keys = query.shape, key.shape[2]
    numbers = _part(torch.arange(batch * heads, device=query.device).view(batch, heads), *piece[:2])
    wide = torch.promote_types(query.dtype, torch.float32)
    return keeps(seed, drop, numbers, rows, keys).to(wide).div_(1 - drop)


def attend(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    bias: Tensor | None,
    mask: Tensor | None,
    seed: Tensor | None = None,
    *,
    drop: float = 0.0,
    **rule: Any,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """What `fxopt::scored_attention` computes, with stored scores."""
    results = _fake(query, key, value)
    for batches, heads, groups in _pieces(query, key):
        q, k, v = _part(query, batches, heads), _part(key, batches, groups), _part(value, batches, groups)
        scores = _scored(q, k, _of_piece(bias, batches, heads), _of_piece(mask, batches, heads), **rule).scores
        most = scores.amax(-1)
        p = scores.sub_(most.unsqueeze(-1)).exp_()
        inverse = p.sum(-1).reciprocal_()
        share = _kept_share((batches, heads, groups), query, key, seed, drop)
        p = p if share is None else p.mul_(share)
        exact = _product(p.mul_(inverse.unsqueeze(-1)), ungrouped(q, v))
        for whole, part in zip(results, (exact, exact, most, inverse), strict=True):
            _part(whole, batches, heads).copy_(part)
    return results


@dataclass(frozen=True)
class _Slopes:
    """Of a piece, [B, H, S, T]: probabilities after dropout, the gradients of scores before a mask fills them, and of
    products."""

    p: Tensor
    of_scores: Tensor
    of_products: Tensor


def _slopes(
    piece: _Piece,
    grad: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    bias: Tensor | None,
    mask: Tensor | None,
    most: Tensor,
    inverse: Tensor,
    total: Tensor,
    seed: Tensor | None = None,
    *,
    drop: float = 0.0,
    **rule: Any,
) -> _Slopes:
    batches, heads, groups = piece
    share = _kept_share(piece, query, key, seed, drop)
    grad, query, most, inverse, total = (_part(x, batches, heads) for x in (grad, query, most, inverse, total))
    key, value = _part(key, batches, groups), _part(value, batches, groups)
    found = _scored(query, key, _of_piece(bias, batches, heads), _of_piece(mask, batches, heads), **rule)
    p = found.scores.sub_(most.unsqueeze(-1)).exp_().mul_(inverse.unsqueeze(-1))
    of_p = _product(grad, ungrouped(query, value).mT)
    of_p = of_p if share is None else of_p.mul_(share)
    of_scores = of_p.sub_(total.unsqueeze(-1)).mul_(p)
    p = p if share is None else p.mul_(share)
    if found.kept is not None:
        of_scores = torch.where(found.kept, of_scores, 0.0)
    return _Slopes(p, of_scores, of_scores * found.slope)


def query_gradient(grad: Tensor, query: Tensor, key: Tensor, *more: Any, **rule: Any) -> Tensor:
    """What `fxopt::scored_attention_query` computes: [B, H, S, E]."""
    out = torch.empty_like(query)
    for piece in _pieces(query, key):
        found, (batches, heads, groups) = _slopes(piece, grad, query, key, *more, **rule).of_products, piece
        own = ungrouped(_part(query, batches, heads), _part(key, batches, groups))
        _part(out, batches, heads).copy_(found.to(query.dtype) @ own)
    return out


def key_value_gradients(
    grad: Tensor, query: Tensor, key: Tensor, value: Tensor, *more: Any, **rule: Any
) -> tuple[Tensor, Tensor]:
    """What `fxopt::scored_attention_key_value` computes: [B, G, T, E] and [B, G, T, Ev]."""
    of_key, of_value = torch.empty_like(key), torch.empty_like(value)
    for piece in _pieces(query, key):
        found, (batches, heads, groups) = _slopes(piece, grad, query, key, value, *more, **rule), piece
        for out, slopes, x in ((of_key, found.of_products, query), (of_value, found.p, grad)):
            own = _part(out, batches, groups)
            own.copy_(grouped(slopes.to(query.dtype).mT @ _part(x, batches, heads), own))
    return of_key, of_value


def bias_gradient(
    grad: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    bias: Tensor,
    mask: Tensor | None,
    most: Tensor,
    inverse: Tensor,
    total: Tensor,
    parts: int,
    seed: Tensor | None = None,
    **rule: Any,
) -> Tensor:
    """What `fxopt::scored_attention_bias` computes: [parts, b, 1 or H, S, T].

    Turns are the batches with one number of the bias, then those of the next head if heads share it; each part has as many.
    """
    count, own_heads = bias.shape[:2]
    repeats = len(query) // count
    each = math.ceil(repeats * (query.shape[1] // own_heads) / parts)
    out = most.new_zeros((parts, count, own_heads, query.shape[2], key.shape[2]))
    for piece in _pieces(query, key):
        found = _slopes(piece, grad, query, key, value, bias, mask, most, inverse, total, seed, **rule).of_scores
        batches, heads, _ = piece
        if batches == _Whole:
            turns = found.unflatten(0, (repeats, count))
            turns = turns if own_heads > 1 else turns.permute(2, 0, 1, 3, 4).flatten(0, 1).unsqueeze(2)
            sums = torch.stack([some.sum(0) for some in turns.split(each)])
            return sums if len(sums) == parts else torch.cat((sums, out[len(sums) :]))
        for h, of_head in enumerate(found[0], heads.start):
            turn = batches.start // count + (repeats * h if own_heads == 1 else 0)
            out[turn // each, batches.start % count, h % own_heads] += of_head
    return out


def parts_of(query: Tensor, key: Tensor, bias: Tensor) -> int:
    """How many summands the gradient of `bias` is computed in: as few as occupy a GPU."""
    (batch, heads, rows, _), keys = query.shape, key.shape[2]
    apart, summed = bias.shape[0] * bias.shape[1], batch * heads // (bias.shape[0] * bias.shape[1])
    tiles = apart * ((rows + 63) // 64) * ((keys + 63) // 64)
    filling = (BIAS_PROGRAMS + tiles - 1) // tiles
    wanted = torch.sym_min(torch.sym_min(filling, BIAS_BYTES // (4 * apart * rows * keys)), summed)
    parts: int = torch.sym_max(1, wanted)
    return parts


# ---------------------------------------------------------------------- layouts


def _like(x: Tensor, width: Any) -> Tensor:
    """Uninitialized, in the layout of `x`, with another number of features."""
    if width == x.shape[-1]:
        return torch.empty_like(x)
    batch, heads, length, _ = x.shape
    return x.new_empty((batch, length, heads, width)).transpose(1, 2)


def _fake(query: Tensor, key: Tensor, value: Tensor, *_: Any, **rule: Any) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    wide = torch.promote_types(query.dtype, torch.float32)
    out = _like(query, value.shape[-1])
    most, inverse = (query.new_empty(query.shape[:3], dtype=wide) for _ in range(2))
    return out, torch.empty_like(out, dtype=wide), most, inverse


def _fake_query(grad: Tensor, query: Tensor, *_: Any, **rule: Any) -> Tensor:
    return torch.empty_like(query)


def _fake_key_value(grad: Tensor, query: Tensor, key: Tensor, value: Tensor, *_: Any, **rule: Any) -> tuple[Tensor, Tensor]:
    return torch.empty_like(key), torch.empty_like(value)


def _fake_bias(
    grad: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    bias: Tensor,
    mask: Tensor | None,
    most: Tensor,
    inverse: Tensor,
    total: Tensor,
    parts: int,
    seed: Tensor | None = None,
    **rule: Any,
) -> Tensor:
    return most.new_empty((parts, *bias.shape[:2], query.shape[2], key.shape[2]))


# ---------------------------------------------------------------------- autograd


def _save_for_backward(
    ctx: Any, inputs: tuple[Any, ...], keyword_only_inputs: dict[str, Any], output: tuple[Tensor, ...]
) -> None:
    ctx.rule = dict(keyword_only_inputs)
    ctx.mark_non_differentiable(*output[1:])
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(*inputs[:5], inputs[5] if len(inputs) > 5 else None, *output[1:])


def _differentiate(ctx: Any, grad: Tensor | None, *_: Any) -> tuple[Tensor | None, ...]:
    wanted = ctx.needs_input_grad
    if wanted[4]:
        raise GradientError("fxopt::scored_attention has no gradient for its mask; its bias has one")
    if grad is None:
        return (None,) * len(wanted)
    query, key, value, bias, mask, seed, exact, most, inverse = ctx.saved_tensors
    total = (grad.to(most.dtype) * exact).sum(-1)
    given = (grad, query, key, value, bias, mask, most, inverse, total)
    of_query = scored_attention_query(*given, seed, **ctx.rule) if wanted[0] else None
    of_key, of_value = scored_attention_key_value(*given, seed, **ctx.rule) if wanted[1] or wanted[2] else (None, None)
    of_bias = None
    if wanted[3]:
        summands = scored_attention_bias(*given, parts_of(query, key, bias), seed, **ctx.rule)
        of_bias = summands.sum(0).to(bias.dtype)
    found = (of_query, of_key if wanted[1] else None, of_value if wanted[2] else None, of_bias)
    return *found, *(None,) * (len(wanted) - len(found))


def _no_second_derivative(*_: Any) -> Any:
    raise GradientError(
        "attention is differentiable once: FXOPT_DISABLE=hand_attention leaves it as it is written, which has a second one"
    )


_LIBRARY = torch.library.Library("fxopt", "FRAGMENT")
for _name, _kernel, _layout in (
    ("scored_attention", attend, _fake),
    ("scored_attention_query", query_gradient, _fake_query),
    ("scored_attention_key_value", key_value_gradients, _fake_key_value),
    ("scored_attention_bias", bias_gradient, _fake_bias),
):
    _LIBRARY.define(_name + SCHEMAS[_name], tags=(torch.Tag.pt2_compliant_tag,))
    _LIBRARY.impl(_name, _kernel, "CompositeExplicitAutograd")
    torch.library.register_fake(f"fxopt::{_name}", _layout, lib=_LIBRARY)

scored_attention = torch.ops.fxopt.scored_attention.default
scored_attention_query = torch.ops.fxopt.scored_attention_query.default
scored_attention_key_value = torch.ops.fxopt.scored_attention_key_value.default
scored_attention_bias = torch.ops.fxopt.scored_attention_bias.default
SCORED = (scored_attention, scored_attention_query, scored_attention_key_value, scored_attention_bias)
EAGER: dict[Any, Callable[..., Any]] = dict(
    zip(SCORED, (attend, query_gradient, key_value_gradients, bias_gradient), strict=True)
)
"""What each op runs as by itself."""

torch.library.register_autograd("fxopt::scored_attention", _differentiate, setup_context=_save_for_backward, lib=_LIBRARY)
for _op in SCORED[1:]:
    torch.library.register_autograd(_op.name(), _no_second_derivative, lib=_LIBRARY)
