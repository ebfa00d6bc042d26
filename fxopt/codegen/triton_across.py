"""Row reductions with sums over the rows: one kernel that reads its rows once, one that joins its parts.

Each program takes a part of the rows, some at a time, does what the region's nest says to them, and adds what the sums over
the rows want of every element to accumulators in registers. At the end it stores those; a second, small kernel adds up the
parts in a fixed order and finishes. The alternatives of `triton_apart` are candidates as well.
"""

from __future__ import annotations

from dataclasses import replace

from fxopt.codegen.triton_apart import forwarded, only
from fxopt.codegen.triton_config import TritonConfig, part_count
from fxopt.codegen.triton_split import scratch_spec
from fxopt.codegen.triton_tiling import accumulator_dtype, size_of
from fxopt.ir.exprs import Sym, prod, ravel, symbol
from fxopt.ir.loops import Load, Nest, Reduce, Scalar, Store, cast_to, postorder, replaced_in
from fxopt.ir.region import BufferSpec, Region


def together(region: Region, config: TritonConfig) -> tuple[Region, Region]:
    """(the rows in `config.split` parts with sums of each part, the sums of the parts), to run in this order.

    The first region's sums are stores of mode "part". Buffers that are not the region's own are scratch memory.
    """
    assert region.across is not None
    rows, across = forwarded(region)
    part = Sym("u0", size=part_count(prod(map(size_of, region.nest.points)), config))
    sizes = tuple(map(size_of, across.points))
    place = ravel(tuple(map(symbol, across.points)), sizes)
    scratch: dict[str, BufferSpec] = {}
    partial: list[Store] = []
    joined: dict[Scalar, Scalar] = {}
    for node in postorder(across.roots):
        if isinstance(node, Reduce) and node.axes == across.reduced:
            dtype = accumulator_dtype(node.dtype)
            spec = scratch_spec(region, len(scratch), dtype, (size_of(part), prod(sizes)))
            scratch[spec.name] = spec
            partial.append(Store(spec.name, place, cast_to(node.operands[0], dtype), mode="part"))
            load = Load(spec.name, symbol(part) * prod(sizes) + place, dtype)
            joined[node] = cast_to(Reduce("sum", (load,), (part,), dtype), node.dtype)
    stored = (s for s in rows.stores if s.buffer not in region.passed)
    first = replace(rows, stores=(*stored, *partial))
    second = Nest(across.points, (part,), tuple(s.transformed({}, lambda v: replaced_in(v, joined)) for s in across.stores))
    buffers = region.buffers | scratch
    return (
        only(replace(region, name=f"{region.name}.rows", nest=first, across=None, buffers=buffers)),
        only(replace(region, name=f"{region.name}.join", nest=second, across=None, buffers=buffers)),
    )
