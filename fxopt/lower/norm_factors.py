"""Norms of rows as factors: what a region multiplies the elements of its rows by, and regions that have that instead.

An RMS norm is element (row, column) of a matrix in memory, times what the row, times what the column has.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

import torch

from fxopt.ir.exprs import Int, Sym, add, coefficient, floordiv, mul, symbol
from fxopt.ir.loops import (
    SUMMED_COLUMNS,
    Const,
    Load,
    Nest,
    Op,
    Reduce,
    Scalar,
    Scan,
    Store,
    loop_order,
    postorder,
    replaced_in,
    transform,
)
from fxopt.ir.region import BufferSpec, Matrix, Region
from fxopt.ir.rounding import HALVES
from fxopt.lower.channel_sums import uncast
from fxopt.lower.joining import with_nests
from fxopt.lower.recompute import is_repeatable
from fxopt.lower.values import cast


@dataclass(frozen=True)
class Norm:
    """The store `normed` of a region: element (row, axis) of the matrix `rows` in memory, times the product of `by_row`,
    times that of `by_column`, which vary along one of both only.

    `place` is the row's number, of all `count` ones, in the points of the region.
    """

    normed: Store
    axis: Sym
    rows: Matrix
    by_row: tuple[Scalar, ...]
    by_column: tuple[Scalar, ...]
    place: Int
    count: int


def find_norm(region: Region, store: Store) -> Norm | None:
    """What `store` of `region`, which reduces rows, makes of them, if that is a Norm of rows in memory in half precision."""
    nest, spec = region.nest, region.buffers[store.buffer]
    if len(nest.reduced) != 1 or store.mode != "set" or store.indirect or spec.dtype not in HALVES:
        return None
    (axis,) = nest.reduced
    length, elements = axis.size, spec.numel
    if not isinstance(length, int) or not isinstance(elements, int) or coefficient(store.index, axis) != 1:
        return None
    element, by_row, by_column = None, list[Scalar](), list[Scalar]()
    for given in _factors(store.value, axis):
        factor, along = uncast(given), given.symbols()
        if axis not in along:
            by_row.append(factor)
        elif along.isdisjoint(nest.points):
            by_column.append(factor)
        elif element is None:
            element = given
        else:
            return None
    load = None if element is None else _in_memory(region, store, element)
    if load is None or load.dtype != spec.dtype or not by_row:
        return None
    found = _as_rows(store.index, load, axis, nest.points)
    if found is None:
        return None
    place, rows = found
    return Norm(store, axis, rows, tuple(by_row), tuple(by_column), place, elements // length)


def _in_memory(region: Region, normed: Store, element: Scalar) -> Load | None:
    """Where `element` is in memory: stored by the region or loaded by it. What float16 cannot hold is not there."""
    own = uncast(element)
    for store in region.nest.stores:
        plain, dtype = store is not normed and store.mode == "set" and not store.indirect, region.buffers[store.buffer].dtype
        if plain and uncast(store.value) is own and (dtype != torch.float16 or _is_rounded(element, dtype)):
            return Load(store.buffer, store.index, dtype)
    return own if isinstance(own, Load) and not own.indirect else None


def _is_rounded(value: Scalar, dtype: torch.dtype) -> bool:
    """Whether `value` was of `dtype` before what casts and roundings `uncast` leaves out."""
    own = uncast(value)
    while value is not own and value.dtype != dtype:
        assert isinstance(value, Op)
        value = value.args[0]
    return value.dtype == dtype


def _factors(value: Scalar, axis: Sym) -> Iterator[Scalar]:
    """What `value` is the product of, in float32, roundings of products between left out."""
    plain = uncast(value)
    if isinstance(plain, Op) and plain.name == "mul":
        for factor in plain.args:
            yield from _factors(factor, axis)
    elif isinstance(plain, Op) and plain.name == "truediv" and axis not in plain.args[1].symbols():
        yield from _factors(plain.args[0], axis)
        yield Op("truediv", (Const(1.0, torch.float32), cast(uncast(plain.args[1]), torch.float32)), torch.float32)
    else:
        yield value


def _as_rows(index: Int, load: Load, axis: Sym, points: Sequence[Sym]) -> tuple[Int, Matrix] | None:
    """(The number of the row that `index` is in, of dense rows along `axis`; the rows of `load` as a matrix.)"""
    length, pitch, number, offset = axis.size, None, add(0, 0), add(load.index, mul(-1, symbol(axis)))
    assert isinstance(length, int)
    for sym in points:
        own, other = coefficient(index, sym), coefficient(load.index, sym)
        if not isinstance(own, int) or not isinstance(other, int) or own <= 0 or own % length or other % (own // length):
            return None
        if pitch not in (None, other // (own // length)):
            return None
        pitch = other // (own // length)
        number = add(number, mul(own // length, symbol(sym)))
        offset = add(offset, mul(-other, symbol(sym)))
    if pitch is None or pitch < length or add(mul(number, length), symbol(axis)) != index or not isinstance(offset, int):
        return None
    return number, Matrix(load.buffer, offset, 0, pitch, 1)


def rows_of(a: Matrix, depth: Int, norm: Norm) -> Matrix | None:
    """The left operand `a`, if it is rows of the norm and all `depth` elements of each, as rows of what the norm is of."""
    length = norm.axis.size
    if length != depth:
        return None
    if not isinstance(length, int) or not isinstance(a.offset, int) or not isinstance(a.row, int):
        return None
    if a.buffer != norm.normed.buffer or a.column != 1 or a.offset % length or a.row % length:
        return None
    assert isinstance(norm.rows.row, int) and isinstance(norm.rows.offset, int)
    offset = norm.rows.offset + a.offset // length * norm.rows.row
    return replace(norm.rows, offset=offset, row=a.row // length * norm.rows.row)


def factor_at(a: Matrix, norm: Norm, scale: BufferSpec, row: Sym) -> Load:
    """The factor of row `row` of the left operand `a`."""
    length = norm.axis.size
    assert isinstance(length, int) and isinstance(a.offset, int) and isinstance(a.row, int)
    return Load(scale.name, add(a.offset // length, mul(a.row // length, symbol(row))), torch.float32)


def with_factor(region: Region, products: Mapping[str, Matrix], factor: Load, scale: BufferSpec) -> Region:
    """The epilogue `region` whose `products`, float32 sums now, are multiplied by `factor`."""

    def scaled(load: Load) -> Scalar | None:
        if load.buffer not in products:
            return None
        return cast(times(Load(load.buffer, load.index, torch.float32), factor), load.dtype)

    stores = tuple(s.transformed({}, lambda v: transform(v, {}, scaled)) for s in region.nest.stores)
    specs = {n: replace(spec, dtype=torch.float32) if n in products else spec for n, spec in region.buffers.items()}
    return with_nests(replace(region, buffers=specs | {scale.name: scale}), replace(region.nest, stores=stores), None)


def with_scale(region: Region, norm: Norm, scale: BufferSpec, shift: int) -> Region:
    """`region` with the factor of each row stored instead of the norm."""
    value = functools.reduce(times, norm.by_row)
    if shift:
        value = times(value, Const(2.0**-shift, torch.float32))
    stores = [s for s in region.nest.stores if s is not norm.normed]
    nest = replace(region.nest, stores=(*stores, Store(scale.name, norm.place, value)))
    new = replace(region, name=f"{region.name}.scale", buffers=region.buffers | {scale.name: scale})
    return with_nests(new, nest, None)


def in_parts(scaled: Region, norm: Norm, scale: BufferSpec) -> tuple[Region, Region] | None:
    """`scaled` in two regions, one over elements, which stores sums of SUMMED_COLUMNS of a row each, and one that adds these
    up; None where it computes other things of rows."""
    nest, axis, length = scaled.nest, norm.axis, norm.axis.size
    *others, own = nest.stores
    sums = [n for n in postorder(own.roots) if isinstance(n, Reduce | Scan)]
    if not isinstance(length, int) or length % SUMMED_COLUMNS or not all(map(is_repeatable, others)):
        return None
    if norm.rows.buffer not in (s.buffer for s in others) or not all(
        isinstance(n, Reduce) and n.kind == "sum" for n in sums
    ):
        return None
    operands = [Store("", 0, cast(n.args[0], torch.float32)) for n in sums]
    if not all(map(is_repeatable, operands)) or any(n.dtype != torch.float32 for n in sums):
        return None
    count, number = length // SUMMED_COLUMNS, axis.name[1:]
    column, part = Sym(f"x{number}", size=length), Sym(f"r{number}", size=count)
    stores = [s.transformed({axis: symbol(column)}) for s in others]
    images: dict[Scalar, Scalar] = {}
    specs = {}
    for k, (total, operand) in enumerate(zip(sums, operands, strict=True)):
        name, first = f"{scale.name}.sums{k}", mul(norm.place, count)
        specs[name] = BufferSpec(name, torch.float32, scaled.device, (norm.count, count), (count, 1))
        place = add(first, floordiv(symbol(column), SUMMED_COLUMNS))
        stores.append(Store(name, place, transform(operand.value, {axis: symbol(column)}), "sums"))
        load = Load(name, add(first, symbol(part)), torch.float32)
        images[total] = Reduce("sum", (load,), (part,), torch.float32)
    buffers = scaled.buffers | specs
    elements = replace(scaled, name=f"{scaled.name}.sums", buffers=buffers)
    rest = replace(scaled, name=f"{scaled.name}.of.sums", buffers=buffers)
    added = Store(own.buffer, own.index, replaced_in(own.value, images))
    return (
        with_nests(elements, Nest(loop_order((*nest.points, column)), (), tuple(stores)), None),
        with_nests(rest, Nest(nest.points, (part,), (added,)), None),
    )


def times(a: Scalar, b: Scalar) -> Scalar:
    return Op("mul", (cast(a, torch.float32), cast(b, torch.float32)), torch.float32)
