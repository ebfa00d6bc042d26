"""Special functions whose eager kernels are formulas of a fixed number of steps."""

from __future__ import annotations

import math
from collections.abc import Callable

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


POLYGAMMA: dict[int, Callable[[Term], Term]] = {0: _digamma, 1: _trigamma}


@TABLE.lowers(aten.polygamma.default)
def polygamma(ctx: Lowering, n: Int, x: Value) -> Computed:
    """Derivative `n` of digamma; from the second on eager sums a series until it has converged."""
    if not isinstance(n, int) or n not in POLYGAMMA:
        raise UnsupportedError("a series of data-dependent length")
    return elementwise(ctx, (x,), POLYGAMMA[n])
