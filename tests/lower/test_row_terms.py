"""Sums over all rows of what is picked out of each: who computes the terms, and that values stay what they were."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from fxopt.capture.decompositions import decompositions
from fxopt.ir.region import Region
from fxopt.lower import row_terms
from fxopt.lower.schedule import schedule
from fxopt.tune.made_up import index_bounds
from tests.lower.capturing import moved
from tests.lower.harness import lower
from tests.lower.interpreter import run_lowered
from tests.numerics import assert_closer, to_float64

ROWS, CLASSES = 40, row_terms.SHORTEST_ROW_BYTES // 2


def regions(fn: Callable[..., object], *args: Tensor, device: str = "cuda") -> list[Region]:
    """The regions of `fn`; values are compared with eager's on the way."""
    scheduled = schedule(moved(lower(fn, args, decompose=decompositions()), device))
    low = moved(scheduled, "cpu")
    got = tuple(run_lowered(low, dict(zip(low.inputs, args, strict=True))))
    eager, exact = fn(*args), fn(*to_float64(args))
    assert_closer(got if isinstance(eager, tuple) else got[0], eager, exact)
    return [s for s in scheduled.steps if isinstance(s, Region)]


def logits_and_target(dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor]:
    target = torch.randint(CLASSES, (ROWS,))
    target[::7] = -100
    return torch.randn(ROWS, CLASSES, dtype=dtype), target


def loss(logits: Tensor, target: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
    """A weighted cross-entropy with ignored rows and smoothed labels, and what its backward needs of each row."""
    scale, shown = logits.logsumexp(1), target != -100
    index = torch.where(shown, target, 0)
    own = torch.where(shown, weight[index], 0)
    picked = (own * (scale - logits.gather(1, index[:, None])[:, 0])).sum() / own.sum()
    smooth = ((scale[:, None] - logits) * weight).sum(1)
    return picked + 0.1 * torch.where(shown, smooth, 0).sum() / own.sum(), scale


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_cross_entropy_picks_where_its_rows_are(dtype: torch.dtype) -> None:
    logits, target = logits_and_target(dtype)
    rows, total = regions(loss, logits, target, torch.rand(CLASSES, dtype=dtype))
    assert rows.nest.reduced and not total.nest.points
    assert not any(load.indirect for load in total.nest.loads())
    assert set(total.reads()) <= set(rows.writes()), "nothing but terms"
    assert list((index_bounds(rows) or {}).values()) == [CLASSES], "so it can be measured on made-up targets"
    apart = regions(loss, logits, target, torch.rand(CLASSES, dtype=dtype), device="cpu")
    assert any(load.indirect for load in apart[-1].nest.loads())


def test_short_rows_do_not_wait_for_what_they_pick() -> None:
    logits, target = logits_and_target()
    short = CLASSES // 4
    found = regions(loss, logits[:, :short].contiguous(), target % short, torch.rand(short))
    assert not any("terms" in name for region in found for name in region.writes())


def test_what_is_not_picked_is_added_up_apart() -> None:
    """The sum would be no faster for it, and the terms are as much to write as what the rows reduce to."""
    rows, total = regions(lambda x: (x.logsumexp(1), x.logsumexp(1).square().mean()), torch.randn(ROWS, CLASSES))
    assert not any("terms" in name for name in (*rows.writes(), *total.reads()))


def test_an_index_that_is_made_of_the_rows_comes_too_late() -> None:
    def fn(x: Tensor) -> tuple[Tensor, Tensor]:
        total = x.exp().sum(1)
        index = (total.argsort() % CLASSES)[:, None]
        return total, (x.gather(1, index)[:, 0] / total).sum()

    assert not any("terms" in name for region in regions(fn, torch.randn(ROWS, CLASSES)) for name in region.writes())
