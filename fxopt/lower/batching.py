"""Regions that are the same up to their buffers and their number of elements: what one batched kernel can run.

An optimizer step over hundreds of parameters is hundreds of such regions, of many sizes. Each is pointwise, its accesses all
at one index that walks memory without gaps or at the first element of a buffer, so that a kernel over a table of addresses
and sizes does them all, whatever they are. The scheduler asks for a region's `form`, finds regions of one form that do not
wait for each other, and `steps_of` makes batches of them.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from fxopt.ir.exprs import Int, Sym, coefficient, free_symbols, mul, prod, substitute, symbol
from fxopt.ir.loops import IndexValue, Load, Nest, Reduce, Scalar, Scan, Store, postorder, transform
from fxopt.ir.region import Batch, BufferSpec, Region

NAME = "batching"
"""What `disable` calls it."""

BATCHED_DEVICES = ("cuda",)
"""Types of devices with batched kernels. On a CPU a launch costs too little to save."""

FEWEST_MEMBERS = 8
"""A batch costs the host a look at every address, and a copy of the table where one has changed: several launches."""


@dataclass(frozen=True)
class Form:
    """What a region does, its buffers numbered by first use and its size left out.

    `key` is equal for regions that may be of one batch: device, dtypes, and stores with every index taken for 0. `walked`
    tells the buffers that are read element by element from those read at their first; of a region of one element (None) it
    may be either.
    """

    key: tuple[Any, ...]
    names: tuple[str, ...]
    elements: int
    walked: tuple[bool, ...] | None


def form(region: Region) -> Form | None:
    """The form of `region`, or None if a batched kernel cannot run it."""
    nest = region.nest
    sizes = [s.size for s in nest.points]
    if region.device.type not in BATCHED_DEVICES or nest.reduced or not all(isinstance(s, int) and s > 0 for s in sizes):
        return None
    if any(s.mode != "set" or s.indirect for s in nest.stores) or any(map(_needs_index, postorder(nest.roots))):
        return None
    elements = prod(sizes)  # type: ignore[arg-type]
    assert isinstance(elements, int)
    ones: dict[Sym, Int] = {s: 0 for s in nest.points if s.size == 1}
    stored = {substitute(s.index, ones) for s in nest.stores}
    flat = next(iter(stored), 0)
    if len(stored) != 1 or not _is_dense(flat, [s for s in nest.points if s.size != 1], elements):
        return None
    names = tuple(dict.fromkeys((*nest.reads(), *nest.writes())))
    walked = _walked(nest, names, flat, ones)
    if walked is None:
        return None
    number = {name: k for k, name in enumerate(names)}
    body = tuple((number[s.buffer], _numbered(s.value, number, None)) for s in nest.stores)
    dtypes = tuple(region.buffers[name].dtype for name in names)
    return Form((region.device, dtypes, body), names, elements, walked if elements > 1 else None)


def _needs_index(node: Scalar) -> bool:
    return isinstance(node, Reduce | Scan | IndexValue) or (isinstance(node, Load) and bool(node.indirect))


def _is_dense(x: Int, symbols: Sequence[Sym], elements: int) -> bool:
    """Whether `x` takes every value from 0 to `elements` - 1 once."""
    expected: Int = 1
    for sym in sorted(symbols, key=lambda s: _stride(x, s)):
        if sym.size is None or _stride(x, sym) != expected:
            return False
        expected = mul(expected, sym.size)
    return expected == elements and substitute(x, dict.fromkeys(symbols, 0)) == 0 and free_symbols(x) <= {*symbols}


def _stride(x: Int, sym: Sym) -> int:
    """The stride of `x` in `sym`; 0 where it is none or not known."""
    stride = coefficient(x, sym)
    return stride if isinstance(stride, int) else 0


def _walked(nest: Nest, names: Sequence[str], flat: Int, ones: dict[Sym, Int]) -> tuple[bool, ...] | None:
    """Which buffers are accessed at `flat`; None if one is accessed anywhere but there or, instead, at its first element."""
    indices: dict[str, set[Int]] = {name: set() for name in names}
    accesses = [(a.buffer, a.index) for a in nest.loads()] + [(a.buffer, a.index) for a in nest.stores]
    for name, index in accesses:
        indices[name].add(substitute(index, ones))
    if any(found not in ({flat}, {0}) for found in indices.values()):
        return None
    return tuple(indices[name] == {flat} for name in names)


def _numbered(value: Scalar, number: dict[str, int], at: Sequence[Int] | None) -> Scalar:
    """`value` with its buffers called b0, b1, ..., each loaded at its index in `at`, or at 0."""

    def renamed(load: Load) -> Scalar:
        k = number[load.buffer]
        return Load(f"b{k}", 0 if at is None else at[k], load.dtype)

    return transform(value, {}, renamed)


def steps_of(name: str, members: Sequence[Region]) -> list[Batch | Region]:
    """`members`, which do not wait for each other, in as few batches as their forms allow; the rest as they are."""
    groups: dict[Any, list[tuple[Region, Form]]] = {}
    rest: list[Batch | Region] = []
    for region in members:
        own = form(region)
        if own is None:
            rest.append(region)
        else:
            groups.setdefault(own.key, []).append((region, own))
    out: list[Batch | Region] = []
    for group in groups.values():
        for alike in _alike(group):
            if len(alike) < FEWEST_MEMBERS:
                rest += [region for region, _ in alike]
            else:
                out.append(_batch(f"{name}.batch{len(out) or ''}", alike))
    return [*out, *rest]


def _alike(group: list[tuple[Region, Form]]) -> list[list[tuple[Region, Form]]]:
    """Regions of one key by the buffers that they walk. Those of one element join the largest group."""
    counts = Counter(own.walked for _, own in group if own.walked is not None)
    if not counts:
        return [group]
    common = counts.most_common(1)[0][0]
    found: dict[Any, list[tuple[Region, Form]]] = {}
    for region, own in group:
        found.setdefault(own.walked or common, []).append((region, own))
    return list(found.values())


def _batch(name: str, group: list[tuple[Region, Form]]) -> Batch:
    region, first = group[0]
    walked = next((own.walked for _, own in group if own.walked is not None), (True,) * len(first.names))
    members = tuple(member for member, _ in group)
    return Batch(
        name=name,
        body=_body(name, region, first.names, walked),
        members=members,
        arguments=tuple(own.names for _, own in group),
        elements=tuple(own.elements for _, own in group),
        buffers={n: spec for member in members for n, spec in member.buffers.items()},
    )


def _body(name: str, region: Region, names: tuple[str, ...], walked: tuple[bool, ...]) -> Region:
    n = symbol(Sym("n", lo=1))
    x = Sym("x0", size=n)
    number = {buffer: k for k, buffer in enumerate(names)}
    at: list[Int] = [symbol(x) if w else 0 for w in walked]
    stores = tuple(Store(f"b{number[s.buffer]}", symbol(x), _numbered(s.value, number, at)) for s in region.nest.stores)
    layouts: list[tuple[tuple[Int, ...], tuple[Int, ...]]] = [((n,), (1,)) if w else ((), ()) for w in walked]
    specs = [BufferSpec(f"b{k}", region.buffers[buffer].dtype, region.device, *layouts[k]) for buffer, k in number.items()]
    nest = Nest((x,), (), stores)
    return replace(region, name=name, nest=nest, buffers={spec.name: spec for spec in specs}, nodes=(), origins=())
