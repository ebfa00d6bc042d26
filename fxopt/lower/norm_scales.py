"""Norms before products of many rows: stored as they are, or as one factor for each row, which the products' epilogues have.

What an RMS norm makes of row i is `x[i] * scale[i] * weight`, and a product with it `(x @ (weight * W)) * scale[:, None]`.
Where the weights are frozen, their product is a constant. Then the kernel that adds up a row's squares stores one number and
no row, and the products read x, which is there anyway. Float32 sums are scaled before they are rounded, so nothing overflows
that does not in eager: hence templates only, a library's result is rounded. The norm and all products of its rows are one
contest, after it is known what runs these.

Terms of a sum are as exact as eager's: there a row's elements are rounded, here the weight's. What float16 cannot hold is
multiplied by a power of two, which the factor of a row has the inverse of; where that is not enough, the norm stays.
"""

from __future__ import annotations

import functools
import math
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

import torch

from fxopt.ir.exprs import Int, mod, symbol
from fxopt.ir.loops import Store
from fxopt.ir.region import Alias, Alternatives, BufferSpec, Call, Contraction, Matrix, Region, Step, Way, base_of, refs
from fxopt.lower.channel_sums import constant_along
from fxopt.lower.cost import nbytes
from fxopt.lower.epilogues import Epilogues
from fxopt.lower.lowering import Lowered
from fxopt.lower.norm_factors import Norm, factor_at, find_norm, in_parts, rows_of, times, with_factor, with_scale
from fxopt.lower.placement import Placement
from fxopt.lower.products import QUANTIZED, Product, find_product

NAME = "norm-scales"
"""What `Options.disable` calls them."""

STORED, SCALED, SUMMED = "norm-stored", "norm-scaled", "norm-summed"
SCALED_FUSED, SUMMED_FUSED = f"{SCALED}-fused", f"{SUMMED}-fused"
"""Labels of ways: `SUMMED` with sums by the product before, fused ones with what is after the next as its epilogue."""

LEAST_BYTES = 2 << 20
"""Of a norm that is worth a contest: smaller ones do not leave the L2 cache."""

MOST_COLUMNS = 8192
"""Of all products of a norm: those of more take so long that what the norm costs is within the noise of measuring. Of 6144
columns and rows of 4096 it is 3 % (an H200)."""

MOST_COLUMNS_OF_TWO = 32768
"""The same where a product before, whose inner dimension counts as well, saves a kernel that reads and writes the rows."""

_LARGEST, _SHIFT = 2.0**15, 8
"""Elements of a folded weight in float16 are no larger, times 2 ** `_SHIFT` where that lets them."""


@dataclass(frozen=True)
class Fold:
    """The constant `weight`, a matrix with as many elements along `dim` as `factor` (float64) has, times this."""

    weight: str
    factor: torch.Tensor
    dim: int

    def value(self, constants: Mapping[str, torch.Tensor]) -> torch.Tensor:
        """The product, rounded once, in the layout of the weight."""
        weight = constants[self.weight].detach()
        out = torch.empty_strided(weight.shape, weight.stride(), dtype=weight.dtype, device=weight.device)
        factor, other = self.factor if self.dim else self.factor[:, None], 1 - self.dim
        step = max(1, _AT_ONCE // weight.shape[self.dim])
        for first in range(0, weight.shape[other], step):
            part = weight.narrow(other, first, min(step, weight.shape[other] - first))
            out.narrow(other, first, part.shape[other]).copy_(part.double() * factor)
        return out


_AT_ONCE = 1 << 24
"""Elements of a weight that are in float64 at a time."""


@dataclass(frozen=True)
class _Reader:
    """Step `step` reads the norm's rows: as `alone` of it and, with the step after it that takes its result, `fused`."""

    step: int
    alone: Contraction
    after: int | None = None
    fused: Contraction | None = None


@dataclass(frozen=True)
class _Summed:
    """Step `step`, a product, that also stores what the norm is of and parts of the sums, which `scale` makes factors of."""

    step: int
    product: Contraction
    scale: Region


def with_norm_scales(lowered: Lowered, every: bool = False) -> tuple[Lowered, dict[str, Fold]]:
    """`lowered`, of whose products it is known what runs them, with both ways in the place of each norm on a GPU that only
    such read and which is worth it (or `every` one); and what the constants are that the second way has, by name."""
    return _Search(lowered, every).run()


def folded(lowered: Lowered, folds: Mapping[str, Fold]) -> Lowered:
    """`lowered` with those of `folds` among its constants that steps read. Raises torch.OutOfMemoryError."""
    read = {name for step in lowered.steps if isinstance(step, Contraction) for name in step.reads()}
    made = {name: fold.value(lowered.constants) for name, fold in folds.items() if name in read}
    return replace(lowered, constants=lowered.constants | made)


class _Search(Placement):
    def __init__(self, lowered: Lowered, every: bool) -> None:
        super().__init__(lowered)
        self.lowered, self.every = lowered, every
        self.buffers = dict(lowered.buffers)
        self.epilogues = Epilogues(self.buffers, self.buffers)
        self.folds: dict[str, Fold] = {}
        self.views_before: dict[int, list[Step]] = {}
        self.makers = {name: k for k, (_, writes) in enumerate(self.accesses) for name in writes}

    def run(self) -> tuple[Lowered, dict[str, Fold]]:
        for k, step in enumerate(self.steps):
            if isinstance(step, Region) and step.device.type == "cuda" and step.across is None and step.nest.reduced:
                for store in step.nest.stores:
                    if self._put_ways(k, step, store):
                        break
        steps = [s for k, own in enumerate(self.steps) for s in (*self.views_before.get(k, ()), own) if s is not None]
        used = {n for step in steps if isinstance(step, Alternatives) and step.kind == NAME for n in step.buffers}
        folds = {name: fold for name, fold in self.folds.items() if name in used}
        buffers = self.lowered.buffers | {name: spec for name, spec in self.buffers.items() if name in used}
        lasting = self.lowered.lasting | folds.keys() if self.lowered.lasting else self.lowered.lasting
        return replace(self.lowered, steps=steps, buffers=buffers, lasting=lasting), folds

    def _put_ways(self, k: int, region: Region, store: Store) -> bool:
        """Put alternatives in the place of norm `store` of step `k` and what reads it, if a factor for each row may do."""
        readers = [j for j in range(len(self.steps)) if store.buffer in self.accesses[j][0] and not self._is_view(j)]
        if store.buffer in self.kept or not readers or readers[0] <= k:
            return False
        norm = find_norm(region, store)
        if norm is None:
            return False
        weights = [self._weights(j) for j in readers]
        before = self._before(k, region, norm)
        if not all(weights) or not (self.every or self._is_worth_it(norm, readers, before)):
            return False
        shift = self._shift(norm, [m for each in weights for m in each])
        if shift is None:
            return False
        scale = BufferSpec(f"{store.buffer}.scale", torch.float32, region.device, (norm.count,), (1,))
        self.buffers[scale.name] = scale
        found = [each for j in readers if (each := self._reader(j, norm, scale, shift)) is not None]
        if len(found) < len(readers):
            return False
        scaled = with_scale(region, norm, scale, shift)
        summed = None if before is None else self._summed(before, scaled, norm, scale)
        return self._put_found(k, scaled, norm, found, summed) or (
            summed is not None and self._put_found(k, scaled, norm, found, None)
        )

    def _put_found(self, k: int, scaled: Region, norm: Norm, readers: Sequence[_Reader], summed: _Summed | None) -> bool:
        """Put alternatives in the place of step `k`, which `scaled` is in the other ways, of `readers`, and of the product
        that `summed` has."""
        steps, uses = {each.step for each in readers}, Counter(each.after for each in readers)
        followed = [each for each in readers if each.after is not None and uses[each.after] == 1 and each.after not in steps]
        own = {k, *steps} if summed is None else {summed.step, k, *steps}
        for fusing in (followed, []):
            numbers = sorted({*own, *(each.after for each in fusing if each.after is not None)})
            place = self._place(tuple(numbers))
            written = any(norm.rows.buffer in self.accesses[j][1] for j in numbers if j != k)
            if place is not None and not written:
                calls = [s for j in numbers if isinstance(s := self.steps[j], Call)]
                self.views_before[place] = [*self.views_before.get(place, ()), *self._take_views(place, calls)]
                ways = [Way(STORED, self._among(numbers, {}))]
                ways += self._ways((SCALED, SCALED_FUSED), {k: scaled}, numbers, readers, fusing)
                if summed is not None:
                    before: dict[int, Region | Contraction] = {summed.step: summed.product, k: summed.scale}
                    ways += self._ways((SUMMED, SUMMED_FUSED), before, numbers, readers, fusing)
                self._put(tuple(numbers), place, self._alternatives(f"{scaled.name}s", ways))
                return True
        return False

    def _ways(
        self,
        labels: tuple[str, str],
        before: Mapping[int, Region | Contraction],
        numbers: Sequence[int],
        readers: Sequence[_Reader],
        fusing: Sequence[_Reader],
    ) -> Iterator[Way]:
        """The ways to compute steps `numbers` with `before` and `readers` instead, of which those of `fusing` may have the
        region after them as their epilogue."""
        alone = {**before, **{each.step: each.alone for each in readers}}
        yield Way(labels[0], self._among(numbers, alone))
        if fusing:
            fused = alone | {each.after: each.fused for each in fusing if each.after is not None and each.fused is not None}
            gone = {each.step for each in fusing}
            yield Way(labels[1], self._among([n for n in numbers if n not in gone], fused))

    def _among(
        self, numbers: Sequence[int], instead: Mapping[int, Region | Contraction]
    ) -> tuple[Region | Contraction | Call, ...]:
        """The steps `numbers`, of which `instead` has some."""
        steps = (instead.get(n, self.steps[n]) for n in numbers)
        return tuple(step for step in steps if isinstance(step, Region | Contraction | Call))

    def _alternatives(self, name: str, ways: Sequence[Way]) -> Alternatives:
        steps = [step for way in ways for step in way.steps]
        calls = [step for step in steps if isinstance(step, Call)]
        named = [n for call in calls for n in (*refs((call.args, call.kwargs)), *(o for o in call.outputs if o is not None))]
        views = tuple(self.views[n] for n in dict.fromkeys(named) if n in self.views)
        touched = [n for step in steps if not isinstance(step, Call) for n in step.buffers]
        names = dict.fromkeys((*touched, *(base_of(n, self.views) for n in named)))
        return Alternatives(name, tuple(ways), {n: self.buffers[n] for n in names}, views, kind=NAME)

    def _is_view(self, k: int) -> bool:
        return isinstance(self.steps[k], Alias)

    def _is_worth_it(self, norm: Norm, readers: Sequence[int], before: tuple[int, Product] | None) -> bool:
        columns = [n for j in readers for n in self._columns(j)]
        total = sum(n for n in columns if isinstance(n, int))
        if nbytes(self.buffers[norm.normed.buffer]) < LEAST_BYTES or not all(isinstance(n, int) for n in columns):
            return False
        return total <= MOST_COLUMNS or (before is not None and total + before[1].sizes[2] <= MOST_COLUMNS_OF_TWO)

    # ------------------------------------------------------------------ the product before

    def _before(self, k: int, region: Region, norm: Norm) -> tuple[int, Product] | None:
        """The product that only step `k` reads, row by row: (its step, the product)."""
        for i in sorted({self.makers.get(name, k) for name in region.reads()}):
            product = self._product(i) if i < k else None
            if product is None or product.ends or product.axes[0] is not None:
                continue
            operands = (product.a, product.b, product.result)
            halves = {self.buffers[m.buffer].dtype for m in operands} == {self.buffers[norm.normed.buffer].dtype}
            same_rows = product.sizes[1:] == (norm.count, product.sizes[2], norm.axis.size)
            if halves and same_rows and not self._is_wanted(product.result.buffer, (i, k)):
                return i, product
        return None

    def _summed(self, before: tuple[int, Product], scaled: Region, norm: Norm, scale: BufferSpec) -> _Summed | None:
        """The product with the elements that `scaled` stores and parts of its sums as its epilogue, and what is left."""
        i, product = before
        parts = in_parts(scaled, norm, scale)
        if parts is None:
            return None
        epilogue, rest = parts
        self.buffers.update({spec.name: spec for spec in rest.buffers.values()})
        contraction = self.epilogues.of(product, epilogue, False)
        if contraction is None or product.result.buffer in contraction.region.reads():
            return None
        return _Summed(i, contraction, rest)

    # ------------------------------------------------------------------ the products

    def _product(self, j: int) -> Product | None:
        step = self.steps[j]
        if not isinstance(step, Call):
            return None
        found = find_product(step, self.lowered.buffers, self.views)
        return None if found is None or found.call.op in QUANTIZED else found

    def _columns(self, j: int) -> Iterator[Int]:
        """The numbers of columns of the products at step `j`."""
        step, product = self.steps[j], self._product(j)
        if isinstance(step, Contraction):
            yield from [step.sizes[3]] * len(step.products)
        elif product is not None:
            yield product.sizes[3]

    def _weights(self, j: int) -> list[Matrix]:
        step, product = self.steps[j], self._product(j)
        if isinstance(step, Contraction):
            return [*step.products.values()]
        return [] if product is None else [product.b]

    def _reader(self, j: int, norm: Norm, scale: BufferSpec, shift: int) -> _Reader | None:
        """Step `j` as products of the norm's rows with the factor `scale`, or None."""
        step, product = self.steps[j], self._product(j)
        if isinstance(step, Contraction):
            contraction = self._scaled(step, norm, scale, shift)
            return None if contraction is None else _Reader(j, contraction)
        if product is None or product.ends or product.axes[0] is not None or not isinstance(product.a, Matrix):
            return None
        dtypes = {self.buffers[m.buffer].dtype for m in (product.a, product.b, product.result)}
        a, b = rows_of(product.a, product.sizes[2], norm), self._folded(product.b, norm, shift)
        addend = None if product.addend is None else product.addend.buffer
        if a is None or b is None or len(dtypes) != 1 or norm.normed.buffer in (addend, product.b.buffer):
            return None
        factor = factor_at(product.a, norm, scale, product.axes[1])
        own = replace(product, a=a, b=b, scales=(factor,))
        alone, name = self.epilogues.alone(own), product.result.buffer
        alone = replace(alone, name=f"{alone.name}.scaled")
        for i in range(j + 1, len(self.steps)):
            region = self.steps[i]
            if isinstance(region, Region) and name in self.accesses[i][0]:
                fused = self.epilogues.of(own, region, self._is_wanted(name, (j, i)))
                if fused is not None:
                    return _Reader(j, alone, i, replace(fused, name=f"{fused.name}.scaled"))
        return _Reader(j, alone)

    def _scaled(self, step: Contraction, norm: Norm, scale: BufferSpec, shift: int) -> Contraction | None:
        """The same of a contraction."""
        a = rows_of(step.a, step.depth, norm) if isinstance(step.a, Matrix) else None
        weights = {name: self._folded(m, norm, shift) for name, m in step.products.items()}
        if a is None or step.ends or step.quantized or step.row is not None or step.axes[0] is not None or step.tf32:
            return None
        if any(m is None for m in weights.values()) or norm.normed.buffer in step.region.reads():
            return None
        assert isinstance(step.a, Matrix)
        factor = factor_at(step.a, norm, scale, step.axes[1])
        region = with_factor(step.region, step.products, factor, scale)
        memory = [a, *(m for m in weights.values() if m is not None)]
        names = [*(m.buffer for m in memory), *(n for n in region.buffers if n not in step.products)]
        return replace(
            step,
            name=f"{step.name}.scaled",
            a=a,
            b=memory[1],
            c=None if step.c is None else memory[2],
            region=replace(region, name=f"{region.name}.scaled"),
            buffers={n: self.buffers[n] for n in dict.fromkeys(names)},
        )

    # ------------------------------------------------------------------ the weights

    def _folded(self, b: Matrix, norm: Norm, shift: int) -> Matrix | None:
        """`b` times what the norm multiplies columns by, as a constant that is still to be made."""
        if not norm.by_column:
            return b
        dim, factor = self._dim(b, norm), self._factor(norm)
        if dim is None or factor is None:
            return None
        name = f"{b.buffer}.times.{norm.normed.buffer}.{dim}"  # of a square weight both dimensions may be meant
        self.folds[name] = Fold(b.buffer, factor * 2.0**shift, dim)
        self.buffers[name] = replace(self.buffers[b.buffer], name=name)
        return replace(b, buffer=name)

    def _dim(self, b: Matrix, norm: Norm) -> int | None:
        """Along which dimension of its buffer, a constant matrix, the rows of `b` lie, all of it in each column."""
        spec = self.buffers[b.buffer]
        if b.buffer not in self.lowered.constants or len(spec.shape) != 2 or b.batch != 0:
            return None
        found = [d for d in range(2) if (spec.shape[d], spec.strides[d]) == (norm.axis.size, b.row)]
        if len(found) != 1:
            return None
        between = spec.strides[1 - found[0]]
        whole = isinstance(between, int) and between > 0 and mod(b.offset, between) == mod(b.column, between) == 0
        return found[0] if whole else None

    def _factor(self, norm: Norm) -> torch.Tensor | None:
        """What the norm multiplies columns by, if that is constant: float64 [columns]."""
        assert isinstance(norm.axis.size, int)
        product = functools.reduce(times, norm.by_column)
        value = constant_along(product, symbol(norm.axis), norm.axis.size, self.lowered.constants, self.buffers)
        return None if value is None else value.expand(norm.axis.size)

    def _shift(self, norm: Norm, weights: Sequence[Matrix]) -> int | None:
        """The power of two by which folded `weights` are to be multiplied, so that none overflows and the elements of each
        row, as a whole, are normal numbers; None where there is none."""
        if not norm.by_column:
            return 0
        factor = self._factor(norm)
        largest, least = 0.0, float("inf")
        for b in weights:
            dim, constant = self._dim(b, norm), self.lowered.constants.get(b.buffer)
            if dim is None or factor is None or constant is None or hasattr(constant, "fake_mode"):
                return None
            norms = functools.partial(torch.linalg.vector_norm, constant.detach(), dim=1 - dim, dtype=torch.float32)
            most = float((norms(ord=float("inf")).double() * factor.abs()).max())
            sizes = norms().double() * factor.abs() / constant.shape[1 - dim] ** 0.5
            if not math.isfinite(most):
                return None
            largest, least = max(largest, most), min(least, float(sizes.where(sizes > 0, float("inf")).min()))
        info = torch.finfo(self.buffers[weights[0].buffer].dtype)
        if info.max > 2.0**16:
            return 0 if largest < info.max and least >= info.tiny else None
        shift = _SHIFT if largest * 2.0**_SHIFT <= _LARGEST else 0
        return shift if largest <= _LARGEST and least * 2.0**shift >= info.tiny else None
