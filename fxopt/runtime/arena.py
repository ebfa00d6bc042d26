"""Memory for a plan's values on a GPU: few blocks, within which values with disjoint lifetimes share addresses.

One block for everything (an arena) is one allocation a call, but it stands from the first value to the last, beside results
that torch allocates and outputs that grow: GPT-2 would hold the activations of its layers beside its logits. So a block ends
where it would raise the peak of the call over what it would be with a storage for each value; values that live then have
storages of their own, and the next block begins after it.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass

from fxopt.runtime.packing import Interval, Packing, pack, sums

MOST_ROUNDS = 8
"""Attempts to keep the peak low with blocks, before each value gets a storage of its own."""

SLACK = 512
"""One part in so many, and as many bytes as fit into a block of torch's allocator, may be added to the peak."""

SMALL = 64 << 10
"""Bytes."""


@dataclass(frozen=True)
class Block:
    """A piece of memory for the intervals `members` (by number), at `packing`'s offsets."""

    members: tuple[int, ...]
    packing: Packing


def blocks(intervals: Sequence[Interval], standing: Sequence[Sequence[int]]) -> list[Block]:
    """The blocks that hold `intervals`; one that is alone in its block is a storage of its own.

    `standing` are the bytes that stand at each time beside them, once for each possibility: the peak is not raised in any.
    """
    times = len(standing[0])
    live = sums(intervals, times)
    limits = [max(map(sum, zip(live, other, strict=True)), default=0) for other in standing]
    limits = [limit + limit // SLACK + SMALL for limit in limits]
    room = [min(limit - other[t] for limit, other in zip(limits, standing, strict=True)) for t in range(times)]
    crowded: set[int] = set()
    for _ in range(MOST_ROUNDS):
        found, apart = _between(intervals, crowded, times)
        held = sums([*(_extent(block, intervals) for block in found), *(intervals[k] for k in apart)], times)
        over = {t for t in range(times) if held[t] > room[t]}
        if not over:
            break
        crowded |= over
    else:
        found, apart, held = [], list(range(len(intervals))), live
    return [*found, *_in_turn(intervals, apart, [a - b for a, b in zip(room, held, strict=True)])]


def _between(intervals: Sequence[Interval], crowded: set[int], times: int) -> tuple[list[Block], list[int]]:
    """A block for the intervals between every two `crowded` times, and those that live at one."""
    before = list(itertools.accumulate((t in crowded for t in range(times)), initial=0))
    together: dict[int, list[int]] = {}
    apart = []
    for k, x in enumerate(intervals):
        if before[x.last + 1] > before[x.first]:
            apart.append(k)
        else:
            together.setdefault(before[x.first], []).append(k)
    return [Block(tuple(members), pack([intervals[k] for k in members])) for members in together.values()], apart


def _extent(block: Block, intervals: Sequence[Interval]) -> Interval:
    own = [intervals[k] for k in block.members]
    return Interval(min(x.first for x in own), max(x.last for x in own), block.packing.height)


def _in_turn(intervals: Sequence[Interval], apart: Sequence[int], room: list[int]) -> list[Block]:
    """Blocks that the intervals `apart` take in turn, each from its beginning, where there is `room` for them to stand
    meanwhile: the bytes that the limit leaves at each time.
    """
    taken: list[list[int]] = []
    heights: list[int] = []
    for k in sorted(apart, key=lambda k: intervals[k].first):
        x = intervals[k]
        waste = {}
        for slot, members in enumerate(taken):
            idle = range(intervals[members[-1]].last + 1, x.first)
            more = heights[slot] - x.padded
            if intervals[members[-1]].last >= x.first or more < 0:
                continue
            if all(room[t] >= heights[slot] for t in idle) and all(room[t] >= more for t in range(x.first, x.last + 1)):
                waste[slot] = more * (x.last - x.first + 1) + heights[slot] * len(idle)
        if not waste:
            taken.append([k])
            heights.append(x.padded)
            continue
        slot = min(waste, key=waste.__getitem__)
        for t in range(intervals[taken[slot][-1]].last + 1, x.last + 1):
            room[t] -= heights[slot] - (x.padded if t >= x.first else 0)
        taken[slot].append(k)
    return [
        Block(tuple(members), Packing((0,) * len(members), height)) for members, height in zip(taken, heights, strict=True)
    ]
