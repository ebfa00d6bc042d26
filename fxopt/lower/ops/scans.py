"""Cumulative sums, products, extremes and sums of exponentials."""

from __future__ import annotations

from collections.abc import Callable

import torch

from fxopt.ir.exprs import Int
from fxopt.ir.loops import IndexValue, Scalar
from fxopt.ir.rounding import rounded
from fxopt.lower.layout import dense_strides
from fxopt.lower.lowering import Lowering
from fxopt.lower.ops import terms as t
from fxopt.lower.ops.elementwise import compute_dtype
from fxopt.lower.ops.terms import Term
from fxopt.lower.table import Table
from fxopt.lower.values import Value, at, cast, pointwise

aten = torch.ops.aten
TABLE = Table()


def _cumulative(kind: str) -> Callable[..., Value]:
    def lower(ctx: Lowering, x: Value, dim: int, *, dtype: torch.dtype | None = None) -> Value:
        out = ctx.out()
        return ctx.scan(kind, x, dim, compute_dtype(out.dtype), out.dtype, strides=dense_strides(ctx, out))

    return lower


TABLE.lowers(aten.cumsum.default)(_cumulative("cumsum"))
TABLE.lowers(aten.cumprod.default)(_cumulative("cumprod"))
TABLE.lowers(aten.logcumsumexp.default)(_cumulative("logcumsumexp"))


def _cumulative_extreme(kind: str) -> Callable[..., tuple[Value, Value]]:
    """Values, and where each was last seen: the largest index so far whose element equals the running extreme, or is NaN."""

    def lower(ctx: Lowering, x: Value, dim: int) -> tuple[Value, Value]:
        compute = torch.uint8 if x.dtype == torch.bool else compute_dtype(x.dtype)
        values = ctx.scan(kind, x, dim, compute, x.dtype, strides=dense_strides(ctx, ctx.out(0)))

        def place(indices: tuple[Int, ...]) -> Scalar:
            element, running = (Term(cast(rounded(at(v, indices)), compute)) for v in (x, values))
            here = Term(IndexValue(indices[dim] if indices else 0))
            return t.where(element.eq(running) | element.ne(element), here, 0).scalar

        places = pointwise(x.shape, torch.int64, x.device, place, (x, values))
        return values, ctx.scan("cummax", places, dim, torch.int64, torch.int64, strides=dense_strides(ctx, ctx.out(1)))

    return lower


TABLE.lowers(aten.cummax.default)(_cumulative_extreme("cummax"))
TABLE.lowers(aten.cummin.default)(_cumulative_extreme("cummin"))
