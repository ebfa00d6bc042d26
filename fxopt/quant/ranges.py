"""Clipping limits: how far a grid of few values has to reach, read off a histogram.

A histogram (`fxopt::exponent_histogram`) counts |x| by the bits of its float32 value from the exponent down to three of the
mantissa: bin b holds the values from `edges()[b]` up to, not including, `edges()[b + 1]`, at most an eighth more. It needs
no first pass for the range, and histograms of several batches, processes or orders add up to the same integers, so that
what is read off them does not depend on the order of the data.

Within a bin values are taken as evenly spread. That makes a percentile exact to a bin (6 to 12.5 %); mean squared error and
divergence are sums over many bins, which hardly depend on what is within one.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from fxopt.ir.observer_ops import BINS, FIRST_NOT_FINITE, SHIFT

METHODS = ("amax", "percentile", "mse", "entropy")


@dataclass(frozen=True)
class Grid:
    """The values of a quantized format beside each other: symmetric about zero, the largest at `largest`.

    `rounded` maps float64 values, in units of the scale, to the nearest that the format has (ties to even); it saturates.
    """

    name: str
    largest: float
    rounded: Callable[[Tensor], Tensor]


def _integers(largest: int) -> Callable[[Tensor], Tensor]:
    return lambda x: x.round().clamp(-largest, largest)


def _e4m3(x: Tensor) -> Tensor:
    return x.clamp(-448.0, 448.0).float().to(torch.float8_e4m3fn).double()


INT8 = Grid("int8", 127.0, _integers(127))
INT4 = Grid("int4", 7.0, _integers(7))
FP8 = Grid("fp8", 448.0, _e4m3)
GRIDS = {"float8_e4m3fn": FP8, "int8": INT8}
"""By the name of the dtype."""


def edges() -> Tensor:
    """The lower ends of all bins with finite values and the upper end of the last: float64 [2041]."""
    bits = torch.arange(FIRST_NOT_FINITE, dtype=torch.int32) << SHIFT
    return torch.cat([bits.view(torch.float32).double(), torch.tensor([2.0**128], dtype=torch.float64)])


def clipping_limit(counts: Tensor, amax: float, method: str, grid: Grid, percentile: float = 99.99) -> float:
    """The |x| that `grid.largest` should stand for: the scale is `limit / grid.largest`. At most amax; 0 for zeros alone.

    counts: int64 [2048], of one histogram or sums of several. amax: the largest |x|, exactly. method:

    - "amax": nothing is clipped.
    - "percentile": the smallest value that at least `percentile` % of the data do not exceed.
    - "mse": the least mean squared error of the quantized data.
    - "entropy": the least Kullback-Leibler divergence between the distribution and the quantized one (Migacz, "8-bit
      inference with TensorRT", GTC 2017). Zeros do not count: every grid has them, and after a relu they are most values.

    Raises ValueError for an unknown method, counts of another shape or dtype, NaN or Inf among the data, and an amax that
    is not in the histogram's last bin.
    """
    if method not in METHODS:
        raise ValueError(f"unknown method {method!r}; there are {', '.join(METHODS)}")
    counts = counts.detach().cpu()
    _check(counts, amax)
    if amax == 0.0 or method == "amax":
        return amax
    spread = _Spread.of(counts, amax)
    if method == "percentile":
        return spread.percentile(percentile)
    return _least_squares(spread, amax, grid) if method == "mse" else _least_divergence(spread, amax, grid)


def _check(counts: Tensor, amax: float) -> None:
    if counts.shape != (BINS,) or counts.dtype != torch.int64:
        raise ValueError(f"a histogram is int64 [{BINS}], not {counts.dtype} {list(counts.shape)}")
    if int(counts.min()) < 0 or int(counts.sum()) == 0:
        raise ValueError("a histogram without data" if int(counts.sum()) == 0 else "a histogram with negative counts")
    if int(counts[FIRST_NOT_FINITE:].sum()):
        raise ValueError(f"NaN or Inf in {int(counts[FIRST_NOT_FINITE:].sum())} of {int(counts.sum())} values")
    if not (math.isfinite(amax) and amax >= 0.0):
        raise ValueError(f"amax is {amax}, not a finite number of 0 or more")
    last = int(counts.nonzero()[-1])
    own = int(torch.tensor(amax, dtype=torch.float32).view(torch.int32)) >> SHIFT
    if own != last:
        ends = edges()
        raise ValueError(f"amax is {amax}, but the largest values lie between {ends[last]} and {ends[last + 1]}")


@dataclass(frozen=True)
class _Spread:
    """The bins that hold data: `low`, `high` float64 [B], the last one cut at amax, and `counts` float64 [B]."""

    low: Tensor
    high: Tensor
    counts: Tensor

    @classmethod
    def of(cls, counts: Tensor, amax: float) -> _Spread:
        held = counts.nonzero().reshape(-1)
        ends = edges()
        return cls(ends[held], ends[held + 1].clamp(max=amax), counts[held].double())

    def percentile(self, percent: float) -> float:
        if not 0.0 < percent <= 100.0:
            raise ValueError(f"a percentile lies above 0 and at most at 100, not at {percent}")
        wanted = float(self.counts.sum()) * percent / 100.0
        below = self.counts.cumsum(0)
        at = min(int(torch.searchsorted(below, wanted)), len(below) - 1)
        missing = 1.0 - (float(below[at]) - wanted) / float(self.counts[at])
        return float(self.low[at] + missing * (self.high[at] - self.low[at]))

    def without_zeros(self) -> _Spread:
        kept = self.low > 0.0
        return _Spread(self.low[kept], self.high[kept], self.counts[kept])

    def share_below(self, x: Tensor) -> Tensor:
        """How many values lie below each of x [N]: float64 [N]."""
        below = torch.cat([self.counts.new_zeros(1), self.counts.cumsum(0)])
        at = torch.searchsorted(self.high, x, right=True).clamp(max=len(self.counts) - 1)
        # A bin of one value (amax at its lower end) has no width: it is below x as soon as x reaches it.
        part = ((x - self.low[at]) / (self.high[at] - self.low[at])).nan_to_num(1.0).clamp(0.0, 1.0)
        return below[at] + part * self.counts[at]


_POINTS = 32  # for the integral over a bin: four on each step of int8 where a bin is widest
_PER_OCTAVE = 16


def _limits(amax: float, octaves: int) -> Tensor:
    """Limits to try, amax first: the first of equals is taken, and that clips least."""
    return amax * 2.0 ** (-torch.arange(octaves * _PER_OCTAVE + 1, dtype=torch.float64) / _PER_OCTAVE)


def _least_squares(spread: _Spread, amax: float, grid: Grid) -> float:
    parts = (torch.arange(_POINTS, dtype=torch.float64) + 0.5) / _POINTS
    x = (spread.low[:, None] + (spread.high - spread.low)[:, None] * parts).reshape(-1)
    weight = (spread.counts[:, None] / _POINTS).expand(-1, _POINTS).reshape(-1)
    limits = _limits(amax, octaves=8)
    errors = [_squares(x, weight, float(limit) / grid.largest, grid) for limit in limits]
    return float(limits[min(range(len(errors)), key=errors.__getitem__)])


def _squares(x: Tensor, weight: Tensor, scale: float, grid: Grid) -> float:
    return float((weight * (grid.rounded(x / scale) * scale - x).square()).sum())


_LINEAR = 2048  # bins of equal width up to amax, and the least number of them that a limit may keep, as in the source
_FEWEST = 128
_STRIDE = 8


def _least_divergence(spread: _Spread, amax: float, grid: Grid) -> float:
    ends = torch.linspace(0.0, amax, _LINEAR + 1, dtype=torch.float64)
    counts = spread.without_zeros().share_below(ends).diff()
    kept = range(_LINEAR, _FEWEST - 1, -_STRIDE)
    divergences = [divergence(counts[:n], float(counts[n:].sum()), grid) for n in kept]
    return amax * kept[min(range(len(kept)), key=divergences.__getitem__)] / _LINEAR


def divergence(counts: Tensor, clipped: float, grid: Grid) -> float:
    """KL divergence between data in bins of equal width and what is left of it on `grid`, whose largest value is their end.

    counts: float64 [N], bins from 0 to the limit; `clipped`: how many values lie beyond, which the last bin has to take.
    On the grid all bins that round to one value share their counts evenly, but for those that hold nothing.
    """
    at = (torch.arange(len(counts), dtype=torch.float64) + 0.5) * (grid.largest / len(counts))
    value = torch.unique(grid.rounded(at), return_inverse=True)[1]
    held = (counts > 0).double()
    groups = int(value.max()) + 1
    total = counts.new_zeros(groups).index_add_(0, value, counts)
    among = counts.new_zeros(groups).index_add_(0, value, held)
    quantized = (total / among.clamp(min=1.0))[value] * held
    reference = counts.clone()
    reference[-1] += clipped
    if not float(quantized.sum()):
        return math.inf
    p, q = reference / reference.sum(), quantized / quantized.sum()
    # Where data was clipped into an empty last bin, nothing on the grid stands for it; a share of one value keeps it finite.
    terms = p * (p / q.clamp(min=1.0 / (float(reference.sum()) * len(counts)))).log()
    return float(terms[p > 0].sum())
