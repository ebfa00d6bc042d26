"""Softmax, log-softmax, log-sum-exp and the softmax gradients: one pass for a row's maximum and sum, one for the values."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch

from fxopt.ir.exprs import Int
from fxopt.ir.loops import Scalar
from fxopt.lower.layout import dense_strides
from fxopt.lower.lowering import Lowering
from fxopt.lower.ops import terms as t
from fxopt.lower.ops.elementwise import compute_dtype, widened
from fxopt.lower.ops.reductions import dims_of
from fxopt.lower.ops.terms import Term
from fxopt.lower.table import Table
from fxopt.lower.values import Computed, Value, at, broadcast_indices, pointwise

aten = torch.ops.aten
TABLE = Table()


def _statistics(
    ctx: Lowering,
    x: Value,
    dims: Sequence[int],
    acc: torch.dtype,
    *,
    keepdim: bool = True,
    strides: tuple[Int, ...] | None = None,
) -> tuple[Value, Value]:
    """Over `dims`: the maximum, and the sum of exp(x - maximum)."""
    top, total = ctx.reduce(
        "softmax_stats", x.shape, dims, lambda i: (widened(at(x, i), acc),),
        accumulate=acc, inputs=(x,), results=((0, acc), (1, acc)), keepdim=keepdim, strides=strides,
    )  # fmt: skip
    return top, total


def _rowwise(ctx: Lowering, x: Value, rows: Sequence[Value], acc: torch.dtype, fn: Callable[..., Term]) -> Computed:
    """fn(element of x, values of its row), with the result's dtype."""

    def body(indices: tuple[Int, ...]) -> Scalar:
        parts = [Term(widened(at(r, broadcast_indices(r.shape, indices)), acc)) for r in rows]
        return fn(Term(widened(at(x, indices), acc)), *parts).scalar

    return pointwise(x.shape, ctx.out().dtype, x.device, body, (x, *rows))


@TABLE.lowers(aten._softmax.default)
def _softmax(ctx: Lowering, x: Value, dim: int, half_to_float: bool) -> Computed:
    acc = compute_dtype(x.dtype)
    stats = _statistics(ctx, x, dims_of(x, dim), acc)
    return _rowwise(ctx, x, stats, acc, lambda v, top, total: t.exp(v - top) / total)


@TABLE.lowers(aten._log_softmax.default)
def _log_softmax(ctx: Lowering, x: Value, dim: int, half_to_float: bool) -> Computed:
    acc = compute_dtype(x.dtype)
    stats = _statistics(ctx, x, dims_of(x, dim), acc)
    return _rowwise(ctx, x, stats, acc, lambda v, top, total: v - top - t.log(total))


@TABLE.lowers(aten.logsumexp.default)
def _logsumexp(ctx: Lowering, x: Value, dim: Any, keepdim: bool = False) -> Computed:
    """log(sum) + maximum; the maximum itself where it is infinite (the sum is NaN there)."""
    out = ctx.out()
    acc = compute_dtype(out.dtype)
    top, total = _statistics(ctx, x, dims_of(x, dim), acc, keepdim=keepdim, strides=dense_strides(ctx, out))

    def body(indices: tuple[Int, ...]) -> Scalar:
        m, s = Term(at(top, indices)), Term(at(total, indices))
        return t.where(t.absolute(m).eq(math.inf), m, t.log(s) + m).scalar

    return pointwise(top.shape, out.dtype, x.device, body, (top, total))


def _row_sum(ctx: Lowering, inputs: Sequence[Value], dim: int, acc: torch.dtype, fn: Callable[..., Term]) -> Value:
    def operand(indices: tuple[Int, ...]) -> tuple[Scalar, ...]:
        return (fn(*(Term(widened(at(v, indices), acc)) for v in inputs)).scalar,)

    shape = inputs[0].shape
    return ctx.reduce(
        "sum", shape, dims_of(inputs[0], dim), operand, accumulate=acc, inputs=inputs, results=((0, acc),), keepdim=True
    )[0]  # fmt: skip


def _gradient(
    ctx: Lowering, grad: Value, output: Value, total: Value, acc: torch.dtype, fn: Callable[[Term, Term, Term], Term]
) -> Computed:
    def body(indices: tuple[Int, ...]) -> Scalar:
        row = at(total, broadcast_indices(total.shape, indices))
        return fn(*(Term(widened(x, acc)) for x in (at(grad, indices), at(output, indices), row))).scalar

    return pointwise(grad.shape, ctx.out().dtype, grad.device, body, (grad, output, total))


@TABLE.lowers(aten._softmax_backward_data.default)
def _softmax_backward(ctx: Lowering, grad: Value, output: Value, dim: int, input_dtype: torch.dtype) -> Computed:
    acc = compute_dtype(grad.dtype)
    total = _row_sum(ctx, (grad, output), dim, acc, lambda g, y: g * y)
    return _gradient(ctx, grad, output, total, acc, lambda g, y, s: (g - s) * y)


@TABLE.lowers(aten._log_softmax_backward_data.default)
def _log_softmax_backward(ctx: Lowering, grad: Value, output: Value, dim: int, input_dtype: torch.dtype) -> Computed:
    acc = compute_dtype(grad.dtype)
    total = _row_sum(ctx, (grad,), dim, acc, lambda g: g)
    return _gradient(ctx, grad, output, total, acc, lambda g, y, s: g - t.exp(y) * s)
