"""Branches on a second stream within a CUDA graph: the values are those of the same kernels in a row, bit for bit."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from fxopt.journal import RECENT
from fxopt.runtime import branch_contest, branches
from tests.guest.agreement import compiled

pytestmark = pytest.mark.gpu


class Block(nn.Module):
    def __init__(self, taken: int, inner: int, stride: int) -> None:
        super().__init__()
        self.first = nn.Sequential(nn.Conv2d(taken, inner, 1), nn.ReLU(), nn.Conv2d(inner, inner, 3, stride, 1), nn.ReLU())
        self.last = nn.Conv2d(inner, 4 * inner, 1)
        self.shortcut = nn.Conv2d(taken, 4 * inner, 1, stride)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return F.relu(self.last(self.first(x)) + self.shortcut(x))


def network() -> nn.Module:
    torch.manual_seed(0)
    blocks = nn.Sequential(Block(64, 32, 1), Block(128, 64, 2), Block(256, 64, 2))
    return blocks.to("cuda", torch.float16, memory_format=torch.channels_last).eval()


def image(seed: int) -> torch.Tensor:
    x = torch.randn(1, 64, 56, 56, generator=torch.Generator("cuda").manual_seed(seed), device="cuda").half()
    return x.to(memory_format=torch.channels_last)


def notes() -> list[str]:
    return [text for journal in RECENT for topic, text in journal.notes if topic == branches.NAME]


def test_shortcuts_beside_their_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Kept however fast; replayed behind each other without waiting, so that one call's branches meet the next one's."""
    monkeypatch.setattr(branch_contest, "LEAST_GAIN", 0.0)
    monkeypatch.setattr(branches, "calls_cublas", lambda op: False)  # whatever shortcuts are computed by
    model = network()
    with torch.no_grad():
        plain = compiled(model, cuda_graphs=False)
        want = [plain(image(k)) for k in range(40)]
        RECENT.clear()
        run = compiled(model)
        got = [run(image(k)) for k in range(40)]
    torch.testing.assert_close(got, want, rtol=0, atol=0)
    assert any(text.startswith("with branches on a second stream a replay takes") for text in notes()), notes()


def test_they_can_be_switched_off() -> None:
    RECENT.clear()
    with torch.no_grad():
        run = compiled(network(), disable=[branches.NAME])
        for k in range(4):
            run(image(k))
    assert not notes()
