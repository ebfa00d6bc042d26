"""Where in one piece of memory each of several intervals of time lies, so that the whole is small.

Finding the smallest is NP-hard (dynamic storage allocation). The orders of placing tried here are those of TensorFlow Lite's
planner (Pisarchyk and Lee, "Efficient Memory Management for Deep Neural Net Inference", 2020), and placing in order of
time, each interval at that end of a gap which leaves most memory in one piece when it ends; the best result counts.
"""

from __future__ import annotations

import bisect
import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass

ALIGNMENT = 512
"""Bytes: what torch's allocator gives, on which libraries choose their kernels."""

MOST_INTERVALS = 1500
"""Of more than this only the order of time is tried: the others take time that grows with the square of the number."""


@dataclass(frozen=True)
class Interval:
    """`nbytes` bytes that are needed from time `first` to time `last`, both included."""

    first: int
    last: int
    nbytes: int

    @property
    def padded(self) -> int:
        """Bytes up to where the next interval may begin."""
        return -(-self.nbytes // ALIGNMENT) * ALIGNMENT


@dataclass(frozen=True)
class Packing:
    """An offset in bytes for each interval, and where the last one ends."""

    offsets: tuple[int, ...]
    height: int


def pack(intervals: Sequence[Interval]) -> Packing:
    """Offsets at which no two intervals with a time in common overlap; the lowest packing found."""
    lowest = max(sums(intervals, 1 + max((x.last for x in intervals), default=0)), default=0)
    best = _in_time(intervals, lowest)
    orders: list[Callable[[Interval], tuple[int, ...]]] = [
        lambda x: (-x.padded, x.first - x.last, x.first),
        lambda x: (-x.padded * (1 + x.last - x.first), x.first),
    ]
    for order in orders:
        if best.height == lowest or len(intervals) > MOST_INTERVALS:
            break
        best = min(best, _placed(intervals, order), key=lambda packing: packing.height)
    return best


def sums(intervals: Sequence[Interval], times: int) -> list[int]:
    """The bytes that are needed at each time from 0 to `times` - 1."""
    changes = [0] * (times + 1)
    for x in intervals:
        changes[x.first] += x.padded
        changes[x.last + 1] -= x.padded
    return list(itertools.accumulate(changes))[:times]


def _in_time(intervals: Sequence[Interval], lowest: int) -> Packing:
    """Intervals placed in order of time, where possible below `lowest`, the bytes that are needed at a time."""
    offsets = [0] * len(intervals)
    alive: list[tuple[int, int, int]] = []  # (offset, end, last) in order of offsets
    height = 0
    for k in sorted(range(len(intervals)), key=lambda k: (intervals[k].first, -intervals[k].padded)):
        x = intervals[k]
        alive = [a for a in alive if a[2] >= x.first]
        later = [a[:2] for a in alive if a[2] >= x.last]
        ends = [end for gap in _gaps([a[:2] for a in alive], lowest) for end in _ends(gap, x.padded)]
        above = max((a[1] for a in alive), default=0)
        offsets[k] = max(ends, key=lambda at: (_widest(later, at, x.padded, lowest), -at), default=above)
        bisect.insort(alive, (offsets[k], offsets[k] + x.padded, x.last))
        height = max(height, offsets[k] + x.padded)
    return Packing(tuple(offsets), height)


def _gaps(taken: Sequence[tuple[int, int]], height: int) -> list[tuple[int, int]]:
    """What of memory from 0 to `height` is not in `taken`, which is in order."""
    found, end = [], 0
    for start, stop in (*taken, (height, height)):
        if start > end:
            found.append((end, min(start, height)))
        end = max(end, stop)
    return [gap for gap in found if gap[1] > gap[0]]


def _ends(gap: tuple[int, int], size: int) -> tuple[int, ...]:
    """The lowest and the highest offset for `size` bytes in a gap; none if it is too small."""
    low, high = gap[0], gap[1] - size
    return () if high < low else (low, high) if high > low else (low,)


def _widest(taken: Sequence[tuple[int, int]], at: int, size: int, height: int) -> int:
    """The largest gap below `height` that remains with `size` bytes more at `at`."""
    return max((stop - start for start, stop in _gaps(sorted([*taken, (at, at + size)]), height)), default=0)


def _placed(intervals: Sequence[Interval], order: Callable[[Interval], tuple[int, ...]]) -> Packing:
    """Intervals placed in `order`, each in the lowest gap that holds it."""
    offsets = [0] * len(intervals)
    placed: list[tuple[int, int, int, int]] = []  # (offset, end, first, last) in order of offsets
    for k in sorted(range(len(intervals)), key=lambda k: order(intervals[k])):
        x = intervals[k]
        at = 0
        for offset, end, first, last in placed:
            if first <= x.last and x.first <= last:
                if offset - at >= x.padded:
                    break
                at = max(at, end)
        offsets[k] = at
        bisect.insort(placed, (at, at + x.padded, x.first, x.last))
    return Packing(tuple(offsets), max((p[1] for p in placed), default=0))
