"""Histograms of calibration as kernels: those of the eager op, of parts that are added up."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx

from fxopt.capture.symbols import to_int
from fxopt.ir import observer_ops
from fxopt.ir.graph import Graph, Input, Phase, Role
from fxopt.ir.observer_ops import exponent_histogram
from fxopt.ir.region import Call, Region
from fxopt.journal import Journal
from fxopt.lower import Lowered, lower_graph
from fxopt.lower.ops import observers
from fxopt.lower.schedule import schedule
from tests.lower.interpreter import run_lowered


def counted(x: Tensor) -> Tensor:
    return exponent_histogram(x, x.amin(), x.amax())


def on_a_gpu(shape: tuple[int, ...], strides: tuple[int, ...], dtype: torch.dtype, device: str = "cuda") -> Lowered:
    with FakeTensorMode(), torch.no_grad():
        x = torch.empty_strided(shape, strides, dtype=dtype, device=device)
        gm = make_fx(counted, tracing_mode="real")(x)
    names = [n.name for n in gm.graph.nodes if n.op == "placeholder"]
    graph = Graph(gm, [Input(n, Role.USER) for n in names], Phase.INFERENCE, "test", to_int)
    return schedule(lower_graph(graph, Journal("test", strict=True)))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("shape", [(7,), (33, 20), (2, 6, 5, 3)])
def test_counts_are_the_eager_ones(shape: tuple[int, ...], dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(observers, "NEIGHBORS", 16)  # several parts
    x = (torch.randn(shape) * 100).to(dtype)
    x.view(-1)[:5] = torch.tensor([0.0, -0.0, float("inf"), float("nan"), -3.0])
    x = x.contiguous(memory_format=torch.channels_last) if x.dim() == 4 else x
    low = on_a_gpu(x.shape, x.stride(), dtype)
    assert all(isinstance(step, Region) for step in low.steps)
    (got,) = run_lowered(low, dict(zip(low.inputs, (x,), strict=True)))
    assert torch.equal(got, exponent_histogram(x))


@pytest.mark.parametrize("bad", [None, float("nan"), float("-inf")])
def test_samples_have_both_ends(bad: float | None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(observer_ops, "MOST_COUNTED", 300)
    x = torch.randn(64, 12)
    x[3, 7], x[4, 2] = 1e4, -1e5
    if bad is not None:
        x[2, 5] = bad
    low = on_a_gpu(x.shape, x.stride(), x.dtype)
    (got,) = run_lowered(low, dict(zip(low.inputs, (x,), strict=True)))
    assert torch.equal(got, counted(x)) and int(got.sum()) < x.numel() / 2
    assert torch.equal(got, exponent_histogram(x))  # which finds the ends itself


def test_a_cpu_counts_by_the_op() -> None:
    low = on_a_gpu((8, 8), (8, 1), torch.float32, "cpu")
    assert [s.op for s in low.steps if isinstance(s, Call)] == ["fxopt::exponent_histogram.default"]
