"""Contenders compiled ahead of timing: order, caches, what a dead worker costs, or a lack of time. Workers are stand-ins."""

from __future__ import annotations

import json
import time
from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console

from benchmarks import ahead
from benchmarks.ahead import compile_and_measure
from benchmarks.budget import Budget
from benchmarks.crew import Crew
from benchmarks.dealing import Pool
from benchmarks.models import MODELS
from benchmarks.results import Results, load
from benchmarks.workload import Job
from fxopt.report.contenders import pick

CPU = torch.device("cpu")
CONTENDERS = pick("eager,inductor,inductor-max-autotune,fxopt,fxopt-freeze")

# Compiles by a file in the caches, and times what it finds there. Says when it did what.
WORKER = """
import json, os, sys, time
print('{"ready": true}', flush=True)
log = sys.argv[1]
for line in sys.stdin:
    case = json.loads(line)
    ahead, rows = case.get("ahead", False), []
    with open(log, "a") as file:
        file.write(json.dumps([case["workload"], case["contenders"], ahead, sorted(case["without"])]) + "\\n")
    for name in case["contenders"]:
        print(json.dumps({"progress": "compiling " + name, "contender": name}), flush=True)
        row = {"contender": name, "mode": "default", "frozen": False, "skipped": case["without"].get(name, "")}
        place = f"{case['caches']}/{name}"
        if ahead and not row["skipped"]:
            if case["workload"] == "bert-base" and name == "inductor":
                os.kill(os.getpid(), 9)
            os.makedirs(place)
            row |= {"cache": "cold", "compile_seconds": 7.0, "contests": {"forward r0": {"looped": 1e-5}}}
        elif not row["skipped"]:
            warm = os.path.exists(place)
            row |= {"cache": "warm" if warm else "", "seconds": 0.1, "compile_seconds": 0.5, "choices": {"triton": 3}}
        rows.append(row)
    print(json.dumps({"rows": rows, "broken": ""}), flush=True)
"""


@dataclass(frozen=True)
class StandIns(Crew):
    """Whose workers write to `log`."""

    log: str = ""

    def pool(
        self, folder: str, processes: int, deadline: float, limit: float, console: Console, cores: Collection[int] = ()
    ) -> Pool:
        made = super().pool(folder, processes, deadline, limit, console, cores)
        made.arguments = ("-c", WORKER, self.log)
        return made


Asked = tuple[str, list[str], bool, list[str]]
"""A workload, its contenders, whether they were to be compiled only, and which were left out."""


def run(tmp_path: Path, *names: str, processes: int = 2) -> tuple[dict[str, dict[str, Any]], list[Asked]]:
    """Rows by case and contender of the results file that is resumed, and what the workers were asked for."""
    log, out = tmp_path / "log", tmp_path / "r.json"
    log.write_text("")
    todo: list[Job] = [(w, w.sizes(True), "float32") for w in MODELS if w.name in names]
    results = Results(out, CPU, {}, resume=True)
    budget = Budget(time.monotonic() + 60, 30.0, slow=True)
    crew = StandIns("benchmarks.run", CPU, processes=processes, gpus=1, log=str(log))
    compile_and_measure(crew, todo, CONTENDERS, results, budget, 0.1)
    results.save()
    cases = {case["workload"]: {row["contender"]: row for row in case["rows"]} for case in load(out)["cases"]}
    return cases, [json.loads(line) for line in log.read_text().splitlines()]


def test_a_case_is_timed_with_all_caches_after_its_last_compilation(tmp_path: Path) -> None:
    cases, asked = run(tmp_path, "vit-b", "vit-b-train", processes=1)
    assert list(cases) == ["vit-b", "vit-b-train"]
    for rows in cases.values():
        assert set(rows) == {c.name for c in CONTENDERS}
        assert {row["cache"] for name, row in rows.items() if name != "eager"} <= {"cold", ""}
    inference = cases["vit-b"]
    assert (inference["fxopt"]["compile_seconds"], inference["fxopt"]["choices"]) == (7.0, {"triton": 3})
    assert inference["fxopt"]["contests"] == {"forward r0": {"looped": 1e-5}}
    assert inference["fxopt"]["seconds"] == inference["eager"]["seconds"] == 0.1
    compiled = [(name, contenders[0]) for name, contenders, early, _ in asked if early]
    slow = "inductor-max-autotune"
    assert compiled[0] == ("vit-b-train", "fxopt") and compiled[-2:] == [("vit-b-train", slow), ("vit-b", slow)]
    assert ("vit-b-train", "fxopt-freeze") not in compiled and len(compiled) == 7
    for name in cases:
        mine = [at for at, (workload, _, early, _) in enumerate(asked) if workload == name and early]
        assert asked.index([name, [c.name for c in CONTENDERS], False, []]) > max(mine)  # type: ignore[arg-type]


def test_a_compiler_that_dies_costs_its_contender(tmp_path: Path) -> None:
    cases, _ = run(tmp_path, "bert-base", "vit-b")
    failed = cases["bert-base"].pop("inductor")
    assert failed["skipped"].startswith("failed: the process ended with -9") and failed["seconds"] is None
    assert all(row["seconds"] == 0.1 for row in cases["bert-base"].values())
    assert all(row["seconds"] == 0.1 for row in cases["vit-b"].values())
    again, _ = run(tmp_path, "bert-base", "vit-b")
    assert again["bert-base"]["inductor"] == failed  # it is an answer


def test_what_time_ran_out_for_is_made_up_for_by_a_later_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ahead, "COMPILING", 0.0)
    cases, _ = run(tmp_path, "vit-b")
    assert {name for name, row in cases["vit-b"].items() if row["seconds"]} == {"eager"}
    assert "not compiled" in cases["vit-b"]["fxopt"]["skipped"]
    monkeypatch.undo()
    cases, _ = run(tmp_path, "vit-b")
    assert all(row["seconds"] for row in cases["vit-b"].values())
    cases, asked = run(tmp_path, "vit-b", "gpt2")
    assert set(cases) == {"vit-b", "gpt2"}
    assert {name for name, *_ in asked} == {"gpt2"}


def test_slow_compilations_are_asked_for() -> None:
    workload = next(w for w in MODELS if w.name == "vit-b")
    entry = ahead._entry((workload, {}, "float32"), CONTENDERS, Budget(time.monotonic() + 60, 30.0, False), 1.0, "caches")
    assert "--slow" in entry.ask["without"]["inductor-max-autotune"]
    assert entry.waiting == {"inductor", "fxopt", "fxopt-freeze"}
