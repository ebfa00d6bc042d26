"""Products and what is computed from them, as one kernel or as library call and kernel apart: the tuner decides.

A region over a product's result that does not reduce can be computed where the product still is in registers: then the
result is neither written nor read again, unless others want it. `with_contractions` finds such pairs in a schedule, and
convolutions that a call of cuDNN's computes together with the region over their result.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from math import gcd

import torch

from fxopt.ir.exprs import Int, ask, free_symbols
from fxopt.ir.loops import Load
from fxopt.ir.precision import convolutions_use_tf32, products_use_tf32
from fxopt.ir.quantized_ops import LARGEST
from fxopt.ir.region import Alias, Alternatives, Call, Contraction, Matrix, Region, SideBySide, Step, Way, base_of, refs
from fxopt.lower.before_windows import before_windows
from fxopt.lower.convolutions import FusedConvolutions
from fxopt.lower.cut_products import cut_to, padding_of
from fxopt.lower.epilogues import Epilogues
from fxopt.lower.joining import join
from fxopt.lower.lowering import Lowered
from fxopt.lower.parts_for_reader import in_parts
from fxopt.lower.patches import Gathered, PatchSearch, is_common, without
from fxopt.lower.placement import Placement
from fxopt.lower.pools import pooling_after
from fxopt.lower.products import CONVOLUTION, QUANTIZED, SCALED, SCALED_CONVOLUTION, Product, columns_of, find_product
from fxopt.lower.quantized_products import as_reduction, in_loops, library_form

NAME = "contractions"
"""What switches this off (FXOPT_DISABLE) and heads its notes."""

LIBRARY, FUSED, TWO, ROW, BESIDE = "library", "fused", "two", "row", "side by side"
APART = "apart"
"""Products with weights of few bits, for two of which no kernel takes several rows, and the region that reads both."""

STENCIL, DIRECT, IMPLICIT = "stencil", "stencil-direct", "implicit"
"""Depthwise convolutions, their weight laid out before or not, and others as products of patches, each with what follows or
alone.
"""

PADDED = "padded"
"""A convolution of few channels as a product of patches of a copy, which has a border and pixels of a whole vector."""

POOLED, PADDED_POOLED = "pooled", "padded-pooled"
"""Products of patches, also of such a copy, with a pooling as their epilogue."""

SUMS, STENCIL_SUMS = "sums", "stencil-and-sums"
"""The gradient of a depthwise convolution's weight as sums over places, and that of its input too."""

MOST_PARTS = 12
"""Sums of one program that computes several products of one row: each takes registers, and loads one row of weights."""

MOST_PRODUCTS_BESIDE, MOST_ROWS_BESIDE = 4, 512
"""Products in one kernel, each a copy of the code, and their rows: of more, each product alone fills a GPU."""

FEW_ROWS = 64
"""Products of no more rows are bound by memory, where a kernel of ours may beat the library even without an epilogue."""

_DTYPES = (torch.float16, torch.bfloat16)


def with_contractions(lowered: Lowered, every: bool = False) -> Lowered:
    """`lowered`, already scheduled, with `Alternatives` for products on a GPU that a kernel of ours may do faster (those
    with an epilogue and those of few rows, or `every` one) and for convolutions that cuDNN fuses with the region after them.
    """
    return _Search(lowered, every).run()


class _Search(Placement):
    def __init__(self, lowered: Lowered, every: bool) -> None:
        super().__init__(lowered)
        self.lowered, self.every = lowered, every
        self.convolutions = FusedConvolutions(lowered)
        self.epilogues = Epilogues(lowered.buffers, self.convolutions.buffers)
        self.patches = PatchSearch(lowered.buffers, self.views, lowered.constants)
        self.views_of: dict[str, tuple[Alias, ...]] = {}
        self.views_before: dict[int, list[Step]] = {}
        self.uniform: dict[str, bool] = {}

    def _product(self, call: Call) -> Product | None:
        """`call` as a product. A constant scale that is the same for all rows, repeated because the library wants it so, is
        read once by kernels of ours; their contests are told that it is (`Alternatives.uniform`)."""
        product = find_product(call, self.lowered.buffers, self.views)
        if product is None or not product.scales or not free_symbols(product.scales[0].index):
            return product
        first, *others = product.scales
        if not self._is_uniform(first.buffer):
            return product
        return replace(product, scales=(Load(first.buffer, 0, first.dtype), *others))

    def _is_uniform(self, name: str) -> bool:
        """Whether `name` is a constant of equal elements."""
        if name not in self.uniform:
            value = self.lowered.constants.get(name)
            self.uniform[name] = value is not None and value.numel() > 0 and bool((value == value.reshape(-1)[0]).all())
        return self.uniform[name]

    def run(self) -> Lowered:
        alone: dict[int, Product] = {}
        beside: dict[int, Product] = {}
        for k in range(len(self.steps)):
            step = self.steps[k]  # which a product before may have taken
            product = self._product(step) if isinstance(step, Call) else None
            if product is not None and not self._is_eligible(product):
                product = None
            convolution = step if isinstance(step, Call) and step.op == CONVOLUTION else None
            if convolution is not None and self._fuse_shortcut(k, convolution, product):
                continue
            if isinstance(step, Call) and self._fuse_pooling(k, step, product):
                continue
            if product is not None and (self._fuse(k, product) or self._fuse_cut(k, product)):
                continue
            if product is not None and self._fuse_parts(k, product):
                continue
            if isinstance(step, Call) and self._fuse_convolution(k, step, None if product else self._gathered(step)):
                continue
            few = product is not None and ask("<=", product.sizes[1], FEW_ROWS) is True
            if product is not None and (self.every or few or product.call.op in QUANTIZED):
                alone[k] = product
            if product is not None and _may_stand_beside_others(product):
                beside[k] = product
        self._put_beside(beside, alone)
        self._put_rows(alone)
        for k, product in alone.items():
            self.steps[k] = self._alternatives((product,), None, self.epilogues.alone(product))
        later = [s for k, own in enumerate(self.steps) for s in (*self.views_before.get(k, ()), own) if s is not None]
        steps = [s for own in later for s in (*self.views_of.get(getattr(own, "name", ""), ()), own)]
        return replace(self.lowered, steps=steps, buffers=self.convolutions.buffers, constants=self.convolutions.constants)

    def _put_beside(self, beside: dict[int, Product], alone: dict[int, Product]) -> None:
        """Put alternatives in the place of a few of `beside` that have the same rows, which one kernel may do, and take them
        out of `alone`.
        """
        for first, *others in self._of_equal_key(beside, lambda p: (p.a, p.sizes, _strides(p.b))):
            if others and len(others) < MOST_PRODUCTS_BESIDE:
                together = (first, *others)
                calls = [beside[k].call for k in together]
                parts = tuple(self.epilogues.alone(beside[k]) for k in together)
                one = SideBySide(f"{parts[0].name}s", parts)
                for k in together:
                    alone.pop(k, None)
                self.views_before[first] = self._take_views(first, calls)
                ways = [Way(LIBRARY, tuple(calls)), Way(BESIDE, (one,))]
                self._put(together, first, self._among(one.name, calls, None, ways))

    def _put_rows(self, alone: dict[int, Product]) -> None:
        """The same for those of `alone` that have one and the same row."""
        one_row = {k: p for k, p in alone.items() if p.sizes[:2] == (1, 1) and not p.ends and isinstance(p.a, Matrix)}
        for first, *others in self._of_equal_key(one_row, lambda p: p.a):
            together = (first, *others)
            rows = _rows_of(
                [as_reduction(self.epilogues.alone(part)) for part in _equal_parts([alone[k] for k in together])]
            )
            if others and rows is not None:
                calls = [alone.pop(k).call for k in together]
                self.views_before[first] = self._take_views(first, calls)
                ways = [Way(LIBRARY, tuple(calls)), Way(ROW, (rows,))]
                self._put(together, first, self._among(rows.name, calls, rows, ways))

    def _of_equal_key(self, products: Mapping[int, Product], key: Callable[[Product], Hashable]) -> list[list[int]]:
        """The numbers of `products`, a list for those of equal `key` that may run where its first does: queries, keys and
        values of the same rows.
        """
        found: list[list[int]] = []
        latest: dict[Hashable, list[int]] = {}
        for k, product in products.items():
            group = latest.get(key(product))
            if group is not None and self._may_join(k, group):
                group.append(k)
            else:
                latest[key(product)] = [k]
                found.append(latest[key(product)])
        return found

    def _fuse_convolution(self, k: int, call: Call, own: Gathered | None) -> bool:
        """Put alternatives in the place of convolution (or gradient) `k` and a reader, if one call or kernel computes both,
        or of the convolution alone, if a kernel of ours may: `own`.
        """
        gradient = self.patches.weight_gradient(call)
        if own is None and gradient is None and call.op != CONVOLUTION:
            return False
        name = call.outputs[0]
        for j in range(k + 1, len(self.steps)) if own is not None or call.op == CONVOLUTION else ():
            region = self.steps[j]
            if isinstance(region, Region) and name in self.accesses[j][0]:
                place = self._place((k, j))
                if place is not None:
                    wanted = self._is_wanted(name, (k, j)) if name else True
                    first, after = (region, ()) if wanted else self._parted(region, name)
                    ways = [Way(LIBRARY, (call, region))]
                    fused = self.epilogues.of(own.product, first, wanted) if own and name else None
                    if own is not None and fused is not None:
                        ways += _followed(self._gathering(call, own, fused, gradient), after)
                    apart = self._among(region.name, (call,), region, ways)
                    found = self._with_fused_calls(apart, (k, j), call, first, after)
                    if found is not apart and own is not None and is_common(own.patches) and not self.every:
                        found = replace(found, ways=tuple(w for w in found.ways if w.label != IMPLICIT))
                    if len(found.ways) > 1:
                        self._put((k, j), place, found)
                        return True
        if own is None and gradient is None:
            return False
        alone = None if own is None else self.epilogues.alone(own.product)
        ways = [Way(LIBRARY, (call,)), *self._gathering(call, own, alone, gradient)]
        self.steps[k] = self._among(next(n for n in call.outputs if n), (call,), None, ways)
        return True

    def _fuse_pooling(self, k: int, call: Call, product: Product | None) -> bool:
        """Put alternatives in the place of convolution `k` and the pooling of its result, or of what a region before that
        makes of it, if a kernel of ours may do all. Among them are those without the pooling, for which the convolution is
        `product` where it is one of matrices.
        """
        if call.op not in (CONVOLUTION, SCALED_CONVOLUTION) or (call.op == SCALED_CONVOLUTION and product is not None):
            return False
        steps = (k, *pooling_after(self.steps, k, call.outputs[0] or ""))
        regions = [r for j in steps[1:] if isinstance(r := self.steps[j], Region)]
        place, own = (self._place(steps), self._gathered(call)) if regions else (None, None)
        if own is None or place is None:
            return False
        first, pooling = regions[0] if len(regions) == 2 else None, regions[-1]
        made = [call.outputs[0], *(first.writes() if first is not None else ())]
        wanted = {n for n in made if n is not None and self._is_wanted(n, steps)}
        pooled = self.epilogues.of_pools(own.product, first, pooling, wanted)
        if pooled is None:
            return False
        inside = replace(own, product=replace(own.product, a=pooled.a))
        apart, fused = self._unpooled(call, product, own, first, call.outputs[0] in wanted)
        ways = [Way(LIBRARY, (call, *regions)), *self._gathering(call, inside, pooled, None), *_followed(apart, (pooling,))]
        found = self._among(pooling.name, (call,), pooling, ways, regions)
        self._put(steps, place, self._with_ways(found, tuple(_followed(fused, (pooling,)))))
        return True

    def _unpooled(
        self, call: Call, product: Product | None, own: Gathered, first: Region | None, wanted: bool
    ) -> tuple[list[Way], tuple[Way, ...]]:
        """The ways to compute convolution `call` and the region `first` after it, if there is one: (by kernels of ours, as
        one call); `wanted` says whether others read the convolution itself. As a product of matrices it is `product`.
        """
        source = own.product if product is None else product
        kernel = self.epilogues.alone(source) if first is None else self.epilogues.of(source, first, wanted)
        calls = () if first is None or wanted else self.convolutions.ways(call, first)
        if kernel is None or (calls and product is None and is_common(own.patches) and not self.every):
            return [], calls
        return [Way(FUSED, (kernel,))] if product is not None else list(self._gathering(call, own, kernel, None)), calls

    def _gathering(
        self, call: Call, own: Gathered | None, contraction: Contraction | None, gradient: Product | None
    ) -> Iterator[Way]:
        """The ways in which `contraction` computes the first result of `call`, which is `own`, and another kernel the
        weight's `gradient`: each alone and both.
        """
        if own is not None and contraction is not None:
            whole = POOLED if contraction.pooled else IMPLICIT
            yield Way(STENCIL if own.patches.depthwise else whole, (*own.before, contraction))
            if own.direct is not None:
                yield Way(DIRECT, (*((own.rest,) if own.rest else ()), self._read_directly(contraction, own.direct)))
            copy = self.patches.padded(own)
            if copy is not None:
                self.convolutions.buffers |= {spec.name: spec for spec in (copy.image, copy.weight)}
                if copy.constant is not None:
                    self.convolutions.constants[copy.weight.name] = copy.constant
                label = PADDED_POOLED if contraction.pooled else PADDED
                yield Way(label, (*copy.before, copy.product_of(contraction)))
        if gradient is None:
            return
        summed, left = self.epilogues.alone(gradient), without(call, 1)
        if own is None:
            yield Way(SUMS, (summed,) if left is None else (left, summed))
        elif contraction is not None:
            others = without(call, 0, 1)
            before = tuple(s for s in (others, own.filling) if s is not None)
            yield Way(STENCIL_SUMS, (*before, summed, contraction))

    def _read_directly(self, contraction: Contraction, weight: Matrix) -> Contraction:
        """`contraction`, of a depthwise convolution, with its weight as it lies in memory: no kernel lays it out before."""
        buffers = {n: s for n, s in contraction.buffers.items() if n != contraction.b.buffer}
        buffers[weight.buffer] = self.lowered.buffers[weight.buffer]
        return replace(contraction, name=f"{contraction.name}.direct", b=weight, buffers=buffers)

    def _gathered(self, call: Call) -> Gathered | None:
        """`call` for a kernel of ours, its weight among the buffers."""
        found = self.patches.find(call)
        if found is not None and found.weight is not None:
            self.convolutions.buffers[found.weight.name] = found.weight
            if found.constant is not None:
                self.convolutions.constants[found.weight.name] = found.constant
        return found

    def _fuse_shortcut(self, k: int, call: Call, product: Product | None) -> bool:
        """`_fuse_convolution` for convolution `k` and the next one, whose result their only reader adds."""
        j = next((j for j in range(k + 1, len(self.steps)) if call.outputs[0] in self.accesses[j][0]), k)
        region = self.steps[j]
        for i in range(k + 1, j):
            other, steps = self.steps[i], (k, i, j)
            if not isinstance(region, Region) or not isinstance(other, Call) or other.op != CONVOLUTION:
                continue
            made = [n for c in (call, other) for n in c.outputs if n is not None]
            place = self._place(steps)
            if place is None or made[-1] not in self.accesses[j][0] or any(self._is_wanted(n, steps) for n in made):
                continue
            found = self.convolutions.ways_with_shortcut(call, other, region)
            if found:
                ways = [Way(LIBRARY, (call, other, region))]
                fused = None if product is None else self.epilogues.of(product, region, False)
                ways += [] if fused is None else [Way(FUSED, (other, fused))]
                apart = self._among(region.name, (call, other), region, ways)
                self._put(steps, place, self._with_ways(apart, found))
                return True
        return False

    def _with_fused_calls(
        self, found: Alternatives, steps: tuple[int, int], call: Call, region: Region, after: tuple[Region, ...] = ()
    ) -> Alternatives:
        """`found` for `call` and `region`, at `steps`, with the ways in which a single call computes both, then `after`."""
        if call.outputs[0] is None or self._is_wanted(call.outputs[0], steps):
            return found
        return self._with_ways(found, tuple(_followed(self.convolutions.ways(call, region), after)))

    def _parted(self, region: Region, name: str) -> tuple[Region, tuple[Region, ...]]:
        """What may follow convolution `name` as its epilogue, and what comes after that: `region` in two parts, if windows
        of it overlap over the convolution's elements.
        """
        parts = before_windows(region, self.lowered.buffers[name])
        if parts is None:
            return region, ()
        first, after, between = parts
        self.convolutions.buffers[between.name] = between
        return first, (after,)

    def _with_ways(self, found: Alternatives, ways: Sequence[Way]) -> Alternatives:
        """`found` with `ways` that are library calls."""
        named = (s for way in ways for s in way.steps if isinstance(s, Call))
        names = [n for call in named for n in (*refs(call.args), *call.outputs) if n is not None]
        more = {n: self.convolutions.buffers[n] for n in names if n not in self.views}
        return replace(found, ways=(*found.ways, *ways), buffers={**found.buffers, **more}) if ways else found

    def _is_eligible(self, product: Product) -> bool:
        operands = [self.lowered.buffers[m.buffer] for m in (product.a, product.b, product.result)]
        if product.quantized is not None:
            return all(s.device.type == "cuda" for s in operands) and operands[0].dtype in (*_DTYPES, torch.float32)
        if product.call.op in (SCALED, SCALED_CONVOLUTION):
            same = operands[0].dtype == operands[1].dtype
            return same and operands[0].dtype in LARGEST and all(s.device.type == "cuda" for s in operands)
        dtype = operands[0].dtype
        if any(s.device.type != "cuda" or s.dtype != dtype for s in operands):
            return False
        return dtype in _DTYPES or (dtype == torch.float32 and _uses_tf32(product))

    def _fuse(self, k: int, product: Product) -> bool:
        """Put alternatives in the place of product `k` and the first region that can take it as an epilogue, if any; and of
        another product of the same left operand that the region reads as well.
        """
        name = product.result.buffer
        for j in range(k + 1, len(self.steps)):
            region = self.steps[j]
            if isinstance(region, Region) and name in self.accesses[j][0]:
                if self._fuse_two(k, j, product, region):
                    return True
                place = self._place((k, j))
                found = None if place is None else self.epilogues.of(product, region, self._is_wanted(name, (k, j)))
                if found is not None and place is not None:
                    ways = self._alternatives((product,), region, found)
                    self._put((k, j), place, self._with_fused_calls(ways, (k, j), product.call, region))
                    return True
        return False

    def _fuse_cut(self, k: int, product: Product) -> bool:
        """`_fuse` for a padded product of which one region reads what is no padding, and nobody anything else."""
        name = product.result.buffer
        readers = [j for j, s in enumerate(self.steps) if name in self.accesses[j][0] and not isinstance(s, Alias)]
        region = self.steps[readers[0]] if len(readers) == 1 else None
        cut = cut_to(product, region) if isinstance(region, Region) else None
        if cut is None or name in self.kept or not isinstance(region, Region):
            return False
        steps: tuple[int, ...] = (k, readers[0])
        first: tuple[Region | Contraction | Call, ...] = (product.call, region)
        padding = padding_of(self.steps, cut, self.lowered.buffers)
        if padding is not None and not self._is_wanted(cut.b.buffer, (padding[0][0], k)):
            (i, copying), cut = padding[0], padding[1]
            steps, first = (i, *steps), (copying, *first)
        place, fused = self._place(steps), self.epilogues.of(cut, region, False)
        if place is None or fused is None:
            return False
        ways = (Way(LIBRARY, first), Way(FUSED, (fused,)))
        self._put(steps, place, self._among(fused.name, (product.call,), region, ways))
        return True

    def _fuse_parts(self, k: int, product: Product) -> bool:
        """Put alternatives in the place of product `k` and the reduction that alone reads it, if that may add up parts."""
        name = product.result.buffer
        readers = [j for j, s in enumerate(self.steps) if name in self.accesses[j][0] and not isinstance(s, Alias)]
        may = _has_few_rows(product) or _goes_down_columns(product)
        region = self.steps[readers[0]] if len(readers) == 1 and may else None
        if not isinstance(region, Region) or name in self.kept:
            return False
        place = self._place((k, readers[0]))
        found = [] if place is None else in_parts(product, region, self.lowered.buffers)
        if not found or place is None:
            return False
        self.convolutions.buffers.update({spec.name: spec for spec, _ in found})
        ways = [Way(LIBRARY, (product.call, region)), *(way for _, way in found)]
        if in_loops(product):
            ways.append(Way(ROW, (as_reduction(self.epilogues.alone(product)), region)))
        self._put((k, readers[0]), place, self._among(region.name, (product.call,), region, ways))
        return True

    def _fuse_two(self, k: int, j: int, product: Product, region: Region) -> bool:
        """`_fuse` for product `k` with another one, or for the two halves of its columns."""
        for i, one, two in self._partners(k, j, product):
            steps = (*sorted({k, i}), j)
            place = self._place(steps)
            if place is None:
                continue
            wanted = [self._is_wanted(p.result.buffer, steps) for p in (one, two)]
            both = self.epilogues.of_two(one, two, region, wanted)
            if both is not None:
                apart = self.epilogues.of(product, region, wanted[0]) if i != k else None
                products = (one, two) if i != k else (product,)
                self._put(steps, place, self._alternatives(products, region, apart, both))
                return True
        return False

    def _partners(self, k: int, j: int, product: Product) -> Iterator[tuple[int, Product, Product]]:
        """What region `j` may read beside product `k`: (the step that computes it, the two products)."""
        for i in range(k + 1, j):
            step = self.steps[i]
            other = self._product(step) if isinstance(step, Call) else None
            if other is None or not self._is_eligible(other) or other.result.buffer not in self.accesses[j][0]:
                continue
            if (other.a, other.sizes, other.ends) == (product.a, product.sizes, product.ends) and _strides(
                other.b
            ) == _strides(product.b):
                yield i, product, other
        if product.sizes[3] >= 4 and product.sizes[3] % 2 == 0:
            half = product.sizes[3] // 2
            yield k, columns_of(product, 0, half), columns_of(product, half, half)

    def _alternatives(
        self,
        products: Sequence[Product],
        region: Region | None,
        fused: Contraction | None,
        both: Contraction | None = None,
    ) -> Alternatives:
        """Of `products` and the `region` over them: `fused` is the first with its epilogue, `both` are two products with
        theirs.
        """
        calls = tuple(p.call for p in products)
        found = [c for c in (fused, both) if c is not None]
        few_bits = both is not None and bool(both.quantized)
        alone = [self.epilogues.alone(p) for p in products] if few_bits else []
        after = (region,) if region is not None else ()
        ways = [Way(LIBRARY, (*calls, *after))]
        if fused is not None:
            ways.append(Way(FUSED, (*(alone or calls)[1:], fused)))
        if both is not None:
            ways.append(Way(TWO, (both,)))
        if few_bits:
            ways.append(Way(APART, (*alone, *after)))
        if in_loops(products[0]):
            ways.append(Way(ROW, (as_reduction(found[-1]),)))
        among = self._among(found[0].name, calls, region, ways)
        if few_bits:
            return self._with_library_forms(products, alone, after, among)
        return self._with_library_forms(products, found, (), among) if both is None else among

    def _with_library_forms(
        self, products: Sequence[Product], computed: Sequence[Contraction], after: Sequence[Region], found: Alternatives
    ) -> Alternatives:
        """`found` for quantized `products`, which `computed` does with epilogues and `after` goes on with, also by library
        calls on what kernels have prepared or finish.
        """
        if products[0].call.op not in QUANTIZED:
            return found
        forms = []
        for product, contraction in zip(products, computed, strict=True):
            form = library_form(product, contraction, self.lowered.buffers)
            if form is None:
                return found
            forms.append(form)
            self.convolutions.buffers.update(form.buffers)
            self.views.update({v.name: v for v in form.views})
        views = tuple(v for form in forms for v in form.views)
        self.views_of[found.name] = views
        steps = [step for form in forms for step in form.way.steps]
        return replace(
            found,
            ways=(*found.ways, Way(forms[0].way.label, (*steps, *after))),
            buffers=found.buffers | {n: self.convolutions.buffers[n] for form in forms for n in form.names},
            views=(*found.views, *views),
        )

    def _among(
        self, name: str, calls: Sequence[Call], region: Region | None, ways: Sequence[Way], more: Sequence[Region] = ()
    ) -> Alternatives:
        """`ways` to compute `calls` and `region`, and regions `more`, with all that these and contractions touch."""
        named = [n for call in calls for n in refs(call.args)]
        views = tuple(self.views[n] for n in dict.fromkeys(named) if n in self.views)
        names = [
            *(n for r in (*((region,) if region else ()), *more) for n in r.buffers),
            *(n for way in ways for step in way.steps if isinstance(step, Contraction | SideBySide) for n in step.buffers),
            *(n for call in calls for n in call.outputs if n is not None),
            *(base_of(n, self.views) for n in named),
        ]
        buffers = {n: self.convolutions.buffers[n] for n in dict.fromkeys(names)}
        uniform = frozenset(n for n in buffers if self.uniform.get(n))
        return Alternatives(name, tuple(ways), buffers, views, uniform)


def _followed(ways: Iterable[Way], after: tuple[Region, ...]) -> Iterator[Way]:
    return (Way(way.label, (*way.steps, *after)) for way in ways)


def _may_stand_beside_others(product: Product) -> bool:
    """Whether a kernel may compute `product` and others of the same rows: few rows, but more than one."""
    plain = product.call.op not in (*QUANTIZED, CONVOLUTION) and not product.ends and isinstance(product.a, Matrix)
    return plain and product.sizes[0] == 1 and _has_few_rows(product)


def _has_few_rows(product: Product) -> bool:
    """Whether its tiles may leave multiprocessors idle, where it is not bound by its weight's bytes alone."""
    rows = product.sizes[1]
    return isinstance(rows, int) and FEW_ROWS < rows <= MOST_ROWS_BESIDE


def _goes_down_columns(product: Product) -> bool:
    """Whether it has one row, and the columns of its weight are contiguous, not its rows."""
    plain = product.call.op not in QUANTIZED and not product.ends and isinstance(product.a, Matrix)
    return plain and product.sizes[:2] == (1, 1) and ask("==", product.b.column, 1) is True


def _uses_tf32(product: Product) -> bool:
    """Whether the library may round the float32 operands of `product` to TF32."""
    return convolutions_use_tf32() if product.call.op == CONVOLUTION else products_use_tf32()


def _strides(matrix: Matrix) -> tuple[Int, Int, Int]:
    return matrix.batch, matrix.row, matrix.column


def _equal_parts(products: Sequence[Product]) -> list[Product]:
    """`products` of one row cut into parts of equally many columns."""
    count = gcd(*(p.sizes[3] for p in products))
    return [columns_of(p, first, count) for p in products for first in range(0, p.sizes[3], count)]


def _rows_of(parts: Sequence[Region]) -> Region | None:
    """One region for `parts`, each a product of one and the same row; None where they are too many, or cannot be joined."""
    first, *others = parts
    if len(parts) > MOST_PARTS:
        return None
    whole: Region | None = replace(first, name=f"{first.name}s")
    for part in others:
        whole = None if whole is None else join(whole, part)
    return whole
