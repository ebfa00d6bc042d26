"""Products with scales of groups on CPUs: the library's sums of each group, and the rest as an expression."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch

from fxopt.ir.exprs import Int, add, mul
from fxopt.ir.group_scaled_op import GROUP_SCALED_MM
from fxopt.ir.loops import Op, Scalar
from fxopt.ir.region import Call, Ref
from fxopt.lower.calls import overload_name
from fxopt.lower.lowering import Lowering
from fxopt.lower.table import Table
from fxopt.lower.values import Stored, Value, at, broadcast_indices, cast, pointwise

TABLE = Table()


@TABLE.lowers(GROUP_SCALED_MM)
def _group_scaled_mm(
    ctx: Lowering, a: Value, b: Value, scale_a: Value, scale_b: Value, bias: Value | None, out_dtype: torch.dtype
) -> Any:
    """Of int8 operands `aten::_int_mm` sums each group by itself, exactly."""
    (m, inner), (n, _), (_, groups) = a.shape, b.shape, scale_b.shape
    if a.device.type != "cpu" or a.dtype != torch.int8 or not (isinstance(a, Stored) and isinstance(b, Stored)):
        return ctx.call(ctx.node)
    assert isinstance(inner, int) and isinstance(groups, int), "those of a weight"
    group = inner // groups
    sums = [_sums(ctx, a, b, index * group, group) for index in range(groups)]

    def element(indices: tuple[Int, ...]) -> Scalar:
        row, column = indices
        total: Scalar | None = None
        for index, part in enumerate(sums):
            term = cast(at(part, indices), torch.float32)
            for scale, place in ((scale_a, row), (scale_b, column)):
                term = Op("mul", (term, at(scale, broadcast_indices(scale.shape, (place, index)))), torch.float32)
            total = term if total is None else Op("add", (total, term), torch.float32)
        assert total is not None, "there is a group"
        return total if bias is None else Op("add", (total, cast(at(bias, (column,)), torch.float32)), torch.float32)

    given = [*sums, scale_a, scale_b, *([bias] if bias is not None else [])]
    return pointwise((m, n), out_dtype, a.device, element, given)


def _sums(ctx: Lowering, a: Stored, b: Stored, first: int, count: int) -> Stored:
    """int32 [M, N]: the products of `count` neighbours from `first` on."""
    (m, _), (n, _) = a.shape, b.shape
    left, right = (replace(x, shape=(x.shape[0], count), offset=add(x.offset, mul(x.strides[1], first))) for x in (a, b))
    turned = replace(right, shape=right.shape[::-1], strides=right.strides[::-1])
    sums = ctx.new_buffer(torch.int32, a.device, (m, n))
    name = overload_name(torch.ops.aten._int_mm.default)
    given = (Ref(ctx.tensor_name(left)), Ref(ctx.tensor_name(turned)))
    ctx.steps.append(Call(name, given, {}, (sums.buffer,), ctx.origins[ctx.node.name]))
    return sums
