"""Products of one row before a norm, with a weight whose columns are contiguous: the norm adds up their parts.

The columns of such a weight are too few for all multiprocessors, so the inner dimension is shared among programs, and a
second kernel adds up what each has summed. The norm of the row, a kernel of one program, waits for that one. Here it adds up
the parts itself: two kernels where there were three.
"""

from __future__ import annotations

from dataclasses import replace
from math import ceil

import torch

from fxopt.ir.exprs import Int, Sym, add, coefficient, contiguous_strides, mul, symbol
from fxopt.ir.loops import Load, Nest, Op, Reduce, Scalar, Store, postorder, replaced_in, transform
from fxopt.ir.region import BufferSpec, Region
from fxopt.lower.joining import with_nests
from fxopt.lower.recompute import with_value

MOST_PARTS = 16
"""Each is a load for every element of the norm's row, which its one program has in flight at once."""

WANTED_PROGRAMS, COLUMNS = 288, 64
"""Programs that fill a GPU, each with so many columns of a part: with fewer, a printer cuts the parts again."""


def in_parts(product: Region, norm: Region) -> tuple[Region, Region] | None:
    """(`product` as sums over parts of the inner dimension, `norm` that adds them up); None where that gains nothing.

    The parts are a float32 buffer [parts, columns] that both regions describe. `norm`, over one row, has to be the only
    reader of what `product` stores.
    """
    product = without_points_of_one(product)
    reduce = _sum_down_columns(product)
    if reduce is None or norm.nest.points or len(norm.nest.reduced) != 1 or norm.across is not None:
        return None
    (store,), (column,), (inner,) = product.nest.stores, product.nest.points, product.nest.reduced
    loads = [load for load in norm.nest.loads() if load.buffer == store.buffer]
    columns, depth = column.size, inner.size
    if not loads or any(load.index != symbol(norm.nest.reduced[0]) for load in loads):
        return None
    if not isinstance(columns, int) or not isinstance(depth, int) or columns != norm.nest.reduced[0].size:
        return None
    count = MOST_PARTS
    while count > 1 and (depth % count or ceil(columns / COLUMNS) * count >= 2 * WANTED_PROGRAMS):
        count //= 2
    if count == 1:
        return None
    shape = (count, columns)
    spec = BufferSpec(f"{store.buffer}.parts", torch.float32, product.device, shape, contiguous_strides(shape))
    part, at, rest = Sym("x1", size=count), Sym("x2", size=columns), Sym("r3", size=depth // count)
    within: dict[Sym, Int] = {inner: add(mul(symbol(part), depth // count), symbol(rest)), column: symbol(at)}
    own = Reduce("sum", tuple(transform(a, within) for a in reduce.operands), (rest,), torch.float32)
    stored = Store(spec.name, add(mul(symbol(part), columns), symbol(at)), own)
    buffers = {**product.buffers, spec.name: spec}
    parts = replace(product, name=f"{product.name}.parts", buffers=buffers)
    parts = with_nests(parts, Nest((part, at), (rest,), (stored,)), None)
    total = _added([Load(spec.name, add(symbol(column), k * columns), torch.float32) for k in range(count)])
    joined = replace(store, value=replaced_in(store.value, {reduce: total}))
    source = with_nests(replace(product, buffers=buffers), Nest((column,), (), (joined,)), None)
    summed = with_value(norm, joined, source)
    return None if summed is None else (parts, replace(summed, name=f"{norm.name}.summed"))


def without_points_of_one(region: Region) -> Region:
    """`region` without the loops that run once."""
    once: dict[Sym, Int] = {p: 0 for p in region.nest.points if p.size == 1}
    points = tuple(p for p in region.nest.points if p not in once)
    return replace(
        region, nest=replace(region.nest, points=points, stores=tuple(s.transformed(once) for s in region.nest.stores))
    )


def _sum_down_columns(product: Region) -> Reduce | None:
    """The one sum in what `product` stores, column after column, if a weight is read along its columns."""
    nest = product.nest
    if product.across is not None or len(nest.points) != 1 or len(nest.reduced) != 1 or len(nest.stores) != 1:
        return None
    (store,), (column,), (inner,) = nest.stores, nest.points, nest.reduced
    if store.mode != "set" or store.indirect or store.index != symbol(column):
        return None
    reduces = [n for n in postorder(store.roots) if isinstance(n, Reduce)]
    if len(reduces) != 1 or (reduces[0].kind, reduces[0].axes, reduces[0].dtype) != ("sum", (inner,), torch.float32):
        return None
    loads = [n for n in postorder(reduces[0].operands) if isinstance(n, Load)]
    if any(load.indirect for load in nest.loads()):
        return None
    along_columns = (load for load in loads if coefficient(load.index, column) == 1)
    return reduces[0] if any(coefficient(load.index, inner) not in (None, 0) for load in along_columns) else None


def _added(values: list[Scalar]) -> Scalar:
    """The sum of `values`, neighbours first."""
    while len(values) > 1:
        pairs = [Op("add", (a, b), torch.float32) for a, b in zip(values[::2], values[1::2], strict=False)]
        values = [*pairs, *values[2 * len(pairs) :]]
    return values[0]
