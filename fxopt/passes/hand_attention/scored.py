"""Attention that is written out and trained, with scores that no library's backward takes, as `fxopt::scored_attention`.

That is what mask_plan.py leaves: capped scores, a bias that learns, masks that are added and may hide whole rows; and what
has a mask and dropout. The op
does to the scores what is written, fills as fills, so every value stays what it was. Masks whose values follow from sizes
and which hide all but a band around a diagonal (causal ones, windows) become that band: nothing outside is visited.
"""

from __future__ import annotations

import math
import operator
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, fx

from fxopt.ir import random_ops
from fxopt.ir.scored_attention_op import scored_attention
from fxopt.ir.spec import known_equal
from fxopt.passes.attention import chooses_late
from fxopt.passes.dynamo_facts import example
from fxopt.passes.hand_attention.mask_plan import Call, known_mask
from fxopt.passes.hand_attention.score_mask import FILL_BOUND, UNKNOWN, Added, Filled, Lead, in_heads, literal
from fxopt.passes.hand_attention.written import CUDA_HEAD_MULTIPLE, WrittenAttention, obstacle_to_scoring
from fxopt.passes.sizes import Sizes

DTYPES = (torch.float16, torch.bfloat16)
MOST_FEATURES = 128
MOST_SUMMED = 1 << 22
"""Elements of a sum of masks that is larger than each of them."""

LEAST_KEYS = 16
"""With fewer keys or rows, what is saved is less than a block of a kernel."""

Mask = Added | Filled


@dataclass(frozen=True)
class ScoredForm:
    """How scores are made: what is added with and without a gradient, what is filled (all with one value), and a band."""

    biases: tuple[Added, ...]
    added: tuple[Added, ...]
    fills: tuple[Filled, ...]
    band: tuple[int, int] | None


def plan_scored(written: WrittenAttention, sizes: Sizes) -> ScoredForm | str:
    """The form of the scores, or why there is none."""
    reason = obstacle_to_scoring(written) or _unsuitable(written)
    if reason is not None:
        return reason
    scores = written.scores
    band, masks = _without_band(scores.masks, written, sizes)
    added = [mask for mask in masks if isinstance(mask, Added)]
    fills = tuple(mask for mask in masks if isinstance(mask, Filled))
    if any(not _is_mask(mask) for mask in masks):
        return "a mask of an unsuitable type"
    if len({fill.value for fill in fills}) > 1:
        return "fills of several values"
    if fills and fills[0].value != -math.inf and any(isinstance(mask, Added) for mask in masks[masks.index(fills[0]) :]):
        return "a mask added to a fill"
    learned = [mask for mask in added if _learns(mask)]
    others = [mask for mask in added if not _learns(mask)]
    if fills:
        learned, others = added, []
    elif not learned and len(others) > 1:
        learned, others = others[:1], others[1:]
    if not all(_can_be_summed(masks, written) for masks in (learned, others)):
        return "more masks than a kernel takes"
    return ScoredForm(tuple(learned), tuple(others), fills, band)


def _can_be_summed(masks: Sequence[Added], written: WrittenAttention) -> bool:
    """Whether a kernel may read one tensor in the place of `masks`: their sum is no larger than the largest, or small."""
    if len(masks) < 2:
        return True
    shapes = [shown.shape for mask in masks if (shown := example(mask.mask)) is not None]
    if written.heads is not None and len({literal(mask.lead) for mask in masks}) > 1:
        return False
    if any(isinstance(size, torch.SymInt) for shape in shapes for size in shape):
        return any(all(_broadcasts(shape, whole) for shape in shapes) for whole in shapes)
    return math.prod(torch.broadcast_shapes(*shapes)) <= max(*map(math.prod, shapes), MOST_SUMMED)


def _broadcasts(shape: torch.Size, whole: torch.Size) -> bool:
    """Whether something of one shape is known to broadcast to the other one."""
    pairs = zip(reversed(shape), reversed(whole), strict=False)
    return len(shape) <= len(whole) and all(known_equal(size, 1) or known_equal(size, n) for size, n in pairs)


def _unsuitable(written: WrittenAttention) -> str | None:
    scores, (query, key, value) = written.scores, written.operands
    if not scores.trains:
        return "no gradient is wanted"
    if not chooses_late(query.device):
        return "a device without kernels for scores"
    if scores.dtype not in DTYPES:
        return "float32 products"
    heads = written.leads[0][-1:] if written.heads is None else written.heads[1:]
    if not all(isinstance(n, int) for n in (*heads, query.shape[-1], value.shape[-1])) or UNKNOWN in heads:
        return "a symbolic number of heads or features"
    if max(query.shape[-1], value.shape[-1]) > MOST_FEATURES:
        return "more features than kernels for scores keep in registers"
    if value.shape[-1] % CUDA_HEAD_MULTIPLE:
        return "a size of values without a fused kernel"
    if any(isinstance(n, int) and n < LEAST_KEYS for n in (query.shape[-2], key.shape[-2])):
        return "few rows or keys"
    return "deterministic algorithms are asked for" if torch.are_deterministic_algorithms_enabled() else None


def _learns(mask: Added) -> bool:
    shown = example(mask.mask)
    return shown is not None and shown.requires_grad


def _is_mask(mask: Mask) -> bool:
    shown = example(mask.mask)
    if shown is None:
        return False
    if isinstance(mask, Filled):
        return shown.dtype == torch.bool
    return shown.dtype in (*DTYPES, torch.float32) and math.isfinite(mask.factor)


# ---------------------------------------------------------------------- bands


def _without_band(
    masks: Sequence[Mask], written: WrittenAttention, sizes: Sizes
) -> tuple[tuple[int, int] | None, tuple[Mask, ...]]:
    """(the band that some of `masks` leave open together, the others); (None, all) where they leave none.

    Within a fill by a finite value a row that the others hide throughout would see what lies outside, so then no other mask
    may hide.
    """
    scores = written.scores
    known = {k: value for k, m in enumerate(masks) if (value := known_mask(m, scores, sizes)) is not None}
    hiding = {k: value for k, value in known.items() if _hides_or_not(masks[k], value)}
    if not hiding:
        return None, tuple(masks)
    total = sum(hiding.values())
    assert isinstance(total, Tensor)
    rows, keys = written.operands[0].shape[-2], written.operands[1].shape[-2]
    open_ = (total == 0).expand(*total.shape[:2], rows, keys).flatten(0, 1)
    away = torch.arange(keys) - torch.arange(rows)[:, None]
    if not bool((open_ == open_[0]).all()) or not bool(open_[0].any(-1).all()):
        return None, tuple(masks)
    band = int(away[open_[0]].min()), int(away[open_[0]].max())
    if not torch.equal(open_[0], (away >= band[0]) & (away <= band[1])):
        return None, tuple(masks)
    rest = tuple(m for k, m in enumerate(masks) if k not in hiding)
    harmless = all(_never_hides(m, known.get(k)) for k, m in enumerate(masks) if k not in hiding)
    if not harmless and any(bool((value[value != 0] != -math.inf).any()) for value in hiding.values()):
        return None, tuple(masks)
    return (None if bool(open_.all()) else band), rest


def _hides_or_not(mask: Mask, value: Tensor) -> bool:
    """Whether a mask with these values leaves every score as it is or hides it."""
    if isinstance(mask, Filled) and not mask.value <= FILL_BOUND:
        return False
    return bool(((value == 0) | (value <= FILL_BOUND)).all())


def _never_hides(mask: Mask, value: Tensor | None) -> bool:
    return isinstance(mask, Added) and value is not None and bool((value.abs() < -FILL_BOUND).all())


# ---------------------------------------------------------------------- calls


def emit_scored(call: Call, written: WrittenAttention, form: ScoredForm, operands: Sequence[fx.Node]) -> fx.Node:
    """The call [B, H, S, Ev] on query, key and value; `call(function, *args)` adds a call to the graph."""
    heads, before = written.heads, written.before
    rows, keys = written.operands[0].shape[-2], written.operands[1].shape[-2]

    def placed(x: fx.Node, lead: Lead) -> fx.Node:
        if heads is not None:
            return call(by_head, x, literal(lead), heads)
        missing = 4 - x.meta["example_value"].dim()
        return call(operator.getitem, x, (None,) * missing) if missing else x

    def addend(masks: tuple[Added, ...]) -> fx.Node | None:
        """Their sum, in the type that adding them one by one to the scores has."""
        total: fx.Node | None = None
        for mask in masks:
            x = mask.mask if mask.factor == 1 else call(torch.mul, call(torch.Tensor.float, mask.mask), mask.factor)
            total = x if total is None else call(torch.add, total, x)
        if total is None:
            return None
        total = placed(total, masks[0].lead)
        shape = total.meta["example_value"].shape
        whole = all(map(known_equal, shape[2:], (rows, keys)))
        return total if whole or not any(map(_learns, masks)) else call(of_all_scores, total, *operands[:2])

    hidden = [placed(fill.mask, fill.lead) for fill in form.fills]
    hidden = [call(torch.logical_not, x) if fill.inverted else x for x, fill in zip(hidden, form.fills, strict=True)]
    mask = addend(form.added)
    if hidden:
        total = hidden[0]
        for more in hidden[1:]:
            total = call(torch.logical_or, total, more)
        mask = call(torch.logical_not, total)
    rule = {
        "scale": before.scale,
        "cap": before.cap or 0.0,
        "fill": form.fills[0].value if form.fills else -math.inf,
        "band": None if form.band is None else list(form.band),
    }
    drop = written.after.drop
    seed = call(random_ops.seed, written.operands[0].device) if drop else None
    pair = call(scored_attention, *operands, addend(form.biases), mask, seed, **rule, drop=drop)
    return call(operator.getitem, pair, 0)


def of_all_scores(x: Tensor, query: Tensor, key: Tensor) -> Tensor:
    """`x` [b, h, 1 or S, 1 or T] for each row and key."""
    return x.expand(*x.shape[:2], query.shape[-2], key.shape[-2])


def by_head(x: Tensor, lead: tuple[int, ...], heads: tuple[int, int]) -> Tensor:
    """`x`, which broadcasts to [*lead, M, N], as [b, h, M, N] with b a divisor of B, h 1 or H and number n % b for batch n.

    `heads` are [B, H], and `lead` is that in another shape. `x` is expanded only if it does not repeat so. B may be UNKNOWN.
    """
    x = x[(None,) * (len(lead) + 2 - x.dim())]
    *outer, last = x.shape[:-2]
    if all(n == 1 for n in x.shape[:-2]):
        return x.reshape(1, 1, *x.shape[-2:])
    if len(lead) == 1:
        return x.reshape(*heads, *x.shape[-2:])
    while outer and outer[0] == 1:
        outer.pop(0)
    own = lead[len(lead) - 1 - len(outer) : -1]
    if lead[-1] == heads[1] and all(n in (UNKNOWN, size) for n, size in zip(own, outer, strict=True)):
        return x.reshape(math.prod(outer), last, *x.shape[-2:])
    return in_heads(x, lead, heads)
