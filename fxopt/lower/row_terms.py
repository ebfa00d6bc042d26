"""Sums over all rows of what is picked out of each row: the terms are computed where the row is.

A cross-entropy reduces each row of logits, and then adds up over the rows what it picks out of each: the logit of a class,
less what the row reduces to. As a kernel of its own that sum waits, row after row, for an index and then for an element far
from the last one. The kernel of the rows has these at hand, so it stores the terms, and the sum reads them in order.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch

from fxopt.ir.exprs import contiguous_strides, ravel, symbol
from fxopt.ir.loops import Load, Nest, Reduce, Scalar, Store, cast_to, loads_below, postorder, replaced_in
from fxopt.ir.region import BufferSpec, Region
from fxopt.ir.rounding import NARROW
from fxopt.lower import cost
from fxopt.lower.align import extents
from fxopt.lower.joining import join, with_nests

SHORTEST_ROW_BYTES = 4096
"""Of a row: a program with less to read only waits for the index and what it picks. 65536 rows of 1024 in bfloat16 took
longer so; rows of 4096 bytes and more are faster (`benchmarks.memory_bound`, 128 MiB)."""


@dataclass(frozen=True)
class WithTerms:
    """`rows` that also stores the terms, `total` that adds them up, and the buffers `terms` between the two."""

    rows: Region
    total: Region
    terms: tuple[BufferSpec, ...]


def with_terms(rows: Region, total: Region) -> WithTerms | None:
    """Both regions, of which `total` runs later, with the terms computed by `rows`; None where `total` is no sum over all
    rows of what is picked out of each.
    """
    if rows.device.type != "cuda" or rows.device != total.device or rows.across or total.across or not rows.nest.reduced:
        return None
    nest = total.nest
    count, length = extents(nest)
    if count != 1 or not isinstance(length, int) or length != extents(rows.nest)[0]:
        return None
    found = _terms(rows, total)
    picked = {n.buffer for value in found for n in loads_below((value,)) if n.indirect} & set(rows.reads())
    if not any(_row_bytes(rows, name) >= SHORTEST_ROW_BYTES for name in picked):
        return None
    sizes = tuple(length_of for s in nest.reduced if (length_of := s.size) is not None)
    index = ravel(tuple(map(symbol, nest.reduced)), sizes)
    specs: list[BufferSpec] = []
    stores: list[Store] = []
    loads: dict[Scalar, Scalar] = {}
    for value in found:
        dtype = torch.float32 if value.dtype in NARROW else value.dtype
        spec = BufferSpec(f"{total.name}.terms{len(specs)}", dtype, total.device, (length,), contiguous_strides((length,)))
        specs.append(spec)
        stores.append(Store(spec.name, index, cast_to(value, dtype)))
        loads[value] = cast_to(Load(spec.name, index, dtype), value.dtype)
    buffers = {**total.buffers, **{spec.name: spec for spec in specs}}
    picking = with_nests(replace(total, buffers=buffers), Nest(nest.reduced, (), tuple(stores)), None)
    joined = join(rows, picking)
    if joined is None or (joined.nest.points, joined.nest.reduced) != (rows.nest.points, rows.nest.reduced):
        return None
    left = tuple(s.transformed({}, lambda v: replaced_in(v, loads)) for s in nest.stores)
    return WithTerms(joined, with_nests(replace(total, buffers=buffers), replace(nest, stores=left), None), tuple(specs))


def _row_bytes(rows: Region, name: str) -> int:
    """Bytes that `rows` reads of buffer `name` for each row."""
    along = frozenset(rows.nest.reduced)
    walked = any(n.buffer == name and along & n.symbols() and not n.indirect for n in rows.nest.loads())
    return cost.extent(s.size for s in rows.nest.reduced) * rows.buffers[name].dtype.itemsize if walked else 0


def _terms(rows: Region, total: Region) -> list[Scalar]:
    """What `total` adds up that is picked out of rows or made of what they reduce to; empty where it does more with them."""
    made = set(rows.writes())
    found: dict[Scalar, None] = {}
    for node in postorder(total.nest.roots):
        if not isinstance(node, Reduce) or not any(n.indirect or n.buffer in made for n in loads_below(node.operands)):
            continue
        if (
            node.kind != "sum"
            or not node.dtype.is_floating_point
            or any(isinstance(n, Reduce) for n in postorder(node.operands))
        ):
            return []
        found[node.operands[0]] = None
    return list(found)
