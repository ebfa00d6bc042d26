"""What a generated kernel is called in profiles: its shape and its most telling operations, equal for equal nests."""

from __future__ import annotations

from collections.abc import Iterator

from fxopt.codegen.triton_tiling import Tiling
from fxopt.ir.loops import Load, Nest, Op, Reduce, Scan, postorder

MOST_WORDS = 4
_PLAIN = ("add", "sub", "mul")
_SILENT = ("cast", "bitcast", "where", "eq", "ne", "lt", "le", "gt", "ge", "bitwise_and", "bitwise_or", "bitwise_not")
_SAID_OTHERWISE = {
    "checked_index": "gather",
    "softmax_stats": "softmax",
    "weighted_softmax": "softmax",
    "truediv": "div",
    "maximum": "max",
    "minimum": "min",
    "remainder": "mod",
}


def kernel_name(tiling: Tiling, stage: str | None) -> str:
    """`fx_<shape>_<operations>`, for instance fx_row_welford_rsqrt or fx_point_tanh_mul.

    The shape is point, tile (two-dimensional), row (reduced along memory), column (reduced across it) or scan; the parts of
    a split reduction put their `stage` instead. At most four operations are named: reductions first, then what is not plain
    arithmetic, each in the order of computation.
    """
    words = operations(tiling.nest)
    return "_".join(["fx", stage or _shape(tiling), *(words or [_movement(tiling.nest)])])


def operations(nest: Nest) -> list[str]:
    """The most telling operations of `nest`, at most four."""
    return list(dict.fromkeys(_words(nest)))[:MOST_WORDS]


def _shape(tiling: Tiling) -> str:
    if any(isinstance(n, Scan) for n in postorder(tiling.nest.roots)):
        return "scan"
    if tiling.reduces:
        return "row" if tiling.inner_reduction else "column"
    return "tile" if tiling.y.symbols else "point"


def _words(nest: Nest) -> Iterator[str]:
    nodes = list(postorder(nest.roots))
    for node in nodes:
        if isinstance(node, Reduce | Scan):
            yield _SAID_OTHERWISE.get(node.kind, node.kind)
    if any(s.mode == "add" for s in nest.stores):
        yield "scatter"
    operators = [n.name for n in nodes if isinstance(n, Op) and n.name not in _SILENT]
    yield from (_SAID_OTHERWISE.get(name, name) for name in operators if name not in _PLAIN)
    yield from (name for name in operators if name in _PLAIN)


def _movement(nest: Nest) -> str:
    """A nest without arithmetic: what it does to memory."""
    loads = [n for n in postorder(nest.roots) if isinstance(n, Load)]
    if not loads:
        return "fill"
    stored = {s.value.dtype for s in nest.stores}
    return "copy" if {load.dtype for load in loads} == stored else "cast"
