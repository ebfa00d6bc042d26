"""Products and what is computed from them, as one kernel or as library call and kernel apart: the tuner decides.

A region over a product's result that does not reduce can be computed where the product still is in registers: then the
result is neither written nor read again, unless others want it. `with_contractions` finds such pairs in a schedule.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

import torch

from fxopt.ir.exprs import Int, Sym, add, coefficient, mul, prod, ravel, symbol, unravel
from fxopt.ir.loops import Load, Nest, Op, Reduce, Store, postorder
from fxopt.ir.region import Alias, Alternatives, Batch, Call, Contraction, Matrix, Ref, Region, Step, Way, refs
from fxopt.lower.align import Mapping, mappings
from fxopt.lower.joining import combine, remap, with_nests
from fxopt.lower.lowering import Lowered
from fxopt.lower.products import Product, find_product
from fxopt.lower.values import cast

NAME = "contractions"
"""What switches this off (FXOPT_DISABLE) and heads its notes."""

LIBRARY, FUSED, ROW = "library", "fused", "row"
FEW_ROWS = 64
"""Products of no more rows are bound by memory, where a kernel of ours may beat the library even without an epilogue."""

_DTYPES = (torch.float16, torch.bfloat16)


def with_contractions(lowered: Lowered, every: bool = False) -> Lowered:
    """`lowered`, already scheduled, with `Alternatives` for products on a GPU that a kernel of ours may do faster: those
    with an epilogue and those of few rows, or `every` one.
    """
    return _Search(lowered, every).run()


class _Search:
    def __init__(self, lowered: Lowered, every: bool) -> None:
        self.lowered, self.every = lowered, every
        self.steps: list[Step | None] = list(lowered.steps)
        self.views = {s.name: s for s in lowered.steps if isinstance(s, Alias)}
        self.kept = {self._root(o.name) for o in lowered.outputs if isinstance(o, Ref)} | set(lowered.inputs)
        self.accesses = [self._accesses(s) for s in lowered.steps]

    def run(self) -> Lowered:
        for k, step in enumerate(self.lowered.steps):
            product = find_product(step, self.lowered.buffers, self.views) if isinstance(step, Call) else None
            if product is None or not self._is_eligible(product) or self._fuse(k, product):
                continue
            if self.every or product.sizes[1] <= FEW_ROWS:
                self.steps[k] = self._alternatives(product, None, self._alone(product))
        return replace(self.lowered, steps=[s for s in self.steps if s is not None])

    def _is_eligible(self, product: Product) -> bool:
        operands = [self.lowered.buffers[m.buffer] for m in (product.a, product.b, product.result)]
        if any(s.device.type != "cuda" for s in operands):
            return False
        return operands[0].dtype in _DTYPES and all(s.dtype == operands[0].dtype for s in operands)

    def _fuse(self, k: int, product: Product) -> bool:
        """Put alternatives in the place of product `k` and the first region that can take it as an epilogue, if any."""
        name = product.result.buffer
        for j in range(k + 1, len(self.steps)):
            region = self.steps[j]
            if not isinstance(region, Region) or name not in self.accesses[j][0]:
                continue
            place = self._place(k, j, name)
            found = None if place is None else self._contraction(product, region, self._is_wanted(name, k, j))
            if found is not None and place is not None:
                self.steps[k] = self.steps[j] = None
                self.steps[place] = self._alternatives(product, region, found)
                self.accesses[k] = self.accesses[j] = (frozenset(), frozenset())
                self.accesses[place] = self._accesses(self.lowered.steps[k], region)
                return True
        return False

    def _place(self, k: int, j: int, name: str) -> int | None:
        """Where product `k` and region `j` can run as one step: at `j`, if nothing between them waits for the product, or at
        `k`, if the region waits for nothing between."""
        between = [self.accesses[i] for i in range(k + 1, j) if self.steps[i] is not None]
        own_reads, own_writes = self.accesses[k]
        if not any(own_writes & (r | w) or own_reads & w for r, w in between):
            return j
        reads, writes = self.accesses[j]
        return None if any(writes & (r | w) or (reads - {name}) & w for r, w in between) else k

    def _is_wanted(self, name: str, k: int, j: int) -> bool:
        """Whether the product is read by others than region `j`."""
        if name in self.kept:
            return True
        return any(name in self.accesses[i][0] for i, s in enumerate(self.steps) if s is not None and i not in (k, j))

    def _contraction(self, product: Product, region: Region, wanted: bool) -> Contraction | None:
        """`product` with `region` as its epilogue, which stores the product as well where it is `wanted`."""
        buffers, name = self.lowered.buffers, product.result.buffer
        nest = region.nest
        if region.across is not None or nest.reduced or region.device != buffers[name].device or not _is_plain(nest):
            return None
        if {product.a.buffer, product.b.buffer} & set(region.writes()):  # other programs still read them
            return None
        own = self._alone(product)
        for mapping in (*mappings(nest, own.region.nest), *_in_memory_order(nest, own.region.nest, name)):
            joined = combine(own.region.nest, remap(nest, mapping, own.region.nest))
            if joined is None or any(load.index != product.index for load in joined.loads() if load.buffer == own.result):
                continue
            if not wanted:
                joined = replace(joined, stores=tuple(s for s in joined.stores if s.buffer != name))
            both = replace(
                own.region,
                name=region.name,
                buffers=own.region.buffers | region.buffers,
                nodes=tuple(dict.fromkeys((*own.region.nodes, *region.nodes))),
                origins=tuple(dict.fromkeys((*own.origins, *region.origins))),
            )
            return self._with_epilogue(product, own.result, with_nests(both, joined, None))
        return None

    def _alone(self, product: Product) -> Contraction:
        """`product` with nothing but its own store."""
        buffers, name = self.lowered.buffers, product.result.buffer
        registers = f"{name}.product"
        value = product.value(registers, buffers[name].dtype)
        nest = Nest(product.points, (), (Store(name, product.index, value),))
        specs = {n: buffers[n] for n in (*nest.reads(), name) if n in buffers}
        specs[registers] = replace(buffers[name], name=registers)
        region = Region(f"{name}.gemm", nest, specs, buffers[name].device, (), (product.call.origin,))
        return self._with_epilogue(product, registers, region)

    def _with_epilogue(self, product: Product, registers: str, region: Region) -> Contraction:
        touched = region.buffers | {m.buffer: self.lowered.buffers[m.buffer] for m in (product.a, product.b)}
        del touched[registers]
        depth = product.sizes[2]
        return Contraction(region.name, product.a, product.b, depth, registers, product.axes, region, touched)

    def _alternatives(self, product: Product, region: Region | None, fused: Contraction) -> Alternatives:
        call = product.call
        views = tuple(self.views[n] for n in dict.fromkeys(refs(call.args)) if n in self.views)
        names = [
            *(region.buffers if region else ()),
            *fused.buffers,
            product.result.buffer,
            *map(self._root, refs(call.args)),
        ]
        buffers = {n: self.lowered.buffers[n] for n in dict.fromkeys(names)}
        ways = [Way(LIBRARY, (call, region) if region else (call,)), Way(FUSED, (fused,))]
        if product.sizes[:2] == (1, 1):
            ways.append(Way(ROW, (as_reduction(fused),)))
        return Alternatives(fused.name, tuple(ways), buffers, views)

    # ------------------------------------------------------------------ which step touches what

    def _root(self, name: str) -> str:
        while name in self.views:
            name = self.views[name].of
        return name

    def _accesses(self, *steps: Step) -> tuple[frozenset[str], frozenset[str]]:
        """(base buffers read, base buffers written)."""
        reads: set[str] = set()
        writes: set[str] = set()
        for step in steps:
            if isinstance(step, Alias):  # which comes after what makes its memory
                reads.add(self._root(step.of))
            elif isinstance(step, Region | Batch):
                reads |= {self._root(n) for n in step.reads()}
                writes |= {self._root(n) for n in step.writes()}
            elif isinstance(step, Call):
                reads |= {self._root(n) for n in refs((step.args, step.kwargs))}
                writes |= {self._root(n) for n in (*step.outputs, *step.writes) if n is not None}
        return frozenset(reads), frozenset(writes)


def _is_plain(nest: Nest) -> bool:
    """Whether every store is an ordinary one and no index is checked: a failing check would end the context while
    candidates are measured on made-up data."""
    if any(s.mode != "set" or s.indirect for s in nest.stores):
        return False
    return not any(isinstance(n, Op) and n.name == "checked_index" for n in postorder(nest.roots))


def _in_memory_order(nest: Nest, target: Nest, name: str) -> Iterator[Mapping]:
    """The loops of `nest` as those of `target`, a product, by how they walk through its memory `name`: heads that are taken
    out of a row and permuted, say."""
    first = next(load for load in nest.loads() if load.buffer == name)
    strides = {s: coefficient(first.index, s) for s in nest.points}
    known = [(stride, s) for s, stride in strides.items() if isinstance(stride, int) and isinstance(s.size, int)]
    if len(known) < len(strides):
        return
    ordered = [s for _, s in sorted(known, key=lambda each: each[0], reverse=True)]
    sizes, own = tuple(s.size or 0 for s in ordered), tuple(s.size or 0 for s in target.points)
    if prod(sizes) == prod(own):
        linear = ravel(tuple(symbol(s) for s in target.points), own)
        yield dict(zip(ordered, unravel(linear, sizes), strict=True))


def as_reduction(contraction: Contraction) -> Region:
    """A product of one row as a region that reduces: every element of `b` is read once."""
    k = Sym("r3", size=contraction.depth)
    batch, row, column = contraction.axes
    a, b = contraction.a, contraction.b
    left = Load(a.buffer, _at(a, batch, symbol(row), symbol(k)), contraction.buffers[a.buffer].dtype)
    right = Load(b.buffer, _at(b, batch, symbol(k), symbol(column)), contraction.buffers[b.buffer].dtype)
    each = Op("mul", (cast(left, torch.float32), cast(right, torch.float32)), torch.float32)
    operands = {m.buffer: contraction.buffers[m.buffer] for m in (a, b)}
    return contraction.reduced(f"{contraction.name}.row", Reduce("sum", (each,), (k,), torch.float32), operands)


def _at(matrix: Matrix, batch: Sym | None, row: Int, column: Int) -> Int:
    out = add(matrix.offset, add(mul(row, matrix.row), mul(column, matrix.column)))
    return out if batch is None else add(out, mul(symbol(batch), matrix.batch))


def replaced(lowered: Lowered, kept: dict[str, Way]) -> Lowered:
    """`lowered` with the steps of the way in `kept` (by name) in the place of each `Alternatives`, and without views that no
    step names any more."""
    steps: list[Step] = []
    for step in lowered.steps:
        steps += kept[step.name].steps if isinstance(step, Alternatives) else [step]
    named = {o.name for o in lowered.outputs if isinstance(o, Ref)}
    live: list[Step] = []
    for step in reversed(steps):
        if isinstance(step, Alias):
            if step.name not in named:
                continue
            named.add(step.of)
        elif isinstance(step, Call):
            named |= set(refs((step.args, step.kwargs)))
        else:
            named |= set(step.reads())  # type: ignore[union-attr]  # no Alternatives are left
        live.append(step)
    return replace(lowered, steps=live[::-1])
