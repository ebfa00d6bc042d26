"""The benchmark of early launches runs, and says what it compared."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from typer import Typer
from typer.testing import CliRunner

from benchmarks import early_launch

pytest.importorskip("transformers")


def test_both_ways_are_run_and_compared(tmp_path: Path) -> None:
    app, out = Typer(pretty_exceptions_enable=False), tmp_path / "e.json"
    app.command()(early_launch.main)
    arguments = [
        "--tiny",
        "--device",
        "cpu",
        "--workloads",
        "bert-base-b1",
        "--calls",
        "1",
        "--rounds",
        "2",
        "--out",
        str(out),
    ]
    result = CliRunner().invoke(app, arguments)
    assert result.exit_code == 0, result.output
    (entry,) = json.loads(out.read_text())["workloads"]
    assert list(entry["ways"]) == [early_launch.IN_TURN, early_launch.EARLY]
    assert entry["equal"] is True and all(way["loop"] > 0 for way in entry["ways"].values())
