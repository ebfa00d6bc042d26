"""Limits read off a histogram against the same limits found in the data itself."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from fxopt.ir.observer_ops import BINS, FIRST_NOT_FINITE
from fxopt.ir.observer_ops import exponent_histogram as histogram
from fxopt.quant.ranges import FP8, INT4, INT8, Grid, clipping_limit, divergence, edges

BIN = 1 / 8  # the relative width of a bin, at most


def _normal() -> Tensor:
    return torch.randn(20000, generator=torch.Generator().manual_seed(0))


def _heavy() -> Tensor:
    """A few values are thirty times as large as the rest: what activations of language models look like."""
    x = _normal()
    x[::997] *= 30.0
    return x


def _half_zeros() -> Tensor:
    return _normal().relu()


DATA = {"normal": _normal, "heavy": _heavy, "half zeros": _half_zeros}


def _limit(x: Tensor, method: str, grid: Grid = INT8, percentile: float = 99.99) -> float:
    return clipping_limit(histogram(x), float(x.abs().amax()), method, grid, percentile)


def _error(x: Tensor, limit: float, grid: Grid) -> float:
    scale = limit / grid.largest
    x = x.double()
    return float((grid.rounded(x / scale) * scale - x).square().mean())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_bins_hold_what_their_edges_say(dtype: torch.dtype) -> None:
    x = _heavy().to(dtype)
    ends = edges()
    counts = histogram(x)
    assert counts.shape == (BINS,) and int(counts.sum()) == x.numel()
    for b in counts.nonzero().reshape(-1)[::7].tolist():
        inside = (x.double().abs() >= ends[b]) & (x.double().abs() < ends[b + 1])
        assert int(inside.sum()) == int(counts[b])


def test_histograms_add_up_to_that_of_all_data() -> None:
    x = _heavy()
    assert torch.equal(histogram(x[:7000]) + histogram(x[7000:]), histogram(x.flip(0)))


def test_a_sample_holds_the_ends_of_all_elements() -> None:
    """Whether they are known or not; Inf and NaN outside of the sample are seen."""
    x = torch.randn(4096, 768, generator=torch.Generator().manual_seed(0)).bfloat16()
    x[1, 5], x[3, 7] = -77.0, 99.0
    for value, last in ((99.0, None), (float("inf"), FIRST_NOT_FINITE), (float("nan"), FIRST_NOT_FINITE + 1)):
        x[3, 7] = value
        counts = histogram(x)
        assert torch.equal(counts, histogram(x, x.amin(), x.amax()))
        assert int(counts.sum()) < x.numel() / 2
        top = int(counts.nonzero().max())
        assert top == last if last else edges()[top] <= 99.0 < edges()[top + 1]


def test_integers_beyond_one_batch_stay_exact() -> None:
    counts = histogram(_normal()) * 10**12
    assert clipping_limit(counts, float(_normal().abs().amax()), "percentile", INT8) == _limit(_normal(), "percentile")


@pytest.mark.parametrize("data", DATA)
def test_amax_clips_nothing(data: str) -> None:
    x = DATA[data]()
    assert _limit(x, "amax") == float(x.abs().amax())


@pytest.mark.parametrize("percentile", [50.0, 90.0, 99.0, 99.99, 100.0])
@pytest.mark.parametrize("data", DATA)
def test_percentile_is_that_of_the_data_to_a_bin(data: str, percentile: float) -> None:
    x = DATA[data]()
    ordered = x.abs().sort().values
    exact = float(ordered[max(0, round(len(ordered) * percentile / 100) - 1)])
    assert _limit(x, "percentile", percentile=percentile) == pytest.approx(exact, rel=BIN, abs=1e-38)


@pytest.mark.parametrize("grid", [INT8, INT4, FP8], ids=lambda grid: grid.name)
@pytest.mark.parametrize("data", DATA)
def test_squares_are_nearly_the_least_of_any_limit(data: str, grid: Grid) -> None:
    x = DATA[data]()
    amax = float(x.abs().amax())
    best = min(_error(x, amax * k / 400, grid) for k in range(8, 401))
    # fp8's steps double at a power of two: on which side of one the few largest values lie, a bin does not say.
    assert _error(x, _limit(x, "mse", grid), grid) <= (1.1 if grid is FP8 else 1.05) * best


def test_squares_clip_outliers_for_integers() -> None:
    x = _normal()
    x[0] = 30.0
    assert _error(x, _limit(x, "mse", INT4), INT4) < 0.2 * _error(x, float(x.abs().amax()), INT4)


@pytest.mark.parametrize("grid", [INT8, FP8], ids=lambda grid: grid.name)
@pytest.mark.parametrize("data", DATA)
def test_divergence_is_nearly_the_least_in_the_data(data: str, grid: Grid) -> None:
    x = DATA[data]().double().abs()
    x = x[x > 0]
    amax = float(x.amax())
    counts = torch.histc(x, bins=512, min=0.0, max=amax)

    def of(limit: float) -> float:
        kept = max(1, round(512 * limit / amax))
        return divergence(counts[:kept], float(counts[kept:].sum()), grid)

    best = min(of(amax * kept / 512) for kept in range(32, 513))
    assert of(_limit(DATA[data](), "entropy", grid)) <= best + 0.05


def test_divergence_of_what_the_grid_has_is_zero() -> None:
    assert divergence(torch.ones(127, dtype=torch.float64), 0.0, INT8) == pytest.approx(0.0, abs=1e-12)


def test_divergence_is_the_sum_that_defines_it() -> None:
    # Six bins on the levels 0 to 3: the middles 0.25, 0.75, 1.25, 1.75, 2.25, 2.75 round to 0, 1, 1, 2, 2, 3.
    grid = Grid("three", 3.0, lambda x: x.round().clamp(-3, 3))
    counts = torch.tensor([4.0, 3.0, 1.0, 0.0, 2.0, 5.0], dtype=torch.float64)
    p = torch.tensor([4.0, 3.0, 1.0, 0.0, 2.0, 5.0 + 1.0], dtype=torch.float64) / 16
    q = torch.tensor([4.0, 2.0, 2.0, 0.0, 2.0, 5.0], dtype=torch.float64) / 15
    expected = float(sum(a * (a / b).log() for a, b in zip(p, q, strict=True) if a > 0))
    assert divergence(counts, 1.0, grid) == pytest.approx(expected)


@pytest.mark.parametrize("method", ["amax", "percentile", "mse", "entropy"])
def test_zeros_alone_have_no_limit(method: str) -> None:
    assert _limit(torch.zeros(64), method) == 0.0


@pytest.mark.parametrize("method", ["amax", "percentile", "mse", "entropy"])
@pytest.mark.parametrize("x", [torch.tensor([3.0]), torch.tensor([0.0, 0.25]), torch.tensor([1e-40, 1e30])], ids=str)
def test_few_values_give_a_limit_among_them(method: str, x: Tensor) -> None:
    assert 0.0 < _limit(x, method) <= float(x.amax())


@pytest.mark.parametrize(
    ("counts", "amax", "method", "message"),
    [
        (histogram(torch.ones(4)), 1.0, "median", "unknown method 'median'"),
        (torch.zeros(BINS, dtype=torch.int64), 1.0, "amax", "without data"),
        (torch.ones(BINS), 1.0, "amax", "int64"),
        (histogram(torch.ones(4)), 2.0, "amax", "between 1.0 and 1.125"),
        (histogram(torch.ones(4)), float("nan"), "amax", "amax is nan"),
        (histogram(torch.tensor([1.0, float("inf"), float("nan")])), 1.0, "amax", "NaN or Inf in 2 of 3"),
        (-histogram(torch.ones(4)) + 2, 1.0, "amax", "negative"),
    ],
)
def test_what_is_no_histogram_is_refused(counts: Tensor, amax: float, method: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        clipping_limit(counts, amax, method, INT8)
