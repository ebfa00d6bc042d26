"""Kernels launched before the one before them has ended: the same bits as one after the other, whatever else happens."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from fxopt.report.backends import unshared
from fxopt.runtime.launch import NAME

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(
        torch.cuda.is_available() and torch.cuda.get_device_capability() < (9, 0), reason="early launches need Hopper"
    ),
]
WIDTH, DEPTH, CALLS = 512, 24, 200


class Step(nn.Module):
    """A sublayer of a decoding step on one row: every product is a kernel of ours, and buffers take turns."""

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.up = nn.LayerNorm(WIDTH), nn.Linear(WIDTH, 2 * WIDTH, bias=False)
        self.down = nn.Linear(WIDTH, WIDTH, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        gate, value = self.up(self.norm(x)).chunk(2, -1)
        return x + self.down(F.silu(gate) * value)


class Counting(nn.Module):
    """Steps, and a state that each call reads and writes in place."""

    def __init__(self) -> None:
        super().__init__()
        self.steps = nn.Sequential(*(Step() for _ in range(DEPTH)))
        self.register_buffer("state", torch.zeros(1, WIDTH))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        out = self.steps(x + self.state)
        self.state.copy_(0.5 * self.state + out.tanh())
        return out


@pytest.fixture(autouse=True)
def _inference() -> Iterator[None]:
    with torch.no_grad():
        yield


def model() -> Counting:
    torch.manual_seed(0)
    return Counting().to("cuda", torch.bfloat16).eval()


def ways(graphs: bool, **more: Any) -> list[tuple[Counting, Callable[..., torch.Tensor]]]:
    """The same model launched in turn and early."""
    out = []
    for disable in ((NAME,), ()):
        made = model()
        options = {"disable": disable, "cuda_graphs": graphs, **more}
        out.append((made, torch.compile(unshared(made), backend="fxopt", options=options, dynamic=False)))
    return out


def check(graphs: bool, between: Callable[[Counting, int], None], **more: Any) -> None:
    (one, in_turn), (other, early) = ways(graphs, **more)
    inputs = [torch.randn(1, WIDTH, device="cuda", dtype=torch.bfloat16) for _ in range(CALLS)]
    results: list[list[torch.Tensor]] = []
    for made, run in ((one, in_turn), (other, early)):
        found = []
        for k, x in enumerate(inputs):
            between(made, k)
            found.append(run(x))
        results.append(found)
    for k, (got, want) in enumerate(zip(results[1], results[0], strict=True)):
        assert torch.equal(got, want), f"call {k}"
    assert torch.equal(one.state, other.state)
    assert bool(results[0][-1].isfinite().all()) and bool(results[0][-1].any())


@pytest.mark.parametrize("graphs", [True, False])
def test_the_same_bits(graphs: bool) -> None:
    check(graphs, lambda made, k: None)


@pytest.mark.parametrize("graphs", [True, False])
def test_weights_that_are_written_right_before_a_call(graphs: bool) -> None:
    """Kernels load weights before they wait, but none starts before what was enqueued before the call has ended."""

    def between(made: Counting, k: int) -> None:
        for step in made.steps:
            step.up.weight.mul_(1.01 if k % 2 else 0.99)
            step.norm.weight.add_(0.001)

    check(graphs, between)


def test_weights_that_are_not_aligned() -> None:
    """They are copied between two launches."""

    def between(made: Counting, k: int) -> None:
        if k == 3:
            for step in made.steps:
                moved = torch.empty(WIDTH + 1, device="cuda", dtype=torch.bfloat16)[1:]
                step.norm.weight.data = moved.copy_(step.norm.weight)

    check(False, between)
