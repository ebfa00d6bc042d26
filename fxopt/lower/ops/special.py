"""Special functions whose eager kernels are formulas of a fixed number of steps."""

from __future__ import annotations

import functools
import math

import torch

from fxopt.errors import UnsupportedError
from fxopt.ir.exprs import Int
from fxopt.lower.lowering import Lowering
from fxopt.lower.ops import terms as t
from fxopt.lower.ops.elementwise import elementwise, formula
from fxopt.lower.ops.terms import Term
from fxopt.lower.table import Table
from fxopt.lower.values import Computed, Value

aten = torch.ops.aten
TABLE = Table()

DIGAMMA_SERIES = (1 / 12, -691 / 32760, 1 / 132, -1 / 240, 1 / 252, -1 / 120, 1 / 12)
"""Coefficients of the asymptotic series of digamma in 1/x**2, highest power first (Abramowitz and Stegun, 6.3.18)."""


@formula(TABLE, aten.digamma.default)
def _digamma(x: Term) -> Term:
    """Reflection to positive arguments, ten steps of the recurrence, the asymptotic series."""
    reflected = x.lt(0.0)
    y = t.where(reflected, 1.0 - x, x)
    result = t.literal(0.0, x.dtype)
    for _ in range(10):
        small = y.lt(10.0)
        result = t.where(small, result - 1.0 / y, result)
        y = t.where(small, y + 1.0, y)
    square = 1.0 / (y * y)
    series = t.literal(DIGAMMA_SERIES[0], x.dtype)
    for coefficient in DIGAMMA_SERIES[1:]:
        series = series * square + coefficient
    result = result + t.unary("log", y) - 0.5 / y - square * series
    fraction = x - t.trunc(x)
    # Near a pole the quotient is large and the fraction's rounding with it: in float64, as eager does.
    pole = (math.pi / t.unary("tan", fraction.to(torch.float64) * math.pi)).to(x.dtype)
    result = t.where(reflected, result - pole, result)
    result = t.where(reflected & fraction.eq(0.0), math.nan, result)
    return t.where(x.eq(0.0), t.binary("copysign", math.inf, -x), result)


def _trigamma(x: Term) -> Term:
    """Reflection to arguments above a half, six steps of the recurrence, the asymptotic series."""
    reflected = x.lt(0.5)
    sine = t.sin(x * math.pi)
    y = t.where(reflected, 1.0 - x, x)
    result = t.where(reflected, -(math.pi * math.pi) / (sine * sine), 0.0)
    for _ in range(6):
        result = result + 1.0 / (y * y)
        y = y + 1.0
    square = 1.0 / (y * y)
    series = 1.0 + 1.0 / (2.0 * y) + square * (1 / 6 - square * (1 / 30 - square * (1 / 42)))
    result = result + series / y
    return t.where(reflected, -result, result)


BERNOULLI = (
    1 / 6, -1 / 30, 1 / 42, -1 / 30, 5 / 66, -691 / 2730, 7 / 6, -3617 / 510, 43867 / 798, -174611 / 330, 854513 / 138,
    -236364091 / 2730,
)  # fmt: skip
"""The Bernoulli numbers B2, B4, ..., B24."""

DIRECT_TERMS = 10
MAX_ORDER = 12


def _power(x: Term, n: int) -> Term:
    """x ** n by repeated multiplication, n >= 1."""
    return functools.reduce(lambda product, _: product * x, range(n - 1), x)


def _zeta(s: int, q: Term) -> Term:
    """The sum of (q + k) ** -s over k = 0, 1, ... for q > 0: ten terms, and Euler and Maclaurin's formula for the others.

    Source: Abramowitz and Stegun, 23.1.30 with 23.2; Cephes' zeta takes the same terms.
    """
    total = t.literal(0.0, q.dtype)
    for k in range(DIRECT_TERMS):
        last = _power(1.0 / (q + float(k)), s)
        total = total + last
    w = q + float(DIRECT_TERMS - 1)
    total = total + last * w / float(s - 1) - last * 0.5
    correction, inverse = last / w, 1.0 / (w * w)
    for k, number in enumerate(BERNOULLI):
        rising = math.prod(range(s, s + 2 * k + 1))
        total = total + correction * (number * rising / math.factorial(2 * k + 2))
        correction = correction * inverse
    return total


def _cotangent_derivative(n: int, cotangent: Term) -> Term:
    """The n-th derivative of cot at an angle with that cotangent: c' = -(1 + c * c), applied to polynomials in c."""
    polynomial = [0, 1]
    for _ in range(n):
        slope = [k * c for k, c in enumerate(polynomial)][1:]
        polynomial = [-(a + b) for a, b in zip([*slope, 0, 0], [0, 0, *slope], strict=True)]
    result = t.literal(0.0, cotangent.dtype)
    for coefficient in reversed(polynomial):
        result = result * cotangent + float(coefficient)
    return result


def _higher_polygamma(n: int, x: Term) -> Term:
    """(-1)**(n+1) n! zeta(n + 1, x), negative arguments by reflection; in float64: terms leave float32's range."""
    dtype, x = x.dtype, x.to(torch.float64)
    sign = -1.0 if n % 2 == 0 else 1.0
    reflected = x.lt(0.0)
    value = sign * math.factorial(n) * _zeta(n + 1, t.where(reflected, 1.0 - x, x))
    fraction = x - t.trunc(x)
    cotangent = 1.0 / t.unary("tan", fraction * math.pi)
    turned = -(math.pi ** (n + 1)) * _cotangent_derivative(n, cotangent)
    value = t.where(reflected, turned - sign * value, value)
    value = t.where(x.le(0.0) & fraction.eq(0.0), sign * math.inf, value)
    return t.where(x.eq(-math.inf), sign * math.inf, value).to(dtype)


@TABLE.lowers(aten.polygamma.default)
def polygamma(ctx: Lowering, n: Int, x: Value) -> Computed:
    """Derivative `n` of digamma."""
    if not isinstance(n, int) or not 0 <= n <= MAX_ORDER:
        raise UnsupportedError(f"polygamma of order {n}")
    if n > 1 and x.dtype == torch.float64:
        raise UnsupportedError("polygamma to a double's last bits")
    return elementwise(ctx, (x,), {0: _digamma, 1: _trigamma}.get(n, functools.partial(_higher_polygamma, n)))
