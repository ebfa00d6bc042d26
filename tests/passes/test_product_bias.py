"""Biases of products, where CPUs are among the devices whose generated kernels add them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from fxopt.passes import product_bias as pass_module
from tests.numerics import assert_closer, to_float64
from tests.passes.graphs import calls, execute, optimize

HALF = torch.bfloat16
ARGS = tuple(t.to(HALF) for t in (torch.randn(4, 6, 8), torch.randn(16, 8), torch.randn(16), torch.randn(4, 6, 16)))


@pytest.fixture(autouse=True)
def _cpus_add_later(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pass_module, "adds_bias_later", lambda device: True)


def activated(x: Tensor, w: Tensor, b: Tensor, y: Tensor) -> Tensor:
    return F.gelu(F.linear(x, w, b))


def added_and_normed(x: Tensor, w: Tensor, b: Tensor, y: Tensor) -> Tensor:
    return F.layer_norm(y + F.linear(x, w, b), (16,))


def heads_scaled(x: Tensor, w: Tensor, b: Tensor, y: Tensor) -> Tensor:
    return torch.addmm(b, x.flatten(0, 1), w.t()).view(4, 6, 2, 8).transpose(1, 2) * 0.5


@pytest.mark.parametrize("fn", [activated, added_and_normed, heads_scaled], ids=lambda fn: fn.__name__)
def test_the_kernel_that_reads_a_product_adds_its_bias(fn: Callable[..., Any]) -> None:
    graph, context = optimize(fn, ARGS)
    assert "mm" in calls(graph) and "addmm" not in calls(graph)
    assert sum(r.rule == "product_bias.bias_later" for r in context.log) == 1
    assert_closer(execute(graph, ARGS)[0], fn(*ARGS), fn(*to_float64(ARGS)))


def returned(x: Tensor, w: Tensor, b: Tensor, y: Tensor) -> Tensor:
    return F.linear(x, w, b)


def returned_too(x: Tensor, w: Tensor, b: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
    made = F.linear(x, w, b)
    return made.view(24, 16), F.gelu(made)


def for_a_product(x: Tensor, w: Tensor, b: Tensor, y: Tensor) -> Tensor:
    return F.linear(x, w, b) @ w


def full_addend(x: Tensor, w: Tensor, b: Tensor, y: Tensor) -> Tensor:
    return F.gelu(torch.addmm(y.flatten(0, 1), x.flatten(0, 1), w.t()))


def scaled_bias(x: Tensor, w: Tensor, b: Tensor, y: Tensor) -> Tensor:
    return F.gelu(torch.addmm(b, x.flatten(0, 1), w.t(), beta=2))


@pytest.mark.parametrize("fn", [returned, returned_too, for_a_product, full_addend, scaled_bias], ids=lambda fn: fn.__name__)
def test_the_library_adds_it_to_what_else_has_to_stand_in_memory(fn: Callable[..., Any]) -> None:
    graph, _ = optimize(fn, ARGS)
    assert "addmm" in calls(graph)


def test_it_adds_it_in_float32_where_products_are_exact() -> None:
    graph, _ = optimize(activated, tuple(t.float() for t in ARGS))
    assert "addmm" in calls(graph)
