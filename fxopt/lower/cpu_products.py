"""Matrix products on the CPU in the forms of several libraries: which calls are such products, and how each form is called.

`tune/library.py` decides which form is fastest. oneDNN wants its weight transposed, or packed once into its own blocked
layout, which only a constant can be.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch

from fxopt.ir.exprs import assumed, contiguous_strides
from fxopt.ir.region import Alias, BufferSpec, Call, Ref, Step
from fxopt.lower.lowering import Lowered

ATEN, ONEDNN, PACKED = "aten", "onednn", "onednn-packed"
LINEAR = "mkldnn::_linear_pointwise.default"


@dataclass(frozen=True)
class Product:
    """a [m, k] times b [k, n], plus `bias` [n] or None; a and b are strided views of buffers."""

    call: Call
    a: Alias
    b: Alias
    bias: str | None
    sizes: tuple[int, int, int]
    packable: bool

    @property
    def forms(self) -> tuple[str, ...]:
        """The ways to call it, torch's own first."""
        return (ATEN, ONEDNN, PACKED) if self.packable else (ATEN, ONEDNN)


def find_products(lowered: Lowered) -> list[Product]:
    """Every plain float32 matrix product on the CPU among the calls of `lowered`, in order."""
    views = {s.name: s for s in lowered.steps if isinstance(s, Alias)}
    found = [_product(s, lowered, views) for s in lowered.steps if isinstance(s, Call)]
    return [p for p in found if p is not None]


def with_forms(lowered: Lowered, forms: Mapping[Product, str]) -> Lowered:
    """`lowered`, not yet scheduled, with each product called in the form given for it. Views may lose their last reader."""
    by_call = {id(product.call): product for product in forms}
    rewriter = _Rewriter(lowered)
    steps: list[Step] = []
    for step in lowered.steps:
        product = by_call.get(id(step))
        steps += [step] if product is None else rewriter.called(product, forms[product])
    return replace(lowered, steps=steps, buffers=rewriter.buffers, constants=rewriter.constants)


class _Rewriter:
    """Collects the views, buffers and packed constants that calls in other forms need."""

    def __init__(self, lowered: Lowered) -> None:
        self.buffers = dict(lowered.buffers)
        self.constants = dict(lowered.constants)
        self.packed: dict[Alias, str] = {}

    def called(self, product: Product, form: str) -> list[Step]:
        """The steps that compute `product` in `form`."""
        if form == ATEN:
            return [product.call]
        steps: list[Step] = []
        if form == PACKED:
            weight = self._packed(product)
        else:
            weight = self._transposed(product, steps)
        bias = None if product.bias is None else Ref(product.bias)
        args: tuple[Any, ...] = (Ref(product.a.name), Ref(weight), bias, "none", [], "")
        return [*steps, Call(LINEAR, args, {}, product.call.outputs, product.call.origin)]

    def _transposed(self, product: Product, steps: list[Step]) -> str:
        """The name of b as oneDNN wants it, [n, k]: the buffer itself if that is its layout, else a view added to
        `steps`.
        """
        flip = replace(product.b, shape=product.b.shape[::-1], strides=product.b.strides[::-1])
        spec = self.buffers[flip.of]
        if flip.offset == 0 and (flip.shape, flip.strides) == (spec.shape, spec.strides):
            return flip.of
        steps.append(replace(flip, name=f"{product.call.outputs[0]}_weight"))
        return f"{product.call.outputs[0]}_weight"

    def _packed(self, product: Product) -> str:
        """The name of the packed weight among the constants; packs it the first time."""
        key = replace(product.b, name="")
        if key not in self.packed:
            name = f"{product.b.of}_packed{len(self.packed)}"
            weight = _view(self.constants[product.b.of], product.b).t()
            packed = torch.ops.mkldnn._reorder_linear_weight(weight.contiguous(), product.sizes[0])
            self.constants[name] = packed
            shape = tuple(packed.shape)
            self.buffers[name] = BufferSpec(name, packed.dtype, packed.device, shape, contiguous_strides(shape))
            self.packed[key] = name
        return self.packed[key]


def _product(call: Call, lowered: Lowered, views: dict[str, Alias]) -> Product | None:
    """`call` as a Product if it is a plain float32 matrix product on the CPU."""
    if call.op not in ("aten::mm.default", "aten::addmm.default") or call.kwargs:
        return None
    operands = [_as_view(arg.name, lowered, views) for arg in call.args]
    specs = [lowered.buffers.get(v.of) if v is not None else None for v in operands]
    if any(s is None or s.device.type != "cpu" or s.dtype != torch.float32 for s in specs):
        return None
    a, b = operands[-2], operands[-1]
    assert a is not None and b is not None
    bias = operands[0] if len(operands) == 3 else None
    if bias is not None and (len(bias.shape) != 1 or bias.strides != (1,)):
        return None
    m, k, n = assumed(a.shape[0]), assumed(a.shape[1]), assumed(b.shape[1])
    if not isinstance(a.shape[1], int) or not isinstance(b.shape[1], int) or 0 in (m, k, n):
        return None
    return Product(call, a, b, None if bias is None else call.args[0].name, (m, k, n), b.of in lowered.constants)


def _as_view(name: str, lowered: Lowered, views: dict[str, Alias]) -> Alias | None:
    if name in views:
        return views[name] if views[name].of in lowered.buffers else None
    spec = lowered.buffers.get(name)
    return None if spec is None else Alias(name, name, spec.shape, spec.strides, 0)


def _view(tensor: torch.Tensor, view: Alias) -> torch.Tensor:
    assert isinstance(view.offset, int)
    return tensor.as_strided(view.shape, view.strides, tensor.storage_offset() + view.offset)  # type: ignore[arg-type]
