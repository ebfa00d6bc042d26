"""Maximum pooling that remembers where in its window each maximum was, in one byte instead of eager's eight.

Importing this module registers, with eager implementations:

- `fxopt::max_pool_offsets(x, kernel, stride, padding, ceil_mode) -> (Tensor, Tensor)`: values as
  `aten::max_pool2d_with_indices` gives them, and for each the number of its tap, row-major in the window (int8).
- `fxopt::max_pool_offsets_backward(grad, x, kernel, stride, padding, ceil_mode, offsets) -> Tensor`: the gradient of x, of
  which only the shape and layout are used.

Windows have at most 127 taps and no dilation.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

aten = torch.ops.aten

MAX_TAPS = 127


def _starts(windows: Tensor, stride: Sequence[int], padding: Sequence[int]) -> tuple[Tensor, Tensor]:
    """The first row and column of each window (in the padding perhaps), for tensors [..., rows, columns] of windows."""
    rows, columns = (torch.arange(n, device=windows.device) for n in windows.shape[-2:])
    return (rows * stride[0] - padding[0])[:, None], columns * stride[1] - padding[1]


def _forward(
    x: Tensor, kernel: Sequence[int], stride: Sequence[int], padding: Sequence[int], ceil_mode: bool
) -> tuple[Tensor, Tensor]:
    values, places = aten.max_pool2d_with_indices.default(x, kernel, stride, padding, [1, 1], ceil_mode)
    top, left = _starts(places, stride, padding)
    width = x.shape[-1]
    offsets = (places // width - top) * kernel[1] + (places % width - left)
    return values, offsets.to(torch.int8)


def _backward(
    grad: Tensor,
    x: Tensor,
    kernel: Sequence[int],
    stride: Sequence[int],
    padding: Sequence[int],
    ceil_mode: bool,
    offsets: Tensor,
) -> Tensor:
    top, left = _starts(offsets, stride, padding)
    wide = offsets.long()
    places = (top + wide // kernel[1]) * x.shape[-1] + left + wide % kernel[1]
    return aten.max_pool2d_with_indices_backward.default(grad, x, kernel, stride, padding, [1, 1], ceil_mode, places)


def _fake_forward(
    x: Tensor, kernel: Sequence[int], stride: Sequence[int], padding: Sequence[int], ceil_mode: bool
) -> tuple[Tensor, Tensor]:
    values, places = aten.max_pool2d_with_indices.default(x, kernel, stride, padding, [1, 1], ceil_mode)
    return values, torch.empty_like(places, dtype=torch.int8)


def _fake_backward(
    grad: Tensor,
    x: Tensor,
    kernel: Sequence[int],
    stride: Sequence[int],
    padding: Sequence[int],
    ceil_mode: bool,
    offsets: Tensor,
) -> Tensor:
    places = torch.empty_like(offsets, dtype=torch.int64)
    return aten.max_pool2d_with_indices_backward.default(grad, x, kernel, stride, padding, [1, 1], ceil_mode, places)


_WINDOW = "int[2] kernel, int[2] stride, int[2] padding, bool ceil_mode"
_LIBRARY = torch.library.Library("fxopt", "FRAGMENT")
_LIBRARY.define(f"max_pool_offsets(Tensor x, {_WINDOW}) -> (Tensor, Tensor)", tags=(torch.Tag.pt2_compliant_tag,))
_LIBRARY.define(
    f"max_pool_offsets_backward(Tensor grad, Tensor x, {_WINDOW}, Tensor offsets) -> Tensor",
    tags=(torch.Tag.pt2_compliant_tag,),
)
_LIBRARY.impl("max_pool_offsets", _forward, "CompositeExplicitAutograd")
_LIBRARY.impl("max_pool_offsets_backward", _backward, "CompositeExplicitAutograd")
torch.library.register_fake("fxopt::max_pool_offsets", _fake_forward, lib=_LIBRARY)
torch.library.register_fake("fxopt::max_pool_offsets_backward", _fake_backward, lib=_LIBRARY)

max_pool_offsets = torch.ops.fxopt.max_pool_offsets.default
max_pool_offsets_backward = torch.ops.fxopt.max_pool_offsets_backward.default
