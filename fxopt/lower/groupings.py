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
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace

from fxopt.ir.loops import Scalar, loads_below, postorder
from fxopt.ir.region import Alias, Alternatives, BufferSpec, Region, Step, Way
from fxopt.lower import cost, recompute
from fxopt.lower.align import extents
from fxopt.lower.direction import alternate
from fxopt.lower.joining import with_stores
from fxopt.lower.lowering import Lowered
from fxopt.lower.row_passes import computes_again, in_two
from fxopt.lower.schedule import LAUNCH_BYTES
from fxopt.lower.shared_values import shared_values, stored_once
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
    """A grouping, the numbers of the steps that it is about, what its other way saves by the estimate, in bytes, and the
    buffers that this alone has."""

    grouping: Alternatives
    parts: tuple[int, ...]
    saved: float
    more: tuple[BufferSpec, ...] = ()


def with_groupings(lowered: Lowered, mode: str = "default") -> Lowered:
    """`lowered`, already scheduled, with the groupings of its regions on GPUs that are worth measuring."""
    seams = _Seams(lowered)
    found = sorted(seams.found(), key=lambda each: -each.saved)
    most = MOST_DIFFERENT.get(mode, MOST_DIFFERENT["default"])
    different: set[object] = set()
    taken: set[int] = set()
    kept: list[_Found] = []
    for each in found:
        kind = _kind(each.grouping)
        if taken.isdisjoint(each.parts) and (kind in different or len(different) < most):
            different.add(kind)
            taken |= set(each.parts)
            kept.append(each)
    buffers = {spec.name: spec for each in kept for spec in each.more}
    groupings = tuple(each.grouping for each in sorted(kept, key=lambda each: each.parts))
    return replace(lowered, groupings=groupings, buffers=lowered.buffers | buffers) if groupings else lowered


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


def _kind(grouping: Alternatives) -> object:
    """Equal for groupings of equal layers."""
    regions = [step for way in grouping.ways for step in way.steps if isinstance(step, Region)]
    return tuple((extents(r.nest), len(list(postorder(r.nest.roots))), _layouts(r.buffers.values())) for r in regions)


def _layouts(specs: Iterable[BufferSpec]) -> tuple[object, ...]:
    return tuple((spec.dtype, spec.shape, spec.strides) for spec in specs)


class _Seams:
    """Where a schedule might be grouped in another way."""

    def __init__(self, lowered: Lowered) -> None:
        self.uses = Uses(lowered)
        self.nbytes = {name: cost.nbytes(spec) for name, spec in lowered.buffers.items()}
        self.large = {name for name, size in self.nbytes.items() if size >= LAUNCH_BYTES["cuda"]}
        self.expensive: dict[int, bool] = {}
        self.writers: dict[str, list[int]] = {}
        for k in range(len(lowered.steps)):
            for name in self.uses.writes(k):
                self.writers.setdefault(name, []).append(k)

    def found(self) -> Iterator[_Found]:
        """Every grouping that may be faster than the schedule's."""
        for k in range(len(self.uses.steps)):
            if (region := self._region(k)) is not None:
                for ways in (self._computed_again, self._stored_between, self._row_in_two):
                    yield from (each for each in ways(k, region) if each is not None)

    def _region(self, k: int) -> Region | None:
        """Step k, if it is a region that may be grouped: not one that picks elements by an index, of which made-up data say
        little."""
        step = self.uses.steps[k]
        if not isinstance(step, Region) or step.device.type != "cuda" or step.across is not None:
            return None
        loads, stores = (any(n.indirect for n in step.nest.loads()), any(s.indirect for s in step.nest.stores))
        return None if loads or stores else step

    # ------------------------------------------------------------------ a buffer that each reader might compute

    def _computed_again(self, k: int, source: Region) -> Iterator[_Found | None]:
        for store in source.nest.stores:
            name, readers = store.buffer, sorted(set(self.uses.readers.get(store.buffer, ())))
            if name not in self.large or self.writers[name] != [k] or not readers or readers[0] <= k:
                continue
            steps = [self._region(r) for r in readers]
            regions = [step for step in steps if step is not None]
            needed = {load.buffer for load in loads_below(store.roots)}
            fits = recompute.is_repeatable(store) and len(regions) == len(steps)
            if not fits or not self._is_left_alone(needed, k, readers[-1]):
                continue
            held = (n for n in needed if max(self.uses.readers[n]) < readers[-1] and OUTSIDE not in self.uses.readers[n])
            if self._spans(k, readers[-1]) and self._bytes(held) > self.nbytes[name]:
                continue
            again = [recompute.with_value(region, store, source) for region in regions]
            left = with_stores(source, set(source.writes()) - {name})
            new = [step for step in (left, *again) if step is not None]
            if any(step is None for step in again):
                continue
            more = self._arithmetic(store.value, source, len(again) - (left is None))
            ways = Way(STORED, (source, *regions)), Way(AGAIN, tuple(new))
            yield self._grouping((k, *readers), *ways, more)

    # ------------------------------------------------------------------ a value that two kernels compute

    def _stored_between(self, k: int, first: Region) -> Iterator[_Found | None]:
        for n in self._later_readers(k, first):
            second = self._region(n)
            for shared in shared_values(first, second) if second is not None else ():
                assert second is not None
                needed = {load.buffer for load in loads_below((shared.own,))}
                both = stored_once(first, second, shared, f"{first.name}.shared")
                if both is None or not self._is_left_alone(needed, k, n):
                    continue
                freed = (name for name in set(second.reads()) - set(both.second.reads()) if self._is_freed(name, k, n))
                new = [] if both.spec is None else [both.spec]
                if not self._is_left_alone([both.name], k + 1, n):
                    continue
                if self._spans(k, n) and sum(map(cost.nbytes, new)) > self._bytes(freed):
                    continue
                ways = Way(BOTH, (first, second)), Way(STORED, (both.first, both.second))
                yield self._grouping((k, n), *ways, -self._arithmetic(shared.own, first, 1), *new)

    def _later_readers(self, k: int, first: Region) -> list[int]:
        """The steps after step k that read several large operands of it, or one, if both do something expensive."""
        common = Counter(n for name in first.reads() if name in self.large for n in set(self.uses.readers.get(name, ())))
        return sorted(n for n, count in common.items() if n > k and (count > 1 or self._is_expensive(k, n)))

    def _is_expensive(self, *steps: int) -> bool:
        """Whether all these steps are regions that compute something expensive."""
        for k in set(steps) - self.expensive.keys():
            region = self._region(k)
            self.expensive[k] = region is not None and cost.is_expensive(postorder(region.nest.roots))
        return all(self.expensive[k] for k in steps)

    # ------------------------------------------------------------------ a row that is walked over again

    def _row_in_two(self, k: int, region: Region) -> Iterator[_Found | None]:
        several = len(self.large.intersection(region.reads())) > 1 or self._is_expensive(k)
        halves = in_two(region) if several and computes_again(region) else None
        for shared in shared_values(*halves) if halves is not None else ():
            assert halves is not None
            both = stored_once(*halves, shared, f"{region.name}.shared")
            if both is not None:
                two = both.first, both.second
                own = [s for half in two for s in half.buffers.values() if s.name not in region.buffers]
                sizes = self.nbytes | {spec.name: cost.nbytes(spec) for spec in own}
                turning = alternate(two, sizes)
                ways = Way(WHOLE, (region,)), Way(IN_TWO, tuple(r for r in turning if isinstance(r, Region)))
                yield self._grouping((k,), *ways, -self._arithmetic(shared.own, region, 1), *own)

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

    def _grouping(self, parts: tuple[int, ...], kept: Way, other: Way, more: float, *new: BufferSpec) -> _Found | None:
        """The grouping of steps `parts`, unless its other way, whose arithmetic costs `more` bytes, is estimated to be far
        slower. `new` are the buffers that it alone has."""
        before, after = (sum(cost.traffic(r) for r in way.steps if isinstance(r, Region)) for way in (kept, other))
        launches = (len(other.steps) - len(kept.steps)) * LAUNCH_BYTES["cuda"]
        saved = before - after - more - launches
        if saved < -MARGIN * before:
            return None
        regions = [step for way in (kept, other) for step in way.steps if isinstance(step, Region)]
        buffers = {name: spec for region in regions for name, spec in region.buffers.items()}
        return _Found(Alternatives(f"{regions[0].name}.grouping", (kept, other), buffers, kind=NAME), parts, saved, new)
