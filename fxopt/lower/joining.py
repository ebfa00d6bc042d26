"""Making one region of two: one iteration domain, values passed in registers, and whether that is worth it."""

from __future__ import annotations

from collections.abc import Collection, Container, Iterator
from dataclasses import replace

from fxopt.ir.exprs import Sym, add, coefficient, never_equal, symbol
from fxopt.ir.loops import (
    COMPARE,
    Load,
    Masked,
    Nest,
    Op,
    Reduce,
    Scalar,
    Scan,
    Store,
    holds_reduction,
    postorder,
    transform,
)
from fxopt.ir.region import Region
from fxopt.ir.rounding import rounded
from fxopt.lower import cost
from fxopt.lower.align import Mapping, division_count, mappings
from fxopt.lower.online import one_pass
from fxopt.lower.values import cast

MAX_BUFFERS = 28
"""Pointers of one kernel; beyond it registers for addresses cost more than joining saves."""

MAX_NODES = 1200
"""Scalar operations of one kernel."""


_CHOOSING = ("cast", "where", "maximum", "minimum")


def join(first: Region, second: Region) -> Region | None:
    """One region that does what `first` and then `second` does, or None when that is impossible or not worth it."""
    if first.device != second.device or first.across is not None or second.across is not None:
        return None
    if len({*first.buffers, *second.buffers}) > MAX_BUFFERS:
        return None
    best: tuple[int, Nest] | None = None
    for one, two in _common_domains(first.nest, second.nest):
        nest = None if _are_transposed(one, two) else combine(one, two)
        if nest is not None and _worthwhile(nest, first):
            divisions = division_count(nest)
            if best is None or divisions < best[0]:
                best = divisions, nest
        if best is not None and best[0] == 0:
            break
    if best is None or best[0] > division_count(first.nest) + division_count(second.nest):
        return None
    nodes = tuple(dict.fromkeys(first.nodes + second.nodes))
    origins = tuple(dict.fromkeys(first.origins + second.origins))
    buffers = {**first.buffers, **second.buffers}
    return with_nests(Region(first.name, best[1], buffers, first.device, nodes, origins), best[1], None)


def in_parts(region: Region, count: int) -> Region | None:
    """`region` over the first of `count` equal parts of its outermost axis, doing to each part what it does to the whole.
    None where it reduces, parts are not equal, or could get into each other's way.
    """
    nest = region.nest
    outer = nest.points[0] if nest.points else None
    if nest.reduced or region.across is not None or outer is None or not isinstance(outer.size, int) or outer.size % count:
        return None
    if set(region.reads()) & set(region.writes()) or any(s.mode != "set" for s in nest.stores):
        return None
    size = outer.size // count
    part = Sym(outer.name, size=size)
    begins = (add(symbol(part), size * n) for n in range(count))
    stores = tuple(s.transformed({outer: begin}) for begin in begins for s in nest.stores)
    return with_nests(region, Nest((part, *nest.points[1:]), (), stores), None)


def with_nests(region: Region, nest: Nest, across: Nest | None) -> Region:
    """`region` with other nests, its buffers cut to what they touch."""
    new = replace(region, nest=nest, across=across)
    return replace(new, buffers={n: region.buffers[n] for n in dict.fromkeys((*new.reads(), *new.writes()))})


def with_stores(region: Region, used: Collection[str]) -> Region | None:
    """`region` with only its stores to buffers in `used`; None if there are none."""
    across = None if region.across is None else _filtered(region.across, used)
    nest = _filtered(region.nest, used if across is None else {*used, *across.reads()})
    if nest is None:
        return None if across is None else with_nests(region, across, None)
    unchanged = nest is region.nest and across is region.across
    return region if unchanged else with_nests(region, nest, across)


def _filtered(nest: Nest, used: Collection[str]) -> Nest | None:
    stores = tuple(s for s in nest.stores if s.buffer in used)
    if len(stores) == len(nest.stores):
        return nest
    return replace(nest, stores=stores) if stores else None


def _common_domains(first: Nest, second: Nest) -> Iterator[tuple[Nest, Nest]]:
    """Both nests over one domain, in every way `align` knows; only loops of nests without reduction are bent."""
    if (first.points, first.reduced) == (second.points, second.reduced):
        yield first, second
    if not second.reduced or first.reduced:
        for mapping in mappings(second, first):
            yield first, remap(second, mapping, first)
    if not first.reduced or second.reduced:
        for mapping in mappings(first, second):
            yield remap(first, mapping, second), second


def _are_transposed(one: Nest, two: Nest) -> bool:
    """One nest reduces a buffer along memory, the other across it, which a square lets happen in one domain: every other
    access would be strided, and nothing is read once for both.
    """
    if not one.reduced:
        return False
    mine, theirs = _directions(one), _directions(two)
    return any(mine[b] and theirs[b] and mine[b].isdisjoint(theirs[b]) for b in mine.keys() & theirs.keys())


def _directions(nest: Nest) -> dict[str, set[bool]]:
    """For each buffer loaded element by element: whether memory runs along the reduced axes (True), the points (False)."""
    points, reduced = frozenset(nest.points), frozenset(nest.reduced)
    out: dict[str, set[bool]] = {}
    for load in nest.loads():
        own = load.symbols()
        if points & own and reduced & own:
            unit = [s in reduced for s in points | reduced if coefficient(load.index, s) == 1]
            out.setdefault(load.buffer, set()).update(unit)
    return out


def remap(nest: Nest, mapping: Mapping, onto: Nest) -> Nest:
    """`nest` with its loops replaced by those of `onto`."""
    return Nest(onto.points, onto.reduced, tuple(s.transformed(mapping) for s in nest.stores))


def combine(first: Nest, second: Nest) -> Nest | None:
    """The two nests, over one domain, as one, values passed between them in registers; None when a value is needed before
    its iteration made it.
    """
    if not all(_are_apart(a, b) for a in first.stores for b in second.stores if a.buffer == b.buffer):
        return None
    made: dict[str, list[Store]] = {}
    for store in first.stores:
        made.setdefault(store.buffer, []).append(store)
    for load in second.loads():
        sources = made.get(load.buffer, ())
        if any(s.index != load.index or s.mode != "set" or s.indirect or load.indirect for s in sources):
            return None

    exact = compared(second.roots)

    def passed(load: Load) -> Scalar | None:
        sources = made.get(load.buffer)
        return None if sources is None else in_register(sources[0].value, load, exact)

    stores = []
    for s in second.stores:
        if any(v.symbols() and _loads_from(v, made) for _, v in s.indirect):
            return None
        stores.append(s.transformed({}, lambda v: transform(v, {}, passed)))
    nest = one_pass(Nest(first.points, first.reduced, (*first.stores, *stores)))
    return nest if _in_place_is_safe(nest) else None


def compared(roots: tuple[Scalar, ...]) -> set[Load]:
    """The loads of which `roots` ask whether they, or what is chosen among them, are equal to something or larger."""
    asked = list[Scalar]()
    for node in postorder(roots):
        if (isinstance(node, Op) and node.name in COMPARE) or (
            isinstance(node, Reduce) and node.kind in ("argmax", "argmin")
        ):
            asked += node.args if isinstance(node, Op) else node.operands
    found, seen = set[Load](), set[Scalar]()
    while asked:
        if (node := asked.pop()) in seen:
            continue
        seen.add(node)
        if isinstance(node, Load):
            found.add(node)
        elif isinstance(node, Masked):
            asked += (node.body, node.other)
        elif isinstance(node, Op) and node.name in _CHOOSING:
            asked += node.args
    return found


def in_register(value: Scalar, load: Load, exact: Container[Load]) -> Scalar:
    """`value` in the place of `load`, which read it from memory; as it was there if `load` is in `exact` (`compared`)."""
    made = cast(value, load.dtype)
    return rounded(made) if load in exact else made


def _are_apart(a: Store, b: Store) -> bool:
    """Whether two stores into one buffer never meet in an element, as those of the parts of a cat."""
    return (a.mode, b.mode) == ("set", "set") and not a.indirect and not b.indirect and never_equal(a.index, b.index)


def _loads_from(value: Scalar, buffers: Container[str]) -> bool:
    return any(isinstance(n, Load) and n.buffer in buffers for n in postorder((value,)))


def _in_place_is_safe(nest: Nest) -> bool:
    """Every load of a buffer that the nest also writes is at the index written, and the write does not feed several
    iterations.
    """
    written: dict[str, list[Store]] = {}
    for store in nest.stores:
        written.setdefault(store.buffer, []).append(store)
    for load in nest.loads():
        stores = written.get(load.buffer, ())
        if any(s.indirect or s.mode != "set" for s in stores) or (stores and load.indirect):
            return False
        if stores and load.index not in [s.index for s in stores]:
            return False
    return True


def _worthwhile(nest: Nest, first: Region) -> bool:
    """False for joins that would cost parallelism or registers more than they save in traffic."""
    nodes = list(postorder(nest.roots))
    if len(nodes) > MAX_NODES:
        return False
    if not nest.reduced:
        return True
    points = cost.extent(s.size for s in nest.points)
    length = cost.extent(s.size for s in nest.reduced)
    if not cost.needs_split(points, length, first.device):
        return True
    # Few long rows are reduced by many blocks at once: nothing in such a kernel may wait for a finished reduction row by
    # row.
    waits = any(isinstance(a, Reduce) for n in nodes if isinstance(n, (Reduce, Scan)) for a in postorder(n.args))
    spread = any(set(nest.reduced) & s.symbols() and holds_reduction(s.value) for s in nest.stores)
    return not waits and not spread
