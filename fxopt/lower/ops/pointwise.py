"""Element-wise ops: each names the scalar op it is, with eager's type promotion."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from fxopt.ir.exprs import Expr
from fxopt.ir.loops import Const, Op, Scalar
from fxopt.lower.lowering import Lowering
from fxopt.lower.table import Table
from fxopt.lower.values import Computed, Stored, Value, at, broadcast_indices, broadcast_shape, cast, pointwise, size_value

aten = torch.ops.aten
TABLE = Table()


def elementwise(ctx: Lowering, args: tuple[Any, ...], dtype: torch.dtype, fn: Callable[..., Scalar], compute: torch.dtype) -> Computed:
    """fn over the broadcast `args` (Values or numbers), each cast to `compute` first; the result is cast to `dtype`."""
    tensors = [a for a in args if isinstance(a, (Stored, Computed))]
    shape = broadcast_shape(*(t.shape for t in tensors))
    device = ctx.out().device

    def body(indices: tuple[Any, ...]) -> Scalar:
        return fn(*(operand(a, indices, compute) for a in args))

    return pointwise(shape, dtype, device, body, tensors)


def operand(arg: Any, indices: tuple[Any, ...], dtype: torch.dtype) -> Scalar:
    """An argument of an element-wise op at `indices`, as `dtype`."""
    if isinstance(arg, (Stored, Computed)):
        return cast(at(arg, broadcast_indices(arg.shape, indices)), dtype)
    if isinstance(arg, Expr):
        return size_value(arg, dtype)
    return Const(arg, dtype)


def promoted(ctx: Lowering, *, int_to_float: bool = False) -> torch.dtype:
    """The dtype that eager computes the current node's element-wise op in."""
    vals = [a.meta["val"] for a in ctx.node.all_input_nodes if isinstance(a.meta["val"], torch.Tensor)]
    numbers = [a for a in ctx.node.args if isinstance(a, (bool, int, float))]
    dtype = vals[0].dtype if len(vals) == 1 and not numbers else torch.result_type(vals[0], (vals + numbers)[1])
    if int_to_float and not dtype.is_floating_point:
        return torch.get_default_dtype()
    return dtype


def _unary_float(name: str) -> Callable[[Lowering, Value], Computed]:
    def lower(ctx: Lowering, x: Value) -> Computed:
        dtype = promoted(ctx, int_to_float=True)
        return elementwise(ctx, (x,), ctx.out().dtype, lambda a: Op(name, (a,), dtype), dtype)

    return lower


for _name in ("exp", "sqrt", "tanh"):
    TABLE.lowers(getattr(aten, _name).default)(_unary_float(_name))


def _binary(name: str) -> Callable[..., Computed]:
    def lower(ctx: Lowering, a: Any, b: Any) -> Computed:
        dtype = promoted(ctx)
        return elementwise(ctx, (a, b), ctx.out().dtype, lambda x, y: Op(name, (x, y), dtype), dtype)

    return lower


TABLE.lowers(aten.mul.Tensor, aten.mul.Scalar)(_binary("mul"))


@TABLE.lowers(aten.add.Tensor, aten.add.Scalar)
def add(ctx: Lowering, a: Any, b: Any, alpha: Any = 1) -> Computed:
    dtype = promoted(ctx)

    def body(x: Scalar, y: Scalar) -> Scalar:
        scaled = y if alpha == 1 else Op("mul", (y, Const(alpha, dtype)), dtype)
        return Op("add", (x, scaled), dtype)

    return elementwise(ctx, (a, b), ctx.out().dtype, body, dtype)
