"""Products of few rows in parts of the inner dimension, added up by the reduction that reads them.

A norm after a product cannot be its epilogue: it needs whole rows. But it reads the product anyway, and sums as it loads: so
a product whose tiles leave most multiprocessors idle is computed in parts, whose float32 sums stay in the L2 cache, and no
kernel is needed to join them. The last product of a feed-forward layer, with its long inner dimension, is the case; of one
row, any product with a weight whose columns are contiguous, which are too few for a program to have some of its own.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from math import ceil

import torch

from fxopt.ir.exprs import Int, Sym, add, contiguous_strides, mul, symbol
from fxopt.ir.loops import Load, Nest, Op, Scalar, Store, transform
from fxopt.ir.region import BufferSpec, Contraction, Matrix, Region, Way
from fxopt.lower.products import QUANTIZED, Product
from fxopt.lower.values import cast

PARTS = "in parts for the reader"
COUNTS, COUNTS_OF_ONE_ROW = (8, 4, 2), (16, 8)
"""Numbers of parts."""

AT_MOST = 2
"""Of these, how many are tried."""

SHORTEST, SHORTEST_OF_ONE_ROW = 256, 128
"""Elements of the inner dimension in a part. Of one row it is the weight's bytes that have to be in flight everywhere."""

TILE, MOST_TILES = 64, 256
"""Rows and columns of a usual tile, and how many of those in all parts run at once on a GPU."""


def in_parts(product: Product, region: Region, buffers: Mapping[str, BufferSpec]) -> list[tuple[BufferSpec, Way]]:
    """Ways to compute `product`, which nobody but `region` reads, and that: (the partial sums' buffer, the way)."""
    batch, rows, depth, columns = product.sizes
    spec = buffers[product.result.buffer]
    if not region.nest.reduced or region.across is not None or product.call.op in QUANTIZED or product.ends:
        return []
    if product.addend is not None or batch != 1 or not isinstance(rows, int) or not isinstance(product.a, Matrix):
        return []
    dense = (product.result.offset, product.result.row, product.result.column) == (0, columns, 1)
    if not dense or any(n.indirect for n in region.nest.loads() if n.buffer == spec.name):
        return []
    tiles = ceil(rows / TILE) * ceil(columns / TILE)
    counts, shortest = (COUNTS_OF_ONE_ROW, SHORTEST_OF_ONE_ROW) if rows == 1 else (COUNTS, SHORTEST)
    fits = [c for c in counts if tiles * c <= MOST_TILES and depth % (16 * c) == 0 and depth // c >= shortest]
    return [_way(product, region, count, buffers) for count in fits[:AT_MOST]]


def _way(product: Product, region: Region, count: int, buffers: Mapping[str, BufferSpec]) -> tuple[BufferSpec, Way]:
    result, (_, rows, _, columns) = buffers[product.result.buffer], product.sizes
    shape = (count, rows, columns)
    spec = BufferSpec(f"{result.name}.parts{count}", torch.float32, result.device, shape, contiguous_strides(shape))
    parts = _partial_sums(product, spec, buffers)

    def summed(load: Load) -> Scalar | None:
        if load.buffer != result.name:
            return None
        loads = [Load(spec.name, add(load.index, mul(part, spec.strides[0])), torch.float32) for part in range(count)]
        total: Scalar = loads[0]
        for each in loads[1:]:
            total = Op("add", (total, each), torch.float32)
        return cast(total, load.dtype)

    stores = tuple(s.transformed({}, lambda v: transform(v, {}, summed)) for s in region.nest.stores)
    touched = {n: s for n, s in region.buffers.items() if n != result.name} | {spec.name: spec}
    reader = replace(region, name=f"{region.name}.parts{count}", nest=replace(region.nest, stores=stores), buffers=touched)
    return spec, Way(f"{PARTS} {count}", (parts, reader))


def _partial_sums(product: Product, spec: BufferSpec, buffers: Mapping[str, BufferSpec]) -> Contraction:
    """`product` as a batch of products, one for each part of the inner dimension, whose results are `spec`."""
    assert isinstance(product.a, Matrix)
    count, depth = spec.shape[0], product.sizes[2]
    assert isinstance(count, int)
    length = depth // count
    part, (_, row, column) = Sym("x0", size=count), product.axes
    index: Int = 0
    for sym, stride in zip((part, row, column), spec.strides, strict=True):
        index = add(index, mul(symbol(sym), stride))
    registers = f"{spec.name}.product"
    store = Store(spec.name, index, Load(registers, index, torch.float32))
    own = {spec.name: spec, registers: replace(spec, name=registers)}
    region = Region(
        f"{spec.name}.gemm", Nest((part, row, column), (), (store,)), own, spec.device, (), (product.call.origin,)
    )
    batch = mul(length, product.a.column)
    return Contraction(
        region.name,
        # Of one row any stride is right; with this one a tensor map of rows has the parts for rows.
        replace(product.a, batch=batch, row=batch if product.sizes[1] == 1 else product.a.row),
        replace(product.b, batch=mul(length, product.b.row)),
        length,
        registers,
        (part, row, column),
        region,
        {name: buffers[name] for name in (product.a.buffer, product.b.buffer)} | {spec.name: spec},
        tf32=buffers[product.a.buffer].dtype == torch.float32,
    )
