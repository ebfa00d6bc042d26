"""Convolutions of images with few channels, copied first with a border of zeros and pixels of a whole vector.

Of three channels a kernel gathers element by element, each with conditions of its own. Where pixels are four elements apart
and what the window sees beyond the image is in memory, it loads vectors without conditions. The copy takes the time of its
bytes, and the weight gets zeros where the pixels have them: no other pixels are multiplied than those under the window, so
that NaN and infinity show where they do in eager.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from math import ceil

import torch

from fxopt.ir.exprs import Int, add, contiguous_strides, index, mul
from fxopt.ir.loops import Const, Load, Masked, Nest, Scalar, Store
from fxopt.ir.region import Alias, BufferSpec, Contraction, Matrix, Pair, Patches, Region
from fxopt.lower.ops.bounds import all_of, compare, inside
from fxopt.lower.values import symbols_of

VECTOR = 4
"""Elements: eight bytes in half precision. What 8-bit tensor cores read is copied asynchronously from four bytes on."""

VECTOR_BYTES = 16
MOST_CHANNELS = 7
MOST_ZEROS = 0.5
"""Of a pixel."""

FEWEST_GATHERED, LEAST_BYTES = 64, 1 << 20
"""Elements under a window, and bytes of the images: with fewer the copy takes longer than it saves (H200: 3 x 3 windows over
3 channels 35 us, and 57 with it; 7 x 7 ones over one image 10 us either way, over 64 images 200 and 150).
"""


@dataclass(frozen=True)
class PaddedImage:
    """`filling` copies an image, which `patches` sees as `weight` is laid out for it.

    `weight` [result's channels, window's rows, columns, channels of a pixel] is a constant, whose value is `constant`, or
    what `laying_out` computes.
    """

    patches: Patches
    image: BufferSpec
    weight: BufferSpec
    filling: Region
    laying_out: Region | None
    constant: torch.Tensor | None

    @property
    def before(self) -> tuple[Region, ...]:
        """The steps before the product."""
        return tuple(step for step in (self.filling, self.laying_out) if step is not None)

    def product_of(self, contraction: Contraction) -> Contraction:
        """`contraction`, of the image as it was given, as one of the copy."""
        operands = {contraction.a.buffer, contraction.b.buffer} - set(contraction.region.reads())
        kept = {n: s for n, s in contraction.buffers.items() if n not in operands}
        depth = self.patches.columns
        return replace(
            contraction,
            name=f"{contraction.name}.padded",
            a=self.patches,
            b=Matrix(self.weight.name, 0, 0, 1, depth),
            depth=depth,
            buffers=kept | {self.image.name: self.image, self.weight.name: self.weight},
        )


def padded_image(
    name: str,
    patches: Patches,
    image: BufferSpec,
    window: Alias,
    weight: BufferSpec,
    known: torch.Tensor | None,
    origin: str,
) -> PaddedImage | None:
    """What `patches` sees as a padded image; None where its pixels are vectors already, or would be zeros most of all.

    `image` and `weight` are the buffers of the image and of the weight [N, C, R, S], which is `window`, and `known` the
    value of the latter if it is a constant. What is made for them is called after `name`.
    """
    channels = patches.shape[3]
    pixel = ceil(channels / VECTOR) * VECTOR
    if patches.depthwise or channels > MOST_CHANNELS or channels == pixel or pixel - channels > MOST_ZEROS * pixel:
        return None
    if patches.columns < FEWEST_GATHERED or math.prod(patches.shape) * image.dtype.itemsize < LEAST_BYTES:
        return None
    height, width = _reach(patches)
    each = max(1, VECTOR_BYTES // (pixel * image.dtype.itemsize))
    copied = _spec(f"{name}.padded", image, (patches.shape[0], height, ceil(width / each) * each, pixel))
    seen = _side_by_side(patches, copied, each)
    n, _, r, s = window.shape
    laid_out = _spec(f"{name}.padded_taps", weight, (n, r, s, pixel))
    filling = _filling(copied, patches, image, origin)
    if known is not None:
        return PaddedImage(seen, copied, laid_out, filling, None, _weight_value(known, window, laid_out))
    return PaddedImage(seen, copied, laid_out, filling, _laying_out(laid_out, window, weight, origin), None)


def _reach(patches: Patches) -> Pair:
    """Rows and columns of pixels from the first to the last that the window sees, those outside of the image included."""
    each = zip(patches.places, patches.stride, patches.window, patches.dilation, strict=True)
    rows, columns = ((places - 1) * stride + (window - 1) * dilation + 1 for places, stride, window, dilation in each)
    return rows, columns


def _side_by_side(patches: Patches, copied: BufferSpec, most: int) -> Patches:
    """What `patches` sees in the copy, up to `most` pixels in a row as one where windows begin and end with whole ones."""
    height, width = _reach(patches)
    (rows, columns), (down, right) = patches.window, patches.stride
    count = math.gcd(most, columns, right) if patches.dilation[1] == 1 else 1
    pixel = int(copied.shape[3])  # type: ignore[arg-type]  # sizes are known
    layout = {
        "shape": (patches.shape[0], height, width // count, count * pixel),
        "strides": (copied.strides[0], copied.strides[1], count * pixel, 1),
        "window": (rows, columns // count),
        "stride": (down, right // count),
    }
    return replace(patches, buffer=copied.name, offset=0, padding=(0, 0), **layout)  # type: ignore[arg-type]


def _spec(name: str, like: BufferSpec, shape: tuple[Int, ...]) -> BufferSpec:
    return BufferSpec(name, like.dtype, like.device, shape, contiguous_strides(shape))


def _filling(spec: BufferSpec, patches: Patches, image: BufferSpec, origin: str) -> Region:
    n, row, column, channel = points = _points(spec)
    y, x = add(row, -patches.padding[0]), add(column, -patches.padding[1])
    valid = (inside(y, patches.shape[1]), inside(x, patches.shape[2]), compare("lt", channel, patches.shape[3]))
    at = _address(patches.offset, (n, y, x, channel), patches.strides)
    return _region(spec, points, all_of(valid), Load(image.name, at, image.dtype), image, origin)


def _laying_out(spec: BufferSpec, window: Alias, weight: BufferSpec, origin: str) -> Region:
    n, row, column, channel = points = _points(spec)
    at = _address(window.offset, (n, channel, row, column), window.strides)
    valid = compare("lt", channel, window.shape[1])
    return _region(spec, points, valid, Load(weight.name, at, weight.dtype), weight, origin)


def _weight_value(known: torch.Tensor, window: Alias, spec: BufferSpec) -> torch.Tensor:
    """What `_laying_out` would compute of a constant."""
    shape, strides = ([given[d] for d in (0, 2, 3, 1)] for given in (window.shape, window.strides))
    taps = known.detach().as_strided(shape, strides, known.storage_offset() + window.offset)  # type: ignore[arg-type]
    out = torch.zeros(spec.shape, dtype=spec.dtype, device=known.device)  # type: ignore[arg-type]  # sizes are known
    out[..., : taps.shape[3]] = taps
    return out


def _points(spec: BufferSpec) -> tuple[Int, ...]:
    return tuple(index(f"x{d}", size) for d, size in enumerate(spec.shape))


def _address(offset: Int, point: tuple[Int, ...], strides: tuple[Int, ...]) -> Int:
    at = offset
    for place, stride in zip(point, strides, strict=True):
        at = add(at, mul(place, stride))
    return at


def _region(
    spec: BufferSpec, points: tuple[Int, ...], valid: Scalar, value: Load, source: BufferSpec, origin: str
) -> Region:
    """The region that stores `value`, loaded from `source`, where it is valid, and else zero, at all `points` of `spec`."""
    zero = Const(0.0 if spec.dtype.is_floating_point else 0, spec.dtype)
    store = Store(spec.name, _address(0, points, spec.strides), Masked(valid, value, zero))
    nest = Nest(symbols_of(points), (), (store,))
    return Region(f"{spec.name}.filling", nest, {source.name: source, spec.name: spec}, spec.device, (), (origin,))
