"""Many lengths, few compilations."""

from __future__ import annotations

import random

import torch
import torch.nn.functional as F

from fxopt.report.explanation import journals


class Block(torch.nn.Module):
    """Attention and a gated layer, as in a language model."""

    def __init__(self, width: int = 16) -> None:
        super().__init__()
        self.qkv, self.out = torch.nn.Linear(width, 3 * width), torch.nn.Linear(width, width)
        self.norm = torch.nn.LayerNorm(width)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        q, k, v = self.qkv(self.norm(x)).unflatten(-1, (3, 2, -1)).permute(2, 0, 3, 1, 4)
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        return x + self.out(F.silu(y.transpose(1, 2).flatten(2)))


def test_two_hundred_lengths_are_two_compilations() -> None:
    """The first length as it is, and all others as a symbol; one more where a length is 1, which is a size of its own."""
    rng = random.Random(0)
    lengths = rng.sample(range(2, 201), 199)
    lengths.insert(100, 1)
    model = Block().eval()
    torch.compiler.reset()
    compiled = torch.compile(model, backend="fxopt")
    with torch.no_grad(), journals() as found:
        for length in lengths:
            x = torch.randn(2, length, 16)
            torch.testing.assert_close(compiled(x), model(x), rtol=1e-4, atol=1e-5)
    assert len([j for j in found if j.graph.endswith("inference")]) <= 3
