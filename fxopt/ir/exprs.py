"""Integer expressions over index and size symbols.

Sizes, strides, offsets and loop indices are `Int`: a plain `int` when known, else an `Expr`. An `Expr` is a polynomial in
canonical form (a sum of integer coefficients times products of atoms), so equal polynomials are equal objects and no
simplifier has to be asked. Atoms are symbols and the non-linear operators (floor division, modulo, minimum, maximum).

Every symbol carries its own range, so simplification needs no context: `(8*i + j) // 8` is `i` when `j` is an index of size
8. Constructors simplify; there is no separate simplify call. Division is floor division and divisors must be positive.
Symbolic shapes come from torch as SymPy expressions; `capture/symbols.py` converts them once.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Iterable, Mapping
from typing import Any, Union


class Sym:
    """A named integer with range [lo, size) or, when `size` is None, [lo, hi] with `hi` possibly unknown (None).

    An index symbol has a `size` (an `Int`, may itself be symbolic) and lo = 0; a size symbol (`s0`) has lo and hi.
    """

    __slots__ = ("_hash", "hi", "lo", "name", "size")

    def __init__(self, name: str, *, size: Int | None = None, lo: int = 0, hi: int | None = None) -> None:
        self.name, self.size, self.lo, self.hi = name, size, lo, hi
        self._hash = hash((name, size, lo, hi))

    def __hash__(self) -> int:
        return self._hash

    def __eq__(self, other: object) -> bool:
        return self is other or (
            isinstance(other, Sym)
            and (self.name, self.lo, self.hi) == (other.name, other.lo, other.hi)
            and self.size == other.size
        )

    def __repr__(self) -> str:
        return self.name


class Atom:
    """A non-linear integer operator applied to two operands: `kind` is floordiv, mod, min or max."""

    __slots__ = ("_hash", "a", "b", "kind")

    def __init__(self, kind: str, a: Int, b: Int) -> None:
        self.kind, self.a, self.b = kind, a, b
        self._hash = hash((kind, a, b))

    def __hash__(self) -> int:
        return self._hash

    def __eq__(self, other: object) -> bool:
        return self is other or (
            isinstance(other, Atom)
            and self._hash == other._hash
            and self.kind == other.kind
            and self.a == other.a
            and self.b == other.b
        )

    def __repr__(self) -> str:
        op = {"floordiv": "//", "mod": "%"}.get(self.kind)
        return f"({self.a!r} {op} {self.b!r})" if op else f"{self.kind}({self.a!r}, {self.b!r})"


Monomial = tuple[Any, ...]  # sorted tuple of Sym | Atom; () is the constant term


class Expr:
    """A canonical sum of `coefficient * monomial`. Build with operators or the functions of this module."""

    __slots__ = ("_hash", "terms")

    def __init__(self, terms: tuple[tuple[Monomial, int], ...]) -> None:
        self.terms = terms
        self._hash = hash(terms)

    def __hash__(self) -> int:
        return self._hash

    def __eq__(self, other: object) -> bool:
        return self is other or (isinstance(other, Expr) and self._hash == other._hash and self.terms == other.terms)

    def __add__(self, other: Int) -> Int:
        return add(self, other)

    __radd__ = __add__

    def __neg__(self) -> Int:
        return mul(self, -1)

    def __sub__(self, other: Int) -> Int:
        return add(self, mul(other, -1))

    def __rsub__(self, other: Int) -> Int:
        return add(other, mul(self, -1))

    def __mul__(self, other: Int) -> Int:
        return mul(self, other)

    __rmul__ = __mul__

    def __floordiv__(self, other: Int) -> Int:
        return floordiv(self, other)

    def __rfloordiv__(self, other: Int) -> Int:
        return floordiv(other, self)

    def __mod__(self, other: Int) -> Int:
        return mod(self, other)

    def __rmod__(self, other: Int) -> Int:
        return mod(other, self)

    def __bool__(self) -> bool:
        raise TypeError(f"a symbolic integer has no truth value; ask() what is known about it: {self!r}")

    def __repr__(self) -> str:
        parts = []
        for monomial, coef in self.terms:
            text = "*".join(repr(a) for a in monomial)
            parts.append(str(coef) if not text else text if coef == 1 else f"{coef}*{text}")
        return " + ".join(parts) if len(parts) == 1 else "(" + " + ".join(parts) + ")"


Int = Union[int, Expr]
Bounds = tuple[int | None, int | None]


def _atom_key(atom: Sym | Atom) -> tuple[str, str]:
    return ("s", atom.name) if isinstance(atom, Sym) else ("t", repr(atom))


def _from_terms(terms: Mapping[Monomial, int]) -> Int:
    kept = {m: c for m, c in terms.items() if c != 0}
    if not kept:
        return 0
    if len(kept) == 1 and () in kept:
        return kept[()]
    ordered = sorted(kept.items(), key=lambda t: (-len(t[0]), [_atom_key(a) for a in t[0]]))
    return Expr(tuple(ordered))


def symbol(sym: Sym) -> Expr:
    """The expression that is just `sym`."""
    return Expr((((sym,), 1),))


def index(name: str, size: Int) -> Int:
    """A loop index in [0, size); the index of a loop of size 1 is the constant 0."""
    return 0 if size == 1 else symbol(Sym(name, size=size))


def as_symbol(x: Int) -> Sym | None:
    """The symbol that `x` consists of, or None."""
    if isinstance(x, Expr) and len(x.terms) == 1:
        monomial, coef = x.terms[0]
        if coef == 1 and len(monomial) == 1 and isinstance(monomial[0], Sym):
            return monomial[0]
    return None


def _terms(x: Int) -> tuple[tuple[Monomial, int], ...]:
    return x.terms if isinstance(x, Expr) else (((), int(x)),) if x else ()


@functools.lru_cache(maxsize=65536)
def add(a: Int, b: Int) -> Int:
    """a + b; joins `d*(x//d) + x%d` back into `x`."""
    if isinstance(a, int) and isinstance(b, int):
        return a + b
    out: dict[Monomial, int] = dict(_terms(a))
    for monomial, coef in _terms(b):
        out[monomial] = out.get(monomial, 0) + coef
    joined = _join_division(out)
    return _from_terms(out) if joined is None else joined


def _join_division(terms: dict[Monomial, int]) -> Int | None:
    """The sum of `terms` with some k*(x%d) and its quotient's term made one; None when no such pair is present."""
    for monomial, k in terms.items():
        if k == 0 or len(monomial) != 1 or not isinstance(monomial[0], Atom) or monomial[0].kind != "mod":
            continue
        for other, c in terms.items():
            joined = _with_quotient(monomial[0], k, other, c) if c and other else None
            if joined is not None:
                left = {m: v for m, v in terms.items() if m not in (monomial, other)}
                return add(_from_terms(left), joined)
    return None


def _with_quotient(remainder: Atom, k: int, other: Monomial, c: int) -> Int | None:
    """k*(x%d) + c*other when the latter is k*d*(x//d), giving k*x, or k*d*((x//d)%e), giving k*(x%(d*e)); else None."""
    x, d = remainder.a, remainder.b
    quotient, scaled = floordiv(x, d), mul(d, k)
    for position, atom in enumerate(other):
        if _from_terms({other[:position] + other[position + 1 :]: c}) != scaled:
            continue
        if symbol_or_atom(atom) == quotient:
            return mul(x, k)
        if isinstance(atom, Atom) and atom.kind == "mod" and atom.a == quotient:
            return mul(mod(x, mul(d, atom.b)), k)
    return None


def symbol_or_atom(atom: Sym | Atom) -> Expr:
    return Expr((((atom,), 1),))


@functools.lru_cache(maxsize=65536)
def mul(a: Int, b: Int) -> Int:
    """a * b, expanded."""
    if isinstance(a, int) and isinstance(b, int):
        return a * b
    out: dict[Monomial, int] = {}
    for ma, ca in _terms(a):
        for mb, cb in _terms(b):
            monomial = tuple(sorted(ma + mb, key=_atom_key)) if ma and mb else ma or mb
            out[monomial] = out.get(monomial, 0) + ca * cb
    return _from_terms(out)


def prod(xs: Iterable[Int]) -> Int:
    out: Int = 1
    for x in xs:
        out = mul(out, x)
    return out


def _divide_term(monomial: Monomial, coef: int, divisor: Int) -> Int | None:
    """monomial*coef / divisor when exact and `divisor` is a single term, else None."""
    terms = _terms(divisor)
    if len(terms) != 1:
        return None
    d_monomial, d_coef = terms[0]
    if coef % d_coef:
        return None
    rest = list(monomial)
    for atom in d_monomial:
        if atom not in rest:
            return None
        rest.remove(atom)
    return _from_terms({tuple(rest): coef // d_coef})


def _split_divisible(n: Int, d: Int) -> tuple[Int, Int]:
    """(q, r) with n = q*d + r, where q takes every term of n that d divides exactly."""
    if n == d:
        return 1, 0
    quotient: Int = 0
    rest: dict[Monomial, int] = {}
    for monomial, coef in _terms(n):
        exact = _divide_term(monomial, coef, d)
        if exact is None:
            rest[monomial] = coef
        else:
            quotient = add(quotient, exact)
    remainder = _from_terms(rest)
    if isinstance(remainder, int) and isinstance(d, int) and remainder:
        return add(quotient, remainder // d), remainder % d
    return quotient, remainder


@functools.lru_cache(maxsize=65536)
def floordiv(n: Int, d: Int) -> Int:
    """floor(n / d) for d > 0."""
    if d == 1:
        return n
    if isinstance(n, int) and isinstance(d, int):
        return n // d
    quotient, rest = _split_divisible(n, d)
    if in_range(rest, d):
        return quotient
    if quotient != 0:
        return add(quotient, floordiv(rest, d))
    reduced = _reduce_common(rest, d)
    if reduced is not None:
        scaled, _, g = reduced
        return floordiv(scaled, d // g) if isinstance(d, int) else Expr((((Atom("floordiv", n, d),), 1),))
    inner = _as_atom(rest)
    if inner is not None and inner.kind == "floordiv":
        return floordiv(inner.a, mul(inner.b, d))
    return symbol_or_atom(Atom("floordiv", rest, d))


@functools.lru_cache(maxsize=65536)
def mod(n: Int, d: Int) -> Int:
    """n - d * floor(n / d) for d > 0, in [0, d)."""
    if d == 1:
        return 0
    if isinstance(n, int) and isinstance(d, int):
        return n % d
    _, rest = _split_divisible(n, d)
    if in_range(rest, d):
        return rest
    reduced = _reduce_common(rest, d)
    if reduced is not None and isinstance(d, int):
        scaled, low, g = reduced
        return add(mul(mod(scaled, d // g), g), low)
    plain = _without_mods(rest, d)
    return symbol_or_atom(Atom("mod", rest, d)) if plain is rest else mod(plain, d)


def _without_mods(x: Int, d: Int) -> Int:
    """`x` modulo `d`, without the modulos in it that this makes superfluous; `x` itself when there are none."""
    if not isinstance(x, Expr):
        return x
    out: Int = 0
    for monomial, coef in x.terms:
        atom = monomial[0] if len(monomial) == 1 else None
        if isinstance(atom, Atom) and atom.kind == "mod" and _split_divisible(mul(atom.b, coef), d)[1] == 0:
            out = add(out, mul(atom.a, coef))
        else:
            out = add(out, _from_terms({monomial: coef}))
    return x if out == x else out


def _as_atom(x: Int) -> Atom | None:
    if isinstance(x, Expr) and len(x.terms) == 1 and x.terms[0][1] == 1 and len(x.terms[0][0]) == 1:
        atom = x.terms[0][0][0]
        return atom if isinstance(atom, Atom) else None
    return None


def _reduce_common(n: Int, d: Int) -> tuple[Int, Int, int] | None:
    """(a, r, g) with n = g*a + r, 0 <= r < g, g > 1 and g dividing d; None when no such g is found."""
    if not isinstance(d, int) or not isinstance(n, Expr):
        return None
    for g in sorted({math.gcd(coef, d) for _, coef in n.terms if coef}, reverse=True):
        if g > 1:
            high, low = _split_divisible(n, g)
            if high != 0 and in_range(low, g):
                return high, low, g
    return None


def minimum(a: Int, b: Int) -> Int:
    return _extremum("min", a, b)


def maximum(a: Int, b: Int) -> Int:
    return _extremum("max", a, b)


@functools.lru_cache(maxsize=65536)
def _extremum(kind: str, a: Int, b: Int) -> Int:
    if isinstance(a, int) and isinstance(b, int):
        return min(a, b) if kind == "min" else max(a, b)
    difference = add(a, mul(b, -1))
    lo, hi = bounds(difference)
    if lo is not None and lo >= 0:
        return b if kind == "min" else a
    if hi is not None and hi <= 0:
        return a if kind == "min" else b
    return symbol_or_atom(Atom(kind, a, b))


@functools.lru_cache(maxsize=65536)
def bounds(x: Int) -> Bounds:
    """Inclusive numeric (low, high) that `x` is known to lie in; None where unknown."""
    if isinstance(x, int):
        return x, x
    lo: int | None = 0
    hi: int | None = 0
    for monomial, coef in x.terms:
        m_lo, m_hi = 1, 1
        for atom in monomial:
            m_lo, m_hi = _interval_mul((m_lo, m_hi), _atom_bounds(atom))
        if coef < 0:
            m_lo, m_hi = m_hi, m_lo
        lo = None if lo is None or m_lo is None else lo + m_lo * coef
        hi = None if hi is None or m_hi is None else hi + m_hi * coef
    if (lo is None or lo < 0) and len(x.terms) > 1 and _symbolic_nonnegative(x):
        lo = 0
    return lo, hi


ASSUMED_SIZE = 256
"""Stands for a size that is known only at run time, wherever a number is needed to compare plans or to measure one."""


def assumed(x: Int, typical: int = ASSUMED_SIZE) -> int:
    """A plausible number for `x`: itself, or when it depends on sizes `typical`, clamped to its known range."""
    if isinstance(x, int):
        return x
    lo, hi = bounds(x)
    guess = typical if hi is None else min(typical, hi)
    return guess if lo is None else max(guess, lo)


def _interval_mul(p: tuple[Any, Any], q: tuple[Any, Any]) -> tuple[Any, Any]:
    if p[0] is not None and q[0] is not None and p[0] >= 0 and q[0] >= 0:
        return p[0] * q[0], None if p[1] is None or q[1] is None else p[1] * q[1]
    if None in p or None in q:
        return None, None
    corners = [a * b for a in p for b in q]
    return min(corners), max(corners)


def _atom_bounds(atom: Sym | Atom) -> Bounds:
    if isinstance(atom, Sym):
        if atom.size is None:
            return atom.lo, atom.hi
        hi = bounds(atom.size)[1]
        return atom.lo, None if hi is None else hi - 1
    a, b = bounds(atom.a), bounds(atom.b)
    match atom.kind:
        case "mod":
            return _mod_bounds(a, b)
        case "floordiv":
            return _floordiv_bounds(a, atom.b)
        case "min":
            return _both(min, a[0], b[0]), _either(min, a[1], b[1])
    return _either(max, a[0], b[0]), _both(max, a[1], b[1])


def _mod_bounds(a: Bounds, d: Bounds) -> Bounds:
    hi = None if d[1] is None else d[1] - 1
    return 0, _either(min, hi, a[1]) if a[0] is not None and a[0] >= 0 else hi


def _floordiv_bounds(a: Bounds, d: Int) -> Bounds:
    if isinstance(d, int):
        return (None if a[0] is None else a[0] // d, None if a[1] is None else a[1] // d)
    return (0, a[1]) if a[0] is not None and a[0] >= 0 else (None, None)


def _both(pick: Callable[[int, int], int], a: int | None, b: int | None) -> int | None:
    """pick(a, b), unknown when one of them is."""
    return None if a is None or b is None else pick(a, b)


def _either(pick: Callable[[int, int], int], a: int | None, b: int | None) -> int | None:
    """pick(a, b), or the one that is known."""
    return b if a is None else a if b is None else pick(a, b)


def _upper(x: Int) -> Int:
    """An upper bound of `x` with each index replaced by its extreme value, so that mostly size symbols remain.

    A term is bounded factor by factor, which is right only when no factor can be negative; other terms are left alone.
    """
    if isinstance(x, int):
        return x
    out: Int = 0
    for monomial, coef in x.terms:
        value: Int = coef
        if any((_atom_bounds(atom)[0] or 0) < 0 or _atom_bounds(atom)[0] is None for atom in monomial):
            out = add(out, _from_terms({monomial: coef}))
            continue
        for atom in monomial:
            if isinstance(atom, Sym) and atom.size is not None:
                extreme: Int = add(atom.size, -1) if coef > 0 else 0
            elif isinstance(atom, Atom) and atom.kind == "mod":
                extreme = add(atom.b, -1) if coef > 0 else 0
            else:
                extreme = symbol_or_atom(atom)
            value = mul(value, extreme)
        out = add(out, value)
    return out


def _symbolic_nonnegative(x: Expr) -> bool:
    """True when substituting extremes for the indices proves x >= 0 as a polynomial in the size symbols."""
    lowest = mul(_upper(mul(x, -1)), -1)
    if isinstance(lowest, int):
        return lowest >= 0
    if lowest == x:
        return False
    return _sizes_only(lowest) and _polynomial_floor(lowest) >= 0


def _sizes_only(x: Expr) -> bool:
    return all(isinstance(a, Sym) and a.size is None for m, _ in x.terms for a in m)


def _polynomial_floor(x: Expr) -> int:
    """A lower bound of a polynomial in size symbols, each at least its `lo`; -1 when a negative term is unbounded.

    Writes each symbol as lo + t with t >= 0: the bound holds when all coefficients of the shifted polynomial are positive.
    """
    syms = {a for m, _ in x.terms for a in m}
    shifted = substitute(x, {s: add(symbol(Sym(s.name + "'", lo=0)), s.lo) for s in syms})
    constant = 0
    for monomial, coef in _terms(shifted):
        if monomial and coef < 0:
            return -1
        if not monomial:
            constant = coef
    return constant


@functools.lru_cache(maxsize=65536)
def in_range(x: Int, size: Int) -> bool:
    """True when 0 <= x < size is proven."""
    lo, hi = bounds(x)
    if lo is None or lo < 0:
        return False
    size_lo = bounds(size)[0]
    if hi is not None and size_lo is not None and hi < size_lo:
        return True
    low = bounds(add(add(size, -1), mul(x, -1)))[0]
    return low is not None and low >= 0


def ask(relation: str, a: Int, b: Int) -> bool | None:
    """What is statically known of `a relation b` (one of "==", "<", "<="): True, False, or None when it depends on sizes."""
    if relation == "==":
        if a == b:
            return True
        lo, hi = bounds(add(a, mul(b, -1)))
        return False if (lo is not None and lo > 0) or (hi is not None and hi < 0) else None
    lo, hi = bounds(add(b, mul(a, -1)))  # b - a
    slack = 1 if relation == "<" else 0
    if lo is not None and lo >= slack:
        return True
    return False if hi is not None and hi < slack else None


def never_equal(a: Int, b: Int) -> bool:
    """Whether `a` and `b` are known to differ whatever values their symbols have, each with symbols of its own.

    They do when their ranges are apart, or those of their remainders by some number: 2*i and 2*j + 1.
    """
    terms = [term for x in (a, b) if isinstance(x, Expr) for term in x.terms]
    moduli = sorted({abs(coef) for monomial, coef in terms if monomial} - {1})
    pairs = [(a, b), *((mod(a, m), mod(b, m)) for m in moduli)]
    return any(_are_apart(bounds(x), bounds(y)) for x, y in pairs)


def _are_apart(a: Bounds, b: Bounds) -> bool:
    return (a[1] is not None and b[0] is not None and a[1] < b[0]) or (b[1] is not None and a[0] is not None and b[1] < a[0])


def free_symbols(x: Int) -> frozenset[Sym]:
    """Every symbol `x` mentions (not the symbols inside an index symbol's size)."""
    if isinstance(x, int):
        return frozenset()
    out: set[Sym] = set()
    for monomial, _ in x.terms:
        for atom in monomial:
            if isinstance(atom, Sym):
                out.add(atom)
            else:
                out |= free_symbols(atom.a) | free_symbols(atom.b)
    return frozenset(out)


def _fold(x: Int, leaf: Callable[[Sym], Int]) -> Int:
    if isinstance(x, int):
        return x
    out: Int = 0
    for monomial, coef in x.terms:
        value: Int = coef
        for atom in monomial:
            if isinstance(atom, Sym):
                part = leaf(atom)
            else:
                part = APPLY[atom.kind](_fold(atom.a, leaf), _fold(atom.b, leaf))
            value = mul(value, part)
        out = add(out, value)
    return out


def substitute(x: Int, mapping: Mapping[Sym, Int]) -> Int:
    """`x` with symbols replaced, simplified again."""
    if isinstance(x, int) or not mapping or not (free_symbols(x) & mapping.keys()):
        return x
    return _fold(x, lambda s: mapping.get(s, symbol(s)))


def evaluate(x: Int, env: Mapping[str, int]) -> int:
    """The value of `x` with symbols looked up by name. Raises KeyError naming a symbol that `env` lacks."""
    out = _fold(x, lambda s: env[s.name])
    assert isinstance(out, int)
    return out


def coefficient(x: Int, sym: Sym) -> Int | None:
    """The stride of `x` in `sym`: c when x = c*sym + (terms without sym), else None."""
    out: Int = 0
    for monomial, coef in _terms(x):
        count = monomial.count(sym)
        if count == 1:
            rest = list(monomial)
            rest.remove(sym)
            if any(isinstance(a, Atom) and sym in free_symbols(symbol_or_atom(a)) for a in rest):
                return None
            out = add(out, _from_terms({tuple(rest): coef}))
        elif count > 1 or any(isinstance(a, Atom) and sym in free_symbols(symbol_or_atom(a)) for a in monomial):
            return None
    return out


def unravel(linear: Int, shape: tuple[Int, ...]) -> tuple[Int, ...]:
    """The index tuple into a row-major `shape` that `linear` denotes."""
    out: list[Int] = []
    rest = linear
    for size in reversed(shape[1:]):
        out.append(mod(rest, size))
        rest = floordiv(rest, size)
    if shape:
        out.append(rest if shape[0] != 1 else 0)
    return tuple(reversed(out))


def ravel(indices: tuple[Int, ...], shape: tuple[Int, ...]) -> Int:
    """The row-major linear index of `indices` in `shape`."""
    out: Int = 0
    for i, size in zip(indices, shape, strict=True):
        out = add(mul(out, size), i)
    return out


def contiguous_strides(shape: tuple[Int, ...]) -> tuple[Int, ...]:
    """Row-major strides of `shape`, in elements, as torch computes them (zero sizes count as one)."""
    out: list[Int] = []
    step: Int = 1
    for size in reversed(shape):
        out.append(step)
        step = mul(step, maximum(size, 1))
    return tuple(reversed(out))


APPLY: dict[str, Callable[[Int, Int], Int]] = {"floordiv": floordiv, "mod": mod, "min": minimum, "max": maximum}
