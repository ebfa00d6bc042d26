"""The order of steps against brute force, while random pairs are merged."""

from __future__ import annotations

import itertools
import random

import pytest

from fxopt.lower.order import Order


class Plain:
    """The same order as a set of pairs, closed transitively the slow way."""

    def __init__(self, earlier: list[set[int]]) -> None:
        self.steps = set(range(len(earlier)))
        self.pairs = {(e, k) for k, steps in enumerate(earlier) for e in steps}
        self._close()

    def _close(self) -> None:
        for middle in self.steps:
            into = [a for a, b in self.pairs if b == middle]
            out = [b for a, b in self.pairs if a == middle]
            self.pairs |= set(itertools.product(into, out))

    def between(self, a: int, b: int) -> bool:
        return any((a, k) in self.pairs and (k, b) in self.pairs for k in self.steps - {a, b})

    def merge(self, a: int, b: int, new: int) -> None:
        rename = {a: new, b: new}
        self.steps = {rename.get(k, k) for k in self.steps}
        renamed = {(rename.get(x, x), rename.get(y, y)) for x, y in self.pairs}
        self.pairs = {(x, y) for x, y in renamed if x != y}
        self._close()


def random_order(rng: random.Random) -> list[set[int]]:
    return [{e for e in range(k) if rng.random() < 0.15} for k in range(rng.randint(2, 14))]


@pytest.mark.parametrize("seed", range(60))
def test_merging_keeps_the_order(seed: int) -> None:
    rng = random.Random(seed)
    earlier = random_order(rng)
    order, plain = Order(earlier), Plain(earlier)
    for _ in range(8):
        live = sorted(plain.steps)
        for a, b in itertools.permutations(live, 2):
            assert order.runs_before(a, b) == ((a, b) in plain.pairs)
            assert order.are_separated(a, b) == (plain.between(a, b) or plain.between(b, a))
        pairs = [(a, b) for a, b in itertools.permutations(live, 2) if not order.runs_before(b, a)]
        free = [(a, b) for a, b in pairs if not order.are_separated(a, b)]
        if not free:
            break
        a, b = rng.choice(free)
        plain.merge(a, b, order.merge(a, b))
    line = order.linear(lambda k: k)
    assert sorted(line) == sorted(plain.steps)
    assert all(line.index(a) < line.index(b) for a, b in plain.pairs)


def test_unordered_steps_keep_their_positions() -> None:
    assert Order([set(), set(), {0}, set()]).linear(lambda k: -k) == [3, 1, 0, 2]
