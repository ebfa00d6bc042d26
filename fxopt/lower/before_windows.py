"""What a region computes of each element before windows that overlap take it: a norm and relu before a pooling.

Such a region computes it again under each window, since that costs no memory. Where what makes the elements can have it as
its epilogue, it is computed once, for nothing, and the windows read its result instead.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

from fxopt.ir.exprs import Int, Sym, add, as_symbol, free_symbols, index, mod, mul, prod
from fxopt.ir.loops import IndexValue, Load, Nest, Reduce, Scalar, Scan, Store, postorder, replaced_in, transform
from fxopt.ir.region import BufferSpec, Region
from fxopt.lower.convolutions import is_channels_last
from fxopt.lower.joining import with_nests
from fxopt.lower.values import symbols_of

_HOLE = "element"
"""Stands for the element that is read, whichever that is."""


def before_windows(region: Region, image: BufferSpec) -> tuple[Region, Region, BufferSpec] | None:
    """(a region that computes one value of each element of `image`, `region` with that for what it computed of each, the
    buffer between them); None where `region` reads elements no more than once, or does different things to them.

    `image` [N, C, H, W] is channels-last, of known size. Points of the first region are places and channels.
    """
    nest = region.nest
    if len(image.shape) != 4 or not is_channels_last(image.shape, image.strides):
        return None
    channels, count = image.shape[1], image.numel
    if region.across is not None or nest.reduced or not isinstance(channels, int) or not isinstance(count, int):
        return None
    loads = [load for load in nest.loads() if load.buffer == image.name]
    taps = {load.index for load in loads}
    reads = len(taps) * prod(p.size for p in nest.points if p.size is not None)
    if any(load.indirect for load in loads) or not isinstance(reads, int) or reads <= count:
        return None
    channel = _channel(nest, taps, channels)
    found = list(dict.fromkeys(_largest(nest, image, channel)))
    functions = {_without_place(value, image.name) for value in found}
    if len(functions) != 1:
        return None
    (function,) = functions
    if isinstance(function, Load):
        return None
    made = replace(image, name=f"{image.name}.before_windows", dtype=function.dtype)
    return _first(region, function, image, made, channel), _second(region, found, image.name, made), made


def _channel(nest: Nest, taps: set[Int], channels: int) -> Sym | None:
    """The loop that runs over the channels of every tap, if one does."""
    for sym in nest.points:
        own = index(sym.name, sym.size) if sym.size is not None else 0
        if (
            sym.size == channels
            and as_symbol(own) == sym
            and all(mod(add(tap, mul(own, -1)), channels) == 0 for tap in taps)
        ):
            return sym
    return None


def _largest(nest: Nest, image: BufferSpec, channel: Sym | None) -> Iterator[Scalar]:
    """The largest parts of what `nest` stores that are computed of one element of `image` and of its channel, in no wider a
    type.
    """
    taps: dict[Scalar, frozenset[Int]] = {}
    others: dict[Scalar, frozenset[Sym]] = {}
    for node in postorder(nest.roots):
        own = isinstance(node, Load) and node.buffer == image.name
        taps[node] = frozenset((node.index,)) if own else frozenset().union(*(taps[a] for a in node.args))  # type: ignore[attr-defined]
        others[node] = frozenset() if own else _free(node).union(*(others[a] for a in node.args))

    def is_whole(node: Scalar) -> bool:
        if len(taps[node]) != 1 or node.dtype.itemsize > image.dtype.itemsize or isinstance(node, Reduce | Scan):
            return False
        return others[node] <= {channel}

    seen: set[Scalar] = set()
    waiting = list(nest.roots)
    while waiting:
        node = waiting.pop()
        if node in seen:
            continue
        seen.add(node)
        if is_whole(node):
            yield node
        elif taps[node]:
            waiting += node.args


def _free(node: Scalar) -> frozenset[Sym]:
    """The symbols of `node` itself, its operands left out."""
    match node:
        case Load():
            return free_symbols(node.index)
        case IndexValue():
            return free_symbols(node.expr)
    return frozenset()


def _without_place(value: Scalar, image: str) -> Scalar:
    return transform(value, {}, lambda load: Load(_HOLE, 0, load.dtype) if load.buffer == image else None)


def _first(region: Region, function: Scalar, image: BufferSpec, made: BufferSpec, channel: Sym | None) -> Region:
    channels = image.shape[1]
    rows = prod(n for d, n in enumerate(image.shape) if d != 1)
    points = row, column = index("x1", rows), index("x2", channels)
    at = add(mul(row, channels), column)
    element = Load(image.name, at, image.dtype)
    value = transform(
        function, {} if channel is None else {channel: column}, lambda x: element if x.buffer == _HOLE else None
    )
    nest = Nest(symbols_of(points), (), (Store(made.name, at, value),))
    buffers = {**region.buffers, made.name: made}
    return with_nests(replace(region, name=f"{region.name}.elements", buffers=buffers), nest, None)


def _second(region: Region, found: list[Scalar], image: str, made: BufferSpec) -> Region:
    images: dict[Scalar, Scalar] = {}
    for value in found:
        (tap,) = {n.index for n in postorder((value,)) if isinstance(n, Load) and n.buffer == image}
        images[value] = Load(made.name, tap, made.dtype)
    stores = tuple(s.transformed({}, lambda v: replaced_in(v, images)) for s in region.nest.stores)
    buffers = {**region.buffers, made.name: made}
    return with_nests(
        replace(region, name=f"{region.name}.windows", buffers=buffers), replace(region.nest, stores=stores), None
    )
