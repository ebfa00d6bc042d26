"""Steps of a schedule that are replaced: what each touches, where several can run as one, who else reads a value."""

from __future__ import annotations

from collections.abc import Sequence

from fxopt.ir.region import Alias, Alternatives, Call, Ref, Region, Step, Work, base_of, refs
from fxopt.lower.lowering import Lowered


class Placement:
    """The `steps` of a schedule, None where one has been taken away, and of each what it reads and writes (`accesses`, of
    base buffers); `views` by name; `kept` are the base buffers of what the graph returns, and its inputs."""

    def __init__(self, lowered: Lowered) -> None:
        self.steps: list[Step | None] = list(lowered.steps)
        self.views = {s.name: s for s in lowered.steps if isinstance(s, Alias)}
        self.kept = {base_of(o.name, self.views) for o in lowered.outputs if isinstance(o, Ref)} | set(lowered.inputs)
        self.accesses = [self._accesses(s) for s in lowered.steps]

    def _put(self, steps: tuple[int, ...], place: int, found: Alternatives) -> None:
        """`found` at `place` instead of all `steps`."""
        accesses = self._accesses(*(s for k in steps if (s := self.steps[k]) is not None))
        for k in steps:
            self.steps[k], self.accesses[k] = None, (frozenset(), frozenset())
        self.steps[place], self.accesses[place] = found, accesses

    def _place(self, steps: tuple[int, ...]) -> int | None:
        """Where products and then a region, at `steps`, can run as one step: where the region or the last product is, if
        nothing between waits for what moves there, and that for nothing between. None if nowhere.
        """
        made = {n for k in steps[:-1] for n in self.accesses[k][1]}
        for place in (steps[-1], steps[-2]):
            if all(self._can_move(k, place, steps, made) for k in steps if k != place):
                return place
        return None

    def _can_move(self, k: int, place: int, steps: tuple[int, ...], made: set[str]) -> bool:
        """Whether step `k` can run at `place`, where those of `steps` are, which make `made`."""
        reads, writes = self.accesses[k]
        reads -= made
        between = (i for i in range(min(k, place), max(k, place) + 1) if i not in steps and self.steps[i] is not None)
        in_sight = isinstance(self.steps[k], Region)  # what it writes is allocated for whoever names it first, a view, say
        others = [self.accesses[i] for i in between if not (in_sight and isinstance(self.steps[i], Alias))]
        return not any(writes & (r | w) or reads & w for r, w in others)

    def _may_join(self, k: int, group: Sequence[int]) -> bool:
        """Whether call k, with the views that it names, can run at the first step of `group`."""
        call, first = self.steps[k], group[0]
        if any(self.accesses[k][0] & self.accesses[j][1] for j in group):
            return False  # it adds what one of them gives
        named = {*refs(call.args)} if isinstance(call, Call) else set()
        views = (j for j in range(first, k) if isinstance(s := self.steps[j], Alias) and s.name in named)
        moved = (k, *views)
        return all(self._can_move(j, first, (*group, *moved), set()) for j in moved)

    def _take_views(self, place: int, calls: Sequence[Call]) -> list[Step]:
        """Take what `calls` name of the views that come after `place` out of the steps."""
        named = {n for call in calls for n in refs(call.args)}
        found: list[Step] = []
        for k in range(place, len(self.steps)):
            step = self.steps[k]
            if isinstance(step, Alias) and step.name in named:
                found.append(step)
                self.steps[k], self.accesses[k] = None, (frozenset(), frozenset())
        return found

    def _is_wanted(self, name: str, steps: tuple[int, ...]) -> bool:
        """Whether the product `name` is read by others than `steps`."""
        if name in self.kept:
            return True
        others = (i for i, s in enumerate(self.steps) if s is not None and not isinstance(s, Alias) and i not in steps)
        return any(name in self.accesses[i][0] for i in others)  # of views, those who read them count

    def _accesses(self, *steps: Step) -> tuple[frozenset[str], frozenset[str]]:
        """(base buffers read, base buffers written)."""
        reads: set[str] = set()
        writes: set[str] = set()
        for step in steps:
            if isinstance(step, Alias):  # which comes after what makes its memory
                reads.add(base_of(step.of, self.views))
            elif isinstance(step, Alternatives):  # attention, which was looked for before
                of_ways = [self._accesses(*way.steps) for way in step.ways]
                reads, writes = reads.union(*(r for r, _ in of_ways)), writes.union(*(w for _, w in of_ways))
            elif isinstance(step, Work):
                reads |= {base_of(n, self.views) for n in step.reads()}
                writes |= {base_of(n, self.views) for n in step.writes()}
            elif isinstance(step, Call):
                reads |= {base_of(n, self.views) for n in refs((step.args, step.kwargs))}
                writes |= {base_of(n, self.views) for n in (*step.outputs, *step.writes) if n is not None}
        return frozenset(reads), frozenset(writes)
