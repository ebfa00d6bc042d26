"""Quantized products on CPUs: the library's sums, and the rest as an expression, which fuses with what follows. Quantized
values that are read as floating ones.

On GPUs products are calls, which `lower/contractions.py` makes contractions of.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch

from fxopt.ir.exprs import Int
from fxopt.ir.loops import Op, Scalar
from fxopt.ir.quantized_ops import DEQUANTIZE, SCALED_MM
from fxopt.ir.region import Call, Ref
from fxopt.lower.calls import overload_name
from fxopt.lower.lowering import Lowering
from fxopt.lower.table import Table
from fxopt.lower.values import Stored, Value, at, broadcast_indices, cast, pointwise

TABLE = Table()


def sums_apart(device: torch.device) -> bool:
    """Whether the library sums and a generated kernel does the rest, for want of a kernel that does both."""
    return device.type == "cpu"


@TABLE.lowers(SCALED_MM)
def _scaled_mm(
    ctx: Lowering, a: Value, b: Value, scale_a: Value, scale_b: Value, bias: Value | None, out_dtype: torch.dtype
) -> Any:
    """int8 operands are multiplied by `aten::_int_mm`, exactly: oneDNN's kernels, as fast as those that want unsigned rows
    and a packed weight (`benchmarks/int8_cpu.py`).
    """
    if not sums_apart(a.device) or a.dtype != torch.int8 or not isinstance(b, Stored):
        return ctx.call(ctx.node)
    (m, _), (n, _) = a.shape, b.shape
    sums = ctx.new_buffer(torch.int32, a.device, (m, n))
    turned = replace(b, shape=b.shape[::-1], strides=b.strides[::-1])
    given = (Ref(ctx.tensor_name(a)), Ref(ctx.tensor_name(turned)))
    name = overload_name(torch.ops.aten._int_mm.default)
    ctx.steps.append(Call(name, given, {}, (sums.buffer,), ctx.origins[ctx.node.name]))
    rows = scale_a if not scale_a.shape else _as_column(ctx, scale_a)

    def element(indices: tuple[Int, ...]) -> Scalar:
        total = cast(at(sums, indices), torch.float32)
        for scale in (rows, scale_b):
            total = Op("mul", (total, at(scale, broadcast_indices(scale.shape, indices))), torch.float32)
        if bias is not None:
            total = Op("add", (total, cast(at(bias, indices[1:]), torch.float32)), torch.float32)
        return total

    given_values = [sums, scale_a, scale_b, *([bias] if bias is not None else [])]
    return pointwise((m, n), out_dtype, a.device, element, given_values)


@TABLE.lowers(DEQUANTIZE)
def _dequantize(ctx: Lowering, values: Value, scale: Value, dtype: torch.dtype) -> Any:
    def element(indices: tuple[Int, ...]) -> Scalar:
        return Op("mul", (cast(at(values, indices), torch.float32), at(scale, ())), torch.float32)

    return pointwise(values.shape, dtype, values.device, element, [values, scale])


def _as_column(ctx: Lowering, scale: Value) -> Stored:
    """A vector [M] as [M, 1]."""
    stored = ctx.store(scale)
    return replace(stored, shape=(*stored.shape, 1), strides=(*stored.strides, 0))
