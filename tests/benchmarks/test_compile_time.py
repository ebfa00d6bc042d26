"""First calls in new processes, at tiny sizes on CPU."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
import typer
from typer.testing import CliRunner

from benchmarks import compile_time
from benchmarks.compile_time import FirstCall, choose, run_child, summarize
from benchmarks.first_call import first_call, own_share, phases_of
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
    workload = Workload("no-such-model", "model", lambda *_: pytest.fail("not here"), {}, {})
    row = FirstCall("fxopt", "cold")
    run_child(workload, {}, row, "cpu", "float32", limit=100)
    assert row.seconds is None
    assert row.skipped.startswith("failed: StopIteration")
    run_child(workload, {}, row, "cpu", "float32", limit=0.01)
    assert "took longer" in row.skipped


def _pretend(workload: Workload, sizes: Sizes, row: FirstCall, **_: Any) -> None:
    """One second warm, ten cold; fxopt in half the time."""
    row.seconds = (1.0 if row.cache == "warm" else 10.0) * (0.5 if row.contender == "fxopt" else 1.0)
    row.own_seconds = 0.1 if row.contender == "fxopt" else None


def test_a_run_is_resumed_and_summed_up(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(compile_time, "run_child", _pretend)
    app, out = typer.Typer(pretty_exceptions_enable=False), tmp_path / "c.json"
    app.command()(compile_time.main)
    arguments = ["--tiny", "--device", "cpu", "--batch", "1", "--warm-runs", "2", "--out", str(out), "--resume"]
    for names in ("vit-b", "vit-b,gpt2-train"):
        result = CliRunner().invoke(app, [*arguments, "--workloads", names])
        assert result.exit_code == 0, result.output
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
    twice = ["--workloads", "resnet50", "--cold-runs", "2", "--warm-runs", "0"]
    CliRunner().invoke(app, [*arguments, *twice], catch_exceptions=False)
    assert [(r["contender"], r["cache"]) for r in load(out)["cases"][2]["rows"]] == 2 * [
        ("inductor", "cold"),
        ("fxopt", "cold"),
    ]
    result = CliRunner().invoke(app, [*arguments, "--workloads", "bert-base", "--minutes", "0"])
    assert "0 of 1 workloads done" in result.output


def test_the_standard_workloads_exist() -> None:
    assert len(choose(compile_time.STANDARD)) == 8
    with pytest.raises(ValueError, match="resnet50-train"):
        choose("bogus")


def test_failures_have_no_place_in_medians() -> None:
    rows = [FirstCall("fxopt", "warm", seconds=s, own_seconds=s).to_dict() for s in (1.0, 3.0)]
    rows.append(FirstCall("fxopt", "warm", skipped="failed").to_dict())
    summary = summarize([{"workload": "m", "rows": rows}])
    assert summary["m"] == {"fxopt cold": None, "fxopt warm": 2.0, "fxopt's own share, warm": 2.0}
