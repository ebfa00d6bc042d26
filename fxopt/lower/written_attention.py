"""Attention written out, after scheduling: two products with a softmax between them, whatever else is done to the scores.

What a pass before autograd has left alone (`passes/hand_attention`) because no fused kernel of a library computes it: capped
scores, masks more precise than the products, fills that may not hide. The scores are loop IR, so kernels of ours compute
them where the product still is in registers; heads and groups of heads are read where they lie (`copies.py`).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace

import torch

from fxopt.ir.exprs import Int, Sym, add, mul, symbol
from fxopt.ir.loops import Load, Nest, Op, Reduce, Scalar, Scan, Store, postorder, transform
from fxopt.ir.region import Attention, Call, Matrix, Region, Scores, Strided
from fxopt.lower.align import mappings
from fxopt.lower.copies import Copy, Matrices, copies_of
from fxopt.lower.joining import remap
from fxopt.lower.lowering import Lowered
from fxopt.lower.products import Product, find_product
from fxopt.lower.uses import Uses

RESULT = "scores"
RANDOM = frozenset({"rand", "randn", "randint", "checked_index"})
"""What may not be computed twice, or on made-up data."""


@dataclass(frozen=True)
class WrittenOut:
    """`step` computes what the steps number `steps` do, in order: two products with a softmax between them, and copies of
    their operands and of the result that nobody else reads. All of them may run where the last one is."""

    steps: tuple[int, ...]
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
        self.uses = Uses(lowered)
        self.makers: dict[str, int] = {}
        for k, step in enumerate(lowered.steps):
            if isinstance(step, Call):
                self.makers |= {name: k for name in step.outputs if name is not None}

    def around(self, softmax: int, region: Region) -> WrittenOut | None:
        """The attention whose probabilities `region`, step number `softmax`, computes."""
        x = scores_of(region.nest)
        if x is None or region.device.type != "cuda" or region.across is not None:
            return None
        probabilities = region.nest.stores[0].buffer
        second = self.uses.only_reader(probabilities)
        after = None if second is None else self._product(second)
        if second is None or after is None or after.a.buffer != probabilities or after.addend is not None:
            return None
        for name in dict.fromkeys(n.buffer for n in postorder((x,)) if isinstance(n, Load)):
            first = self.makers.get(name)
            before = None if first is None or self.uses.only_reader(name) != softmax else self._product(first)
            scores = None if before is None else self._scores(before, region, after)
            if first is not None and before is not None and scores is not None:
                return self._whole((first, softmax, second), before, scores, after)
        return None

    def _scores(self, before: Product, region: Region, after: Product) -> Scores | None:
        """What `region` makes the softmax of, in terms of the product before; None unless it is in step with both."""
        if after.sizes[:3] != (before.sizes[0], before.sizes[1], before.sizes[3]):
            return None
        assert isinstance(after.a, Matrix)
        name, product = before.result.buffer, f"{before.result.buffer}.product"
        own = Nest(tuple(s for s in before.axes[:2] if s is not None), before.axes[2:], (Store(name, before.index, _ZERO),))
        for mapping in mappings(region.nest, own):
            nest = remap(region.nest, mapping, own)
            x = scores_of(nest)
            if x is None or nest.stores[0].index != _at(after.a, before.axes):
                continue
            loads = [v for v in postorder((x,)) if isinstance(v, Load) and v.buffer == name]
            if any(v.index != before.index or v.indirect for v in loads):
                continue
            result = self.buffers[name]
            value = _with_value(x, before, before.value(product, result.dtype))
            made = Nest(before.points, (), (Store(RESULT, before.index, value),))
            specs = {n: self.buffers[n] for n in made.reads() if n != product}
            specs |= {RESULT: replace(result, name=RESULT, dtype=torch.float32), product: replace(result, name=product)}
            return Scores(before.axes, product, Region(RESULT, made, specs, region.device))
        return None

    def _whole(self, steps: tuple[int, ...], before: Product, scores: Scores, after: Product) -> WrittenOut | None:
        batch, rows, width, keys = before.sizes
        values = after.sizes[3]
        assert isinstance(rows, int)
        shapes = {"query": (rows, width), "key": (keys, width), "value": (keys, values), "out": (rows, values)}
        b = before.b
        assert isinstance(before.a, Matrix)
        given = {"query": before.a, "key": replace(b, row=b.column, column=b.row), "value": after.b, "out": after.result}
        plain = {n: m for n, x in given.items() if (m := Matrices.of(x, batch)) is not None}
        if len(plain) < len(given):
            return None
        seen, copied = dict(plain), set[int]()
        for name, matrices in plain.items():
            made = self._copy_of_result(matrices.buffer) if name == "out" else self.uses.copies.get(matrices.buffer)
            reader = {"query": steps[0], "key": steps[0], "value": steps[2]}.get(name)
            if made is None or (reader is not None and made[0] > reader):
                continue
            through = matrices.through(made[1], *shapes[name])
            if through is not None:
                seen[name] = through
                copied.add(made[0])
        for tensors in (seen, plain):
            strided = _in_heads(tensors, shapes, batch)
            if strided is None:
                continue
            parts = sorted({*steps, *(copied if tensors is seen else ())})
            parts = [k for k in parts if k in steps or self.uses.is_for(k, parts)]
            read = {*parts, *(copied if tensors is seen else ())}
            if not any(self.uses.is_written_over(k, parts) for k in read):
                return WrittenOut(tuple(parts), self._attention(steps[1], strided, scores))
        return None

    def _attention(self, softmax: int, tensors: Mapping[str, Strided], scores: Scores) -> Attention:
        region = self.steps[softmax]
        assert isinstance(region, Region)
        named = (*(x.buffer for x in tensors.values()), *scores.reads())
        buffers = {name: self.buffers[name] for name in named}
        query, key, value, out = (tensors[name] for name in ("query", "key", "value", "out"))
        return Attention(region.name, query, key, value, None, out, False, 1.0, buffers, region.origins, scores)

    # ------------------------------------------------------------------ which step is what

    def _product(self, k: int) -> Product | None:
        """The product of matrices of known sizes that step k is."""
        step = self.steps[k]
        found = find_product(step, self.buffers, self.uses.views) if isinstance(step, Call) else None
        static = found is not None and isinstance(found.a, Matrix) and isinstance(found.sizes[1], int)
        return found if static and found is not None and not found.ends else None

    def _copy_of_result(self, name: str) -> tuple[int, Copy] | None:
        """The step that does nothing but copy the result `name`, its only reader, and that copy from the result's side."""
        reader = self.uses.only_reader(name)
        region = None if reader is None else self.steps[reader]
        copies = copies_of(region) if isinstance(region, Region) else None
        if reader is None or copies is None or len(copies) != 1:
            return None
        return reader, copies[0].turned()


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


def _in_heads(
    tensors: Mapping[str, Matrices], shapes: Mapping[str, tuple[int, int]], count: int
) -> dict[str, Strided] | None:
    """The matrices as tensors [B, H, S, E] (query), [B, G, T, E] (key), [B, G, T, Ev] (value) and [B, H, S, Ev] (out), with
    the most heads to a group that they have in memory; None where no B and G are right for all."""
    groups = dict.fromkeys([*(d[0] for d in tensors["key"].dims[-1:] if d[1] == 0), 1])
    batches = dict.fromkeys([*(x.dims[0][0] for x in tensors.values() if x.dims), 1, count])
    for group in groups:
        for batch in batches:
            if count % (batch * group):
                continue
            heads = count // batch
            out: dict[str, Strided] = {}
            for name, x in tensors.items():
                shared = name in ("key", "value")
                strides = x.split(batch, heads // group, group) if shared else x.split(batch, heads)
                if strides is None or (shared and strides[2] != 0 and group > 1):
                    break
                shape = (batch, heads // group if shared else heads, *shapes[name])
                out[name] = Strided(x.buffer, shape, (*strides[:2], x.row, x.column), x.offset)
            if len(out) == len(tensors):
                return out
    return None
