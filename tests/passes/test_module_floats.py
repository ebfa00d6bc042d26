"""Floats that modules hold, with `dynamic=True`: literals with a guard, while those that are arguments stay inputs."""

from __future__ import annotations

import torch
from torch import Tensor, fx, nn

from fxopt.journal import Journal
from fxopt.options import Options
from fxopt.passes import run_early


class Scaled(nn.Module):
    """A float of its own, one of a module's within, and an argument."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = 0.5
        self.drop = nn.Dropout(0.0)

    def forward(self, x: Tensor, factor: float) -> Tensor:
        return self.drop(torch.sin(x) * self.scale) + factor


def test_other_values_are_other_graphs() -> None:
    graphs: list[fx.GraphModule] = []

    def early(gm: fx.GraphModule, inputs: list[Tensor]) -> object:
        run_early(gm, Options(), Journal("test", strict=True))
        graphs.append(gm)
        return gm.forward

    model = Scaled().train()
    torch.compiler.reset()
    counters = torch._dynamo.utils.counters["stats"]
    counters.clear()
    compiled = torch.compile(model, backend=early, dynamic=True)  # type: ignore[arg-type]
    for size, scale, factor, count in ((3, 0.5, 1.5, 1), (5, 0.5, 2.5, 1), (7, 0.25, 2.5, 2), (9, 0.25, 3.5, 2)):
        model.scale = scale
        x = torch.randn(size)
        torch.testing.assert_close(compiled(x, factor), model(x, factor))
        assert counters["unique_graphs"] == count
    items = [n for n in graphs[-1].graph.nodes if n.target == "item"]
    assert len(items) == 1, "the argument"
