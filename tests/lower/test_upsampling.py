"""Nearest-neighbour upsampling picks eager's very pixels, forward and backward."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F

from fxopt.ir.region import Region
from tests.lower.capturing import check_exact, library_calls, lower_function
from tests.lower.harness import check

aten = torch.ops.aten


@pytest.mark.parametrize("mode", ["nearest", "nearest-exact"])
@pytest.mark.parametrize("how", [{"scale_factor": 2}, {"scale_factor": 3}, {"size": 12}, {"size": 3}, {"scale_factor": 1.0}])
def test_forward(mode: str, how: dict[str, Any]) -> None:
    for shape in ((2, 3, 6), (1, 2, 6, 4), (1, 1, 6, 2, 4)):
        x = torch.randn(shape)
        check_exact(lambda x: F.interpolate(x, **how, mode=mode), x)
        check_exact(lambda x: F.interpolate(x.abs(), **how, mode=mode) + 1, x.transpose(0, 1))


def test_the_form_of_inference_is_one_kernel_in_half_precision() -> None:
    """There torch decomposes it into a gather from a float32 copy, whatever a table says."""
    names = [aten.upsample_nearest2d.vec, aten.upsample_nearest2d.default]
    table = torch._decomp.get_decompositions(names)
    x = torch.randn(2, 16, 6, 4).to(torch.bfloat16).contiguous(memory_format=torch.channels_last)
    lowered = check_exact(lambda x: F.interpolate(x, scale_factor=2.0, mode="nearest"), x, table=table)
    assert len(lowered.steps) == 1


@pytest.mark.parametrize(
    ("scale", "offset", "is_known"), [(0.5, 0.0, True), (0.75, 0.5, True), (2.0, -0.5, False), (1 / 3, 0.0, False)]
)
def test_places_by_exact_arithmetic_are_integers(scale: float, offset: float, is_known: bool) -> None:
    """No check of bounds is left; where arithmetic rounds, or a place may be negative before it is cut off, one is."""

    def fn(x: torch.Tensor) -> torch.Tensor:
        places = (torch.arange(8, dtype=torch.float32) * scale + offset).to(torch.int64)
        return x[:, places] + 1

    x = torch.randn(3, 16)
    (region,) = check_exact(fn, x).steps
    assert isinstance(region, Region)
    assert any(load.indirect for load in region.nest.loads()) != is_known


def test_scales_that_round_otherwise_stay_with_eager() -> None:
    left = 0
    for size in range(1, 60):
        x = torch.arange(7.0).reshape(1, 1, 7)
        lowered = lower_function(lambda x, n=size: F.interpolate(x, size=n, mode="nearest"), (x,))
        left += len(library_calls(lowered))
        check_exact(lambda x, n=size: F.interpolate(x, size=n, mode="nearest"), x, generated=False)
    assert left < 30


def test_gradient_of_whole_factors() -> None:
    for name in ("upsample_nearest2d_backward", "_upsample_nearest_exact2d_backward"):
        _check_gradient(getattr(aten, name).default)
    grad = torch.randn(1, 1, 5, 5)
    lowered = lower_function(lambda g: aten.upsample_nearest2d_backward.default(g, [5, 5], [1, 1, 3, 3]), (grad,))
    assert library_calls(lowered) == ["aten::upsample_nearest2d_backward.default"]


def _check_gradient(op: Any) -> None:
    check(lambda g: op(g, [6, 8], [1, 2, 3, 4]), torch.randn(1, 2, 6, 8))
