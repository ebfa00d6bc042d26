"""How a nest's symbols become the axes of a tile: order, merging, and which dimension runs fastest.

A tile has the axes x (points), optionally y (points whose accesses are unit-stride elsewhere than x's) and r (reduced). Each
axis is a list of index symbols walked as one linear index, the last symbol fastest. Symbols are ordered by stride and merged
wherever no access needs them apart; then each axis becomes one symbol, and the algebra of `ir.exprs` folds the divisions of
every access that walks memory in the same order, so that it stays linear and vectorisable.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Iterable
from dataclasses import dataclass, replace

import torch

from fxopt.ir.exprs import (
    Atom,
    Int,
    Sym,
    add,
    ask,
    assumed,
    coefficient,
    floordiv,
    free_symbols,
    mod,
    mul,
    prod,
    substitute,
    symbol,
    symbol_or_atom,
    unravel,
)
from fxopt.ir.loops import IndexValue, Load, Nest, Reduce, Scan, postorder
from fxopt.ir.region import Region
from fxopt.ir.rounding import NARROW

_LINE_NAMES = {"x": "l0", "y": "l1", "r": "l2"}
_TYPICAL = 1024
"""More than `ASSUMED_SIZE`: this decides whether a grid fills the GPU, and small blocks or a split chosen for a size taken
too small cost more at large sizes than large blocks do at small ones."""
_SIDE_SHARE = 8  # what moves less than one part in so many has no say in the order of loops
_ROW_MIN = 32  # rows of fewer elements are no use as an axis of their own
_TILE_MIN = 8  # a second tile axis shorter than this cannot coalesce anything


@dataclass(frozen=True)
class Axis:
    """Index symbols walked as one linear index; the last one is fastest."""

    symbols: tuple[Sym, ...]

    @property
    def extent(self) -> Int:
        return prod(size_of(s) for s in self.symbols)

    @property
    def hint(self) -> int:
        """The extent as a number for cost models; an unknown size counts as 1024."""
        out = 1
        for s in self.symbols:
            out *= size_hint(size_of(s))
        return out


@dataclass(frozen=True)
class Access:
    """One load or store: index without its bindings, bytes per element, whether it writes."""

    index: Int
    itemsize: int
    writes: bool


@dataclass(frozen=True)
class Tiling:
    """A nest in normal form with its axes.

    `r.symbols` is empty when nothing is reduced, `y.symbols` when the tile has no y. `accesses` are in terms of the axes'
    symbols, as is `merged`; `nest` is in terms of one linear symbol per axis that has any: `lines` maps the axis's name
    to it.
    """

    merged: Nest
    nest: Nest
    lines: dict[str, Sym]
    x: Axis
    y: Axis
    r: Axis
    accesses: tuple[Access, ...]

    @functools.cached_property
    def reduces(self) -> bool:
        return bool(self.r.symbols) or _has_reduction(self.nest)

    @functools.cached_property  # asked for each configuration
    def inner_reduction(self) -> bool:
        """The reduced axis is the unit-stride one for most bytes (a row reduction, not a column one)."""
        if not self.r.symbols or not self.x.symbols:
            return True
        votes = unit_stride_votes(self.accesses, (*self.x.symbols, *self.r.symbols))
        return sum(votes[s] for s in self.r.symbols) >= sum(votes[s] for s in self.x.symbols)


def size_of(sym: Sym) -> Int:
    if sym.size is None:
        raise ValueError(f"{sym!r} is a size symbol, not an index")
    return sym.size


def size_hint(size: Int) -> int:
    """A plausible number for `size` in the cost model."""
    return assumed(size, _TYPICAL)


@functools.lru_cache(maxsize=256)
def _tile_nest(nest: Nest, itemsizes: tuple[tuple[str, int], ...], form: str) -> Tiling:
    nest = rewrite(nest, {s: 0 for s in (*nest.points, *nest.reduced) if s.size == 1})
    sizes = dict(itemsizes)
    points = _by_stride(nest.points, accesses_of(nest, sizes))
    reduced = nest.reduced if _has_scan(nest) else _by_stride(nest.reduced, accesses_of(nest, sizes))
    nest = _merge(replace(nest, points=points, reduced=reduced))
    accesses = accesses_of(nest, sizes)
    x, y = (nest.points, ()) if nest.reduced else _FORMS[form](nest, accesses)
    axes = {"x": Axis(x), "y": Axis(y), "r": Axis(nest.reduced)}
    linear, lines = _linearise(nest, axes)
    return Tiling(nest, linear, lines, axes["x"], axes["y"], axes["r"], accesses)


def _linearise(nest: Nest, axes: dict[str, Axis]) -> tuple[Nest, dict[str, Sym]]:
    lines: dict[str, Sym] = {}
    mapping: dict[Sym, Int] = {}
    for name, axis in axes.items():
        if len(axis.symbols) == 1:
            lines[name] = axis.symbols[0]
        elif axis.symbols:
            lines[name] = Sym(_LINE_NAMES[name], size=axis.extent)
            mapping |= zip(axis.symbols, unravel(symbol(lines[name]), tuple(map(size_of, axis.symbols))), strict=True)
    return rewrite(nest, mapping), lines


def tile(region: Region, form: str = "tiles") -> Tiling:
    """The tiling of `region`'s nest. `form` says what of its points lies on y: the "tiles" form has them there when accesses
    are unit-stride along different symbols, "rows" all but the fastest symbol when that pays, "flat" none.
    """
    nest = region.nest
    names = sorted({load.buffer for load in nest.loads()} | set(nest.writes()))
    return _tile_nest(nest, tuple((n, region.buffers[n].dtype.itemsize) for n in names), form)


def rewrite(nest: Nest, mapping: dict[Sym, Int]) -> Nest:
    """`nest` with index symbols substituted; symbols mapped to constants leave the domain."""
    if not mapping:
        return nest
    stores = tuple(s.transformed(mapping) for s in nest.stores)
    return Nest(_images(nest.points, mapping), _images(nest.reduced, mapping), stores)


def _images(symbols: tuple[Sym, ...], mapping: dict[Sym, Int]) -> tuple[Sym, ...]:
    out: list[Sym] = []
    for sym in symbols:
        image = mapping.get(sym, symbol(sym))
        own = sorted((s for s in free_symbols(image) if s.size is not None), key=lambda s: s.name)
        out += [s for s in own if s not in out]
    return tuple(out)


def accesses_of(nest: Nest, itemsizes: dict[str, int]) -> tuple[Access, ...]:
    loads = [Access(n.index, itemsizes[n.buffer], False) for n in nest.loads()]
    return (*loads, *(Access(s.index, itemsizes[s.buffer], True) for s in nest.stores))


def _has_scan(nest: Nest) -> bool:
    return any(isinstance(n, Scan) for n in postorder(nest.roots))


def _has_reduction(nest: Nest) -> bool:
    return any(isinstance(n, Reduce | Scan) for n in postorder(nest.roots))


def unit_stride(index: Int, sym: Sym) -> bool:
    """Whether neighbours along `sym` are neighbours in memory, but for the ends of runs of `_TILE_MIN` or more."""
    return coefficient(_within_runs(index, sym), sym) == 1


def _within_runs(index: Int, sym: Sym) -> Int:
    """`index` as it goes on along `sym` where none of its divisions by `_TILE_MIN` or more carries."""
    if isinstance(index, int) or coefficient(index, sym) is not None:
        return index
    out: Int = 0
    for monomial, factor in index.terms:
        term: Int = factor
        for atom in monomial:
            long_runs = isinstance(atom, Atom) and ask("<=", _TILE_MIN, atom.b) is True
            if not isinstance(atom, Atom) or not long_runs or atom.kind not in ("floordiv", "mod"):
                term = mul(term, symbol_or_atom(atom))
            elif atom.kind == "mod":
                term = mul(term, _within_runs(atom.a, sym))
            elif sym not in free_symbols(atom.a):
                term = mul(term, symbol_or_atom(atom))
            else:
                term = 0
        out = add(out, term)
    return out


def unit_stride_votes(accesses: Iterable[Access], symbols: tuple[Sym, ...]) -> dict[Sym, int]:
    """For each symbol, the bytes of accesses in which it has stride 1; a store counts twice (partial writes cost most).

    An access counts for the elements it touches, so a broadcast row has no say against a whole tensor.
    """
    votes = dict.fromkeys(symbols, 0)
    for access in accesses:
        used = free_symbols(access.index)
        touched = Axis(tuple(s for s in symbols if s in used)).hint
        for sym in symbols:
            if sym in used and unit_stride(access.index, sym):
                votes[sym] += touched * access.itemsize * (2 if access.writes else 1)
    return votes


def _by_stride(symbols: tuple[Sym, ...], accesses: tuple[Access, ...]) -> tuple[Sym, ...]:
    """Symbols by falling stride in the access that uses most of them, of those the one that moves most; the unknown keep
    their order."""
    if len(symbols) < 2:
        return symbols
    heaviest = min(accesses, key=lambda a: (-len(free_symbols(a.index) & set(symbols)), -_weight(a)))
    guide = heaviest.index
    strides = {s: coefficient(guide, s) for s in symbols}
    out: list[Sym] = []
    for sym in symbols:
        at = len(out)
        while at > 0 and _smaller(strides[out[at - 1]], strides[sym]):
            at -= 1
        out.insert(at, sym)
    votes = unit_stride_votes(accesses, symbols)
    fastest = max(out, key=lambda s: (votes[s], out.index(s)))
    if votes[fastest] * _SIDE_SHARE < _weight(heaviest):  # statistics of rows, say, which lie in another order than the rows
        return tuple(out)
    return (*(s for s in out if s is not fastest), fastest)


def _weight(access: Access) -> int:
    """Bytes that the access moves over the whole domain, twice for a store."""
    touched = (size_hint(size_of(s)) for s in free_symbols(access.index) if s.size is not None)
    return math.prod(touched) * access.itemsize * (2 if access.writes else 1)


def _smaller(a: Int | None, b: Int | None) -> bool:
    """Stride a is known to be smaller than b; a broadcast (0) says nothing."""
    if a is None or b is None or a == 0 or b == 0:
        return False
    return ask("<", a, b) is True


def _index_expressions(nest: Nest) -> list[Int]:
    out: list[Int] = [s.index for s in nest.stores]
    for node in postorder(nest.roots):
        if isinstance(node, Load):
            out.append(node.index)
        elif isinstance(node, IndexValue):
            out.append(node.expr)
    return list(dict.fromkeys(out))


def nonlinear(x: Int) -> int:
    """How many division, modulo, minimum and maximum atoms `x` has."""
    return 0 if isinstance(x, int) else sum(not isinstance(a, Sym) for m, _ in x.terms for a in m)


def _merge(nest: Nest) -> Nest:
    """Adjacent symbols of one axis joined wherever no index expression gets harder by it."""
    expressions = _index_expressions(nest)
    mapping: dict[Sym, Int] = {}
    axes = []
    for symbols in (nest.points, nest.reduced):
        kept: list[Sym] = []
        for sym in symbols:
            joined = _join(kept[-1], sym, expressions) if kept else None
            if joined is None:
                kept.append(sym)
                continue
            merged, step, expressions = joined
            mapping = {s: substitute(e, step) for s, e in mapping.items()} | step
            kept[-1] = merged
        axes.append(tuple(kept))
    return rewrite(nest, {s: e for s, e in mapping.items() if s in (*nest.points, *nest.reduced)})


def _join(outer: Sym, inner: Sym, expressions: list[Int]) -> tuple[Sym, dict[Sym, Int], list[Int]] | None:
    size = size_of(inner)
    if size == 0 or size_of(outer) == 0:
        return None
    merged = Sym(outer.name.upper(), size=mul(size_of(outer), size))
    step = {outer: floordiv(symbol(merged), size), inner: mod(symbol(merged), size)}
    after = []
    for old in expressions:
        new = substitute(old, step)
        if new is not old and nonlinear(new) > nonlinear(old):
            return None
        after.append(new)
    return merged, step, after


def _split_points(nest: Nest, accesses: tuple[Access, ...]) -> tuple[tuple[Sym, ...], tuple[Sym, ...]]:
    """(x, y) symbols: y is split off when some access is strided along x's fastest symbol and unit-stride along another."""
    points = nest.points
    if len(points) < 2:
        return points, ()
    fast = points[-1]
    strided = [a for a in accesses if fast in free_symbols(a.index) and coefficient(a.index, fast) != 1]
    votes = unit_stride_votes(strided, points[:-1])
    slow = max(points[:-1], key=lambda s: votes[s])
    if not votes[slow] or min(size_hint(size_of(slow)), size_hint(size_of(fast))) < _TILE_MIN:
        return points, ()
    return (fast,), (*(s for s in points if s is not slow and s is not fast), slow)


def _split_rows(nest: Nest, accesses: tuple[Access, ...]) -> tuple[tuple[Sym, ...], tuple[Sym, ...]]:
    """(x, y) symbols: x is the fastest alone when it is long and something is the same along it, which a program of one row
    then loads and computes once, or the same for all rows, which one of several does."""
    *slow, fast = nest.points or (None,)
    if not slow or fast is None or not isinstance(fast.size, int) or fast.size < _ROW_MIN or fast.size % 16:
        return nest.points, ()
    integers = (n.expr for n in postorder(nest.roots) if isinstance(n, IndexValue))
    used = [free_symbols(e) for e in (*(a.index for a in accesses), *integers)]
    if not any((fast in symbols) != bool(symbols & set(slow)) for symbols in used):
        return nest.points, ()
    return (fast,), tuple(s for s in slow if s is not None)


def _all_on_x(nest: Nest, accesses: tuple[Access, ...]) -> tuple[tuple[Sym, ...], tuple[Sym, ...]]:
    return nest.points, ()


_FORMS = {"tiles": _split_points, "rows": _split_rows, "flat": _all_on_x}


def accumulator_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype a reduction of `dtype` accumulates in and a value of it is computed in."""
    return torch.float32 if dtype in NARROW else dtype
