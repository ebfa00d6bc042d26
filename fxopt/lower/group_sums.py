"""Row sums, their sums over groups of rows, and what is made of both for every element: as one kernel beside three.

The gradient of a group norm's input needs two sums of its whole group, which are sums over the group's channels of what the
gradients of weight and bias need of each channel. Apart, a kernel sums over each channel's places, another over the channels
of each group, and a third reads again what the first has read. A kernel whose programs hold whole groups reads it once.
Which is faster is measured, after the values of both have been compared.

The one kernel is a nest over (groups, rows of a group) in which a sum over a group is a `Reduce` over a symbol of its own,
whose operand is the value at another row of the group: `codegen/triton_groups.py` prints that as a sum over a part of the
tile.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

from fxopt.ir.exprs import Int, Sym, coefficient, substitute, symbol
from fxopt.ir.loops import Load, Nest, Reduce, Scalar, Store, loads_below, postorder, transform
from fxopt.ir.region import Alternatives, BufferSpec, Region, Step, Way
from fxopt.ir.rounding import rounded
from fxopt.lower import align, cost
from fxopt.lower.align import extents, mappings
from fxopt.lower.joining import MAX_BUFFERS, MAX_NODES, with_nests
from fxopt.lower.lowering import Lowered
from fxopt.lower.uses import Uses
from fxopt.lower.values import cast

NAME = "group-sums"
"""What `Options.disable` calls them."""

APART, TOGETHER = "group sums apart", "groups in one kernel"
LARGEST_GROUP = 16384
"""Elements that a program holds in registers, of each operand."""

LEAST_BYTES = 1 << 20
"""Of the operands: what is smaller is bound by its launches, of which a graph has few anyway."""


@dataclass(frozen=True)
class _Domain:
    """Loops of the one kernel: `points` number the groups, `member` a group's rows, `along` a row's elements; `bound` is the
    member of a sum over a group."""

    points: tuple[Sym, ...]
    member: Sym
    along: tuple[Sym, ...]
    bound: Sym

    def nest(self, stores: Sequence[Store]) -> Nest:
        return Nest((*self.points, self.member), self.along, tuple(stores))


class _Three(NamedTuple):
    """What sums over `rows`, over `groups` of those sums, and what reads both for all `elements`."""

    rows: Region
    groups: Region
    elements: Region


def with_group_sums(lowered: Lowered) -> Lowered:
    """`lowered`, already scheduled, with both ways in the place of each three such regions on a GPU."""
    uses = Uses(lowered)
    taken: dict[int, Alternatives | None] = {}
    for middle, step in enumerate(lowered.steps):
        parts = _parts(uses, middle) if isinstance(step, Region) and step.device.type == "cuda" else None
        if parts is None or not taken.keys().isdisjoint(parts):
            continue
        regions = _Three(*(r for k in parts if isinstance(r := lowered.steps[k], Region)))
        region = _together(regions, _read_elsewhere(uses, parts))
        if region is not None:
            ways = (Way(APART, tuple(regions)), Way(TOGETHER, (region,)))
            found = Alternatives(f"{region.name}.ways", ways, _merged(r.buffers for r in regions))
            taken |= {parts[0]: found, parts[1]: None, parts[2]: None}
    steps = [taken.get(k, step) for k, step in enumerate(lowered.steps)]
    return replace(lowered, steps=[step for step in steps if step is not None])


def _merged(all_buffers: Iterable[dict[str, BufferSpec]]) -> dict[str, BufferSpec]:
    return {name: spec for buffers in all_buffers for name, spec in buffers.items()}


def _parts(uses: Uses, middle: int) -> tuple[int, int, int] | None:
    """The numbers of (row sums, region `middle` that sums over groups of them, what reads both sums for each element), where
    all three may run in the place of the first."""
    step = uses.steps[middle]
    assert isinstance(step, Region)
    if not step.nest.reduced or step.across is not None:
        return None
    makers = [k for k in range(middle) if set(uses.writes(k)) & set(step.reads()) and _is_row_sums(uses.steps[k])]
    readers = {k for name in step.writes() for k in uses.readers.get(name, ())}
    if len(makers) != 1 or len(readers) != 1:
        return None
    (first,), (last,) = makers, readers
    if last <= middle or not isinstance(uses.steps[last], Region):
        return None
    parts = first, middle, last
    others = [k for k in range(first + 1, last) if k != middle]
    moved_reads, moved_writes = (set(found(middle)) | set(found(last)) for found in (uses.reads, uses.writes))
    if any(uses.writes(k) & (moved_reads | moved_writes) or uses.reads(k) & moved_writes for k in others):
        return None
    return parts


def _is_row_sums(step: Step) -> bool:
    """Whether a region stores only what it reduces to, one value for each row."""
    if not isinstance(step, Region) or step.across is not None or len(step.nest.reduced) == 0:
        return False
    reduced = frozenset(step.nest.reduced)
    return all(s.mode == "set" and not s.indirect and not reduced & s.symbols() for s in step.nest.stores)


def _read_elsewhere(uses: Uses, parts: tuple[int, int, int]) -> frozenset[str]:
    return frozenset(n for n in uses.writes(parts[0]) if set(uses.readers.get(n, ())) - set(parts))


def _together(regions: _Three, kept: frozenset[str]) -> Region | None:
    """All three as one region that also stores those of the row sums that are `kept`; None where that is impossible or saves
    nothing."""
    rows, groups, elements = regions
    if elements.nest.reduced or elements.across is not None or len({r.device for r in regions}) > 1:
        return None
    shared = (set(rows.reads()) & set(elements.reads())) - {*rows.writes(), *groups.writes()}
    domain = _domain(rows.nest, groups.nest)
    if domain is None or sum(cost.nbytes(rows.buffers[n]) for n in shared) < LEAST_BYTES:
        return None
    sums = _row_sums(rows.nest, groups.nest, domain)
    totals = None if sums is None else _totals(groups.nest, domain, sums)
    stores = None if sums is None or totals is None else _element_stores(elements.nest, domain, {**sums, **totals})
    if sums is None or stores is None:
        return None
    nest = domain.nest((*(s for n, s in sums.items() if n in kept), *stores))
    nodes = tuple(dict.fromkeys(n for r in regions for n in r.nodes))
    origins = tuple(dict.fromkeys(o for r in regions for o in r.origins))
    whole = replace(
        rows, name=f"{rows.name}.groups", nodes=nodes, origins=origins, buffers=_merged(r.buffers for r in regions)
    )
    region = with_nests(whole, nest, None)
    fits = len(region.buffers) <= MAX_BUFFERS and len(list(postorder(nest.roots))) <= MAX_NODES
    fastest = domain.along[-1]
    if any(coefficient(n.index, fastest) != 1 for n in nest.loads() if n.buffer in shared and fastest in n.symbols()):
        return None  # a group of channels that lie side by side in memory is a few bytes of every place
    return region if fits and not set(region.reads()) & set(region.writes()) else None


def _domain(rows: Nest, groups: Nest) -> _Domain | None:
    """The common domain, if a group is a power of two of rows and small enough to be held."""
    if len(groups.reduced) != 1:
        return None
    (count, length), (number, members) = extents(rows), extents(groups)
    if not all(isinstance(n, int) for n in (count, length, number, members)) or number * members != count:
        return None
    assert isinstance(members, int) and isinstance(length, int)
    if members < 2 or members & (members - 1) or members * length > LARGEST_GROUP:
        return None
    free = max(int(s.name[1:]) for s in (*groups.points, *groups.reduced)) + 1
    along = tuple(Sym(f"r{free + 2 + k}", size=s.size) for k, s in enumerate(rows.reduced))
    return _Domain(groups.points, Sym(f"x{free}", size=members), along, Sym(f"r{free + 1}", size=members))


def _row_sums(rows: Nest, groups: Nest, domain: _Domain) -> dict[str, Store] | None:
    """The stores of `rows` by buffer, over `domain`, where `groups` reads each at the row that it sums over."""
    own: align.Mapping = {s: symbol(t) for s, t in zip(rows.reduced, domain.along, strict=True)}
    at_member: align.Mapping = {groups.reduced[0]: symbol(domain.member)}
    made = set(rows.writes())
    if len(made) != len(rows.stores):
        return None
    wanted = {n.buffer: set[Int]() for n in groups.loads() if n.buffer in made}
    for load in groups.loads():
        if load.buffer in made:
            wanted[load.buffer].add(substitute(load.index, at_member))
    whole = Nest((*groups.points, domain.member), (), tuple(s.transformed(at_member) for s in _flat(groups)))
    for mapping in mappings(Nest(rows.points, (), rows.stores), whole):
        placed = {s.buffer: s.transformed({**mapping, **own}) for s in rows.stores}
        if all(indices == {placed[name].index} for name, indices in wanted.items()):
            return placed
    return None


def _flat(groups: Nest) -> tuple[Store, ...]:
    """Stores that read what `groups` reads, element by element: by them it is seen which loops go together."""
    return tuple(Store(load.buffer, load.index, load) for load in groups.loads() if not load.indirect)


def _totals(groups: Nest, domain: _Domain, sums: Mapping[str, Store]) -> dict[str, Store] | None:
    """The stores of `groups` by buffer, the row sums that they add up computed where they are wanted."""
    to_bound: align.Mapping = {groups.reduced[0]: symbol(domain.bound)}

    def computed(load: Load) -> Scalar | None:
        made = sums.get(load.buffer)
        if made is None:
            return None
        return cast(transform(rounded(made.value), {domain.member: symbol(domain.bound)}), load.dtype)

    out = {}
    for store in groups.stores:
        if store.mode != "set" or store.indirect or groups.reduced[0] in store.symbols() or store.buffer in out:
            return None
        if any(isinstance(n, Reduce) and n.kind != "sum" for n in postorder(store.roots)):
            return None
        out[store.buffer] = replace(store, value=transform(store.value, to_bound, computed))
    return out


def _element_stores(elements: Nest, domain: _Domain, made: Mapping[str, Store]) -> tuple[Store, ...] | None:
    """The stores of `elements` over `domain`, where it reads what is `made` for the row and group of its element."""
    if any(s.mode != "set" or s.indirect for s in elements.stores):
        return None

    def passed(load: Load) -> Scalar | None:
        return cast(rounded(made[load.buffer].value), load.dtype) if load.buffer in made else None

    for mapping in mappings(elements, domain.nest(tuple(made.values()))):
        stores = tuple(s.transformed(mapping) for s in elements.stores)
        loads = [n for s in stores for n in loads_below(s.roots) if n.buffer in made]
        if all(n.index == made[n.buffer].index and not n.indirect for n in loads):
            return tuple(s.transformed({}, lambda v: transform(v, {}, passed)) for s in stores)
    return None
