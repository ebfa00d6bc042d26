"""Convolutions of images in 8 bits as an op, which ATen does not have.

Importing the module registers

    fxopt::scaled_convolution(Tensor x, Tensor weight, Tensor scale_x, Tensor scale_w, Tensor? bias, int[] stride,
        int[] padding, int[] dilation, ScalarType out_dtype) -> Tensor

Images are [N, C, H, W] and the weight is [C_out, R, S, C], so that what is under one place of the window and what it is
multiplied by are contiguous where images are channels-last. The result is channels-last.

The eager form copies what the window sees into rows and multiplies these (`fxopt::scaled_mm`): right on every device, and
slow. It has no gradient.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from fxopt.ir.quantized_ops import LARGEST, scaled_mm

_SCHEMA = (
    "scaled_convolution(Tensor x, Tensor weight, Tensor scale_x, Tensor scale_w, Tensor? bias, int[] stride, int[] padding,"
    " int[] dilation, ScalarType out_dtype) -> Tensor"
)


def scaled_convolution(
    x: Tensor,
    weight: Tensor,
    scale_x: Tensor,
    scale_w: Tensor,
    bias: Tensor | None,
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    out_dtype: torch.dtype,
) -> Tensor:
    """convolution(x, weight) * scale_x * scale_w + bias, [N, C_out, places, places] in `out_dtype`, rounded once.

    x [N, C, H, W] and weight [C_out, R, S, C] are both float8_e4m3fn (summed in float32) or both int8 (in int32, exactly up
    to 2**17 products). Scales are float32: scale_x [], scale_w [] or [C_out]. The bias [C_out] is floating. `stride`,
    `padding` and `dilation` have a number for height and one for width. Raises ValueError for others.
    """
    count, channels, height, width = _checked(x, weight, scale_x, scale_w, bias, stride, padding, dilation, out_dtype)
    rows = _patches(x, (height, width), weight.shape[1:3], stride, padding, dilation)
    out = scaled_mm(rows, weight.reshape(channels, -1), scale_x, scale_w, bias, out_dtype)
    return out.view(count, height, width, channels).permute(0, 3, 1, 2)


def _patches(
    x: Tensor,
    places: Sequence[int],
    window: Sequence[int],
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
) -> Tensor:
    """[places of all images, R * S * C]: what the window sees, a row for each of its places."""
    bits = x.view(torch.int8).permute(0, 2, 3, 1)  # zero has the same bits in both types; few ops take 8-bit floats
    if any(padding):
        bits = F.pad(bits, (0, 0, padding[1], padding[1], padding[0], padding[0]))
    n, h, w, c = bits.stride()
    strides = (n, h * stride[0], w * stride[1], h * dilation[0], w * dilation[1], c)
    seen = bits.as_strided((bits.shape[0], *places, *window, bits.shape[3]), strides)
    return seen.reshape(bits.shape[0] * places[0] * places[1], -1).view(x.dtype)


def _checked(
    x: Tensor,
    weight: Tensor,
    scale_x: Tensor,
    scale_w: Tensor,
    bias: Tensor | None,
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    out_dtype: torch.dtype,
) -> tuple[int, int, int, int]:
    """The sizes of the result: images, channels, height and width."""
    if x.dtype != weight.dtype or x.dtype not in LARGEST:
        raise ValueError(f"operands are both float8_e4m3fn or both int8, not {x.dtype} and {weight.dtype}")
    if x.dim() != 4 or weight.dim() != 4 or x.shape[1] != weight.shape[3]:
        raise ValueError(f"operands are [N, C, H, W] and [C_out, R, S, C], not {list(x.shape)} and {list(weight.shape)}")
    channels = weight.shape[0]
    if scale_x.dtype != torch.float32 or scale_x.dim():
        raise ValueError(f"images have one float32 scale, not {scale_x.dtype} {list(scale_x.shape)}")
    if scale_w.dtype != torch.float32 or (scale_w.dim() and tuple(scale_w.shape) != (channels,)):
        raise ValueError(f"a weight's scale is float32, [] or [{channels}], not {scale_w.dtype} {list(scale_w.shape)}")
    if bias is not None and (tuple(bias.shape) != (channels,) or not bias.is_floating_point()):
        raise ValueError(f"a bias is floating [{channels}], not {bias.dtype} {list(bias.shape)}")
    if not out_dtype.is_floating_point or out_dtype.itemsize < 2:
        raise ValueError(f"the result's dtype is floating, of 16 bits or more, not {out_dtype}")
    pairs = {"stride": (stride, 1), "padding": (padding, 0), "dilation": (dilation, 1)}
    for name, (given, least) in pairs.items():
        if len(given) != 2 or min(given) < least:
            raise ValueError(f"{name} is two numbers, {least} or more, not {list(given)}")
    reach = [d * (n - 1) + 1 for d, n in zip(dilation, weight.shape[1:3], strict=True)]
    seen = [s + 2 * p - r for s, p, r in zip(x.shape[2:], padding, reach, strict=True)]
    if any(s < 0 for s in seen):
        raise ValueError(f"a window over {reach[0]} x {reach[1]} does not fit into images {list(x.shape[2:])}")
    height, width = (s // step + 1 for s, step in zip(seen, stride, strict=True))
    return x.shape[0], channels, height, width


def _fake(
    x: Tensor,
    weight: Tensor,
    scale_x: Tensor,
    scale_w: Tensor,
    bias: Tensor | None,
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    out_dtype: torch.dtype,
) -> Tensor:
    count, channels, height, width = _checked(x, weight, scale_x, scale_w, bias, stride, padding, dilation, out_dtype)
    return x.new_empty((count, height, width, channels), dtype=out_dtype).permute(0, 3, 1, 2)


_LIBRARY = torch.library.Library("fxopt", "FRAGMENT")
_LIBRARY.define(_SCHEMA, tags=(torch.Tag.pt2_compliant_tag,))
_LIBRARY.impl("scaled_convolution", scaled_convolution, "CompositeExplicitAutograd")
torch.library.register_fake("fxopt::scaled_convolution", _fake, lib=_LIBRARY)

SCALED_CONVOLUTION = torch.ops.fxopt.scaled_convolution.default
