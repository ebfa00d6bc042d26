"""First calls in new processes, at tiny sizes on CPU."""

from __future__ import annotations

import json
import os
import threading
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
import typer
from click.testing import Result
from typer.testing import CliRunner

from benchmarks import compile_time
from benchmarks.compile_time import FirstCall, run_child, summarize
from benchmarks.first_call import first_call, own_share, phases_of
from benchmarks.lanes import Lane
from benchmarks.models import choose
from benchmarks.results import load
from benchmarks.workload import Sizes, Workload
from fxopt.journal import Journal
from fxopt.report.cases import Case

CPU = torch.device("cpu")


@pytest.mark.usefixtures("fresh_cache")  # a warm call has other phases
def test_a_first_call_knows_its_phases(tmp_path: Path) -> None:
    torch.compiler.reset()
    x = torch.randn(8, 8, requires_grad=True)
    case = Case(lambda x: F.gelu(x), (x,), True, torch.randn(8, 8))
    record = first_call(case, "fxopt", CPU, tmp_path / "stacks")
    torch.compiler.reset()
    json.dumps(record)
    assert record["seconds"] > record["own_seconds"] > 0
    assert record["second_call"] < record["seconds"]
    assert record["own_seconds"] == pytest.approx(own_share(record["phases"]))
    assert {"normalize", "plan cache"} <= set(record["phases"])
    assert record["torch_phases"]
    assert record["from_eager"] < 1e-5
    assert record["retreats"] == []
    stacks = dict(line.rsplit(" ", 1) for line in (tmp_path / "stacks").read_text().splitlines())
    assert any("compiler.compile_graph;" in stack for stack in stacks)
    assert 0 < sum(map(float, stacks.values())) < 2000 * record["seconds"]


def test_phases_add_up_without_their_parts() -> None:
    capture = Journal("capture", passes=[("attention", 1, 0.25)])
    graph = Journal("graph 0 forward", passes=[("fold", 1, 0.5)], seconds={"kernels": 2.0, "kernels: printing": 1.5})
    phases = phases_of([capture, graph, graph])
    assert phases == {"early passes": 0.25, "kernels": 4.0, "kernels: printing": 3.0}
    assert own_share(phases) == 4.25


def test_a_child_that_fails_says_why() -> None:
    workload = Workload("minilm", "model", lambda *_: pytest.fail("not here"), {}, {})
    row = FirstCall("fxopt", "cold")
    run_child(workload, {}, row, "cpu", "float32", limit=100, environment={})
    assert row.seconds is None
    assert row.skipped == "failed: KeyError: 'batch'"
    run_child(workload, {}, row, "cpu", "float32", limit=0.01, environment={})
    assert "took longer" in row.skipped


def _pretend(workload: Workload, sizes: Sizes, row: FirstCall, **_: Any) -> None:
    """One second warm, ten cold; fxopt in half the time."""
    row.seconds = (1.0 if row.cache == "warm" else 10.0) * (0.5 if row.contender == "fxopt" else 1.0)
    row.own_seconds = 0.1 if row.contender == "fxopt" else None


def _invoke(arguments: list[str], out: Path) -> Result:
    app = typer.Typer(pretty_exceptions_enable=False)
    app.command()(compile_time.main)
    common = ["--tiny", "--device", "cpu", "--batch", "1", "--out", str(out), "--resume"]
    return CliRunner().invoke(app, [*common, *arguments], catch_exceptions=False)


def _rows(out: Path, workload: str) -> list[dict[str, Any]]:
    return next(c["rows"] for c in load(out)["cases"] if c["workload"] == workload)


def test_a_run_is_resumed_and_summed_up(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(compile_time, "run_child", _pretend)
    out = tmp_path / "c.json"
    for names in ("vit-b", "vit-b,gpt2-train"):
        assert _invoke(["--warm-runs", "2", "--workloads", names], out).exit_code == 0
    data = load(out)
    assert [c["workload"] for c in data["cases"]] == ["vit-b", "gpt2-train"]
    assert data["cases"][0]["sizes"]["batch"] == 1
    order = [(r["contender"], r["cache"]) for r in data["cases"][0]["rows"]]
    assert order == [("inductor", "cold"), ("fxopt", "cold"), *(2 * [("inductor", "warm"), ("fxopt", "warm")])]
    assert data["summary"]["vit-b"] == {
        "inductor cold": 10.0,
        "inductor warm": 1.0,
        "fxopt cold": 5.0,
        "fxopt warm": 0.5,
        "fxopt's own share, warm": 0.1,
    }
    _invoke(["--workloads", "resnet50", "--cold-runs", "2", "--warm-runs", "0"], out)
    assert [(r["contender"], r["cache"]) for r in _rows(out, "resnet50")] == 2 * [("inductor", "cold"), ("fxopt", "cold")]
    result = _invoke(["--workloads", "bert-base", "--minutes", "0"], out)
    assert "0 of 1 workloads done" in result.output


def test_workloads_run_side_by_side_longest_first(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    begun: list[str] = []
    meet = threading.Barrier(2, timeout=60)

    def pretend(workload: Workload, sizes: Sizes, row: FirstCall, environment: dict[str, str], **more: Any) -> None:
        if row.contender == "inductor":
            begun.append(workload.name)
            meet.wait()
        assert Path(environment["FXOPT_CACHE_DIR"]).parent.name == row.contender
        row.cores = len(os.sched_getaffinity(0))
        _pretend(workload, sizes, row)

    monkeypatch.setattr(compile_time, "run_child", pretend)
    monkeypatch.setattr(compile_time, "lanes", lambda *_: 2 * [Lane(frozenset([min(os.sched_getaffinity(0))]), {})])
    names = ["vit-b", "gpt2", "vit-b-train", "gpt2-train"]
    result = _invoke(["--workloads", ",".join(names), "--processes", "2", "--warm-runs", "0"], out := tmp_path / "c.json")
    assert "4 of 4 workloads done" in result.output and "cores: 1" in result.output
    assert sorted(begun[:2]) == ["gpt2-train", "vit-b-train"]
    assert [c["workload"] for c in load(out)["cases"]] == names


def test_what_was_timed_when_time_was_up_is_kept_and_done_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    now = 0.0
    monkeypatch.setattr(compile_time, "time", SimpleNamespace(monotonic=lambda: now))

    def pretend(workload: Workload, sizes: Sizes, row: FirstCall, limit: float, **_: Any) -> None:
        nonlocal now
        now += min(25.0, limit)
        row.seconds, row.skipped = (1.0, "") if limit > 25.0 else (None, "failed: took longer")

    monkeypatch.setattr(compile_time, "run_child", pretend)
    out = tmp_path / "c.json"
    arguments = ["--workloads", "vit-b,gpt2", "--minutes"]
    assert "0 of 2 workloads done" in _invoke([*arguments, "1"], out).output
    (cut,) = load(out)["cases"]
    assert cut["unfinished"] and [r["contender"] for r in cut["rows"]] == ["inductor", "fxopt"]
    assert "2 of 2 workloads done" in _invoke([*arguments, "10"], out).output
    assert [(c["workload"], len(c["rows"])) for c in load(out)["cases"]] == [("vit-b", 4), ("gpt2", 4)]
    assert not any(c.get("unfinished") for c in load(out)["cases"])
    _invoke(["--workloads", "resnet50", "--limit", "60"], out)
    reasons = [r["skipped"] for r in _rows(out, "resnet50")]
    assert reasons == ["", "", "failed: took longer", "failed: the workload took longer than 60 s"]


def test_the_standard_workloads_exist() -> None:
    assert len(choose(compile_time.STANDARD)) == 8
    with pytest.raises(ValueError, match="resnet50-train"):
        choose("bogus")


def test_failures_have_no_place_in_medians() -> None:
    rows = [FirstCall("fxopt", "warm", seconds=s, own_seconds=s).to_dict() for s in (1.0, 3.0)]
    rows.append(FirstCall("fxopt", "warm", skipped="failed").to_dict())
    summary = summarize([{"workload": "m", "rows": rows}])
    assert summary["m"] == {"fxopt cold": None, "fxopt warm": 2.0, "fxopt's own share, warm": 2.0}
