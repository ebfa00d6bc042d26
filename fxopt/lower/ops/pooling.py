"""Pooling with small windows, unrolled: each output element is one expression over the taps of its window.

The gradients are written as gathers (an input element sums over the windows that hold it), so nothing is added atomically.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

import torch
from torch import fx

from fxopt.errors import UnsupportedError
from fxopt.ir.exprs import Int, add, floordiv, maximum, minimum, mul, prod
from fxopt.ir.loops import Const, IndexValue, Masked, Op, Scalar
from fxopt.lower.lowering import Lowering
from fxopt.lower.ops.bounds import BOOL, all_of, compare, inside, is_empty
from fxopt.lower.ops.elements import Indices
from fxopt.lower.table import Table
from fxopt.lower.values import Computed, Value, at, cast, known_equal, pointwise, size_value

aten = torch.ops.aten
TABLE = Table()

MAX_TAPS = 36
"""Larger windows are left to the library: unrolled, they would be more code than their loads are worth."""


@dataclass(frozen=True)
class Window:
    """The windows along one dimension: output i covers i*stride - padding + k*dilation for k in range(kernel)."""

    size: Int
    out: Int
    kernel: int
    stride: int
    padding: int
    dilation: int = 1

    def tap(self, i: Int, k: int) -> Int:
        """The input index under tap `k` of output `i`; outside of [0, size) in the padding."""
        return add(mul(i, self.stride), k * self.dilation - self.padding)

    def covering(self) -> int:
        """How many windows can cover one input element."""
        return ((self.kernel - 1) * self.dilation) // self.stride + 1

    def cover(self, h: Int, t: int) -> Int:
        """The `t`-th last output whose window starts at or before input `h`; it may cover `h` for t < `covering`."""
        return add(floordiv(add(h, self.padding), self.stride), -t)

    def covers(self, h: Int, i: Int) -> Scalar:
        """Whether output `i`, which starts at or before input `h`, exists and reaches it (be it with a gap of dilation)."""
        distance = add(add(h, self.padding), mul(i, -self.stride))
        return all_of((inside(i, self.out), compare("lt", distance, (self.kernel - 1) * self.dilation + 1)))

    def extent(self, i: Int, include_padding: bool) -> Int:
        """How many elements of window `i` count in an average: those inside, or with the padding (but no further)."""
        start = self.tap(i, 0)
        end = minimum(add(start, self.kernel), add(self.size, self.padding))
        if not include_padding:
            start, end = maximum(start, 0), minimum(end, self.size)
        return add(end, mul(start, -1))


def _pair(given: Sequence[int] | int, default: tuple[int, int]) -> tuple[int, int]:
    values = [given] if isinstance(given, int) else list(given)
    if not values:
        return default
    return (values[0], values[0]) if len(values) == 1 else (values[0], values[1])


def _windows(
    shape: Sequence[Int],
    out: Sequence[Int],
    kernel: Sequence[int],
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
) -> tuple[Window, Window]:
    """The windows of the last two dimensions. Raises UnsupportedError for windows too large to unroll."""
    k = _pair(kernel, (1, 1))
    s, p, d = _pair(stride, k), _pair(padding, (0, 0)), _pair(dilation, (1, 1))
    if k[0] * k[1] > MAX_TAPS:
        raise UnsupportedError(f"a pooling window of {k[0]}x{k[1]}")
    made = [Window(shape[n - 2], out[n - 2], k[n], s[n], p[n], d[n]) for n in range(2)]
    return made[0], made[1]


def _accumulator(dtype: torch.dtype) -> torch.dtype:
    if not dtype.is_floating_point:
        raise UnsupportedError(f"averages of {dtype}")
    return torch.float32 if dtype in (torch.float16, torch.bfloat16) else dtype


def _total(terms: Iterable[Scalar], dtype: torch.dtype) -> Scalar:
    return functools.reduce(lambda a, b: Op("add", (a, b), dtype), terms)


def _taps(x: Value, i: Indices, pair: tuple[Window, Window], fill: Scalar) -> list[tuple[Scalar, Int, Int, Scalar]]:
    """(element or `fill` in the padding, its row, its column, whether it is inside) for each tap of window `i`."""
    rows, columns = pair
    out = []
    for a, b in itertools.product(range(rows.kernel), range(columns.kernel)):
        h, w = rows.tap(i[-2], a), columns.tap(i[-1], b)
        valid = all_of((inside(h, rows.size), inside(w, columns.size)))
        out.append((Masked(valid, cast(at(x, (*i[:-2], h, w)), fill.dtype), fill), h, w, valid))
    return out


# ---------------------------------------------------------------------- maxima


def _used(node: fx.Node, position: int) -> bool:
    return any(user.args[1] == position for user in node.users)


@TABLE.lowers(aten.max_pool2d_with_indices.default)
def max_pool2d(
    ctx: Lowering,
    x: Value,
    kernel_size: Sequence[int],
    stride: Sequence[int] = (),
    padding: Sequence[int] = (0,),
    dilation: Sequence[int] = (1,),
    ceil_mode: bool = False,
) -> tuple[Value | None, Value | None]:
    """Values and their positions in the input's plane (row * width + column); NaN wins, the last one gives its position."""
    shape = ctx.sizes(ctx.out(0).shape)
    pair = _windows(x.shape, shape, kernel_size, stride, padding, dilation)
    lowest = Const(-float("inf") if x.dtype.is_floating_point else torch.iinfo(x.dtype).min, x.dtype)

    def best(i: Indices) -> Scalar:
        return functools.reduce(lambda a, b: Op("maximum", (a, b), x.dtype), [t[0] for t in _taps(x, i, pair, lowest)])

    values = pointwise(shape, x.dtype, x.device, best, (x,))
    if not _used(ctx.node, 1):
        return values, None
    return values, pointwise(shape, torch.int64, x.device, lambda i: _argmax(_taps(x, i, pair, lowest), pair[1].size), (x,))


def _argmax(taps: list[tuple[Scalar, Int, Int, Scalar]], width: Int) -> Scalar:
    top, place = taps[0][0], Const(-1, torch.int64)
    chosen: Scalar = place
    for value, h, w, valid in taps:
        better: Scalar = Op(
            "bitwise_or", (Op("gt", (value, top), BOOL), Op("lt", (chosen, Const(0, torch.int64)), BOOL)), BOOL
        )
        if value.dtype.is_floating_point:
            better = Op("bitwise_or", (better, Op("isnan", (value,), BOOL)), BOOL)
        position = IndexValue(add(mul(h, width), w))
        chosen = Op("where", (all_of((better, valid)), position, chosen), torch.int64)
        top = Op("maximum", (top, value), value.dtype)
    return chosen


@TABLE.lowers(aten.max_pool2d_with_indices_backward.default)
def max_pool2d_backward(
    ctx: Lowering,
    grad: Value,
    x: Value,
    kernel_size: Sequence[int],
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    ceil_mode: bool,
    indices: Value,
) -> Computed:
    """The sum of `grad` over the windows whose maximum, by `indices`, each input element is."""
    pair = _windows(x.shape, grad.shape, kernel_size, stride, padding, dilation)
    dtype = _accumulator(grad.dtype)

    def term(i: Indices, where: Indices) -> Scalar:
        own = size_value(add(mul(i[-2], x.shape[-1]), i[-1]))
        hit = Op("eq", (at(indices, where), own), BOOL)
        return Op("where", (hit, cast(at(grad, where), dtype), Const(0, dtype)), dtype)

    return _over_windows(ctx, grad, x.shape, pair, dtype, term)


def _over_windows(
    ctx: Lowering,
    grad: Value,
    shape: Sequence[Int],
    pair: tuple[Window, Window],
    dtype: torch.dtype,
    term: Callable[[Indices, Indices], Scalar],
) -> Computed:
    """For each input element i: the sum of term(i, output) over the outputs whose windows cover it."""
    rows, columns = pair
    if rows.covering() * columns.covering() > MAX_TAPS:
        raise UnsupportedError("the gradient of strongly overlapping windows")

    def body(i: Indices) -> Scalar:
        terms: list[Scalar] = []
        for a, b in itertools.product(reversed(range(rows.covering())), reversed(range(columns.covering()))):
            h, w = rows.cover(i[-2], a), columns.cover(i[-1], b)
            covered = all_of((rows.covers(i[-2], h), columns.covers(i[-1], w)))
            terms.append(Masked(covered, term(i, (*i[:-2], h, w)), Const(0, dtype)))
        return _total(terms, dtype)

    if is_empty(shape) or is_empty(grad.shape):
        return Computed(Const(0, grad.dtype), grad.dtype, grad.device, tuple(shape))
    return pointwise(shape, grad.dtype, grad.device, body, _values(ctx))


def _values(ctx: Lowering) -> list[Value]:
    """The tensor arguments of the current node."""
    return [v for v in (ctx.values[n] for n in ctx.node.all_input_nodes) if not isinstance(v, (int, float))]


# ---------------------------------------------------------------------- averages


@TABLE.lowers(aten.avg_pool2d.default)
def avg_pool2d(
    ctx: Lowering,
    x: Value,
    kernel_size: Sequence[int],
    stride: Sequence[int] = (),
    padding: Sequence[int] = (0,),
    ceil_mode: bool = False,
    count_include_pad: bool = True,
    divisor_override: int | None = None,
) -> Computed:
    shape, dtype = ctx.sizes(ctx.out().shape), _accumulator(x.dtype)
    pair = _windows(x.shape, shape, kernel_size, stride, padding, (1,))

    def body(i: Indices) -> Scalar:
        total = _total([t[0] for t in _taps(x, i, pair, Const(0, dtype))], dtype)
        return Op("truediv", (total, _divisor(pair, i, count_include_pad, divisor_override, dtype)), dtype)

    return pointwise(shape, x.dtype, x.device, body, (x,))


def _divisor(
    pair: tuple[Window, Window], i: Indices, include_padding: bool, override: int | None, dtype: torch.dtype
) -> Scalar:
    if override is not None:
        return Const(override, dtype)
    return size_value(prod(w.extent(k, include_padding) for w, k in zip(pair, i[-2:], strict=True)), dtype)


@TABLE.lowers(aten.avg_pool2d_backward.default)
def avg_pool2d_backward(
    ctx: Lowering,
    grad: Value,
    x: Value,
    kernel_size: Sequence[int],
    stride: Sequence[int],
    padding: Sequence[int],
    ceil_mode: bool,
    count_include_pad: bool,
    divisor_override: int | None,
) -> Computed:
    dtype = _accumulator(grad.dtype)
    pair = _windows(x.shape, grad.shape, kernel_size, stride, padding, (1,))

    def term(i: Indices, where: Indices) -> Scalar:
        divisor = _divisor(pair, where, count_include_pad, divisor_override, dtype)
        return Op("truediv", (cast(at(grad, where), dtype), divisor), dtype)

    return _over_windows(ctx, grad, x.shape, pair, dtype, term)


# ---------------------------------------------------------------------- averages to a given size


@TABLE.lowers(aten._adaptive_avg_pool2d.default)
def adaptive_avg_pool2d(ctx: Lowering, x: Value, output_size: Sequence[Int]) -> Value:
    shape, dtype = ctx.sizes(ctx.out().shape), _accumulator(x.dtype)
    if all(known_equal(size, 1) for size in shape[-2:]):
        return _plane_mean(ctx, x, dtype)
    bins = [_bins(size, count) for size, count in zip(x.shape[-2:], shape[-2:], strict=True)]
    if bins[0][0] * bins[1][0] > MAX_TAPS:
        raise UnsupportedError("adaptive pooling with large windows")

    def body(i: Indices) -> Scalar:
        (rows, top, bottom), (columns, left, right) = ((n, *ends(k)) for (n, ends), k in zip(bins, i[-2:], strict=True))
        terms = []
        for a, b in itertools.product(range(rows), range(columns)):
            h, w = add(top, a), add(left, b)
            valid = all_of((compare("lt", h, bottom), compare("lt", w, right)))
            terms.append(Masked(valid, cast(at(x, (*i[:-2], h, w)), dtype), Const(0, dtype)))
        count = mul(add(bottom, mul(top, -1)), add(right, mul(left, -1)))
        return Op("truediv", (_total(terms, dtype), size_value(count, dtype)), dtype)

    return pointwise(shape, x.dtype, x.device, body, (x,))


def _bins(size: Int, count: Int) -> tuple[int, Callable[[Int], tuple[Int, Int]]]:
    """(taps of the largest bin, bin i -> [start, end)) of `size` elements cut into `count` bins, as torch cuts them."""
    if not isinstance(size, int) or not isinstance(count, int):
        raise UnsupportedError("adaptive pooling of symbolic sizes")

    def ends(i: Int) -> tuple[Int, Int]:
        return floordiv(mul(i, size), count), floordiv(add(mul(add(i, 1), size), count - 1), count)

    def length(i: int) -> int:
        start, end = ends(i)
        assert isinstance(start, int) and isinstance(end, int)
        return end - start

    return max((length(i) for i in range(count)), default=1), ends


def _plane_mean(ctx: Lowering, x: Value, dtype: torch.dtype) -> Value:
    rank = len(x.shape)
    (total,) = ctx.reduce(
        "sum", x.shape, (rank - 2, rank - 1), lambda i: (cast(at(x, i), dtype),),
        accumulate=dtype, inputs=(x,), results=((0, dtype),), keepdim=True,
    )  # fmt: skip
    count = size_value(mul(x.shape[-2], x.shape[-1]), dtype)
    return pointwise(total.shape, x.dtype, x.device, lambda i: Op("truediv", (at(total, i), count), dtype), (total,))


@TABLE.lowers(aten._adaptive_avg_pool2d_backward.default)
def adaptive_avg_pool2d_backward(ctx: Lowering, grad: Value, x: Value) -> Computed:
    """Each input element's share of its window's gradient, for windows that do not overlap (equal ones)."""
    sizes = list(zip(x.shape[-2:], grad.shape[-2:], strict=True))
    if not all(known_equal(mul(floordiv(size, count), count), size) for size, count in sizes):
        raise UnsupportedError("the gradient of adaptive pooling with overlapping windows")
    dtype, (kh, kw) = _accumulator(grad.dtype), (floordiv(size, count) for size, count in sizes)

    def body(i: Indices) -> Scalar:
        own = cast(at(grad, (*i[:-2], floordiv(i[-2], kh), floordiv(i[-1], kw))), dtype)
        return Op("truediv", (own, size_value(mul(kh, kw), dtype)), dtype)

    return pointwise(x.shape, grad.dtype, grad.device, body, (grad,))
