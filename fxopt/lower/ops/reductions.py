"""Reductions, softmax and scans."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from fxopt.lower.lowering import Lowering
from fxopt.lower.table import Table
from fxopt.lower.values import Computed, Value, at, broadcast_indices, cast, pointwise
from fxopt.ir.loops import Op

aten = torch.ops.aten
TABLE = Table()


def accumulator(dtype: torch.dtype) -> torch.dtype:
    """What a reduction of `dtype` accumulates in."""
    return torch.float32 if dtype in (torch.float16, torch.bfloat16) else dtype


def dims_of(x: Value, dim: Any) -> list[int]:
    """The dimensions a `dim` argument (None, an int or a list; empty means all) names."""
    given: Sequence[int] = list(range(len(x.shape))) if dim is None or dim == [] else [dim] if isinstance(dim, int) else dim
    return [d % max(len(x.shape), 1) for d in given] if x.shape else []


@TABLE.lowers(aten.sum.dim_IntList)
def sum_dims(ctx: Lowering, x: Value, dim: Any = None, keepdim: bool = False, dtype: torch.dtype | None = None) -> Value:
    out = ctx.out().dtype
    acc = accumulator(out)
    results = ctx.reduce(
        "sum", x.shape, dims_of(x, dim), lambda i: (cast(at(x, i), acc),),
        accumulate=acc, inputs=(x,), results=((0, out),), keepdim=keepdim,
    )  # fmt: skip
    return results[0]


@TABLE.lowers(aten._softmax.default)
def softmax(ctx: Lowering, x: Value, dim: int, half_to_float: bool) -> Computed:
    acc = accumulator(x.dtype)
    dims = dims_of(x, dim)
    top, total = ctx.reduce(
        "softmax_stats", x.shape, dims, lambda i: (cast(at(x, i), acc),),
        accumulate=acc, inputs=(x,), results=((0, acc), (1, acc)), keepdim=True,
    )  # fmt: skip

    def body(i: tuple[Any, ...]) -> Op:
        row = broadcast_indices(top.shape, i)
        shifted = Op("sub", (cast(at(x, i), acc), at(top, row)), acc)
        return Op("truediv", (Op("exp", (shifted,), acc), at(total, row)), acc)

    return pointwise(x.shape, ctx.out().dtype, x.device, body, (x,))
