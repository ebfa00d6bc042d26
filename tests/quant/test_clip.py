"""Limits of weights: least squared error, never more than without, and what a table keeps of them."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

import fxopt
from fxopt.errors import CalibrationError, OptionError
from fxopt.ir.observer_ops import exponent_histogram
from fxopt.ir.quantized_ops import dequantized, quantize_weight
from fxopt.precision import Refinement
from fxopt.quant.clip import SHARES, best_limits
from fxopt.quant.emulate import LayerCall, with_table
from fxopt.quant.observers import Range
from fxopt.quant.table import Calibration, LayerRange


def _model() -> nn.Module:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(128, 32)).eval()
    with torch.no_grad():
        model[0].weight.copy_(torch.distributions.Laplace(0.0, 1.0).sample((32, 128)))  # a few large values
        model[0].weight[3] = 0.0
    return model


def _table(x: Tensor) -> Calibration:
    seen = Range(x.amin(0), x.amax(0), exponent_histogram(x))
    return Calibration((LayerRange("0", "linear", (32, 128), "float32", seen),), 1)


@pytest.mark.parametrize(("precision", "bits", "group"), [("int4-weight", 4, 128), ("int8-weight", 8, 0), ("int8", 8, 0)])
def test_limits_are_the_best_that_are_tried(precision: str, bits: int, group: int) -> None:
    weight = _model()[0].weight.detach()
    limits = best_limits(weight, precision)
    dtype = torch.uint8 if bits == 4 else torch.int8

    def squares(given: Tensor | None) -> Tensor:
        stored = quantize_weight(weight, dtype, bits, group, given)
        return (dequantized(*stored, bits, group) - weight).double().square().sum(1)

    own = squares(limits)
    whole = weight.abs().amax(1).reshape(limits.shape)
    tried = torch.stack([squares((whole * share).clamp_min(1e-30)) for share in SHARES])
    torch.testing.assert_close(own, tried.amin(0), rtol=1e-4, atol=1e-12)
    assert bool((own <= squares(None)).all())
    if bits == 4:
        assert float(own.sum()) < 0.9 * float(squares(None).sum())


def test_a_layer_is_nearer_and_compiled_alike(tmp_path: Path) -> None:
    model, x = _model(), torch.randn(64, 128)
    plain = _table(x)
    table = fxopt.clipped(plain, model)
    table.save(tmp_path / "a.fxcal")
    read = Calibration.load(tmp_path / "a.fxcal")
    assert read.digest() == table.digest() != plain.digest()
    call = LayerCall("0", x, model[0].weight.detach(), model[0].bias.detach())
    off = [float((with_table(call, "int4-weight", t, "0") - call.exact()).norm()) for t in (plain, read)]
    assert off[1] < 0.95 * off[0]
    fast = torch.compile(model, backend="fxopt", options={"precision": "int4-weight", "calibration": read})
    with torch.no_grad():
        torch.testing.assert_close(fast(x), with_table(call, "int4-weight", read, "0"), rtol=1e-4, atol=1e-4)
    assert table.refinement("0", "int8") is None


def test_what_changes_the_layer_drops_them() -> None:
    model, x = _model(), torch.randn(64, 128)
    table = fxopt.clipped(_table(x), model)
    assert table["0"].refined is not None
    assert fxopt.smoothed(table, model)["0"].refined is None
    assert table.with_method("mse")["0"].refined is None and table.with_method("amax")["0"].refined is not None
    assert table.with_layer("0", scale=0.5)["0"].refined is None
    assert table.with_layer("0", precision="int8")["0"].refined is not None
    assert Calibration.merge(table, table)["0"].refined is None


@pytest.mark.parametrize(
    ("wrong", "words"),
    [
        (Refinement("int4-weight", torch.zeros(32, 1)), "not positive"),
        (Refinement("int4-weight", torch.ones(31, 1)), "for the rows of its weight"),
        (Refinement("int8", None, torch.ones(32).double()), "correction are no float32"),
        (Refinement("int8", None, torch.full((32,), torch.inf)), "not finite"),
        (Refinement("int9", torch.ones(32)), "refined for 'int9'"),
    ],
)
def test_files_with_others_are_refused(wrong: Refinement, words: str, tmp_path: Path) -> None:
    table = _table(torch.randn(64, 128))
    replace(table, layers=(replace(table.layers[0], refined=wrong),)).save(tmp_path / "a.fxcal")
    with pytest.raises(CalibrationError, match=words):
        Calibration.load(tmp_path / "a.fxcal")


def test_what_cannot_be_clipped_is_refused() -> None:
    with pytest.raises(OptionError, match="did you mean 'int4-weight'"):
        fxopt.clipped(_table(torch.randn(64, 128)), _model(), "int4-weights")
    with pytest.raises(CalibrationError, match="none of the calibration's layers"):
        fxopt.clipped(_table(torch.randn(64, 128)), nn.Linear(3, 3))
