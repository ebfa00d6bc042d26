"""Captured runs that draw from torch's generator, acted out with a generator and a graph that count."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch

from fxopt.runtime.drawing_graph import capture_drawing

POOL = SimpleNamespace(id=(0, 1))


class Generator:
    """A CUDA generator as torch has it: its state is an object that others may have, too."""

    def __init__(self, seed: int = 3, offset: int = 8) -> None:
        self.state = {"seed": seed, "offset": offset, "capturing": 0}

    def clone_state(self) -> Generator:
        return Generator(self.initial_seed(), self.get_offset())

    def graphsafe_get_state(self) -> Generator:
        same = Generator()
        same.state = self.state
        return same

    def graphsafe_set_state(self, other: Generator) -> None:
        self.state = other.state

    def initial_seed(self) -> int:
        return self.state["seed"]

    def manual_seed(self, seed: int) -> None:
        self.state.update(seed=seed, offset=0)

    def get_offset(self) -> int:
        return self.state["offset"]

    def set_offset(self, offset: int) -> None:
        self.state["offset"] = offset


class Graph:
    """Like torch's: registers the default generator's state, advances it in a replay by what the capture has drawn."""

    generator: Generator
    drawn: list[tuple[int, int]]

    def capture_begin(self, pool: Any, capture_error_mode: str) -> None:
        self.registered = self.generator.state
        self.registered["capturing"] = 1

    def capture_end(self) -> None:
        if self.registered["seed"] == 13:  # a capture that CUDA has given up
            raise RuntimeError("invalidated")
        self.registered["capturing"] = 0

    def replay(self) -> None:
        self.drawn.append((self.registered["seed"], self.registered["offset"]))
        self.registered["offset"] += 12

    def reset(self) -> None:
        self.drawn.append((-1, -1))


@pytest.fixture
def generator(monkeypatch: pytest.MonkeyPatch) -> Generator:
    Graph.generator, Graph.drawn = Generator(), []
    monkeypatch.setattr(torch.cuda, "CUDAGraph", Graph)
    return Graph.generator


def test_replays_draw_where_the_generator_stands(generator: Any) -> None:
    shared = generator.state
    replay, result = capture_drawing(lambda: generator.state["capturing"], 0, POOL, generator, Graph.reset)
    assert result == 1 and generator.state is shared and shared == {"seed": 3, "offset": 8, "capturing": 0}
    replay(7)
    generator.set_offset(generator.get_offset() + 4)  # somebody else draws
    replay(7)
    generator.manual_seed(5)
    replay(7)
    assert Graph.drawn == [(3, 8), (3, 24), (5, 0)] and generator.get_offset() == 12
    del replay
    assert Graph.drawn[-1] == (-1, -1), "destroyed with its last reference"


@pytest.mark.parametrize("seed", [3, 13])
def test_a_capture_that_fails_leaves_the_generator_as_it_was(
    seed: int, generator: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    ended: list[Any] = []
    monkeypatch.setattr(torch._C, "_cuda_endAllocateToPool", lambda *args: ended.append(args), raising=False)
    monkeypatch.setattr(torch._C, "_cuda_releasePool", lambda *args: ended.append(args), raising=False)
    generator.manual_seed(seed)
    shared = generator.state

    def run() -> None:
        raise ZeroDivisionError

    with pytest.raises((ZeroDivisionError, RuntimeError)):
        capture_drawing(run, 0, POOL, generator, Graph.reset)
    assert generator.state is shared and not shared["capturing"]
    assert ended == [(0, (0, 1))] * 2
