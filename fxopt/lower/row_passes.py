"""Row reductions whose rows are too long to be held: how often a kernel walks over them, and the same as two regions.

What a row reduces to needs a walk over the row, and what is computed from that for each element another one, which loads the
operands again. As two regions the second may read what the first has stored on its way.
"""

from __future__ import annotations

from dataclasses import replace

from fxopt.ir.exprs import contiguous_strides, ravel, symbol
from fxopt.ir.loops import IndexValue, Load, Nest, Reduce, Scalar, Scan, Store, holds_reduction, postorder, replaced_in
from fxopt.ir.region import BufferSpec, Region
from fxopt.ir.rounding import NARROW
from fxopt.ir.rows import settled, walks
from fxopt.lower import cost
from fxopt.lower.joining import with_nests


def computes_again(region: Region) -> bool:
    """Whether a kernel of `region` loads several operands again for one value, or computes something expensive again."""
    if not cost.is_walked_again(region.nest):
        return False
    again = {node for node, times in walks(region.nest).items() if times > 1}
    joined = [n for n in again if sum(bool(a.symbols()) and not isinstance(a, IndexValue) for a in n.args) > 1]
    return bool(joined) or cost.is_expensive(again)


def in_two(region: Region) -> tuple[Region, Region] | None:
    """(what the rows of `region` reduce to and what needs no reduction, the rest element by element), to run in this order.

    Buffers that are not the region's own have one value for each row. None where the rest would not be element by element.
    """
    nest = region.nest
    plain = all(s.mode == "set" and not s.indirect for s in nest.stores)
    nodes = list(postorder(nest.roots))
    reductions = {n for n in nodes if isinstance(n, Reduce)}
    whole = all(n.axes == nest.reduced for n in reductions) and not any(isinstance(n, Scan) for n in nodes)
    reduced = frozenset(nest.reduced)
    later = [s for s in nest.stores if reduced & s.symbols() and holds_reduction(s.value)]
    if region.across is not None or not plain or not whole or not later:
        return None
    sizes = tuple(s.size for s in nest.points if s.size is not None)
    place = ravel(tuple(map(symbol, nest.points)), sizes)
    buffers: dict[str, BufferSpec] = {}
    stores: list[Store] = []
    loads: dict[Scalar, Scalar] = {}
    for value in settled([s.value for s in later], reduced, reductions):
        if value.dtype in NARROW:
            return None  # it would be rounded on its way
        spec = BufferSpec(f"{region.name}.row{len(buffers)}", value.dtype, region.device, sizes, contiguous_strides(sizes))
        buffers[spec.name] = spec
        stores.append(Store(spec.name, place, value))
        loads[value] = Load(spec.name, place, value.dtype)
    first = Nest(nest.points, nest.reduced, (*(s for s in nest.stores if s not in later), *stores))
    rest = tuple(s.transformed({}, lambda v: replaced_in(v, loads)) for s in later)
    second = Nest((*nest.points, *nest.reduced), (), rest)
    if set(first.writes()) & {load.buffer for load in second.loads()} - buffers.keys():
        return None  # updated in place
    known = replace(region, buffers=region.buffers | buffers)
    return with_nests(replace(known, name=f"{region.name}.rows"), first, None), with_nests(known, second, None)
