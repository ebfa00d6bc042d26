"""Products of few rows as loops, and products of few bits by library calls on what kernels prepare or finish.

Few rows are bound by the weight's bytes: a loop nest reads each once. A weight in few bits is widened in registers, on its
way to the sum.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

import torch

from fxopt.ir.exprs import Int, Sym, add, contiguous_strides, floordiv, mul, symbol
from fxopt.ir.loops import Const, Load, Nest, Op, Reduce, Scalar, Store, transform
from fxopt.ir.quantized_ops import ZERO_OF_4_BITS
from fxopt.ir.region import Alias, BufferSpec, Call, Contraction, Matrix, Quantized, Ref, Region, Way
from fxopt.lower.products import QUANTIZED, SCALED, SCALED_CONVOLUTION, Product
from fxopt.lower.values import cast

MOST_ROWS_IN_LOOPS = 8
"""Rows of a quantized product whose sums one program keeps."""

INT_MM, DEQUANTIZED = "int-mm", "dequantized"
"""Ways: `aten::_int_mm` and a kernel that scales its sums; a kernel that widens the weight, and the library's product."""

_WITH_DTYPE = "aten::mm.dtype"
_FEWEST_ROWS_OF_INT_MM, _MULTIPLE_OF_INT_MM = 17, 8


def in_loops(product: Product) -> bool:
    """Whether `product` has so few rows that they may be loops over the weight."""
    batch, rows = product.sizes[:2]
    if product.ends or batch != 1 or isinstance(product.a, Matrix) is False:
        return False
    return rows == 1 or (product.call.op in QUANTIZED and isinstance(rows, int) and rows <= MOST_ROWS_IN_LOOPS)


def as_reduction(contraction: Contraction) -> Region:
    """Products of few rows as a region that reduces: every element of the right operands is read once."""
    batch, row, column = contraction.axes
    a = contraction.a
    assert isinstance(a, Matrix) and isinstance(contraction.depth, int)
    kinds: tuple[Quantized | None, ...] = contraction.quantized or (None,) * len(contraction.products)
    exact = contraction.buffers[a.buffer].dtype == torch.int8
    working = torch.int32 if exact else torch.float32

    def element(matrix: Matrix, y: Int, x: Int) -> Scalar:
        load = Load(matrix.buffer, _at(matrix, batch, y, x), contraction.buffers[matrix.buffer].dtype)
        return cast(load, working)

    def term(matrix: Matrix, kind: Quantized | None, k: Sym) -> Scalar:
        if kind is None or kind.bits == 8:
            return Op("mul", (element(a, symbol(row), symbol(k)), element(matrix, symbol(k), symbol(column))), working)
        packed = Load(matrix.buffer, _at(matrix, batch, symbol(k), symbol(column)), torch.uint8)
        half = contraction.depth // 2
        parts = []
        for first, value in ((0, _low(packed)), (half, _high(packed))):
            scale = _scale_of(kind, contraction.buffers, add(symbol(k), first), symbol(column))
            left = element(a, symbol(row), add(symbol(k), first))
            parts.append(Op("mul", (left, Op("mul", (value, scale), working)), working))
        return Op("add", tuple(parts), working)

    packs = any(kind is not None and kind.bits == 4 for kind in kinds)
    k = Sym("r3", size=contraction.depth // 2 if packs else contraction.depth)
    totals: dict[str, Scalar] = {}
    for (name, matrix), kind in zip(contraction.products.items(), kinds, strict=True):
        totals[name] = cast(Reduce("sum", (term(matrix, kind, k),), (k,), working), torch.float32)
    scales = (kind.scale.buffer for kind in kinds if kind is not None and kind.scale is not None)
    names = (a.buffer, *(m.buffer for m in contraction.products.values()), *scales)
    operands = {name: contraction.buffers[name] for name in names}
    return _for_each(row, contraction.reduced(f"{contraction.name}.row", (k,), totals, operands))


def _for_each(row: Sym, region: Region) -> Region:
    """`region` with stores of their own for each of several rows, which share what they load of the weight."""
    if row.size == 1 or row not in region.nest.points:
        return region
    assert isinstance(row.size, int)
    points = tuple(s for s in region.nest.points if s != row)
    stores = tuple(s.transformed({row: m}) for m in range(row.size) for s in region.nest.stores)
    return replace(region, nest=Nest(points, region.nest.reduced, stores))


def _low(packed: Scalar) -> Scalar:
    return _centered(Op("bitwise_and", (cast(packed, torch.int32), Const(15, torch.int32)), torch.int32))


def _high(packed: Scalar) -> Scalar:
    return _centered(Op("rshift", (cast(packed, torch.int32), Const(4, torch.int32)), torch.int32))


def _centered(stored: Scalar) -> Scalar:
    """A 4-bit value as a float32, from what is stored of it."""
    return cast(Op("sub", (stored, Const(ZERO_OF_4_BITS, torch.int32)), torch.int32), torch.float32)


def _scale_of(kind: Quantized, buffers: Mapping[str, BufferSpec], k: Int, column: Int) -> Scalar:
    assert kind.scale is not None
    place = _at(kind.scale, None, floordiv(k, kind.group), column)
    return Load(kind.scale.buffer, place, buffers[kind.scale.buffer].dtype)


def _at(matrix: Matrix, batch: Sym | None, row: Int, column: Int) -> Int:
    out = add(matrix.offset, add(mul(row, matrix.row), mul(column, matrix.column)))
    return out if batch is None else add(out, mul(symbol(batch), matrix.batch))


# ---------------------------------------------------------------------- library calls


@dataclass(frozen=True)
class LibraryForm:
    """A way with the buffers and views that it has of its own, and the `names` of all buffers that its steps touch."""

    way: Way
    buffers: dict[str, BufferSpec]
    views: tuple[Alias, ...]
    names: tuple[str, ...]


def library_form(product: Product, fused: Contraction, buffers: Mapping[str, BufferSpec]) -> LibraryForm | None:
    """`product` with the epilogue that `fused` has, by a library call; None where none takes it."""
    rows = product.sizes[1]
    if not isinstance(rows, int) or not isinstance(product.a, Matrix) or product.a.column != 1 or product.b.row != 1:
        return None
    if product.call.op in (SCALED, SCALED_CONVOLUTION):
        return _int_mm(product, fused, buffers)
    return _dequantized(product, fused, buffers) if rows > MOST_ROWS_IN_LOOPS else None


def _int_mm(product: Product, fused: Contraction, buffers: Mapping[str, BufferSpec]) -> LibraryForm | None:
    """Sums by `aten::_int_mm`, and a kernel for the epilogue."""
    _, m, k, n = product.sizes
    whole = k % _MULTIPLE_OF_INT_MM == n % _MULTIPLE_OF_INT_MM == 0
    if buffers[product.b.buffer].dtype != torch.int8 or not whole or m < _FEWEST_ROWS_OF_INT_MM:  # type: ignore[operator]
        return None
    sums = _fresh(f"{fused.name}.sums", torch.int32, product, buffers, (m, n))
    return _finished(product, fused, INT_MM, "aten::_int_mm.default", sums, product.b.buffer, ())


def _dequantized(product: Product, fused: Contraction, buffers: Mapping[str, BufferSpec]) -> LibraryForm | None:
    """The weight widened by a kernel, and the library's product."""
    _, m, k, n = product.sizes
    dtype = buffers[product.a.buffer].dtype
    if dtype not in (torch.float16, torch.bfloat16):
        return None
    wide = _fresh(f"{fused.name}.weight", dtype, product, buffers, (n, k))
    far = dtype == torch.float16 and product.scales != ()  # sums of values without their scales
    sums = _fresh(f"{fused.name}.sums", torch.float32 if far else dtype, product, buffers, (m, n))
    op = _WITH_DTYPE if far else "aten::mm.default"
    return _finished(product, fused, DEQUANTIZED, op, sums, wide.name, (_widening(product, wide, buffers),))


def _finished(
    product: Product,
    fused: Contraction,
    label: str,
    op: str,
    sums: BufferSpec,
    weight: str,
    before: tuple[Region, ...],
) -> LibraryForm:
    """`op` of the left operand and `weight`, whose result `sums` has what `fused` does to the product done to it."""
    _, _, k, n = product.sizes
    a, b = product.a, product.b if not before else Matrix(weight, 0, 0, 1, k)
    turned = Alias(f"{sums.name}.turned", weight, (k, n), (b.row, b.column), b.offset)
    views: tuple[Alias, ...] = (turned,)
    rows = product.call.args[0]
    if product.call.op == SCALED_CONVOLUTION:
        assert isinstance(a, Matrix)
        places = Alias(f"{sums.name}.places", a.buffer, (product.sizes[1], k), (a.row, a.column), a.offset)
        views, rows = (turned, places), Ref(places.name)
    given = (rows, Ref(turned.name), *((sums.dtype,) if op == _WITH_DTYPE else ()))
    call = Call(op, given, {}, (sums.name,), product.call.origin)
    _, row, column = fused.axes

    def summed(load: Load) -> Scalar | None:
        if load.buffer != fused.result:
            return None
        place = add(mul(symbol(row), n), symbol(column))
        return cast(Load(sums.name, place, sums.dtype), torch.float32)

    nest = fused.region.nest
    stores = tuple(s.transformed({}, lambda v: transform(v, {}, summed)) for s in nest.stores)
    kept = {name: spec for name, spec in fused.region.buffers.items() if name != fused.result}
    region = replace(
        fused.region, name=f"{fused.region.name}.after", nest=replace(nest, stores=stores), buffers=kept | {sums.name: sums}
    )
    own = {sums.name: sums} | {n: s for step in before for n, s in step.buffers.items() if n == weight}
    assert isinstance(a, Matrix)
    names = tuple(dict.fromkeys((a.buffer, weight, *kept, sums.name, *(n for step in before for n in step.buffers))))
    return LibraryForm(Way(label, (*before, call, region)), own, views, names)


def _widening(product: Product, wide: BufferSpec, buffers: Mapping[str, BufferSpec]) -> Region:
    """The kernel that stores the weight of `product` in `wide` [N, K]; scales of output channels are the epilogue's."""
    kind = product.quantized
    assert kind is not None
    _, _, k, n = product.sizes
    x = Sym("x0", size=n)
    spec = buffers[product.b.buffer]
    if kind.bits == 8:
        y = Sym("x1", size=k)
        load = Load(spec.name, _at(product.b, None, symbol(y), symbol(x)), spec.dtype)
        stores = [Store(wide.name, add(mul(symbol(x), k), symbol(y)), cast(load, wide.dtype))]
    else:
        half = k // 2
        y = Sym("x1", size=half)
        packed = Load(spec.name, _at(product.b, None, symbol(y), symbol(x)), torch.uint8)
        stores = []
        for first, value in ((0, _low(packed)), (half, _high(packed))):
            at = add(symbol(y), first)
            scaled = Op("mul", (value, _scale_of(kind, buffers, at, symbol(x))), torch.float32)
            stores.append(Store(wide.name, add(mul(symbol(x), k), at), cast(scaled, wide.dtype)))
    read = {spec.name: spec} | ({} if kind.scale is None else {kind.scale.buffer: buffers[kind.scale.buffer]})
    nest = Nest((x, y), (), tuple(stores))
    return Region(f"{wide.name}.widened", nest, read | {wide.name: wide}, wide.device, (), (product.call.origin,))


def _fresh(
    name: str, dtype: torch.dtype, product: Product, buffers: Mapping[str, BufferSpec], shape: tuple[Int, ...]
) -> BufferSpec:
    return BufferSpec(name, dtype, buffers[product.b.buffer].device, shape, contiguous_strides(shape))
