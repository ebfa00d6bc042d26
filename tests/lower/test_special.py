"""Special functions against float64, next to eager: poles, reflections, both ends of the range."""

from __future__ import annotations

import itertools
import math

import pytest
import torch

from tests.lower.capturing import library_calls, lower_function
from tests.lower.harness import check, outputs
from tests.numerics import assert_closer

EDGES = [0.0, -0.0, 1.0, -1.0, -2.0, 0.5, 1e-20, -1e-20, 10.0, 9.999, 1e17, 1e30, math.inf, -math.inf, math.nan]
FLOATS = (torch.float64, torch.float32, torch.bfloat16)


POINTS = torch.cat([torch.tensor(EDGES), torch.linspace(-8.77, -0.03, 23), torch.linspace(0.01, 30, 97)])


@pytest.mark.parametrize(
    ("order", "dtype"),
    [*itertools.product((0, 1), FLOATS), *itertools.product((2, 3, 4, 7), (torch.float32, torch.bfloat16))],
)
def test_each_point(order: int, dtype: torch.dtype) -> None:
    """One by one: next to a pole an error at another point would not show."""

    def fn(x: torch.Tensor) -> torch.Tensor:
        return torch.polygamma(order, x)

    x = POINTS.to(dtype)
    (got,) = outputs(fn, x)
    for triple in zip(got, fn(x), fn(x.double()), strict=True):
        assert_closer(*triple)


def test_integers_are_floats_first() -> None:
    check(torch.digamma, torch.arange(1, 9))


def test_higher_derivatives_stay_with_eager() -> None:
    lowered = lower_function(lambda x: torch.polygamma(20, x), (torch.rand(3) + 1,))
    assert library_calls(lowered) == ["aten::polygamma.default"]
