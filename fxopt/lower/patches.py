"""Convolutions of channels-last images, dense and depthwise ones, as products whose left operand a kernel gathers.

Their windows' places are rows and their channels columns, so what is computed from the result follows as from any product.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import torch

from fxopt.ir.exprs import Int, Sym, add, contiguous_strides, index, mul
from fxopt.ir.loops import Load, Nest, Store
from fxopt.ir.precision import convolutions_use_tf32
from fxopt.ir.region import Alias, BufferSpec, Call, Matrix, Patches, Region
from fxopt.ir.rounding import HALVES
from fxopt.lower.products import CONVOLUTION, Product, as_view, broadcast, places_of
from fxopt.lower.values import cast, symbols_of

LARGEST_OFFSET = 2**31 - 2**20
"""Elements: addresses are computed in int32, also those just outside of an image."""

MOST_TAPS = 81
"""Elements of a depthwise window: larger ones are better done otherwise than tap by tap."""


@dataclass(frozen=True)
class Gathered:
    """A convolution as `product`, whose left operand are patches.

    Where no memory has the weight as kernels read it, `weight` is a buffer for that: [window's rows, window's columns,
    channels] in float32 of a depthwise convolution, else [result's channels, window's rows, window's columns, channels].
    `filling` is the region that computes it; None if it is a constant, whose value is `constant`.
    """

    product: Product
    weight: BufferSpec | None = None
    filling: Region | None = None
    constant: torch.Tensor | None = None

    @property
    def is_depthwise(self) -> bool:
        return isinstance(self.product.a, Patches) and self.product.a.depthwise


def find_gathered(
    call: Call, buffers: Mapping[str, BufferSpec], views: Mapping[str, Alias], constants: Mapping[str, torch.Tensor]
) -> Gathered | None:
    """`call` if it is a convolution on a GPU of channels-last images, all sizes known, that kernels of ours may compute."""
    if call.op != CONVOLUTION or call.outputs[0] is None:
        return None
    x, weight, bias, stride, padding, dilation, transposed, _, groups = call.args
    image, window, made = (as_view(n, buffers, views) for n in (x.name, weight.name, call.outputs[0]))
    if image is None or window is None or made is None or transposed or len(made.shape) != 4:
        return None
    numbers = (stride, padding, dilation, [groups], *(v for t in (image, window, made) for v in (t.shape, t.strides)))
    if not all(isinstance(n, int) for each in (*numbers, (image.offset, window.offset)) for n in each):
        return None
    if not _is_computable(image, window, made, buffers) or not _is_channels_last(image):
        return None
    channels = window.shape[0]
    depthwise = groups > 1 and groups == image.shape[1] == channels
    if groups != 1 and (not depthwise or _count(window.shape[2:]) > MOST_TAPS):
        return None
    dtype = buffers[made.of].dtype
    if not depthwise and dtype == torch.float32 and not convolutions_use_tf32():
        return None
    patches = _patches(image, window, made, (stride, padding, dilation), depthwise)
    result, spec, filling, constant = places_of(made), None, None, None
    matrix = None if depthwise else _weight_matrix(window)
    if matrix is None:
        spec = _weight_spec(f"{call.outputs[0]}.taps", window, buffers[window.of], depthwise)
        matrix = Matrix(spec.name, 0, 0, *((channels, 1) if depthwise else (1, _count(window.shape[1:]))))
        if window.of in constants:
            constant = _weight_value(constants[window.of], window, spec)
        else:
            filling = _filling(window, spec, buffers[window.of], call.origin)
    if result is None or result.column != 1:
        return None
    axes = (None, Sym("x1", size=patches.rows), Sym("x2", size=channels))
    added = None if bias is None else as_view(bias.name, buffers, views)
    if (added is None) != (bias is None):
        return None
    addend = None if added is None else broadcast(added, (patches.rows, channels), axes, buffers)
    sizes = (1, patches.rows, patches.columns, channels)
    product = Product(call, patches, matrix, result, sizes, axes, addend)  # type: ignore[arg-type]  # sizes are known
    return Gathered(product, spec, filling, constant)


def _is_computable(image: Alias, window: Alias, made: Alias, buffers: Mapping[str, BufferSpec]) -> bool:
    """Whether the tensors are on one GPU, of one dtype that kernels take, neither empty nor too large."""
    specs = [buffers[v.of] for v in (image, window, made)]
    if any(s.device.type != "cuda" or s.dtype != specs[0].dtype for s in specs):
        return False
    if specs[0].dtype not in (*HALVES, torch.float32):
        return False
    return all(_count(v.shape) > 0 and _last(v) < LARGEST_OFFSET for v in (image, window, made))


def _count(shape: Sequence[Int]) -> int:
    out = 1
    for n in shape:
        assert isinstance(n, int)
        out *= n
    return out


def _last(view: Alias) -> int:
    """The number of the last element of `view`, counted from the first."""
    return sum((n - 1) * s for n, s in zip(view.shape, view.strides, strict=True))  # type: ignore[misc]


def _is_channels_last(image: Alias) -> bool:
    return image.shape[1] == 1 or image.strides[1] == 1


def _patches(image: Alias, window: Alias, made: Alias, geometry: Sequence[Sequence[Any]], depthwise: bool) -> Patches:
    """`geometry` are stride, padding and dilation."""
    shape, strides = (tuple(given[d] for d in (0, 2, 3, 1)) for given in (image.shape, image.strides))
    stride, padding, dilation = map(_pair, geometry)
    sizes = (_pair(window.shape[2:]), _pair(made.shape[2:]))
    return Patches(image.of, image.offset, shape, strides, *sizes, stride, padding, dilation, depthwise)  # type: ignore[arg-type]


def _pair(given: Sequence[Any]) -> tuple[int, int]:
    """One number for each dimension, as torch reads a list of one or two."""
    return int(given[0]), int(given[-1])


def _weight_matrix(window: Alias) -> Matrix | None:
    """The weight [N, C, R, S] as a matrix of (r, s, c) by n; None where (r, s, c) are not evenly spaced."""
    dims = [d for d in (2, 3, 1) if window.shape[d] != 1]
    for outer, inner in pairwise(dims):
        if window.strides[outer] != window.strides[inner] * window.shape[inner]:
            return None
    return Matrix(window.of, window.offset, 0, window.strides[dims[-1]] if dims else 1, window.strides[0])


def _weight_spec(name: str, window: Alias, like: BufferSpec, depthwise: bool) -> BufferSpec:
    n, c, r, s = window.shape
    shape, dtype = ((r, s, n), torch.float32) if depthwise else ((n, r, s, c), like.dtype)
    return BufferSpec(name, dtype, like.device, shape, contiguous_strides(shape))


def _order(spec: BufferSpec) -> tuple[int, ...]:
    """The dimensions of a weight [N, C, R, S] that are those of `spec`."""
    return (2, 3, 0) if len(spec.shape) == 3 else (0, 2, 3, 1)


def _weight_value(constant: torch.Tensor, window: Alias, spec: BufferSpec) -> torch.Tensor:
    first = constant.storage_offset() + window.offset
    shape, strides = ([given[d] for d in _order(spec)] for given in (window.shape, window.strides))
    return constant.detach().as_strided(shape, strides, first).to(spec.dtype).contiguous()  # type: ignore[arg-type]


def _filling(window: Alias, spec: BufferSpec, source: BufferSpec, origin: str) -> Region:
    """The region that computes `spec` from the weight."""
    points = [index(f"x{k}", size) for k, size in enumerate(spec.shape)]
    read, written = window.offset, 0
    for point, dim, stride in zip(points, _order(spec), spec.strides, strict=True):
        read, written = add(read, mul(point, window.strides[dim])), add(written, mul(point, stride))  # type: ignore[assignment]
    store = Store(spec.name, written, cast(Load(source.name, read, source.dtype), spec.dtype))
    nest = Nest(symbols_of(points), (), (store,))
    return Region(f"{spec.name}.filling", nest, {source.name: source, spec.name: spec}, spec.device, (), (origin,))
