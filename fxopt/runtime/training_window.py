"""What of a forward or backward is captured: all of it, but for steps at its ends that deal with large values.

What enters a captured run from outside is copied, and so is what leaves it. A language model's forward ends with logits, and
its backward begins with their gradient, each hundreds of megabytes: the products that make the one and read the other run
plainly beside the replay then, and nothing of them is copied, nor does it stand in the captured run's memory.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from fxopt.ir.graph import Phase, Role
from fxopt.ir.region import refs
from fxopt.runtime.capturable import (
    CAPTURED,
    COPY_BYTES_PER_SECOND,
    MIN_STEPS,
    PART_SECONDS,
    STEP_SECONDS,
    Choice,
    Facts,
    buffer_of,
    too_dear,
    whole,
)
from fxopt.runtime.lifetimes import Lifetimes, nbytes
from fxopt.runtime.plan import InputSpec, Plan, defined, used
from fxopt.runtime.split import split

NAME = "plain-ends"
"""What `FXOPT_DISABLE` and `options={"disable": ...}` call it."""
COPY_SHARE = 1.0
"""How much of the host time that a replay saves may go into copies: whoever asks for graphs here is short of it."""
EDGE = 16
"""Steps at either end that may run plainly."""
LEAST_GAIN = 2e-5
"""Seconds of a call that have to be saved before a plan is taken apart: parts of their own take some that is not counted. Of
ways that differ by less, that with the least memory between parts is taken."""
_FROM_CALLERS = ("primals", "tangents")
"""What AOTAutograd calls the inputs of a backward that its forward has not made, from their first letters on."""


def choose_window(plan: Plan, phase: Phase, ends: bool = True) -> Choice | str:
    """What of a forward's or backward's plan, all of whose steps can be captured, is to be; why nothing, if so.

    Without `ends` all of it is, or nothing.
    """
    facts = Facts(plan, drawing=True)
    window = _Window(facts, phase)
    count = len(facts.found.steps)
    all_of_it = window.price(0, None)
    prices: dict[tuple[int, int | None], _Price] = {(0, None): all_of_it}
    may_gain = all_of_it.copied / COPY_BYTES_PER_SECOND - PART_SECONDS >= LEAST_GAIN
    if ends and may_gain and facts.is_described() and count >= MIN_STEPS:
        prices |= {span: window.price(*span) for span in window.candidates()}
    least = min(price.seconds for price in prices.values())
    if all_of_it.seconds - least < LEAST_GAIN:
        prices = {(0, None): all_of_it}
    alike = [span for span, price in prices.items() if price.seconds - least < LEAST_GAIN]
    begin, end = min(alike, key=lambda span: (prices[span].held, prices[span].seconds))
    best = prices[begin, end]
    captured = (count if end is None else end) - begin
    if dear := too_dear(best.copied, captured, COPY_SHARE):
        return dear
    if (begin, end) == (0, None):
        return Choice(whole(plan), CAPTURED)
    spared = (all_of_it.copied - best.copied) / 2**20
    text = f"{CAPTURED}, but for {count - captured} of {count} steps at the ends, so that {spared:.1f} MiB need no copies"
    return Choice(split(plan, begin, end, facts.lends(end), window.left), text)


@dataclass(frozen=True)
class _Price:
    """Bytes that are copied in a call, seconds that those and plain steps take, and bytes of what passes into the captured
    part and out of it, for which that has a place."""

    copied: int
    seconds: float
    held: int


class _Window:
    """What capturing a forward's or backward's steps from one to before another would cost. Sizes that are not known count
    for nothing.

    `left` are values that a captured forward leaves where they are, for its backward; `returned` those that it saves for
    that and returns, too.
    """

    def __init__(self, facts: Facts, phase: Phase) -> None:
        self.facts, self.found = facts, facts.found
        self.phase = phase
        left, self.returned = _saved(facts.plan)
        self.made = frozenset(self.found.made)
        self.left = left & self.made
        self.sizes = {name: size for name in self.found.made if isinstance(size := self._size(name), int)}
        first, last, late = self.found.first, self.found.last, len(self.found.steps) - EDGE
        self.near = {n: size for n, size in self.sizes.items() if first[n] < EDGE or last[n] >= late}  # ends, and results
        mentions: dict[str, list[int]] = {}
        for k, step in enumerate(self.found.steps):
            for name in {self.found.root.get(n, n) for n in (*used(step), *defined(step))}:
                mentions.setdefault(name, []).append(k)
        self.mentions = mentions
        self.moved = {
            x.name: size for x in facts.plan.inputs if self._is_moved(x) and isinstance(size := nbytes(buffer_of(x)), int)
        }

    def _size(self, name: str) -> object:
        spec = self.facts.specs.get(name)
        return None if spec is None else nbytes(spec)

    def _is_moved(self, x: InputSpec) -> bool:
        if x.kind != "tensor" or x.role is not Role.USER or x.name in self.facts.written:
            return False
        return self.phase is Phase.FORWARD or x.name.startswith(_FROM_CALLERS)

    def candidates(self) -> list[tuple[int, int | None]]:
        """Windows to consider: (from, to before), None for the end with the results."""
        count = len(self.found.steps)
        begins = range(min(EDGE, count - MIN_STEPS) + 1) if self.phase is Phase.BACKWARD else range(1)
        ends: Sequence[int | None] = [None, *range(max(count - EDGE, MIN_STEPS), count + 1)]
        changes = {b: self.facts.first_rewrite(b, count) for b in begins}
        return [(b, e) for b in begins for e in ends if self._is_whole(b, count if e is None else e, changes[b])]

    def _is_whole(self, begin: int, end: int, change: int) -> bool:
        """Whether no step of the window changes what was made before it, and none after it what was made up to there: one of
        them has a copy. All that is left for a backward is to be made in it, at the same addresses in each call. `change` is
        the first step from `begin` on that changes what was made before."""
        first, steps = self.found.first, self.found.steps
        return (
            end - begin >= MIN_STEPS
            and all(first[name] < end for name in self.left)
            and end <= change
            and all(first[name] >= end for step in steps[end:] for name in self.facts.changed(step) if name in self.made)
        )

    def price(self, begin: int, end: int | None) -> _Price:
        found, count = self.found, len(self.found.steps)
        stop = count if end is None else end

        def is_mentioned(name: str) -> bool:
            handed_on = end is None and name in found.returned
            return handed_on or any(begin <= k < stop for k in self.mentions.get(name, ()))

        copied, lent = sum(size for name, size in self.moved.items() if is_mentioned(name)), 0
        for name, size in self.near.items():
            first, last = found.first[name], found.last[name]
            if name in self.returned and end is not None:  # the backward finds it at another address in each call
                copied += size
            if first < begin:
                copied += size * is_mentioned(name)
            elif first < stop and name not in self.left:
                if name in found.returned or (last >= stop and not self.facts.lends(end)):
                    copied += size
                elif last >= stop:
                    lent += size
        parts = (begin > 0) + (end is not None)
        seconds = copied / COPY_BYTES_PER_SECOND + (begin + count - stop) * STEP_SECONDS + parts * PART_SECONDS
        return _Price(copied, seconds, copied + lent)


def _saved(plan: Plan) -> tuple[frozenset[str], frozenset[str]]:
    """The values whose memory the plan saves for a backward and returns as nothing else, and those that it also returns."""
    root = Lifetimes.of(plan).root

    def roots(outputs: Sequence[object]) -> set[str]:
        return {root.get(name, name) for name in refs(tuple(outputs))}

    cut = len(plan.outputs) - plan.saved
    saved, returned = roots(plan.outputs[cut:]), roots(plan.outputs[:cut])
    return frozenset(saved - returned), frozenset(saved & returned)
