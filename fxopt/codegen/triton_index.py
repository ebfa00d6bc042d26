"""The type of a Triton kernel's indices: int32 when everything that an address is computed from is known to fit, else int64.

Sizes known only at run time may fit or not: such a kernel has a body for each type and tests `int32_limits` when it runs.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable

from fxopt.codegen.triton_tiling import Tiling, size_of
from fxopt.ir.exprs import (
    Atom,
    Expr,
    Int,
    Sym,
    add,
    ask,
    bounds,
    coefficient,
    floordiv,
    free_symbols,
    maximum,
    minimum,
    mod,
    mul,
    prod,
    substitute,
    symbol,
    symbol_or_atom,
)
from fxopt.ir.loops import IndexValue, postorder
from fxopt.ir.region import Region

INT32_MAX = 2**31 - 1
INT32_LIMIT = INT32_MAX - 65536
"""What extents and domains stay below in kernels with int32 indices: lanes past a domain's end still compute theirs."""

Range = tuple[Int | None, Int | None]


def fits_int32(value: Int) -> bool:
    """True when `value` is known to stay within int32; a symbolic size without an upper bound is not known to."""
    lo, hi = bounds(value)
    return lo is not None and hi is not None and lo >= -INT32_MAX and hi <= INT32_MAX


def computed_in_int32(x: Int) -> bool:
    """Whether `x` and all that its text computes on the way are known to fit int32."""
    return fits_int32(x) and all(map(fits_int32, magnitudes(x)))


def magnitudes(x: Int) -> list[Int]:
    """The intermediate values of `x`'s text: its terms, and what its divisions, modulos and extrema are taken of.

    `x` itself is not among them. Partial sums need no room: int32 addition wraps, so a sum that fits is right.
    """
    if isinstance(x, int):
        return [x]
    out: list[Int] = [Expr((t,)) for t in x.terms]
    for atom in (a for m, _ in x.terms for a in m if isinstance(a, Atom)):
        out += [atom.a, atom.b, *magnitudes(atom.a), *magnitudes(atom.b)]
    return out


def int32_limits(region: Region, tiling: Tiling) -> tuple[Int, ...] | None:
    """What has to stay below INT32_LIMIT at run time for int32 indices to be right, in terms of sizes; () when they always
    are, None when they are not or nothing tells.

    Buffers' extents and the domain bound addresses and loop indices. What an address divides or compares may be any integer
    arithmetic of the user's, and has to fit by itself. Integers as values (`IndexValue`) that may not fit are computed in
    int64 by either kind of body, from sizes that are parameters of the kernel: int32 ones where there are two bodies.
    """
    domain = [prod(map(size_of, tiling.nest.points)), prod(map(size_of, tiling.nest.reduced))]
    spans = _open((*(b.extent for b in region.buffers.values()), *domain))
    operands = _open(extreme for x in _divided(tiling) for extreme in _both_ways(x))
    if spans is None or operands is None:
        return None
    if not spans and not operands:
        return ()
    sizes = _open(extreme for s in _value_sizes(tiling) for extreme in (s, -s))
    if sizes is None:
        return None
    out = list(spans)
    for x in (*operands, *sizes):
        if not any(_at_most(x, y + (INT32_MAX - INT32_LIMIT)) for y in out):
            out.append(x)
    return tuple(out)


def _open(values: Iterable[Int | None]) -> list[Int] | None:
    """Those of `values` that may reach the limit, each once; None when one is unknown or reaches it whatever the sizes."""
    out: list[Int] = []
    for x in dict.fromkeys(values):
        if x is None:
            return None
        lo, hi = bounds(x)
        if lo is not None and lo >= INT32_LIMIT:
            return None
        if hi is None or hi >= INT32_LIMIT:
            out.append(x)
    return out


def _divided(tiling: Tiling) -> list[Int]:
    """What the non-linear operators in addresses and loops' ends are applied to, and literal factors.

    Sums and products alone need no room: int32 wraps, so what fits in the end is right. A quotient fits if its dividend
    does, and a loop index if the domain does.
    """
    nest = tiling.nest
    ends = [axis.extent for axis in (tiling.x, tiling.y, tiling.r)]
    found: list[Int] = []
    waiting = [*(load.index for load in nest.loads()), *(store.index for store in nest.stores), *ends]
    for x in waiting:  # grows on the way
        if isinstance(x, int):
            continue
        found += [coef for _, coef in x.terms]
        below = [y for m, _ in x.terms for a in m if isinstance(a, Atom) for y in (a.a, a.b)]
        found += [y for y in below if _is_arithmetic(y)]
        waiting += below
    return list(dict.fromkeys(found))


def _is_arithmetic(x: Int) -> bool:
    """Whether `x` is more than one non-linear operator or loop index, which fit when what they are made of does."""
    if isinstance(x, Expr) and len(x.terms) == 1 and x.terms[0][1] == 1 and len(x.terms[0][0]) == 1:
        atom = x.terms[0][0][0]
        return isinstance(atom, Sym) and atom.size is None
    return True


def _value_sizes(tiling: Tiling) -> list[Expr]:
    """Size symbols of integers that are values."""
    values = (n.expr for n in postorder(tiling.nest.roots) if isinstance(n, IndexValue))
    symbols = {s for x in values for s in free_symbols(x) if s.size is None}
    return [symbol(s) for s in sorted(symbols, key=lambda s: s.name)]


def _at_most(x: Int, y: Int) -> bool:
    """Whether x <= y is proven: with each atom written as its least value plus something, no coefficient of y - x is
    negative."""
    rest = y - x
    if isinstance(rest, int):
        return rest >= 0
    shifted: dict[Sym | Atom, Int] = {}
    for atom in (a for m, _ in rest.terms for a in m):
        low = bounds(symbol_or_atom(atom))[0]
        if low is None:
            return False
        shifted.setdefault(atom, symbol(Sym(f"above{len(shifted)}")) + low)
    moved: Int = 0
    for monomial, coef in rest.terms:
        moved = moved + prod(shifted[a] for a in monomial) * coef
    return moved >= 0 if isinstance(moved, int) else all(coef > 0 for _, coef in moved.terms)


def _both_ways(x: Int) -> tuple[Int | None, Int | None]:
    """What `x` and -`x` are at most."""
    low, high = size_range(x)
    return high, None if low is None else mul(low, -1)


def size_range(x: Int) -> Range:
    """(least, greatest) value of `x` over all its index symbols, in terms of sizes; None where that is not known."""
    if isinstance(x, int) or all(s.size is None for s in free_symbols(x)):
        return x, x
    low: Int | None = 0
    high: Int | None = 0
    for monomial, coef in x.terms:
        least, most = _product_range(monomial)
        if coef < 0:
            least, most = most, least
        low = None if low is None or least is None else low + mul(least, coef)
        high = None if high is None or most is None else high + mul(most, coef)
    return low, high


def _product_range(monomial: tuple[Sym | Atom, ...]) -> Range:
    """The range of a product, where at most one factor may be negative."""
    ranges = [_atom_range(a) for a in monomial]
    signed = [r for r in ranges if not _nonnegative(r[0])]
    if len(signed) > 1:
        return None, None
    low: Int | None = 1
    high: Int | None = 1
    for least, most in ranges:
        if _nonnegative(least):
            low, high = _times(low, least), _times(high, most)
    if not signed:
        return low, high
    ((least, most),) = signed
    lowest = _extreme(minimum, _times(least, low), _times(least, high))
    return lowest, _extreme(maximum, _times(most, low), _times(most, high))


def _times(a: Int | None, b: Int | None) -> Int | None:
    return None if a is None or b is None else mul(a, b)


def _extreme(pick: Callable[[Int, Int], Int], a: Int | None, b: Int | None) -> Int | None:
    return None if a is None or b is None else pick(a, b)


def _nonnegative(x: Int | None) -> bool:
    return x is not None and ask("<=", 0, x) is True


def _atom_range(atom: Sym | Atom) -> Range:
    if isinstance(atom, Sym):
        return (symbol_or_atom(atom),) * 2 if atom.size is None else (0, add(atom.size, -1))
    (a_low, a_high), (b_low, b_high) = size_range(atom.a), size_range(atom.b)
    match atom.kind:
        case "mod":
            return 0, None if b_high is None else add(b_high, -1)
        case "floordiv":
            if b_low is not None and b_low == b_high:
                return None if a_low is None else floordiv(a_low, b_low), _greatest_quotient(a_high, b_low)
            return (0, a_high) if _nonnegative(a_low) else (None, None)
        case kind:
            pick = minimum if kind == "min" else maximum
            return _extreme(pick, a_low, b_low), _extreme(pick, a_high, b_high)


def _greatest_quotient(a: Int | None, b: Int) -> Int | None:
    """a // b; as (a + 1) / b - 1 where that division is exact, as it is for the last index of a merged loop."""
    if a is None:
        return None
    end = add(a, 1)
    return add(floordiv(end, b), -1) if mod(end, b) == 0 else floordiv(a, b)


def same_within(x: Int, sym: Sym, step: int) -> bool:
    """Whether `x` is the same for all values of `sym` between two multiples of `step`: it only uses quotients of `sym` by
    multiples of that."""
    if isinstance(x, int):
        return True
    for atom in (a for monomial, _ in x.terms for a in monomial):
        if isinstance(atom, Sym):
            if atom == sym:
                return False
        elif atom.kind == "floordiv" and atom.a == symbol(sym) and isinstance(atom.b, int) and atom.b % step == 0:
            continue
        elif not (same_within(atom.a, sym, step) and same_within(atom.b, sym, step)):
            return False
    return True


def in_runs(x: Int, sym: Sym, length: int) -> bool:
    """Whether `x` goes up by one with `sym` from each multiple of `length` to the next."""
    group, place = Sym("group", lo=0), Sym("place", size=length)
    return coefficient(substitute(x, {sym: symbol(group) * length + symbol(place)}), place) == 1
