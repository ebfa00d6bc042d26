"""Symbolic sizes: torch's SymInts (SymPy inside) become `ir.exprs.Int` once, here; nothing downstream touches a SymInt.

A size symbol keeps torch's name (`s77`) and the range that torch guards it to, so `ask()` may rely on it at run time.
"""

from __future__ import annotations

import functools
import weakref
from collections.abc import Callable
from typing import Any

import sympy
import torch

from fxopt.errors import UnsupportedError
from fxopt.ir import exprs
from fxopt.ir.exprs import Int, Sym

INT64_MIN = -(2**63)
INT64_MAX = 2**63 - 1


def to_int(value: Any) -> Int:
    """`value` (an int, bool or SymInt) as an `Int`.

    Raises UnsupportedError for other types, for data-dependent (unbacked) symbols and for operators that `Int` lacks.
    """
    if isinstance(value, int):
        return int(value)
    if not isinstance(value, torch.SymInt):
        raise UnsupportedError(f"not an integer size: {value!r}")
    node = value.node
    known = node.maybe_as_int()
    if known is not None:
        return int(known)
    return _converter(node.shape_env).convert(node.expr)


_converters: weakref.WeakKeyDictionary[Any, Converter] = weakref.WeakKeyDictionary()


def _converter(shape_env: Any) -> Converter:
    if shape_env not in _converters:
        _converters[shape_env] = Converter(shape_env)
    return _converters[shape_env]


class Converter:
    """SymPy to `Int` for the symbols of one ShapeEnv; each symbol and each expression is converted once.

    torch only ever narrows a symbol's range, so the range first seen stays true, and one name means one `Sym`.
    """

    def __init__(self, shape_env: Any) -> None:
        # A callable, not the ShapeEnv: the table of converters must not keep its keys alive.
        self._env = weakref.ref(shape_env)
        self._done: dict[sympy.Expr, Int] = {}

    def convert(self, expr: sympy.Expr) -> Int:
        """The `Int` equal to `expr`. Raises UnsupportedError."""
        if expr not in self._done:
            self._done[expr] = self._convert(expr)
        return self._done[expr]

    def _convert(self, expr: sympy.Expr) -> Int:
        if isinstance(expr, sympy.Integer):
            return int(expr)
        if isinstance(expr, sympy.Symbol):
            return exprs.symbol(self._symbol(expr))
        rule = _RULES.get(type(expr).__name__)
        if rule is None:
            raise UnsupportedError(f"size expression {expr} uses {type(expr).__name__}")
        return rule(self, *expr.args)

    def _symbol(self, symbol: sympy.Symbol) -> Sym:
        env = self._env()
        if env is None or env.is_unbacked_symint(symbol):
            raise UnsupportedError(f"size {symbol} depends on data")
        bounds = env.bound_sympy(symbol)
        lo, hi = _finite(bounds.lower), _finite(bounds.upper)
        return Sym(str(symbol), lo=INT64_MIN if lo is None else lo, hi=hi)


def _finite(bound: Any) -> int | None:
    """A range's end as an int; None for infinities (torch also writes sys.maxsize - 1 for "no bound")."""
    if not isinstance(bound, sympy.Integer) or abs(int(bound)) >= INT64_MAX - 1:
        return None
    return int(bound)


def _positive(divisor: Int) -> Int:
    low = exprs.bounds(divisor)[0]
    if low is None or low < 1:
        raise UnsupportedError(f"division by {divisor!r}, which may not be positive")
    return divisor


def _fold(op: Callable[[Int, Int], Int]) -> Callable[..., Int]:
    def rule(c: Converter, *args: sympy.Expr) -> Int:
        return functools.reduce(op, (c.convert(a) for a in args))

    return rule


def _floordiv(c: Converter, a: sympy.Expr, b: sympy.Expr) -> Int:
    return exprs.floordiv(c.convert(a), _positive(c.convert(b)))


def _mod(c: Converter, a: sympy.Expr, b: sympy.Expr) -> Int:
    return exprs.mod(c.convert(a), _positive(c.convert(b)))


def _modular_indexing(c: Converter, a: sympy.Expr, b: sympy.Expr, m: sympy.Expr) -> Int:
    return exprs.mod(_floordiv(c, a, b), _positive(c.convert(m)))


def _ceildiv(c: Converter, a: sympy.Expr, b: sympy.Expr) -> Int:
    return exprs.mul(exprs.floordiv(exprs.mul(c.convert(a), -1), _positive(c.convert(b))), -1)


def _pow(c: Converter, base: sympy.Expr, exponent: sympy.Expr) -> Int:
    if not isinstance(exponent, sympy.Integer) or not 0 <= int(exponent) <= 8:
        raise UnsupportedError(f"size expression {base}**{exponent}")
    return exprs.prod([c.convert(base)] * int(exponent))


def _shift_left(c: Converter, a: sympy.Expr, bits: sympy.Expr) -> Int:
    if not isinstance(bits, sympy.Integer):
        raise UnsupportedError(f"size expression {a} << {bits}")
    return exprs.mul(c.convert(a), 1 << int(bits))


def _shift_right(c: Converter, a: sympy.Expr, bits: sympy.Expr) -> Int:
    if not isinstance(bits, sympy.Integer):
        raise UnsupportedError(f"size expression {a} >> {bits}")
    return exprs.floordiv(c.convert(a), 1 << int(bits))


def _of_quotient(divide: Callable[..., Int], nonnegative: bool) -> Callable[..., Int]:
    """floor, ceil or trunc of `a / b` (IntTrueDiv), computed in integers; of an integer, the integer itself.

    torch rounds `a / b` to a double first, which agrees while a is below 2**53: true of any size.
    """

    def rule(c: Converter, arg: sympy.Expr) -> Int:
        if type(arg).__name__ != "IntTrueDiv":
            raise UnsupportedError(f"size expression rounds {arg}")
        low = exprs.bounds(c.convert(arg.args[0]))[0]
        if nonnegative and (low is None or low < 0):
            raise UnsupportedError(f"size expression truncates {arg}, which may be negative")
        return divide(c, *arg.args)

    return rule


def _identity(c: Converter, arg: sympy.Expr) -> Int:
    return c.convert(arg)


_RULES: dict[str, Callable[..., Int]] = {
    "Add": _fold(exprs.add),
    "Mul": _fold(exprs.mul),
    "Pow": _pow,
    "PowByNatural": _pow,
    "Max": _fold(exprs.maximum),
    "Min": _fold(exprs.minimum),
    "FloorDiv": _floordiv,
    "CleanDiv": _floordiv,
    "Mod": _mod,
    "PythonMod": _mod,
    "ModularIndexing": _modular_indexing,
    "CeilDiv": _ceildiv,
    "LShift": _shift_left,
    "RShift": _shift_right,
    "FloorToInt": _of_quotient(_floordiv, nonnegative=False),
    "CeilToInt": _of_quotient(_ceildiv, nonnegative=False),
    "TruncToInt": _of_quotient(_floordiv, nonnegative=True),
    "Identity": _identity,
}
"""By class name, so that torch may move these classes (they live in torch.utils._sympy.functions) without breaking us."""
