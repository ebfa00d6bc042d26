"""Sums over the rows of a row reduction: when they join its region, and that its values stay what they were."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from fxopt.ir.region import Region
from fxopt.lower.across import FEWEST_ROWS, LONGEST_ROW
from fxopt.lower.schedule import schedule
from tests.lower.capturing import moved
from tests.lower.harness import lower
from tests.lower.interpreter import run_lowered
from tests.numerics import assert_closer, to_float64

ROWS, ROW = FEWEST_ROWS, 24


def joined(fn: Callable[..., object], *args: Tensor, device: str = "cuda") -> list[Region]:
    """The regions of `fn` on a GPU that have sums over their rows; values are compared with eager's on the way."""
    scheduled = schedule(moved(lower(fn, args), device))
    low = moved(scheduled, "cpu")
    actual = tuple(run_lowered(low, dict(zip(low.inputs, args, strict=True))))
    assert_closer(actual, fn(*args), fn(*to_float64(args)))
    return [s for s in scheduled.steps if isinstance(s, Region) and s.across is not None]


def gradients(grad: Tensor, x: Tensor, weight: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Of an RMS norm's input and weight, and the input's summed over the rows."""
    scale = torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-5)
    weighted = grad * weight
    dx = weighted * scale - x * scale.pow(3) * (weighted * x).mean(-1, keepdim=True)
    axes = list(range(x.dim() - 1))
    return dx, (grad * x * scale).sum(axes), dx.sum(axes)


def tensors(*shape: int, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor, Tensor]:
    return torch.randn(shape, dtype=dtype), torch.randn(shape, dtype=dtype), torch.randn(shape[-1:], dtype=dtype)


@pytest.mark.parametrize("shape", [(ROWS, ROW), (4, ROWS // 4, ROW), (2, 2, ROWS, 8)])
def test_gradients_of_a_norm_are_one_region(shape: tuple[int, ...]) -> None:
    (region,) = joined(gradients, *tensors(*shape))
    assert len(region.writes()) == 3
    assert region.across is not None
    assert set(region.nest.writes()) & set(region.across.reads())
    assert not joined(gradients, *tensors(*shape), device="cpu")


def test_a_square_does_not_let_sums_run_along_the_rows() -> None:
    """Its rows are as many as its columns, so a sum over rows could take the place of one along them, reading askew."""

    def fn(grad: Tensor, x: Tensor, scale: Tensor) -> tuple[Tensor, Tensor]:
        normal = x * scale
        return (grad - normal * (grad * normal).mean(-1, keepdim=True)) * scale, (grad * normal).sum(0)

    assert len(joined(fn, torch.randn(ROWS, ROWS), torch.randn(ROWS, ROWS), torch.rand(ROWS, 1))) == 1


def test_half_precision_sums_what_was_stored() -> None:
    grad, x, weight = tensors(ROWS, ROW, dtype=torch.bfloat16)
    assert len(joined(lambda g, x, w: gradients(g.float(), x.float(), w.float()), grad, x, weight)) == 1


def _turned(grad: Tensor, x: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
    """What both the row reduction and the sums read is worth storing, and may be stored by either."""
    turned = torch.cat((-grad[:, ROW // 2 :], grad[:, : ROW // 2]), 1).exp()
    return gradients(turned, x, weight)[:2]


def test_what_sums_store_on_their_way_is_left_to_the_rows() -> None:
    grad, x, weight = tensors(ROWS, ROW)
    (region,) = joined(_turned, grad, x, weight)
    assert len(set(region.writes()) - region.passed) == 2

    def two(grad: Tensor, x: Tensor, weight: Tensor, other: Tensor) -> tuple[tuple[Tensor, Tensor], ...]:
        return _turned(grad, x, weight), _turned(other, x, weight)

    (region,) = joined(lambda *args: sum(two(*args), ()), grad, x, weight, torch.randn(ROWS, ROW))
    assert len(set(region.writes()) - region.passed) == 4


def test_long_rows_are_one_region() -> None:
    assert len(joined(gradients, *tensors(FEWEST_ROWS, LONGEST_ROW + 1))) == 1


def test_few_short_rows_stay_apart() -> None:
    assert not joined(gradients, *tensors(FEWEST_ROWS - 1, ROW))


def _rolled(grad: Tensor, x: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
    dx = x - x.mean(-1, keepdim=True)
    return dx, dx.roll(1, 0).mul(grad).sum(0)


def _sums_first(grad: Tensor, x: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
    total = (grad * x).sum(0)
    return total, (x * total).softmax(-1)


def _largest(grad: Tensor, x: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
    return x - x.mean(-1, keepdim=True), x.amax(0)


def _scanned(grad: Tensor, x: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
    return x.cumsum(-1), x.sum(0)


def _mean_loss(grad: Tensor, x: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
    totals = x.exp().sum(-1)
    return totals, totals.log().mul(grad[:, 0]).sum()


@pytest.mark.parametrize("fn", [_rolled, _sums_first, _largest, _scanned, _mean_loss])
def test_near_misses_stay_apart(fn: Callable[..., object]) -> None:
    assert not joined(fn, *tensors(ROWS, ROW))
