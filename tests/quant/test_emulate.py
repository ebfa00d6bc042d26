"""Layers found in eager, their names, and the arithmetic of each precision against its formula in float64."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

import fxopt
from fxopt.quant.emulate import LayerCall, obstacle, quantized, treated
from fxopt.quant.trial import Trial


class _Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.query, self.out = nn.Linear(8, 8), nn.Linear(8, 4, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        scores = self.query(x) @ x.transpose(-1, -2)
        return self.out(self.query(scores @ x))


def _model() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(_Block(), nn.ReLU(), nn.Linear(4, 3)).eval()


def _calls(model: nn.Module, x: Tensor) -> dict[str, LayerCall]:
    found: dict[str, LayerCall] = {}
    with torch.no_grad(), treated(model, lambda call: found.update({call.name: call})):
        model(x)
    return found


def test_layers_have_the_names_of_their_modules() -> None:
    model, x = _model(), torch.randn(2, 5, 8)
    found = _calls(model, x)
    assert list(found) == ["0.query", "0.query#1", "0.out", "2"]
    assert found["0.query"].x.shape == (10, 8) and found["2"].weight is not None
    assert list(_calls(model, x)) == list(found), "a second call counts from the beginning"
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode, torch.enable_grad])
def test_a_treated_layer_returns_what_it_is_told(mode: type) -> None:
    model, x = _model(), torch.randn(2, 5, 8)
    with mode(), treated(model, lambda call: torch.ones(10, 3) if call.name == "2" else None):
        assert torch.equal(model(x), torch.ones(2, 5, 3))


def test_layers_left_alone_change_nothing() -> None:
    model, x = _model(), torch.randn(2, 5, 8)
    with torch.no_grad():
        expected = model(x)
        with treated(model, lambda call: None):
            assert torch.equal(model(x), expected)


def test_an_error_in_the_model_leaves_no_hooks() -> None:
    model = _model()
    with pytest.raises(RuntimeError), treated(model, lambda call: None):
        model(torch.randn(2, 5, 7))
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())


def _exact(x: Tensor, steps: Tensor, grid: str) -> Tensor:
    """Rounds to the grid in float64: integers by themselves, fp8 by the step of each value's binade (at least 2^-9)."""
    if grid == "int8":
        return (x / steps).round().clamp(-127, 127) * steps
    y = (x / steps).clamp(-448, 448)
    step = 2.0 ** (y.abs().clamp(min=2.0**-6).log2().floor() - 3)
    return (y / step).round() * step * steps


@pytest.mark.parametrize("limit", [None, 2.0])  # what the activations' grid reaches to
@pytest.mark.parametrize("precision", ["fp8", "int8"])
def test_values_are_those_of_the_formula(precision: str, limit: float | None) -> None:
    torch.manual_seed(0)
    x, weight, bias = torch.randn(6, 32), torch.randn(5, 32), torch.randn(5)
    weight[2] = 0.0
    x[1] = 0.0
    largest = 448.0 if precision == "fp8" else 127.0
    of_rows = x.double().abs().amax(1, keepdim=True) if limit is None else torch.full((1, 1), limit, dtype=torch.float64)
    of_weights = weight.double().abs().amax(1, keepdim=True)
    ones = torch.ones_like
    x_steps = torch.where(of_rows > 0, of_rows / largest, ones(of_rows))
    w_steps = torch.where(of_weights > 0, of_weights / largest, ones(of_weights))
    expected = _exact(x.double(), x_steps, precision) @ _exact(weight.double(), w_steps, precision).t() + bias.double()
    result = quantized(LayerCall("a", x, weight, bias), precision, None if limit is None else limit / largest)
    torch.testing.assert_close(result.double(), expected, rtol=1e-5, atol=1e-5)


def test_weight_only_leaves_activations_alone() -> None:
    torch.manual_seed(0)
    call = LayerCall("a", torch.randn(3, 256), torch.randn(5, 256), None)
    for precision in ("int8-weight", "int4-weight"):
        one_by_one = torch.cat([quantized(LayerCall("a", x[None], call.weight, None), precision) for x in call.x])
        torch.testing.assert_close(one_by_one, quantized(call, precision))
        error = (quantized(call, precision) - call.exact()).norm() / call.exact().norm()
        assert error < {"int8-weight": 0.01, "int4-weight": 0.15}[precision]


def test_obstacles_are_refused() -> None:
    call = LayerCall("a", torch.randn(3, 100), torch.randn(5, 100), None)
    assert obstacle(call, "int8") is None and "100" in (obstacle(call, "int4-weight") or "")
    with pytest.raises(ValueError):
        quantized(call, "int4-weight")


def test_fp8_keeps_the_dtype_of_its_input() -> None:
    call = LayerCall("a", torch.randn(3, 16, dtype=torch.bfloat16), torch.randn(5, 16, dtype=torch.bfloat16), None)
    assert quantized(call, "fp8").dtype == torch.bfloat16


class _Pictures(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first, self.second = nn.Conv2d(16, 32, 3, padding=1), nn.Conv2d(32, 16, 3, 2, 2, 2, bias=False)
        self.apart = nn.Conv2d(16, 16, 3, groups=16)

    def forward(self, x: Tensor) -> Tensor:
        return self.apart(self.second(torch.relu(self.first(x))))


def test_convolutions_are_layers() -> None:
    model, x = _Pictures().eval(), torch.randn(2, 16, 9, 9)
    found = _calls(model, x)
    assert list(found) == ["first", "second", "apart"]
    assert [call.rows for call in found.values()] == [2 * 81, 2 * 25, 2 * 9]
    assert [obstacle(call, "int8") is None for call in found.values()] == [True, True, False]
    assert "fp8 or int8" in (obstacle(found["first"], "int8-dynamic") or "")
    with pytest.raises(ValueError, match="calibration"):
        quantized(found["first"], "int8")


def test_convolutions_have_the_values_of_the_compiled_model() -> None:
    precision, model = "int8", _Pictures().eval()
    x = torch.randn(2, 16, 9, 9).contiguous(memory_format=torch.channels_last)
    calibration = fxopt.calibrate(model, [x], progress=False)

    def treat(call: LayerCall) -> Tensor | None:
        if obstacle(call, precision) is not None:
            return None
        return quantized(call, precision, calibration.scale(call.name, precision))

    options = {"precision": precision, "calibration": calibration}
    with torch.no_grad():
        exact = model(x)
        with treated(model, treat):
            emulated = model(x)
        compiled = torch.compile(model, backend="fxopt", options=options)(x)
    torch.compiler.reset()
    torch.testing.assert_close(compiled, emulated, rtol=1e-3, atol=1e-3)
    assert 0.002 < float((emulated - exact).norm() / exact.norm()) < 0.1


class _Attends(nn.Module):
    """torch's modules that are one operator each where no gradient is recorded."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        layer = nn.TransformerEncoderLayer(32, 2, 64, activation="gelu", batch_first=True)
        self.body = nn.TransformerEncoder(layer, 2)
        self.pool = nn.MultiheadAttention(32, 2, batch_first=True)

    def forward(self, x: Tensor, padding: Tensor) -> Tensor:
        x = self.body(x, src_key_padding_mask=padding)
        return self.pool(x, x, x, key_padding_mask=padding, need_weights=False)[0]


@pytest.mark.parametrize("precision", ["int8", "fp8"])
def test_torchs_encoder_layers_are_layers(precision: str) -> None:
    """Under names that the compiled model has too, with its values, those of padding included."""
    model = _Attends().eval()
    padding = torch.arange(6) >= torch.tensor([[6], [4], [1]])
    batch = (torch.randn(3, 6, 32), padding)
    calibration = fxopt.calibrate(model, [batch], progress=False)
    trial = Trial(model, [batch], calibration, None)
    inner = ("self_attn", "self_attn#1", "linear1", "linear2")
    names = [*(f"body.layers.{number}.{name}" for number in range(2) for name in inner), "pool", "pool#1"]
    assert calibration.names() == names == list(trial.calls()[0])
    with torch.no_grad():
        plain = torch.compile(model, backend="fxopt", options={"strict": True})
        assert trial.error(plain) < 1e-5
        with trial.emulating(dict.fromkeys(names, precision)):
            emulated = model(*batch)
        options = {"precision": precision, "calibration": calibration}
        compiled = torch.compile(model, backend="fxopt", options=options)(*batch)
    torch.compiler.reset()
    torch.testing.assert_close(compiled, emulated, rtol=1e-3, atol=1e-3 if precision == "int8" else 1e-2)
    assert 0.002 < trial.emulated_error(dict.fromkeys(names, precision)) < 0.2
    assert torch.backends.mha.get_fastpath_enabled()
