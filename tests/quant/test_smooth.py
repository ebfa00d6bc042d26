"""Divisors of channels: what they are made of, that they change no exact value, and what they are worth."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

import fxopt
from fxopt.errors import CalibrationError, OptionError
from fxopt.quant.emulate import LayerCall, quantized
from fxopt.quant.observers import Range
from fxopt.quant.table import Calibration, LayerRange


def _given() -> Tensor:
    """Two of 32 channels are fifty times as large as the others; one is always zero."""
    torch.manual_seed(0)
    x = torch.randn(64, 32)
    x[:, [5, 9]] *= 50.0
    x[:, 7] = 0.0
    return x


def _range(x: Tensor) -> Range:
    return Range(x.amin(0), x.amax(0), torch.ops.fxopt.exponent_histogram(x))


class _Layers(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(1)
        self.q, self.k, self.other = nn.Linear(32, 32), nn.Linear(32, 48), nn.Linear(32, 16)
        with torch.no_grad():
            self.k.weight[:, 3] = 4.0

    def forward(self, x: Tensor) -> Tensor:
        return torch.cat([self.q(x), self.k(x), self.other(x * 0.5)], -1)


def _calibration(model: nn.Module, x: Tensor) -> Calibration:
    given = {"q": x, "k": x, "other": x * 0.5}
    layers = [LayerRange(n, "linear", tuple(getattr(model, n).weight.shape), "float32", _range(g)) for n, g in given.items()]
    return Calibration(tuple(layers), 1)


def test_divisors_are_those_of_the_formula_to_a_power_of_two() -> None:
    model, x = _Layers(), _given()
    channels = fxopt.smoothed(_calibration(model, x), model, 0.5).channels("other")
    assert channels is not None
    ideal = (x.abs().amax(0) * 0.5 / model.other.weight.detach().abs().amax(0)).sqrt()
    ratio = channels / ideal
    used = x.abs().amax(0) > 0
    assert float(ratio[used].max() / ratio[used].min()) <= 2.0 + 1e-5
    assert float(channels[7]) == 1.0 and bool((channels.frexp().mantissa == 0.5).all())


def test_layers_that_are_given_the_same_share_divisors() -> None:
    model = _Layers()
    table = fxopt.smoothed(_calibration(model, _given()), model)
    q, k, other = (table.channels(name) for name in ("q", "k", "other"))
    assert q is not None and k is not None and other is not None
    assert torch.equal(q, k) and not torch.equal(q, other)


def test_what_was_changed_reaches_as_far_as_the_divided_input() -> None:
    model, x = _Layers(), _given()
    table = fxopt.smoothed(_calibration(model, x), model)
    channels = table.channels("q")
    assert channels is not None
    assert table.scale("q", "int8") == pytest.approx(float((x / channels).abs().max()) / 127)
    assert table.digest() != _calibration(model, x).digest()


@pytest.mark.parametrize("precision", ["int8", "int4-weight"])
def test_outliers_cost_less(precision: str) -> None:
    """Compiled, against float64; weight-only layers get the divisors, too, exactly."""
    model, x = _Layers().eval(), _given()
    plain = _calibration(model, x)
    with torch.no_grad():
        exact = model.double()(x.double())
    model.float()
    errors = []
    for table in (plain, fxopt.smoothed(plain, model)):
        fast = torch.compile(model, backend="fxopt", options={"precision": precision, "calibration": table})
        with torch.no_grad():
            result = fast(x)
        errors.append(float((result.double() - exact).norm() / exact.norm()))
        call = LayerCall("q", x, model.q.weight, model.q.bias)
        scale = table.scale("q", precision) if precision == "int8" else None
        torch.testing.assert_close(result[:, :32], quantized(call, precision, scale, table.channels("q")).detach())
        torch.compiler.reset()
    assert errors[1] < {"int8": 0.6, "int4-weight": 1.0}[precision] * errors[0]


def test_a_table_keeps_them(tmp_path: Path) -> None:
    model = _Layers()
    table = fxopt.smoothed(_calibration(model, _given()), model)
    table.save(tmp_path / "a.fxcal")
    read = Calibration.load(tmp_path / "a.fxcal")
    for name in table.names():
        found, own = read.channels(name), table.channels(name)
        assert found is not None and own is not None and torch.equal(found, own)
    assert read.digest() == table.digest()
    assert Calibration.merge(table, _calibration(model, _given())).channels("q") is not None


@pytest.mark.parametrize("wrong", [torch.full((32,), 3.0), torch.zeros(32), torch.ones(31), torch.ones(32).double()])
def test_a_table_with_others_is_refused(wrong: Tensor, tmp_path: Path) -> None:
    table = _calibration(_Layers(), _given())
    layers = (replace(table.layers[0], channels=wrong), *table.layers[1:])
    replace(table, layers=layers).save(tmp_path / "a.fxcal")
    with pytest.raises(CalibrationError, match="layer 'q': its channels"):
        Calibration.load(tmp_path / "a.fxcal")


def test_merging_different_ones_is_refused() -> None:
    model = _Layers()
    one, other = (fxopt.smoothed(_calibration(model, _given()), model, strength) for strength in (0.0, 1.0))
    with pytest.raises(CalibrationError, match="channels of layer 'q'"):
        Calibration.merge(one, other)


def test_what_has_no_weight_here_stays() -> None:
    model = _Layers()
    table = _calibration(model, _given()).with_layer("k", scale=0.5)
    found = fxopt.smoothed(table, model)
    assert found.channels("k") is None and found.channels("q") is not None
    with pytest.raises(CalibrationError, match="none of the calibration's layers"):
        fxopt.smoothed(table, nn.Linear(3, 3))
    with pytest.raises(OptionError, match="strength"):
        fxopt.smoothed(table, model, 1.5)
