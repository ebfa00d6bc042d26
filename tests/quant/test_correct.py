"""Corrections of biases: the mean error goes, on data that they were not made of, and nothing is kept that does not help."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

import fxopt
from fxopt.errors import CalibrationError, OptionError
from fxopt.ir.observer_ops import exponent_histogram
from fxopt.quant.emulate import LayerCall, treated, with_table
from fxopt.quant.observers import Range
from fxopt.quant.table import Calibration, LayerRange


def _data(seed: int, mean: float) -> Tensor:
    torch.manual_seed(seed)
    return torch.randn(256, 64) * 0.3 + mean


def _table(x: Tensor) -> Calibration:
    seen = Range(x.amin(0), x.amax(0), exponent_histogram(x))
    return Calibration((LayerRange("0", "linear", (32, 64), "float32", seen),), 1)


def _model() -> nn.Sequential:
    torch.manual_seed(7)
    return nn.Sequential(nn.Linear(64, 32)).eval()


def _off(model: nn.Sequential, x: Tensor, table: Calibration, precision: str) -> Tensor:
    call = LayerCall("0", x, model[0].weight.detach(), model[0].bias.detach())
    return (with_table(call, precision, table, "0") - call.exact()).double()


@pytest.mark.parametrize("precision", ["int4-weight", "int8", "fp8"])
def test_the_mean_error_goes_on_other_data(precision: str) -> None:
    model = _model()
    plain = _table(_data(0, 1.0))
    table = fxopt.bias_corrected(plain, model, [_data(0, 1.0)], precision)
    before, after = (_off(model, _data(1, 1.0), t, precision) for t in (plain, table))
    assert float(after.mean(0).norm()) < 0.3 * float(before.mean(0).norm())
    assert float(after.norm()) < 0.9 * float(before.norm())
    assert table.refinement("0", precision) is not None


def test_errors_without_a_mean_are_left() -> None:
    """The mean of random errors is no correction: it would not help the other half of the rows."""
    model, x = _model(), _data(0, 0.0)
    x = torch.cat([x, -x])[torch.randperm(512)]
    table = fxopt.bias_corrected(_table(x), model, [x], "int8")
    assert table["0"].refined is None


def test_it_is_part_of_the_compiled_layer_and_follows_limits() -> None:
    model, x = _model(), _data(0, 1.0)
    clipped = fxopt.clipped(_table(x), model, "int4-weight")
    table = fxopt.bias_corrected(clipped, model, [x], "int4-weight")
    refined = table.refinement("0", "int4-weight")
    assert refined is not None and refined.correction is not None
    assert torch.equal(refined.limits, clipped["0"].refined.limits)  # type: ignore[union-attr]
    fast = torch.compile(model, backend="fxopt", options={"precision": "int4-weight", "calibration": table})
    call = LayerCall("0", x, model[0].weight.detach(), model[0].bias.detach())
    with torch.no_grad():
        torch.testing.assert_close(fast(x), with_table(call, "int4-weight", table, "0"), rtol=1e-4, atol=1e-4)
    again = fxopt.bias_corrected(table, model, [x], "int4-weight")
    torch.testing.assert_close(again["0"].refined.correction, refined.correction)  # type: ignore[union-attr]


def test_what_cannot_be_corrected_is_refused() -> None:
    table = _table(_data(0, 1.0))
    with pytest.raises(CalibrationError, match="no batch"):
        fxopt.bias_corrected(table, _model(), [])
    with pytest.raises(OptionError, match="did you mean 'int8'"):
        fxopt.bias_corrected(table, _model(), [_data(0, 1.0)], "int88")


def test_a_convolution_is_corrected_before_the_norm_behind_it() -> None:
    """And clipped, and its channels divided, all as emulated; the compiled norm is part of the convolution's scales."""
    torch.manual_seed(3)
    model = nn.Sequential(nn.Conv2d(8, 16, 3), nn.BatchNorm2d(16), nn.ReLU()).eval()
    with torch.no_grad():
        model[0].weight[:, 5] *= 0.05
        model[0].weight[0, 0, 0, 0] = 3.0
        model[1].weight.copy_(torch.rand(16) + 0.5)
        model[1].running_mean.copy_(torch.randn(16))
    x, other = ((torch.rand(32, 8, 9, 9) * torch.linspace(0.1, 3.0, 8)[:, None, None]) for _ in range(2))
    plain = fxopt.calibrate(model, [x], progress=False)
    table = fxopt.clipped(fxopt.smoothed(plain, model), model, "int8")
    corrected = fxopt.bias_corrected(table, model, [x], "int8")
    refined = corrected.refinement("0", "int8")
    assert refined is not None and refined.correction is not None and refined.limits is not None
    assert corrected.channels("0") is not None
    emulated = []
    for given in (table, corrected):
        with torch.no_grad(), treated(model, lambda call, given=given: with_table(call, "int8", given, "0")):
            emulated.append(model(other))
    torch.compiler.reset()
    fast = torch.compile(model, backend="fxopt", options={"precision": "int8", "calibration": corrected})
    with torch.no_grad():
        off = (fast(other) - emulated[1]).abs()
        exact = model(other)
    # Where the order of additions makes a value round the other way, one step of the activation is between the two.
    assert float(off.max()) < 0.05 and float(off.mean()) < 1e-5
    means = [float((e - exact).mean((0, 2, 3)).norm()) for e in emulated]
    assert means[1] < 0.5 * means[0]
