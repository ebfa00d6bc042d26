"""Attention in fp8 in eager: names, the arithmetic, what is left alone, and the search's view of it."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fxopt.ir.observer_ops import exponent_histogram
from fxopt.quant.emulate import treated
from fxopt.quant.emulate_attention import AttentionCall, quantized_attention, unfit
from fxopt.quant.observers import Range
from fxopt.quant.table import Calibration, LayerRange
from fxopt.quant.trial import Trial, attention_scales

FP8 = torch.float8_e4m3fn
SCALES = {"query": 0.02, "key": 0.03, "value": 0.01}


class Block(nn.Module):
    """Two calls of attention in one module, one in another."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = Once()
        self.out = nn.Linear(32, 32, dtype=torch.bfloat16)

    def forward(self, x: Tensor) -> Tensor:
        x = F.scaled_dot_product_attention(x, x, x) + self.inner(x)
        return self.out(F.scaled_dot_product_attention(x, x, x, is_causal=True))


class Once(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return F.scaled_dot_product_attention(x, x, x)


def given(rows: int = 10) -> Tensor:
    return torch.randn(2, 4, rows, 32, generator=torch.Generator().manual_seed(rows)).bfloat16()


def test_calls_have_the_names_of_their_modules_and_return_what_they_are_told() -> None:
    model, x, names = Block().eval(), given(), list[str]()

    def attend(call: AttentionCall) -> Tensor | None:
        names.append(call.name)
        return torch.zeros_like(call.query) if call.name == "@attention#1" else None

    for _ in range(2):
        with torch.no_grad(), treated(model, lambda call: None, attend):
            result = model(x)
    assert names == 2 * ["@attention", "inner@attention", "@attention#1"]
    assert torch.equal(result, model.out.bias.expand_as(result))


def widened(x: Tensor, scale: float) -> Tensor:
    return (x.float() * torch.tensor(scale).reciprocal()).clamp(-448, 448).to(FP8).double() * scale


@pytest.mark.parametrize("case", ["plain", "causal", "mask", "hidden", "groups"])
def test_values_are_those_of_the_formula(case: str) -> None:
    query, key, value = given(7), given(9), given(9) * 2
    if case == "groups":
        key, value = key[:, :2], value[:, :2]
    mask = {"mask": torch.randn(2, 1, 7, 9), "hidden": torch.rand(7, 9) < 0.5}.get(case)
    if case == "hidden" and mask is not None:
        mask[3] = False
    call = AttentionCall("a", query, key, value, mask, case == "causal", None, case == "groups")
    got = quantized_attention(call, SCALES)
    q, k, v = (widened(x, s) for x, s in zip((query, key, value), SCALES.values(), strict=True))
    if case == "groups":
        k, v = k.repeat_interleave(2, 1), v.repeat_interleave(2, 1)
    scores = q @ k.mT * 32**-0.5
    if case == "causal":
        scores = scores.masked_fill(~torch.ones(7, 9).tril().bool(), -torch.inf)
    if mask is not None:
        scores = scores.masked_fill(~mask, -torch.inf) if mask.dtype == torch.bool else scores + mask.double()
    p = (scores - scores.amax(-1, keepdim=True)).exp().nan_to_num(0.0)
    rounded = (p * 256).float().to(FP8).double() / 256
    expected = rounded @ v / p.sum(-1, keepdim=True).clamp_min(1e-30)
    assert got.dtype == torch.bfloat16
    torch.testing.assert_close(got.double(), expected, rtol=1e-2, atol=1e-2)
    assert case != "hidden" or bool((got[:, :, 3] == 0).all())


def test_what_is_left_alone() -> None:
    call = AttentionCall("a", given(), given(), given(), None, False, None, False)
    assert unfit(call, "fp8") is None
    assert "not in int8" in str(unfit(call, "int8"))
    assert "half type" in str(unfit(replace(call, query=given().float()), "fp8"))
    assert "wide" in str(unfit(replace(call, value=given()[..., :24]), "fp8"))
    seen: list[AttentionCall] = []
    with treated(nn.Identity(), lambda call: None, seen.append):
        F.scaled_dot_product_attention(given(), given(), given())
    assert seen == [], "outside of the model"


def test_a_trial_speaks_of_the_calibrations_attention() -> None:
    model, x = Block().eval(), given()
    seen = Range(x.float().amin((0, 2, 3)), x.float().amax((0, 2, 3)), exponent_histogram(x))
    layers = [
        LayerRange(f"inner@attention.{operand}", "attention", (4, 32), "bfloat16", seen)
        for operand in ("query", "key", "value")
    ]
    table = Calibration(tuple(layers), 1)
    trial = Trial(model, [x], table, None)
    assert list(trial.attention_calls(0)) == table.names() == ["inner@attention"]
    assert trial.emulated_error({}) == 0.0 and trial.emulated_error({"@attention": "fp8"}) == 0.0
    assert 1e-4 < trial.emulated_error({"inner@attention": "fp8"}) < 0.1


def test_heads_far_apart_have_scales_of_their_own() -> None:
    """A head ten thousand times as small as the others is next to nothing with their scale."""
    x = given(20).float()
    x[:, 1] *= 1e-4
    near = Range(given(20).float().amin((0, 2, 3)), given(20).float().amax((0, 2, 3)), exponent_histogram(given(20)))
    seen = Range(x.amin((0, 2, 3)), x.amax((0, 2, 3)), exponent_histogram(x))
    layers = [
        LayerRange(f"@attention.{operand}", "attention", (4, 32), "bfloat16", seen if operand == "value" else near)
        for operand in ("query", "key", "value")
    ]
    table = Calibration(tuple(layers), 1)
    assert table.head_scales("@attention.query", "fp8") is None
    assert table.with_layer("@attention.value", scale=0.5).head_scales("@attention.value", "fp8") is None
    own = attention_scales(table, "@attention", "fp8")
    torch.testing.assert_close(own["value"], table["@attention.value"].channel_amax() / 448)
    query, value = given(20), x.bfloat16()
    call = AttentionCall("@attention", query, query, value, None, False, None, False)
    exact = F.scaled_dot_product_attention(query.double(), query.double(), value.double())[:, 1]
    errors = [
        float((quantized_attention(call, scales)[:, 1].double() - exact).norm() / exact.norm())
        for scales in (own, {**own, "value": table.scale("@attention.value", "fp8")})
    ]
    assert errors[0] < 0.05 < errors[1]
