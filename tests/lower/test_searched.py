"""Scatters with products, extremes and means: duplicates, untouched places, x's own value, bad indices."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from tests.lower.capturing import library_calls, lower_function
from tests.lower.harness import check
from tests.lower.interpreter import run_lowered

REDUCTIONS = ["prod", "amax", "amin", "mean"]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.int64])
@pytest.mark.parametrize("include_self", [True, False])
@pytest.mark.parametrize("reduce", REDUCTIONS)
def test_scatter_reduce(reduce: str, include_self: bool, dtype: torch.dtype) -> None:
    x, src = (torch.randint(-9, 9, shape).to(dtype) for shape in ((4, 5), (3, 6)))
    index = torch.randint(0, 5, (3, 4))
    how: dict[str, Any] = {"reduce": reduce, "include_self": include_self}
    check(lambda x, i, s: x.scatter_reduce(1, i, s, **how), x, index, src)
    check(lambda x, i, s: x.scatter_reduce(0, i, s, **how), x, index % 4, src)


@pytest.mark.parametrize("include_self", [True, False])
@pytest.mark.parametrize("reduce", REDUCTIONS)
def test_index_reduce(reduce: str, include_self: bool) -> None:
    x, source = torch.randn(4, 5, 2), torch.randn(4, 7, 2)
    source[1, 3, 0] = float("nan")
    index = torch.tensor([0, 3, 3, 1, 0, 3, 1])
    check(lambda x, i, s: x.index_reduce(1, i, s, reduce, include_self=include_self), x, index, source)


def test_scatter_multiply() -> None:
    x, index = torch.randn(4, 5), torch.randint(0, 4, (3, 5))
    check(lambda x, i, s: x.scatter(0, i, s, reduce="multiply"), x, index, torch.randn(3, 5))
    check(lambda x, i: x.scatter(0, i, 3.0, reduce="multiply"), x, index)


@pytest.mark.parametrize("bad", [-1, 4])
def test_an_index_out_of_bounds_is_an_error(bad: int) -> None:
    args = (torch.randn(4, 5), torch.full((3, 5), bad), torch.randn(3, 5))
    lowered = lower_function(lambda x, i, s: x.scatter_reduce(0, i, s, "amax"), args)
    with pytest.raises(IndexError):
        run_lowered(lowered, dict(zip(lowered.inputs, args, strict=True)))


def test_nothing_to_scatter() -> None:
    x = torch.randn(4, 5)
    check(lambda x, i, s: x.scatter_reduce(0, i, s, "amax"), x, torch.empty(0, 5, dtype=torch.int64), torch.empty(0, 5))


def test_many_sources_stay_with_eager() -> None:
    args = (torch.randn(4), torch.randint(0, 4, (1000,)), torch.randn(1000))
    assert library_calls(lower_function(lambda x, i, s: x.scatter_reduce(0, i, s, "prod"), args)) == [
        "aten::scatter_reduce.two"
    ]
