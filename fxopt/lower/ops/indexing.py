"""Gathers: index, gather, embedding, index_select, take."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch

from fxopt.errors import UnsupportedError
from fxopt.ir.exprs import Int, prod, unravel
from fxopt.ir.loops import Scalar
from fxopt.lower.lowering import Lowering
from fxopt.lower.ops.bounds import dim_of, is_empty
from fxopt.lower.ops.elements import Indices, nothing
from fxopt.lower.ops.indirect import element, gathered, position, require_device, require_integer
from fxopt.lower.table import Table
from fxopt.lower.values import Computed, Indirect, Value, at, broadcast_indices, broadcast_shape, dim_indices, pointwise

aten = torch.ops.aten
TABLE = Table()

Place = tuple[tuple[Int, ...], tuple[Indirect, ...]]


@dataclass(frozen=True)
class Advanced:
    """Advanced indexing x[i0, :, i1]: where each element of the result comes from.

    `shape` is the result's. The dimensions of the broadcast index tensors stand in the result from `first` on, `rank` of
    them: in place of the indexed dimensions when those are adjacent, else in front, as in numpy.
    """

    source: tuple[Int, ...]
    indices: tuple[Value | None, ...]
    shape: tuple[Int, ...]
    first: int
    rank: int

    @staticmethod
    def of(source: Sequence[Int], indices: Sequence[Value | None]) -> Advanced:
        """Raises UnsupportedError for masks and when index shapes may or may not broadcast."""
        indices = (*indices, *(None for _ in range(len(source) - len(indices))))
        given = [v for v in indices if v is not None]
        require_integer(*given)
        common = broadcast_shape(*(v.shape for v in given))
        where = [k for k, v in enumerate(indices) if v is not None]
        adjacent = where[-1] - where[0] + 1 == len(where)
        first = where[0] if adjacent else 0
        rest = [size for k, size in enumerate(source) if indices[k] is None]
        return Advanced(tuple(source), indices, (*rest[:first], *common, *rest[first:]), first, len(common))

    def place(self, i: Sequence[Int]) -> Place:
        """Indices into the source for element `i` of the result, and the bindings in them."""
        common = tuple(i[self.first : self.first + self.rank])
        rest = iter((*i[: self.first], *i[self.first + self.rank :]))
        out: list[Int] = []
        bindings: tuple[Indirect, ...] = ()
        for index, size in zip(self.indices, self.source, strict=True):
            if index is None:
                out.append(next(rest))
            else:
                where, more = position(at(index, broadcast_indices(index.shape, common)), size, wrap=True)
                out.append(where)
                bindings += more
        return tuple(out), _distinct(bindings)

    @property
    def tensors(self) -> list[Value]:
        return [v for v in self.indices if v is not None]


def _distinct(bindings: tuple[Indirect, ...]) -> tuple[Indirect, ...]:
    """Each symbol once: the same value may index several dimensions of one size."""
    return tuple(dict(bindings).items())


@TABLE.lowers(aten.index.Tensor, aten._unsafe_index.Tensor)
def index(ctx: Lowering, x: Value, indices: Sequence[Value | None]) -> Computed:
    if not any(v is not None for v in indices):
        raise UnsupportedError("an index without index tensors")
    advanced = Advanced.of(x.shape, indices)
    return _gather(ctx, x, advanced.shape, advanced.place, advanced.tensors)


def _gather(
    ctx: Lowering, x: Value, shape: Sequence[Int], place: Callable[[Indices], Place], indices: Sequence[Value]
) -> Computed:
    """The value of `shape` whose element at `i` is x at place(i)."""
    require_device(x.device, *indices)
    if is_empty(shape):
        return nothing(x, shape)
    probe = place(dim_indices(shape))
    source = gathered(ctx, x, shape, bool(probe[1]))

    def body(i: Indices) -> Scalar:
        where, bindings = place(i)
        return element(source, where, bindings)

    return pointwise(shape, x.dtype, x.device, body, (source, *indices))


@TABLE.lowers(aten.gather.default)
def gather(ctx: Lowering, x: Value, dim: int, index: Value, *, sparse_grad: bool = False) -> Computed:
    dim = dim_of(dim, len(x.shape))

    def place(i: Indices) -> Place:
        return along(x.shape, dim, i, at(index, i), wrap=False)

    return _gather(ctx, x, index.shape, place, (index,))


def along(shape: Sequence[Int], dim: int, i: Indices, value: Scalar, *, wrap: bool) -> Place:
    """Indices `i` with the one along `dim` replaced by the integer `value`; 0-dim and 1-dim tensors stand for each other."""
    if not shape:
        _, bindings = position(value, 1, wrap=wrap)
        return (), bindings
    where, bindings = position(value, shape[dim], wrap=wrap)
    full = i or (0,)
    return (*full[:dim], where, *full[dim + 1 :]), bindings


@TABLE.lowers(aten.index_select.default)
def index_select(ctx: Lowering, x: Value, dim: int, index: Value) -> Computed:
    require_integer(index)
    dim = dim_of(dim, len(x.shape))

    def place(i: Indices) -> Place:
        picked = at(index, (i[dim],) if index.shape and i else (0,) * len(index.shape))
        return along(x.shape, dim, i, picked, wrap=False)

    return _gather(ctx, x, ctx.sizes(ctx.out().shape), place, (index,))


@TABLE.lowers(aten.embedding.default)
def embedding(
    ctx: Lowering,
    weight: Value,
    indices: Value,
    padding_idx: Int = -1,
    scale_grad_by_freq: bool = False,
    sparse: bool = False,
) -> Computed:
    """Rows of `weight` [num, width]; `padding_idx` and the flags concern the gradient only."""
    require_integer(indices)
    rank = len(indices.shape)

    def place(i: Indices) -> Place:
        row, bindings = position(at(indices, i[:rank]), weight.shape[0], wrap=False)
        return (row, *i[rank:]), bindings

    return _gather(ctx, weight, (*indices.shape, *weight.shape[1:]), place, (indices,))


@TABLE.lowers(aten.take.default)
def take(ctx: Lowering, x: Value, index: Value) -> Computed:
    require_integer(index)

    def place(i: Indices) -> Place:
        linear, bindings = position(at(index, i), prod(x.shape), wrap=True)
        return unravel(linear, x.shape), bindings

    return _gather(ctx, x, index.shape, place, (index,))
