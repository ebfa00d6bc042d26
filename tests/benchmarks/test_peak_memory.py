"""The benchmark of peak memory, on CPU: its processes, its file and its table."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console
from typer.testing import CliRunner

from benchmarks import peak_memory
from benchmarks.peak_memory import Memory, app, measured, summary_table
from benchmarks.workload import Sizes, Workload
from fxopt.report.cases import Case

CPU = torch.device("cpu")


def test_the_plans_own_account_is_noted() -> None:
    case = Case(torch.nn.Linear(8, 8), (torch.randn(4, 8, requires_grad=True),), True, torch.randn(4, 8))
    record = measured(case, "fxopt", CPU)
    assert [name.split()[-1] for name in record["plan"]] == ["forward", "backward"]
    assert all(memory["peak"] > 0 for memory in record["plan"].values())


def _pretend(workload: Workload, sizes: Sizes, row: Memory, *_: Any) -> None:
    if row.contender == "eager":
        row.peak, row.reserved, row.held = 3 << 20, 4 << 20, 0
    else:
        row.skipped = "failed: no"


def test_file_and_table(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(peak_memory, "run_child", _pretend)
    out = tmp_path / "memory.json"
    given = ["--workloads", "gpt2,vit-b", "--contenders", "eager,fxopt", "--tiny", "--device", "cpu", "--out", str(out)]
    done = CliRunner().invoke(app, ["compare", *given])
    assert done.exit_code == 0, done.output
    cases = json.loads(out.read_text())["cases"]
    assert [c["workload"] for c in cases] == ["gpt2", "vit-b"]
    console = Console(width=120, record=True)
    console.print(summary_table(cases))
    text = console.export_text()
    assert "3 / 4 / 0" in text
    assert "failed" in text


def test_what_does_not_fit_is_left(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(peak_memory, "run_child", _pretend)
    out = tmp_path / "memory.json"
    given = ["--workloads", "gpt2", "--minutes", "0", "--tiny", "--device", "cpu", "--out", str(out)]
    assert CliRunner().invoke(app, ["compare", *given]).exit_code == 0
    assert not out.exists() or json.loads(out.read_text())["cases"] == []
