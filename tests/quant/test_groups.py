"""Scales of groups: the op, the table's scales, the pass beside the emulation, and what they are worth."""

from __future__ import annotations

import functools
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import fxopt
from fxopt.ir.group_scaled_op import GROUP_SCALED_MM, group_scaled_mm
from fxopt.ir.quantized_ops import FLOAT8, dequantized, quantize_weight
from fxopt.quant.emulate import treated, with_table
from fxopt.quant.table import Calibration

NAMES = ("int8-group", "int8-group-dynamic", "fp8-group", "fp8-group-dynamic")


def _model() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(256, 96), nn.GELU(), nn.Linear(96, 48, bias=False)).eval()


def _data(seed: int) -> Tensor:
    """Of 256 channels, neighbours from 128 on are fifty times as large."""
    torch.manual_seed(seed)
    return torch.cat([torch.randn(40, 128), torch.randn(40, 128) * 50.0], 1)


@functools.cache
def _table() -> Calibration:
    torch.compiler.reset()
    return fxopt.calibrate(_model(), [_data(1)], progress=False)


def _compiled(model: nn.Module, x: Tensor, **options: Any) -> Tensor:
    torch.compiler.reset()
    with torch.no_grad():
        result: Tensor = torch.compile(model, backend="fxopt", options=options)(x)
    return result


@pytest.mark.parametrize("dtype", [torch.int8, FLOAT8])
@pytest.mark.parametrize("rows", [1, 7])
@pytest.mark.parametrize("bias", [False, True])
def test_sums_are_scaled_group_by_group(dtype: torch.dtype, rows: int, bias: bool) -> None:
    a, b = (torch.randint(-100, 100, shape).to(dtype) for shape in ((7, 96), (5, 96)))
    scale_a, scale_b, addend = torch.rand(rows, 3), torch.rand(5, 3), torch.randn(5) if bias else None
    got = group_scaled_mm(a, b, scale_a, scale_b, addend, torch.float32)
    wide = a.double().view(7, 3, 32) * scale_a.double()[:, :, None]
    weight = b.double().view(5, 3, 32) * scale_b.double()[:, :, None]
    wanted = torch.einsum("mgk,ngk->mn", wide, weight) + (0 if addend is None else addend.double())
    torch.testing.assert_close(got.double(), wanted, rtol=1e-5, atol=1e-2)


def test_operands_that_do_not_fit_are_refused() -> None:
    a, b, ones = torch.zeros(4, 64, dtype=torch.int8), torch.zeros(6, 64, dtype=torch.int8), torch.ones
    assert GROUP_SCALED_MM(a, b, ones(4, 2), ones(6, 2), None, torch.float32).shape == (4, 6)
    for scale_a, scale_b, reason in (
        (ones(4, 2), ones(6), "the weight's scales"),
        (ones(4, 3), ones(6, 3), "the weight's scales"),
        (ones(3, 2), ones(6, 2), "scales of rows"),
        (ones(4, 1), ones(6, 2), "scales of rows"),
        (ones(4, 2).double(), ones(6, 2), "scales of rows"),
    ):
        with pytest.raises(ValueError, match=reason):
            group_scaled_mm(a, b, scale_a, scale_b, None, torch.float32)
    with pytest.raises(ValueError, match="no multiple of the group"):
        quantize_weight(torch.zeros(4, 60), torch.int8, 8, 32)


@pytest.mark.parametrize("dtype", [torch.int8, FLOAT8])
def test_weights_have_scales_of_groups(dtype: torch.dtype) -> None:
    weight = torch.randn(6, 64) * torch.tensor([1.0, 100.0]).repeat_interleave(32)
    errors = []
    for group in (0, 32):
        stored, scales = quantize_weight(weight, dtype, 8, group)
        assert scales.shape == ((6, 2) if group else (6,))
        errors.append((dequantized(stored, scales, 8, group) - weight)[:, :32].norm())
    assert errors[1] < (0.05 if dtype == torch.int8 else 1.2) * errors[0]  # float8's error is relative from the start


def test_a_tables_scales_are_those_of_its_channels() -> None:
    table = _table()
    found, x = table.group_scales("0", "int8-group"), _data(1)
    torch.testing.assert_close(found, x.view(40, 2, 128).abs().amax((0, 2)) / 127)
    assert table.zero_point("2", "int8-group") == 0  # although GELU leaves next to nothing below zero
    assert torch.equal(table.with_layer("0", scale=0.5).group_scales("0", "int8-group"), torch.full((2,), 0.5))
    clipped = table.with_method("percentile").group_scales("0", "int8-group")
    assert clipped[0] == found[0] and float(clipped[1]) == pytest.approx(table.with_method("percentile").scale("0", "int8"))


@pytest.mark.parametrize("precision", NAMES)
def test_a_compiled_model_is_the_emulated_one(precision: str) -> None:
    model, x, table = _model(), _data(2), _table()
    got = _compiled(model, x, precision=precision, calibration=table)
    with torch.no_grad(), treated(model, lambda call: with_table(call, precision, table, call.name)):
        emulated = model(x)
    # A value on the edge between two steps may fall to either side.
    torch.testing.assert_close(got, emulated, rtol=1e-4, atol=2e-2 * float(emulated.abs().max()))
    assert float((got - emulated).norm()) < 2e-3 * float(emulated.norm())
    fewer = _compiled(model, x[:3], precision=precision, calibration=table)
    torch.testing.assert_close(fewer, got[:3], rtol=1e-4, atol=1e-4)


def test_small_groups_keep_their_steps() -> None:
    """The first 128 channels are what the output is about: the others' weights are next to nothing."""
    model, x = _model(), _data(2)
    with torch.no_grad():
        model[0].weight[:, 128:] *= 1e-3
    torch.compiler.reset()
    table = fxopt.calibrate(model, [_data(1)], progress=False)
    with torch.no_grad():
        exact = model.double()(x.double())
    model.float()
    errors = {
        name: float((_compiled(model, x, precision=name, calibration=table).double() - exact).norm() / exact.norm())
        for name in ("int8", "int8-dynamic", *NAMES[:2])
    }
    assert errors["int8-group"] < 0.2 * errors["int8"]
    assert errors["int8-group-dynamic"] < 0.2 * errors["int8-dynamic"]


def test_without_a_calibration_rows_have_their_own_and_sizes_may_change() -> None:
    model, x = _model(), _data(2)
    want = _compiled(model, x, precision="int8-group-dynamic")
    torch.compiler.reset()
    fast = torch.compile(model, backend="fxopt", options={"precision": "int8-group"}, dynamic=True)
    with torch.no_grad():
        for rows in (5, 9):
            torch.testing.assert_close(fast(x[:rows]), want[:rows], rtol=1e-4, atol=1e-3)


def test_what_has_no_groups_stays_high() -> None:
    model = nn.Sequential(nn.Linear(40, 16), nn.Unflatten(1, (4, 2, 2)), nn.Conv2d(4, 8, 1)).eval()
    with torch.no_grad():
        explained = fxopt.explain(model, torch.randn(3, 40), fxopt_options={"precision": "int8-group"})
    notes = [text for journal in explained.graphs for topic, text in journal.notes if topic == "precision"]
    assert any("0 stays high" in note and "no multiple of 32" in note for note in notes)
    assert any("2 stays high" in note and "convolutions are quantized" in note for note in notes)
