"""Pooling to a given size: bins as torch cuts them, unrolled; gradients as gathers over the bins that hold an element."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch

from fxopt.errors import UnsupportedError
from fxopt.ir.exprs import Int, add, floordiv, mul, prod
from fxopt.ir.loops import Const, Op, Scalar
from fxopt.lower.lowering import Lowering
from fxopt.lower.ops.bounds import all_of, compare
from fxopt.lower.ops.elements import Indices
from fxopt.lower.ops.pooling import (
    MAX_TAPS,
    Tap,
    accumulator,
    gathered,
    lowest,
    maxima,
    of_maximum,
    tap,
    total,
)
from fxopt.lower.table import Table
from fxopt.lower.values import Computed, Value, at, cast, known_equal, pointwise, size_value

aten = torch.ops.aten
TABLE = Table()


@dataclass(frozen=True)
class Bins:
    """`size` elements in `count` bins: bin i is [floor(i*size/count), ceil((i+1)*size/count)). Neighbours may overlap."""

    size: int
    count: int

    def start(self, i: Int) -> Int:
        return floordiv(mul(i, self.size), self.count)

    def end(self, i: Int) -> Int:
        return floordiv(add(mul(add(i, 1), self.size), self.count - 1), self.count)

    def length(self, i: Int) -> Int:
        return add(self.end(i), mul(self.start(i), -1))

    def longest(self) -> int:
        """Elements of the largest bin."""
        return max((n for i in range(self.count) if isinstance(n := self.length(i), int)), default=1)

    def first(self, h: Int) -> Int:
        """The first bin that holds element `h`."""
        return floordiv(mul(h, self.count), self.size)

    def last(self, h: Int) -> Int:
        """The last one."""
        return add(floordiv(add(mul(add(h, 1), self.count), self.size - 1), self.size), -1)

    def covering(self) -> int:
        """The largest number of bins that hold one element."""
        spans = (add(self.last(h), mul(self.first(h), -1)) for h in range(self.size))
        return max((n + 1 for n in spans if isinstance(n, int)), default=1)


def _cut(shape: Sequence[Int], counts: Sequence[Int]) -> tuple[Bins, ...]:
    """Bins for dimensions of `shape`. Raises UnsupportedError for sizes known only at run time and for large bins."""
    made = []
    for size, count in zip(shape, counts, strict=True):
        if not isinstance(size, int) or not isinstance(count, int):
            raise UnsupportedError("adaptive pooling of symbolic sizes")
        made.append(Bins(size, count))
    if math.prod(b.longest() for b in made) > MAX_TAPS:
        raise UnsupportedError("adaptive pooling with large windows")
    return tuple(made)


def _taps(x: Value, i: Indices, bins: tuple[Bins, ...], fill: Scalar) -> list[Tap]:
    own = i[-len(bins) :]
    out = []
    for steps in itertools.product(*(range(b.longest()) for b in bins)):
        place = tuple(add(b.start(k), step) for b, k, step in zip(bins, own, steps, strict=True))
        valid = all_of([compare("lt", p, b.end(k)) for p, b, k in zip(place, bins, own, strict=True)])
        out.append(tap(x, i, place, valid, fill))
    return out


def _covering(bins: tuple[Bins, ...]) -> Callable[[Indices], Iterator[tuple[Indices, Scalar]]]:
    """Input element -> (the last indices of an output, whether its bin holds the element), for every output that may."""

    def outputs(i: Indices) -> Iterator[tuple[Indices, Scalar]]:
        own = i[-len(bins) :]
        for steps in itertools.product(*(range(b.covering()) for b in bins)):
            where = tuple(add(b.first(h), step) for b, h, step in zip(bins, own, steps, strict=True))
            yield where, all_of([compare("le", o, b.last(h)) for o, b, h in zip(where, bins, own, strict=True)])

    return outputs


# ---------------------------------------------------------------------- averages


@TABLE.lowers(aten._adaptive_avg_pool2d.default, aten._adaptive_avg_pool3d.default)
def adaptive_avg_pool(ctx: Lowering, x: Value, output_size: Sequence[Int]) -> Value:
    shape, dtype = ctx.sizes(ctx.out().shape), accumulator(x.dtype)
    rank = len(output_size)
    if all(known_equal(size, 1) for size in shape[-rank:]):
        return _mean(ctx, x, rank, dtype)
    bins = _cut(x.shape[-rank:], shape[-rank:])

    def body(i: Indices) -> Scalar:
        added = total([t.value for t in _taps(x, i, bins, Const(0, dtype))], dtype)
        return Op("truediv", (added, _count(bins, i, dtype)), dtype)

    return pointwise(shape, x.dtype, x.device, body, (x,))


def _count(bins: tuple[Bins, ...], i: Indices, dtype: torch.dtype) -> Scalar:
    return size_value(prod([b.length(k) for b, k in zip(bins, i[-len(bins) :], strict=True)]), dtype)


def _mean(ctx: Lowering, x: Value, rank: int, dtype: torch.dtype) -> Value:
    dims = tuple(range(len(x.shape) - rank, len(x.shape)))
    (summed,) = ctx.reduce(
        "sum", x.shape, dims, lambda i: (cast(at(x, i), dtype),),
        accumulate=dtype, inputs=(x,), results=((0, dtype),), keepdim=True,
    )  # fmt: skip
    count = size_value(prod(x.shape[-rank:]), dtype)
    return pointwise(summed.shape, x.dtype, x.device, lambda i: Op("truediv", (at(summed, i), count), dtype), (summed,))


@TABLE.lowers(aten._adaptive_avg_pool2d_backward.default, aten._adaptive_avg_pool3d_backward.default)
def adaptive_avg_pool_backward(ctx: Lowering, grad: Value, x: Value) -> Computed:
    """Each input element's share of the gradients of the bins that hold it."""
    rank = 2 if ctx.node.target is aten._adaptive_avg_pool2d_backward.default else 3
    sizes = list(zip(x.shape[-rank:], grad.shape[-rank:], strict=True))
    if all(known_equal(mul(floordiv(size, count), count), size) for size, count in sizes):
        return _share(grad, x, [floordiv(size, count) for size, count in sizes])
    bins, dtype = _cut(x.shape[-rank:], grad.shape[-rank:]), accumulator(grad.dtype)

    def term(i: Indices, where: Indices) -> Scalar:
        return Op("truediv", (cast(at(grad, where), dtype), _count(bins, where, dtype)), dtype)

    return gathered(ctx, grad, x.shape, _covering(bins), term)


def _share(grad: Value, x: Value, lengths: Sequence[Int]) -> Computed:
    """Equal bins of `lengths`, symbolic ones too: every element is in one."""
    dtype, rank = accumulator(grad.dtype), len(lengths)

    def body(i: Indices) -> Scalar:
        where = (floordiv(k, n) for k, n in zip(i[-rank:], lengths, strict=True))
        own = cast(at(grad, (*i[:-rank], *where)), dtype)
        return Op("truediv", (own, size_value(prod(lengths), dtype)), dtype)

    return pointwise(x.shape, grad.dtype, grad.device, body, (grad,))


# ---------------------------------------------------------------------- maxima


@TABLE.lowers(aten.adaptive_max_pool2d.default, aten.adaptive_max_pool3d.default)
def adaptive_max_pool(ctx: Lowering, x: Value, output_size: Sequence[Int]) -> tuple[Value | None, Value | None]:
    """Values and their positions in the input's plane or volume."""
    rank = 2 if ctx.node.target is aten.adaptive_max_pool2d.default else 3
    bins = _cut(x.shape[-rank:], ctx.sizes(ctx.out(0).shape)[-rank:])
    return maxima(ctx, x, rank, lambda i: _taps(x, i, bins, lowest(x.dtype)))


@TABLE.lowers(aten.adaptive_max_pool2d_backward.default, aten.adaptive_max_pool3d_backward.default)
def adaptive_max_pool_backward(ctx: Lowering, grad: Value, x: Value, indices: Value) -> Computed:
    rank = 2 if ctx.node.target is aten.adaptive_max_pool2d_backward.default else 3
    bins = _cut(x.shape[-rank:], grad.shape[-rank:])
    return gathered(ctx, grad, x.shape, _covering(bins), of_maximum(grad, x, indices, rank))
