"""The text of a Dynamo graph, for a cache key: equal only where AOTAutograd would make the same of it."""

from __future__ import annotations

import math
import operator
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import fx

from fxopt.capture import decompositions
from fxopt.capture.graph_text import graph_text
from fxopt.ir.canonical import UnwritableError

X = torch.randn(4, 6)


@dataclass
class Config:
    """As much of AOTConfig as there is in any version."""

    aot_id: int = 0
    keep_inference_input_mutations: bool = True
    static_input_indices: tuple[int, ...] = ()


def text(fn: Callable[..., Any], *inputs: torch.Tensor, config: Any = None) -> str:
    return graph_text(fx.symbolic_trace(fn), inputs or (X,), config or Config())


def relu(x: torch.Tensor) -> torch.Tensor:
    return torch.relu(x)


def scaled(x: torch.Tensor, factor: Any) -> torch.Tensor:
    return torch.mul(x, factor)


@pytest.mark.parametrize(
    ("one", "other"),
    [
        (lambda x: scaled(x, 1), lambda x: scaled(x, 1.0)),
        (lambda x: scaled(x, 1), lambda x: scaled(x, True)),
        (lambda x: scaled(x, 0.0), lambda x: scaled(x, -0.0)),
        (lambda x: torch.sub(x, x.sum(0)), lambda x: torch.sub(x.sum(0), x)),
        (lambda x: x.sum(0), lambda x: x.mean(0)),
        (lambda x: torch.nn.functional.gelu(x), lambda x: torch.nn.functional.silu(x)),
        (lambda x: operator.getitem(x, (..., 0)), lambda x: operator.getitem(x, (slice(None), 0))),
        (lambda x: x.to(torch.float64), lambda x: x.to(torch.float16)),
        (lambda x: (x, x + 1), lambda x: (x + 1, x)),
    ],
)
def test_different_graphs(one: Callable[..., Any], other: Callable[..., Any]) -> None:
    assert text(one) == text(one)
    assert text(one) != text(other)


@pytest.mark.parametrize(
    "other", [X.double(), X[:2], X.t().contiguous().t(), torch.randn(25)[1:].view(4, 6), X.clone().requires_grad_()]
)
def test_different_inputs(other: torch.Tensor) -> None:
    assert text(relu, X) != text(relu, other)


def test_settings() -> None:
    assert text(relu, config=Config()) != text(relu, config=Config(static_input_indices=(0,)))
    assert text(relu, config=Config(aot_id=7)) == text(relu, config=Config())


def test_names_mean_nothing() -> None:
    assert text(lambda x: torch.relu(x)) == text(lambda value: torch.relu(value))


@pytest.mark.parametrize("imitated", [None, "relu"])
def test_a_function_that_no_name_leads_to(imitated: str | None) -> None:
    def function(x: torch.Tensor) -> torch.Tensor:
        return x

    if imitated:
        function.__module__, function.__name__ = "torch", imitated
    graph = fx.Graph()
    graph.output(graph.call_function(function, (graph.placeholder("x"),)))
    with pytest.raises(UnwritableError, match="is not what"):
        graph_text(fx.GraphModule({}, graph), (X,), Config())


@pytest.mark.parametrize(
    "function",
    [
        *(F.max_pool2d, F.adaptive_avg_pool2d, F.gelu, F.layer_norm, F.scaled_dot_product_attention, F.cross_entropy),
        *(torch.conv2d, torch.matmul, torch.flatten, torch._C._nn.linear, torch._C._fft.fft_fft, torch.special.erf),
        *(operator.add, operator.getitem, getattr, math.sqrt, torch.ops.aten.add.Tensor, torch.ops.aten.relu),
    ],
)
def test_functions_of_torch_have_names(function: Any) -> None:
    graph = fx.Graph()
    graph.output(graph.call_function(function, (graph.placeholder("x"), "real")))
    module = fx.GraphModule({}, graph)
    assert getattr(function, "__name__", "") in graph_text(module, (X,), Config())


def test_a_module() -> None:
    with pytest.raises(UnwritableError, match="call_module"):
        graph_text(fx.symbolic_trace(torch.nn.Sequential(torch.nn.ReLU())), (X,), Config())


def test_another_decomposition(monkeypatch: pytest.MonkeyPatch) -> None:
    """A function that other code has registered is used, and is no graph's that was kept without it."""
    hardswish = torch.ops.aten.hardswish.default

    def registered(x: torch.Tensor) -> torch.Tensor:
        return x

    before = decompositions.fingerprint()
    assert before is not None and decompositions.Decompositions()[hardswish] is not registered
    monkeypatch.setitem(torch._decomp.decomposition_table, hardswish, registered)
    assert decompositions.fingerprint() is None
    assert decompositions.Decompositions()[hardswish] is registered
    registered.__module__ = "torch._decomp.elsewhere"
    assert decompositions.fingerprint() not in (None, before)
