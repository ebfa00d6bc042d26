"""Formulas of scalars as Python writes them: a `Term` is a Scalar with operators, numbers taking its dtype.

`x / (1 + exp(-x))` on a Term builds the loop IR's expression for it. Nothing is promoted: two terms of different dtypes do
not mix, which `binary` checks, so that a forgotten promotion rule is an error while lowering and not a wrong number.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Union

import torch

from fxopt.ir.loops import Const, Op, Scalar
from fxopt.lower.values import cast

Number = Union[bool, int, float]
Operand = Union["Term", Number]


class Term:
    """A scalar expression with arithmetic. Comparisons by method (`lt`, `eq`), since == and < have Python meanings."""

    __slots__ = ("scalar",)

    def __init__(self, scalar: Scalar) -> None:
        self.scalar = scalar

    @property
    def dtype(self) -> torch.dtype:
        return self.scalar.dtype

    def __add__(self, other: Operand) -> Term:
        return binary("add", self, other)

    def __radd__(self, other: Operand) -> Term:
        return binary("add", other, self)

    def __sub__(self, other: Operand) -> Term:
        return binary("sub", self, other)

    def __rsub__(self, other: Operand) -> Term:
        return binary("sub", other, self)

    def __mul__(self, other: Operand) -> Term:
        return binary("mul", self, other)

    def __rmul__(self, other: Operand) -> Term:
        return binary("mul", other, self)

    def __truediv__(self, other: Operand) -> Term:
        return binary("truediv", self, other)

    def __rtruediv__(self, other: Operand) -> Term:
        return binary("truediv", other, self)

    def __neg__(self) -> Term:
        return unary("neg", self)

    def __and__(self, other: Operand) -> Term:
        return binary("bitwise_and", self, other)

    def __or__(self, other: Operand) -> Term:
        return binary("bitwise_or", self, other)

    def __invert__(self) -> Term:
        return unary("bitwise_not", self)

    def eq(self, other: Operand) -> Term:
        return compare("eq", self, other)

    def ne(self, other: Operand) -> Term:
        return compare("ne", self, other)

    def lt(self, other: Operand) -> Term:
        return compare("lt", self, other)

    def le(self, other: Operand) -> Term:
        return compare("le", self, other)

    def gt(self, other: Operand) -> Term:
        return compare("gt", self, other)

    def ge(self, other: Operand) -> Term:
        return compare("ge", self, other)

    def to(self, dtype: torch.dtype) -> Term:
        return Term(cast(self.scalar, dtype))


def literal(value: Number, dtype: torch.dtype) -> Term:
    return Term(Const(value, dtype))


def _pair(a: Operand, b: Operand) -> tuple[Scalar, Scalar]:
    dtype = a.dtype if isinstance(a, Term) else b.dtype if isinstance(b, Term) else None
    if dtype is None:
        raise TypeError("a formula of numbers only")
    x, y = ((t if isinstance(t, Term) else literal(t, dtype)).scalar for t in (a, b))
    if x.dtype != y.dtype:
        raise TypeError(f"operands of {x.dtype} and {y.dtype}")
    return x, y


def binary(name: str, a: Operand, b: Operand) -> Term:
    """A BINARY op of the loop IR on two terms of one dtype (or a term and a number)."""
    x, y = _pair(a, b)
    return Term(Op(name, (x, y), x.dtype))


def compare(name: str, a: Operand, b: Operand) -> Term:
    """A COMPARE op of the loop IR; bool."""
    return Term(Op(name, _pair(a, b), torch.bool))


def unary(name: str, x: Term) -> Term:
    """A one-argument op of the loop IR with a result of the argument's dtype."""
    return Term(Op(name, (x.scalar,), x.dtype))


def predicate(name: str, x: Term) -> Term:
    """isnan, isinf or signbit."""
    return Term(Op(name, (x.scalar,), torch.bool))


def where(cond: Term, a: Operand, b: Operand) -> Term:
    x, y = _pair(a, b)
    return Term(Op("where", (cond.scalar, x, y), x.dtype))


def maximum(a: Operand, b: Operand) -> Term:
    return binary("maximum", a, b)


def minimum(a: Operand, b: Operand) -> Term:
    return binary("minimum", a, b)


def clamp(x: Term, low: Operand | None, high: Operand | None) -> Term:
    """x limited to [low, high]; `high` when they cross; NaN wherever any of the three is."""
    if low is not None:
        x = maximum(x, low)
    return x if high is None else minimum(x, high)


def _named(name: str) -> Callable[[Term], Term]:
    def apply(x: Term) -> Term:
        return unary(name, x)

    return apply


exp, expm1, log, log1p = _named("exp"), _named("expm1"), _named("log"), _named("log1p")
sqrt, rsqrt, tanh, sigmoid, erf = _named("sqrt"), _named("rsqrt"), _named("tanh"), _named("sigmoid"), _named("erf")
absolute, trunc, sin, rounded_to_even = _named("abs"), _named("trunc"), _named("sin"), _named("round")
