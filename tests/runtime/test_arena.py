"""Blocks of memory that do not raise the peak."""

from __future__ import annotations

import itertools
import random

import pytest

from fxopt.runtime.arena import Block, blocks
from fxopt.runtime.packing import Interval, sums

MIB = 1 << 20


def layer(start: int, size: int = MIB) -> list[Interval]:
    """Two activations and a wide one between them."""
    return [Interval(start, start + 1, size), Interval(start + 1, start + 2, 4 * size), Interval(start + 2, start + 3, size)]


def peak(intervals: list[Interval], found: list[Block], standing: list[int]) -> int:
    held = [
        Interval(min(intervals[k].first for k in b.members), max(intervals[k].last for k in b.members), b.packing.height)
        for b in found
    ]
    return max(map(sum, zip(sums(held, len(standing)), standing, strict=True)))


def test_one_block_where_nothing_else_stands() -> None:
    intervals = [x for k in range(12) for x in layer(3 * k)]
    (found,) = blocks(intervals, [[0] * 40])
    assert found.members == tuple(range(36)) and found.packing.height == max(sums(intervals, 40))


def test_a_block_ends_before_something_large() -> None:
    """Layers, and logits at the end, which are computed from what the last layer leaves."""
    intervals = [x for k in range(12) for x in layer(3 * k)]
    standing = [0] * 37 + [100 * MIB] * 3
    intervals.append(Interval(36, 38, MIB))
    found = blocks(intervals, [standing])
    assert sorted(len(b.members) for b in found) == [1, 36]
    assert peak(intervals, found, standing) == 101 * MIB


def test_values_that_cannot_be_together_take_turns() -> None:
    """A result of the library stands beside each layer's narrow values, but not beside its wide one."""
    intervals = [x for k in range(12) for x in layer(3 * k)]
    standing = [0 if t % 3 == 1 else 3 * MIB for t in range(40)]
    found = blocks(intervals, [standing])
    apart = max(map(sum, zip(sums(intervals, 40), standing, strict=True)))
    assert peak(intervals, found, standing) <= 1.02 * apart
    assert len(found) < len(intervals)


def test_every_possibility_counts() -> None:
    """Whether inputs are freed early is not known: no block may rely on it, nor waste it."""
    intervals = [Interval(0, 1, 4 * MIB), Interval(2, 3, MIB), Interval(3, 4, MIB)]
    kept, freed = [8 * MIB] * 5, [4 * MIB, 4 * MIB, 7 * MIB, 7 * MIB, 7 * MIB]
    assert len(blocks(intervals, [kept])) == 1
    assert peak(intervals, blocks(intervals, [kept, freed]), freed) <= 9.1 * MIB


@pytest.mark.parametrize("seed", range(20))
def test_the_peak_is_that_of_storages_apart(seed: int) -> None:
    rng = random.Random(seed)
    firsts = [rng.randrange(60) for _ in range(80)]
    intervals = [Interval(t, min(69, t + rng.randrange(9)), rng.randrange(1, 4) * MIB) for t in firsts]
    standing = [rng.choice((0, 0, 0, 20)) * MIB for _ in range(70)]
    found = blocks(intervals, [standing])
    assert sorted(k for b in found for k in b.members) == list(range(80))
    for block in found:
        own = [intervals[k] for k in block.members]
        for t in range(70):
            live = [(o, x) for o, x in zip(block.packing.offsets, own, strict=True) if x.first <= t <= x.last]
            assert sum(x.nbytes for _, x in live) <= block.packing.height
            ends = sorted((o, o + x.nbytes) for o, x in live)
            assert all(a[1] <= b[0] for a, b in itertools.pairwise(ends))
    apart = max(map(sum, zip(sums(intervals, 70), standing, strict=True)))
    assert peak(intervals, found, standing) <= 1.005 * apart
