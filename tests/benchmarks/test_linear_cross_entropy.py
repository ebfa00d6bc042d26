"""The benchmark of a language model's head: its file, its judge, and how it reads memory."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner

pytest.importorskip("triton")

from benchmarks.linear_cross_entropy import (
    app,
    chunk_products,
    errors,
    exact_values,
    make_inputs,
    peak_resident,
    training_step,
)

CPU = torch.device("cpu")


def test_errors_are_relative_to_float64() -> None:
    inputs = make_inputs(9, 4, 33, torch.float32, CPU)
    loss = training_step("eager", inputs)()
    found = errors(exact_values(inputs), inputs, loss)
    assert found.keys() == {"loss", "hidden", "weight"}
    assert max(found.values()) < 1e-5
    assert errors(exact_values(inputs), inputs, loss * 1.5)["loss"] == pytest.approx(0.5, rel=1e-4)


def test_peak_of_memory_that_is_freed_again() -> None:
    assert 60e6 < peak_resident(lambda: torch.ones(16 << 20).sum()) < 90e6


def test_the_file_that_it_writes(tmp_path: Path) -> None:
    sizes = ["--rows", "8", "--features", "4", "--vocabulary", "32", "--seconds", "0.01", "--contenders", "eager,liger"]
    done = CliRunner().invoke(
        app, ["compare", "--out", str(tmp_path), "--device", "cpu", "--contenders", "eager,liger", *sizes]
    )
    assert done.exit_code == 0, done.output
    document = json.loads((tmp_path / "linear_cross_entropy_cpu.json").read_text())
    (case,) = document["cases"]
    (entry,) = case["contenders"]
    assert entry["contender"] == "eager"
    assert entry["seconds"] > 0
    assert case["sizes"] == {"rows": 8, "features": 4, "vocabulary": 32}


def test_products_with_the_last_classes_apart_are_those_over_all(tmp_path: Path) -> None:
    steps = chunk_products(6, 16, 21, torch.float64, CPU)
    for name in ("logits", "hidden"):
        whole, apart = (steps[f"{name}, {way}"]().clone() for way in ("whole", "apart"))
        torch.testing.assert_close(apart[:, :16], whole[:, :16])
    sizes = ["--rows", "8", "--features", "8", "--vocabulary", "9", "--seconds", "0.01"]
    done = CliRunner().invoke(app, ["products", "--out", str(tmp_path), "--device", "cpu", "--dtype", "float32", *sizes])
    assert done.exit_code == 0, done.output
    document = json.loads((tmp_path / "linear_cross_entropy_products_cpu.json").read_text())
    assert len(document["products"]) == 6
