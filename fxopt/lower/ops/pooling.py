"""Pooling with small windows, unrolled: each output element is one expression over the taps of its window.

The gradients are written as gathers (an input element sums over the windows that hold it), so nothing is added atomically.
"""

from __future__ import annotations

import functools
import itertools
import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import fx

from fxopt.errors import UnsupportedError
from fxopt.ir import pool_ops
from fxopt.ir.exprs import Int, add, floordiv, maximum, minimum, mul, prod, ravel
from fxopt.ir.loops import Const, IndexValue, Masked, Op, Scalar
from fxopt.lower.lowering import Lowering
from fxopt.lower.ops.bounds import BOOL, all_of, compare, inside, is_empty
from fxopt.lower.ops.elements import Indices
from fxopt.lower.table import Table
from fxopt.lower.values import Computed, Value, at, cast, pointwise, size_value

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


Windows = tuple[Window, ...]
"""Those of the last dimensions, in order."""


def _each(given: Sequence[int] | int, default: Sequence[int]) -> Sequence[int]:
    """One number for each of the `default`'s dimensions, as torch reads an int, one number, several or none."""
    values = [given] if isinstance(given, int) else list(given)
    if not values:
        return default
    return values * len(default) if len(values) == 1 else values


def _windows(
    rank: int,
    shape: Sequence[Int],
    out: Sequence[Int],
    kernel: Sequence[int],
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
) -> Windows:
    """The windows of the last `rank` dimensions. Raises UnsupportedError for windows too large to unroll."""
    k = _each(kernel, (1,) * rank)
    s, p, d = _each(stride, k), _each(padding, (0,) * rank), _each(dilation, (1,) * rank)
    if math.prod(k) > MAX_TAPS:
        raise UnsupportedError(f"a pooling window of {'x'.join(map(str, k))}")
    return tuple(Window(shape[n - rank], out[n - rank], k[n], s[n], p[n], d[n]) for n in range(rank))


def accumulator(dtype: torch.dtype) -> torch.dtype:
    if not dtype.is_floating_point:
        raise UnsupportedError(f"averages of {dtype}")
    return torch.float32 if dtype in (torch.float16, torch.bfloat16) else dtype


def total(terms: Iterable[Scalar], dtype: torch.dtype) -> Scalar:
    return functools.reduce(lambda a, b: Op("add", (a, b), dtype), terms)


@dataclass(frozen=True)
class Tap:
    """An element under a window: its value (outside, the filling), place in the last dimensions, whether it is inside."""

    value: Scalar
    place: Indices
    valid: Scalar


def tap(x: Value, i: Indices, place: Indices, valid: Scalar, fill: Scalar) -> Tap:
    element = cast(at(x, (*i[: len(i) - len(place)], *place)), fill.dtype)
    return Tap(Masked(valid, element, fill), place, valid)


def _taps(x: Value, i: Indices, windows: Windows, fill: Scalar) -> list[Tap]:
    """The taps of window `i`, `fill` in the padding."""
    out = []
    for steps in itertools.product(*(range(w.kernel) for w in windows)):
        place = tuple(w.tap(k, step) for w, k, step in zip(windows, i[-len(windows) :], steps, strict=True))
        valid = all_of([inside(p, w.size) for p, w in zip(place, windows, strict=True)])
        out.append(tap(x, i, place, valid, fill))
    return out


# ---------------------------------------------------------------------- maxima


def _used(node: fx.Node, position: int) -> bool:
    return any(user.args[1] == position for user in node.users)


def lowest(dtype: torch.dtype) -> Const:
    return Const(-float("inf") if dtype.is_floating_point else torch.iinfo(dtype).min, dtype)


@TABLE.lowers(aten.max_pool2d_with_indices.default, aten.max_pool3d_with_indices.default)
def max_pool(
    ctx: Lowering,
    x: Value,
    kernel_size: Sequence[int],
    stride: Sequence[int] = (),
    padding: Sequence[int] = (0,),
    dilation: Sequence[int] = (1,),
    ceil_mode: bool = False,
) -> tuple[Value | None, Value | None]:
    """Values and their positions in the input's plane or volume; NaN wins, the last one gives its position."""
    rank = 2 if ctx.node.target is aten.max_pool2d_with_indices.default else 3
    windows = _windows(rank, x.shape, ctx.sizes(ctx.out(0).shape), kernel_size, stride, padding, dilation)
    return maxima(ctx, x, rank, lambda i: _taps(x, i, windows, lowest(x.dtype)))


def maxima(ctx: Lowering, x: Value, rank: int, taps: Callable[[Indices], list[Tap]]) -> tuple[Value | None, Value | None]:
    """The largest tap of each output element and, if anyone wants it, its flat position in the last `rank` dimensions."""
    shape = ctx.sizes(ctx.out(0).shape)

    def best(i: Indices) -> Scalar:
        return functools.reduce(lambda a, b: Op("maximum", (a, b), x.dtype), [t.value for t in taps(i)])

    values = pointwise(shape, x.dtype, x.device, best, (x,))
    if not _used(ctx.node, 1):
        return values, None

    def position(i: Indices) -> Scalar:
        chosen = taps(i)
        return _argmax(chosen, [IndexValue(ravel(t.place, x.shape[-rank:])) for t in chosen])

    return values, pointwise(shape, torch.int64, x.device, position, (x,))


def _argmax(taps: list[Tap], positions: Sequence[Scalar]) -> Scalar:
    """The position of the tap that eager takes for the largest: the first of equal ones, the last NaN.

    What fills the padding is no larger than anything, so only where to begin depends on what is inside: of a window of
    infinitely small elements, the first one inside is taken.
    """
    chosen = positions[-1]
    for t, position in zip(taps[-2::-1], positions[-2::-1], strict=True):
        chosen = Masked(t.valid, position, chosen)
    top = taps[0].value
    for t, position in zip(taps[1:], positions[1:], strict=True):
        better: Scalar = Op("gt", (t.value, top), BOOL)
        if t.value.dtype.is_floating_point:
            better = Op("bitwise_or", (better, Op("isnan", (t.value,), BOOL)), BOOL)
        chosen = Op("where", (better, position, chosen), position.dtype)
        top = Op("maximum", (top, t.value), t.value.dtype)  # as in `maxima`: what both compute is computed once
    return chosen


@TABLE.lowers(pool_ops.max_pool_offsets)
def max_pool_offsets(
    ctx: Lowering, x: Value, kernel: Sequence[int], stride: Sequence[int], padding: Sequence[int], ceil_mode: bool
) -> tuple[Value, Value]:
    """Values and the numbers of their taps."""
    shape = ctx.sizes(ctx.out(0).shape)
    windows = _windows(2, x.shape, shape, kernel, stride, padding, (1,))

    def best(i: Indices) -> Scalar:
        taps = _taps(x, i, windows, lowest(x.dtype))
        return functools.reduce(lambda a, b: Op("maximum", (a, b), x.dtype), [t.value for t in taps])

    def number(i: Indices) -> Scalar:
        taps = _taps(x, i, windows, lowest(x.dtype))
        return cast(_argmax(taps, [Const(k, torch.int32) for k in range(len(taps))]), torch.int8)

    return pointwise(shape, x.dtype, x.device, best, (x,)), pointwise(shape, torch.int8, x.device, number, (x,))


@TABLE.lowers(pool_ops.max_pool_offsets_backward)
def max_pool_offsets_backward(
    ctx: Lowering,
    grad: Value,
    x: Value,
    kernel: Sequence[int],
    stride: Sequence[int],
    padding: Sequence[int],
    ceil_mode: bool,
    offsets: Value,
) -> Computed:
    """The sum of `grad` over the windows in which each input element is the tap with the number in `offsets`."""
    windows, dtype = _windows(2, x.shape, grad.shape, kernel, stride, padding, (1,)), accumulator(grad.dtype)

    def term(i: Indices, where: Indices) -> Scalar:
        rows, columns = (add(h, mul(w.tap(o, 0), -1)) for w, h, o in zip(windows, i[-2:], where[-2:], strict=True))
        own = cast(IndexValue(add(mul(rows, windows[1].kernel), columns)), torch.int32)
        hit = Op("eq", (cast(at(offsets, where), torch.int32), own), BOOL)
        return Op("where", (hit, cast(at(grad, where), dtype), Const(0, dtype)), dtype)

    return _over_windows(ctx, grad, x.shape, windows, term)


@TABLE.lowers(aten.max_pool2d_with_indices_backward.default, aten.max_pool3d_with_indices_backward.default)
def max_pool_backward(
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
    rank = 2 if ctx.node.target is aten.max_pool2d_with_indices_backward.default else 3
    windows = _windows(rank, x.shape, grad.shape, kernel_size, stride, padding, dilation)
    return _over_windows(ctx, grad, x.shape, windows, of_maximum(grad, x, indices, rank))


def of_maximum(grad: Value, x: Value, indices: Value, rank: int) -> Callable[[Indices, Indices], Scalar]:
    """(input element, output) -> the output's gradient if the element is its maximum, else 0."""
    dtype = accumulator(grad.dtype)

    def term(i: Indices, where: Indices) -> Scalar:
        own = size_value(ravel(i[-rank:], x.shape[-rank:]))
        hit = Op("eq", (at(indices, where), own), BOOL)
        return Op("where", (hit, cast(at(grad, where), dtype), Const(0, dtype)), dtype)

    return term


def _over_windows(
    ctx: Lowering, grad: Value, shape: Sequence[Int], windows: Windows, term: Callable[[Indices, Indices], Scalar]
) -> Computed:
    """For each input element i: the sum of term(i, output) over the outputs whose windows cover it."""
    if math.prod(w.covering() for w in windows) > MAX_TAPS:
        raise UnsupportedError("the gradient of strongly overlapping windows")
    rank = len(windows)

    def covering(i: Indices) -> Iterator[tuple[Indices, Scalar]]:
        for steps in itertools.product(*(reversed(range(w.covering())) for w in windows)):
            where = tuple(w.cover(h, t) for w, h, t in zip(windows, i[-rank:], steps, strict=True))
            yield where, all_of([w.covers(h, o) for w, h, o in zip(windows, i[-rank:], where, strict=True)])

    return gathered(ctx, grad, shape, covering, term)


def gathered(
    ctx: Lowering,
    grad: Value,
    shape: Sequence[Int],
    covering: Callable[[Indices], Iterable[tuple[Indices, Scalar]]],
    term: Callable[[Indices, Indices], Scalar],
) -> Computed:
    """For each input element i: the sum of term(i, output) over covering(i): (an output's last indices, a condition)."""
    dtype = accumulator(grad.dtype)

    def body(i: Indices) -> Scalar:
        terms = [Masked(valid, term(i, (*i[: len(i) - len(o)], *o)), Const(0, dtype)) for o, valid in covering(i)]
        return total(terms, dtype)

    if is_empty(shape) or is_empty(grad.shape):
        return Computed(Const(0, grad.dtype), grad.dtype, grad.device, tuple(shape))
    return pointwise(shape, grad.dtype, grad.device, body, _values(ctx))


def _values(ctx: Lowering) -> list[Value]:
    """The tensor arguments of the current node."""
    return [v for v in (ctx.values[n] for n in ctx.node.all_input_nodes) if not isinstance(v, (int, float))]


# ---------------------------------------------------------------------- averages


@TABLE.lowers(aten.avg_pool2d.default, aten.avg_pool3d.default)
def avg_pool(
    ctx: Lowering,
    x: Value,
    kernel_size: Sequence[int],
    stride: Sequence[int] = (),
    padding: Sequence[int] = (0,),
    ceil_mode: bool = False,
    count_include_pad: bool = True,
    divisor_override: int | None = None,
) -> Computed:
    shape, dtype = ctx.sizes(ctx.out().shape), accumulator(x.dtype)
    rank = 2 if ctx.node.target is aten.avg_pool2d.default else 3
    windows = _windows(rank, x.shape, shape, kernel_size, stride, padding, (1,))

    def body(i: Indices) -> Scalar:
        added = total([t.value for t in _taps(x, i, windows, Const(0, dtype))], dtype)
        return Op("truediv", (added, _divisor(windows, i, count_include_pad, divisor_override, dtype)), dtype)

    return pointwise(shape, x.dtype, x.device, body, (x,))


def _divisor(windows: Windows, i: Indices, include_padding: bool, override: int | None, dtype: torch.dtype) -> Scalar:
    if override is not None:
        return Const(override, dtype)
    extents = [w.extent(k, include_padding) for w, k in zip(windows, i[-len(windows) :], strict=True)]
    return size_value(prod(extents), dtype)


@TABLE.lowers(aten.avg_pool2d_backward.default, aten.avg_pool3d_backward.default)
def avg_pool_backward(
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
    dtype = accumulator(grad.dtype)
    rank = 2 if ctx.node.target is aten.avg_pool2d_backward.default else 3
    windows = _windows(rank, x.shape, grad.shape, kernel_size, stride, padding, (1,))

    def term(i: Indices, where: Indices) -> Scalar:
        divisor = _divisor(windows, where, count_include_pad, divisor_override, dtype)
        return Op("truediv", (cast(at(grad, where), dtype), divisor), dtype)

    return _over_windows(ctx, grad, x.shape, windows, term)
