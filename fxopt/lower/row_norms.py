"""Norms of a single row (a new token's) before a product: as a kernel of their own, or within the products' kernels.

In the second way the product before, if there is one, adds the residual to each element that it stores, and each program of
the product after computes the norm of the whole row, which is as short as the row of its weight that it reads. That is one
kernel and one dependence fewer for each norm. Which way is the faster is measured, after it is known which kernels the
products are: reductions, or contractions by weights of few bits, which read several rows of these in a program. What a row
is computed by element by element (a cast, a scale, an activation) may go into a reduction after it in the same way.
"""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import TypeGuard

import torch

from fxopt.ir.exprs import Sym, substitute, symbol
from fxopt.ir.loops import Load, Nest, Reduce, Scalar, Scan, Store, postorder, replaced_in, transform
from fxopt.ir.region import Alias, Alternatives, Call, Contraction, Matrix, Ref, Region, Step, Way, Work, base_of, refs
from fxopt.ir.rounding import rounded
from fxopt.lower.epilogues import Epilogues
from fxopt.lower.joining import MAX_NODES, with_nests
from fxopt.lower.lowering import Lowered
from fxopt.lower.products import find_product
from fxopt.lower.quantized_products import as_reduction, in_loops
from fxopt.lower.recompute import is_repeatable, with_value
from fxopt.lower.row_parts import in_parts, without_points_of_one
from fxopt.lower.values import cast
from fxopt.lower.ways import replaced

NAME = "row-norms"
"""What `Options.disable` calls them."""

APART, WITHIN, SUMMED = "norm apart", "norm within products", "norm of parts"
ELEMENTS = "elements within the product"
_HALF = (torch.float16, torch.bfloat16)
LARGEST_ROW = 8192
"""Elements of a row that a program of the product after still holds beside its weight's."""


@dataclass(frozen=True)
class _Norm:
    """A region over one row `axis`: `total` is the store of the row (a residual sum), `normed` that of its norm, and `added`
    the buffer that the product before makes. Of what no product makes it stores the norm only (None, "").
    """

    region: Region
    axis: Sym
    total: Store | None
    normed: Store
    added: str

    @property
    def rest(self) -> Region:
        """The region with the row read from memory, if somebody else stores it."""
        return self.region if self.total is None else replace(self.region, nest=_through_memory(self.region, self.total))


def with_row_norms(lowered: Lowered) -> Lowered:
    """`lowered`, which has no alternatives any more, with both ways in the place of each product, norm and product of one
    row on a GPU that follow each other, of each norm and product, and of each product down columns and norm."""
    uses = Counter(name for step in lowered.steps for name in _reads(step))
    uses.update((*(out.name for out in lowered.outputs if isinstance(out, Ref)), *lowered.inputs, *lowered.constants))
    steps: list[Step] = list(lowered.steps)
    places = [k for k, step in enumerate(steps) if not isinstance(step, Alias)]
    taken: dict[int, Alternatives | None] = {}
    for first, second, third in zip(places, places[1:], places[2:], strict=False):
        views = {s.name for s in steps[first:third] if isinstance(s, Alias)}
        if first in taken or not views.isdisjoint((*_reads(steps[second]), *_reads(steps[third]))):
            continue
        found = _alternatives([steps[k] for k in (first, second, third)], uses)
        if found is not None:
            taken |= {first: found, second: None, third: None}
    buffers = dict(lowered.buffers)
    for first, second in itertools.pairwise(places):
        views = {s.name for s in steps[first:second] if isinstance(s, Alias)}
        if first in taken or second in taken or not views.isdisjoint(_reads(steps[second])):
            continue
        found = _alternatives_without_product_before(steps[first], steps[second], uses)
        found = found or _alternatives_of_elements(steps[first], steps[second], uses)
        found = found or _alternatives_of_parts(steps[first], steps[second], uses, lowered)
        if found is not None:
            taken |= {first: found, second: None}
            buffers |= found.buffers
    out = [taken.get(k, step) for k, step in enumerate(steps)]
    return replace(lowered, steps=[step for step in out if step is not None], buffers=buffers)


def kept(lowered: Lowered, settled: Lowered) -> Lowered:
    """`lowered`, of `with_row_norms`, with the ways whose regions `settled` has."""
    names = {step.name for step in settled.steps if isinstance(step, Work)}
    ways = {
        each.name: next(way for way in each.ways if all(s.name in names for s in way.steps if isinstance(s, Work)))
        for each in lowered.steps
        if isinstance(each, Alternatives)
    }
    return replaced(lowered, ways)


def _reads(step: Step) -> Iterator[str]:
    """Every name that `step` reads, or makes a view of."""
    match step:
        case Alias():
            yield step.of
        case Call():
            yield from refs((step.args, step.kwargs))
        case Alternatives():
            raise AssertionError(f"{step.name}: nobody has decided among its alternatives")
        case _:
            yield from step.reads()


def _alternatives(steps: list[Step], uses: Counter[str]) -> Alternatives | None:
    before, middle, after = steps
    if not (_may_be_product(before) and isinstance(middle, Region) and _may_be_product(after)):
        return None
    if middle.device.type != "cuda" or middle.across is not None:
        return None
    norm = _norm(middle, before.writes())
    if norm is None or uses[norm.added] != 1 or uses[norm.normed.buffer] != 1:
        return None
    one, other = _with_residual(before, norm), _with_norm(after, norm)
    if one is None or other is None or any(set(r.reads()) & set(r.writes()) for r in (one, other)):
        return None
    ways = (Way(APART, (before, middle, after)), Way(WITHIN, (one, other)))
    buffers = {**before.buffers, **middle.buffers, **after.buffers}
    return Alternatives(f"{middle.name}.norm", ways, buffers)


def _alternatives_without_product_before(middle: Step, after: Step, uses: Counter[str]) -> Alternatives | None:
    if not (isinstance(middle, Region) and _may_be_product(after)) or middle.device.type != "cuda":
        return None
    norm = _lone_norm(middle)
    if norm is None or middle.across is not None or uses[norm.normed.buffer] != 1:
        return None
    one = _with_norm(after, norm)
    if one is None or set(one.reads()) & set(one.writes()):
        return None
    ways = (Way(APART, (middle, after)), Way(WITHIN, (one,)))
    return Alternatives(f"{middle.name}.norm", ways, {**middle.buffers, **after.buffers})


def _alternatives_of_elements(before: Step, after: Step, uses: Counter[str]) -> Alternatives | None:
    """A row that is computed element by element and the product that alone reads it, and both as one."""
    if not (isinstance(before, Region) and isinstance(after, Region)) or before.device.type != "cuda":
        return None
    own, product = without_points_of_one(before), without_points_of_one(after)
    if before.across is not None or after.across is not None or own.nest.reduced or len(product.nest.reduced) != 1:
        return None
    size = product.nest.reduced[0].size
    if len(own.nest.points) != 1 or len(own.nest.stores) != 1 or own.nest.points[0].size != size:
        return None
    if not isinstance(size, int) or size > LARGEST_ROW:
        return None
    (store,) = own.nest.stores
    loads = [n for n in product.nest.loads() if n.buffer == store.buffer]
    if uses[store.buffer] != 1 or not is_repeatable(store) or store.index != symbol(own.nest.points[0]):
        return None
    if len(loads) != 1 or loads[0].index != symbol(product.nest.reduced[0]) or set(own.reads()) & set(after.writes()):
        return None
    both = with_value(product, store, own)
    if both is None:
        return None
    ways = (Way(APART, (before, after)), Way(ELEMENTS, (replace(both, name=f"{after.name}.{before.name}"),)))
    return Alternatives(f"{before.name}.elements", ways, {**before.buffers, **after.buffers})


def _may_be_product(step: Step) -> TypeGuard[Region | Contraction]:
    return isinstance(step, Contraction) or (isinstance(step, Region) and step.across is None)


def _norm(region: Region, made: Sequence[str]) -> _Norm | None:
    """`region` as a norm of what is added to one of the buffers `made`."""
    nest = region.nest
    if nest.points or len(nest.reduced) != 1 or len(nest.stores) != 2:
        return None
    (axis,) = nest.reduced
    if not isinstance(axis.size, int) or axis.size > LARGEST_ROW:
        return None
    total, normed = sorted(nest.stores, key=lambda s: any(isinstance(n, Reduce) for n in postorder(s.roots)))
    if any(s.mode != "set" or s.indirect or s.index != symbol(axis) for s in (total, normed)) or not is_repeatable(total):
        return None
    if not any(isinstance(n, Reduce) for n in postorder(normed.roots)) or {total.buffer, normed.buffer} & set(
        region.reads()
    ):
        return None
    if len(made) != 1 or any(n.index != symbol(axis) for n in region.nest.loads() if n.buffer == made[0]):
        return None
    goes_through_total = made[0] in region.reads() and made[0] not in _through_memory(region, total).reads()
    return _Norm(region, axis, total, normed, made[0]) if goes_through_total else None


def _alternatives_of_parts(before: Step, norm: Step, uses: Counter[str], lowered: Lowered) -> Alternatives | None:
    """A product of one row and its norm, and the product in parts, which the norm adds up."""
    if not isinstance(norm, Region) or norm.device.type != "cuda":
        return None
    product = _as_region(before, lowered)
    if product is None or any(uses[name] != 1 for name in product.writes()):
        return None
    found = in_parts(product, norm)
    if found is None or any(set(r.reads()) & set(r.writes()) for r in found):
        return None
    views = {s.name: s for s in lowered.steps if isinstance(s, Alias)}
    named = [n for n in refs((before.args, before.kwargs)) if n in views] if isinstance(before, Call) else []
    assert isinstance(before, (Region, Call))
    ways = (Way(APART, (before, norm)), Way(SUMMED, found))
    own = before.buffers if isinstance(before, Region) else {}
    buffers = {**own, **product.buffers, **norm.buffers, **found[0].buffers, **found[1].buffers}
    buffers |= {n: lowered.buffers[n] for n in _memory(before, views)}
    return Alternatives(f"{norm.name}.norm", ways, buffers, tuple(views[n] for n in dict.fromkeys(named)))


def _memory(step: Step, views: dict[str, Alias]) -> Iterator[str]:
    """The buffers that a call touches."""
    if isinstance(step, Call):
        for name in (*refs((step.args, step.kwargs)), *(n for n in step.outputs if n is not None)):
            yield base_of(name, views)


def _as_region(step: Step, lowered: Lowered) -> Region | None:
    """`step` as a region if it is the library's product of one row, or a region already."""
    if isinstance(step, Region):
        return step
    if isinstance(step, Call):
        views = {s.name: s for s in lowered.steps if isinstance(s, Alias)}
        product = find_product(step, lowered.buffers, views)
        if product is None or product.quantized is not None or product.scales or product.sizes[1] != 1:
            return None
        if not in_loops(product) or lowered.buffers[product.result.buffer].dtype not in _HALF:
            return None
        return as_reduction(Epilogues(lowered.buffers, lowered.buffers).alone(product))
    return None


def _lone_norm(region: Region) -> _Norm | None:
    """`region` as a norm of a row that is in memory, if it stores nothing else."""
    nest = region.nest
    if nest.points or len(nest.reduced) != 1 or len(nest.stores) != 1:
        return None
    (axis,), (normed,) = nest.reduced, nest.stores
    if not isinstance(axis.size, int) or axis.size > LARGEST_ROW or any(load.indirect for load in nest.loads()):
        return None
    if normed.mode != "set" or normed.indirect or normed.index != symbol(axis) or normed.buffer in region.reads():
        return None
    nodes = list(postorder(normed.roots))
    is_norm = any(isinstance(n, Reduce) for n in nodes) and not any(isinstance(n, Scan) for n in nodes)
    return _Norm(region, axis, None, normed, "") if is_norm else None


def _through_memory(region: Region, total: Store) -> Nest:
    """The rest of `region` with the value of `total` read from where it is stored, as eager reads it."""
    value = total.value
    wide = value.args[0] if value.args and value.args[0].dtype.itemsize > value.dtype.itemsize else value
    stored = Load(total.buffer, total.index, value.dtype)
    images = {value: stored, wide: cast(stored, wide.dtype)}
    stores = (s.transformed({}, lambda v: replaced_in(v, images)) for s in region.nest.stores if s is not total)
    return replace(region.nest, stores=tuple(stores))


def _with_residual(step: Region | Contraction, norm: _Norm) -> Region | Contraction | None:
    """`step`, a product, that stores the norm's operand instead of what is added to it."""
    if isinstance(step, Contraction):
        return _contraction_with_residual(step, norm)
    product = without_points_of_one(step)
    nest, total = product.nest, norm.total
    assert total is not None
    if len(nest.points) != 1 or len(nest.stores) != 1 or not nest.reduced:
        return None
    (store,), (point,) = nest.stores, nest.points
    if (store.buffer, store.mode, store.indirect, store.index) != (norm.added, "set", (), symbol(point)):
        return None
    if point.size != norm.axis.size or total.buffer in product.reads():
        return None
    new = replace(store, buffer=total.buffer, value=_total_at(norm, store, point))
    buffers = {**product.buffers, **norm.region.buffers}
    return _named(with_nests(replace(product, buffers=buffers), replace(nest, stores=(new,)), None), product, norm)


def _total_at(norm: _Norm, store: Store, point: Sym) -> Scalar:
    """What the norm's operand is at `point`, where a product would have its `store`."""
    assert norm.total is not None
    value = rounded(store.value)

    def computed(load: Load) -> Scalar | None:
        return cast(value, load.dtype) if load.buffer == norm.added else None

    return transform(norm.total.value, {norm.axis: symbol(point)}, computed)


def _contraction_with_residual(product: Contraction, norm: _Norm) -> Contraction | None:
    nest, total, (batch, row, column) = product.region.nest, norm.total, product.axes
    assert total is not None
    if batch is not None or row.size != 1 or len(nest.stores) != 1 or product.ends:
        return None
    (store,) = nest.stores
    place = substitute(store.index, {row: 0})
    if (store.buffer, store.mode, store.indirect, place) != (norm.added, "set", (), symbol(column)):
        return None
    if column.size != norm.axis.size or total.buffer in product.reads():
        return None
    new = replace(store, buffer=total.buffer, value=_total_at(norm, store, column))
    region = replace(product.region, nest=replace(nest, stores=(new,)))
    return _contraction_named(replace(product, region=region), norm)


def _contraction_with_norm(product: Contraction, norm: _Norm) -> Contraction | None:
    """`product` whose programs compute the norm for themselves, if they may hold its row in registers: a power of two."""
    a, length = product.a, norm.axis.size
    assert isinstance(length, int)
    if not isinstance(a, Matrix) or product.b.row != 1 or product.row is not None or length & (length - 1):
        return None
    if a.buffer != norm.normed.buffer or a.buffer in product.region.reads() or product.sizes[:3] != (1, 1, length):
        return None
    if (a.offset, a.column) != (0, 1) or set(norm.rest.reads()) & set(product.writes()):
        return None
    return _contraction_named(replace(product, row=norm.rest), norm)


def _contraction_named(product: Contraction, norm: _Norm) -> Contraction:
    """`product`, changed to have part of the norm, with what it touches and its origins."""
    specs = {**norm.region.buffers, **product.buffers, **product.region.buffers}
    nodes, origins = (tuple(dict.fromkeys(a + b)) for a, b in _parts(norm.region, product.region))
    own = {*product.region.reads(), *product.region.writes()}
    region = replace(product.region, buffers={n: s for n, s in specs.items() if n in own}, nodes=nodes, origins=origins)
    touched = {*product.reads(), *product.writes()}
    buffers = {n: s for n, s in specs.items() if n in touched}
    return replace(product, name=f"{product.name}.{norm.region.name}", region=region, buffers=buffers)


def _with_norm(step: Region | Contraction, norm: _Norm) -> Region | Contraction | None:
    """`step`, a product, that computes the norm from its operand; None unless it sums exactly along the row."""
    if isinstance(step, Contraction):
        return _contraction_with_norm(step, norm)
    product = without_points_of_one(step)
    loads = [n for n in product.nest.loads() if n.buffer == norm.normed.buffer]
    if len(product.nest.reduced) != 1 or product.nest.reduced[0].size != norm.axis.size or len(loads) != 1:
        return None
    rest = norm.rest
    if loads[0].index != symbol(product.nest.reduced[0]) or set(rest.reads()) & set(product.writes()):
        return None
    new = with_value(product, rest.nest.stores[0], rest)
    if new is None or len(list(postorder(new.nest.roots))) > MAX_NODES:
        return None
    return _named(new, product, norm)


def _named(region: Region, product: Region, norm: _Norm) -> Region:
    nodes, origins = (tuple(dict.fromkeys(a + b)) for a, b in _parts(norm.region, product))
    return replace(region, name=f"{product.name}.{norm.region.name}", nodes=nodes, origins=origins)


def _parts(one: Region, other: Region) -> tuple[tuple[tuple[str, ...], tuple[str, ...]], ...]:
    return (one.nodes, other.nodes), (one.origins, other.origins)
