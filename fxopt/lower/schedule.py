"""Joining regions: which loop nests become one kernel.

Greedy: among all pairs that may be joined, the one that saves most bytes goes first, until none saves any. Two regions may
be joined when their domains can be made one (`align`), every value passed between them is used at the iteration that makes
it, and no third step must run between them.
"""

from __future__ import annotations

import heapq
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace

from fxopt.ir.exprs import Int, substitute
from fxopt.ir.loops import Load, Nest, Reduce, Scalar, Scan, Store, postorder, transform
from fxopt.ir.region import Alias, BufferSpec, Call, Ref, Region, Step
from fxopt.lower import cost
from fxopt.lower.align import Mapping, division_count, mappings
from fxopt.lower.lowering import Lowered
from fxopt.lower.online import one_pass
from fxopt.lower.values import cast

MAX_BUFFERS = 28
"""Pointers of one kernel; beyond it registers for addresses cost more than joining saves."""

MAX_NODES = 1200
"""Scalar operations of one kernel."""

MAX_DISTANCE = 96
"""Steps between two side-by-side regions; joining over a longer distance keeps too many buffers alive."""


def schedule(lowered: Lowered) -> Lowered:
    """The same computation in fewer, larger regions, in a valid order."""
    return _Scheduler(lowered).run()


@dataclass
class _Group:
    """A step, or what joined regions have become. `reads`/`writes` name base buffers (aliases looked through)."""

    step: Step
    position: int
    reads: frozenset[str]
    writes: frozenset[str]
    before: int = 0  # bit set of groups that must run earlier, transitively
    after: int = 0  # bit set of groups that must run later, transitively


class _Scheduler:
    def __init__(self, lowered: Lowered) -> None:
        self.lowered = lowered
        self.base = {s.name: s.of for s in lowered.steps if isinstance(s, Alias)}
        self.outputs = {self._root(o.name) for o in lowered.outputs if isinstance(o, Ref)}
        self.kept = self.outputs | set(lowered.inputs) | set(lowered.constants)
        self.groups: dict[int, _Group] = {}
        for k, step in enumerate(lowered.steps):
            reads, writes = self._accesses(step)
            self.groups[k] = _Group(step, k, reads, writes)
        self._link()
        self.readers: dict[str, set[int]] = {}
        for k, group in self.groups.items():
            for name in group.reads:
                self.readers.setdefault(name, set()).add(k)

    def run(self) -> Lowered:
        self._join_all()
        self._drop_dead_stores()
        steps = self._ordered()
        return replace(self.lowered, steps=steps)

    # ------------------------------------------------------------------ dependencies

    def _root(self, name: str) -> str:
        while name in self.base:
            name = self.base[name]
        return name

    def _accesses(self, step: Step) -> tuple[frozenset[str], frozenset[str]]:
        if isinstance(step, Region):
            return frozenset(step.nest.reads()), frozenset(step.nest.writes())
        if isinstance(step, Alias):
            return frozenset({self._root(step.of)}), frozenset({step.name})
        reads = set(_refs((step.args, step.kwargs)))
        writes = {n for n in step.outputs if n is not None} | set(step.writes)
        names = {self._root(n) for n in reads} | {n for n in reads if n in self.base}
        return frozenset(names), frozenset(writes)

    def _link(self) -> None:
        """Order constraints: read after write, write after read, write after write, and effects among themselves."""
        writer: dict[str, int] = {}
        readers: dict[str, set[int]] = {}
        effect = -1
        for k, group in self.groups.items():
            earlier = {writer[n] for n in group.reads | group.writes if n in writer}
            for name in group.writes:
                earlier |= readers.get(name, set())
            if isinstance(group.step, Call) and group.step.effect:
                earlier |= {effect} - {-1}
                effect = k
            for name in group.reads:
                readers.setdefault(name, set()).add(k)
            for name in group.writes:
                writer[name], readers[name] = k, set()
            for e in earlier - {k}:
                group.before |= self.groups[e].before | (1 << e)
        for k in reversed(self.groups):
            for e in _bits(self.groups[k].before):
                self.groups[e].after |= 1 << k

    # ------------------------------------------------------------------ joining

    def _join_all(self) -> None:
        heap: list[tuple[float, int, int]] = []
        for a, b in self._neighbours(self.groups):
            self._offer(heap, a, b)
        while heap:
            _, a, b = heapq.heappop(heap)
            if a in self.groups and b in self.groups and not self._separated(a, b):
                joined = self._join(a, b)
                if joined is not None:
                    for x, y in self._neighbours([joined]):
                        self._offer(heap, x, y)

    def _neighbours(self, of: Iterable[int]) -> Iterator[tuple[int, int]]:
        """Pairs of regions that touch a common buffer, the earlier (or upstream) one first."""
        touching: dict[str, list[int]] = {}
        for k, group in self.groups.items():
            if isinstance(group.step, Region):
                for name in group.reads | group.writes:
                    touching.setdefault(name, []).append(k)
        seen: set[tuple[int, int]] = set()
        for k in list(of):
            group = self.groups[k]
            if not isinstance(group.step, Region):
                continue
            for name in group.reads | group.writes:
                for other in touching[name]:
                    pair = self._in_order(k, other)
                    if other != k and pair not in seen:
                        seen.add(pair)
                        yield pair

    def _in_order(self, a: int, b: int) -> tuple[int, int]:
        if self.groups[a].before >> b & 1:
            return b, a
        if self.groups[b].before >> a & 1:
            return a, b
        return (a, b) if self.groups[a].position <= self.groups[b].position else (b, a)

    def _separated(self, a: int, b: int) -> bool:
        """True when some third step must run after `a` and before `b`."""
        return bool(self.groups[a].after & self.groups[b].before & ~(1 << a) & ~(1 << b))

    def _offer(self, heap: list[tuple[float, int, int]], a: int, b: int) -> None:
        first, second = self.groups[a], self.groups[b]
        if self._separated(a, b):
            return
        dependent = bool(second.before >> a & 1)
        if not dependent and abs(first.position - second.position) > MAX_DISTANCE:
            return
        saving = self._saving(first, second)
        if saving > 0:
            heapq.heappush(heap, (-saving, a, b))

    def _saving(self, first: _Group, second: _Group) -> float:
        """Bytes not moved if the two were one kernel: what both read, and what one writes for the other."""
        assert isinstance(first.step, Region) and isinstance(second.step, Region)
        buffers = self.lowered.buffers
        shared_reads = first.reads & second.reads
        passed = first.writes & second.reads
        saved = sum(cost.nbytes(buffers[n]) for n in shared_reads | passed)
        for name in passed:
            if name not in self.kept and self._sole_reader(name, second):
                saved += cost.nbytes(buffers[name])
        return saved

    def _sole_reader(self, name: str, reader: _Group) -> bool:
        return all(self.groups[k] is reader for k in self.readers.get(name, ()) if k in self.groups)

    def _join(self, a: int, b: int) -> int | None:
        first, second = self.groups[a], self.groups[b]
        assert isinstance(first.step, Region) and isinstance(second.step, Region)
        region = join(first.step, second.step)
        if region is None:
            return None
        self.lowered.buffers.update(region.buffers)
        new = max(self.groups) + 1
        merged = _Group(region, min(first.position, second.position), *self._accesses(region))
        merged.before = (first.before | second.before) & ~(1 << a) & ~(1 << b)
        merged.after = (first.after | second.after) & ~(1 << a) & ~(1 << b)
        del self.groups[a], self.groups[b]
        self.groups[new] = merged
        for name in merged.reads:
            self.readers.setdefault(name, set()).add(new)
        self._drop_unread(new, first.writes | second.writes)
        both = 1 << a | 1 << b
        for k, group in self.groups.items():
            if group.after & both or merged.before >> k & 1:
                group.after = (group.after & ~both) | 1 << new | merged.after
            if group.before & both or merged.after >> k & 1:
                group.before = (group.before & ~both) | 1 << new | merged.before
        return new

    def _drop_unread(self, k: int, candidates: frozenset[str]) -> None:
        """Remove stores of group `k` to buffers that nothing reads any more."""
        group = self.groups[k]
        assert isinstance(group.step, Region)
        dead = {n for n in candidates if n not in self.kept and not any(r in self.groups for r in self.readers.get(n, ()))}
        dead -= {n for n in dead if n in group.step.nest.reads()}
        stores = tuple(s for s in group.step.nest.stores if s.buffer not in dead)
        if stores and len(stores) < len(group.step.nest.stores):
            group.step = with_nest(group.step, replace(group.step.nest, stores=stores))
            group.reads, group.writes = self._accesses(group.step)

    def _drop_dead_stores(self) -> None:
        """Remove stores and whole steps whose results nobody uses, last first."""
        used = set(self.kept)
        for k in sorted(self.groups, key=lambda k: self.groups[k].before.bit_count(), reverse=True):
            group = self.groups[k]
            if isinstance(group.step, Region):
                stores = tuple(s for s in group.step.nest.stores if s.buffer in used)
                if not stores:
                    del self.groups[k]
                    continue
                if len(stores) < len(group.step.nest.stores):
                    group.step = with_nest(group.step, replace(group.step.nest, stores=stores))
                    group.reads, group.writes = self._accesses(group.step)
            elif isinstance(group.step, Alias) and group.step.name not in used and not self._is_output(group.step.name):
                del self.groups[k]
                continue
            used |= group.reads

    def _is_output(self, name: str) -> bool:
        return any(isinstance(o, Ref) and o.name == name for o in self.lowered.outputs)

    def _ordered(self) -> list[Step]:
        """A topological order that keeps to the original one where it can."""
        waiting = {k: g.before for k, g in self.groups.items()}
        present = sum(1 << k for k in self.groups)
        ready = [(g.position, k) for k, g in self.groups.items() if not g.before & present]
        heapq.heapify(ready)
        done, out = 0, []
        queued = {k for _, k in ready}
        while ready:
            _, k = heapq.heappop(ready)
            out.append(self.groups[k].step)
            done |= 1 << k
            for n in _bits(self.groups[k].after & present):
                if n not in queued and not waiting[n] & present & ~done:
                    queued.add(n)
                    heapq.heappush(ready, (self.groups[n].position, n))
        if len(out) != len(self.groups):
            raise AssertionError("the schedule has a cycle")
        return out


# ---------------------------------------------------------------------- joining two regions


def join(first: Region, second: Region) -> Region | None:
    """One region that does what `first` and then `second` does, or None when that is impossible or not worth it."""
    if first.device != second.device:
        return None
    if len({*first.buffers, *second.buffers}) > MAX_BUFFERS:
        return None
    best: tuple[int, Nest] | None = None
    for one, two in _common_domains(first.nest, second.nest):
        nest = _combine(one, two)
        if nest is not None and _worthwhile(nest, first):
            divisions = division_count(nest, {})
            if best is None or divisions < best[0]:
                best = divisions, nest
        if best is not None and best[0] == 0:
            break
    if best is None or best[0] > division_count(first.nest, {}) + division_count(second.nest, {}):
        return None
    nodes = tuple(dict.fromkeys(first.nodes + second.nodes))
    origins = tuple(dict.fromkeys(first.origins + second.origins))
    buffers = {**first.buffers, **second.buffers}
    return with_nest(Region(first.name, best[1], buffers, first.device, nodes, origins), best[1])


def with_nest(region: Region, nest: Nest) -> Region:
    """`region` with another nest, its buffers cut to what that touches."""
    names = dict.fromkeys((*nest.reads(), *nest.writes()))
    return replace(region, nest=nest, buffers={n: region.buffers[n] for n in names})


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


def remap(nest: Nest, mapping: Mapping, onto: Nest) -> Nest:
    """`nest` with its loops replaced by those of `onto`."""
    stores = []
    for s in nest.stores:
        # A Load carries index and bindings through a transformation; so does a store's address, in the shape of one.
        place = transform(Load(s.buffer, s.index, s.value.dtype, s.indirect), mapping)
        assert isinstance(place, Load)
        stores.append(Store(s.buffer, place.index, transform(s.value, mapping), s.mode, place.indirect))
    return Nest(onto.points, onto.reduced, tuple(stores))


def _combine(first: Nest, second: Nest) -> Nest | None:
    """The two nests as one, values passed between them in registers; None when a value is needed before its iteration made
    it.
    """
    made = {s.buffer: s for s in first.stores}
    for store in second.stores:
        if store.buffer in made:
            return None
    for load in second.loads():
        source = made.get(load.buffer)
        if source is not None and (source.index != load.index or source.mode != "set" or source.indirect or load.indirect):
            return None

    def passed(load: Load) -> Scalar | None:
        store = made.get(load.buffer)
        return None if store is None else cast(store.value, load.dtype)

    stores = []
    for s in second.stores:
        if any(v.symbols() and _loads_from(v, made) for _, v in s.indirect):
            return None
        place = transform(Load(s.buffer, s.index, s.value.dtype, s.indirect), {}, passed)
        assert isinstance(place, Load)
        stores.append(Store(s.buffer, place.index, transform(s.value, {}, passed), s.mode, place.indirect))
    nest = one_pass(Nest(first.points, first.reduced, (*first.stores, *stores)))
    return nest if _in_place_is_safe(nest) else None


def _loads_from(value: Scalar, buffers: dict[str, Store]) -> bool:
    return any(isinstance(n, Load) and n.buffer in buffers for n in postorder((value,)))


def _in_place_is_safe(nest: Nest) -> bool:
    """Every load of a buffer that the nest also writes is at the index written, and the write does not feed several
    iterations.
    """
    written: dict[str, tuple[Int, bool]] = {s.buffer: (s.index, bool(s.indirect) or s.mode != "set") for s in nest.stores}
    for load in nest.loads():
        if load.buffer in written:
            where, computed = written[load.buffer]
            if computed or load.indirect or substitute(load.index, {}) != where:
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
    spread = any(set(nest.reduced) & s.symbols() and _has_reduce(s.value) for s in nest.stores)
    return not waits and not spread


def _has_reduce(value: Scalar) -> bool:
    return any(isinstance(n, Reduce) for n in postorder((value,)))


def _refs(args: object) -> Iterator[str]:
    """Names of the tensors in a call's arguments."""
    if isinstance(args, Ref):
        yield args.name
    elif isinstance(args, (tuple, list)):
        for a in args:
            yield from _refs(a)
    elif isinstance(args, dict):
        yield from _refs(tuple(args.values()))


def _bits(mask: int) -> Iterator[int]:
    while mask:
        low = mask & -mask
        yield low.bit_length() - 1
        mask ^= low


def buffers_of(steps: Iterable[Step], known: dict[str, BufferSpec]) -> dict[str, BufferSpec]:
    """The specs of every buffer that `steps` touch."""
    names: dict[str, None] = {}
    for step in steps:
        if isinstance(step, Region):
            names.update(dict.fromkeys(step.buffers))
        elif isinstance(step, Call):
            names.update(dict.fromkeys((*_refs((step.args, step.kwargs)), *(n for n in step.outputs if n))))
        else:
            names[step.of] = None
    return {n: known[n] for n in names if n in known}
