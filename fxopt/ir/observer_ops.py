"""What calibration counts, as an op.

Importing this module registers, with eager implementations,

- `fxopt::exponent_histogram(Tensor x, Tensor? least=None, Tensor? largest=None) -> Tensor`: int64 [2048], how many elements
  of x have each combination of exponent and first three bits of the mantissa in the float32 of their magnitude. Bin
  `FIRST_NOT_FINITE` holds Inf, the next one NaN. Of more than `MOST_COUNTED` elements, every n-th row (of the first
  dimension) is counted, and the least and the largest of all elements: what is not finite is seen wherever it is, and the
  last bin is that of the largest magnitude. These two are `least` and `largest` [], where they are known already.

Counts are integers, so the result does not depend on the order in which they are made; nor on the device, whose NaN may have
bits of their own.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

BINS = 2048
SHIFT = 20
"""Bits of a float32 below those that tell bins apart."""

FIRST_NOT_FINITE = 255 << 3
"""The exponent of Inf and NaN is 255."""

MOST_COUNTED = 1 << 21
"""Elements: a limit at which one of ten thousand is clipped is known from them to a fifteenth of these."""

_FEWEST_ROWS = 16
"""Of a sample."""

_CHUNK = 1 << 18
"""Elements whose bins are made at a time on a CPU, so that they are counted in the cache."""


def _histogram(x: Tensor, least: Tensor | None = None, largest: Tensor | None = None) -> Tensor:
    step = sampling_step(x.shape)
    if step == 1:
        return _counted(x.detach().reshape(-1))
    ends = torch.aminmax(x.detach()) if least is None or largest is None else (least, largest)
    return _counted(torch.cat([x.detach()[::step].reshape(-1), *(end.view(1) for end in ends)]))


def sampling_step(shape: Sequence[int]) -> int:
    """How many rows of a tensor of this shape lie from one that is counted to the next: 1, or an odd number, so that where
    rows are tokens all places of sequences of a power of two are met."""
    step = -(-math.prod(shape) // MOST_COUNTED) | 1
    return step if step > 1 and len(shape) > 1 and shape[0] >= step * _FEWEST_ROWS else 1


def _counted(values: Tensor) -> Tensor:
    """Counts of a vector."""
    if values.device.type == "cpu":
        out = torch.zeros(BINS, dtype=torch.int64)
        for part in values.split(_CHUNK):
            out += torch.bincount(_bins(part), minlength=BINS)
        return out
    # bincount would wait for the device to tell the largest bin. Counts of integers are exact and in any order the same.
    return torch.histc(_bins(values), BINS, 0, BINS).to(torch.int64)


def _bins(values: Tensor) -> Tensor:
    """The bin of each element, int32; one for NaN of any bits."""
    return values.to(torch.float32).abs().view(torch.int32).bitwise_right_shift_(SHIFT).clamp_max_(FIRST_NOT_FINITE + 1)


def _fake_histogram(x: Tensor, least: Tensor | None = None, largest: Tensor | None = None) -> Tensor:
    return x.new_empty((BINS,), dtype=torch.int64)


_LIBRARY = torch.library.Library("fxopt", "FRAGMENT")
_LIBRARY.define(
    "exponent_histogram(Tensor x, Tensor? least=None, Tensor? largest=None) -> Tensor", tags=(torch.Tag.pt2_compliant_tag,)
)
_LIBRARY.impl("exponent_histogram", _histogram, "CompositeExplicitAutograd")
torch.library.register_fake("fxopt::exponent_histogram", _fake_histogram, lib=_LIBRARY)

exponent_histogram = torch.ops.fxopt.exponent_histogram.default
