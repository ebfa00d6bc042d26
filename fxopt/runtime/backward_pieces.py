"""A backward's plan in several captured pieces, so that only the gradients of one of them exist twice.

A captured run leaves its results in its own memory, and a replay hands out copies. A backward's results are as large as the
model. Pieces are captured with the same scratch memory, since a replay's contents mean nothing after its turn: that holds
the gradients of the largest piece, not all of them. What is computed in one piece and read in a later one is copied twice,
so pieces end where that is little.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence

from fxopt.runtime.capturable import CAPTURED, PIECE_STEPS, Choice, Facts, Piece, Pieces, whole
from fxopt.runtime.lifetimes import nbytes
from fxopt.runtime.plan import Plan

NAME = "backward-pieces"
"""What `FXOPT_DISABLE` and `options={"disable": ...}` call it."""
MOST_PIECES = 6
"""Each takes the host another replay, and with twice as many a sixteenth of the gradients would be saved at most."""
SMALLEST = 1 << 30
"""Bytes of results from which on it is worth the time. Of BERT-base, which has 210 MiB of them, a step took 10.5 ms in
pieces (H200, a busy host), where 8.9 had been measured whole, and reserved no less: the piece with the most scratch memory
decides."""
PASSING_SHARE = 1 / 8
"""How much of the results' bytes may pass between two pieces."""


def choose_backward_pieces(plan: Plan) -> Pieces | None:
    """The pieces of a backward that can be captured as a whole; None where that is no worse.

    The pieces' results are as equal in size as they can be. The last one hands them out and has no steps of its own.
    """
    facts = Facts(plan)
    found = facts.found
    sizes = {name: nbytes(facts.specs[name]) for name in found.made if name in facts.specs}
    known = {name: size for name, size in sizes.items() if isinstance(size, int)}
    if not facts.is_described() or len(known) != len(found.made):
        return None
    results = [0] * len(found.steps)
    for name in found.made:
        if name in found.returned:
            results[found.first[name]] += known[name]
    total = sum(results)
    if total < SMALLEST:
        return None
    cuts = _places(facts, known, int(total * PASSING_SHARE))
    chosen = _even(results, cuts)
    if not chosen:
        return None
    ends = [*chosen, len(found.steps)]
    parts = facts.row(list(zip([0, *chosen], ends, strict=True)))
    pieces = tuple(
        Piece(part, Choice(whole(part.plan), CAPTURED) if begin < end else None) for (begin, end), part in parts.items()
    )
    return Pieces(pieces, f"{CAPTURED}, in {len(ends)} pieces, so that only the gradients of one exist twice")


def _places(facts: Facts, sizes: dict[str, int], most: int) -> list[int]:
    """The steps at which a piece may begin: where no more than `most` bytes pass that are no results, and nothing that was
    made before is changed."""
    found, count = facts.found, len(facts.found.steps)
    passing = [0] * (count + 2)
    for name in found.made:
        if name not in found.returned:
            passing[found.first[name] + 1] += sizes[name]
            passing[found.last[name] + 1] -= sizes[name]
    changing = set[int]()
    for k, step in enumerate(found.steps):
        for name in facts.changed(step):
            changing.update(range(found.first[name] + 1 if name in sizes else k, k + 1))
    held = itertools.accumulate(passing)
    return [k for k, size in zip(range(count), held, strict=False) if size <= most and k not in changing]


def _even(results: Sequence[int], cuts: Sequence[int]) -> list[int]:
    """Of `cuts`, those between at most MOST_PIECES pieces of PIECE_STEPS steps and more whose largest has the fewest bytes
    of results; none where that would not be three quarters of all at most."""
    total = sum(results)
    low, high, best = total // MOST_PIECES, total, list[int]()
    while low < high:
        most = (low + high) // 2
        found = _filled(results, cuts, most)
        if found is None or len(found) >= MOST_PIECES:
            low = most + 1
        else:
            best, high = found, most
    return best if high <= total * 3 // 4 else []


def _filled(results: Sequence[int], cuts: Sequence[int], most: int) -> list[int] | None:
    """The cuts between pieces that are each as long as `most` bytes of results allow; None where a piece is larger, or one
    before the last has too few steps."""
    chosen, begin, held, last = list[int](), 0, 0, 0
    for end in (*cuts, len(results)):
        size = sum(results[last:end])
        if held + size > most:
            if last - begin < PIECE_STEPS or size > most:
                return None
            chosen.append(last)
            begin, held = last, 0
        held += size
        last = end
    return chosen
