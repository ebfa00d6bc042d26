"""Comparisons, predicates, logic, bits and selection."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch

from fxopt.lower.lowering import Lowering
from fxopt.lower.ops import terms as t
from fxopt.lower.ops.elementwise import compute_dtype, elementwise, formula, result_type
from fxopt.lower.ops.terms import Operand, Term
from fxopt.lower.table import Table
from fxopt.lower.values import Computed, Value

aten = torch.ops.aten
TABLE = Table()


def _comparison(name: str) -> Callable[..., Computed]:
    def lower(ctx: Lowering, a: Any, b: Any) -> Computed:
        compute = compute_dtype(result_type(a, b))
        return elementwise(ctx, (a, b), lambda x, y: t.compare(name, x, y), compute=compute, exact=True)

    return lower


for _name in ("eq", "ne", "lt", "le", "gt", "ge"):
    TABLE.lowers(getattr(aten, _name).Tensor, getattr(aten, _name).Scalar)(_comparison(_name))


# ---------------------------------------------------------------------- predicates of one number


def _predicate(op: Any, of_float: Callable[[Term], Term], of_integer: Callable[[Term], Term]) -> None:
    def lower(ctx: Lowering, x: Value) -> Computed:
        fn = of_float if x.dtype.is_floating_point else of_integer
        return elementwise(ctx, (x,), fn, compute=compute_dtype(x.dtype), exact=True)

    TABLE.lowers(op)(lower)


def _never(x: Term) -> Term:
    return t.literal(False, torch.bool)


def _always(x: Term) -> Term:
    return t.literal(True, torch.bool)


_predicate(aten.isnan.default, lambda x: t.predicate("isnan", x), _never)
_predicate(aten.isinf.default, lambda x: t.predicate("isinf", x), _never)
_predicate(aten.isfinite.default, lambda x: ~(t.predicate("isinf", x) | t.predicate("isnan", x)), _always)
_predicate(aten.isposinf.default, lambda x: x.eq(math.inf), _never)
_predicate(aten.isneginf.default, lambda x: x.eq(-math.inf), _never)
_predicate(aten.signbit.default, lambda x: t.predicate("signbit", x), lambda x: x.lt(0))
_predicate(aten.logical_not.default, lambda x: x.eq(0.0), lambda x: x.eq(0))


# ---------------------------------------------------------------------- logic and bits


def _logical(name: str) -> Callable[..., Computed]:
    def lower(ctx: Lowering, a: Value, b: Value) -> Computed:
        return elementwise(ctx, (a, b), lambda x, y: t.binary(name, x, y), compute=torch.bool, exact=True)

    return lower


TABLE.lowers(aten.logical_and.default)(_logical("bitwise_and"))
TABLE.lowers(aten.logical_or.default)(_logical("bitwise_or"))
TABLE.lowers(aten.logical_xor.default)(_logical("bitwise_xor"))


def _bitwise(name: str) -> Callable[[Operand, Operand], Term]:
    return lambda a, b: t.binary(name, a, b)


for _name in ("and", "or", "xor"):
    _packet = getattr(aten, f"bitwise_{_name}")
    formula(TABLE, _packet.Tensor, _packet.Scalar, _packet.Scalar_Tensor)(_bitwise(f"bitwise_{_name}"))
formula(TABLE, aten.bitwise_not.default)(lambda x: ~x)
for _direction, _op in (("left", "lshift"), ("right", "rshift")):
    _packet = getattr(aten, f"bitwise_{_direction}_shift")
    formula(TABLE, _packet.Tensor, _packet.Tensor_Scalar, _packet.Scalar_Tensor)(_bitwise(_op))
formula(TABLE, aten.__lshift__.Tensor, aten.__lshift__.Scalar)(_bitwise("lshift"))
formula(TABLE, aten.__rshift__.Tensor, aten.__rshift__.Scalar)(_bitwise("rshift"))


# ---------------------------------------------------------------------- selection


@TABLE.lowers(aten.where.self, aten.where.ScalarSelf, aten.where.ScalarOther, aten.where.Scalar)
def _where(ctx: Lowering, cond: Value, a: Any, b: Any) -> Computed:
    return _select(ctx, cond, a, b)


@TABLE.lowers(aten.masked_fill.Scalar, aten.masked_fill.Tensor)
def _masked_fill(ctx: Lowering, x: Value, mask: Value, value: Any) -> Computed:
    return _select(ctx, mask, value, x)


def _select(ctx: Lowering, cond: Value, a: Any, b: Any) -> Computed:
    """The condition keeps its own dtype (bool, or uint8); the arms take the result's."""
    compute = compute_dtype(ctx.out().dtype)
    return elementwise(ctx, (cond, a, b), lambda c, x, y: t.where(c, x, y), computes=(torch.bool, compute, compute))
