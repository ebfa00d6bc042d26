"""Casts are not kernels of their own: they are in the norm's that makes rows, and in the epilogue of the product before."""

from __future__ import annotations

import functools

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from fxopt.capture.decompositions import decompositions
from fxopt.ir.region import Alternatives, Region
from fxopt.journal import Journal
from fxopt.lower import lower_graph
from fxopt.lower.contractions import with_contractions
from fxopt.lower.ops import quantized
from fxopt.lower.schedule import schedule
from fxopt.passes.context import DefaultOptions
from fxopt.passes.pipeline import run
from fxopt.precision import Decisions
from tests.lower.capturing import moved
from tests.passes import graphs
from tests.passes.test_quantize import Ranges

WIDTH = 128
ROWS = 256
RANGES = Ranges({"": ((4 * WIDTH, WIDTH), 0.03), "#1": ((WIDTH, 4 * WIDTH), 0.02)})


def gated(x: Tensor, gate: Tensor, down: Tensor) -> Tensor:
    """A norm, a product with an activation, a product with a residual."""
    normal = x * torch.rsqrt(x.square().mean(-1, keepdim=True) + 1e-6)
    h = F.silu(F.linear(normal, gate))
    return x + F.linear(h, down)


@pytest.mark.parametrize(("precision", "kernels"), [("int8", 1), ("int8-dynamic", 2)])
def test_what_is_left_beside_products(precision: str, kernels: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """With a scale known before, the norm; else the largest of each row is between the products, too."""
    monkeypatch.setattr(graphs, "make_fx", functools.partial(graphs.make_fx, decomposition_table=decompositions()))
    monkeypatch.setattr(quantized, "sums_apart", lambda device: False)  # as on a GPU
    args = torch.randn(ROWS, WIDTH), torch.randn(4 * WIDTH, WIDTH), torch.randn(WIDTH, 4 * WIDTH)
    graph = graphs.capture(gated, args, frozen=(1, 2))
    run(graph, DefaultOptions(precision=Decisions.of(precision), calibration=RANGES), Journal("test"))
    low = with_contractions(schedule(moved(lower_graph(graph, Journal("test")), "cuda")), every=True)
    products = [step for step in low.steps if isinstance(step, Alternatives)]
    assert len([step for step in low.steps if isinstance(step, Region)]) == kernels
    assert [len(each.ways[0].steps) for each in products] == [3 - kernels, 2]  # the library's call, and what follows it
    assert all(any(way.label == "fused" and len(way.steps) == 1 for way in each.ways) for each in products)
