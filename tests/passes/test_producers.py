"""Which layer makes what another one is given: through activations, pools, norms and views, and through nothing else."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from fxopt.ir.layers import layers
from fxopt.journal import Journal
from fxopt.passes.context import Context, DefaultOptions
from fxopt.passes.pipeline import _UP_TO_LAYERS, run_passes
from fxopt.passes.producers import Producer, Producers
from tests.passes.graphs import capture

W, V = torch.randn(6, 4, 3, 3), torch.randn(8, 6, 1, 1)
A, B = torch.randn(6, 4), torch.randn(5, 6)


def producer(fn: Callable[..., Tensor], *args: Tensor) -> Producer | None:
    """Of what the last layer of `fn` is given, whose arguments after the first are frozen."""
    graph = capture(fn, args, frozen=tuple(range(1, len(args))))
    context: Context = run_passes(_UP_TO_LAYERS, graph, DefaultOptions(check=True), Journal("test"), check=True)
    found = layers(context.graph)
    return Producers(context.graph, found).of(found[-1].x)


def norm(x: Tensor, mean: Tensor, inverse: Tensor) -> Tensor:
    return (x - mean[:, None, None]) * inverse[:, None, None]


THROUGH: dict[str, tuple[Any, tuple[Tensor, ...], int]] = {
    "relu": (lambda x, w, v: F.conv2d(torch.relu(F.conv2d(x, w)), v), (torch.randn(2, 4, 8, 8), W, V), 1),
    "a pool": (lambda x, w, v: F.conv2d(F.max_pool2d(F.conv2d(x, w), 2), v), (torch.randn(2, 4, 8, 8), W, V), 1),
    "an average": (lambda x, w, v: F.conv2d(F.avg_pool2d(F.conv2d(x, w), 2), v), (torch.randn(2, 4, 8, 8), W, V), 1),
    "nothing": (lambda x, a, b: F.linear(F.linear(x, a), b), (torch.randn(7, 4), A, B), 1),
    "views": (lambda x, a, b: F.linear(F.linear(x, a).view(2, 3, 6).relu(), b), (torch.randn(6, 4), A, B), 1),
    "a slope": (lambda x, a, b: F.linear(F.leaky_relu(F.linear(x, a), 0.1), b), (torch.randn(2, 3, 4), A, B), 1),
    "the mean of places": (
        lambda x, w, b: F.linear(F.conv2d(x, w).relu().mean((2, 3)), b),
        (torch.randn(2, 4, 8, 8), W, B),
        1,
    ),
    "images made rows": (
        lambda x, w, b: F.linear(F.conv2d(x, w).relu().flatten(1), b),
        (torch.randn(2, 4, 4, 4), W, torch.randn(5, 24)),
        4,
    ),
}


@pytest.mark.parametrize("name", THROUGH)
def test_it_is_found_through(name: str) -> None:
    fn, args, repeats = THROUGH[name]
    found = producer(fn, *args)
    assert found is not None and (found.layer, found.repeats, found.gains) == ("", repeats, None)


def test_a_norm_is_part_of_it() -> None:
    mean, inverse = torch.randn(6), torch.randn(6)
    found = producer(
        lambda x, w, m, i, v: F.conv2d(norm(F.conv2d(x, w), m, i).relu(), v), torch.randn(2, 4, 8, 8), W, mean, inverse, V
    )
    assert found is not None and found.gains is not None
    torch.testing.assert_close(found.gains, inverse.abs())


BETWEEN: dict[str, tuple[Any, tuple[Tensor, ...]]] = {
    "another activation": (lambda x, a, b: F.linear(F.gelu(F.linear(x, a)), b), (torch.randn(7, 4), A, B)),
    "a residual": (lambda x, a, b: F.linear(F.linear(x, a) + x.sum(), b), (torch.randn(7, 4), A, B)),
    "an upper limit": (lambda x, a, b: F.linear(F.relu6(F.linear(x, a)), b), (torch.randn(7, 4), A, B)),
    "an exchange": (lambda x, a, b: F.linear(F.linear(x, a).t().contiguous(), b), (torch.randn(6, 4), A, B)),
    "channels last in rows": (
        lambda x, w, b: F.linear(F.conv2d(x, w).permute(0, 2, 3, 1).flatten(1), b),
        (torch.randn(2, 4, 4, 4), W, torch.randn(5, 24)),
    ),
    "a mean of channels": (
        lambda x, w, b: F.linear(F.conv2d(x, w).mean((1, 3)), b),
        (torch.randn(2, 4, 8, 8), W, torch.randn(5, 6)),
    ),
    "no layer": (lambda x, a: F.linear(torch.relu(x), a), (torch.randn(7, 4), A)),
}


@pytest.mark.parametrize("name", BETWEEN)
def test_none_is_found_behind(name: str) -> None:
    fn, args = BETWEEN[name]
    assert producer(fn, *args) is None
