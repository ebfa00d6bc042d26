"""What is computed from products, as their epilogue."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import replace
from itertools import chain

import torch

from fxopt.ir.exprs import contiguous_strides
from fxopt.ir.loops import Load, Nest, Op, Scalar, Store, postorder, transform
from fxopt.ir.region import BufferSpec, Contraction, Region
from fxopt.lower.align import along, mappings
from fxopt.lower.joining import combine, remap, with_nests
from fxopt.lower.pools import pooled
from fxopt.lower.products import Product


class Epilogues:
    """Makes contractions of products of a graph with `buffers`; `operands` are these and what was made for kernels, to which
    others may be added later.
    """

    def __init__(self, buffers: Mapping[str, BufferSpec], operands: Mapping[str, BufferSpec]) -> None:
        self._buffers, self._operands = buffers, operands

    def of(self, product: Product, region: Region, wanted: bool) -> Contraction | None:
        """`product` with `region` as its epilogue, which stores the product as well where it is `wanted`."""
        name, own = product.result.buffer, self.alone(product)
        joined = self._joined(product, own, region)
        if joined is None:
            return None
        if not wanted:
            joined = replace(joined, stores=tuple(s for s in joined.stores if s.buffer != name))
        both = _with_parts_of(own.region, region.name, region)
        return self._with_epilogue((product,), (own.result,), with_nests(both, joined, None))

    def of_pools(
        self, product: Product, first: Region | None, region: Region, wanted: Collection[str]
    ) -> Contraction | None:
        """Convolution `product` with `region` as its epilogue, each of whose points reads a pool of places: of the product,
        or of what `first` computes of it. Of what these store the buffers `wanted` are stored as well.
        """
        own = self.alone(product)
        made = own.region.nest if first is None else self._joined(product, own, first)
        may = made is not None and self._may_follow(region, product)
        found = pooled(product, made, own.result, region, wanted) if made is not None and may else None
        if found is None:
            return None
        shape = tuple(s.size for s in found.product.points if s.size is not None)
        like = replace(self._buffers[product.result.buffer], shape=shape, strides=contiguous_strides(shape))
        both = _with_parts_of(
            own.region, f"{region.name}.pools", region if first is None else _with_parts_of(first, "", region)
        )
        both.buffers.update({r: _in_registers(product, r, like) for r in found.registers})
        made_of = self._with_epilogue((found.product,), found.registers, with_nests(both, found.nest, None))
        return replace(made_of, pooled=found.registers)

    def _joined(self, product: Product, own: Contraction, region: Region) -> Nest | None:
        """The nest of `own`, which is `product` alone, and `region` as one."""
        name, nest, shape = product.result.buffer, region.nest, own.region.nest
        if not self._may_follow(region, product):
            return None
        for mapping in chain(mappings(nest, shape), along(nest, shape, name)):
            joined = combine(shape, remap(nest, mapping, shape))
            if joined is None or any(load.index != product.index for load in joined.loads() if load.buffer == own.result):
                continue
            return joined
        return None

    def _may_follow(self, region: Region, *products: Product) -> bool:
        """Whether `region` may be an epilogue: it goes over elements, and writes no operand, which other programs read."""
        device = self._buffers[products[0].result.buffer].device
        if region.across is not None or region.nest.reduced or region.device != device or not _is_plain(region.nest):
            return False
        return not {m.buffer for p in products for m in (p.a, p.b)} & set(region.writes())

    def of_two(self, one: Product, two: Product, region: Region, wanted: Sequence[bool]) -> Contraction | None:
        """`region` as the epilogue of two products of one left operand; it stores those as well that are `wanted`."""
        if not self._may_follow(region, one, two):
            return None
        shape, buffers = self.alone(one).region.nest, self._buffers
        products = {f"{one.result.buffer}.first": one, f"{two.result.buffer}.second": two}
        registers = tuple(f"{name}.product" for name in products)
        values = (p.value(r, buffers[p.result.buffer].dtype) for p, r in zip(products.values(), registers, strict=True))
        stores = tuple(Store(n, p.index, v) for (n, p), v in zip(products.items(), values, strict=True))
        specs = {n: buffers[n] for store in stores for n in Nest((), (), (store,)).reads() if n in buffers}
        for (name, p), register in zip(products.items(), registers, strict=True):
            own_spec = buffers[p.result.buffer]
            specs |= {name: replace(own_spec, name=name), register: _in_registers(p, register, own_spec)}
        own = Region("", Nest(one.points, (), stores), specs, region.device, (), (one.call.origin, two.call.origin))
        for mapping in (*mappings(region.nest, shape), *along(region.nest, shape, one.result.buffer)):
            after = _renamed(remap(region.nest, mapping, shape), products)
            joined = None if after is None else combine(own.nest, after)
            if joined is None:
                continue
            real = {n: p.result.buffer for (n, p), w in zip(products.items(), wanted, strict=True) if w}
            kept = tuple(replace(s, buffer=real.get(s.buffer, s.buffer)) for s in joined.stores)
            joined = replace(joined, stores=tuple(s for s in kept if s.buffer not in products))
            both = _with_parts_of(own, f"{region.name}.two", region)
            both.buffers.update({n: buffers[n] for n in real.values()})
            return self._with_epilogue((one, two), registers, with_nests(both, joined, None))
        return None

    def alone(self, product: Product) -> Contraction:
        """`product` with nothing but its own store."""
        buffers, name = self._buffers, product.result.buffer
        registers = f"{name}.product"
        value = product.value(registers, buffers[name].dtype)
        nest = Nest(product.points, (), (Store(name, product.index, value),))
        specs = {n: buffers[n] for n in (*nest.reads(), name) if n in buffers}
        specs[registers] = _in_registers(product, registers, buffers[name])
        region = Region(f"{name}.gemm", nest, specs, buffers[name].device, (), (product.call.origin,))
        return self._with_epilogue((product,), (registers,), region)

    def _with_epilogue(self, products: Sequence[Product], registers: Sequence[str], region: Region) -> Contraction:
        first, *others = products
        operands = [*(m.buffer for p in products for m in (p.a, p.b)), *([first.ends] if first.ends else [])]
        operands += [p.quantized.scale.buffer for p in products if p.quantized is not None and p.quantized.scale is not None]
        touched = {n: s for n, s in region.buffers.items() if n not in registers}
        touched |= {n: self._operands[n] for n in operands}
        tf32 = self._buffers[first.a.buffer].dtype == torch.float32
        made = Contraction(
            region.name,
            first.a,
            first.b,
            first.sizes[2],
            registers[0],
            first.axes,
            region,
            touched,
            tf32=tf32,
            ends=first.ends,
            quantized=tuple(p.quantized for p in products if p.quantized is not None),
        )
        return replace(made, c=others[0].b, second=registers[1]) if others else made


def _in_registers(product: Product, name: str, result: BufferSpec) -> BufferSpec:
    """The pseudo-buffer of a product whose call makes `result`."""
    return replace(result, name=name, dtype=torch.float32 if product.sums_float32 else result.dtype)


def _is_plain(nest: Nest) -> bool:
    """Whether every store is an ordinary one, or adds up neighbours in a row, and no index is checked: a failing check would
    end the context while candidates are measured on made-up data."""
    if any(s.mode not in ("set", "sums") or s.indirect for s in nest.stores):
        return False
    return not any(isinstance(n, Op) and n.name == "checked_index" for n in postorder(nest.roots))


def _with_parts_of(own: Region, name: str, region: Region) -> Region:
    """`own`, called `name`, with buffers, nodes and origins of `region` beside its own."""
    return replace(
        own,
        name=name,
        buffers=own.buffers | region.buffers,
        nodes=tuple(dict.fromkeys((*own.nodes, *region.nodes))),
        origins=tuple(dict.fromkeys((*own.origins, *region.origins))),
    )


def _renamed(nest: Nest, products: Mapping[str, Product]) -> Nest | None:
    """`nest` with loads of the elements of `products` from the buffers that they are named by; None if it loads others of
    their results.
    """
    results = {p.result.buffer for p in products.values()}
    names = {(p.result.buffer, p.index): name for name, p in products.items()}
    if any(load.indirect or (load.buffer, load.index) not in names for load in nest.loads() if load.buffer in results):
        return None

    def renamed(load: Load) -> Scalar | None:
        name = names.get((load.buffer, load.index))
        return None if name is None else Load(name, load.index, load.dtype)

    stores = tuple(s.transformed({}, lambda v: transform(v, {}, renamed)) for s in nest.stores)
    return replace(nest, stores=stores)
