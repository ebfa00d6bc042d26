"""Reductions: sums, products, extremes, moments, norms, and their positions."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch

from fxopt.ir.exprs import Int, prod, ravel
from fxopt.ir.loops import Const, IndexValue, Scalar
from fxopt.ir.rounding import rounded
from fxopt.lower.layout import dense_strides
from fxopt.lower.lowering import Lowering
from fxopt.lower.ops import terms as t
from fxopt.lower.ops.elementwise import compute_dtype, widened
from fxopt.lower.ops.terms import Number, Term
from fxopt.lower.table import Table
from fxopt.lower.values import Computed, Value, at, cast, pointwise, size_value

aten = torch.ops.aten
TABLE = Table()

Element = Callable[[Term], Term]


def dims_of(x: Value, dim: Any) -> list[int]:
    """The dimensions a `dim` argument (None, an int or a list; empty means all) names."""
    given: Sequence[int] = [dim] if isinstance(dim, int) else dim or range(len(x.shape))
    return [d % len(x.shape) for d in given] if x.shape else []


def reduced_count(x: Value, dims: Sequence[int]) -> Int:
    """How many elements each reduction over `dims` joins."""
    return prod(x.shape[d] for d in dims)


def reduce_elements(
    ctx: Lowering,
    kind: str,
    x: Value,
    dims: Sequence[int],
    keepdim: bool,
    dtype: torch.dtype,
    *,
    element: Element | None = None,
    accumulate: torch.dtype | None = None,
    exact: bool = False,
    position: int | None = None,
) -> Value:
    """The `kind` reduction of element(x) over `dims`, accumulated in `accumulate` and stored as `dtype`.

    `position` is that of the result among the current node's several. `exact` rounds half types first, as memory would.
    """
    acc = compute_dtype(dtype) if accumulate is None else accumulate
    read = compute_dtype(x.dtype) if acc == torch.bool or not acc.is_floating_point else acc

    def operand(indices: tuple[Int, ...]) -> tuple[Scalar, ...]:
        scalar = rounded(at(x, indices)) if exact else at(x, indices)
        term = Term(widened(scalar, acc if element is None else read))
        return ((term if element is None else element(term)).to(acc).scalar,)

    strides = dense_strides(ctx, ctx.out(position))
    return ctx.reduce(
        kind, x.shape, dims, operand, accumulate=acc, inputs=(x,), results=((0, dtype),), keepdim=keepdim, strides=strides
    )[0]  # fmt: skip


def after(x: Value, dtype: torch.dtype, fn: Callable[[Term], Term]) -> Computed:
    """fn of every element of a reduction's result, as `dtype`."""
    return pointwise(x.shape, dtype, x.device, lambda i: fn(Term(at(x, i))).scalar, (x,))


# ---------------------------------------------------------------------- sums and products


@TABLE.lowers(aten.sum.default)
def _sum(ctx: Lowering, x: Value, dtype: torch.dtype | None = None) -> Value:
    return _sum_dims(ctx, x, None)


@TABLE.lowers(aten.sum.dim_IntList)
def _sum_dims(ctx: Lowering, x: Value, dim: Any = None, keepdim: bool = False, dtype: torch.dtype | None = None) -> Value:
    return reduce_elements(ctx, "sum", x, dims_of(x, dim), keepdim, ctx.out().dtype)


@TABLE.lowers(aten.mean.default)
def _mean(ctx: Lowering, x: Value, dtype: torch.dtype | None = None) -> Value:
    return _mean_dims(ctx, x, None)


@TABLE.lowers(aten.mean.dim)
def _mean_dims(ctx: Lowering, x: Value, dim: Any = None, keepdim: bool = False, dtype: torch.dtype | None = None) -> Value:
    out, dims = ctx.out().dtype, dims_of(x, dim)
    acc = compute_dtype(out)
    total = reduce_elements(ctx, "sum", x, dims, keepdim, acc)
    count = Term(size_value(reduced_count(x, dims), acc))
    return after(total, out, lambda s: s / count)


@TABLE.lowers(aten.prod.default)
def _prod(ctx: Lowering, x: Value, dtype: torch.dtype | None = None) -> Value:
    return reduce_elements(ctx, "prod", x, dims_of(x, None), False, ctx.out().dtype)


@TABLE.lowers(aten.prod.dim_int)
def _prod_dim(ctx: Lowering, x: Value, dim: int, keepdim: bool = False, dtype: torch.dtype | None = None) -> Value:
    return reduce_elements(ctx, "prod", x, dims_of(x, dim), keepdim, ctx.out().dtype)


def _nonzero(x: Term) -> Term:
    return x.ne(0)


@TABLE.lowers(aten.count_nonzero.default, aten.count_nonzero.dim_IntList)
def _count_nonzero(ctx: Lowering, x: Value, dim: Any = None) -> Value:
    return reduce_elements(ctx, "sum", x, dims_of(x, dim), False, torch.int64, element=_nonzero)


# ---------------------------------------------------------------------- any, all, extremes


def _logical(kind: str) -> Callable[..., Value]:
    def lower(ctx: Lowering, x: Value, dim: Any = None, keepdim: bool = False) -> Value:
        out = ctx.out().dtype
        if x.shape and isinstance(dim, (list, tuple)) and not dim:  # here, and only here, an empty list means no dimension
            return pointwise(x.shape, out, x.device, lambda i: cast(at(x, i), torch.bool), (x,))
        element = None if x.dtype == torch.bool else _nonzero
        return reduce_elements(ctx, kind, x, dims_of(x, dim), keepdim, out, element=element, accumulate=torch.bool)

    return lower


TABLE.lowers(aten.any.default, aten.any.dim, aten.any.dims)(_logical("any"))
TABLE.lowers(aten.all.default, aten.all.dim, aten.all.dims)(_logical("all"))

_OF_BOOL = {"max": "any", "min": "all"}


def extreme(ctx: Lowering, kind: str, x: Value, dim: Any, keepdim: bool, position: int | None = None) -> Value:
    """The maximum or minimum over `dim`, NaN where there is one."""
    kind = _OF_BOOL[kind] if x.dtype == torch.bool else kind
    return reduce_elements(ctx, kind, x, dims_of(x, dim), keepdim, x.dtype, position=position)


def _extreme_of_dims(kind: str) -> Callable[..., Value]:
    def lower(ctx: Lowering, x: Value, dim: Any = None, keepdim: bool = False) -> Value:
        return extreme(ctx, kind, x, dim, keepdim)

    return lower


TABLE.lowers(aten.amax.default, aten.max.default)(_extreme_of_dims("max"))
TABLE.lowers(aten.amin.default, aten.min.default)(_extreme_of_dims("min"))


@TABLE.lowers(aten.aminmax.default)
def _aminmax(ctx: Lowering, x: Value, *, dim: int | None = None, keepdim: bool = False) -> tuple[Value, Value]:
    return extreme(ctx, "min", x, dim, keepdim, 0), extreme(ctx, "max", x, dim, keepdim, 1)


def extreme_position(
    ctx: Lowering, kind: str, x: Value, dim: int | None, keepdim: bool, position: int | None = None
) -> Value:
    """Where the first maximum or minimum is, along `dim` or (None) in the flattened tensor; int64."""
    dims = dims_of(x, dim)

    def operands(indices: tuple[Int, ...]) -> tuple[Scalar, ...]:
        element = cast(rounded(at(x, indices)), torch.uint8 if x.dtype == torch.bool else compute_dtype(x.dtype))
        place = (indices[dims[0]] if dims else 0) if dim is not None else ravel(indices, x.shape)
        return element, IndexValue(place)

    strides = dense_strides(ctx, ctx.out(position))
    return ctx.reduce(
        kind, x.shape, dims, operands, accumulate=torch.int64, inputs=(x,), results=((0, torch.int64),), keepdim=keepdim,
        strides=strides,
    )[0]  # fmt: skip


def _position(kind: str) -> Callable[..., Value]:
    def lower(ctx: Lowering, x: Value, dim: int | None = None, keepdim: bool = False) -> Value:
        return extreme_position(ctx, kind, x, dim, keepdim)

    return lower


TABLE.lowers(aten.argmax.default)(_position("argmax"))
TABLE.lowers(aten.argmin.default)(_position("argmin"))


def _extreme_with_position(kind: str) -> Callable[..., tuple[Value, Value]]:
    def lower(ctx: Lowering, x: Value, dim: int, keepdim: bool = False) -> tuple[Value, Value]:
        return extreme(ctx, kind, x, dim, keepdim, 0), extreme_position(ctx, f"arg{kind}", x, dim, keepdim, 1)

    return lower


TABLE.lowers(aten.max.dim)(_extreme_with_position("max"))
TABLE.lowers(aten.min.dim)(_extreme_with_position("min"))


# ---------------------------------------------------------------------- moments


def moments(ctx: Lowering, x: Value, dims: Sequence[int], keepdim: bool, outs: Sequence[int | None]) -> tuple[Value, Value]:
    """Mean and sum of squared distances from it, over `dims`, in the dtype that x computes in.

    `outs` are the positions, among the current node's results, of the two whose layout they take.
    """
    acc = compute_dtype(x.dtype)

    def operand(indices: tuple[Int, ...]) -> tuple[Scalar, ...]:
        return (widened(at(x, indices), acc),)

    mean, distances = ctx.reduce(
        "welford", x.shape, dims, operand, accumulate=acc, inputs=(x,), results=((0, acc), (1, acc)), keepdim=keepdim,
        strides=dense_strides(ctx, ctx.out(outs[0])),
    )  # fmt: skip
    return mean, distances


def _variance(
    x: Value, dims: Sequence[int], total: Value, correction: Number | None, root: bool, dtype: torch.dtype
) -> Value:
    """total / max(count - correction, 0): infinite or NaN when that is zero, as in eager."""
    acc = compute_dtype(x.dtype)
    count, less = reduced_count(x, dims), 1 if correction is None else correction
    if isinstance(count, int):
        divisor = Term(Const(max(count - less, 0), acc))
    else:
        divisor = t.maximum(Term(size_value(count, acc)) - less, 0.0)

    def fn(s: Term) -> Term:
        variance = s / divisor
        return t.sqrt(variance) if root else variance

    return after(total, dtype, fn)


def _var_or_std(root: bool) -> Callable[..., Value]:
    def lower(ctx: Lowering, x: Value, dim: Any = None, *, correction: Number | None = None, keepdim: bool = False) -> Value:
        dims = dims_of(x, dim)
        _, total = moments(ctx, x, dims, keepdim, (None,))
        return _variance(x, dims, total, correction, root, ctx.out().dtype)

    return lower


TABLE.lowers(aten.var.correction)(_var_or_std(root=False))
TABLE.lowers(aten.std.correction)(_var_or_std(root=True))


def _with_mean(root: bool) -> Callable[..., tuple[Value, Value]]:
    def lower(
        ctx: Lowering, x: Value, dim: Any = None, *, correction: Number | None = None, keepdim: bool = False
    ) -> tuple[Value, Value]:
        dims, out = dims_of(x, dim), ctx.out(0).dtype
        mean, total = moments(ctx, x, dims, keepdim, (1, 0))
        first = _variance(x, dims, total, correction, root, out)
        return first, mean if mean.dtype == out else after(mean, out, lambda m: m)

    return lower


TABLE.lowers(aten.var_mean.correction)(_with_mean(root=False))
TABLE.lowers(aten.std_mean.correction)(_with_mean(root=True))


# ---------------------------------------------------------------------- norms


def _powered(order: float) -> Element:
    return lambda x: t.binary("pow", t.absolute(x), order)


@TABLE.lowers(aten.linalg_vector_norm.default)
def _vector_norm(
    ctx: Lowering, x: Value, order: Any = 2, dim: Any = None, keepdim: bool = False, *, dtype: torch.dtype | None = None
) -> Value:
    out, dims = ctx.out().dtype, dims_of(x, dim)
    acc = compute_dtype(out)
    if order in (math.inf, -math.inf):
        return reduce_elements(ctx, "max" if order > 0 else "min", x, dims, keepdim, out, element=t.absolute, accumulate=acc)
    elements: dict[Any, Element] = {0: lambda v: v.ne(0), 1: t.absolute, 2: lambda v: v * v}
    total = reduce_elements(ctx, "sum", x, dims, keepdim, acc, element=elements.get(order, _powered(order)))
    if order in (0, 1):
        return total if out == acc else after(total, out, lambda s: s)
    return after(total, out, t.sqrt if order == 2 else lambda s: t.binary("pow", s, 1.0 / order))
