"""Values put together or surrounded: cat, stack, pad, flip, roll, repeat, and elements shuffled by a rule."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from typing import Any

import torch

from fxopt.ir.exprs import Int, add, floordiv, free_symbols, index, maximum, minimum, mod, mul, prod
from fxopt.ir.loops import Const, Masked, Nest, Scalar, Store, loads_below
from fxopt.lower import layout
from fxopt.lower.cost import extent
from fxopt.lower.lowering import Lowering
from fxopt.lower.ops.bounds import all_of, compare, dim_of, inside, is_empty, reshape_indices
from fxopt.lower.ops.elements import Indices, moved
from fxopt.lower.ops.indirect import require_device
from fxopt.lower.table import Table
from fxopt.lower.values import Computed, Stored, Value, address, at, cast, known_equal, nodes_of, pointwise, symbols_of

aten = torch.ops.aten
TABLE = Table()

MAX_SELECTED = 8
"""A cat of more inputs than this is not worth evaluating every input's expression for every element."""

LONG_RUN = 16
"""Elements side by side in memory, from which on a kernel writes them no slower than a whole row."""


# ---------------------------------------------------------------------- cat, stack


@TABLE.lowers(aten.cat.default)
def cat(ctx: Lowering, tensors: Sequence[Value], dim: int = 0) -> Value:
    out = ctx.out()
    shape = ctx.sizes(out.shape)
    dim = dim_of(dim, len(shape))
    parts = [t for t in tensors if len(t.shape) == len(shape) and not known_equal(t.shape[dim], 0)]
    return _joined(ctx, parts, dim, shape, out)


@TABLE.lowers(aten.stack.default)
def stack(ctx: Lowering, tensors: Sequence[Value], dim: int = 0) -> Value:
    out = ctx.out()
    shape = ctx.sizes(out.shape)
    dim = dim_of(dim, len(shape))

    def unsqueezed(t: Value) -> Value:
        own = (*t.shape[:dim], 1, *t.shape[dim:])
        return moved(t, own, lambda i: (*i[:dim], *i[dim + 1 :]))

    return _joined(ctx, [unsqueezed(t) for t in tensors], dim, shape, out)


def _joined(ctx: Lowering, parts: list[Value], dim: int, shape: tuple[Int, ...], out: torch.Tensor) -> Value:
    require_device(out.device, *parts)
    if is_empty(shape) or not parts:
        return Computed(Const(0, out.dtype), out.dtype, out.device, shape)
    if _by_parts(ctx, parts, dim, out):
        return _stored_parts(ctx, parts, dim, shape, out)
    return _selected(parts, dim, shape, out)


def _by_parts(ctx: Lowering, parts: list[Value], dim: int, out: torch.Tensor) -> bool:
    """Whether each part is better written into its slice of one buffer by itself, if that is wanted in memory anyway.

    On a CPU several plain loops beat one with a selection in it. On a GPU one launch beats several, and its selections are
    uniform within nearly every warp; but parts over one domain that read the same memory become one kernel in the end, which
    reads it once and computes what they share once (the two gradients of a gated linear unit).
    """
    if len(parts) > MAX_SELECTED:
        return True
    if len(parts) < 2 or ctx.node not in ctx.must_store:
        return False
    return out.device.type == "cpu" or _share_reads(parts, ctx.sizes(out.stride())[dim], dim)


def _share_reads(parts: list[Value], stride: Int, dim: int) -> bool:
    """Whether `parts`, with `stride` along `dim` in the result, have one shape, each reads some of what the one before
    reads, and their slices are long enough to be written apart."""
    if any(part.shape != parts[0].shape for part in parts) or extent([parts[0].shape[dim], stride]) < LONG_RUN:
        return False
    reads = [_full_size_reads(part) for part in parts]
    return all(a & b for a, b in itertools.pairwise(reads))


def _full_size_reads(value: Value) -> set[str]:
    """The buffers of which `value` reads about as many elements as it has."""
    if isinstance(value, Stored):
        return {value.buffer}
    rank = len(value.body.symbols())
    return {load.buffer for load in loads_below((value.body,)) if len(free_symbols(load.index)) >= rank}


def _selected(parts: list[Value], dim: int, shape: tuple[Int, ...], out: torch.Tensor) -> Computed:
    """Nested selection by ranges of the index along `dim`. They exclude each other: an "other" arm is always evaluated."""

    def body(i: Indices) -> Scalar:
        value: Scalar = Const(0, out.dtype)
        for part, start in reversed(list(zip(parts, _starts(parts, dim), strict=True))):
            own = add(i[dim], mul(start, -1))
            picked = cast(at(part, (*i[:dim], own, *i[dim + 1 :])), out.dtype)
            value = Masked(_within(own, part.shape[dim], start, shape[dim]), picked, value)
        return value

    return pointwise(shape, out.dtype, out.device, body, parts)


def _within(own: Int, size: Int, start: Int, whole: Int) -> Scalar:
    """0 <= own < size, leaving out what the bounds of the whole dimension imply."""
    lower = [] if known_equal(start, 0) else [compare("ge", own, 0)]
    upper = [] if known_equal(add(start, size), whole) else [compare("lt", own, size)]
    return all_of((*lower, *upper))


def _starts(parts: list[Value], dim: int) -> list[Int]:
    out: list[Int] = [0]
    for part in parts[:-1]:
        out.append(add(out[-1], part.shape[dim]))
    return out


def _stored_parts(ctx: Lowering, parts: list[Value], dim: int, shape: tuple[Int, ...], out: torch.Tensor) -> Stored:
    dest = ctx.new_buffer(out.dtype, out.device, shape, layout.dense_strides(ctx, out))
    for part, start in zip(parts, _starts(parts, dim), strict=True):
        idx = tuple(index(f"x{k}", size) for k, size in enumerate(part.shape))
        where = address(dest, (*idx[:dim], add(idx[dim], start), *idx[dim + 1 :]))
        store = Store(dest.buffer, where, cast(at(part, idx), out.dtype))
        ctx.emit(Nest(symbols_of(idx), (), (store,)), out.device, nodes_of(part))
    return dest


# ---------------------------------------------------------------------- padding


@TABLE.lowers(aten.constant_pad_nd.default)
def constant_pad(ctx: Lowering, x: Value, pad: Sequence[Int], value: Any = 0) -> Computed:
    """`pad` lists (before, after) from the last dimension on; negative entries cut off."""
    shape = ctx.sizes(ctx.out().shape)
    befores = [pad[2 * (len(shape) - 1 - k)] if 2 * (len(shape) - 1 - k) < len(pad) else 0 for k in range(len(shape))]
    fill = Const(value, x.dtype)
    if is_empty(x.shape):
        return Computed(fill, x.dtype, x.device, shape)
    return surrounded(x, shape, befores, fill)


def surrounded(x: Value, shape: Sequence[Int], starts: Sequence[Int], fill: Scalar) -> Computed:
    """`x` placed in a tensor of `shape` with its first element at `starts`, `fill` around it."""

    def body(i: Indices) -> Scalar:
        own = tuple(add(a, mul(b, -1)) for a, b in zip(i, starts, strict=True))
        inner = all_of(
            inside(k, n)
            for k, n, b, size in zip(own, x.shape, starts, shape, strict=True)
            if not (known_equal(b, 0) and n == size)
        )
        return Masked(inner, at(x, own), fill)

    return pointwise(shape, x.dtype, x.device, body, (x,))


def reflected(i: Int, size: Int) -> Int:
    """Index `i`, at most size-1 outside of [0, size), mirrored at the edges (which are not repeated)."""
    last = add(size, -1)
    inner = maximum(i, mul(i, -1))
    over = add(last, mul(inner, -1))
    return add(last, mul(maximum(over, mul(over, -1)), -1))


def clamped(i: Int, size: Int) -> Int:
    """Index `i` moved to the nearest one in [0, size)."""
    return minimum(maximum(i, 0), add(size, -1))


def edge_padded(
    shape: Sequence[Int], out: Sequence[Int], padding: Sequence[Int], rule: Callable[[Int, Int], Int]
) -> Callable[[Indices], Indices]:
    """Output index -> source index for a padding of the last dimensions that repeats elements of `shape` by `rule`."""
    padded = len(padding) // 2
    befores = [0] * (len(shape) - padded) + [padding[2 * (padded - 1 - k)] for k in range(padded)]

    def source(i: Indices) -> Indices:
        return tuple(
            a if known_equal(b, 0) and n == size else rule(add(a, mul(b, -1)), n)
            for a, b, n, size in zip(i, befores, shape, out, strict=True)
        )

    return source


def _edge_pad(rule: Callable[[Int, Int], Int]) -> Callable[..., Computed]:
    def lower(ctx: Lowering, x: Value, padding: Sequence[Int]) -> Computed:
        shape = ctx.sizes(ctx.out().shape)
        return moved(x, shape, edge_padded(x.shape, shape, padding, rule))

    return lower


for _rank in (1, 2, 3):
    TABLE.lowers(getattr(aten, f"reflection_pad{_rank}d").default)(_edge_pad(reflected))
    TABLE.lowers(getattr(aten, f"replication_pad{_rank}d").default)(_edge_pad(clamped))


# ---------------------------------------------------------------------- moved by a rule


@TABLE.lowers(aten.flip.default)
def flip(ctx: Lowering, x: Value, dims: Sequence[int]) -> Computed:
    turned = {dim_of(d, len(x.shape)) for d in dims}

    def source(i: Indices) -> Indices:
        return tuple(add(x.shape[k], add(mul(a, -1), -1)) if k in turned else a for k, a in enumerate(i))

    return moved(x, x.shape, source)


@TABLE.lowers(aten.roll.default)
def roll(ctx: Lowering, x: Value, shifts: Sequence[Int], dims: Sequence[int] = ()) -> Computed:
    if not x.shape:
        return moved(x, (), lambda i: ())
    if not dims:
        total = prod(x.shape)
        flat = moved(x, (total,), lambda i: reshape_indices(x.shape, (total,), i))
        turned = moved(flat, (total,), lambda i: (_rolled(i[0], shifts[0], total),))
        return moved(turned, x.shape, lambda i: reshape_indices((total,), x.shape, i))

    def source(i: Indices) -> Indices:
        out = list(i)
        for shift, dim in zip(shifts, dims, strict=True):
            k = dim_of(dim, len(i))
            out[k] = _rolled(out[k], shift, x.shape[k])
        return tuple(out)

    return moved(x, x.shape, source)


def _rolled(i: Int, shift: Int, size: Int) -> Int:
    """(i - shift) mod size, with a sum that cannot be negative."""
    if known_equal(size, 0):
        return i
    return mod(add(i, add(size, mul(mod(shift, size), -1))), size)


@TABLE.lowers(aten.repeat.default, aten.tile.default)
def repeat(ctx: Lowering, x: Value, repeats: Sequence[Int]) -> Computed:
    shape = ctx.sizes(ctx.out().shape)
    lead = len(shape) - len(x.shape)
    times = [1] * (len(shape) - len(repeats)) + list(repeats)

    def source(i: Indices) -> Indices:
        own = zip(i[lead:], x.shape, times[lead:], strict=True)
        return tuple(a if known_equal(count, 1) else mod(a, size) for a, size, count in own)

    return moved(x, shape, source)


@TABLE.lowers(aten.repeat_interleave.self_int)
def repeat_interleave(
    ctx: Lowering, x: Value, repeats: Int, dim: int | None = None, *, output_size: Int | None = None
) -> Computed:
    shape = ctx.sizes(ctx.out().shape)
    if dim is None:
        total = (prod(x.shape),)
        return moved(x, shape, lambda i: reshape_indices(x.shape, total, (floordiv(i[0], repeats),)))
    k = dim_of(dim, len(shape))
    return moved(x, shape, lambda i: (*i[:k], floordiv(i[k], repeats), *i[k + 1 :]))


@TABLE.lowers(aten.pixel_shuffle.default)
def pixel_shuffle(ctx: Lowering, x: Value, upscale_factor: int) -> Computed:
    r = upscale_factor

    def source(i: Indices) -> Indices:
        *lead, c, h, w = i
        return (*lead, add(mul(c, r * r), add(mul(mod(h, r), r), mod(w, r))), floordiv(h, r), floordiv(w, r))

    return moved(x, ctx.sizes(ctx.out().shape), source)


@TABLE.lowers(aten.pixel_unshuffle.default)
def pixel_unshuffle(ctx: Lowering, x: Value, downscale_factor: int) -> Computed:
    r = downscale_factor

    def source(i: Indices) -> Indices:
        *lead, c, h, w = i
        row, column = mod(floordiv(c, r), r), mod(c, r)
        return (*lead, floordiv(c, r * r), add(mul(h, r), row), add(mul(w, r), column))

    return moved(x, ctx.sizes(ctx.out().shape), source)


@TABLE.lowers(aten.channel_shuffle.default, aten.native_channel_shuffle.default)
def channel_shuffle(ctx: Lowering, x: Value, groups: Int) -> Computed:
    per_group = floordiv(x.shape[1], groups)
    return moved(x, x.shape, lambda i: (i[0], add(mul(mod(i[1], groups), per_group), floordiv(i[1], groups)), *i[2:]))
