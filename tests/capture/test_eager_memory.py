"""Lifetimes of eager's values."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch.fx.experimental.proxy_tensor import make_fx

from fxopt.capture.decompositions import decompositions
from fxopt.capture.eager_memory import eager_peak
from fxopt.capture.symbols import to_int
from fxopt.ir.graph import Graph, Phase

CPU = torch.device("cpu")
KIB = 1 << 10


def captured(fn: Callable[..., Any], *args: torch.Tensor, mode: str = "fake") -> Graph:
    gm = make_fx(fn, decomposition_table=decompositions(), tracing_mode=mode)(*args)
    return Graph(gm, [], Phase.INFERENCE, "test", to_int)


CASES: dict[str, tuple[Callable[..., Any], int]] = {
    "one value after the other": (lambda x: x.exp().sin().cos().tan(), 2),
    "one that waits": (lambda x: (y := x.exp()).sin().cos() + y, 3),
    "a view is no memory of its own": (lambda x: x.exp().view(2, -1).t().sin(), 2),
    "a view keeps its base": (lambda x: ((y := x.exp().view(2, -1)).sum() + y.sum(), x.sin().cos())[1] + y.view(-1), 3),
    "parts of a tuple": (lambda x: x.exp().split(32)[0].sin(), 1),
    "an input": (lambda x: x.view(-1), 0),
}


@pytest.mark.parametrize("name", CASES)
def test_what_lives_at_the_peak(name: str) -> None:
    fn, values = CASES[name]
    found = eager_peak(captured(fn, torch.randn(16, 16).view(-1)), CPU)
    assert found is not None
    assert found // KIB == values


def test_an_op_that_is_decomposed_is_one_kernel() -> None:
    graph = captured(lambda x: torch.nn.functional.silu(x), torch.randn(256))
    assert eager_peak(graph, CPU) == 2 * KIB
    for node in graph.gm.graph.nodes:
        if node.op == "call_function":
            node.meta["original_aten"] = torch.ops.aten.silu.default  # as AOTAutograd notes it
    assert eager_peak(graph, CPU) == 1 * KIB


def test_another_device_and_symbols() -> None:
    assert eager_peak(captured(torch.exp, torch.randn(8)), torch.device("cuda", 0)) == 0
    assert eager_peak(captured(torch.exp, torch.randn(8), mode="symbolic"), CPU) is None
