"""Intervals of time in one piece of memory."""

from __future__ import annotations

import itertools
import random

import pytest

from fxopt.runtime import packing
from fxopt.runtime.packing import ALIGNMENT, Interval, Packing, pack, sums


def at_random(seed: int, count: int = 60) -> list[Interval]:
    rng = random.Random(seed)
    firsts = [rng.randrange(count) for _ in range(count)]
    return [Interval(t, t + rng.randrange(1 + count // 8), ALIGNMENT * rng.choice((1, 1, 2, 3, 8, 21)) - 5) for t in firsts]


def check(intervals: list[Interval], found: Packing) -> None:
    for (x, a), (y, b) in itertools.combinations(zip(intervals, found.offsets, strict=True), 2):
        if x.first <= y.last and y.first <= x.last:
            assert a + x.nbytes <= b or b + y.nbytes <= a, "both are needed at one time, and overlap"
    for x, offset in zip(intervals, found.offsets, strict=True):
        assert offset % ALIGNMENT == 0 and offset >= 0 and offset + x.nbytes <= found.height


@pytest.mark.parametrize("seed", range(20))
def test_what_lives_together_does_not_overlap(seed: int) -> None:
    intervals = at_random(seed)
    found = pack(intervals)
    check(intervals, found)
    assert found == pack(intervals), "the same plan from the same graph"
    assert found.height <= 1.25 * max(sums(intervals, 100)), "a quarter more than what lives at a time, at most"


def test_many_intervals_are_placed_in_order_of_time(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(packing, "MOST_INTERVALS", 10)
    intervals = at_random(0)
    check(intervals, pack(intervals))


def test_a_chain_takes_turns() -> None:
    assert pack([Interval(t, t + 1, 1000) for t in range(9)]).height == 2 * 1024


def test_the_best_of_several_orders_counts() -> None:
    """In order of time the third would find its place torn by the second."""
    intervals = [Interval(0, 1, 512), Interval(0, 3, 512), Interval(2, 3, 1024)]
    assert pack(intervals).height == max(sums(intervals, 4)) == 1536


def test_nothing() -> None:
    assert pack([]) == Packing((), 0)
