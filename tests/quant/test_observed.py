"""Observers of rows and moving averages: what they find, how they merge, what methods make of them."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from fxopt.errors import CalibrationError
from fxopt.ir.observer_ops import exponent_histogram
from fxopt.quant.calibrate import calibrate
from fxopt.quant.observers import MOVING, Range
from fxopt.quant.table import Calibration, LayerRange


def _model() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(16, 24), nn.ReLU(), nn.Linear(24, 8)).eval()


def _data() -> list[Tensor]:
    torch.manual_seed(1)
    return [torch.randn(40, 16) * size for size in (1.0, 2.0, 0.5, 3.0)]


def _calibrated(data: list[Tensor], **options: Any) -> Calibration:
    torch.compiler.reset()
    return calibrate(_model(), data, progress=False, **options)


def test_rows_are_counted_by_their_largest_magnitude() -> None:
    found = _calibrated(_data(), observe=("rows",))
    (first, second), x = found.layers, torch.cat(_data())
    assert first.seen is not None and first.seen.rows is not None and first.seen.average is None
    assert torch.equal(first.seen.rows, exponent_histogram(x.abs().amax(1)))
    assert second.seen is not None and second.seen.rows is not None and int(second.seen.rows.sum()) == len(x)


def test_averages_are_torchs_moving_ones() -> None:
    """As torch.ao's MovingAverageMinMaxObserver has them, but begun at zero and divided by the sum of weights."""
    found = _calibrated(_data(), observe=("average",))
    low = high = weight = 0.0
    for x in _data():
        low, high = low + MOVING * (float(x.min()) - low), high + MOVING * (float(x.max()) - high)
        weight += MOVING * (1.0 - weight)
    first = found.layers[0].seen
    assert first is not None and first.average is not None
    torch.testing.assert_close(first.average, torch.tensor([low, high, weight], dtype=torch.float64), rtol=1e-6, atol=0)
    wide = found.with_method("average")
    assert wide.scale("0", "fp8") == pytest.approx(max(-low, high) / weight / 448, rel=1e-6)
    assert wide.scale("0", "fp8") < 0.8 * found.scale("0", "fp8")


def test_a_few_rows_are_clipped_whole() -> None:
    """One row in 400 is a hundred times as large: of all elements it is as rare, but rows are what is counted."""
    x = torch.randn(400, 16)
    x[7] *= 100.0
    found = _calibrated([x], method="rows")
    assert found.scale("0", "int8") * 127 < 8.0 and found.with_method("amax").scale("0", "int8") * 127 > 80.0


def test_parts_in_order_are_one_pass(tmp_path: Path) -> None:
    """By way of files, as several processes join theirs."""
    data = _data()
    whole = _calibrated(data, observe=("rows", "average"))
    for at, part in enumerate((data[:1], data[1:])):
        _calibrated(part, observe=("rows", "average")).save(tmp_path / f"{at}.fxcal")
    merged = Calibration.merge(*(Calibration.load(tmp_path / f"{at}.fxcal") for at in (0, 1)))
    for mine, theirs in zip(merged.layers, whole.layers, strict=True):
        assert mine.seen is not None and theirs.seen is not None
        assert mine.seen.rows is not None and theirs.seen.rows is not None
        assert torch.equal(mine.seen.rows, theirs.seen.rows) and torch.equal(mine.seen.histogram, theirs.seen.histogram)
        torch.testing.assert_close(mine.seen.average, theirs.seen.average, rtol=1e-12, atol=0)
    without = Calibration.merge(whole, _calibrated(data))
    with pytest.raises(CalibrationError, match="'0' was calibrated without it"):
        without.with_method("rows")


def test_methods_need_their_observers() -> None:
    found = _calibrated(_data()[:1])
    with pytest.raises(CalibrationError, match=r"observe=\('average',\)"):
        found.with_method("average")
    with pytest.raises(CalibrationError, match="did you mean 'rows'"):
        calibrate(_model(), _data(), observe=("row",))
    with pytest.raises(CalibrationError, match="not one string"):
        calibrate(_model(), _data(), observe="rows")


@pytest.mark.parametrize(
    ("part", "wrong", "words"),
    [
        ("rows", torch.zeros(5, dtype=torch.int64), "no int64"),
        ("average", torch.tensor([1.0, 0.0, 0.5], dtype=torch.float64), "moving average"),
        ("average", torch.tensor([0.0, 1.0, 0.0], dtype=torch.float64), "moving average"),
    ],
)
def test_files_with_nonsense_are_refused(part: str, wrong: Tensor, words: str, tmp_path: Path) -> None:
    x = torch.randn(5, 16)
    seen = replace(Range(x.amin(0), x.amax(0), exponent_histogram(x)), **{part: wrong})
    Calibration((LayerRange("a", "linear", (4, 16), "float32", seen),), 1).save(tmp_path / "a.fxcal")
    with pytest.raises(CalibrationError, match=words):
        Calibration.load(tmp_path / "a.fxcal")
