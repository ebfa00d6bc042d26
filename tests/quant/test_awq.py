"""Divisors that are fitted to real rows."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

import fxopt
from fxopt.errors import CalibrationError, OptionError
from fxopt.ir.observer_ops import exponent_histogram
from fxopt.quant.emulate import LayerCall, with_table
from fxopt.quant.observers import Range
from fxopt.quant.table import Calibration, LayerRange


class _Model(nn.Module):
    """`plain` is given channels of one size, `spread` and `beside` some that are forty times as large."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.plain, self.spread, self.beside = nn.Linear(64, 64), nn.Linear(64, 32), nn.Linear(64, 16)
        self.gain = torch.ones(64)
        self.gain[[3, 40]] = 40.0

    def forward(self, x: Tensor) -> Tensor:
        y = torch.tanh(self.plain(x)) * self.gain
        return torch.cat([self.spread(y), self.beside(y)], -1)


def _loader() -> list[Tensor]:
    torch.manual_seed(1)
    return [torch.randn(100, 64) for _ in range(2)]


def _given(model: _Model) -> dict[str, Tensor]:
    with torch.no_grad():
        x = torch.cat(_loader())
        y = torch.tanh(model.plain(x)) * model.gain
    return {"plain": x, "spread": y, "beside": y}


def _calibration(model: _Model) -> Calibration:
    layers = []
    for name, x in _given(model).items():
        seen = Range(x.amin(0), x.amax(0), exponent_histogram(x))
        layers.append(LayerRange(name, "linear", tuple(getattr(model, name).weight.shape), "float32", seen))
    return Calibration(tuple(layers), 2)


def _error(model: _Model, table: Calibration, name: str, precision: str) -> float:
    module = getattr(model, name)
    call = LayerCall(name, _given(model)[name], module.weight.detach(), module.bias.detach())
    return float((with_table(call, precision, table, name) - call.exact()).norm() / call.exact().norm())


@pytest.mark.parametrize("precision", ["int4-weight", "int8"])
def test_no_fixed_strength_is_better(precision: str) -> None:
    model = _Model().eval()
    plain = _calibration(model)
    fitted = fxopt.activation_aware(plain, model, _loader(), precision)
    fixed = [fxopt.smoothed(plain, model, strength) for strength in (0.0, 0.25, 0.5, 0.75, 1.0)]
    errors = [
        sum(_error(model, table, n, precision) ** 2 for n in ("spread", "beside")) for table in (fitted, plain, *fixed)
    ]
    assert errors[0] <= min(errors) * (1 + 1e-5) and errors[0] < 0.8 * errors[1]
    spread, beside = fitted.channels("spread"), fitted.channels("beside")
    assert spread is not None and beside is not None and torch.equal(spread, beside)
    assert _error(model, fitted, "plain", precision) <= _error(model, plain, "plain", precision) * (1 + 1e-5)


def test_what_cannot_be_fitted_is_refused() -> None:
    model = _Model().eval()
    with pytest.raises(CalibrationError, match="no batch"):
        fxopt.activation_aware(_calibration(model), model, [])
    with pytest.raises(OptionError, match="did you mean 'int4-weight'"):
        fxopt.activation_aware(_calibration(model), model, _loader(), "int4-weights")
