"""Training in fp8 on a GPU: gradients near those of bfloat16, and a small model that learns as well."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks.fp8_training import train
from fxopt.journal import RECENT

pytestmark = [pytest.mark.gpu, pytest.mark.usefixtures("fresh_cache")]


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.norm, self.up, self.down = nn.LayerNorm(256), nn.Linear(256, 512), nn.Linear(512, 256, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.down(F.gelu(self.up(self.norm(x))))


def test_gradients_are_near_those_of_the_model() -> None:
    x = torch.randn(4, 128, 256, device="cuda", dtype=torch.bfloat16)
    found = []
    for options in ({}, {"precision": "fp8"}):
        torch.compiler.reset()
        RECENT.clear()
        model, given = Net().cuda().bfloat16(), x.clone().requires_grad_()
        result = torch.compile(model, backend="fxopt", dynamic=False, options=options)(given)
        result.float().square().sum().backward()
        found.append([result, given.grad, *(p.grad for p in model.parameters())])
    notes = [text for journal in RECENT for topic, text in journal.notes if topic == "precision"]
    assert notes == ["up: trains in fp8, 3 of 3 products", "down: trains in fp8, 3 of 3 products"]
    for plain, narrow in zip(*found, strict=True):
        assert plain is not None and narrow is not None
        assert 0.0 < float((plain - narrow).float().norm() / plain.float().norm()) < 0.08


def test_a_small_model_learns_as_well() -> None:
    windows = (torch.arange(129) * torch.randint(1, 5, (256, 1)) + torch.randint(256, (256, 1))) % 256
    sizes = {"width": 128, "layers": 2, "heads": 2}
    device = torch.device("cuda", 0)
    last = {}
    for name in ("bf16", "fp8"):
        torch.compiler.reset()
        found = train(name, device, windows, windows[:64], sizes, 150, 32)
        last[name] = sum(found["losses"][-10:]) / 10
    assert last["bf16"] < 3.0 and abs(last["fp8"] / last["bf16"] - 1) < 0.1
