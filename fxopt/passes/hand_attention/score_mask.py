"""What hand-written attention does to its scores, as the additive mask of a fused kernel that gives the same values.

Three things are not the same in a fused kernel, and are put right here:

- A row hidden by minus infinity throughout is NaN when written out, zero in a fused kernel. Its mask becomes NaN, and so
  does the row. Where gradients are wanted, that would make all of them NaN, and eager's fill only the values': there NaN is
  added to the result.
- A row hidden by a finite fill throughout has equal scores when written out. Its query becomes zero and its mask too: equal
  scores again, and no gradient to the query, as `masked_fill` has none.
- A large finite value that is *added* to a whole row absorbs the scores. So it does in a fused forward; but fused backwards
  recompute exp(score - logsumexp), where the logarithm of the row's length is absorbed as well: wrong gradients. Such masks
  are therefore taken only when no gradient is wanted, or when it is known that every row has something to see.

What stays different: a NaN or infinity among the scores that a fill would have replaced reaches its row.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, fx

FILL_BOUND = -(2.0**24)
"""From here down a finite fill hides: exp(fill - score) is 0 unless all visible scores of a row are as low, and there
neighbouring float32 numbers are 2 apart: a softmax says nothing. -1e4 does not pass: scores of that size are plausible.
In float16, whose numbers end before, the least one hides."""

LEAST = -(2.0**126)
"""Lower masks are cut to this, so that kernels that work in powers of two, and multiply by log2(e), do not overflow. It
still absorbs any score that is not itself beyond 2**100, and is exact in bfloat16."""


Lead = tuple[int | torch.SymInt, ...]
"""The sizes of scores but for their last two."""


@dataclass(frozen=True)
class Added:
    """scores + factor * mask, where the scores had the leading sizes `lead`."""

    mask: fx.Node
    factor: float
    lead: Lead


@dataclass(frozen=True)
class Filled:
    """`value` instead of the scores where `mask` is true (where it is false if `inverted`)."""

    mask: fx.Node
    inverted: bool
    value: float
    lead: Lead


UNKNOWN = -1
"""Stands for a leading size that is a symbol where sizes are literals of a call."""


def literal(lead: Lead) -> tuple[int, ...]:
    """`lead` with UNKNOWN for symbols."""
    return tuple(size if isinstance(size, int) else UNKNOWN for size in lead)


def in_heads(x: Tensor, lead: tuple[int, ...] | None, heads: tuple[int, int] | None) -> Tensor:
    """`x` [*lead, M, N] as [*heads, M, N], both up to broadcasting; without `heads`, sizes of 1 are put in front.

    For a mask, `lead` is that of the scores it was applied to. Along a size that is UNKNOWN nothing is expanded.
    """
    if lead is None or heads is None:
        return x[(None,) * (4 - x.dim())]
    x = x[(None,) * (len(lead) + 2 - x.dim())]
    tail = x.shape[-2:]
    if all(size == 1 for size in x.shape[:-2]):
        return x.reshape(1, 1, *tail)
    return x.expand(*lead, *tail).reshape(*heads, *tail)


def with_lead(out: Tensor, lead: tuple[int, ...]) -> Tensor:
    """`out` [B, H, S, E] as [*lead, S, E], of which one size at most is UNKNOWN."""
    return out if lead[1:] == (out.shape[1],) else out.reshape(*lead, *out.shape[-2:])


def as_added(hidden: Tensor, dtype: torch.dtype) -> Tensor:
    """Minus infinity where `hidden`, a boolean tensor, is true, and 0 elsewhere."""
    return torch.zeros_like(hidden, dtype=dtype).masked_fill(hidden, float("-inf"))


def with_nan_rows(mask: Tensor, dtype: torch.dtype) -> Tensor:
    """An additive mask in `dtype`, cut to LEAST, with NaN in the rows that hide everything by minus infinity."""
    hidden = mask == float("-inf")
    cut = mask.clamp(min=max(LEAST, torch.finfo(mask.dtype).min)).to(dtype).masked_fill(hidden, float("-inf"))
    return cut.masked_fill(hidden.all(-1, keepdim=True), float("nan"))


def with_open_rows(hidden: Tensor, dtype: torch.dtype) -> Tensor:
    """`as_added`, with 0 throughout the rows that are hidden throughout: the partner of `without_hidden_rows`."""
    return as_added(hidden, dtype).masked_fill(hidden.all(-1, keepdim=True), 0.0)


def with_nan_results(result: Tensor, value: Tensor, hidden: Tensor) -> Tensor:
    """`result` [B, H, S, E] with NaN in rows that are hidden throughout, which makes the gradient of `value` NaN."""
    rows = hidden.all(-1, keepdim=True)
    weight = torch.zeros_like(rows, dtype=result.dtype).masked_fill(rows, float("nan"))
    return result + weight * value.mean(-2, keepdim=True)


def without_hidden_rows(query: Tensor, hidden: Tensor) -> Tensor:
    """The query [B, H, S, E] with zeros in the rows for which `hidden` [.., S or 1, T or 1] is true throughout."""
    return query.masked_fill(hidden.all(-1, keepdim=True), 0.0)
