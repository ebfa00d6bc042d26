"""Grouped products (mixtures of experts): what becomes a contraction, the values of every way, and what stays a call."""

from __future__ import annotations

from collections.abc import Callable
from itertools import pairwise
from typing import Any

import pytest
import torch
import torch.nn.functional as F

from fxopt.ir.region import Call, Contraction
from fxopt.lower.contractions import FUSED, LIBRARY, TWO
from tests.lower.contracting import alternatives, kept, searched
from tests.lower.interpreter import run_lowered
from tests.numerics import assert_closer

BF16 = torch.bfloat16
ENDS = torch.tensor([10, 10, 47, 48, 75], dtype=torch.int32)
ROWS, DEPTH, COLUMNS, GROUPS = 75, 64, 96, len(ENDS)


def multiplied(x: torch.Tensor, w: torch.Tensor, ends: torch.Tensor) -> torch.Tensor:
    """The product by weights [G, N, K], in any floating dtype."""
    if x.dtype == BF16:
        return torch._grouped_mm(x, w.transpose(-1, -2), offs=ends)
    starts = [0, *ends.tolist()]
    return torch.cat([x[s:e] @ w[g].T for g, (s, e) in enumerate(pairwise(starts))])


def activated(x: torch.Tensor, w: torch.Tensor, ends: torch.Tensor) -> torch.Tensor:
    return torch.relu(multiplied(x, w, ends))


def weighted(x: torch.Tensor, w: torch.Tensor, ends: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    return multiplied(x, w, ends) * scale[:, None]


def gated(x: torch.Tensor, w: torch.Tensor, ends: torch.Tensor) -> torch.Tensor:
    gate, up = multiplied(x, w, ends).chunk(2, -1)
    return F.silu(gate) * up


def gated_by_two(x: torch.Tensor, v: torch.Tensor, w: torch.Tensor, ends: torch.Tensor) -> torch.Tensor:
    return F.silu(multiplied(x, v, ends)) * multiplied(x, w, ends)


def operands(dtype: torch.dtype = BF16) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    return torch.randn(ROWS, DEPTH).to(dtype), torch.randn(GROUPS, COLUMNS, DEPTH).to(dtype) / 8, ENDS


X, W, _ = operands()
LAYERS: dict[str, tuple[Callable[..., Any], tuple[torch.Tensor, ...], list[str]]] = {
    "activation": (activated, (X, W, ENDS), [LIBRARY, FUSED]),
    "weights of the rows": (weighted, (X, W, ENDS, torch.rand(ROWS).to(BF16)), [LIBRARY, FUSED]),
    "gated, one weight": (gated, (X, W, ENDS), [LIBRARY, TWO]),
    "gated, two weights": (gated_by_two, (X, W, W.flip(0), ENDS), [LIBRARY, FUSED, TWO]),
    "few rows": (activated, (X[:5], W, ENDS.clamp(max=5)), [LIBRARY, FUSED]),
    "one row": (activated, (X[:1], W, ENDS.clamp(max=1)), [LIBRARY, FUSED]),
}


@pytest.mark.parametrize("name", LAYERS)
def test_every_way_is_right(name: str) -> None:
    fn, args, labels = LAYERS[name]
    low = searched(fn, *args)
    (found,) = alternatives(low)
    assert [w.label for w in found.ways] == labels
    exact = fn(*(x.double() if x.is_floating_point() else x for x in args))
    for label in labels:
        (got,) = run_lowered(kept(low, label), dict(zip(low.inputs, args, strict=True)))
        assert_closer(got, fn(*args), exact)
    assert all(s.ends for w in found.ways for s in w.steps if isinstance(s, Contraction))


def test_products_in_other_groups_are_no_pair() -> None:
    def fn(x: torch.Tensor, v: torch.Tensor, w: torch.Tensor, ends: torch.Tensor, other: torch.Tensor) -> torch.Tensor:
        return F.silu(multiplied(x, v, ends)) * multiplied(x, w, other)

    found = alternatives(searched(fn, X, W, W.flip(0), ENDS, ENDS.clone()))
    assert [w.label for each in found for w in each.ways] == [LIBRARY, FUSED]


LEFT_ALONE: dict[str, tuple[Callable[..., Any], tuple[torch.Tensor, ...]]] = {
    "groups of the inner dimension": (
        lambda x, y, ends: torch.relu(torch._grouped_mm(x.T, y, offs=ends)), (X, torch.randn(ROWS, 32).to(BF16), ENDS)
    ),
    "groups of columns": (
        lambda w, x, ends: torch.relu(torch._grouped_mm(w, x.T, offs=ends)), (W, torch.randn(80, DEPTH).to(BF16), ENDS)
    ),
    "a batch": (lambda x, w: torch.relu(torch._grouped_mm(x, w.mT)), (torch.randn(GROUPS, 16, DEPTH).to(BF16), W)),
    "ends that are apart": (lambda x, w, e: activated(x, w, e[::2]), (X, W, ENDS.repeat_interleave(2))),
}  # fmt: skip


@pytest.mark.parametrize("name", LEFT_ALONE)
def test_left_to_the_library(name: str) -> None:
    fn, args = LEFT_ALONE[name]
    low = searched(fn, *args)
    assert not alternatives(low)
    assert [s.op for s in low.steps if isinstance(s, Call)] == ["aten::_grouped_mm.default"]


def test_compiled_values_and_gradients() -> None:
    """Without retreats; the gradients' products group other dimensions."""
    pytest.importorskip("triton")
    torch.compiler.reset()

    def step(fn: Callable[..., Any], dtype: torch.dtype) -> list[torch.Tensor]:
        x, w = (t.to(dtype).requires_grad_() for t in (X, W))
        out = fn(x, w, ENDS)
        return [out.detach(), *torch.autograd.grad(out.float().square().sum(), (x, w))]

    compiled = torch.compile(gated, backend="fxopt", options={"strict": True})
    assert_closer(step(compiled, BF16), step(gated, BF16), step(gated, torch.float64))
