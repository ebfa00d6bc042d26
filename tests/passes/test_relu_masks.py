"""Gradients of relus that ask what went into the relu, with CPUs counted among the devices that wait for memory."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fxopt import compiler
from fxopt.ir.graph import Phase
from fxopt.journal import RECENT
from fxopt.passes import relu_masks as pass_module
from fxopt.runtime.plan import Plan
from tests.numerics import assert_closer, to_float64

pytestmark = pytest.mark.usefixtures("fresh_cache")
RULE = "relu_masks.before_relu"


@pytest.fixture
def plans(monkeypatch: pytest.MonkeyPatch) -> list[tuple[Phase, Plan]]:
    """Those that are made in a test."""
    found: list[tuple[Phase, Plan]] = []

    def note(executor: Any, phase: Phase, *others: Any) -> Any:
        found.append((phase, executor.plan))
        return executor

    RECENT.clear()
    torch.compiler.reset()
    monkeypatch.setattr(pass_module, "waits_for_memory", lambda device: True)
    monkeypatch.setattr(compiler, "with_graphs", note)
    return found


class Normed(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.one, self.two = nn.Conv2d(3, 8, 3, padding=1, bias=False), nn.Conv2d(8, 8, 1, bias=False)
        self.norm, self.last = nn.BatchNorm2d(8), nn.BatchNorm2d(8)

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(self.last(self.two(F.relu(self.norm(self.one(x))))))


class Residual(Normed):
    """What goes into the last relu is made of two values."""

    def forward(self, x: Tensor) -> Tensor:
        first = self.one(x)
        return F.relu(self.last(self.two(first)) + first)


class Scaled(Normed):
    """Nothing in the backward reads what went into the relu."""

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(self.one(x) * 2.0)


def step(module: Any, original: nn.Module, x: Tensor) -> list[Tensor]:
    result = module(x)
    parameters = [p for p in original.parameters() if p.requires_grad]
    return [result.detach(), *torch.autograd.grad(result.square().mean(), parameters, allow_unused=True)]


def agree(kind: type[nn.Module], dtype: torch.dtype) -> None:
    model, x = kind().to(dtype), torch.randn(4, 3, 16, 16).to(dtype)
    eager, wide = copy.deepcopy(model), to_float64(model)
    actual = step(torch.compile(model, backend="fxopt", options={"strict": True}), model, x)
    given = [step(eager, eager, x), step(wide, wide, x.double())]
    kept = [i for i, each in enumerate(actual) if each is not None]
    assert_closer([actual[i] for i in kept], *([each[i] for i in kept] for each in given), k=16)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_after_a_norm(plans: list[tuple[Phase, Plan]], dtype: torch.dtype) -> None:
    agree(Normed, dtype)
    assert f"{RULE} x2" in [text for journal in RECENT for _, text in journal.notes]
    (forward,) = (plan for phase, plan in plans if phase is Phase.FORWARD)
    specs = {b.name: b for b in forward.buffers}
    saved = [specs[out.name] for out in forward.outputs[-forward.saved :] if getattr(out, "name", None) in specs]
    large = [b for b in saved if b.shape == (4, 8, 16, 16)]
    assert len(large) == 3 and {b.dtype for b in large} == {dtype}, "two products and what the second reads, no mask"


@pytest.mark.parametrize("kind", [Residual, Scaled])
def test_left_alone(plans: list[tuple[Phase, Plan]], kind: type[nn.Module]) -> None:
    agree(kind, torch.float32)
    notes = [text for journal in RECENT for _, text in journal.notes]
    assert not any(RULE in text for text in notes) and plans
