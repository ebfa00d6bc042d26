"""Floats that modules hold, with `dynamic=True`: literals with a guard, while those that are arguments stay inputs."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, fx, nn

from fxopt.capture.steady_floats import mark_steady_floats
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


def test_values_that_change_are_inputs() -> None:
    graphs: list[fx.GraphModule] = []

    def early(gm: fx.GraphModule, inputs: list[Tensor]) -> object:
        mark_steady_floats(gm)
        run_early(gm, Options(), Journal("test", strict=True))
        graphs.append(gm)
        return gm.forward

    model = Scaled().train()
    torch.compiler.reset()
    counters = torch._dynamo.utils.counters["stats"]
    counters.clear()
    compiled = torch.compile(model, backend=early, dynamic=True)  # type: ignore[arg-type]
    calls = ((3, 0.5, 1.5, 1), (5, 0.5, 2.5, 1), (7, 0.25, 2.5, 2), (9, 0.25, 3.5, 2), (11, 0.125, 3.5, 2))
    for size, scale, factor, count in calls:
        model.scale = scale
        x = torch.randn(size)
        torch.testing.assert_close(compiled(x, factor), model(x, factor))
        assert counters["unique_graphs"] == count
    items = [[n for n in gm.graph.nodes if n.target == "item"] for gm in (graphs[0], graphs[-1])]
    assert [*map(len, items)] == [1, 2], "the argument; and what has changed"


class Schedule(nn.Module):
    def __init__(self, held: object) -> None:
        super().__init__()
        self.held = held

    def forward(self, x: Tensor) -> Tensor:
        return x * self.held.value  # type: ignore[attr-defined]


class Held:
    value = 1.0

    def step(self, x: Tensor) -> Tensor:
        return x * self.value


@pytest.mark.parametrize("dynamic", [None, True])
def test_a_schedule_is_two_graphs(dynamic: bool | None) -> None:
    torch.compiler.reset()
    counters = torch._dynamo.utils.counters["stats"]
    counters.clear()
    held = Held()
    model = Schedule(held)
    compiled = torch.compile(model, backend="fxopt", dynamic=dynamic)
    for k in range(5):
        held.value, x = 1.0 / (k + 2), torch.randn(3)
        torch.testing.assert_close(compiled(x), model(x))
    assert counters["unique_graphs"] == 2


def test_what_others_than_modules_hold_is_an_input() -> None:
    torch.compiler.reset()
    counters = torch._dynamo.utils.counters["stats"]
    counters.clear()
    held = Held()
    compiled = torch.compile(held.step, backend="fxopt", dynamic=True)
    for k in range(3):
        held.value, x = 1.0 / (k + 2), torch.randn(3)
        torch.testing.assert_close(compiled(x), held.step(x))
    assert counters["unique_graphs"] == 1
