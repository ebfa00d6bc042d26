"""Tensors made from nothing (full, arange, eye, triangles) and casts between types."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch

from fxopt.errors import UnsupportedError
from fxopt.ir.exprs import Expr, Int
from fxopt.ir.loops import Scalar
from fxopt.ir.rounding import rounded
from fxopt.lower.lowering import Lowering
from fxopt.lower.ops import terms as t
from fxopt.lower.ops.elementwise import is_number, on_device, operand
from fxopt.lower.ops.terms import Term
from fxopt.lower.table import Table
from fxopt.lower.values import Computed, Stored, Value, at, cast, pointwise, size_value

aten = torch.ops.aten
prims = torch.ops.prims
TABLE = Table()


# ---------------------------------------------------------------------- constants


def filled(ctx: Lowering, value: Any) -> Computed:
    """The current node's result with `value` (a number or a 0-dim Value) everywhere."""
    out = ctx.out()
    if not is_number(value) and not isinstance(value, (Stored, Computed)):
        raise UnsupportedError(f"a fill value of type {type(value).__name__}")
    if isinstance(value, (Stored, Computed)):
        value = on_device(ctx, value, out.device)
    inputs = (value,) if isinstance(value, (Stored, Computed)) else ()
    return pointwise(ctx.sizes(out.shape), out.dtype, out.device, lambda i: operand(value, i, out.dtype), inputs)


def _constant(value: int) -> Callable[..., Computed]:
    def lower(ctx: Lowering, *args: Any, **kwargs: Any) -> Computed:
        return filled(ctx, value)

    return lower


TABLE.lowers(aten.ones.default, aten.ones_like.default, aten.new_ones.default)(_constant(1))
TABLE.lowers(aten.zeros.default, aten.zeros_like.default, aten.new_zeros.default, aten.zero.default)(_constant(0))


@TABLE.lowers(
    aten.empty.memory_format, aten.empty_like.default, aten.new_empty.default, aten.empty_strided.default,
    aten.new_empty_strided.default, aten.empty_permuted.default, prims.empty_strided.default,
)  # fmt: skip
def _empty(ctx: Lowering, *args: Any, **kwargs: Any) -> Computed:
    """Uninitialised memory may hold anything, so also zeros, which cost nothing where they are inlined; under deterministic
    algorithms it holds what eager fills it with (torch.utils.deterministic.fill_uninitialized_memory)."""
    dtype = ctx.out().dtype
    fill = getattr(torch.utils.deterministic, "fill_uninitialized_memory")  # noqa: B009 (a property of the module's class)
    if not (torch.are_deterministic_algorithms_enabled() and fill):
        return filled(ctx, 0)
    if dtype.is_floating_point:
        return filled(ctx, math.nan)
    return filled(ctx, True if dtype == torch.bool else torch.iinfo(dtype).max)


@TABLE.lowers(aten.full.default)
def _full(ctx: Lowering, size: Any, value: Any, **kwargs: Any) -> Computed:
    return filled(ctx, value)


@TABLE.lowers(aten.full_like.default, aten.fill.Scalar, aten.fill.Tensor)
def _full_like(ctx: Lowering, x: Value, value: Any, **kwargs: Any) -> Computed:
    return filled(ctx, value)


@TABLE.lowers(aten.new_full.default)
def _new_full(ctx: Lowering, x: Value, size: Any, value: Any, **kwargs: Any) -> Computed:
    return filled(ctx, value)


@TABLE.lowers(aten.scalar_tensor.default)
def _scalar_tensor(ctx: Lowering, value: Any, **kwargs: Any) -> Computed:
    return filled(ctx, value)


# ---------------------------------------------------------------------- sequences


def _progression(ctx: Lowering, start: Any, step: Any) -> Computed:
    """start + i * step, in int64 when both are integers, else in float64: with float32 a long sequence would drift."""
    out = ctx.out()
    exact = all(isinstance(x, (bool, int, Expr)) for x in (start, step))

    def body(indices: tuple[Int, ...]) -> Scalar:
        if exact:
            return size_value(indices[0] * step + start, out.dtype)
        i = Term(size_value(indices[0], torch.float64))
        return (Term(operand(start, (), torch.float64)) + i * Term(operand(step, (), torch.float64))).scalar

    return pointwise(ctx.sizes(out.shape), out.dtype, out.device, body)


@TABLE.lowers(aten.arange.start_step)
def _arange(ctx: Lowering, start: Any, end: Any, step: Any = 1, **kwargs: Any) -> Computed:
    integral = not ctx.out().dtype.is_floating_point
    if integral and any(isinstance(x, float) for x in (start, step)):
        start, step = int(start), int(step)  # as eager, which converts to the result's type first
    return _progression(ctx, start, step)


@TABLE.lowers(aten.arange.default)
def _arange_to(ctx: Lowering, end: Any, **kwargs: Any) -> Computed:
    return _progression(ctx, 0, 1)


@TABLE.lowers(aten.arange.start)
def _arange_from(ctx: Lowering, start: Any, end: Any, **kwargs: Any) -> Computed:
    return _arange(ctx, start, end, 1)


@TABLE.lowers(prims.iota.default)
def _iota(ctx: Lowering, length: Any, *, start: Any, step: Any, **kwargs: Any) -> Computed:
    return _progression(ctx, start, step)


@TABLE.lowers(aten.linspace.default)
def _linspace(ctx: Lowering, start: Any, end: Any, steps: Any, **kwargs: Any) -> Computed:
    """From the nearer end, in float64, as eager's CPU kernel: both ends are exact."""
    out = ctx.out()
    if not out.dtype.is_floating_point:
        raise UnsupportedError("integers are truncated from eager's own float32 rounding")
    first, last, count = (Term(operand(x, (), torch.float64)) for x in (start, end, steps))

    def body(indices: tuple[Int, ...]) -> Scalar:
        i = Term(size_value(indices[0], torch.float64))
        step = (last - first) / (count - 1.0)
        from_end = last - step * (count - 1.0 - i)
        near_start = (i * 2.0).lt(count - 1.0) | count.eq(1.0)
        return t.where(near_start, t.where(i.eq(0.0), first, first + step * i), from_end).scalar

    return pointwise(ctx.sizes(out.shape), out.dtype, out.device, body)


# ---------------------------------------------------------------------- diagonals and triangles


def _difference(indices: Sequence[Int]) -> Term:
    """Column minus row."""
    return Term(size_value(indices[-1] - indices[-2]))


@TABLE.lowers(aten.eye.default, aten.eye.m)
def _eye(ctx: Lowering, *args: Any, **kwargs: Any) -> Computed:
    out = ctx.out()
    shape = ctx.sizes(out.shape)
    return pointwise(shape, out.dtype, out.device, lambda i: _difference(i).eq(0).to(out.dtype).scalar)


def _triangle(relation: str) -> Callable[..., Computed]:
    def lower(ctx: Lowering, x: Value, diagonal: Any = 0) -> Computed:
        def body(indices: tuple[Int, ...]) -> Scalar:
            inside = t.compare(relation, _difference(indices), Term(operand(diagonal, (), torch.int64)))
            return t.where(inside, Term(at(x, indices)), 0).scalar

        return pointwise(x.shape, x.dtype, x.device, body, (x,))

    return lower


TABLE.lowers(aten.tril.default)(_triangle("le"))
TABLE.lowers(aten.triu.default)(_triangle("ge"))


# ---------------------------------------------------------------------- casts

_UNROUNDED = ("aten._log_softmax.default", "aten.nll_loss_backward.default", "aten.nll_loss2d_backward.default")
"""Ops that are taken apart before the partitioner, whose results are no more rounded in registers than those of others.
Names, since graphs are copied with what their nodes hold."""


def _converted(ctx: Lowering, x: Value) -> Computed:
    out = ctx.out()
    # A cast to a half type rounds, as in memory: splits into high and low parts and simulated quantization live on that.
    # Not so the one at the end of an op that has been taken apart, which nobody wrote.
    exact = x.dtype == out.dtype or (x.dtype.itemsize == 1 and not x.dtype.is_floating_point)
    exact |= str(ctx.node.meta.get("original_aten")) in _UNROUNDED

    def body(indices: tuple[Int, ...]) -> Scalar:
        converted = cast(at(x, indices), out.dtype)
        return converted if exact else rounded(converted)

    return pointwise(x.shape, out.dtype, out.device, body, (x,))


@TABLE.lowers(aten._to_copy.default)
def _to_copy(ctx: Lowering, x: Value, **kwargs: Any) -> Computed:
    return _converted(ctx, x)


@TABLE.lowers(prims.convert_element_type.default)
def _convert_element_type(ctx: Lowering, x: Value, dtype: torch.dtype) -> Computed:
    return _converted(ctx, x)


@TABLE.lowers(aten.copy.default)
def _copy(ctx: Lowering, x: Value, source: Value, non_blocking: bool = False) -> Computed:
    """`source` broadcast to the shape of `x`, in its dtype. What `x` held is of no interest."""
    out = ctx.out()
    return pointwise(x.shape, out.dtype, out.device, lambda i: operand(source, i, out.dtype), (source,))
