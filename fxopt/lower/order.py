"""What must run before what, kept up to date while steps are merged."""

from __future__ import annotations

import heapq
from collections.abc import Callable, Iterator, Sequence


class Order:
    """A partial order of steps. Step k is bit k of the bit sets; merging makes a new one and leaves their bits stale.

    Both directions are stored transitively, so that the scheduler's one frequent question, whether a third step has to run
    between two, is a few operations on integers. `merge` must not be called for steps of which two are separated.
    """

    def __init__(self, earlier: Sequence[set[int]]) -> None:
        """`earlier[k]` are steps, all below k, that step k must follow."""
        self.present = (1 << len(earlier)) - 1
        self.direct = dict(enumerate(earlier))
        self.before = dict.fromkeys(self.direct, 0)
        self.after = dict.fromkeys(self.direct, 0)
        self.merged_into: dict[int, int] = {}
        for k, steps in enumerate(earlier):
            for e in steps:
                self.before[k] |= self.before[e] | 1 << e
        for k in reversed(range(len(earlier))):
            for e in earlier[k]:
                self.after[e] |= self.after[k] | 1 << k

    def runs_before(self, a: int, b: int) -> bool:
        """Whether `a` must run before `b`."""
        return bool(self.before[b] >> a & 1)

    def related(self, a: int) -> int:
        """The steps that must run before or after `a`, as a bit set."""
        return self.before[a] | self.after[a]

    def are_separated(self, a: int, b: int) -> bool:
        """Whether some third step must run between the two, whichever comes first."""
        between = self.after[a] & self.before[b] | self.after[b] & self.before[a]
        return bool(between & self.present & ~(1 << a | 1 << b))

    def merge(self, *steps: int) -> int:
        """One step in the place of `steps`; its number."""
        own, before, after, new = 0, 0, 0, max(self.direct) + 1
        direct: set[int] = set()
        for step in steps:
            own |= 1 << step
            before, after = before | self.before.pop(step), after | self.after.pop(step)
            direct |= self.direct.pop(step)
            self.merged_into[step] = new
        before, after = before & self.present & ~own, after & self.present & ~own
        self.direct[new], self.before[new], self.after[new] = direct, before, after
        self.present = self.present & ~own | 1 << new
        for k in _bits(before):
            self.after[k] |= after | 1 << new
        for k in _bits(after):
            self.before[k] |= before | 1 << new
        return new

    def linear(self, position: Callable[[int], int]) -> list[int]:
        """The steps in a valid order: always the one with the lowest position among those that may run."""
        waiting = {k: {self._current(e) for e in earlier} - {k} for k, earlier in self.direct.items()}
        followers: dict[int, list[int]] = {k: [] for k in waiting}
        for k, earlier in waiting.items():
            for e in earlier:
                followers[e].append(k)
        ready = [(position(k), k) for k, earlier in waiting.items() if not earlier]
        heapq.heapify(ready)
        out = []
        while ready:
            _, k = heapq.heappop(ready)
            out.append(k)
            for n in followers[k]:
                waiting[n].discard(k)
                if not waiting[n]:
                    heapq.heappush(ready, (position(n), n))
        if len(out) != len(waiting):
            raise AssertionError("the order of the steps has a cycle")
        return out

    def _current(self, step: int) -> int:
        """The step that `step` has become part of."""
        while step in self.merged_into:
            step = self.merged_into[step]
        return step


def _bits(mask: int) -> Iterator[int]:
    while mask:
        low = mask & -mask
        yield low.bit_length() - 1
        mask ^= low
