"""Training and inference with CUDA graphs, acted out on the CPU: whatever callers do in any order, no value is wrong.

What tests/gpu/test_graph_stress_cuda.py does on a GPU from several threads, here from one, step by step: the acted device
overwrites the memory of captured runs after each turn.
"""

from __future__ import annotations

import random
from typing import Any

import pytest
import torch

from tests.runtime.fake_graphs import Acted, FakeDriver
from tests.runtime.test_training_graphs import Pair, Stage, data, stage

__all__ = ["stage"]
ACTIONS = 150


@pytest.fixture(autouse=True, params=[True, False], ids=["nodes", "around"])
def _copies(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """How copies are done in the test."""
    monkeypatch.setattr(FakeDriver, "in_graph", request.param)


class Trained:
    """A pair of models in training, and the losses whose backward has not run yet."""

    def __init__(self, seed: int) -> None:
        self.pair, self.random = Pair().warm(), random.Random(seed)
        self.pending: list[tuple[torch.Tensor, torch.Tensor]] = []
        self.kept: list[tuple[torch.Tensor, torch.Tensor]] = []
        self.next = 100

    def act(self) -> None:
        often = [self.forward, self.backward, self.step]
        seldom = [self.drop, self.clear, self.replaced, self.evaluated, self.retained]
        rare = self.moved  # captured runs are for weights that stay for a while
        self.random.choices([*often, *seldom, rare], [8] * len(often) + [2] * len(seldom) + [1])[0]()

    def forward(self) -> None:
        self.next += 1
        losses = self.pair.losses(self.next)
        torch.testing.assert_close(*losses)
        self.pending.append(losses)

    def backward(self) -> None:
        if self.pending:
            for loss in self.pending.pop(self.random.randrange(len(self.pending))):
                loss.backward()
            self.pair.agree()

    def retained(self) -> None:
        for loss in self.pending[-1] if self.pending else ():
            loss.backward(retain_graph=True)
        self.pair.agree()

    def step(self) -> None:
        self.next += 1
        self.pair.step(self.next)
        self.pair.agree()
        self.keep()

    def keep(self) -> None:
        grads = zip(self.pair.mine.parameters(), self.pair.theirs.parameters(), strict=True)
        self.kept += [(a.grad, b.grad) for a, b in grads if a.grad is not None and b.grad is not None]
        self.clear()

    def drop(self) -> None:
        self.pending.clear()

    def clear(self) -> None:
        self.pair.clear()

    def moved(self) -> None:
        """Weights go elsewhere; what is pending wants those that it was computed with."""
        self.drop()
        for model in (self.pair.mine, self.pair.theirs):
            for p in model.parameters():
                p.data = p.data * 0.99

    def replaced(self) -> None:
        """An optimizer's step, in place."""
        self.drop()
        for model in (self.pair.mine, self.pair.theirs):
            with torch.no_grad():
                for p in model.parameters():
                    p.mul_(0.99)

    def evaluated(self) -> None:
        with torch.no_grad():
            torch.testing.assert_close(self.pair.run(data(self.next)), self.pair.theirs(data(self.next)))


def test_training_in_any_order(stage: Stage) -> None:
    trained = Trained(0)
    for _ in range(ACTIONS):
        trained.act()
    for mine, theirs in trained.kept:
        torch.testing.assert_close(mine, theirs)
    forwards, backwards = stage.counts()
    assert min(forwards, backwards) > ACTIONS // 20 and trained.kept


@pytest.mark.parametrize("native", [False, True], ids=["python", "native"])
def test_inference_in_any_order(native: bool, request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    if native:
        monkeypatch.setattr(Acted, "extension", request.getfixturevalue("compiled_code"))

    def model(x: torch.Tensor, w: torch.Tensor, state: torch.Tensor) -> tuple[torch.Tensor, ...]:
        state += w
        y = x * w + state
        return y, y[1:], x

    run, rng = Acted(model, fixed=(1, 2), written=(2,), varying=(0,), limit=6), random.Random(0)
    weights, states = [torch.randn(1) for _ in range(2)], [torch.zeros(1) for _ in range(2)]
    kept: list[tuple[tuple[Any, ...], tuple[Any, ...]]] = []
    for k in range(4 * ACTIONS):
        x = torch.randn(rng.choice((3, 3, 3, 4)), generator=torch.Generator().manual_seed(k))
        w, state = rng.choice(weights), rng.choice(states)
        if rng.random() < 0.01:
            w.data = torch.randn(1)
        if rng.random() < 0.1:
            w.mul_(0.9)
        run.driver.current = 0 if k < ACTIONS else rng.choice((7, 7, 8, 0))
        run.driver.during_replay = lambda: None
        if rng.random() < 0.1:
            inner = [torch.ones(3), w, torch.zeros(1)]

            def nested(inner: list[Any] = inner) -> None:
                run.driver.during_replay = lambda: None
                torch.testing.assert_close(run(*inner)[0], torch.ones(3) * inner[1] + inner[1])

            run.driver.during_replay = nested
        elif rng.random() < 0.05:
            run.driver.during_replay = _interrupt
        want = model(x, w, state.clone())
        try:
            got = run(x, w, state)
        except KeyboardInterrupt:
            state.zero_()  # nobody knows how far it has got
            continue
        kept.append((got, want))
    for got, want in kept:
        torch.testing.assert_close(got, want)
    assert run.replays > ACTIONS // 2


def _interrupt() -> None:
    raise KeyboardInterrupt
