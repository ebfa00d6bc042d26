"""Attention written out, after scheduling: two products with a softmax between them, whatever else is done to the scores.

What a pass before autograd has left alone (`passes/hand_attention`) because no fused kernel of a library computes it: capped
scores, masks more precise than the products, fills that may not hide. The scores are loop IR, so kernels of ours compute
them where the product still is in registers.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import torch

from fxopt.ir.exprs import Int, Sym, add, mul, symbol
from fxopt.ir.loops import Load, Nest, Op, Reduce, Scalar, Scan, Store, postorder, transform
from fxopt.ir.region import Alias, Attention, Batch, BufferSpec, Call, Matrix, Ref, Region, Scores, Step, Strided, refs
from fxopt.lower.align import mappings
from fxopt.lower.joining import remap
from fxopt.lower.lowering import Lowered
from fxopt.lower.products import Product, find_product

RESULT = "scores"
RANDOM = frozenset({"rand", "randn", "randint", "checked_index"})
"""What may not be computed twice, or on made-up data."""


@dataclass(frozen=True)
class WrittenOut:
    """`step` computes what the steps number `first` (a product), `softmax` (a region) and `second` (a product) do."""

    first: int
    softmax: int
    second: int
    step: Attention


def find_written_attention(lowered: Lowered) -> Iterator[WrittenOut]:
    """Every one in a schedule, in order. Nobody else reads scores or probabilities."""
    search = _Search(lowered)
    for k, step in enumerate(lowered.steps):
        found = search.around(k, step) if isinstance(step, Region) else None
        if found is not None:
            yield found


class _Search:
    def __init__(self, lowered: Lowered) -> None:
        self.steps, self.buffers = lowered.steps, lowered.buffers
        self.views = {s.name: s for s in lowered.steps if isinstance(s, Alias)}
        kept = {self._root(o.name) for o in lowered.outputs if isinstance(o, Ref)}
        self.makers: dict[str, int] = {}
        self.readers: dict[str, list[int]] = {name: [-1] for name in kept}
        for k, step in enumerate(lowered.steps):
            if isinstance(step, Call):
                self.makers |= {name: k for name in step.outputs if name is not None}
            for name in self._reads(step):
                self.readers.setdefault(name, []).append(k)

    def around(self, softmax: int, region: Region) -> WrittenOut | None:
        """The attention whose probabilities `region`, step number `softmax`, computes."""
        x = scores_of(region.nest)
        if x is None or region.device.type != "cuda" or region.across is not None:
            return None
        probabilities = region.nest.stores[0].buffer
        second = self._only_reader(probabilities)
        after = None if second is None else self._product(second)
        if second is None or after is None or after.a.buffer != probabilities or after.addend is not None:
            return None
        for name in dict.fromkeys(n.buffer for n in postorder((x,)) if isinstance(n, Load)):
            first = self.makers.get(name)
            before = None if first is None or self._only_reader(name) != softmax else self._product(first)
            if first is None or before is None or self._is_written_between(first, second, (softmax,)):
                continue
            step = self._step(before, region, after)
            if step is not None:
                return WrittenOut(first, softmax, second, step)
        return None

    def _step(self, before: Product, region: Region, after: Product) -> Attention | None:
        z, m, n = before.axes
        (batch, rows, width, keys), values = before.sizes, after.sizes[3]
        if after.sizes[:3] != (batch, rows, keys):
            return None
        product = f"{before.result.buffer}.product"
        dtype = self.buffers[before.result.buffer].dtype
        own = Nest(tuple(s for s in (z, m) if s is not None), (n,), (Store(before.result.buffer, before.index, _ZERO),))
        for mapping in mappings(region.nest, own):
            nest = remap(region.nest, mapping, own)
            x = scores_of(nest)
            if x is None or nest.stores[0].index != _at(after.a, before.axes):
                continue
            loads = [v for v in postorder((x,)) if isinstance(v, Load) and v.buffer == before.result.buffer]
            if any(v.index != before.index or v.indirect for v in loads):
                continue
            scores = self._scores(before, product, _with_value(x, before, before.value(product, dtype)), region)
            operands = (
                _strided(before.a, batch, rows, width, transposed=False),
                _strided(before.b, batch, keys, width, transposed=True),
                _strided(after.b, batch, keys, values, transposed=False),
                _strided(after.result, batch, rows, values, transposed=False),
            )
            query, key, value_operand, out = operands
            if query is None or key is None or value_operand is None or out is None:
                return None
            named = (*(o.buffer for o in operands if o is not None), *scores.reads())
            buffers = {name: self.buffers[name] for name in named}
            origins = (before.call.origin, *region.origins, after.call.origin)
            return Attention(region.name, query, key, value_operand, None, out, False, 1.0, buffers, origins, scores)
        return None

    def _scores(self, before: Product, product: str, value: Scalar, region: Region) -> Scores:
        result = replace(self.buffers[before.result.buffer], name=RESULT, dtype=torch.float32)
        nest = Nest(before.points, (), (Store(RESULT, before.index, value),))
        specs: dict[str, BufferSpec] = {name: self.buffers[name] for name in nest.reads() if name != product}
        specs |= {RESULT: result, product: replace(self.buffers[before.result.buffer], name=product)}
        return Scores(before.axes, product, Region(RESULT, nest, specs, region.device))

    # ------------------------------------------------------------------ which step touches what

    def _root(self, name: str) -> str:
        while name in self.views:
            name = self.views[name].of
        return name

    def _reads(self, step: Step) -> set[str]:
        if isinstance(step, Region | Batch):
            return set(map(self._root, step.reads()))
        return {self._root(n) for n in refs((step.args, step.kwargs))} if isinstance(step, Call) else set()

    def _writes(self, step: Step) -> set[str]:
        if isinstance(step, Region | Batch):
            return set(map(self._root, step.writes()))
        return set(map(self._root, step.writes)) if isinstance(step, Call) else set()

    def _only_reader(self, name: str) -> int | None:
        readers = self.readers.get(name, [])
        return readers[0] if len(readers) == 1 and readers[0] >= 0 else None

    def _product(self, k: int) -> Product | None:
        step = self.steps[k]
        return find_product(step, self.buffers, self.views) if isinstance(step, Call) else None

    def _is_written_between(self, first: int, second: int, apart: Sequence[int]) -> bool:
        """Whether a step writes what those at `first` and `apart` read, before `second`, where all will be read."""
        read = {n for k in (first, *apart) for n in self._reads(self.steps[k])}
        between = (k for k in range(first + 1, second) if k not in apart)
        return any(self._writes(self.steps[k]) & read for k in between)


_ZERO = Load("", 0, torch.float32)


def _with_value(x: Scalar, product: Product, value: Scalar) -> Scalar:
    """`x` with `value` in the place of the product's element."""
    return transform(x, {}, lambda load: value if load.buffer == product.result.buffer else None)


def scores_of(nest: Nest) -> Scalar | None:
    """The x of a nest that only stores softmax(x) over what it reduces, x in float32; None for any other nest."""
    if len(nest.stores) != 1 or not nest.reduced or nest.stores[0].mode != "set" or nest.stores[0].indirect:
        return None
    value: Scalar = nest.stores[0].value
    if isinstance(value, Op) and value.name == "cast":
        value = value.args[0]
    if not isinstance(value, Op) or value.name != "truediv":
        return None
    exponential, total = value.args
    if not isinstance(exponential, Op) or exponential.name != "exp":
        return None
    difference = exponential.args[0]
    if not isinstance(difference, Op) or difference.name != "sub":
        return None
    x, top = difference.args
    if not isinstance(top, Reduce) or not isinstance(total, Reduce) or x.dtype != torch.float32:
        return None
    together = (top.kind, total.kind, top.output, total.output) == ("softmax_stats", "softmax_stats", 0, 1)
    apart = (top.kind, total.kind) == ("max", "sum") and total.operands == (exponential,)
    if not ((together and total.operands == (x,)) or apart) or top.operands != (x,):
        return None
    over_all = frozenset(nest.reduced)
    inner = [n for n in postorder((x,)) if isinstance(n, Reduce | Scan) or (isinstance(n, Op) and n.name in RANDOM)]
    return None if inner or {*top.axes} != over_all or {*total.axes} != over_all else x


def _at(matrix: Matrix, axes: tuple[Sym | None, Sym, Sym]) -> Int:
    out = matrix.offset
    for sym, stride in zip(axes, (matrix.batch, matrix.row, matrix.column), strict=True):
        out = out if sym is None else add(out, mul(symbol(sym), stride))
    return out


def _strided(matrix: Matrix, batch: int, rows: int, width: int, *, transposed: bool) -> Strided | None:
    """A batch of matrices as a tensor [1, batch, rows, width]; None where something of it is symbolic."""
    row, column = (matrix.column, matrix.row) if transposed else (matrix.row, matrix.column)
    known = [n for n in (matrix.batch, row, column, matrix.offset) if isinstance(n, int)]
    return Strided(matrix.buffer, (1, batch, rows, width), (0, *known[:3]), known[3]) if len(known) == 4 else None
