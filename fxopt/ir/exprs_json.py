"""Integer expressions as JSON data, for plans."""

from __future__ import annotations

from typing import Any

from fxopt.ir.exprs import APPLY, Atom, Int, Sym, add, mul, symbol


def to_json(x: Int) -> Any:
    """Plain data: an int, or ["+", [coef, factor, ...], ...] with factors ["s", name, lo, hi, size] or [kind, a, b]."""
    if isinstance(x, int):
        return x
    return ["+", *([coef, *(_atom_json(a) for a in monomial)] for monomial, coef in x.terms)]


def _atom_json(atom: Sym | Atom) -> list[Any]:
    if isinstance(atom, Sym):
        return ["s", atom.name, atom.lo, atom.hi, None if atom.size is None else to_json(atom.size)]
    return [atom.kind, to_json(atom.a), to_json(atom.b)]


def from_json(data: Any) -> Int:
    """Inverse of `to_json`. Raises ValueError on anything `to_json` does not write."""
    if isinstance(data, int) and not isinstance(data, bool):
        return data
    if not isinstance(data, list) or not data or data[0] != "+":
        raise ValueError(f"not an integer expression: {data!r}")
    out: Int = 0
    for coef, *factors in data[1:]:
        if not isinstance(coef, int):
            raise ValueError(f"not an integer coefficient: {coef!r}")
        value: Int = coef
        for factor in factors:
            value = mul(value, _factor_from_json(factor))
        out = add(out, value)
    return out


def _factor_from_json(factor: Any) -> Int:
    if factor[0] == "s":
        _, name, lo, hi, size = factor
        return symbol(Sym(name, size=None if size is None else from_json(size), lo=lo, hi=hi))
    if factor[0] not in APPLY:
        raise ValueError(f"unknown integer operator: {factor[0]!r}")
    return APPLY[factor[0]](from_json(factor[1]), from_json(factor[2]))
