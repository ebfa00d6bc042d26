"""Joining regions: which loop nests become one kernel.

Greedy: among all pairs that may be joined, the one that saves most bytes goes first, until none saves any. Two regions may
be joined when their domains can be made one (`align`), every value passed between them is used at the iteration that makes
it (`joining`), and no third step must run between them (`order`). What is stored between regions although it is cheaper to
compute again (`recompute`) then makes way for more joins. Row reductions take in the sums over their rows (`across`).
Launches alone are saved after that: many regions that do the same to buffers of their own become one batch (`batching`), and
what is left of small regions over equal domains is joined.
"""

from __future__ import annotations

import heapq
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace

from fxopt.ir.loops import Store, loads_below
from fxopt.ir.region import Alias, Batch, Call, Ref, Region, Step, base_of, refs
from fxopt.ir.rounding import unrounded
from fxopt.lower import batching, cost, recompute
from fxopt.lower.across import join_across, join_rows
from fxopt.lower.align import extents
from fxopt.lower.direction import alternate
from fxopt.lower.joining import in_parts, join, with_nests, with_stores
from fxopt.lower.lowering import Lowered
from fxopt.lower.online import with_weighted_sums
from fxopt.lower.order import Order
from fxopt.lower.row_terms import with_terms

MAX_DISTANCE = 96
"""Steps between two side-by-side regions; joining over a longer distance keeps too many buffers alive."""


LAUNCH_BYTES = {"cuda": 2 << 20, "cpu": 64 << 10}
"""Regions that move no more than this cost about their launch, by type of device."""

MOST_PARTS = 8
"""How many parts of a long domain one kernel goes over at once, beside a domain that is as long as a part."""

MOST_POINTS = 1 << 16
"""Points of that long domain: so few that it does not matter how many programs they are spread over."""

OPEN_GROUPS = 4
"""How many groups of small regions over one domain are tried for the next one: some are full, or it depends on them. The
same for batches."""

SCALAR_BYTES = 16
"""Reading no more than this twice is no reason to join regions that move more."""

HELD_BYTES = 4 << 10
"""Values of no more than this may be kept alive by a batch, however long it takes until all its regions can run."""


def schedule(lowered: Lowered, *, batch: bool = True, apart: frozenset[str] = frozenset()) -> Lowered:
    """The same computation in fewer, larger regions, in a valid order.

    `batch` allows Batch steps where there may be any; regions that hold an FX node named in `apart` are in none.
    """
    return _Scheduler(lowered).run(batch, apart)


@dataclass
class _Group:
    """A step, or what joined regions have become. `reads`/`writes` name base buffers (aliases looked through)."""

    step: Step
    position: int
    reads: frozenset[str]
    writes: frozenset[str]


class _Scheduler:
    def __init__(self, lowered: Lowered) -> None:
        self.lowered = lowered
        self.views = {s.name: s for s in lowered.steps if isinstance(s, Alias)}
        self.returned = {o.name for o in lowered.outputs if isinstance(o, Ref)}
        self.kept = {base_of(n, self.views) for n in self.returned} | set(lowered.inputs) | set(lowered.constants)
        self.nbytes = {name: cost.nbytes(spec) for name, spec in lowered.buffers.items()}
        self.groups: dict[int, _Group] = {}
        self.touching: dict[str, set[int]] = {}  # base buffer → the groups that read or write it
        self._arrange([_Group(step, k, *self._accesses(step)) for k, step in enumerate(lowered.steps)])

    def run(self, batch: bool, apart: frozenset[str]) -> Lowered:
        self._join_all()
        if self._recompute():
            self._join_all()
        self._move_terms()
        self._join_across()
        if batch:
            self._batch_all(apart)
        self._join_small()
        live = self._live(self.order.linear(lambda k: self.groups[k].position))
        return replace(self.lowered, steps=alternate(live, self.nbytes))

    def _arrange(self, groups: list[_Group]) -> None:
        """Take up `groups`, given in an order in which they may run, with only what their accesses demand of it."""
        self.groups, self.touching = dict(enumerate(groups)), {}
        self.order = Order(_constraints(groups))
        for k, group in self.groups.items():
            self._enter(k, group)

    # ------------------------------------------------------------------ which step touches what

    def _accesses(self, step: Step) -> tuple[frozenset[str], frozenset[str]]:
        if isinstance(step, Region | Batch):
            return frozenset(step.reads()), frozenset(step.writes())
        if isinstance(step, Alias):
            return frozenset({base_of(step.of, self.views)}), frozenset({step.name})
        assert isinstance(step, Call)  # other steps are made of a schedule
        reads = set(refs((step.args, step.kwargs)))
        writes = {n for n in step.outputs if n is not None} | set(step.writes)
        names = {base_of(n, self.views) for n in reads} | {n for n in reads if n in self.views}
        return frozenset(names), frozenset(writes)

    def _enter(self, k: int, group: _Group) -> None:
        for name in group.reads | group.writes:
            self.touching.setdefault(name, set()).add(k)

    def _leave(self, k: int) -> _Group:
        group = self.groups.pop(k)
        for name in group.reads | group.writes:
            self.touching[name].discard(k)
        return group

    def _readers(self, name: str) -> set[int]:
        return {k for k in self.touching.get(name, ()) if name in self.groups[k].reads}

    # ------------------------------------------------------------------ joining

    def _join_all(self) -> None:
        heap: list[tuple[float, int, int]] = []
        for k in self.groups:
            self._offer_neighbours(heap, k, (n for n in self._neighbours(k) if n > k))
        while heap:
            _, a, b = heapq.heappop(heap)
            if a in self.groups and b in self.groups and not self.order.are_separated(a, b):
                joined = self._join(a, b)
                if joined is not None:
                    self._offer_neighbours(heap, joined, self._neighbours(joined))

    def _recompute(self) -> bool:
        """Do without buffers between regions that are cheaper computed again in each reader; whether there were any."""
        gone: set[int] = set()
        changed = False
        for k in list(self.groups):
            step = self.groups[k].step
            for store in step.nest.stores if isinstance(step, Region) else ():
                readers = self._recomputed(k, store)
                for reader, region in readers.items():
                    self._replace(reader, region)
                if readers:
                    changed = True
                    gone |= self._drop(k, store.buffer)
        if changed:  # readers need no longer wait
            order = self.order.linear(lambda k: self.groups[k].position)
            self._arrange([self.groups[k] for k in order if k not in gone])
        return changed

    def _recomputed(self, k: int, store: Store) -> dict[int, Region]:
        """The readers of what `store`, of region `k`, stores, computing it themselves; empty where that saves nothing."""
        name, source, readers = store.buffer, self.groups[k], self._readers(store.buffer)
        assert isinstance(source.step, Region)
        device, nbytes = source.step.device, self.nbytes[store.buffer]
        alone = [n for n in self.touching[name] if name in self.groups[n].writes] == [k]
        if name in self.kept or not alone or k in readers or nbytes < LAUNCH_BYTES.get(device.type, 0):
            return {}
        needed = {load.buffer for load in loads_below(store.roots)}
        if not recompute.is_repeatable(store) or not all(self._is_final(n, k) for n in needed):
            return {}
        left = with_stores(source.step, set(source.step.writes()) - {name})
        saved: float = nbytes + sum(self.nbytes[n] for n in source.reads - set(left.reads() if left else ()))
        each = cost.recomputation(store.value, device) * nbytes / store.value.dtype.itemsize
        out: dict[int, Region] = {}
        for reader in readers:
            step = self.groups[reader].step
            region = None
            if isinstance(step, Region) and not needed & self.groups[reader].writes:
                region = recompute.with_value(step, store, source.step)
            if region is None:
                return {}
            out[reader] = region
            saved += nbytes - each - sum(self.nbytes[n] for n in needed - self.groups[reader].reads)
        return out if saved > 0 else {}

    def _is_final(self, name: str, k: int) -> bool:
        """Whether nothing writes buffer `name` but before region `k`."""
        writers = (n for n in self.touching[name] if name in self.groups[n].writes)
        return all(self.order.runs_before(n, k) for n in writers)

    def _replace(self, k: int, region: Region) -> None:
        position = self._leave(k).position
        self.groups[k] = _Group(region, position, *self._accesses(region))
        self._enter(k, self.groups[k])

    def _drop(self, k: int, name: str) -> set[int]:
        """Take the store to `name` from region `k`; {k} if that was all it did, and it touches nothing now."""
        group = self.groups[k]
        assert isinstance(group.step, Region)
        left = with_stores(group.step, set(group.step.writes()) - {name})
        if left is not None:
            self._replace(k, left)
            return set()
        self._leave(k)
        self.groups[k] = replace(group, reads=frozenset(), writes=frozenset())
        return {k}

    def _move_terms(self) -> None:
        """Leave what sums over all rows pick out of each to the row reductions that they follow."""
        for b in list(self.groups):
            total = self.groups[b].step
            if not isinstance(total, Region) or total.nest.points or not total.nest.reduced:
                continue
            for a in sorted(self._neighbours(b), key=lambda n: self.groups[n].position):
                rows = self.groups[a].step
                assert isinstance(rows, Region)
                found = with_terms(rows, total) if self.order.runs_before(a, b) else None
                more = set(found.rows.reads()) - self.groups[a].reads - set(rows.writes()) if found else set()
                if found is not None and all(self._is_final(n, a) for n in more):
                    self.lowered = replace(self.lowered, buffers=self.lowered.buffers | {s.name: s for s in found.terms})
                    self.nbytes |= {s.name: cost.nbytes(s) for s in found.terms}
                    self._replace(a, found.rows)
                    self._replace(b, found.total)
                    break

    def _join_across(self) -> None:
        """Join row reductions with sums over their rows, most bytes saved first, and then with each other."""
        offers = []
        for a, group in self.groups.items():
            if isinstance(group.step, Region) and group.step.nest.reduced:
                for b in self._neighbours(a):
                    saving = self._saving(*self._in_order(a, b))
                    if saving > 0 and not self.order.are_separated(a, b):
                        offers.append((-saving, a, b))
        for _, a, b in sorted(offers):
            if a in self.groups and b in self.groups and not self.order.are_separated(a, b):
                rows, columns = self.groups[a].step, self.groups[b].step
                assert isinstance(rows, Region) and isinstance(columns, Region)
                region = join_across(rows, columns, columns_first=self.order.runs_before(b, a))
                if region is not None:
                    self._join_rows(self._merge(a, b, region))

    def _join_rows(self, k: int) -> None:
        """Join region `k`, which has sums over its rows, with row reductions that read or write the same."""
        for n in sorted(self._neighbours(k), key=lambda n: self.groups[n].position):
            first, second = self._in_order(k, n)
            if self._saving(first, second) <= 0 or self.order.are_separated(first, second):
                continue
            one, two = self.groups[first].step, self.groups[second].step
            assert isinstance(one, Region) and isinstance(two, Region)
            region = join_rows(one, two)
            if region is not None:
                self._join_rows(self._merge(first, second, region))
                return

    def _join_small(self) -> None:
        """Join small regions that have nothing to do with each other: one launch instead of many."""
        opened: dict[object, list[int]] = {}
        for k in sorted(self.groups, key=lambda k: self.groups[k].position):
            step = self.groups[k].step
            if not isinstance(step, Region) or step.across or self._moved(step) > LAUNCH_BYTES.get(step.device.type, 0):
                continue
            same_domain = opened.setdefault((step.device, *extents(step.nest)), [])
            partner = next((p for p in same_domain[-OPEN_GROUPS:] if self._join_if_independent(p, k, same_domain)), None)
            if partner is None and not self._join_in_parts(k, step, opened):
                same_domain.append(k)

    def _join_in_parts(self, k: int, step: Region, opened: dict[object, list[int]]) -> bool:
        """Whether small region `k` could be joined with one whose domain is some times as long, or as short, as its own: as
        what is done to queries and, for heads that share them, to keys.
        """
        for groups in opened.values():
            for p in groups[-OPEN_GROUPS:]:
                other = self.groups[p].step
                assert isinstance(other, Region)
                cut = _cut_alike(other, step) if step.device.type == "cuda" and self._are_independent(p, k) else None
                region = None if cut is None else join(*cut)
                if region is not None:
                    groups.remove(p)
                    opened.setdefault((step.device, *extents(region.nest)), []).append(self._merge(p, k, region))
                    return True
        return False

    def _join_if_independent(self, a: int, b: int, groups: list[int]) -> bool:
        """Whether `a`, one of `groups`, and `b` could be joined; what they have become takes the place of `a`."""
        joined = self._join(a, b) if self._are_independent(a, b) else None
        if joined is not None:
            groups[groups.index(a)] = joined
        return joined is not None

    def _are_independent(self, a: int, b: int) -> bool:
        """Whether neither of two regions waits for the other, and little would for both."""
        if self.order.runs_before(a, b) or self.order.runs_before(b, a):
            return False
        one, two = self.groups[a], self.groups[b]
        far = abs(one.position - two.position) > MAX_DISTANCE
        # what waits for one of them may be large; results of the graph wait for nothing
        return not (far and any(self._readers(name) for name in one.writes | two.writes))

    # ------------------------------------------------------------------ batching

    def _batch_all(self, apart: frozenset[str]) -> None:
        """Make batches of regions of one form that do not wait for each other."""
        alike: dict[object, list[int]] = {}
        for k in sorted(self.groups, key=lambda k: self.groups[k].position):
            step = self.groups[k].step
            own = batching.form(step) if isinstance(step, Region) and apart.isdisjoint(step.nodes) else None
            if own is not None:
                alike.setdefault(own.key, []).append(k)
        for candidates in alike.values():
            if len(candidates) >= batching.FEWEST_MEMBERS:
                for members in self._independent(candidates):
                    self._batch(members)

    def _independent(self, candidates: Iterable[int]) -> list[list[int]]:
        """`candidates` in lists within which none waits for another, nor keeps much alive until the others can run."""
        opened: list[list[int]] = []
        bits: list[int] = []  # the members of each list as a bit set
        for k in candidates:
            related = self.order.related(k)
            for i in range(max(0, len(opened) - OPEN_GROUPS), len(opened)):
                if not related & bits[i] and self._may_wait(opened[i][0], k):
                    opened[i].append(k)
                    bits[i] |= 1 << k
                    break
            else:
                opened.append([k])
                bits.append(1 << k)
        return opened

    def _may_wait(self, first: int, k: int) -> bool:
        """Whether memory allows that region `k` runs together with `first`: no large value waits for it or in it, or both
        are near."""
        group = self.groups[k]
        read = sum(self.nbytes[n] for n in group.reads if n not in self.kept)
        waited_for = sum(self.nbytes[n] for n in group.writes if self._readers(n) - {k})
        if read + waited_for <= HELD_BYTES:
            return True
        assert isinstance(group.step, Region)
        near = group.position - self.groups[first].position <= MAX_DISTANCE
        return near and self._bytes(group.step) <= LAUNCH_BYTES.get(group.step.device.type, 0)

    def _batch(self, members: list[int]) -> None:
        """Make one step of `members`, if their forms allow a single batch; else of those that do."""
        by_region = {id(step): k for k in members if isinstance(step := self.groups[k].step, Region)}
        regions = [step for k in members if isinstance(step := self.groups[k].step, Region)]
        for step in batching.steps_of(regions[0].name, regions):
            if isinstance(step, Batch):
                joined = [by_region[id(region)] for region in step.members]
                position = min(self.groups[k].position for k in joined)
                for k in joined:
                    self._leave(k)
                group = _Group(step, position, *self._accesses(step))
                new = self.order.merge(*joined)
                self.groups[new] = group
                self._enter(new, group)

    def _bytes(self, region: Region) -> int:
        return sum(self.nbytes[name] for name in region.buffers)

    def _moved(self, region: Region) -> int:
        """Bytes that `region` reads and writes at most: of a table or a cache that it picks rows of, no more than these."""
        nest = region.nest
        domain = cost.extent(s.size for s in (*nest.points, *nest.reduced))
        accesses = Counter([*(load.buffer for load in nest.loads()), *(store.buffer for store in nest.stores)])
        return sum(min(self.nbytes[n], domain * c * region.buffers[n].dtype.itemsize) for n, c in accesses.items())

    def _neighbours(self, k: int) -> set[int]:
        """The other regions that touch a buffer which region `k` touches."""
        group = self.groups[k]
        if not isinstance(group.step, Region):
            return set()
        near = set().union(*(self.touching[name] for name in group.reads | group.writes))
        return {n for n in near if n != k and isinstance(self.groups[n].step, Region)}

    def _offer_neighbours(self, heap: list[tuple[float, int, int]], k: int, others: Iterable[int]) -> None:
        """Put the pairs that may be joined and save bytes on the heap, in the order in which they would run."""
        for other in others:
            a, b = self._in_order(k, other)
            if self.order.are_separated(a, b):
                continue
            distance = abs(self.groups[a].position - self.groups[b].position)
            if distance > MAX_DISTANCE and not self.order.runs_before(a, b):
                continue
            saving = self._saving(a, b)
            if saving > 0:
                heapq.heappush(heap, (-saving, a, b))

    def _in_order(self, a: int, b: int) -> tuple[int, int]:
        if self.order.runs_before(b, a):
            return b, a
        if self.order.runs_before(a, b):
            return a, b
        return (a, b) if self.groups[a].position <= self.groups[b].position else (b, a)

    def _saving(self, a: int, b: int) -> int:
        """Bytes not moved if the two were one kernel: what both read, and what one writes for the other."""
        first, second = self.groups[a], self.groups[b]
        passed = first.writes & second.reads
        saved = sum(self.nbytes[n] for n in first.reads & second.reads | passed)
        if not passed and self._is_trifle(saved, first.step, second.step):
            return 0  # a learning rate that is a tensor must not tie together what can be a batch
        return saved + sum(self.nbytes[n] for n in passed if n not in self.kept and self._readers(n) <= {b})

    def _is_trifle(self, nbytes: int, *steps: Step) -> bool:
        """Whether not reading `nbytes` twice is no reason to join `steps`, where batches save launches."""
        moved = max(self._bytes(s) for s in steps if isinstance(s, Region))
        batched = all(isinstance(s, Region) and s.device.type in batching.BATCHED_DEVICES for s in steps)
        return batched and nbytes <= SCALAR_BYTES and 2 * nbytes <= moved

    def _join(self, a: int, b: int) -> int | None:
        first, second = self.groups[a], self.groups[b]
        assert isinstance(first.step, Region) and isinstance(second.step, Region)
        region = join(first.step, second.step)
        if region is None:
            return None
        return self._merge(a, b, region)

    def _merge(self, a: int, b: int, region: Region) -> int:
        """`region` in the place of `a` and `b`; the number of its group."""
        position = min(self._leave(a).position, self._leave(b).position)
        region = self._without_unread(region)
        new = self.order.merge(a, b)
        group = _Group(region, position, *self._accesses(region))
        self.groups[new] = group
        self._enter(new, group)
        return new

    # ------------------------------------------------------------------ what nobody reads

    def _without_unread(self, region: Region) -> Region:
        """`region`, not among the groups now, without stores to buffers that nothing reads any more."""
        own = region.reads()
        read = {name for name in region.writes() if name in self.kept or name in own or self._readers(name)}
        return with_stores(region, read) or region

    def _live(self, order: list[int]) -> list[Step]:
        """The steps in `order` without stores and whole steps whose results nobody uses."""
        used, live = set(self.kept), []
        for k in reversed(order):
            for step in _used_part(self.groups[k].step, used):
                if isinstance(step, Alias) and step.name not in used | self.returned:
                    continue
                live.append(step)
                used |= self._accesses(step)[0]
        return live[::-1]


def _cut_alike(one: Region, two: Region) -> tuple[Region, Region] | None:
    """Two pointwise regions over domains of one size, the longer domain cut into parts of the shorter one's size; None where
    it is not a few of these."""
    if one.nest.reduced or two.nest.reduced:
        return None
    (short, _), (long, _) = (extents(r.nest) for r in (one, two))
    if not isinstance(short, int) or not isinstance(long, int) or not short or not long:
        return None
    turned = short > long
    short, long = sorted((short, long))
    if long > MOST_POINTS or long % short or not 1 < long // short <= MOST_PARTS:
        return None
    cut = in_parts(one if turned else two, long // short)
    if cut is None:
        return None
    return (cut, two) if turned else (one, cut)


def _used_part(step: Step, used: set[str]) -> Sequence[Step]:
    """What remains of `step` without stores to buffers that are not in `used`."""
    if isinstance(step, Region):
        wanted = with_stores(step, used)
        if wanted is None:
            return []
        step = _in_one_read(_without_roundings(wanted))
        return [step if step.across is None else replace(step, passed=frozenset(step.nest.writes()) - used)]
    if isinstance(step, Batch):
        members = [part for m in step.members for part in _used_part(m, used) if isinstance(part, Region)]
        same = all(a is b for a, b in zip(members, step.members, strict=False)) and len(members) == len(step.members)
        return [step] if same else batching.steps_of(step.name, members)
    return [step]


def _without_roundings(region: Region) -> Region:
    """`region` without roundings that its stores do anyway; whoever reads the value in a register still has it rounded."""
    nests = [replace(n, stores=tuple(replace(s, value=unrounded(s.value)) for s in n.stores)) for n in region.nests]
    return with_nests(region, nests[0], nests[1] if region.across else None) if tuple(nests) != region.nests else region


def _in_one_read(region: Region) -> Region:
    """`region` with what its loops over rows would read these again for, found on the way; on a CPU the cache has them."""
    if region.device.type != "cuda" or region.across is not None:
        return region
    nest = with_weighted_sums(region.nest)
    return region if nest is region.nest else with_nests(region, nest, None)


def _constraints(groups: list[_Group]) -> list[set[int]]:
    """The steps that each must follow: read after write, write after read, write after write, effects among themselves."""
    writer: dict[str, int] = {}
    readers: dict[str, set[int]] = {}
    effect: set[int] = set()
    out = []
    for k, group in enumerate(groups):
        earlier = {writer[n] for n in group.reads | group.writes if n in writer}
        earlier = earlier.union(*(readers.get(n, ()) for n in group.writes))
        if isinstance(group.step, Call) and group.step.effect:
            earlier, effect = earlier | effect, {k}
        for name in group.reads:
            readers.setdefault(name, set()).add(k)
        for name in group.writes:
            writer[name], readers[name] = k, set()
        out.append(earlier - {k})
    return out
