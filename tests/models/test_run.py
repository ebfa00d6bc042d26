"""How the zoo runs its cases in other processes, with workers that only pretend, and moves models to a device."""

from __future__ import annotations

import json
import time
from pathlib import Path

import pytest
import torch
from torch import nn

from tests.models import zoo
from tests.models.judge import Problem, device_of, moved
from tests.models.zoo import Run, cases, modes, parser

PRETEND = """
import json, os, sys, time
say = lambda line: print(json.dumps(line), flush=True)
for line in sys.stdin:
    name, mode = json.loads(line)
    if name == "lost":
        say({"died": "device-side assert"})
        os._exit(1)
    if name == "hangs":
        time.sleep(100)
    say({"status": "right", "worst": 0.5})
    say({"done": True})
"""


@pytest.fixture(autouse=True)
def _pretending(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(zoo, "WORKER", ("-c", PRETEND))


def test_a_death_costs_its_case_only(tmp_path: Path) -> None:
    run = Run(tmp_path / "results.json", "cuda", float("inf"))
    todo = [("a", "train"), ("lost", "train"), ("b", "train"), ("c", "eval")]
    run.apart(todo, 2)
    kept = json.loads((tmp_path / "results.json").read_text())
    assert kept == run.records and len(kept) == 4
    assert kept["lost/train"] == {"status": "crash", "why": "device-side assert"}
    assert Run(tmp_path / "results.json", "cuda", float("inf")).missing(todo) == [("lost", "train")]


def test_the_time_is_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(zoo, "GRACE", 0.5)
    run = Run(tmp_path / "results.json", "cuda", 1 / 60)
    began = time.monotonic()
    run.apart([("a", "train"), ("hangs", "train"), ("b", "train")], 1)
    assert time.monotonic() - began < 10 and run.is_over()
    assert list(run.records) == ["a/train"]


def test_modes_are_run_in_the_order_given() -> None:
    found = cases(parser().parse_args(["--all", "--modes", "freeze", "no_grad"]))
    assert [mode for _, mode in found] == sorted(mode for _, mode in found)
    assert {name for name, mode in found if mode == "freeze"} == {name for name in zoo.MODELS if "freeze" in modes(name)}
    assert cases(parser().parse_args(["gan", "--modes", "freeze"])) == [("gan", "freeze")]


def test_a_problem_moves_with_all_its_tensors() -> None:
    inputs = {"x": torch.zeros(2).requires_grad_(), "pair": (torch.zeros(2), 3)}
    problem = moved(Problem(nn.Linear(2, 2), inputs, ({"x": torch.zeros(4), "pair": (torch.zeros(4), 3)},)), "meta")
    assert problem.inputs["x"].requires_grad and problem.inputs["pair"][1] == 3
    assert {p.device.type for p in problem.module.parameters()} == {"meta"}
    assert {device_of(given).type for given in (problem.inputs, *problem.more)} == {"meta"}
    assert problem.inputs["pair"][0].is_meta and problem.more[0]["pair"][0].is_meta
