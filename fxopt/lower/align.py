"""Finding one iteration domain for two nests: how the loops of one run as the loops of the other."""

from __future__ import annotations

from collections.abc import Iterator

from fxopt.ir.exprs import Atom, Expr, Int, Sym, coefficient, prod, ravel, symbol, unravel
from fxopt.ir.loops import Nest, Scan, loop_order, postorder

Mapping = dict[Sym, Int]


def mappings(source: Nest, target: Nest) -> Iterator[Mapping]:
    """Bijections from `source`'s domain onto `target`'s (or onto target's points, for a nest without reduction that has as
    many).

    Each maps every loop symbol of `source` to an expression over `target`'s. The likeliest come first.
    """
    if source.reduced:
        if len(target.reduced) > 1 and _scans(source):  # a scan runs along one axis
            return
        if not _same_count(source.reduced, target.reduced) or not _same_count(source.points, target.points):
            return
        for points in _between(source, source.points, target, target.points):
            for reduced in _between(source, source.reduced, target, target.reduced):
                yield {**points, **reduced}
        return
    if _same_count(source.points, (*target.points, *target.reduced)):
        yield from _between(source, source.points, target, (*target.points, *target.reduced))
    elif target.reduced and _same_count(source.points, target.points):
        yield from _between(source, source.points, target, target.points)


def along(source: Nest, target: Nest, buffer: str) -> Iterator[Mapping]:
    """The bijection under which the points of two nests walk `buffer`, which both access, in one order, if strides are
    known. Unlike `mappings`, it sees through the order in which dimensions are numbered: of a channels-last image, say."""
    mine, theirs = _strides(source, source.points).get(buffer), _strides(target, target.points).get(buffer)
    if mine is None or theirs is None or not _same_count(source.points, target.points):
        return
    ordered = [_by_falling_stride(strides) for strides in (mine, theirs)]
    if ordered[0] is not None and ordered[1] is not None:
        yield _row_major(ordered[0], ordered[1])


def _by_falling_stride(strides: dict[Sym, Int | None]) -> tuple[Sym, ...] | None:
    if not all(isinstance(stride, int) for stride in strides.values()):
        return None
    return tuple(sorted(strides, key=lambda sym: strides[sym], reverse=True))  # type: ignore[arg-type, return-value]


def extents(nest: Nest) -> tuple[Int, Int]:
    """How many points a nest has, and over how many elements each reduces."""
    return prod(_size(s) for s in nest.points), prod(_size(s) for s in nest.reduced)


def _scans(nest: Nest) -> bool:
    return any(isinstance(n, Scan) for n in postorder(nest.roots))


def _same_count(a: tuple[Sym, ...], b: tuple[Sym, ...]) -> bool:
    """Whether one of the two numbers the elements of the other. Where there are none, shapes say nothing of each other."""
    count = prod(_size(s) for s in a)
    return count != 0 and count == prod(_size(s) for s in b)


def _size(sym: Sym) -> Int:
    assert sym.size is not None
    return sym.size


def _between(source: Nest, own: tuple[Sym, ...], target: Nest, other: tuple[Sym, ...]) -> Iterator[Mapping]:
    """Bijections from loops `own` onto loops `other`, whose sizes have equal products."""
    seen: list[Mapping] = []
    for candidate in (_by_strides(source, own, target, other), _row_major(loop_order(own), loop_order(other))):
        if candidate is not None and candidate not in seen:
            seen.append(candidate)
            yield candidate


def _row_major(ordered: tuple[Sym, ...], targets: tuple[Sym, ...]) -> Mapping:
    linear = ravel(tuple(symbol(s) for s in targets), tuple(_size(s) for s in targets))
    return dict(zip(ordered, unravel(linear, tuple(_size(s) for s in ordered)), strict=True))


def _by_strides(source: Nest, own: tuple[Sym, ...], target: Nest, other: tuple[Sym, ...]) -> Mapping | None:
    """Match loops one to one by size and by the strides with which they run through shared buffers."""
    if len(own) != len(other):
        return None
    mine, theirs = _strides(source, own), _strides(target, other)
    shared = [b for b in mine if b in theirs]
    free = list(loop_order(other))
    out: Mapping = {}
    for sym in loop_order(own):
        partners = [t for t in free if t.size == sym.size]
        if not partners:
            return None

        def agreement(t: Sym, sym: Sym = sym) -> int:
            return sum(mine[b][sym] == theirs[b][t] for b in shared)

        best = max(partners, key=agreement)  # the first of equals, so that order is kept
        free.remove(best)
        out[sym] = symbol(best)
    return out


def _strides(nest: Nest, loops: tuple[Sym, ...]) -> dict[str, dict[Sym, Int | None]]:
    """For every buffer the nest touches, the stride of its first access in each loop."""
    out: dict[str, dict[Sym, Int | None]] = {}
    accesses = [(s.buffer, s.index) for s in nest.stores] + [(n.buffer, n.index) for n in nest.loads()]
    for buffer, index in accesses:
        if buffer not in out:
            out[buffer] = {s: coefficient(index, s) for s in loops}
    return out


def division_count(nest: Nest) -> int:
    """How many accesses of `nest` need a division or modulo: a sign of a poor fit."""
    indices = [s.index for s in nest.stores] + [n.index for n in nest.loads()]
    return sum(map(_has_division, indices))


def _has_division(x: Int) -> bool:
    return isinstance(x, Expr) and any(isinstance(a, Atom) and a.kind in ("floordiv", "mod") for m, _ in x.terms for a in m)
