"""Convolutions of channels-last images, dense and depthwise ones, as products whose left operand a kernel gathers.

Their windows' places are rows and their channels columns, so what is computed from the result follows as from any product.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Any

import torch

from fxopt.ir.exprs import Int, Sym, add, ask, contiguous_strides, index, mul
from fxopt.ir.loops import Load, Nest, Store
from fxopt.ir.quantized_ops import LARGEST
from fxopt.ir.region import Alias, BufferSpec, Call, Matrix, Pair, Patches, Ref, Region
from fxopt.ir.rounding import HALVES
from fxopt.lower import products
from fxopt.lower.padded_images import PaddedImage, padded_image
from fxopt.lower.products import Product, as_view, broadcast, loads_of, places_of
from fxopt.lower.values import cast, symbols_of

LARGEST_OFFSET = 2**31 - 2**20
"""Elements: addresses are computed in int32, also those just outside of an image."""

CONVOLUTION_BACKWARD = "aten::convolution_backward.default"

FEW_CHANNELS = 16
"""Fewer leave most of a tensor core empty, however a library goes about it."""

MOST_TAPS = 81
"""Elements of a depthwise window: larger ones are better done otherwise than tap by tap."""


@dataclass(frozen=True)
class Gathered:
    """A convolution as `product`, whose left operand are patches.

    Where no memory has the weight as kernels read it, `weight` is a buffer for that: [window's rows, window's columns,
    channels] in float32 of a depthwise convolution, else [result's channels, window's rows, window's columns, channels].
    `filling` is the region that computes it; None if it is a constant, whose value is `constant`. `rest` is what is left of
    the call, if it has other results. `direct` is the weight of a depthwise convolution where it lies, evenly spaced;
    `given` is that of any other as the call has it, [N, C, R, S].
    """

    product: Product
    weight: BufferSpec | None = None
    filling: Region | None = None
    constant: torch.Tensor | None = None
    rest: Call | None = None
    direct: Matrix | None = None
    given: Alias | None = None

    @property
    def patches(self) -> Patches:
        assert isinstance(self.product.a, Patches)
        return self.product.a

    @property
    def before(self) -> tuple[Call | Region, ...]:
        """The steps beside the product."""
        return tuple(step for step in (self.rest, self.filling) if step is not None)


def is_common(patches: Patches) -> bool:
    """Whether libraries are at their best: many channels under windows that overlap. Where nothing is to be saved after such
    a convolution, a kernel of ours is hardly worth compiling.
    """
    overlap = any(w > s for w, s in zip(patches.window, patches.stride, strict=True))
    return overlap and not patches.depthwise and patches.shape[3] >= FEW_CHANNELS


def without(call: Call, *results: int) -> Call | None:
    """The backward `call` without its results number `results`; None if that leaves nothing."""
    mask = [wanted and k not in results for k, wanted in enumerate(call.args[-1])]
    outputs = tuple(None if k in results else name for k, name in enumerate(call.outputs))
    return replace(call, args=(*call.args[:-1], mask), outputs=outputs) if any(mask) else None


@dataclass(frozen=True)
class PatchSearch:
    """Finds convolutions, and gradients, of channels-last images on a GPU, all sizes known, that kernels of ours can do."""

    buffers: Mapping[str, BufferSpec]
    views: Mapping[str, Alias]
    constants: Mapping[str, torch.Tensor]

    def find(self, call: Call) -> Gathered | None:
        """`call` with a product in its place."""
        if call.outputs[:1] in ((), (None,)):
            return None
        match call.op:
            case products.CONVOLUTION:
                return self._convolution(call)
            case products.SCALED_CONVOLUTION:
                return self._scaled_convolution(call)
            case _ if call.op == CONVOLUTION_BACKWARD and call.args[-1][0]:
                return self._input_gradient(call)
        return None

    def _convolution(self, call: Call) -> Gathered | None:
        x, weight, bias, *geometry, transposed, _, groups = call.args
        image, window, made = (self._view(n) for n in (x.name, weight.name, call.outputs[0]))
        if image is None or window is None or made is None or transposed or not _are_known(geometry, groups):
            return None
        return self._gathered(call, image, window, made, bias, tuple(map(_pair, geometry)), groups)

    def _scaled_convolution(self, call: Call) -> Gathered | None:
        """One of 8-bit operands, whose weight [N, R, S, C] lies as kernels read it."""
        x, weight, *scales, bias, stride, padding, dilation, _ = call.args
        image, stored, made = (self._view(n) for n in (x.name, weight.name, call.outputs[0]))
        if image is None or stored is None or made is None:
            return None
        window = replace(stored, shape=_turned(stored.shape), strides=_turned(stored.strides))
        if not all(_are_known(v.shape, *v.strides, v.offset) for v in (image, window, made)):
            return None
        specs = [self.buffers[v.of] for v in (image, window, made)]
        if any(s.device.type != "cuda" for s in specs) or specs[0].dtype != specs[1].dtype or specs[0].dtype not in LARGEST:
            return None
        if any(_count(v.shape) == 0 or _last(v) >= LARGEST_OFFSET for v in (image, window, made)):
            return None
        matrix, result = _weight_matrix(window), places_of(made)
        if matrix is None or result is None or result.column != 1 or not _is_channels_last(image):
            return None
        patches = _patches(image, window, made, (_pair(stride), _pair(padding), _pair(dilation)), False)
        channels = int(window.shape[0])  # type: ignore[arg-type]  # known
        axes = (None, Sym("x1", size=patches.rows), Sym("x2", size=channels))
        loads = loads_of((*scales, bias), (patches.rows, channels), axes, self.buffers, self.views)
        if loads is None:
            return None
        sizes = (1, patches.rows, patches.columns, channels)
        product = Product(call, patches, matrix, result, sizes, axes, (*loads[2:], None)[0], loads[:2])
        return Gathered(product, given=window)

    def _input_gradient(self, call: Call) -> Gathered | None:
        """That of a depthwise convolution without stride: one of the gradient, with the window turned around."""
        grad, _, weight, _, *geometry, transposed, _, groups, _ = call.args
        image, window, made = (self._view(n) for n in (grad.name, weight.name, call.outputs[0]))
        if image is None or window is None or made is None or transposed or not _are_known(geometry, groups):
            return None
        stride, padding, dilation = map(_pair, geometry)
        if stride != (1, 1) or groups == 1 or not _are_known(window.shape, *window.strides, window.offset):
            return None
        reach = [d * (n - 1) for d, n in zip(dilation, _ints(window.shape[2:]), strict=True)]
        around = (reach[0] - padding[0], reach[1] - padding[1])
        if min(around) < 0:
            return None
        steps = _ints(window.strides[2:])
        last = sum((n - 1) * s for n, s in zip(_ints(window.shape[2:]), steps, strict=True))
        turned = replace(window, strides=(*window.strides[:2], *(-s for s in steps)), offset=add(window.offset, last))
        found = self._gathered(call, image, turned, made, None, (stride, around, dilation), groups)
        return None if found is None else replace(found, rest=without(call, 0))

    def padded(self, found: Gathered) -> PaddedImage | None:
        """`found` as a product of a padded copy of its image, if that has few channels."""
        if found.given is None:
            return None
        image, weight = self.buffers[found.patches.buffer], self.buffers[found.given.of]
        call, known = found.product.call, self.constants.get(found.given.of)
        name = f"{call.outputs[0]}{'.pools' * (found.patches.pool != (1, 1))}"  # which need no more than they see
        copy = padded_image(name, found.patches, image, found.given, weight, known, call.origin)
        return copy if copy is not None and _count(copy.image.shape) < LARGEST_OFFSET else None

    def weight_gradient(self, call: Call) -> Product | None:
        """That of a depthwise convolution's weight, if `call` is its backward: each of its elements is a sum over places."""
        if call.op != CONVOLUTION_BACKWARD or not call.args[-1][1]:
            return None
        grad, x, _, _, *geometry, transposed, _, groups, _ = call.args
        image, above, made = (self._view(n) for n in (x.name, grad.name, call.outputs[1]))
        if image is None or above is None or made is None or transposed or not _are_known(geometry, groups):
            return None
        if not all(_are_known(v.shape, *v.strides, v.offset) for v in (image, above, made)) or groups == 1:
            return None
        taps, channels, places = _count(made.shape[2:]), made.shape[0], places_of(above)
        if not groups == image.shape[1] == channels or taps > MOST_TAPS or places is None or places.column != 1:
            return None
        if not self._is_computable(image, above, made) or not _is_channels_last(image):
            return None
        if made.strides[2] != made.strides[3] * made.shape[3]:
            return None
        stride, padding, dilation = map(_pair, geometry)
        patches = replace(_patches(image, made, above, (stride, padding, dilation), True), transposed=True)
        result = Matrix(made.of, made.offset, 0, made.strides[3], made.strides[0])
        axes = (None, Sym("x1", size=taps), Sym("x2", size=channels))
        sizes = (1, taps, patches.columns, channels)
        return Product(call, patches, places, result, sizes, axes, None)  # type: ignore[arg-type]  # sizes are known

    def _view(self, name: str | None) -> Alias | None:
        """The four-dimensional tensor `name`."""
        view = None if name is None else as_view(name, self.buffers, self.views)
        return view if view is not None and len(view.shape) == 4 else None

    def _gathered(
        self, call: Call, image: Alias, window: Alias, made: Alias, bias: Ref | None, geometry: tuple[Pair, ...], groups: int
    ) -> Gathered | None:
        """The convolution of `image` by `window`, whose result is `made`. `geometry`: stride, padding and dilation."""
        if not all(_are_known(v.shape, *v.strides, v.offset) for v in (image, window, made)):
            return None
        result = places_of(made)
        if not self._is_computable(image, window, made) or not _is_channels_last(image) or result is None:
            return None
        channels, dtype = window.shape[0], self.buffers[made.of].dtype
        depthwise = groups > 1 and groups == image.shape[1] == channels
        if result.column != 1 or (groups != 1 and (not depthwise or _count(window.shape[2:]) > MOST_TAPS)):
            return None
        if not depthwise and dtype == torch.float32:  # tensor cores truncate what Triton loads to TF32; libraries round
            return None
        patches = _patches(image, window, made, geometry, depthwise)
        axes = (None, Sym("x1", size=patches.rows), Sym("x2", size=channels))
        added = None if bias is None else as_view(bias.name, self.buffers, self.views)
        if (added is None) != (bias is None):
            return None
        addend = None if added is None else broadcast(added, (patches.rows, channels), axes, self.buffers)
        weight = self._weight(call, window, depthwise)
        sizes = (1, patches.rows, patches.columns, channels)
        product = Product(call, patches, weight.matrix, result, sizes, axes, addend)  # type: ignore[arg-type]  # known
        direct = _weight_matrix(window) if depthwise and weight.filling is not None else None
        given = None if depthwise else window
        return Gathered(product, weight.spec, weight.filling, weight.constant, direct=direct, given=given)

    def _is_computable(self, *tensors: Alias) -> bool:
        """Whether the tensors are on one GPU, of one dtype that kernels take, neither empty nor too large."""
        specs = [self.buffers[v.of] for v in tensors]
        if any(s.device.type != "cuda" or s.dtype != specs[0].dtype for s in specs):
            return False
        if specs[0].dtype not in (*HALVES, torch.float32):
            return False
        return all(_count(v.shape) > 0 and _last(v) < LARGEST_OFFSET for v in tensors)

    def _weight(self, call: Call, window: Alias, depthwise: bool) -> _Weight:
        matrix = None if depthwise else _weight_matrix(window)
        if matrix is not None:
            return _Weight(matrix)
        source = self.buffers[window.of]
        spec = _weight_spec(f"{call.outputs[0]}.taps", window, source, depthwise)
        columns = (spec.shape[-1], 1) if depthwise else (1, spec.strides[0])
        matrix = Matrix(spec.name, 0, 0, *columns)
        constant = self.constants.get(window.of)
        if constant is not None and not any(ask("<", s, 0) for s in window.strides):
            return _Weight(matrix, spec, None, _weight_value(constant, window, spec))
        return _Weight(matrix, spec, _filling(window, spec, source, call.origin))


@dataclass(frozen=True)
class _Weight:
    """The right operand, and what `Gathered` says of it."""

    matrix: Matrix
    spec: BufferSpec | None = None
    filling: Region | None = None
    constant: torch.Tensor | None = None


def _turned(given: tuple[Int, ...]) -> tuple[Int, ...]:
    """What a weight [N, R, S, C] has in the order [N, C, R, S]."""
    n, r, s, c = given
    return n, c, r, s


def _are_known(numbers: Sequence[Any], *more: Any) -> bool:
    """Whether all are integers; lists may hold more of them."""
    return all(isinstance(n, int) or (isinstance(n, list | tuple) and _are_known(n)) for n in (*numbers, *more))


def _count(shape: Sequence[Int]) -> int:
    return math.prod(_ints(shape))


def _ints(given: Sequence[Int]) -> tuple[int, ...]:
    """`given`, which are known."""
    return tuple(n for n in given if isinstance(n, int))


def _last(view: Alias) -> int:
    """The number of the last element of `view`, counted from the first."""
    shape, strides = _ints(view.shape), _ints(view.strides)
    return sum((n - 1) * abs(s) for n, s in zip(shape, strides, strict=True))


def _is_channels_last(image: Alias) -> bool:
    return image.shape[1] == 1 or image.strides[1] == 1


def _patches(image: Alias, window: Alias, made: Alias, geometry: tuple[Pair, ...], depthwise: bool) -> Patches:
    shape, strides = (tuple(given[d] for d in (0, 2, 3, 1)) for given in (image.shape, image.strides))
    stride, padding, dilation = geometry
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
