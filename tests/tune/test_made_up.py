"""Regions that index memory by memory are measured on random valid indices, or not at all."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F

from fxopt.ir.region import Region
from fxopt.lower.schedule import schedule
from fxopt.target import Target
from fxopt.tune.candidate import triton_candidates
from fxopt.tune.made_up import index_bounds, indexes_indirectly
from tests.lower.capturing import lower_function, moved

TABLE, LABELS = torch.randn(50, 64), torch.randint(0, 50, (4096,))


def region_of(fn: Callable[..., torch.Tensor], *args: torch.Tensor) -> Region:
    low = schedule(moved(lower_function(fn, args), "cuda"))
    (region,) = (s for s in low.steps if isinstance(s, Region))
    return region


def bounds(fn: Callable[..., torch.Tensor], *args: torch.Tensor) -> list[object] | None:
    found = index_bounds(region_of(fn, *args))
    return None if found is None else list(found.values())


def test_elements_that_are_indices_stay_below_the_size_that_they_index() -> None:
    assert bounds(lambda t, i: t[i] * 2, TABLE, LABELS) == [50]
    assert bounds(lambda t, i: t[i.to(torch.int64)] * 2, TABLE, LABELS.to(torch.int32)) == [50]
    assert bounds(lambda t, i: t[torch.where(i == 7, 0, i)] * 2, TABLE, LABELS) == [50]


def test_an_element_that_indexes_twice_stays_below_the_smaller_size() -> None:
    assert bounds(lambda t, u, i: t[i] + u[i], TABLE, TABLE[:20].clone(), LABELS) == [20]


@pytest.mark.parametrize("computed", [lambda i: i + 1, lambda i: i * 2, lambda i: (i.float() * 1.5).long()])
def test_nothing_made_up_is_surely_right_for_computed_indices(computed: Callable[[torch.Tensor], torch.Tensor]) -> None:
    region = region_of(lambda t, i: t[computed(i)] * 2, TABLE, LABELS)
    assert indexes_indirectly(region) and index_bounds(region) is None
    assert len(triton_candidates(region, Target.cuda(90), "max-autotune")) == 1


def test_what_indexes_is_measured_where_indices_can_be_made_up() -> None:
    region = region_of(lambda x, i: F.nll_loss(F.log_softmax(x, 1), i, reduction="none"), torch.randn(4096, 512), LABELS)
    assert index_bounds(region) is not None
    assert len(triton_candidates(region, Target.cuda(90), "max-autotune")) > 1


def test_a_constant_out_of_bounds_is_not_measured() -> None:
    region = region_of(lambda t, i: t[torch.where(i == 7, 60, i)] * 2, TABLE, LABELS)
    assert index_bounds(region) is None


def test_what_indexes_nothing_has_no_bounds() -> None:
    region = region_of(lambda t: t * 2, TABLE)
    assert not indexes_indirectly(region) and index_bounds(region) == {}
