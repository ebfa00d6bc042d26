"""Small networks that are run with CUDA graphs, and what is known of their runs."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from fxopt.journal import RECENT
from fxopt.runtime import cuda_graph
from fxopt.runtime.cuda_graph import GraphedExecutor


class Block(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm, self.up, self.down = nn.LayerNorm(width), nn.Linear(width, 4 * width), nn.Linear(4 * width, width)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + self.down(F.gelu(self.up(self.norm(x))))


def network(width: int = 64, depth: int = 4) -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(*(Block(width) for _ in range(depth))).cuda().eval()


class Worded(nn.Module):
    """Ends in results that are too large to be copied; `telling` returns what they are made from, too."""

    def __init__(self, telling: bool = False) -> None:
        super().__init__()
        self.blocks, self.head, self.telling = network(64, 6), nn.Linear(64, 1 << 15).cuda(), telling

    def forward(self, x: torch.Tensor) -> Any:
        hidden = self.blocks(x)
        return (self.head(hidden), hidden[1:]) if self.telling else self.head(hidden)


def x_of(seed: int, *shape: int) -> torch.Tensor:
    return torch.randn(shape or (8, 64), generator=torch.Generator("cuda").manual_seed(seed), device="cuda")


def close(got: Any, want: Any) -> None:
    torch.testing.assert_close(got, want, rtol=2e-3, atol=2e-3)


def replays(made: list[GraphedExecutor]) -> int:
    return sum(executor._replays for executor in made)


def reasons() -> list[str]:
    return [text for journal in RECENT for topic, text in journal.notes if topic == cuda_graph.NAME]
