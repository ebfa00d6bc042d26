"""Histograms of calibration on GPUs as kernels: one that counts, one that adds up.

Counting adds one to a bin in memory, and most values of an operand meet in some tens of bins. So neighbours are counted in a
histogram of their own, of up to `PARTS`, which are added up afterwards. Sums of integers are the same in any order.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch

from fxopt.ir.exprs import Int, add, floordiv, mod, mul, symbol
from fxopt.ir.loops import Const, Op, Scalar, indirect_symbol
from fxopt.ir.observer_ops import BINS, FIRST_NOT_FINITE, SHIFT, exponent_histogram, sampling_step
from fxopt.lower.lowering import Lowering
from fxopt.lower.ops.reductions import reduce_elements
from fxopt.lower.table import Table
from fxopt.lower.values import Computed, Indirect, Stored, Value, at, cast, pointwise, size_value

TABLE = Table()

PARTS = 256
"""Histograms that are counted apart: two megabytes, which stay in a GPU's cache."""

NEIGHBORS = 1024
"""Elements in a row that are counted in one of them: what a program or two take."""


@TABLE.lowers(exponent_histogram)
def _histogram(ctx: Lowering, x: Value, least: Value | None = None, largest: Value | None = None) -> Any:
    shape = tuple(size for size in x.shape if isinstance(size, int))
    step = sampling_step(shape)
    if x.device.type != "cuda" or len(shape) != len(x.shape) or 0 in shape or (step > 1 and least is largest is None):
        return ctx.call(ctx.node)
    places = (-(-shape[0] // step), *shape[1:]) if shape else ()
    counts = _counts_apart(ctx, x, step, places)
    total = reduce_elements(ctx, "sum", counts, (0,), False, torch.int64, accumulate=torch.int64)
    if step == 1:
        return total
    ends = [end for end in (least, largest) if end is not None]

    def with_ends(i: tuple[Int, ...]) -> Scalar:
        count = at(total, i)
        for end in ends:
            met = Op("eq", (_bin(at(end, ())), size_value(i[0])), torch.bool)
            count = Op("add", (count, cast(met, torch.int64)), torch.int64)
        return count

    return pointwise((BINS,), torch.int64, x.device, with_ends, (total, *ends))


def _counts_apart(ctx: Lowering, x: Value, step: int, places: Sequence[int]) -> Stored:
    """int32 [parts, BINS]: counts of every `step`-th row of `x`, of which there are `places`."""
    parts = max(1, min(PARTS, -(-math.prod(places) // NEIGHBORS)))
    counts = ctx.store(Computed(Const(0, torch.int32), torch.int32, x.device, (parts, BINS)))

    def element(i: tuple[Int, ...]) -> tuple[Sequence[Int], tuple[Indirect, ...], Scalar]:
        flat: Int = 0
        for index, size in zip(i, places, strict=True):
            flat = add(mul(flat, size), index)
        where = (mul(i[0], step), *i[1:]) if i else ()
        sym, binding = indirect_symbol(_bin(at(x, where)), BINS)
        return (mod(floordiv(flat, NEIGHBORS), parts), symbol(sym)), (binding,), Const(1, torch.int32)

    return ctx.scatter(counts, places, element, "add", (x,))


def _bin(value: Scalar) -> Scalar:
    """The bin of a floating scalar, int64."""
    bits = Op("bitcast", (Op("abs", (cast(value, torch.float32),), torch.float32),), torch.int32)
    shifted = Op("rshift", (bits, Const(SHIFT, torch.int32)), torch.int32)
    return cast(Op("minimum", (shifted, Const(FIRST_NOT_FINITE + 1, torch.int32)), torch.int32), torch.int64)
