"""How many samples candidates get (those that are clearly behind after a few get no more) and what the cache has of them."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from fxopt.ir.region import BufferSpec, Call
from fxopt.journal import Journal
from fxopt.target import Target
from fxopt.tune import measure
from fxopt.tune.measure import (
    APART,
    BEHIND,
    CLOSE,
    FIRST_ROUNDS,
    ROUNDS,
    SURE_ROUNDS,
    BoundCall,
    Measurements,
    Memory,
    Trial,
    interleaved,
    rotated_seconds,
    with_cold,
    with_ties_broken,
)
from fxopt.tune.suspects import Suspects

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
    fast, near, apart, slow = 1.0, APART - 0.01, BEHIND - 0.01, BEHIND + 0.01
    runs: list[Any] = [slow, fast, None, apart, near]
    assert interleaved(runs, torch.device("cpu"), cold=False) == [slow, fast, float("inf"), apart, near]
    rounds = {slow: FIRST_ROUNDS, fast: ROUNDS, None: FIRST_ROUNDS, apart: SURE_ROUNDS, near: ROUNDS}
    assert {run: sampled.count(run) for run in runs} == rounds


def test_the_last_one_left_has_won(sampled: list[Any]) -> None:
    runs: list[Any] = [BEHIND + 0.01, 1.0]
    assert interleaved(runs, torch.device("cpu"), cold=False) == runs
    assert sampled == runs * FIRST_ROUNDS


def test_rounds_that_differ_tell_nothing_apart(monkeypatch: pytest.MonkeyPatch, sampled: list[Any]) -> None:
    rounds = {"a": [1.0, 1.1, 1.0, 1.0, 1.0, 1.0], "b": [1.05, 1.05, 1.05, 1.05, 1.05, 1.05]}  # the first is a rough one
    taken = {run: iter(seconds) for run, seconds in rounds.items()}
    monkeypatch.setattr(measure, "_seconds", lambda run, *_, **__: next(taken[run]))
    assert interleaved(list("ab"), torch.device("cpu"), cold=False) == [1.0, 1.05]  # type: ignore[list-item]
    assert not any(list(rest) for rest in taken.values()), "each was measured in all rounds"


def test_one_that_is_alone_gets_all_rounds(sampled: list[Any]) -> None:
    runs: list[Any] = [2.0]
    assert interleaved(runs, torch.device("cpu"), cold=True) == [2.0]
    assert len(sampled) == ROUNDS


def test_nothing_that_runs(sampled: list[Any]) -> None:
    assert interleaved([None, None], torch.device("cpu"), cold=False) == [float("inf")] * 2


MIB = 1 << 20


def memory(**mib: int) -> Memory:
    shapes = {name: (count * MIB,) for name, count in mib.items()}
    cuda = torch.device("cuda")
    return Memory({n: BufferSpec(n, torch.uint8, cuda, shape, (1,)) for n, shape in shapes.items()})


@pytest.mark.parametrize(
    ("weight", "activation", "plan", "cold"),
    [(16, 1, 100, True), (16, 1, 50, False), (16, 17, 100, False), (200, 1, 200, True)],
    ids=["a large model", "one that the cache holds", "activations above all", "one large weight"],
)
def test_weights_of_large_models_are_cold(
    monkeypatch: pytest.MonkeyPatch, weight: int, activation: int, plan: int, cold: bool
) -> None:
    monkeypatch.setattr(Target, "current", staticmethod(lambda device: Target.cuda(90)))
    given = memory(weight=weight, x=activation)
    found = with_cold(given, {"weight", "another"}, plan * MIB, torch.device("cuda"))
    assert found.cold == (frozenset({"weight"}) if cold else frozenset())
    assert with_cold(given, set(), plan * MIB, torch.device("cuda")) is given


@pytest.mark.parametrize(("weight", "copies", "runs"), [(16, 7, 14), (50, 2, 8), (200, 1, 8), (1, None, 0)])
def test_cold_weights_are_measured_on_copies(
    monkeypatch: pytest.MonkeyPatch, weight: int, copies: int | None, runs: int
) -> None:
    """So many that the L2 cache has nothing of one when it is that one's turn again; other buffers are shared."""
    seen: dict[str, Any] = {}
    monkeypatch.setattr(Target, "current", staticmethod(lambda device: Target.cuda(90)))
    monkeypatch.setattr(measure, "made_up", lambda memory, device, sizes: {n: torch.zeros(4) for n in memory.buffers})
    monkeypatch.setattr(measure, "runner", lambda trial, *rest: None if trial.label == "broken" else trial)
    monkeypatch.setattr(measure, "in_turn", lambda trial, sets, sizes: seen.setdefault(trial.label, sets))
    taken = lambda runs, device, cold: [float("inf") if s is None else float(len(s)) for s in runs]  # noqa: E731
    monkeypatch.setattr(measure, "interleaved", taken)
    trials = [Trial(label, ()) for label in ("one", "broken", "two")]
    given = replace(memory(weight=weight, x=1), cold=frozenset({"weight"}))
    found = rotated_seconds(given, torch.device("cuda"), trials, Suspects(None))
    if copies is None:
        assert found is None and not seen
        return
    assert found == [1.0, float("inf"), 1.0]
    for label in ("one", "two"):
        assert len(seen[label]) == runs and len({id(s["x"]) for s in seen[label]}) == 1
        turns = [id(s["weight"]) for s in seen[label]]
        assert len(set(turns)) == copies and all(len(set(turns[k : k + copies])) == copies for k in range(0, runs, copies))


def test_what_is_as_fast_in_a_row_is_told_apart_alone() -> None:
    trials = [Trial(label, ()) for label in ("library", "vector", "row", "broken", "slow")]
    asked: list[str] = []

    def alone(some: Sequence[Trial]) -> list[float]:
        asked.extend(trial.label for trial in some)
        return [{"vector": 41e-6, "row": 37e-6}[trial.label] for trial in some]

    rotated = [45e-6, 36e-6, 37e-6, float("inf"), 38e-6]
    found = with_ties_broken(rotated, alone, trials)
    assert asked == ["vector", "row"]
    assert found == [45e-6, 36e-6 * CLOSE, 36e-6, float("inf"), 38e-6], "within what is close"
    assert with_ties_broken(rotated[3:], alone, trials[3:]) == rotated[3:] and len(asked) == 2, "nothing to tell apart"


@pytest.mark.parametrize(("alone", "told"), [((float("inf"), 4e-6), 30e-6), ((float("inf"), float("inf")), float("inf"))])
def test_what_does_not_run_alone_is_not_as_fast(alone: tuple[float, ...], told: float) -> None:
    trials = [Trial(label, ()) for label in ("library", "broken", "row")]
    found = with_ties_broken([90e-6, 30e-6, 30e-6], lambda some: list(alone), trials)
    assert found == [90e-6, float("inf"), told]


@pytest.mark.parametrize("single", [False, True])
def test_what_a_plan_runs_alone_is_measured_alone(monkeypatch: pytest.MonkeyPatch, single: bool) -> None:
    in_a_row, alone = {"vector": 30e-6, "row": 32e-6}, {"vector": 41e-6, "row": 38e-6}
    trials = [Trial(label, ()) for label in in_a_row]
    monkeypatch.setattr(measure, "rotated_seconds", lambda memory, device, trials, suspects: list(in_a_row.values()))
    monkeypatch.setattr(measure, "time_trials", lambda memory, device, some, *rest: [alone[t.label] for t in some])
    monkeypatch.setattr(torch.cuda, "device", lambda device: nullcontext())
    given = replace(memory(weight=100), cold=frozenset({"weight"}), single=single)
    found = Measurements(Journal("test"), budget=1.0).compare("mm", given, torch.device("cuda"), trials)
    assert found == list((alone if single else in_a_row).values())


def test_kernels_start_early_after_kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    """And not first, nor after a call."""
    ran: list[str] = []
    pair = tuple(lambda *given, kind=kind: ran.append(kind) for kind in ("late", "early"))
    monkeypatch.setattr(measure, "_launchers", lambda artifact: pair)
    monkeypatch.setattr(measure, "arguments_of", lambda source, tensors, sizes: [])
    monkeypatch.setattr(measure, "bound_arguments", lambda part, tensors, sizes: (lambda: ran.append("call"), (), {}))
    monkeypatch.setattr(torch.cuda, "current_stream", lambda: SimpleNamespace(cuda_stream=0))
    kernel: Any = (None, None)
    call = BoundCall(Call("aten::mm", (), {}, ("out",)), {}, ())
    measure.in_turn(Trial("kernels", (kernel, kernel)), [{}, {}], {})()
    assert ran == ["late", "early", "early", "early"]
    ran.clear()
    measure.in_turn(Trial("both", (call, kernel)), [{}, {}], {})()
    assert ran == ["call", "late", "call", "late"]
