"""`fxopt.quantize` on a GPU: what it returns keeps the budget, and is what was emulated."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

import fxopt
from fxopt.precision import HIGH

pytestmark = pytest.mark.gpu


class _Feed(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.norm = nn.LayerNorm(1024)
        self.up, self.down = nn.Linear(1024, 4096), nn.Linear(4096, 1024)

    def forward(self, x: Tensor) -> Tensor:
        result: Tensor = x + self.down(nn.functional.gelu(self.up(self.norm(x))))
        return result


@pytest.mark.parametrize("budget", [0.0, 1.0])
def test_the_budget_holds_and_the_model_is_faster_or_refused(budget: float) -> None:
    if torch.cuda.get_device_capability() < (8, 9):
        pytest.skip("no products in float8")
    model = _Feed().cuda().bfloat16().eval()
    batches = [torch.randn(4096, 1024, device="cuda", dtype=torch.bfloat16) for _ in range(2)]
    result = fxopt.quantize(model, batches, budget, precisions=("fp8", "int8"), progress=False)
    report = result.report()
    chosen = [layer for layer in report.layers if layer.decision != HIGH]
    assert (result.refused is None) == bool(chosen)
    if budget == 0.0:
        assert not chosen
        return
    with torch.no_grad():
        exact = model(batches[0]).double()
        error = float((result.model(batches[0]).double() - exact).norm() / exact.norm())
    if chosen:
        assert report.seconds is not None and report.quantized_seconds is not None
        assert report.quantized_seconds < report.seconds
        assert report.reached is not None and report.reached <= budget
        alone = [layer.error[layer.decision] for layer in chosen]
        assert error == pytest.approx(sum(e**2 for e in alone) ** 0.5, rel=0.5)
    else:
        assert error < 0.02
