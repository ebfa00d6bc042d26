"""Cumulative sums and products."""

from __future__ import annotations

from collections.abc import Callable

import torch

from fxopt.lower.layout import dense_strides
from fxopt.lower.lowering import Lowering
from fxopt.lower.ops.elementwise import compute_dtype
from fxopt.lower.table import Table
from fxopt.lower.values import Value

aten = torch.ops.aten
TABLE = Table()


def _cumulative(kind: str) -> Callable[..., Value]:
    def lower(ctx: Lowering, x: Value, dim: int, *, dtype: torch.dtype | None = None) -> Value:
        out = ctx.out()
        return ctx.scan(kind, x, dim, compute_dtype(out.dtype), out.dtype, strides=dense_strides(ctx, out))

    return lower


TABLE.lowers(aten.cumsum.default)(_cumulative("cumsum"))
TABLE.lowers(aten.cumprod.default)(_cumulative("cumprod"))
