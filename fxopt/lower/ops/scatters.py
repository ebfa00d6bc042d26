"""Writes at computed places: index_put, scatter, scatter_add, embedding backward, slice_scatter."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch

from fxopt.errors import UnsupportedError
from fxopt.ir.exprs import Int, add, floordiv, mod, mul, prod, unravel
from fxopt.ir.loops import Const, Masked, Op, Scalar
from fxopt.lower import layout
from fxopt.lower.lowering import Lowering
from fxopt.lower.ops import searched
from fxopt.lower.ops.bounds import BOOL, all_of, compare, dim_of, inside, is_empty, range_start, wrapped
from fxopt.lower.ops.elements import Indices, fresh, zeros
from fxopt.lower.ops.in_place import (
    own_memory,
    reads,
    reads_elsewhere,
    same_elements,
    selection_of,
    slice_of,
    stored_apart,
)
from fxopt.lower.ops.indexing import Advanced, Place, along
from fxopt.lower.ops.indirect import position, require_device, require_integer
from fxopt.lower.ops.joins import clamped, edge_padded, reflected
from fxopt.lower.ops.views import strided_view
from fxopt.lower.table import Table
from fxopt.lower.values import (
    Computed,
    Stored,
    Value,
    at,
    broadcast_indices,
    cast,
    dim_indices,
    known_equal,
    pointwise,
    size_value,
)

aten = torch.ops.aten
TABLE = Table()

ATOMIC_DTYPES = frozenset((torch.float32, torch.float64, torch.int32, torch.int64))
"""What kernels can add to memory atomically."""


def accumulator(dtype: torch.dtype) -> torch.dtype:
    """What values of `dtype` are added up in. Small integers wrap in the end, whatever they are
    added in; a sum of bools is true when any of them is."""
    if dtype in ATOMIC_DTYPES:
        return dtype
    return torch.float32 if dtype.is_floating_point else torch.int32


def scattered(
    ctx: Lowering,
    x: Value,
    shape: Sequence[Int],
    place: Callable[[Indices], Place],
    value: Callable[[Indices], Scalar],
    inputs: Sequence[Value],
    *,
    accumulate: bool,
) -> Value:
    """A copy of `x` (or `x`, if it may) in which value(i) is stored at, or added to, place(i) for each index i of `shape`.

    Which of several values for one place wins, or in which order they are added, is not defined: UnsupportedError under
    torch.use_deterministic_algorithms.
    """
    if torch.are_deterministic_algorithms_enabled():
        raise UnsupportedError("deterministic algorithms are asked for")
    require_device(x.device, *inputs)
    if is_empty(x.shape) or is_empty(shape):
        return fresh(x)
    dtype = accumulator(x.dtype) if accumulate else x.dtype
    dest = None
    if dtype == x.dtype and isinstance(x, Stored) and not _places_read(place(dim_indices(shape)), x.buffer):
        dest = own_memory(ctx, x)
    if dest is not None:
        value = stored_apart(ctx, dest, shape, value, dtype)
    else:
        start = fresh(x)
        start = Computed(cast(start.body, dtype), dtype, x.device, x.shape, start.nodes)
        dest = ctx.store(start, layout.dense_strides(ctx, ctx.out()))

    def element(i: Indices) -> tuple[Sequence[Int], Any, Scalar]:
        where, bindings = place(i)
        return where, bindings, cast(value(i), dtype)

    ctx.scatter(dest, shape, element, "add" if accumulate else "set", inputs)
    return dest if dtype == x.dtype else pointwise(x.shape, x.dtype, x.device, lambda i: at(dest, i), (dest,))


def _places_read(place: Place, buffer: str) -> bool:
    """Whether where something is written depends on what is in `buffer`."""
    return any(reads(scalar, buffer) for _, scalar in place[1])


# ---------------------------------------------------------------------- index_put


@TABLE.lowers(aten.index_put.default, aten._unsafe_index_put.default)
def index_put(ctx: Lowering, x: Value, indices: Sequence[Value | None], values: Value, accumulate: bool = False) -> Value:
    given = [v for v in indices if v is not None]
    if not given:
        raise UnsupportedError("index_put without index tensors")
    if given[0].dtype == BOOL:
        return _masked_put(ctx, x, indices, values, accumulate)
    advanced = Advanced.of(x.shape, indices)

    def value(i: Indices) -> Scalar:
        return at(values, broadcast_indices(values.shape, i))

    return scattered(ctx, x, advanced.shape, advanced.place, value, (values, *given), accumulate=accumulate)


def _masked_put(ctx: Lowering, x: Value, indices: Sequence[Value | None], values: Value, accumulate: bool) -> Computed:
    """x[mask] = one value: a selection, since no position among the chosen ones matters."""
    given = [(k, v) for k, v in enumerate(indices) if v is not None]
    (first, mask), *others = given
    if others or not all(known_equal(size, 1) for size in values.shape):
        raise UnsupportedError("values put at the places of a mask")
    require_device(x.device, mask, values)

    def body(i: Indices) -> Scalar:
        chosen = at(mask, i[first : first + len(mask.shape)])
        old, new = at(x, i), cast(at(values, (0,) * len(values.shape)), x.dtype)
        return Op("where", (chosen, Op("add", (old, new), x.dtype) if accumulate else new, old), x.dtype)

    return pointwise(x.shape, x.dtype, x.device, body, (x, mask, values))


# ---------------------------------------------------------------------- scatter


def _scatter(ctx: Lowering, x: Value, dim: int, index: Value, source: Value | Scalar, *, accumulate: bool) -> Value:
    require_integer(index)
    dim = dim_of(dim, len(x.shape))
    tensors = () if isinstance(source, Scalar) else (source,)

    def place(i: Indices) -> Place:
        return along(x.shape, dim, i, at(index, i), wrap=False)

    def value(i: Indices) -> Scalar:
        return source if isinstance(source, Scalar) else at(source, i[: len(source.shape)])

    return scattered(ctx, x, index.shape, place, value, (index, *tensors), accumulate=accumulate)


@TABLE.lowers(aten.scatter.src)
def scatter(ctx: Lowering, x: Value, dim: int, index: Value, src: Value) -> Value:
    return _scatter(ctx, x, dim, index, src, accumulate=False)


@TABLE.lowers(aten.scatter.value)
def scatter_value(ctx: Lowering, x: Value, dim: int, index: Value, value: Any) -> Value:
    return _scatter(ctx, x, dim, index, Const(value, x.dtype), accumulate=False)


@TABLE.lowers(aten.scatter_add.default)
def scatter_add(ctx: Lowering, x: Value, dim: int, index: Value, src: Value) -> Value:
    return _scatter(ctx, x, dim, index, src, accumulate=True)


@TABLE.lowers(aten.scatter.reduce)
def scatter_with(ctx: Lowering, x: Value, dim: int, index: Value, src: Value, *, reduce: str) -> Value:
    if reduce != "add":
        return searched.scatter_with(ctx, x, dim, index, src, reduce, True)
    return _scatter(ctx, x, dim, index, src, accumulate=True)


@TABLE.lowers(aten.scatter.value_reduce)
def scatter_value_with(ctx: Lowering, x: Value, dim: int, index: Value, value: Any, *, reduce: str) -> Value:
    if reduce != "add":
        return searched.scatter_with(ctx, x, dim, index, Const(value, x.dtype), reduce, True)
    return _scatter(ctx, x, dim, index, Const(value, x.dtype), accumulate=True)


@TABLE.lowers(aten.scatter_reduce.two)
def scatter_reduce(
    ctx: Lowering, x: Value, dim: int, index: Value, src: Value, reduce: str, *, include_self: bool = True
) -> Value:
    if reduce == "mean" and x.dtype.is_floating_point:
        return _scattered_mean(ctx, x, dim, index, src, include_self)
    if reduce != "sum":
        return searched.scatter_with(ctx, x, dim, index, src, reduce, include_self)
    return _scatter(ctx, x if include_self else _cleared(ctx, x, dim, index), dim, index, src, accumulate=True)


def _cleared(ctx: Lowering, x: Value, dim: int, index: Value) -> Value:
    """`x` with zeros at the places that a scatter of `index` touches."""
    return _scatter(ctx, x, dim, index, Const(0, x.dtype), accumulate=False)


def _scattered_mean(ctx: Lowering, x: Value, dim: int, index: Value, src: Value, include_self: bool) -> Computed:
    """The sum at each place over the count of its values, x's own included if `include_self`; untouched places keep x."""
    dtype = accumulator(x.dtype)
    own = _full(x, 1 if include_self else 0, torch.float32)
    count = _scatter(ctx, own, dim, index, Const(1, torch.float32), accumulate=True)
    start = x if include_self else _cleared(ctx, x, dim, index)
    wide = pointwise(x.shape, dtype, x.device, lambda i: at(start, i), (start,))
    total = _scatter(ctx, wide, dim, index, src, accumulate=True)

    def body(i: Indices) -> Scalar:
        many = Op("maximum", (cast(at(count, i), dtype), Const(1, dtype)), dtype)
        return Op("truediv", (at(total, i), many), dtype)

    return pointwise(x.shape, x.dtype, x.device, body, (total, count))


def _full(like: Value, value: float, dtype: torch.dtype) -> Computed:
    return Computed(Const(value, dtype), dtype, like.device, like.shape)


# ---------------------------------------------------------------------- along one dimension


def _along_dim(
    ctx: Lowering, x: Value, dim: int, index: Value, value: Callable[[Indices], Scalar], inputs: Sequence[Value], **how: bool
) -> Value:
    """x with value(i) put at (or added to) index[i[dim]] along `dim`; i runs over x's shape with index's length there."""
    require_integer(index)
    dim = dim_of(dim, len(x.shape))
    length = prod(index.shape)
    shape = (*x.shape[:dim], length, *x.shape[dim + 1 :]) if x.shape else (length,)

    def place(i: Indices) -> Place:
        return along(x.shape, dim, i, at(index, (i[dim],) if index.shape else ()), wrap=how["wrap"])

    return scattered(ctx, x, shape, place, value, (index, *inputs), accumulate=how["accumulate"])


def _source_value(source: Value) -> Callable[[Indices], Scalar]:
    return lambda i: at(source, i[: len(source.shape)])


@TABLE.lowers(aten.index_add.default)
def index_add(ctx: Lowering, x: Value, dim: int, index: Value, source: Value, *, alpha: Any = 1) -> Value:
    value = _source_value(source)

    def scaled(i: Indices) -> Scalar:
        dtype = accumulator(x.dtype)
        return Op("mul", (cast(value(i), dtype), Const(alpha, dtype)), dtype)

    return _along_dim(ctx, x, dim, index, value if alpha == 1 else scaled, (source,), accumulate=True, wrap=False)


@TABLE.lowers(aten.index_copy.default)
def index_copy(ctx: Lowering, x: Value, dim: int, index: Value, source: Value) -> Value:
    return _along_dim(ctx, x, dim, index, _source_value(source), (source,), accumulate=False, wrap=False)


@TABLE.lowers(aten.index_fill.int_Scalar)
def index_fill(ctx: Lowering, x: Value, dim: int, index: Value, value: Any) -> Value:
    return _along_dim(ctx, x, dim, index, lambda i: Const(value, x.dtype), (), accumulate=False, wrap=True)


@TABLE.lowers(aten.index_fill.int_Tensor)
def index_fill_tensor(ctx: Lowering, x: Value, dim: int, index: Value, value: Value) -> Value:
    return _along_dim(ctx, x, dim, index, lambda i: at(value, ()), (value,), accumulate=False, wrap=True)


@TABLE.lowers(aten.put.default)
def put(ctx: Lowering, x: Value, index: Value, source: Value, accumulate: bool = False) -> Value:
    require_integer(index)
    count = prod(index.shape)

    def place(i: Indices) -> Place:
        linear, bindings = position(at(index, unravel(i[0], index.shape)), prod(x.shape), wrap=True)
        return unravel(linear, x.shape), bindings

    def value(i: Indices) -> Scalar:
        return at(source, unravel(i[0], source.shape))

    return scattered(ctx, x, (count,), place, value, (index, source), accumulate=accumulate)


def _edge_pad_backward(rule: Callable[[Int, Int], Int]) -> Callable[..., Value]:
    """The gradient of a padding that repeats elements: each adds up what its copies got."""

    def lower(ctx: Lowering, grad: Value, x: Value, padding: Sequence[Int]) -> Value:
        source = edge_padded(x.shape, grad.shape, padding, rule)
        start = zeros(grad, x.shape)
        return scattered(ctx, start, grad.shape, lambda i: (source(i), ()), lambda i: at(grad, i), (grad,), accumulate=True)

    return lower


for _rank in (1, 2, 3):
    TABLE.lowers(getattr(aten, f"reflection_pad{_rank}d_backward").default)(_edge_pad_backward(reflected))
    TABLE.lowers(getattr(aten, f"replication_pad{_rank}d_backward").default)(_edge_pad_backward(clamped))


@TABLE.lowers(aten.embedding_dense_backward.default)
def embedding_dense_backward(
    ctx: Lowering, grad: Value, indices: Value, num_weights: Int, padding_idx: Int, scale_grad_by_freq: bool
) -> Value:
    """The sum of `grad` [*indices.shape, width] over the places of each row; row `padding_idx` stays zero."""
    if scale_grad_by_freq:
        raise UnsupportedError("scale_grad_by_freq")
    require_integer(indices)
    width, rank = grad.shape[-1], len(indices.shape)

    def place(i: Indices) -> Place:
        row, bindings = position(at(indices, i[:rank]), num_weights, wrap=True)
        return (row, i[-1]), bindings

    def value(i: Indices) -> Scalar:
        if known_equal(padding_idx, -1):
            return at(grad, i)
        row = cast(at(indices, i[:rank]), torch.int64)
        padded = Op("eq", (row, size_value(padding_idx)), BOOL)
        return Op("where", (padded, Const(0, grad.dtype), at(grad, i)), grad.dtype)

    start = zeros(grad, (num_weights, width))
    return scattered(ctx, start, grad.shape, place, value, (grad, indices), accumulate=True)


# ---------------------------------------------------------------------- scatters into views: selections


@TABLE.lowers(aten.slice_scatter.default)
def slice_scatter(
    ctx: Lowering, x: Value, src: Value, dim: int = 0, start: Int | None = None, end: Int | None = None, step: Int = 1
) -> Value:
    return _written(ctx, x, slice_of(x, src, dim, start, step), src) or sliced_in(x, src, dim, start, step)


def _written(ctx: Lowering, x: Value, view: Value, src: Value) -> Value | None:
    """`x` with `src` stored into `view` of it, when that may be done in its own memory."""
    if is_empty(src.shape) or src.device != x.device or not isinstance(view, Stored):
        return None
    dest = own_memory(ctx, x)
    if dest is None or same_elements(src, view):  # the latter: what an update of a view in place has left there
        return dest

    def value(i: Indices) -> Scalar:
        return at(src, i)

    moved = stored_apart(ctx, dest, src.shape, value, src.dtype) if reads_elsewhere(view, src) else value
    ctx.scatter(view, src.shape, lambda i: (i, (), moved(i)), "set", (src,))
    return x


def sliced_in(x: Value, src: Value, dim: int, start: Int | None, step: Int) -> Computed:
    """`x` with `src` in its slice along `dim` from `start` on, every `step`-th; src's length says where it ends."""
    dim = dim_of(dim, len(x.shape))
    first, length = range_start(start, x.shape[dim]), src.shape[dim]
    if is_empty(src.shape) or is_empty(x.shape):
        return fresh(x)

    def body(i: Indices) -> Scalar:
        offset = add(i[dim], mul(first, -1))
        own = floordiv(offset, step)
        chosen = all_of((compare("ge", offset, 0), compare("lt", own, length), compare("eq", mod(offset, step), 0)))
        return Masked(chosen, cast(at(src, (*i[:dim], own, *i[dim + 1 :])), x.dtype), at(x, i))

    return pointwise(x.shape, x.dtype, x.device, body, (x, src))


@TABLE.lowers(aten.select_scatter.default)
def select_scatter(ctx: Lowering, x: Value, src: Value, dim: int, index: Int) -> Value:
    return _written(ctx, x, selection_of(x, dim, index), src) or selected_in(x, src, dim, index)


def selected_in(x: Value, src: Value, dim: int, index: Int) -> Computed:
    """`x` with `src` at `index` along `dim`."""
    dim = dim_of(dim, len(x.shape))
    if is_empty(x.shape):
        return fresh(x)
    where = wrapped(index, x.shape[dim])

    def body(i: Indices) -> Scalar:
        picked = cast(at(src, (*i[:dim], *i[dim + 1 :])), x.dtype)
        return Masked(compare("eq", i[dim], where), picked, at(x, i))

    return pointwise(x.shape, x.dtype, x.device, body, (x, src))


@TABLE.lowers(aten.diagonal_scatter.default)
def diagonal_scatter(ctx: Lowering, x: Value, src: Value, offset: int = 0, dim1: int = 0, dim2: int = 1) -> Computed:
    return diagonal_in(x, src, offset, dim1, dim2)


def diagonal_in(x: Value, src: Value, offset: int, dim1: int, dim2: int) -> Computed:
    """`x` with `src` on the diagonal of dimensions `dim1`, `dim2`; src has the diagonal last."""
    dim1, dim2 = dim_of(dim1, len(x.shape)), dim_of(dim2, len(x.shape))
    if is_empty(src.shape) or is_empty(x.shape):
        return fresh(x)

    def body(i: Indices) -> Scalar:
        along_diagonal = i[dim1] if offset >= 0 else add(i[dim1], offset)
        rest = tuple(a for k, a in enumerate(i) if k not in (dim1, dim2))
        chosen = compare("eq", add(i[dim1], offset), i[dim2])
        inner = all_of((chosen, inside(along_diagonal, src.shape[-1])))
        return Masked(inner, cast(at(src, (*rest, along_diagonal)), x.dtype), at(x, i))

    return pointwise(x.shape, x.dtype, x.device, body, (x, src))


# ---------------------------------------------------------------------- gradients of views


@TABLE.lowers(aten.as_strided_scatter.default)
def as_strided_scatter(
    ctx: Lowering, x: Value, src: Value, size: Sequence[Int], stride: Sequence[Int], storage_offset: Int | None = None
) -> Value:
    """A call would count `storage_offset` from the start of whatever memory the plan gave `x`."""
    if torch.are_deterministic_algorithms_enabled():
        raise UnsupportedError("deterministic algorithms are asked for")
    require_device(x.device, src)
    val = ctx.node.args[0].meta["val"]  # type: ignore[union-attr]
    if not all(a == b for a, b in zip(layout.dense_strides(ctx, val), ctx.sizes(val.stride()), strict=True)):
        raise UnsupportedError("as_strided_scatter into a tensor with gaps")
    dest = ctx.store(fresh(x), layout.dense_strides(ctx, val))
    view = strided_view(ctx, dest, val, size, stride, storage_offset)
    if not is_empty(src.shape):
        ctx.scatter(view, src.shape, lambda i: (i, (), at(src, i)), "set", (src,))
    return dest


@TABLE.lowers(aten.slice_backward.default)
def slice_backward(
    ctx: Lowering, grad: Value, input_sizes: Sequence[Int], dim: int, start: Int, end: Int, step: Int
) -> Computed:
    return sliced_in(zeros(grad, input_sizes), grad, dim, start, step)


@TABLE.lowers(aten.select_backward.default)
def select_backward(ctx: Lowering, grad: Value, input_sizes: Sequence[Int], dim: int, index: Int) -> Computed:
    return selected_in(zeros(grad, input_sizes), grad, dim, index)


@TABLE.lowers(aten.diagonal_backward.default)
def diagonal_backward(ctx: Lowering, grad: Value, input_sizes: Sequence[Int], offset: int, dim1: int, dim2: int) -> Computed:
    return diagonal_in(zeros(grad, input_sizes), grad, offset, dim1, dim2)
