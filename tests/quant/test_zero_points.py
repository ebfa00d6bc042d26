"""Integers whose range lies on one side of zero: which layers have a zero point, its scale, and what it is worth."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

import fxopt
from fxopt.errors import CalibrationError
from fxopt.ir.observer_ops import exponent_histogram
from fxopt.quant.emulate import LayerCall, with_table
from fxopt.quant.observers import Range
from fxopt.quant.table import Calibration, LayerRange


def _table(x: Tensor, kind: str = "linear", method: str = "amax") -> Calibration:
    seen = Range(x.amin(0), x.amax(0), exponent_histogram(x))
    return Calibration((LayerRange("0", kind, (16, x.shape[1]), "float32", seen),), 1, method)


def _activated() -> Tensor:
    torch.manual_seed(0)
    return torch.nn.functional.gelu(torch.randn(200, 32) * 2)


def test_the_range_is_covered_from_end_to_end() -> None:
    x = _activated()
    table = _table(x)
    low, high = float(x.min()), float(x.max())
    scale, zero = table.scale("0", "int8"), table.zero_point("0", "int8")
    assert scale == pytest.approx((high - low) / 255) and -128 <= zero < -100
    assert round(low / scale) + zero >= -129 and round(high / scale) + zero <= 128


@pytest.mark.parametrize(
    "table",
    [
        _table(torch.randn(100, 32)),
        _table(_activated(), kind="convolution"),
        _table(_activated()).with_layer("0", symmetric=True),
        _table(_activated()).with_layer("0", scale=0.1),
    ],
)
def test_others_have_zero_in_the_middle(table: Calibration) -> None:
    assert table.zero_point("0", "int8") == 0
    assert table["0"].scale is not None or table.scale("0", "int8") == table["0"].amax / 127


def test_floats_have_no_zero_point() -> None:
    table = _table(_activated())
    assert table.zero_point("0", "fp8") == 0 and table.scale("0", "fp8") == table["0"].amax / 448


@pytest.mark.parametrize("x", [torch.rand(50, 32) + 3.0, -torch.rand(50, 32) - 3.0])
def test_zero_is_always_a_value(x: Tensor) -> None:
    table = _table(x)
    assert table.zero_point("0", "int8") == (-128 if float(x.max()) > 0 else 127)
    assert table.scale("0", "int8") == pytest.approx(float(x.abs().max()) / 255)


@pytest.mark.parametrize("method", ["percentile", "mse", "entropy"])
def test_methods_clip_the_long_side(method: str) -> None:
    x = _activated().repeat(80, 1)
    x[0, 0] = 40.0
    table = _table(x, method=method)
    assert table.zero_point("0", "int8") < -64 and table.scale("0", "int8") * 255 < 20.0


def test_steps_are_finer_and_errors_less_in_emulation_and_compiled() -> None:
    x = _activated()
    model = nn.Sequential(nn.Linear(32, 16)).eval()
    call = LayerCall("0", x, model[0].weight.detach(), model[0].bias.detach())
    errors = []
    for symmetric in (True, None):
        table = _table(x).with_layer("0", symmetric=symmetric)
        compiled = torch.compile(model, backend="fxopt", options={"precision": "int8", "calibration": table})
        with torch.no_grad():
            result = compiled(x)
        torch.compiler.reset()
        torch.testing.assert_close(result, with_table(call, "int8", table, "0"), rtol=1e-4, atol=1e-4)
        errors.append(float((result - call.exact()).norm()))
    assert errors[1] < 0.75 * errors[0]


def test_merged_layers_keep_their_values() -> None:
    """Layers of one operand are one product: their offsets are joined."""

    class Pair(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Linear(32, 16), nn.Linear(32, 16, bias=False)

        def forward(self, x: Tensor) -> Tensor:
            return self.a(x) + self.b(x).tanh()

    x, model = _activated().bfloat16(), Pair().eval().bfloat16()
    (seen,) = (layer.seen for layer in _table(x.float()).layers)
    table = Calibration(tuple(LayerRange(n, "linear", (16, 32), "bfloat16", seen) for n in "ab"), 1)
    parts = [LayerCall(n, x, getattr(model, n).weight.detach(), getattr(model, n).bias) for n in "ab"]
    a, b = (with_table(call, "int8", table, call.name) for call in parts)
    compiled = torch.compile(model, backend="fxopt", options={"precision": "int8", "calibration": table})
    with torch.no_grad():
        result = compiled(x)
    # What lies in the middle of a step, as many bfloat16 values do, may be rounded either way.
    assert float((result - (a + b.tanh()).detach()).float().norm() / result.float().norm()) < 1e-2


def test_a_table_keeps_what_its_user_says(tmp_path: Path) -> None:
    given = _table(torch.randn(100, 32)).with_layer("0", symmetric=False)
    assert given.zero_point("0", "int8") != 0
    given.save(tmp_path / "a.fxcal")
    read = Calibration.load(tmp_path / "a.fxcal")
    assert read["0"].symmetric is False and read.digest() == given.digest()
    assert Calibration.merge(_table(torch.randn(9, 32)), given)["0"].symmetric is False
    (tmp_path / "a.fxcal").write_text((tmp_path / "a.fxcal").read_text().replace('"symmetric": false', '"symmetric": 3'))
    with pytest.raises(CalibrationError, match="symmetric is true, false or null"):
        Calibration.load(tmp_path / "a.fxcal")


def test_fitting_tries_both_and_leaves_what_its_user_says() -> None:
    """Values on both sides, more on one: by range alone zero would be in the middle."""
    torch.manual_seed(0)
    x = torch.randn(300, 32).clamp(-2.0, 2.4)
    model = nn.Sequential(nn.Linear(32, 16)).eval()
    table = _table(x)
    fitted = fxopt.activation_aware(table, model, [x], "int8")
    call = LayerCall("0", x, model[0].weight.detach(), model[0].bias.detach())
    off = [float((with_table(call, "int8", t, "0") - call.exact()).norm()) for t in (table, fitted)]
    assert fitted["0"].symmetric is not None and off[1] <= off[0]
    kept = replace(table, layers=(replace(table.layers[0], symmetric=True),))
    assert fxopt.activation_aware(kept, model, [x], "int8")["0"].symmetric is True
