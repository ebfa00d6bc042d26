"""Views: on a stored value a change of strides, on an expression a change of index."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch

from fxopt.errors import UnsupportedError
from fxopt.ir.exprs import Int, add, ask, mul, prod
from fxopt.ir.loops import Op
from fxopt.lower import layout
from fxopt.lower.lowering import Lowering
from fxopt.lower.ops.bounds import dim_of, is_empty, range_start, reshape_indices, wrapped
from fxopt.lower.ops.elements import fresh
from fxopt.lower.table import Table
from fxopt.lower.values import Computed, Stored, Value, at, known_equal, pointwise

aten = torch.ops.aten
TABLE = Table()


@dataclass(frozen=True)
class Affine:
    """A view by affine index arithmetic: source index k = starts[k] + sum over j of steps[j].get(k, 0) * index j.

    `shape` is the view's; `steps` has one entry per dimension of the view, `starts` one per dimension of the source.
    """

    shape: tuple[Int, ...]
    steps: tuple[dict[int, Int], ...]
    starts: tuple[Int, ...]

    def source(self, indices: Sequence[Int]) -> tuple[Int, ...]:
        out = list(self.starts)
        for i, step in zip(indices, self.steps, strict=True):
            for k, scale in step.items():
                out[k] = add(out[k], mul(i, scale))
        return tuple(out)

    def strides(self, strides: Sequence[Int]) -> tuple[Int, ...]:
        out: list[Int] = []
        for step in self.steps:
            total: Int = 0
            for k, scale in step.items():
                total = add(total, mul(strides[k], scale))
            out.append(total)
        return tuple(out)


def identity(shape: Sequence[Int]) -> Affine:
    """The view that changes nothing, to start from."""
    return Affine(tuple(shape), tuple({k: 1} for k in range(len(shape))), (0,) * len(shape))


def sliced(shape: Sequence[Int], dim: int, start: Int, step: Int, size: Int) -> Affine:
    """`size` elements along `dim` from `start` on, `step` apart."""
    whole = identity(shape)
    return Affine(
        (*shape[:dim], size, *shape[dim + 1 :]),
        (*whole.steps[:dim], {dim: step}, *whole.steps[dim + 1 :]),
        (*whole.starts[:dim], start, *whole.starts[dim + 1 :]),
    )


def selected(shape: Sequence[Int], dim: int, position: Int) -> Affine:
    """`dim` removed at `position`."""
    at_position = sliced(shape, dim, position, 1, 1)
    return replace(
        at_position, shape=(*shape[:dim], *shape[dim + 1 :]), steps=(*at_position.steps[:dim], *at_position.steps[dim + 1 :])
    )


def kept(shape: Sequence[Int], dims: Sequence[int | None]) -> Affine:
    """The source dimensions `dims`, in that order; None is a new dimension of size 1; those left out have size 1."""
    sizes = tuple(1 if k is None else shape[k] for k in dims)
    return Affine(sizes, tuple({} if k is None else {k: 1} for k in dims), (0,) * len(shape))


def apply(x: Value, view: Affine, like: torch.Tensor | None = None, ctx: Lowering | None = None) -> Value:
    """`x` seen through `view`; the strides of its dimensions of size 1 (which address nothing) are those of `like`."""
    if isinstance(x, Computed):
        return pointwise(view.shape, x.dtype, x.device, lambda i: at(x, view.source(i)), (x,))
    offset = x.offset
    for start, stride in zip(view.starts, x.strides, strict=True):
        offset = add(offset, mul(start, stride))
    strides = view.strides(x.strides)
    if like is not None and ctx is not None:
        strides = _unit_strides(ctx, view.shape, strides, like)
    return replace(x, shape=view.shape, strides=strides, offset=offset)


def _unit_strides(ctx: Lowering, shape: tuple[Int, ...], strides: tuple[Int, ...], like: torch.Tensor) -> tuple[Int, ...]:
    theirs = ctx.sizes(like.stride())
    return tuple(t if known_equal(size, 1) else s for size, s, t in zip(shape, strides, theirs, strict=True))


def _lowers(*names: str) -> Callable[[Callable[..., Affine]], Callable[..., Affine]]:
    """Register a function (ctx, x, ...) -> Affine for views `names` ("overload" after a dot) and for their copying twins."""

    def register(fn: Callable[..., Affine]) -> Callable[..., Affine]:
        def lower(ctx: Lowering, x: Value, *args: Any, **kwargs: Any) -> Value:
            return apply(x, fn(ctx, x, *args, **kwargs), ctx.out(), ctx)

        def lower_copy(ctx: Lowering, x: Value, *args: Any, **kwargs: Any) -> Computed:
            return fresh(apply(x, fn(ctx, x, *args, **kwargs)))

        for name in names:
            packet, _, overload = name.partition(".")
            TABLE.lowers(getattr(getattr(aten, packet), overload))(lower)
            twin = getattr(aten, packet + "_copy", None)
            if twin is not None and overload in twin.overloads():
                TABLE.lowers(getattr(twin, overload))(lower_copy)
        return fn

    return register


# ---------------------------------------------------------------------- affine views


@_lowers("alias.default", "detach.default")
def same(ctx: Lowering, x: Value) -> Affine:
    return identity(x.shape)


@TABLE.lowers(aten.lift_fresh.default)
def lift_fresh(ctx: Lowering, x: Value) -> Value:
    return x


@_lowers("permute.default")
def permute(ctx: Lowering, x: Value, dims: Sequence[int]) -> Affine:
    return kept(x.shape, [dim_of(d, len(x.shape)) for d in dims])


@_lowers("transpose.int", "swapaxes.default")
def transpose(ctx: Lowering, x: Value, dim0: int, dim1: int) -> Affine:
    order = list(range(len(x.shape)))
    if order:
        a, b = dim_of(dim0, len(order)), dim_of(dim1, len(order))
        order[a], order[b] = b, a
    return kept(x.shape, order)


@_lowers("t.default", "numpy_T.default")
def reverse_dims(ctx: Lowering, x: Value) -> Affine:
    return kept(x.shape, list(reversed(range(len(x.shape)))))


@_lowers("expand.default")
def expand(ctx: Lowering, x: Value, size: Sequence[Int], implicit: bool = False) -> Affine:
    return expanded(x.shape, ctx.sizes(ctx.out().shape))


def expanded(shape: Sequence[Int], wanted: Sequence[Int]) -> Affine:
    """`shape` broadcast to `wanted`. Raises UnsupportedError when a size may or may not be 1."""
    lead = len(wanted) - len(shape)
    steps: list[dict[int, Int]] = [{} for _ in range(lead)]
    for k, (own, size) in enumerate(zip(shape, wanted[lead:], strict=True)):
        if not known_equal(own, size) and not known_equal(own, 1):
            raise UnsupportedError(f"size {own} may or may not be broadcast to {size}")
        steps.append({k: 1} if known_equal(own, size) else {})
    return Affine(tuple(wanted), tuple(steps), (0,) * len(shape))


@_lowers("slice.Tensor")
def slice_(ctx: Lowering, x: Value, dim: int = 0, start: Int | None = None, end: Int | None = None, step: Int = 1) -> Affine:
    dim = dim_of(dim, len(x.shape))
    size = ctx.sizes(ctx.out().shape)[dim]
    return sliced(x.shape, dim, range_start(start, x.shape[dim]), step, size)


@_lowers("narrow.default")
def narrow(ctx: Lowering, x: Value, dim: int, start: Int, length: Int) -> Affine:
    dim = dim_of(dim, len(x.shape))
    return sliced(x.shape, dim, range_start(start, x.shape[dim]), 1, length)


@_lowers("select.int")
def select(ctx: Lowering, x: Value, dim: int, index: Int) -> Affine:
    dim = dim_of(dim, len(x.shape))
    return selected(x.shape, dim, wrapped(index, x.shape[dim]))


@_lowers("squeeze.default")
def squeeze(ctx: Lowering, x: Value) -> Affine:
    return _squeezed(ctx, x, range(len(x.shape)))


@_lowers("squeeze.dim")
def squeeze_dim(ctx: Lowering, x: Value, dim: int) -> Affine:
    return _squeezed(ctx, x, [dim])


@_lowers("squeeze.dims")
def squeeze_dims(ctx: Lowering, x: Value, dim: Sequence[int]) -> Affine:
    return _squeezed(ctx, x, dim)


def _squeezed(ctx: Lowering, x: Value, dims: Sequence[int]) -> Affine:
    gone = {dim_of(d, len(x.shape)) for d in dims}
    return kept(x.shape, [k for k, size in enumerate(x.shape) if k not in gone or not known_equal(size, 1)])


@_lowers("unsqueeze.default")
def unsqueeze(ctx: Lowering, x: Value, dim: int) -> Affine:
    order: list[int | None] = list(range(len(x.shape)))
    order.insert(dim % (len(x.shape) + 1), None)
    return kept(x.shape, order)


@_lowers("diagonal.default")
def diagonal(ctx: Lowering, x: Value, offset: int = 0, dim1: int = 0, dim2: int = 1) -> Affine:
    return diagonal_view(x.shape, offset, dim1, dim2, ctx.sizes(ctx.out().shape)[-1])


def diagonal_view(shape: Sequence[Int], offset: int, dim1: int, dim2: int, length: Int) -> Affine:
    """The diagonal of dimensions `dim1`, `dim2` as the last dimension, `length` elements long."""
    dim1, dim2 = dim_of(dim1, len(shape)), dim_of(dim2, len(shape))
    rest = kept(shape, [k for k in range(len(shape)) if k not in (dim1, dim2)])
    starts = list(rest.starts)
    starts[dim1], starts[dim2] = max(-offset, 0), max(offset, 0)
    return Affine((*rest.shape, length), (*rest.steps, {dim1: 1, dim2: 1}), tuple(starts))


@_lowers("unfold.default")
def unfold(ctx: Lowering, x: Value, dimension: int, size: int, step: int) -> Affine:
    shape = ctx.sizes(ctx.out().shape)
    if not x.shape:
        return Affine(shape, ({},), ())
    dim = dim_of(dimension, len(x.shape))
    whole = identity(x.shape)
    window: dict[int, Int] = {dim: 1}
    return Affine(shape, (*whole.steps[:dim], {dim: step}, *whole.steps[dim + 1 :], window), whole.starts)


# ---------------------------------------------------------------------- several views at once


def _consecutive(ctx: Lowering, x: Value, dim: int, copy: bool) -> tuple[Value, ...]:
    """The results of the current node, which cut `x` along `dim` into consecutive pieces."""
    dim, start, out = dim_of(dim, len(x.shape)), 0, []
    offset: Int = start
    for val in ctx.node.meta["val"]:
        size = ctx.sizes(val.shape)[dim]
        piece = apply(x, sliced(x.shape, dim, offset, 1, size), val, ctx)
        out.append(fresh(piece) if copy else piece)
        offset = add(offset, size)
    return tuple(out)


@TABLE.lowers(aten.split.Tensor, aten.split.sizes, aten.split_with_sizes.default, aten.chunk.default)
def split(ctx: Lowering, x: Value, sizes: Any, dim: int = 0) -> tuple[Value, ...]:
    return _consecutive(ctx, x, dim, copy=False)


@TABLE.lowers(aten.split_copy.Tensor, aten.split_with_sizes_copy.default)
def split_copy(ctx: Lowering, x: Value, sizes: Any, dim: int = 0) -> tuple[Value, ...]:
    return _consecutive(ctx, x, dim, copy=True)


@TABLE.lowers(aten.unbind.int)
def unbind(ctx: Lowering, x: Value, dim: int = 0) -> tuple[Value, ...]:
    dim = dim_of(dim, len(x.shape))
    return tuple(apply(x, selected(x.shape, dim, k), val, ctx) for k, val in enumerate(ctx.node.meta["val"]))


@TABLE.lowers(aten.unbind_copy.int)
def unbind_copy(ctx: Lowering, x: Value, dim: int = 0) -> tuple[Value, ...]:
    return tuple(fresh(v) for v in unbind(ctx, x, dim))


# ---------------------------------------------------------------------- reshaping


@TABLE.lowers(aten.view.default, aten._unsafe_view.default, aten.reshape.default, aten._reshape_alias.default)
def reshape(ctx: Lowering, x: Value, size: Sequence[Int], strides: Any = None) -> Value:
    shape = ctx.sizes(ctx.out().shape)
    if isinstance(x, Stored):
        new = view_strides(x.shape, x.strides, shape)
        if new is not None:
            return replace(x, shape=shape, strides=_unit_strides(ctx, shape, new, ctx.out()))
    return reshaped(x, shape)


@TABLE.lowers(aten.view_copy.default)
def view_copy(ctx: Lowering, x: Value, size: Sequence[Int]) -> Computed:
    return reshaped(x, ctx.sizes(ctx.out().shape))


def reshaped(x: Value, shape: tuple[Int, ...]) -> Computed:
    """`x` in another shape of as many elements, by index arithmetic."""
    return pointwise(shape, x.dtype, x.device, lambda i: at(x, reshape_indices(x.shape, shape, i)), (x,))


def view_strides(shape: Sequence[Int], strides: Sequence[Int], new: Sequence[Int]) -> tuple[Int, ...] | None:
    """Strides with which memory of (`shape`, `strides`) has shape `new`; None when there are none or sizes do not tell.

    Maximal runs of dimensions that lie densely inside each other are one block of memory; each must be cut into whole new
    dimensions.
    """
    if is_empty(shape):
        return _empty_strides(new)
    blocks = _dense_blocks(shape, strides)
    out: list[Int] = [1] * len(new)
    k = len(new)
    for size, stride in reversed(blocks):
        covered: Int = 1
        while not known_equal(covered, size):
            k -= 1
            if k < 0:
                return None
            out[k] = mul(stride, covered)
            covered = mul(covered, new[k])
            if ask("<", size, covered):
                return None
    if not all(known_equal(s, 1) for s in new[:k]):
        return None
    return tuple(out)


def _dense_blocks(shape: Sequence[Int], strides: Sequence[Int]) -> list[tuple[Int, Int]]:
    """(elements, stride of the innermost) of each run of dimensions that could be one; sizes 1 take part in none."""
    blocks: list[tuple[Int, Int]] = []
    for size, stride in zip(shape, strides, strict=True):
        if known_equal(size, 1):
            continue
        if blocks and blocks[-1][1] == mul(size, stride):
            blocks[-1] = (mul(blocks[-1][0], size), stride)
        else:
            blocks.append((size, stride))
    return blocks


def _empty_strides(shape: Sequence[Int]) -> tuple[Int, ...]:
    return tuple(prod(1 if known_equal(s, 0) else s for s in shape[k + 1 :]) for k in range(len(shape)))


@TABLE.lowers(aten.view.dtype)
def view_dtype(ctx: Lowering, x: Value, dtype: torch.dtype) -> Value:
    if x.dtype == dtype:
        return x
    if x.dtype.itemsize != dtype.itemsize:
        raise UnsupportedError(f"a view of {x.dtype} as {dtype}, of another width")
    return pointwise(x.shape, dtype, x.device, lambda i: Op("bitcast", (at(x, i),), dtype), (x,))


# ---------------------------------------------------------------------- any strides


@TABLE.lowers(aten.as_strided.default)
def as_strided(
    ctx: Lowering, x: Value, size: Sequence[Int], stride: Sequence[Int], storage_offset: Int | None = None
) -> Value:
    val = ctx.node.args[0].meta["val"]  # type: ignore[union-attr]
    stored = ctx.store(x, layout.dense_strides(ctx, val))
    theirs = ctx.sizes(val.stride())
    if not all(a == b or known_equal(n, 1) for n, a, b in zip(stored.shape, stored.strides, theirs, strict=True)):
        raise UnsupportedError("as_strided of a tensor that is not laid out as in eager")
    return strided_view(ctx, stored, val, size, stride, storage_offset)


def strided_view(
    ctx: Lowering, stored: Stored, val: torch.Tensor, size: Sequence[Int], stride: Sequence[Int], storage_offset: Int | None
) -> Stored:
    """What as_strided gives of `stored`, which holds what is `val` in tracing.

    Raises UnsupportedError unless that surely lies within the buffer.
    """
    offset = stored.offset
    if storage_offset is not None:  # counted from the first element of the storage, which may lie before the tensor
        offset = add(add(offset, storage_offset), mul(ctx.graph.to_int(val.storage_offset()), -1))
    out = replace(stored, shape=tuple(size), strides=tuple(stride), offset=offset)
    _check_extent(ctx, out)
    return out


@TABLE.lowers(aten.as_strided_copy.default)
def as_strided_copy(
    ctx: Lowering, x: Value, size: Sequence[Int], stride: Sequence[Int], storage_offset: Int | None = None
) -> Computed:
    return fresh(as_strided(ctx, x, size, stride, storage_offset))


def _check_extent(ctx: Lowering, view: Stored) -> None:
    """Raise UnsupportedError unless `view` surely lies within its buffer: memory outside is not the plan's to read."""
    if is_empty(view.shape):
        return
    last = view.offset
    for size, stride in zip(view.shape, view.strides, strict=True):
        last = add(last, mul(add(size, -1), stride))
    if not (ask("<=", 0, view.offset) and ask("<", last, ctx.buffers[view.buffer].extent)):
        raise UnsupportedError("as_strided may reach outside of the tensor")
