"""Which mask a fused kernel is given for what hand-written attention does to its scores, and the calls that make it.

score_mask.py has the functions that those calls are of, and says why each form is right.
"""

from __future__ import annotations

import enum
import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import reduce

import torch
from torch import fx

from fxopt.passes.dynamo_facts import example
from fxopt.passes.hand_attention.score_mask import (
    FILL_BOUND,
    LEAST,
    Added,
    Filled,
    as_added,
    in_heads,
    literal,
    with_nan_rows,
    with_open_rows,
)
from fxopt.passes.sizes import Sizes

Call = Callable[..., fx.Node]
Heads = tuple[int, int] | None


class MaskForm(enum.Enum):
    NONE = "no mask"
    CAUSAL = "is_causal"
    BOOLEAN = "boolean; every row sees something"
    ADDITIVE = "added as it is; every row sees something"
    NAN_ROWS = "added; rows hidden throughout are NaN"
    OPEN_ROWS = "added; rows hidden throughout have equal scores"
    NAN_RESULTS = "as OPEN_ROWS, and the results of these rows are NaN"


@dataclass(frozen=True)
class MaskedScores:
    """What a plan is made from: masks in order, rows S and columns T of the scores, the products' dtype."""

    masks: tuple[Added | Filled, ...]
    heads: Heads
    rows: int | torch.SymInt
    columns: int | torch.SymInt
    dtype: torch.dtype
    trains: bool


def plan_mask(scores: MaskedScores, sizes: Sizes) -> MaskForm | str:
    """The form of the mask, or why there is none."""
    if not scores.masks:
        return MaskForm.NONE
    if any(_unsuitable(mask) for mask in scores.masks):
        return "a mask of an unsuitable type"
    fills = {mask.value for mask in scores.masks if isinstance(mask, Filled)}
    if any(not value <= max(FILL_BOUND, torch.finfo(scores.dtype).min) for value in fills):
        return "a fill that may not hide"
    known = _known(scores, sizes)
    if known is not None and bool((known.amax(-1).abs() < -FILL_BOUND).all()):
        return _form_of(known, scores)
    added = [mask for mask in scores.masks if isinstance(mask, Added)]
    if added and scores.trains:
        return "a gradient is wanted, and an added mask may hide whole rows"
    if scores.trains and fills == {-math.inf}:
        return MaskForm.NAN_RESULTS
    if fills - {-math.inf}:
        return MaskForm.OPEN_ROWS if len(fills) == 1 and not added else "a finite fill beside another mask"
    if not all(_exact(mask, scores.dtype) or _hides_or_not(mask.mask, scores.dtype, sizes) for mask in added):
        return "a mask more precise than the products"
    return MaskForm.NAN_ROWS


def _unsuitable(mask: Added | Filled) -> bool:
    shown = example(mask.mask)
    if shown is None:
        return True
    return shown.dtype != torch.bool if isinstance(mask, Filled) else not shown.dtype.is_floating_point


def _known(scores: MaskedScores, sizes: Sizes) -> torch.Tensor | None:
    """The masks together, [B or 1, H or 1, S, T] in float64, where they follow from sizes and there are keys.

    Sizes that are symbols are not known: a mask of one element would be repeated to the size of this call.
    """
    if not (isinstance(scores.rows, int) and isinstance(scores.columns, int) and scores.columns):
        return None
    total = torch.zeros(1, 1, 1, 1, dtype=torch.float64)
    for mask in scores.masks:
        value = known_mask(mask, scores, sizes)
        if value is None:
            return None
        total = total + value if isinstance(mask, Added) else total.masked_fill(value != 0, -math.inf)
    return total.expand(*total.shape[:2], scores.rows, scores.columns)


def known_mask(mask: Added | Filled, scores: MaskedScores, sizes: Sizes) -> torch.Tensor | None:
    """What one of the masks adds, [B or 1, H or 1, S or 1, T or 1] in float64, where that follows from sizes; of a fill, its
    value where it hides and 0 elsewhere."""
    value = sizes.value(mask.mask)
    if value is None:
        return None
    value = in_heads(value, literal(mask.lead) if scores.heads else None, scores.heads)
    if isinstance(mask, Added):
        return value.double() * mask.factor
    return torch.where(value != mask.inverted, mask.value, 0.0).double()


def _form_of(known: torch.Tensor, scores: MaskedScores) -> MaskForm | str:
    """The form of a mask with these values, which leaves every row something to see."""
    visible = known > FILL_BOUND
    if not bool((known[visible] == 0).all()):
        exact = all(_exact(mask, scores.dtype) for mask in scores.masks if isinstance(mask, Added))
        return MaskForm.ADDITIVE if exact else "a mask more precise than the products"
    if bool(visible.all()):
        return MaskForm.NONE
    triangle = torch.ones(visible.shape[-2:], dtype=torch.bool).tril()
    causal = scores.rows == scores.columns and bool((visible == triangle).all())
    return MaskForm.CAUSAL if causal else MaskForm.BOOLEAN


def _exact(mask: Added, dtype: torch.dtype) -> bool:
    """Whether a mask loses nothing in the products' type."""
    shown = example(mask.mask)
    return shown is not None and (shown.dtype == dtype or dtype == torch.float32) and shown.dtype != torch.float64


def _hides_or_not(mask: fx.Node, dtype: torch.dtype, sizes: Sizes) -> bool:
    """Whether a mask is where(condition, 0, huge) or a view of that: exact in bfloat16 once it is cut to LEAST."""
    while mask.op == "call_method" and mask.target in VIEWS:
        mask = mask.args[0]  # type: ignore[assignment]
    if dtype != torch.bfloat16 or mask.target is not torch.where:
        return False
    values = [sizes.number(x) for x in mask.args[1:]]
    return len(values) == 2 and all(v is not None and (v == 0 or v <= LEAST) for v in values)


VIEWS = frozenset({"expand", "unsqueeze", "view", "reshape", "contiguous"})


@dataclass(frozen=True)
class EmittedMask:
    """The mask to give (None: no mask), and what marks the rows whose query has to be zero."""

    mask: fx.Node | None = None
    hidden: fx.Node | None = None


def emit_mask(call: Call, scores: MaskedScores, form: MaskForm) -> EmittedMask:
    """Make the mask in its form; `call(function, *args)` adds a call to the graph."""
    if form in (MaskForm.NONE, MaskForm.CAUSAL):
        return EmittedMask()
    if form in (MaskForm.OPEN_ROWS, MaskForm.NAN_RESULTS):
        hidden = reduce(lambda a, b: call(torch.logical_or, a, b), (_hidden(call, scores, m) for m in scores.masks))
        return EmittedMask(call(with_open_rows, hidden, scores.dtype), hidden)
    total: fx.Node | None = None
    for mask in scores.masks:
        total = _joined(call, scores, total, mask)
    if form is MaskForm.BOOLEAN:
        return EmittedMask(call(torch.gt, total, FILL_BOUND))
    return EmittedMask(call(with_nan_rows if form is MaskForm.NAN_ROWS else torch.Tensor.to, total, scores.dtype))


def _joined(call: Call, scores: MaskedScores, total: fx.Node | None, mask: Added | Filled) -> fx.Node:
    """The additive mask that `total` is once `mask` was applied after it; every fill hides by minus infinity."""
    if isinstance(mask, Filled):
        hidden = _hidden(call, scores, mask)
        return call(as_added, hidden, scores.dtype) if total is None else call(torch.masked_fill, total, hidden, -math.inf)
    added = _in_heads(call, scores, mask)
    if mask.factor != 1:
        added = call(torch.mul, added, mask.factor)
    return added if total is None else call(torch.add, total, added)


def _hidden(call: Call, scores: MaskedScores, mask: Added | Filled) -> fx.Node:
    hidden = _in_heads(call, scores, mask)
    return call(torch.logical_not, hidden) if isinstance(mask, Filled) and mask.inverted else hidden


def _in_heads(call: Call, scores: MaskedScores, mask: Added | Filled) -> fx.Node:
    return call(in_heads, mask.mask, literal(mask.lead) if scores.heads else None, scores.heads)
