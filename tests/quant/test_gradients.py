"""Errors that gradients tell, against those of trying each layer."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from fxopt.ir.observer_ops import exponent_histogram
from fxopt.quant.gradients import estimated_errors
from fxopt.quant.observers import Range
from fxopt.quant.table import Calibration, LayerRange
from fxopt.quant.trial import Trial


class _Model(nn.Module):
    def __init__(self, differentiable: bool = True) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.differentiable = differentiable
        self.layers = nn.ModuleList(nn.Linear(24, 24) for _ in range(4))
        for p in self.parameters():
            p.requires_grad_(False)

    def forward(self, x: Tensor) -> Tensor:
        for factor, layer in zip((1.0, 0.1, 1.0, 0.02), self.layers, strict=True):
            x = x + factor * torch.tanh(layer(x))
        return x if self.differentiable else x.detach()


def _trial(model: nn.Module) -> Trial:
    torch.manual_seed(1)
    batches = [torch.randn(32, 3, 24) for _ in range(2)]
    seen = Range(torch.full((24,), -4.0), torch.full((24,), 4.0), exponent_histogram(torch.tensor([4.0])))
    layers = (LayerRange(f"layers.{n}", "linear", (24, 24), "float32", seen) for n in range(4))
    return Trial(model, batches, Calibration(tuple(layers), 2), None)


PAIRS = [(f"layers.{n}", precision) for n in range(4) for precision in ("int8", "fp8-dynamic")]


def test_estimates_are_near_what_trying_tells() -> None:
    trial = _trial(_Model())
    estimated = estimated_errors(trial, PAIRS, 2)
    assert set(estimated) == set(PAIRS)
    for (layer, precision), error in estimated.items():
        assert error == pytest.approx(trial.emulated_error({layer: precision}), rel=0.35), (layer, precision)
    assert estimated == estimated_errors(trial, PAIRS, 2)
    assert not any(m._forward_hooks for m in trial.model.modules())


def test_a_model_without_gradients_has_no_estimates() -> None:
    assert estimated_errors(_trial(_Model(differentiable=False)), PAIRS, 1) == {}
