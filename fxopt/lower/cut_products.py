"""Products that were padded to aligned rows (`passes/pad_gemm.py`), whose result a region cuts to size again.

For the library the padding is worth a copy of the right operand and of the result. A kernel of ours needs neither: it
multiplies the columns that count, of the operand as it was, and writes them where they are wanted. Of a vocabulary's
logits there is then one copy in memory and not two.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

import torch

from fxopt.ir.exprs import prod, symbol
from fxopt.ir.loops import Const, IndexValue, Load, Masked, Op
from fxopt.ir.region import BufferSpec, Matrix, Region, Step
from fxopt.lower.products import Product, columns_of

MOST_PADDED = 8
"""Columns: padding to the next multiple of eight adds fewer."""


def cut_to(product: Product, region: Region) -> Product | None:
    """The columns of `product` that `region` goes over, one iteration for each element, if it leaves out the last few."""
    z, m, _, n = product.sizes
    if not isinstance(n, int):
        return None
    elements = prod(0 if s.size is None else s.size for s in region.nest.points)
    counts = (n - left_out for left_out in range(1, min(MOST_PADDED, n - 1)))
    count = next((c for c in counts if elements == z * m * c), None)
    return None if count is None else columns_of(product, 0, count)


def padding_of(
    steps: Sequence[Step | None], product: Product, buffers: Mapping[str, BufferSpec]
) -> tuple[tuple[int, Region], Product] | None:
    """(the step that copied the right operand of `product` to pad it, and its number; `product` of what that copied), or
    None.

    `product` has been cut to the columns that are no padding.
    """
    for i, step in enumerate(steps):
        if isinstance(step, Region) and product.b.buffer in step.writes():
            source = _copied(step, product.b, product.sizes[3], buffers)
            return None if source is None else ((i, step), replace(product, b=replace(product.b, buffer=source)))
    return None


def _copied(region: Region, b: Matrix, columns: int, buffers: Mapping[str, BufferSpec]) -> str | None:
    """The buffer whose rows `region` copies, each to its own place, if these are just the `columns` of `b`; zeros follow."""
    if region.across is not None or region.nest.reduced or len(region.nest.stores) != 1:
        return None
    (store,), rows = region.nest.stores, region.nest.points[0]
    match store.value:
        case Masked(cond=cond, body=Load(buffer=source, index=index)) if source in buffers and index == store.index:
            counted = Op("lt", (IndexValue(symbol(rows)), Const(columns, torch.int64)), torch.bool)
            shapes = (buffers[source].shape, (columns, *buffers[b.buffer].shape[1:]))
            same = buffers[source].strides == buffers[b.buffer].strides and shapes[0] == shapes[1]
            whole = rows.size == buffers[b.buffer].shape[0] and b.column == buffers[b.buffer].strides[0]
            return source if cond is counted and same and whole and b.offset == 0 else None
    return None
