"""Matrix products among library calls: what each multiplies, as strided matrices.

A convolution whose window is a single element is one, of places by channels, where the places of all images are evenly
spaced in memory: channels-last tensors, and a single row-major image.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise

import torch

from fxopt.ir.exprs import Int, Sym, add, ask, free_symbols, mul, prod, symbol
from fxopt.ir.loops import Load, Op, Scalar, transform
from fxopt.ir.region import Alias, BufferSpec, Call, Matrix, Patches, Quantized, Ref, Strided
from fxopt.lower.values import cast

_ADDEND = {"aten::mm.default": False, "aten::bmm.default": False, "aten::addmm.default": True, "aten::baddbmm.default": True}
"""The products, and whether their first argument is added to the result."""

CONVOLUTION = "aten::convolution.default"
SCALED = "fxopt::scaled_mm.default"
WEIGHT_ONLY = "fxopt::weight_only_mm.default"
SCALED_CONVOLUTION = "fxopt::scaled_convolution.default"
QUANTIZED = (SCALED, WEIGHT_ONLY, SCALED_CONVOLUTION)
"""Products of few bits, whose scales and bias are applied to the float32 sum."""

_GROUPED = "aten::_grouped_mm.default"
_GROUPED_ARGUMENTS = ("self", "mat2", "offs", "bias", "out_dtype")


@dataclass(frozen=True)
class Product:
    """`call` as a [Z, M, K] times b [Z, K, N], and what it adds to that: its first argument, at the product's element.

    `result` is the buffer that the call makes, as a matrix. `axes` are fresh index symbols for Z (None for a single
    product), M and N.
    """

    call: Call
    a: Matrix | Patches
    b: Matrix
    result: Matrix
    sizes: tuple[int, Int, int, int]  # Z, M, K, N; the number of rows may be known only at run time
    axes: tuple[Sym | None, Sym, Sym]
    addend: Load | None
    scales: tuple[Load, ...] = ()
    """Factors of the product, before the addend: of quantized operands, or of rows."""
    quantized: Quantized | None = None
    """Of a product whose weight alone is of few bits."""
    ends: str = ""
    """Of a grouped product, the buffer of the rows at which groups end; b is then [G, K, N]."""

    @property
    def points(self) -> tuple[Sym, ...]:
        return tuple(s for s in self.axes if s is not None)

    @property
    def index(self) -> Int:
        """Where in the result's buffer the element at `axes` is."""
        return _at(self.result, self.axes)

    @property
    def sums_float32(self) -> bool:
        """Whether what is computed from the product begins with its float32 sum, not with what the call would round."""
        return self.call.op in QUANTIZED or bool(self.scales)

    def value(self, registers: str, dtype: torch.dtype) -> Scalar:
        """The call's element at `axes`, where the product itself is the load of the pseudo-buffer `registers`."""
        if self.sums_float32:
            return self._scaled(Load(registers, self.index, torch.float32), dtype)
        product: Scalar = Load(registers, self.index, dtype)
        return product if self.addend is None else Op("add", (product, cast(self.addend, dtype)), dtype)

    def _scaled(self, total: Scalar, dtype: torch.dtype) -> Scalar:
        """The call's element, of `dtype`, from the float32 sum of products.

        One scale for all rows is multiplied into those of the columns, which a kernel does once for a tile's columns.
        """
        factors: tuple[Scalar, ...] = self.scales
        if len(self.scales) == 2 and not free_symbols(self.scales[0].index):
            factors = (Op("mul", self.scales, torch.float32),)
        for factor in factors:
            total = Op("mul", (total, factor), torch.float32)
        if self.addend is not None:
            total = Op("add", (total, cast(self.addend, torch.float32)), torch.float32)
        return cast(total, dtype)


def columns_of(product: Product, first: int, count: int) -> Product:
    """`count` columns of `product` from `first` on, as a product of its own."""

    def moved(matrix: Matrix) -> Matrix:
        return replace(matrix, offset=add(matrix.offset, mul(first, matrix.column)))

    z, y, x = product.axes
    own = Sym(x.name, size=count)

    def part(load: Load) -> Load:
        out = transform(load, {x: add(symbol(own), first)})
        assert isinstance(out, Load)
        return out

    addend = None if product.addend is None else part(product.addend)
    scales = tuple(map(part, product.scales))
    sizes = (*product.sizes[:3], count)
    b, result, quantized = moved(product.b), moved(product.result), product.quantized
    if quantized is not None and quantized.scale is not None:
        quantized = replace(quantized, scale=moved(quantized.scale))
    if product.sizes[1] == 1:  # where any stride is right, that of a loop over the elements
        result = replace(result, row=count)
    return replace(
        product, b=b, result=result, sizes=sizes, axes=(z, y, own), addend=addend, scales=scales, quantized=quantized
    )


def find_product(call: Call, buffers: Mapping[str, BufferSpec], views: Mapping[str, Alias]) -> Product | None:
    """`call` as a product of more than one column, all sizes but the number of rows static, or None."""
    if call.op == CONVOLUTION:
        return _pointwise_convolution(call, buffers, views)
    if call.op == _GROUPED:
        return _grouped(call, buffers, views)
    if call.op == SCALED:
        return _scaled(call, buffers, views)
    if call.op == SCALED_CONVOLUTION:
        return _scaled_pointwise(call, buffers, views)
    if call.op == WEIGHT_ONLY:
        return _weight_only(call, buffers, views)
    if call.op not in _ADDEND or call.kwargs or not all(isinstance(a, Ref) for a in call.args) or call.outputs[0] is None:
        return None
    operands = [as_view(a.name, buffers, views) for a in call.args]
    made = as_view(call.outputs[0], buffers, views)
    if made is None or any(v is None for v in operands):
        return None
    *addend, left, right = (v for v in operands if v is not None)
    a, b, result = _matrix(left), _matrix(right), _matrix(made)
    m, n = made.shape[-2:]
    batch, depth = (made.shape[0] if len(made.shape) == 3 else 1), left.shape[-1]
    if not (isinstance(batch, int) and isinstance(depth, int) and isinstance(n, int)):
        return None
    if n < 2 or min(batch, depth) < 1 or ask("<=", 1, m) is not True:
        return None
    axes = (None if batch == 1 else Sym("x0", size=batch), Sym("x1", size=m), Sym("x2", size=n))
    added = broadcast(addend[0], made.shape, axes, buffers) if addend else None
    return Product(call, a, b, result, (batch, m, depth, n), axes, added)


def _weight_only(call: Call, buffers: Mapping[str, BufferSpec], views: Mapping[str, Alias]) -> Product | None:
    """Rows [M, K] by a weight [N, K] of few bits."""
    left, right, scales, bias, bits, group = call.args
    given = [left, right, scales, *([bias] if bias is not None else [])]
    found = [as_view(x.name, buffers, views) for x in given if isinstance(x, Ref)]
    if len(found) < len(given) or any(v is None for v in found) or call.outputs[0] is None:
        return None
    made = as_view(call.outputs[0], buffers, views)
    rows, weight, scale, *added = (v for v in found if v is not None)
    (m, depth), n = rows.shape, weight.shape[0]
    if made is None or not (isinstance(depth, int) and isinstance(n, int)) or n < 2 or depth < 1:
        return None
    if ask("<=", 1, m) is not True:
        return None
    axes = (None, Sym("x1", size=m), Sym("x2", size=n))
    b = Matrix(weight.of, weight.offset, 0, *weight.strides[::-1])
    addend = broadcast(added[0], (m, n), axes, buffers) if added else None
    sizes = (1, m, depth, n)
    if bits == 8:
        factors = (broadcast(scale, (m, n), axes, buffers),)
        return Product(call, _matrix(rows), b, _matrix(made), sizes, axes, addend, factors, Quantized(bits, 0, None))
    of_groups = Matrix(scale.of, scale.offset, 0, *scale.strides[::-1])
    quantized = Quantized(bits, group or depth, of_groups)
    return Product(call, _matrix(rows), b, _matrix(made), sizes, axes, addend, (), quantized)


def _scaled(call: Call, buffers: Mapping[str, BufferSpec], views: Mapping[str, Alias]) -> Product | None:
    """8-bit rows [M, K] by a weight [N, K]."""
    left, right, *scales, bias, _ = call.args
    given = [left, right, *scales, *([bias] if bias is not None else [])]
    if not all(isinstance(x, Ref) for x in given) or call.outputs[0] is None:
        return None
    found = [as_view(x.name, buffers, views) for x in given]
    made = as_view(call.outputs[0], buffers, views)
    if made is None or any(v is None for v in found):
        return None
    rows, weight, *others = (v for v in found if v is not None)
    (m, depth), n = rows.shape, weight.shape[0]
    if not (isinstance(depth, int) and isinstance(n, int)) or n < 2 or depth < 1 or ask("<=", 1, m) is not True:
        return None
    axes = (None, Sym("x1", size=m), Sym("x2", size=n))
    scale_a, scale_b, *added = others
    if scale_a.shape:  # one for each row
        scale_a = replace(scale_a, shape=(m, 1), strides=(*scale_a.strides, 0))
    loads = [broadcast(v, (m, n), axes, buffers) for v in (scale_a, scale_b, *added)]
    b = Matrix(weight.of, weight.offset, 0, *weight.strides[::-1])
    addend = loads[2] if added else None
    return Product(call, _matrix(rows), b, _matrix(made), (1, m, depth, n), axes, addend, tuple(loads[:2]))


def _grouped(call: Call, buffers: Mapping[str, BufferSpec], views: Mapping[str, Alias]) -> Product | None:
    """Rows [M, K] in groups, each by a matrix of its own of [G, K, N]: a mixture of experts."""
    given = dict(zip(_GROUPED_ARGUMENTS, call.args, strict=False)) | call.kwargs
    left, right, ends = (given.get(name) for name in _GROUPED_ARGUMENTS[:3])
    refs_given = all(isinstance(x, Ref) for x in (left, right, ends))
    if not refs_given or call.outputs[0] is None or any(given.get(name) is not None for name in _GROUPED_ARGUMENTS[3:]):
        return None
    rows, weights, made = (as_view(n, buffers, views) for n in (left.name, right.name, call.outputs[0]))  # type: ignore[union-attr]
    if rows is None or weights is None or made is None or len(rows.shape) != 2 or len(weights.shape) != 3:
        return None
    (m, depth), n = rows.shape, weights.shape[2]
    spec = buffers.get(ends.name)  # type: ignore[union-attr]
    if spec is None or spec.strides != (1,) or spec.dtype != torch.int32 or spec.shape != weights.shape[:1]:
        return None
    if not (isinstance(m, int) and isinstance(depth, int) and isinstance(n, int)) or n < 2 or min(m, depth) < 1:
        return None
    axes = (None, Sym("x1", size=m), Sym("x2", size=n))
    return Product(call, _matrix(rows), _matrix(weights), _matrix(made), (1, m, depth, n), axes, None, ends=spec.name)


def _pointwise_convolution(call: Call, buffers: Mapping[str, BufferSpec], views: Mapping[str, Alias]) -> Product | None:
    """A convolution of [N, K, places...] by [C, K, 1...] as [N * places, K] times [K, C], its bias the addend."""
    x, weight, bias, stride, padding, _, transposed, _, groups = call.args
    window = as_view(weight.name, buffers, views)
    if transposed or groups != 1 or _skips(stride, padding) or window is None or any(s != 1 for s in window.shape[2:]):
        return None
    b = Matrix(window.of, window.offset, 0, window.strides[1], window.strides[0])
    found = _of_places(call, x, b, window.shape[0], buffers, views)
    added = None if bias is None else as_view(bias.name, buffers, views)
    if found is None or (added is None) != (bias is None):
        return None
    shape = (found.sizes[1], found.sizes[3])
    return replace(found, addend=None if added is None else broadcast(added, shape, found.axes, buffers))


def _scaled_pointwise(call: Call, buffers: Mapping[str, BufferSpec], views: Mapping[str, Alias]) -> Product | None:
    """The same of 8-bit operands, the weight [C, 1, 1, K]."""
    x, weight, *scales, bias, stride, padding, _, _ = call.args
    window = as_view(weight.name, buffers, views)
    if _skips(stride, padding) or window is None or window.shape[1:3] != (1, 1):
        return None
    b = Matrix(window.of, window.offset, 0, window.strides[3], window.strides[0])
    found = _of_places(call, x, b, window.shape[0], buffers, views)
    if found is None:
        return None
    loads = loads_of((*scales, bias), (found.sizes[1], found.sizes[3]), found.axes, buffers, views)
    return None if loads is None else replace(found, addend=(*loads[2:], None)[0], scales=loads[:2])


def _skips(stride: Sequence[int], padding: Sequence[int]) -> bool:
    """Whether a window of one element is not at each of the image's places, and nowhere else."""
    return any(s != 1 for s in stride) or any(p != 0 for p in padding)


def _of_places(
    call: Call, x: Ref, b: Matrix, channels: Int, buffers: Mapping[str, BufferSpec], views: Mapping[str, Alias]
) -> Product | None:
    """Convolution `call` of `x` by a window of one element as a product of its places by `b`, before anything is added."""
    name = call.outputs[0]
    image, made = as_view(x.name, buffers, views), None if name is None else as_view(name, buffers, views)
    if image is None or made is None:
        return None
    batch, depth, *inner = image.shape
    places = prod((batch, *inner))
    if not (isinstance(places, int) and isinstance(depth, int) and isinstance(channels, int)):
        return None
    a, result = places_of(image), places_of(made)
    if a is None or result is None or channels < 2 or min(places, depth) < 1:
        return None
    axes = (None, Sym("x1", size=places), Sym("x2", size=channels))
    return Product(call, a, b, result, (1, places, depth, channels), axes, None)


def loads_of(
    given: Sequence[Ref | None],
    shape: tuple[Int, ...],
    axes: tuple[Sym | None, Sym, Sym],
    buffers: Mapping[str, BufferSpec],
    views: Mapping[str, Alias],
) -> tuple[Load, ...] | None:
    """Those of `given` that there are, broadcast to `shape`, at `axes`; None if one is no view of a buffer."""
    found = [as_view(ref.name, buffers, views) for ref in given if ref is not None]
    loads = tuple(broadcast(v, shape, axes, buffers) for v in found if v is not None)
    return loads if len(loads) == len(found) else None


def places_of(view: Alias) -> Matrix | None:
    """A tensor [N, channels, ...] as one matrix of places by channels; None where places are not evenly spaced."""
    dims = [d for d in (0, *range(2, len(view.shape))) if view.shape[d] != 1]
    for outer, inner in pairwise(dims):
        if view.strides[outer] != view.strides[inner] * view.shape[inner]:
            return None
    return Matrix(view.of, view.offset, 0, view.strides[dims[-1]] if dims else 1, view.strides[1])


def as_view(name: str, buffers: Mapping[str, BufferSpec], views: Mapping[str, Alias]) -> Alias | None:
    """The buffer or view `name` as a view of a buffer; None for what is neither."""
    if name in views:
        return views[name] if views[name].of in buffers else None
    spec = buffers.get(name)
    return None if spec is None else Alias(name, name, spec.shape, spec.strides, 0)


def strided(name: str | None, buffers: Mapping[str, BufferSpec], views: Mapping[str, Alias]) -> Strided | None:
    """The buffer or view `name` with its sizes; None for what is neither, or where something of it is symbolic."""
    view = None if name is None else as_view(name, buffers, views)
    if view is None:
        return None
    numbers = [n for n in (*view.shape, *view.strides, view.offset) if isinstance(n, int)]
    rank = len(view.shape)
    if len(numbers) != 2 * rank + 1:
        return None
    return Strided(view.of, tuple(numbers[:rank]), tuple(numbers[rank:-1]), numbers[-1])


def _matrix(view: Alias) -> Matrix:
    batch = view.strides[0] if len(view.shape) == 3 else 0
    return Matrix(view.of, view.offset, batch, *view.strides[-2:])


def _at(matrix: Matrix, axes: tuple[Sym | None, Sym, Sym]) -> Int:
    out = matrix.offset
    for sym, stride in zip(axes, (matrix.batch, matrix.row, matrix.column), strict=True):
        if sym is not None:
            out = add(out, mul(symbol(sym), stride))
    return out


def broadcast(
    view: Alias, shape: tuple[Int, ...], axes: tuple[Sym | None, Sym, Sym], buffers: Mapping[str, BufferSpec]
) -> Load:
    """`view`, broadcast to `shape`, at `axes`."""
    out = view.offset
    own = axes[3 - len(shape) :]
    for sym, size, stride in zip(own[len(own) - len(view.shape) :], view.shape, view.strides, strict=True):
        if sym is not None and size != 1:
            out = add(out, mul(symbol(sym), stride))
    return Load(view.of, out, buffers[view.of].dtype)
