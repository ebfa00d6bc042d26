"""The benchmarks of calibration and of quantized models, on a layer: what they compare is what they say."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

pytest.importorskip("triton")

from benchmarks import calibration, models, quantized_models
from benchmarks.workload import Sizes, Workload
from fxopt.report.cases import Case


def _layer(sizes: Sizes, device: torch.device, dtype: torch.dtype) -> Case:
    return Case(torch.nn.Linear(sizes["width"], 32).eval().to(device, dtype), (torch.randn(4, sizes["width"], dtype=dtype),))


LAYER = Workload("layer", "model", _layer, {"width": 64}, {"width": 32})


def test_calibrations_passes_and_eager_ones_are_timed() -> None:
    found = calibration.measured(LAYER, torch.device("cpu"), torch.float32, 2, tiny=True)
    assert found["layers"] == 1 and found["batches"] == 2
    assert all(found[what] > 0 for what in ("eager seconds", "calibrated seconds", "first batch seconds"))


def test_each_precision_has_a_time_and_an_error(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(models, "MODELS", (LAYER,))
    quantized_models.main(tmp_path, "cpu", "float32", "layer", "int8,int4-weight", seconds=0.01, budget=0.5, minutes=1.0)
    (case,) = json.loads((tmp_path / "quantized_models_cpu.json").read_text())["cases"]
    found = case["contenders"]
    searched = found.pop("searched")
    assert searched["seconds"] > 0 and (searched["refused"] is None) == (searched["high"] == [])
    assert list(found) == ["eager", "own", "int8", "int4-weight"]
    assert found["own"]["error"] < 1e-5 < found["int8"]["error"] < found["int4-weight"]["error"] < 0.3
    assert all(entry["seconds"] > 0 and entry["high"] == [] for entry in found.values())


def test_an_error_is_relative_to_all_outputs() -> None:
    exact = torch.tensor([3.0]), torch.tensor([4.0]), torch.tensor([7])
    assert quantized_models.relative_norm((torch.tensor([3.0]), torch.tensor([4.5]), torch.tensor([8])), exact) == 0.1
