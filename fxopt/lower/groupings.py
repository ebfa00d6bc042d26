"""Two groupings of the same values where the scheduler's estimate cannot tell which is faster: the tuner measures both.

A value that several kernels need is stored by one or computed in each. Which is faster is a question of bytes, which the
estimate counts, and of what computing costs beside them, which it guesses: in a kernel that waits for memory arithmetic may
be free, and the L2 cache has a part of what was touched just now. So where the estimates of both are within `MARGIN`, both
are lowered. Found are, in a schedule,

- a buffer between kernels that each reader might compute (`recompute.with_value`);
- a value that two kernels compute, which the first might store (`shared_values`);
- a kernel that walks again over rows too long to be held, and computes from several operands what it has computed for its
  sums: it might be two, of which the second reads what the first has stored (`row_passes`).

The first way is always what the scheduler has made. Nothing moves: a region of the other way runs in the place of the one
whose name it has, so that a grouping may span other steps. It may not keep more memory alive over these.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial

from fxopt.ir.loops import Scalar, Store, loads_below, postorder
from fxopt.ir.region import Alias, Alternatives, BufferSpec, Region, Step, Way
from fxopt.lower import cost, recompute
from fxopt.lower.align import extents
from fxopt.lower.direction import alternate
from fxopt.lower.joining import with_stores
from fxopt.lower.lowering import Lowered
from fxopt.lower.row_passes import computes_again, in_two
from fxopt.lower.schedule import LAUNCH_BYTES
from fxopt.lower.shared_values import Shared, shared_values, stored_once
from fxopt.lower.uses import OUTSIDE, Uses

NAME = "groupings"
"""What `Options.disable` calls them."""

MARGIN = 0.2
"""By which part the other grouping may be estimated to be slower than the scheduler's."""

STORED, AGAIN, BOTH, WHOLE, IN_TWO = (
    "stored by the first",
    "computed in each",
    "computed in both",
    "row in one kernel",
    "row stored between two kernels",
)
"""Labels of ways."""

MOST_DIFFERENT = {"default": 4, "max-autotune": 16}
"""How many groupings of a graph are measured, those first that by the estimate save most; equal ones count once."""


@dataclass(frozen=True)
class _Found:
    """A grouping, what its other way saves by the estimate, in bytes, and the buffers that this alone has."""

    grouping: Alternatives
    saved: float
    more: tuple[BufferSpec, ...] = ()


@dataclass(frozen=True, eq=False)
class _Seam:
    """Where there may be a grouping of the steps `parts`, which `build` makes. Equal layers have seams of one `kind`."""

    kind: object
    parts: tuple[int, ...]
    build: Callable[[], _Found | None]


def with_groupings(lowered: Lowered, mode: str = "default") -> Lowered:
    """`lowered`, already scheduled, with the groupings of its regions on GPUs that are worth measuring."""
    alike: dict[object, list[_Seam]] = {}
    for seam in _Seams(lowered).seams():
        alike.setdefault(seam.kind, []).append(seam)
    built: dict[_Seam, _Found | None] = {}
    saved: dict[object, float] = {}
    for kind, seams in alike.items():
        for seam in dict.fromkeys((seams[0], seams[-1])):  # the first layer may be unlike the others, and so may the last
            found = built[seam] = seam.build()
            if found is not None:
                saved[kind] = max(found.saved, saved.get(kind, found.saved))
                break
    kept: dict[tuple[int, ...], _Found] = {}
    taken: set[int] = set()
    different = 0
    for kind in sorted(saved, key=lambda kind: -saved[kind]):
        before = len(kept)
        for seam in alike[kind] if different < MOST_DIFFERENT.get(mode, MOST_DIFFERENT["default"]) else ():
            found = None
            if taken.isdisjoint(seam.parts):
                found = built[seam] if seam in built else seam.build()
            if found is not None:
                kept[seam.parts] = found
                taken |= set(seam.parts)
        different += len(kept) > before
    if not kept:
        return lowered
    buffers = {spec.name: spec for found in kept.values() for spec in found.more}
    groupings = tuple(kept[parts].grouping for parts in sorted(kept))
    return replace(lowered, groupings=groupings, buffers=lowered.buffers | buffers)


def regrouped(lowered: Lowered, ways: dict[str, Way]) -> Lowered:
    """`lowered` with its groupings settled: for each the way in `ways` by name, else its first."""
    place: dict[str, list[Step]] = {}
    for grouping in lowered.groupings:
        way = ways.get(grouping.name, grouping.ways[0])
        names = grouping.ways[0].names
        place |= {name: [] for name in names}
        before: list[Step] = []
        for step in way.steps:
            assert isinstance(step, Region)
            before.append(step)
            if step.name in names:
                place[step.name], before = before, []
    steps = [new for step in lowered.steps for new in (place.get(step.name, [step]) if isinstance(step, Region) else [step])]
    return replace(lowered, steps=steps, groupings=())


class _Seams:
    """Where a schedule might be grouped in another way."""

    def __init__(self, lowered: Lowered) -> None:
        self.uses = Uses(lowered)
        self.nbytes = {name: cost.nbytes(spec) for name, spec in lowered.buffers.items()}
        self.large = {name for name, size in self.nbytes.items() if size >= LAUNCH_BYTES["cuda"]}
        self.expensive: dict[int, bool] = {}
        self.walked: dict[object, bool] = {}
        self.shapes: dict[int, object] = {}
        self.writers: dict[str, list[int]] = {}
        for k in range(len(lowered.steps)):
            for name in self.uses.writes(k):
                self.writers.setdefault(name, []).append(k)

    def seams(self) -> Iterator[_Seam]:
        """Everywhere that another grouping may be as fast as the schedule's."""
        for k in range(len(self.uses.steps)):
            if (region := self._region(k)) is not None:
                yield from self._computed_again(k, region)
                yield from self._stored_between(k, region)
                if self._is_walked_again(k, region):
                    yield _Seam((WHOLE, self._shape(k)), (k,), partial(self._row_in_two, region))

    def _shape(self, k: int) -> object:
        """Equal for the regions of equal layers."""
        if k not in self.shapes:
            region = self.uses.steps[k]
            assert isinstance(region, Region)
            layouts = tuple((spec.dtype, spec.shape, spec.strides) for spec in region.buffers.values())
            self.shapes[k] = (extents(region.nest), len(region.nest.loads()), len(region.nest.stores), layouts)
        return self.shapes[k]

    def _region(self, k: int) -> Region | None:
        """Step k, if it is a region that may be grouped: not one that picks elements by an index, of which made-up data say
        little."""
        step = self.uses.steps[k]
        if not isinstance(step, Region) or step.device.type != "cuda" or step.across is not None:
            return None
        loads, stores = (any(n.indirect for n in step.nest.loads()), any(s.indirect for s in step.nest.stores))
        return None if loads or stores else step

    # ------------------------------------------------------------------ a buffer that each reader might compute

    def _computed_again(self, k: int, source: Region) -> Iterator[_Seam]:
        for number, store in enumerate(source.nest.stores):
            name, readers = store.buffer, sorted(set(self.uses.readers.get(store.buffer, ())))
            if name not in self.large or self.writers[name] != [k] or not readers or readers[0] <= k:
                continue
            regions = [self._region(r) for r in readers]
            if all(region is not None for region in regions) and recompute.is_repeatable(store):
                kind = (STORED, number, *map(self._shape, (k, *readers)))
                yield _Seam(kind, (k, *readers), partial(self._read_or_computed, k, readers, store))

    def _read_or_computed(self, k: int, readers: Sequence[int], store: Store) -> _Found | None:
        source, *regions = (region for n in (k, *readers) if (region := self._region(n)) is not None)
        needed = {load.buffer for load in loads_below(store.roots)}
        if not self._is_left_alone(needed, k, readers[-1]):
            return None
        held = (n for n in needed if max(self.uses.readers[n]) < readers[-1] and OUTSIDE not in self.uses.readers[n])
        if self._spans(k, readers[-1]) and self._bytes(held) > self.nbytes[store.buffer]:
            return None
        left = with_stores(source, set(source.writes()) - {store.buffer})
        again = [recompute.with_value(region, store, source) for region in regions]
        new = [region for region in (left, *again) if region is not None]
        if any(region is None for region in again):
            return None
        more = self._arithmetic(store.value, source, len(again) - (left is None))
        return self._grouping(Way(STORED, (source, *regions)), Way(AGAIN, tuple(new)), more)

    # ------------------------------------------------------------------ a value that two kernels compute

    def _stored_between(self, k: int, first: Region) -> Iterator[_Seam]:
        """Of two regions that read several large operands, or one, if both do something expensive."""
        common = Counter(n for name in first.reads() if name in self.large for n in set(self.uses.readers.get(name, ())))
        for n, count in sorted(common.items()):
            if n > k and (second := self._region(n)) is not None and (count > 1 or self._is_expensive(k, n)):
                build = partial(self._computed_or_stored, k, first, n, second)
                yield _Seam((BOTH, self._shape(k), self._shape(n)), (k, n), build)

    def _computed_or_stored(self, k: int, first: Region, n: int, second: Region) -> _Found | None:
        return _best(self._stored(k, first, n, second, shared) for shared in shared_values(first, second))

    def _stored(self, k: int, first: Region, n: int, second: Region, shared: Shared) -> _Found | None:
        needed = {load.buffer for load in loads_below((shared.own,))}
        both = stored_once(first, second, shared, f"{first.name}.shared")
        if both is None or not self._is_left_alone(needed, k, n) or not self._is_left_alone([both.name], k + 1, n):
            return None
        freed = (name for name in set(second.reads()) - set(both.second.reads()) if self._is_freed(name, k, n))
        new = [] if both.spec is None else [both.spec]
        if self._spans(k, n) and sum(map(cost.nbytes, new)) > self._bytes(freed):
            return None
        saved = self._arithmetic(shared.own, first, 1)
        return self._grouping(Way(BOTH, (first, second)), Way(STORED, (both.first, both.second)), -saved, *new)

    def _is_expensive(self, *steps: int) -> bool:
        """Whether all these steps are regions that compute something expensive."""
        for k in set(steps) - self.expensive.keys():
            region = self._region(k)
            self.expensive[k] = region is not None and cost.is_expensive(postorder(region.nest.roots))
        return all(self.expensive[k] for k in steps)

    # ------------------------------------------------------------------ a row that is walked over again

    def _is_walked_again(self, k: int, region: Region) -> bool:
        several = len(self.large.intersection(region.reads())) > 1 or (region.nest.reduced and self._is_expensive(k))
        if not several or not cost.is_walked_again(region.nest):
            return False
        shape = self._shape(k)
        if shape not in self.walked:
            self.walked[shape] = computes_again(region)
        return self.walked[shape]

    def _row_in_two(self, region: Region) -> _Found | None:
        halves = in_two(region)
        if halves is None:
            return None
        return _best(self._halves(region, *halves, shared) for shared in shared_values(*halves))

    def _halves(self, region: Region, first: Region, second: Region, shared: Shared) -> _Found | None:
        both = stored_once(first, second, shared, f"{region.name}.shared")
        if both is None:
            return None
        two = both.first, both.second
        new = [s for half in two for s in half.buffers.values() if s.name not in region.buffers]
        sizes = self.nbytes | {spec.name: cost.nbytes(spec) for spec in new}
        turning = tuple(half for half in alternate(two, sizes) if isinstance(half, Region))
        saved = self._arithmetic(shared.own, region, 1)
        return self._grouping(Way(WHOLE, (region,)), Way(IN_TWO, turning), -saved, *dict.fromkeys(new))

    # ------------------------------------------------------------------ what may be, and what may be worth it

    def _is_left_alone(self, names: Iterable[str], first: int, last: int) -> bool:
        """Whether no step from `first` to `last`, these included, writes one of the buffers `names`."""
        return not any(first <= k <= last for name in names for k in self.writers.get(name, ()))

    def _is_freed(self, name: str, k: int, last: int) -> bool:
        """Whether nothing after step k but step `last` reads a buffer."""
        return all(n <= k or n == last for n in self.uses.readers.get(name, ())) and OUTSIDE not in self.uses.readers[name]

    def _spans(self, k: int, last: int) -> bool:
        """Whether something else than regions runs between two steps, so that what is held meanwhile counts."""
        return any(not isinstance(self.uses.steps[n], Region | Alias) for n in range(k + 1, last))

    def _bytes(self, names: Iterable[str]) -> int:
        return sum(self.nbytes[name] for name in names)

    def _arithmetic(self, value: Scalar, region: Region, times: int) -> float:
        """What computing `value` for each element of `region` so many times costs, in bytes."""
        elements = cost.extent(s.size for s in (*region.nest.points, *region.nest.reduced))
        return times * elements * cost.recomputation(value, region.device)

    def _grouping(self, kept: Way, other: Way, more: float, *new: BufferSpec) -> _Found | None:
        """Both ways, unless the other one, whose arithmetic costs `more` bytes, is estimated to be far slower. `new` are the
        buffers that it alone has."""
        before, after = (sum(cost.traffic(r) for r in way.steps if isinstance(r, Region)) for way in (kept, other))
        launches = (len(other.steps) - len(kept.steps)) * LAUNCH_BYTES["cuda"]
        saved = before - after - more - launches
        if saved < -MARGIN * before:
            return None
        regions = [step for way in (kept, other) for step in way.steps if isinstance(step, Region)]
        buffers = {name: spec for region in regions for name, spec in region.buffers.items()}
        return _Found(Alternatives(f"{regions[0].name}.grouping", (kept, other), buffers, kind=NAME), saved, new)


def _best(found: Iterable[_Found | None]) -> _Found | None:
    return max((each for each in found if each is not None), key=lambda each: each.saved, default=None)
