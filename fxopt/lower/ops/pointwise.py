"""Element-wise arithmetic: one formula per op, computed in the dtype that eager promotes to."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch

from fxopt.errors import UnsupportedError
from fxopt.ir.loops import Const, Op, Scalar
from fxopt.ir.rounding import NARROW
from fxopt.lower.lowering import Lowering
from fxopt.lower.ops import terms as t
from fxopt.lower.ops.elementwise import compute_dtype, elementwise, formula
from fxopt.lower.ops.terms import Number, Operand, Term
from fxopt.lower.table import Table
from fxopt.lower.values import Computed, Value

aten = torch.ops.aten
TABLE = Table()


def _copy(x: Term) -> Term:
    return x


def _unary_op(name: str) -> Callable[[Term], Term]:
    return lambda x: t.unary(name, x)


def _binary_op(name: str) -> Callable[[Operand, Operand], Term]:
    return lambda a, b: t.binary(name, a, b)


# Floating functions: integers and bool are converted, the result's dtype says to what.
FLOAT_FUNCTIONS = (
    "exp exp2 expm1 log log2 log10 log1p sin cos tan asin acos atan sinh cosh tanh asinh acosh atanh "
    "sqrt rsqrt erf erfc erfinv lgamma sigmoid"
)
for _name in FLOAT_FUNCTIONS.split():
    formula(TABLE, getattr(aten, _name).default)(_unary_op(_name))


@formula(TABLE, aten.reciprocal.default)
def _reciprocal(x: Term) -> Term:
    """Of 1 + exp(-y), as torch takes a SiLU's gradient apart, the sigmoid of y: the same value, which has shorter forms."""
    inner = _exponential_beside_one(x.scalar)
    return t.unary("reciprocal", x) if inner is None else t.unary("sigmoid", Term(inner))


def _exponential_beside_one(total: Scalar) -> Scalar | None:
    """y of 1 + exp(-y)."""
    if not (isinstance(total, Op) and total.name == "add" and total.dtype.is_floating_point):
        return None
    found = [a for a in total.args if not (isinstance(a, Const) and a.value == 1)]
    if len(found) != 1 or not (isinstance(found[0], Op) and found[0].name == "exp"):
        return None
    (negative,) = found[0].args
    return negative.args[0] if isinstance(negative, Op) and negative.name == "neg" else None


@formula(TABLE, aten.neg.default)
def _neg(x: Term) -> Term:
    return -x


@formula(TABLE, aten.abs.default)
def _abs(x: Term) -> Term:
    return x if x.dtype in (torch.bool, torch.uint8) else t.absolute(x)


@formula(TABLE, aten.sign.default, aten.sgn.default)
def _sign(x: Term) -> Term:
    return x if x.dtype == torch.bool else t.unary("sign", x)


def _to_integer(name: str) -> Callable[[Term], Term]:
    return lambda x: t.unary(name, x) if x.dtype.is_floating_point else x


for _name in ("floor", "ceil", "trunc", "round"):
    formula(TABLE, getattr(aten, _name).default)(_to_integer(_name))


@formula(TABLE, aten.round.decimals)
def _round_decimals(x: Term, *, decimals: int = 0) -> Term:
    if not x.dtype.is_floating_point or decimals == 0:
        return _to_integer("round")(x)
    scale = 10.0 ** abs(decimals)
    return t.rounded_to_even(x * scale) / scale if decimals > 0 else t.rounded_to_even(x / scale) * scale


@formula(TABLE, aten.frac.default)
def _frac(x: Term) -> Term:
    return x - t.trunc(x)


@formula(TABLE, aten.square.default)
def _square(x: Term) -> Term:
    return x * x


@formula(TABLE, aten.deg2rad.default)
def _deg2rad(x: Term) -> Term:
    return x * (math.pi / 180.0)


@formula(TABLE, aten.rad2deg.default)
def _rad2deg(x: Term) -> Term:
    return x * (180.0 / math.pi)


@formula(TABLE, aten.angle.default)
def _angle(x: Term) -> Term:
    """Of a real number: 0 or pi, and NaN of NaN."""
    return t.where(x.lt(0.0), math.pi, t.where(x.ne(x), x, 0.0))


@formula(TABLE, aten.sinc.default)
def _sinc(x: Term) -> Term:
    angle = x * math.pi
    return t.where(x.eq(0.0), 1.0, t.sin(angle) / angle)


@formula(TABLE, aten.special_entr.default)
def _entr(x: Term) -> Term:
    inside = t.where(x.eq(0.0), 0.0, -math.inf)
    return t.where(x.ne(x), x, t.where(x.gt(0.0), -x * t.log(x), inside))


@formula(TABLE, aten.logit.default)
def _logit(x: Term, eps: Term | None = None) -> Term:
    clamped = x if eps is None else t.clamp(x, eps, 1.0 - eps)
    return t.log(clamped / (1.0 - clamped))


formula(
    TABLE, aten.clone.default, aten.positive.default, aten.lift_fresh_copy.default, aten.conj_physical.default
)(lambda x, memory_format=None: x)  # fmt: skip


# ---------------------------------------------------------------------- two operands


def _scaled(x: Operand, alpha: Any) -> Operand:
    return x if alpha == 1 or not isinstance(x, Term) else x * alpha


@formula(TABLE, aten.add.Tensor, aten.add.Scalar)
def _add(a: Term, b: Term, alpha: Any = 1) -> Term:
    return a + _scaled(b, _number(alpha))


@formula(TABLE, aten.sub.Tensor, aten.sub.Scalar)
def _sub(a: Term, b: Term, alpha: Any = 1) -> Term:
    return a - _scaled(b, _number(alpha))


@formula(TABLE, aten.rsub.Tensor, aten.rsub.Scalar)
def _rsub(a: Term, b: Term, alpha: Any = 1) -> Term:
    return b - _scaled(a, _number(alpha))


def _number(x: Any) -> Number:
    """`alpha` when positional is a term already; its literal value is wanted."""
    if isinstance(x, Term):
        value = getattr(x.scalar, "value", None)
        if value is None:
            raise UnsupportedError("a scale that is not a literal")
        return value
    if not isinstance(x, (bool, int, float)):
        raise UnsupportedError("a scale that is not a literal")
    return x


formula(TABLE, aten.mul.Tensor, aten.mul.Scalar)(_binary_op("mul"))
formula(TABLE, aten.div.Tensor, aten.div.Scalar, aten.true_divide.Tensor)(_binary_op("truediv"))


@formula(TABLE, aten.div.Tensor_mode, aten.div.Scalar_mode)
def _div_mode(a: Term, b: Term, *, rounding_mode: str | None) -> Term:
    return t.binary({None: "truediv", "floor": "floordiv", "trunc": "truncdiv"}[rounding_mode], a, b)


formula(TABLE, aten.floor_divide.default, aten.floor_divide.Scalar)(_binary_op("floordiv"))
formula(TABLE, aten.remainder.Tensor, aten.remainder.Scalar, aten.remainder.Scalar_Tensor)(_binary_op("remainder"))
formula(TABLE, aten.fmod.Tensor, aten.fmod.Scalar)(_binary_op("fmod"))
formula(TABLE, aten.atan2.default)(_binary_op("atan2"))
formula(TABLE, aten.hypot.default)(_binary_op("hypot"))
formula(TABLE, aten.copysign.Tensor, aten.copysign.Scalar)(_binary_op("copysign"))


@TABLE.lowers(aten.nextafter.default)
def _nextafter(ctx: Lowering, a: Value, b: Value) -> Computed:
    if ctx.out().dtype in NARROW:
        raise UnsupportedError("nextafter of a narrow type is not that of float32")
    return elementwise(ctx, (a, b), _binary_op("nextafter"))


formula(TABLE, aten.pow.Tensor_Tensor)(_binary_op("pow"))


@TABLE.lowers(aten.pow.Scalar)
def _pow_of_number(ctx: Lowering, base: Number, exponent: Value) -> Computed:
    return elementwise(ctx, (base, exponent), (lambda a, b: t.literal(1, b.dtype)) if base == 1 else _binary_op("pow"))


@TABLE.lowers(aten.pow.Tensor_Scalar)
def _pow_by_number(ctx: Lowering, base: Value, exponent: Any) -> Computed:
    """As eager, common exponents are products and roots: (-inf)**0.5 is NaN, that of a pow function infinity."""
    special = _POWERS.get(exponent) if isinstance(exponent, (bool, int, float)) else None
    floating = ctx.out().dtype.is_floating_point
    if special is not None and (floating or exponent >= 0):
        return elementwise(ctx, (base,), special)
    if not floating and isinstance(exponent, int) and exponent < 0:
        raise UnsupportedError("integers to negative powers are an error of eager's")
    return elementwise(ctx, (base, exponent), _binary_op("pow"))


_POWERS: dict[Number, Callable[[Term], Term]] = {
    0: lambda x: t.literal(1, x.dtype),
    1: _copy,
    2: lambda x: x * x,
    3: lambda x: x * x * x,
    0.5: t.sqrt,
    -0.5: t.rsqrt,
    -1: _reciprocal,
    -2: lambda x: 1.0 / (x * x),
}


formula(TABLE, aten.maximum.default, aten.max.other, aten.clamp_min.default, aten.clamp_min.Tensor)(t.maximum)
formula(TABLE, aten.minimum.default, aten.min.other, aten.clamp_max.default, aten.clamp_max.Tensor)(t.minimum)


def _ignoring_nan(pick: Callable[[Term, Term], Term]) -> Callable[[Term, Term], Term]:
    def fn(a: Term, b: Term) -> Term:
        if not a.dtype.is_floating_point:
            return pick(a, b)
        return t.where(a.ne(a), b, t.where(b.ne(b), a, pick(a, b)))

    return fn


formula(TABLE, aten.fmax.default)(_ignoring_nan(t.maximum))
formula(TABLE, aten.fmin.default)(_ignoring_nan(t.minimum))


@formula(TABLE, aten.clamp.default, aten.clamp.Tensor, aten.clip.default, aten.clip.Tensor)
def _clamp(x: Term, low: Term | None = None, high: Term | None = None) -> Term:
    return t.clamp(x, low, high)


@formula(TABLE, aten.xlogy.Tensor, aten.xlogy.Scalar_Self, aten.xlogy.Scalar_Other)
def _xlogy(a: Term, b: Term) -> Term:
    return t.where(b.ne(b), b, t.where(a.eq(0.0), 0.0, a * t.log(b)))


@formula(TABLE, aten.special_xlog1py.default, aten.special_xlog1py.self_scalar, aten.special_xlog1py.other_scalar)
def _xlog1py(a: Term, b: Term) -> Term:
    return t.where(b.ne(b), b, t.where(a.eq(0.0), 0.0, a * t.log1p(b)))


@formula(TABLE, aten.logaddexp.default)
def _logaddexp(a: Term, b: Term) -> Term:
    """max + log1p(exp(-|a - b|)); equal infinities have no difference."""
    same = a.eq(b) & t.predicate("isinf", a)
    return t.where(same, a, t.maximum(a, b) + t.log1p(t.exp(-t.absolute(a - b))))


@formula(TABLE, aten.logaddexp2.default)
def _logaddexp2(a: Term, b: Term) -> Term:
    same = a.eq(b) & t.predicate("isinf", a)
    power = t.unary("exp2", -t.absolute(a - b))
    return t.where(same, a, t.maximum(a, b) + t.log1p(power) * (1.0 / math.log(2.0)))


@formula(TABLE, aten.heaviside.default)
def _heaviside(x: Term, at_zero: Term) -> Term:
    return t.where(x.eq(0), at_zero, x.gt(0).to(x.dtype))


@formula(TABLE, aten.ldexp.Tensor)
def _ldexp(x: Term, exponent: Term) -> Term:
    return x * t.unary("exp2", exponent)


# ---------------------------------------------------------------------- three operands


@formula(TABLE, aten.lerp.Scalar, aten.lerp.Tensor)
def _lerp(a: Term, b: Term, weight: Term) -> Term:
    """From the nearer end, as eager computes it: exact at both."""
    distance = b - a
    return t.where(t.absolute(weight).lt(0.5), a + weight * distance, b - distance * (1.0 - weight))


@formula(TABLE, aten.addcmul.default)
def _addcmul(x: Term, a: Term, b: Term, *, value: Any = 1) -> Term:
    return x + t.binary("mul", _scaled(a, _number(value)), b)


@formula(TABLE, aten.addcdiv.default)
def _addcdiv(x: Term, a: Term, b: Term, *, value: Any = 1) -> Term:
    return x + t.binary("truediv", _scaled(a, _number(value)), b)


@TABLE.lowers(aten.nan_to_num.default)
def _nan_to_num(ctx: Lowering, x: Value, nan: Any = None, posinf: Any = None, neginf: Any = None) -> Computed:
    dtype = ctx.out().dtype
    if not dtype.is_floating_point:
        return elementwise(ctx, (x,), _copy)
    limits = torch.finfo(dtype)
    high, low = limits.max if posinf is None else posinf, limits.min if neginf is None else neginf

    def fn(v: Term) -> Term:
        finite = t.where(v.eq(math.inf), high, t.where(v.eq(-math.inf), low, v))
        return t.where(v.ne(v), 0.0 if nan is None else nan, finite)

    return elementwise(ctx, (x,), fn, compute=compute_dtype(dtype), exact=True)
