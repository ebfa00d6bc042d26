"""Row reductions with sums over the rows as regions to run one after the other, each a kernel or more of its own.

Either each nest for itself, or what the rows reduce to first and then, down the columns, everything that needs it: the sums
and, on their way, what varies along the rows. The second reads a row that does not fit on chip twice instead of three times.
"""

from __future__ import annotations

from dataclasses import replace

from fxopt.codegen.triton_split import scratch_spec
from fxopt.codegen.triton_tiling import accumulator_dtype, size_of
from fxopt.ir.exprs import ravel, symbol
from fxopt.ir.loops import Load, Nest, Reduce, Scalar, Store, cast_to, postorder, replaced_in, transform
from fxopt.ir.region import BufferSpec, Region
from fxopt.ir.rounding import rounded
from fxopt.ir.rows import settled


def apart(region: Region) -> tuple[Region, Region]:
    """The two nests of `region` as regions of their own, to run in this order."""
    assert region.across is not None
    columns = replace(region, name=f"{region.name}.columns", nest=region.across, across=None)
    return only(replace(region, across=None)), only(columns)


def statistics_first(region: Region) -> tuple[Region, Region] | None:
    """(what the rows of `region` reduce to, everything else down the columns), to run in this order; None when nothing down
    the columns needs what the rows reduce to.

    Buffers that are not the region's own are scratch memory of one value per row each.
    """
    rows, across = forwarded(region)
    reduced = frozenset(rows.reduced)
    varying = [s for s in rows.stores if reduced & s.symbols()]
    columns = [s for s in (*varying, *across.stores) if s.buffer not in region.passed]
    roots = [v for s in columns for v in s.roots]
    sizes = tuple(map(size_of, rows.points))
    place = ravel(tuple(map(symbol, rows.points)), sizes)
    scratch: dict[str, BufferSpec] = {}
    saved: list[Store] = []
    loads: dict[Scalar, Scalar] = {}
    known = {n for n in postorder(tuple(roots)) if isinstance(n, Reduce) and n.axes == rows.reduced}
    for node in settled(roots, reduced, known):
        spec = scratch_spec(region, len(scratch), accumulator_dtype(node.dtype), sizes)
        scratch[spec.name] = spec
        saved.append(Store(spec.name, place, cast_to(node, spec.dtype)))
        loads[node] = cast_to(Load(spec.name, place, spec.dtype), node.dtype)
    if not loads:
        return None
    first = replace(rows, stores=(*(s for s in rows.stores if s not in varying), *saved))
    second = replace(across, stores=tuple(s.transformed({}, lambda v: replaced_in(v, loads)) for s in columns))
    buffers = region.buffers | scratch
    return (
        only(replace(region, name=f"{region.name}.statistics", nest=first, across=None, buffers=buffers)),
        only(replace(region, name=f"{region.name}.columns", nest=second, across=None, buffers=buffers)),
    )


def forwarded(region: Region) -> tuple[Nest, Nest]:
    """The nests with values that the second loads of the first passed in registers, as they would be read from memory."""
    assert region.across is not None
    made = {s.buffer: s.value for s in region.nest.stores}

    def passed(load: Load) -> Scalar | None:
        value = made.get(load.buffer)
        return None if value is None else rounded(value)

    stores = tuple(s.transformed({}, lambda v: transform(v, {}, passed)) for s in region.across.stores)
    return region.nest, replace(region.across, stores=stores)


def only(region: Region) -> Region:
    """`region` with the buffers that it touches."""
    return replace(region, buffers={n: region.buffers[n] for n in dict.fromkeys((*region.reads(), *region.writes()))})
