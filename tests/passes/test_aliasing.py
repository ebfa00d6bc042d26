"""Outputs stay as fresh, as shared and as written as eager's, whatever is merged or removed."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import fx

from fxopt.ir import spec
from fxopt.ir.graph import Graph, Input, Phase, Role
from fxopt.journal import Journal
from fxopt.passes.context import DefaultOptions
from fxopt.passes.pipeline import run
from tests.passes.graphs import assert_identical, calls, execute, optimize

aten = torch.ops.aten

FUNCTIONS: dict[str, Callable[..., Any]] = {
    "a clone of an input is fresh": lambda x: x.clone(),
    "an input times one is fresh": lambda x: x * 1,
    "two clones of a value": lambda x: ((y := x.exp()).clone(), y.clone(), y),
    "equal outputs do not share": lambda x: (x.exp(), x.exp()),
    "equal outputs through views do not share": lambda x: (x.exp().view(-1), x.exp().t()),
    "a view of an input": lambda x: x.view(-1),
    "a view of an input and a copy": lambda x: (x.view(-1), x.clone().view(-1)),
    "an input returned": lambda x: (x, x.view(3, 4), x * 1),
    "one value twice": lambda x: ((y := x.exp()), y),
    "views of one value": lambda x: ((y := x.exp()).view(-1), y.t()),
    "a copy of part": lambda x: (x.exp()[:2] * 1).t(),
    "a split and a copied piece": lambda x: (*x.split(2, 1), x.split(2, 1)[0] * 1),
    "transposed clone keeps its strides": lambda x: x.t().clone(),
    "contiguous copy": lambda x: x.t().contiguous(),
    "where picks an output": lambda x: torch.where(torch.ones(3, 4, dtype=torch.bool), x, -x),
    "full outputs": lambda x: (torch.zeros(3), torch.zeros(3), x.new_ones(2, 2)),
}


@pytest.mark.parametrize("name", FUNCTIONS)
def test_outputs_alias_as_in_eager(name: str) -> None:
    args = (torch.randn(3, 4),)
    graph, _ = optimize(FUNCTIONS[name], args)
    assert_identical(graph, FUNCTIONS[name], args)


def test_equal_values_merge_when_only_one_leaves() -> None:
    graph, _ = optimize(lambda x: (x.exp(), x.exp().sin()), (torch.randn(4),))
    assert calls(graph).count("exp") == 1


def test_writes_into_inputs_are_eagers() -> None:
    def swap(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
        old = a.clone()
        a.copy_(b * 1)
        b.copy_(old)
        return a + b

    args = (torch.randn(5), torch.randn(5))
    graph, _ = optimize(swap, args)
    assert calls(graph).count("copy_") == 2
    assert_identical(graph, swap, args)


def test_a_swap_keeps_its_copies() -> None:
    """copy_(a, clone(b)); copy_(b, clone(a)): without the clones the second would read what the first wrote."""
    graph = fx.Graph()
    mode = torch._subclasses.FakeTensorMode()
    fake = mode.from_tensor(torch.empty(3))
    a, b = graph.placeholder("a"), graph.placeholder("b")
    copies = [graph.call_function(aten.clone.default, (n,)) for n in (a, b)]
    writes = [graph.call_function(aten.copy_.default, pair) for pair in ((a, copies[1]), (b, copies[0]))]
    graph.output(())
    for node in (a, b, *copies, *writes):
        node.meta["val"] = fake
    inputs = [Input("a", Role.STATE), Input("b", Role.STATE)]
    whole = Graph(fx.GraphModule({}, graph), inputs, Phase.INFERENCE, "swap")
    run(whole, DefaultOptions(check=True), Journal("swap"))
    x, y = torch.arange(3.0), -torch.ones(3)
    execute(whole, (x, y))
    assert x.tolist() == [-1, -1, -1]
    assert y.tolist() == [0, 1, 2]


def test_random_values_are_neither_merged_nor_removed() -> None:
    def function(x: torch.Tensor) -> torch.Tensor:
        torch.rand_like(x)
        return torch.rand_like(x) + torch.rand_like(x) * x

    graph, _ = optimize(function, (torch.randn(4),))
    assert calls(graph).count("rand_like") == 3


def test_uninitialised_memory_is_not_merged() -> None:
    graph, _ = optimize(
        lambda x: aten.copy(torch.empty(3, 4), x[0]) + aten.copy(torch.empty(3, 4), x[1]), (torch.randn(2, 4),)
    )
    assert calls(graph).count("empty") == 2


def test_assertions_stay() -> None:
    def function(x: torch.Tensor) -> torch.Tensor:
        torch._assert_async((x > 0).all(), "positive")
        return x * 2

    graph, _ = optimize(function, (torch.ones(4),))
    assert "_assert_async" in calls(graph)


def test_module_attribution_survives_merging() -> None:
    graph, _ = optimize(lambda x: x.exp() * 1 + x.exp().sin(), (torch.randn(4),))
    spec.check(graph, None)
    assert all("val" in n.meta for n in graph.gm.graph.nodes if n.op != "output")
