"""How many samples candidates get: those that are clearly behind after a few get no more."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from fxopt.tune import measure
from fxopt.tune.measure import BEHIND, FIRST_ROUNDS, ROUNDS, interleaved

FILLS = 7


@pytest.fixture
def sampled(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """What was sampled, in order, after the rough first runs. A run here is the number of seconds it takes."""
    taken: list[Any] = []

    def seconds(run: Any, filler: torch.Tensor, fills: int, launches: int, cold: bool) -> float:
        if fills == FILLS:
            taken.append(run)
        return float("inf") if run is None else float(run)

    monkeypatch.setattr(measure, "FILLER_BYTES", 1)
    monkeypatch.setattr(measure, "_seconds", seconds)
    monkeypatch.setattr(measure, "_fills", lambda run, launches: FILLS)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda device=None: None)
    return taken


def test_what_is_behind_is_dropped(sampled: list[Any]) -> None:
    fast, near, slow = 1.0, BEHIND - 0.01, BEHIND + 0.01
    runs: list[Any] = [slow, fast, None, near]
    assert interleaved(runs, torch.device("cpu"), cold=False) == [slow, fast, float("inf"), near]
    assert {run: sampled.count(run) for run in runs} == {slow: FIRST_ROUNDS, fast: ROUNDS, None: FIRST_ROUNDS, near: ROUNDS}


def test_one_that_is_alone_gets_all_rounds(sampled: list[Any]) -> None:
    runs: list[Any] = [2.0]
    assert interleaved(runs, torch.device("cpu"), cold=True) == [2.0]
    assert len(sampled) == ROUNDS


def test_nothing_that_runs(sampled: list[Any]) -> None:
    assert interleaved([None, None], torch.device("cpu"), cold=False) == [float("inf")] * 2
