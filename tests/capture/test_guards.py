"""Fewer guards: what is still looked at in a call, and what no longer is."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

from fxopt import Options
from fxopt.capture.guards import trust_modules


class Scaled(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Sequential(nn.Linear(4, 4), nn.Dropout(0.5))
        self.factor = 2.0

    def forward(self, x: torch.Tensor, count: int = 1) -> torch.Tensor:
        return self.inner(x) * self.factor * count


class Counting:
    """A backend that runs graphs as they are, with fewer guards."""

    def __init__(self, trusting: bool = True) -> None:
        self.trusting, self.compilations, self.dropped = trusting, 0, 0

    def __call__(self, gm: torch.fx.GraphModule, inputs: list[Any]) -> Callable[..., Any]:
        self.compilations += 1
        if self.trusting:
            self.dropped += trust_modules()
        return gm.forward


def compiled(backend: Counting) -> tuple[Scaled, Callable[..., torch.Tensor]]:
    torch._dynamo.reset()
    model = Scaled().eval()
    return model, torch.compile(model, backend=backend, dynamic=False)


def check(model: Scaled, run: Callable[..., torch.Tensor], *args: Any) -> None:
    with torch.no_grad():
        torch.testing.assert_close(run(*args), model(*args))


def test_tensors_arguments_and_modes_are_still_looked_at():
    backend = Counting()
    model, run = compiled(backend)
    x = torch.randn(3, 4)
    check(model, run, x)
    assert backend.dropped > 0
    check(model, run, torch.randn(5, 4))
    check(model, run, x, 3)
    model.inner[0].weight = nn.Parameter(torch.randn(6, 4))
    model.inner[0].bias = nn.Parameter(torch.randn(6))
    check(model, run, x)
    model.double()
    check(model, run, x.double())
    assert backend.compilations == 5
    run(x.double())  # gradients are on
    assert backend.compilations == 6
    check(model, run, x.double())
    assert backend.compilations == 6


def test_training_mode_is_still_looked_at():
    backend = Counting()
    model, run = compiled(backend)
    x = torch.ones(64, 4)
    check(model, run, x)
    model.train()
    assert (run(x) == 0).any()
    model.eval()
    check(model, run, x)
    assert backend.compilations == 2


def test_attributes_of_modules_are_taken_to_stay():
    found = []
    for trusting in (False, True):
        model, run = compiled(Counting(trusting))
        x = torch.randn(3, 4)
        check(model, run, x)
        before = run(x)
        model.factor = 4.0
        found.append(run(x) / before)
    torch.testing.assert_close(found[0], torch.full((3, 4), 2.0))
    torch.testing.assert_close(found[1], torch.ones(3, 4))


CHANGES: dict[str, Callable[[Scaled], Any]] = {
    "an attribute of a module within": lambda m: setattr(m.inner[1], "p", 0.25),
    "a module's class": lambda m: setattr(m.inner[1], "__class__", nn.Identity),
}


@pytest.mark.parametrize("what", CHANGES)
def test_what_is_promised_is_not_looked_at(what: str):
    backend = Counting()
    model, run = compiled(backend)
    x = torch.randn(3, 4)
    with torch.no_grad():
        before = run(x)
        CHANGES[what](model)
        torch.testing.assert_close(run(x), before)
    assert backend.compilations == 1


def test_weights_may_be_trained_loaded_and_replaced():
    backend = Counting()
    model, run = compiled(backend)
    x = torch.randn(3, 4)
    check(model, run, x)
    with torch.no_grad():
        model.inner[0].weight.mul_(2)
    check(model, run, x)
    model.load_state_dict(Scaled().state_dict())
    check(model, run, x)
    model.load_state_dict(Scaled().state_dict(), assign=True)
    check(model, run, x)
    model.inner[0].weight = nn.Parameter(torch.randn(4, 4))
    check(model, run, x)
    assert backend.compilations == 1


def test_nothing_happens_outside_of_a_compilation():
    assert trust_modules() == 0


def test_the_option_reaches_the_guards():
    torch._dynamo.reset()
    model, x = Scaled().eval(), torch.randn(3, 4)
    run = torch.compile(model, backend="fxopt", options={"steady_modules": True})
    with torch.no_grad():
        before = run(x)
        model.factor = 4.0
        torch.testing.assert_close(run(x), before)
    assert "steady_modules" not in Options.parse(None, {}).cache_key_facts()
