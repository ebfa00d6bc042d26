"""Values that two regions compute from the same memory: stored by the first and read by the second.

The opposite of `recompute`: there a value is stored and the regions that read it may compute it, here both compute it.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from dataclasses import replace
from typing import NamedTuple

from fxopt.ir.exprs import Int, free_symbols, prod
from fxopt.ir.loops import Load, Nest, Op, Reduce, Scalar, Scan, Store, loads_below, postorder, replaced_in
from fxopt.ir.region import BufferSpec, Region
from fxopt.ir.rounding import rounded, unrounded
from fxopt.lower import cost
from fxopt.lower.align import Mapping, mappings
from fxopt.lower.joining import MAX_BUFFERS, with_nests
from fxopt.lower.recompute import loops_by_stride


class Stored(NamedTuple):
    """`first`, which stores a value in the buffer `name`, and `second`, which reads it. `spec` is that buffer's if the first
    region did not store the value before."""

    first: Region
    second: Region
    name: str
    spec: BufferSpec | None


class Shared(NamedTuple):
    """A value that two regions compute for every element of their domains: `own` in the first, which would store it at
    `place`, and `other` in the second, which would read it at `there`."""

    own: Scalar
    other: Scalar
    place: Int
    there: Int


def shared_values(first: Region, second: Region) -> list[Shared]:
    """The largest values that both regions compute and that are more than one load: those of several operands, or expensive
    to compute."""
    if first.across is not None or second.across is not None:
        return []
    flat = [Nest((*r.nest.points, *r.nest.reduced), (), r.nest.stores) for r in (first, second)]
    own, theirs = set(_plain(flat[0])), list(_plain(flat[1]))
    same: list[Mapping] = [{}] if set(flat[0].points) == set(flat[1].points) else []
    for mapping in itertools.chain(same, mappings(flat[1], flat[0])):
        images: dict[Scalar, Scalar] = {}
        for node in theirs:
            images[node] = node.rebuild(tuple(images[a] for a in node.args), mapping) if mapping else node
        common = {image: node for node, image in images.items() if image in own}
        below = {a for node in common for a in node.args}
        largest = dict.fromkeys(_narrowest(node) for node in common if node not in below)
        found = [_shared(node, common[node], images, flat[0]) for node in largest]
        if any(found):
            return [each for each in found if each is not None]
    return []


def stored_once(first: Region, second: Region, shared: Shared, name: str) -> Stored | None:
    """Both regions with the value stored once, in a buffer called `name` if it is in none; None where the first would have
    too many buffers."""
    value, dtype = rounded(shared.own), shared.own.dtype
    known = next((s for s in first.nest.stores if _stores(s, shared, first.buffers[s.buffer])), None)
    spec = None
    if known is None:
        size = prod(s.size for s in (*first.nest.points, *first.nest.reduced) if s.size is not None)
        spec = BufferSpec(name, dtype, first.device, (size,), (1,))
    buffer = name if known is None else known.buffer
    stores = [s.transformed({}, lambda v: replaced_in(v, {shared.own: value})) for s in first.nest.stores]
    if spec is not None:
        stores.append(Store(name, shared.place, unrounded(value)))
        first = replace(first, buffers=first.buffers | {name: spec})
    read: dict[Scalar, Scalar] = {shared.other: Load(buffer, shared.there, dtype)}
    second = replace(second, buffers=second.buffers | {buffer: spec or first.buffers[buffer]})
    rest = tuple(s.transformed({}, lambda v: replaced_in(v, read)) for s in second.nest.stores)
    one = with_nests(first, replace(first.nest, stores=tuple(stores)), None)
    two = with_nests(second, replace(second.nest, stores=rest), None)
    return Stored(one, two, buffer, spec) if len(one.buffers) <= MAX_BUFFERS else None


def _stores(store: Store, shared: Shared, spec: BufferSpec) -> bool:
    """Whether `store` leaves the shared value in memory as it would be read."""
    as_it_is = store.mode == "set" and not store.indirect and spec.dtype == shared.own.dtype
    return as_it_is and store.index == shared.place and unrounded(store.value) is unrounded(shared.own)


def _plain(nest: Nest) -> Iterator[Scalar]:
    """What `nest` computes from memory at known places, element by element, operands before users."""
    plain: set[Scalar] = set()
    for node in postorder(nest.roots):
        fits = not isinstance(node, Reduce | Scan) and not (isinstance(node, Load) and node.indirect)
        if fits and not (isinstance(node, Op) and node.name == "checked_index") and all(a in plain for a in node.args):
            plain.add(node)
            yield node


def _narrowest(node: Scalar) -> Scalar:
    """What `node` was widened from."""
    while isinstance(node, Op) and node.name == "cast" and node.args[0].dtype.itemsize < node.dtype.itemsize:
        (node,) = node.args
    return node


def _shared(own: Scalar, other: Scalar, images: dict[Scalar, Scalar], nest: Nest) -> Shared | None:
    """The value where it is worth storing and lies as one of its operands does."""
    loops = frozenset(s for s in nest.points if s.size != 1)
    whole = {n for n in loads_below((own,)) if loops <= free_symbols(n.index)}
    expensive = cost.is_expensive(postorder((own,)))
    bits = not own.dtype.is_floating_point and own.dtype.itemsize > 1  # of a rounding's two casts the first
    if isinstance(own, Load) or bits or len(whole) < (1 if expensive else 2):
        return None
    for load in loads_below((other,)):
        image = images[load]
        dense = isinstance(image, Load) and loops_by_stride(Store(image.buffer, image.index, own), nest) is not None
        if image in whole and isinstance(image, Load) and dense:
            return Shared(own, other, image.index, load.index)
    return None
