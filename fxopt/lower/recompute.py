"""Values that are cheaper computed again by every region that reads them than written once.

Lowering stores a value with several readers before it is known which of them become one kernel, and what those read anyway.
After joining both are known: where all that is left of a value is a buffer between kernels, it may go.
"""

from __future__ import annotations

from dataclasses import replace

from fxopt.ir.exprs import Int, Sym, coefficient, floordiv, mod, mul, symbol
from fxopt.ir.loops import Load, Nest, Op, Reduce, Scalar, Scan, Store, postorder, transform
from fxopt.ir.region import Region
from fxopt.ir.rounding import rounded
from fxopt.lower.align import Mapping, division_count
from fxopt.lower.joining import MAX_BUFFERS, MAX_NODES, with_nests
from fxopt.lower.values import cast

LARGEST = 128
"""Scalar operations of a value that is computed again."""


def is_repeatable(store: Store) -> bool:
    """Whether any region can compute what `store` stores: from memory at known places, element by element."""
    if store.mode != "set" or store.indirect:
        return False
    nodes = list(postorder(store.roots))
    if len(nodes) > LARGEST or any(isinstance(n, (Reduce, Scan)) for n in nodes):
        return False
    return not any((isinstance(n, Load) and n.indirect) or (isinstance(n, Op) and n.name == "checked_index") for n in nodes)


def with_value(reader: Region, store: Store, source: Region) -> Region | None:
    """`reader` with what it loads of the buffer of `store`, a store of `source`, computed instead; None when its indices
    would need divisions for that, its kernel would become too large, or the store fills only a part of the buffer."""
    loops = loops_by_stride(store, source.nest)
    in_parts = sum(s.buffer == store.buffer for s in source.nest.stores) > 1
    if loops is None or in_parts or not store.value.symbols() <= set(loops):
        return None
    value = rounded(store.value)

    def computed(load: Load) -> Scalar | None:
        if load.buffer != store.buffer or load.indirect:
            return None
        return cast(transform(value, _places(loops, load.index)), load.dtype)

    stores = tuple(s.transformed({}, lambda v: transform(v, {}, computed)) for s in reader.nest.stores)
    nest = replace(reader.nest, stores=stores)
    buffers = {**source.buffers, **reader.buffers}
    new = with_nests(replace(reader, buffers=buffers), nest, None)
    if store.buffer in new.reads() or len(new.buffers) > MAX_BUFFERS or len(list(postorder(nest.roots))) > MAX_NODES:
        return None
    if division_count(nest) > division_count(reader.nest):
        return None
    nodes = tuple(dict.fromkeys(source.nodes + reader.nodes))
    return replace(new, nodes=nodes, origins=tuple(dict.fromkeys(source.origins + reader.origins)))


def loops_by_stride(store: Store, nest: Nest) -> list[Sym] | None:
    """The loops of `nest`, innermost in memory first, if `store` fills its buffer without gaps."""
    rest = {s: coefficient(store.index, s) for s in (*nest.points, *nest.reduced)}
    spanned: Int = 0
    expected: Int = 1
    out: list[Sym] = []
    while rest:
        sym = next((s for s, stride in rest.items() if stride == expected), None)
        if sym is None or sym.size is None:
            return None
        del rest[sym]
        spanned = spanned + mul(symbol(sym), expected)
        expected = mul(expected, sym.size)
        out.append(sym)
    return out if spanned == store.index else None


def _places(loops: list[Sym], index: Int) -> Mapping:
    """The iteration that stores the element at `index`."""
    out: Mapping = {}
    for sym in loops[:-1]:
        assert sym.size is not None
        out[sym], index = mod(index, sym.size), floordiv(index, sym.size)
    if loops:
        out[loops[-1]] = index
    return out
