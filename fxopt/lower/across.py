"""Sums over the points of a row reduction, in the row reduction's own region.

The gradient of a normalization's input reduces each row; those of its weights sum over all rows. Both read the same two
tensors, which one kernel that takes rows one after the other reads once. Which is faster is measured: the region keeps both
nests as they are, and `codegen.triton_across` prints them together or apart.
"""

from __future__ import annotations

from dataclasses import replace

from fxopt.ir.exprs import coefficient, free_symbols
from fxopt.ir.loops import Load, Masked, Nest, Reduce, Scalar, Scan, Store, holds_reduction, loop_order, postorder
from fxopt.ir.region import Region
from fxopt.lower import cost
from fxopt.lower.align import division_count, mappings
from fxopt.lower.joining import MAX_BUFFERS, MAX_NODES, join, with_nests

LONGEST_ROW = 16384
"""Elements; a sum for each of them stays in a register from row to row. Longer rows are read once for what they reduce to
and once more for all else, the sums among it, which is one pass less than apart whatever the number of rows."""

FEWEST_ROWS = 512
"""With fewer short rows, each program would see so few that its sums are as much to write as the rows are to read."""


def join_across(rows: Region, columns: Region, columns_first: bool) -> Region | None:
    """`rows` with the sums of `columns` over its points; None when that is impossible.

    What `columns` stores on the way, element by element, is left to `rows`, which may be waiting for it: `columns_first`
    tells that `columns` must run before.
    """
    if rows.device.type != "cuda" or rows.device != columns.device or rows.across or columns.across:
        return None
    if not _reduces_rows(rows.nest):
        return None
    elements, sums = _taken_apart(columns.nest)
    if elements is not None:
        first, second = (replace(columns, nest=elements), rows) if columns_first else (rows, replace(columns, nest=elements))
        joined = join(first, second)
        if joined is None or not _reduces_rows(joined.nest):
            return None
        rows = joined
    elif columns_first:
        return None
    return _with_sums(rows, replace(columns, nest=sums)) if sums is not None and _sums_only(sums) else None


def join_rows(first: Region, second: Region) -> Region | None:
    """What `first` and then `second` does, one of them a row reduction with sums over its rows; None when impossible."""
    if (first.across is None) == (second.across is None):
        return None
    own = first if first.across is not None else second
    joined = join(replace(first, across=None), replace(second, across=None))
    if joined is None or (joined.nest.points, joined.nest.reduced) != (own.nest.points, own.nest.reduced):
        return None
    assert own.across is not None
    buffers = {**joined.buffers, **own.buffers}
    if len(buffers) > MAX_BUFFERS or not _passes_in_registers(joined.nest, own.across):
        return None
    return with_nests(replace(joined, buffers=buffers), joined.nest, own.across)


def _taken_apart(nest: Nest) -> tuple[Nest | None, Nest | None]:
    """(what `nest` stores for each element on its way, what it stores at the end)."""
    reduced = frozenset(nest.reduced)
    elements = tuple(s for s in nest.stores if reduced & s.symbols() and not any(map(holds_reduction, s.roots)))
    rest = tuple(s for s in nest.stores if s not in elements)
    points = loop_order((*nest.points, *nest.reduced))
    return Nest(points, (), elements) if elements else None, replace(nest, stores=rest) if rest else None


def _with_sums(rows: Region, columns: Region) -> Region | None:
    if len({*rows.buffers, *columns.buffers}) > MAX_BUFFERS:
        return None
    across = _aligned(rows.nest, columns.nest)
    if across is None or not all(frozenset(across.points) <= free_symbols(s.index) for s in across.stores):
        return None  # sums over the rows of what is one value for each, a mean loss say, are not worth the row's registers
    nodes = tuple(dict.fromkeys(rows.nodes + columns.nodes))
    origins = tuple(dict.fromkeys(rows.origins + columns.origins))
    both = replace(rows, buffers={**rows.buffers, **columns.buffers}, nodes=nodes, origins=origins)
    return with_nests(both, rows.nest, across)


def _aligned(rows: Nest, columns: Nest) -> Nest | None:
    """`columns` in terms of the axes of `rows`, if each of its iterations then needs no other iteration of `rows`."""
    exchanged = Nest(columns.reduced, columns.points, columns.stores)
    for mapping in mappings(exchanged, rows):
        across = Nest(rows.reduced, rows.points, tuple(s.transformed(mapping) for s in columns.stores))
        if division_count(across) <= division_count(columns) and _passes_in_registers(rows, across):
            small = len(list(postorder(rows.roots + across.roots))) <= MAX_NODES
            return across if small else None
    return None


def _reduces_rows(nest: Nest) -> bool:
    """Many short rows or long ones, contiguous in most of what is loaded, without scans."""
    nodes = list(postorder(nest.roots))
    if not any(isinstance(n, Reduce) for n in nodes) or any(isinstance(n, Scan) for n in nodes):
        return False
    if not all(isinstance(s.size, int) for s in nest.reduced):
        return False
    length, count = (cost.extent(s.size for s in axes) for axes in (nest.reduced, nest.points))
    if length <= LONGEST_ROW and count < FEWEST_ROWS:
        return False
    return any(coefficient(load.index, s) == 1 for load in nest.loads() for s in nest.reduced)


def _sums_only(nest: Nest) -> bool:
    """Floating sums, each over what has no reduction in it, and nothing that varies along them."""
    nodes = list(postorder(nest.roots))
    sums = [n for n in nodes if isinstance(n, Reduce)]
    if not sums or any(isinstance(n, Scan) or (isinstance(n, Masked) and holds_reduction(n)) for n in nodes):
        return False
    if any(n.kind != "sum" or not n.dtype.is_floating_point or any(map(holds_reduction, n.operands)) for n in sums):
        return False
    return not any(s.mode != "set" or s.indirect or s.symbols() & frozenset(nest.reduced) for s in nest.stores)


def _passes_in_registers(rows: Nest, across: Nest) -> bool:
    """What `across` loads of what `rows` stores is at the index stored to, and neither overwrites what the other touches."""
    touched = {*rows.reads(), *rows.writes()}
    if touched & set(across.writes()):
        return False
    made: dict[str, list[Store]] = {}
    for store in rows.stores:
        made.setdefault(store.buffer, []).append(store)
    for load in across.loads():
        own = made.get(load.buffer, [])
        if len(own) > 1 or any(s.index != load.index or s.mode != "set" or s.indirect or load.indirect for s in own):
            return False
    return not any(_depends_on_made(s, made) for s in across.stores)


def _depends_on_made(store: Store, made: dict[str, list[Store]]) -> bool:
    """Something of what `rows` stores is used outside the sums, after all rows are done."""
    stack: list[Scalar] = list(store.roots)
    while stack:
        node = stack.pop()
        if isinstance(node, Load) and node.buffer in made:
            return True
        if not isinstance(node, Reduce):
            stack += node.args
    return False
