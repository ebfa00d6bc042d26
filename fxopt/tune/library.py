"""Which library runs a matrix product on the CPU: ATen's own (MKL or OpenBLAS) or oneDNN, by measurement.

Both compute the same float32 product; which is faster depends on the processor by a factor of two. oneDNN can also take
weights packed once into its own blocked layout, which only frozen (constant) weights may have.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch

from fxopt.ir.exprs import Int, bounds, contiguous_strides
from fxopt.ir.region import Alias, BufferSpec, Call, Ref, Step
from fxopt.journal import Journal
from fxopt.lower import Lowered
from fxopt.options import Options
from fxopt.runtime.artifacts import ArtifactStore
from fxopt.runtime.encoding import refs
from fxopt.target import Target
from fxopt.tune.records import RecordKey, Records

LINEAR = "mkldnn::_linear_pointwise.default"
ASSUMED_ROWS = 256
REPEATS = 5
MARGIN = 0.05
"""A candidate must win by more than this to replace the library's default choice; noise is smaller."""


@dataclass(frozen=True)
class Product:
    """a [m, k] times b [k, n], plus `bias` [n] or None; a and b are strided views of buffers."""

    call: Call
    a: Alias
    b: Alias
    bias: str | None
    sizes: tuple[int, int, int]
    packable: bool


def choose_library(lowered: Lowered, options: Options, store: ArtifactStore, journal: Journal) -> Lowered:
    """`lowered` with every float32 matrix product on the CPU given to the library that is fastest at its shape."""
    if not torch.backends.mkldnn.is_available() or not torch.backends.mkldnn.enabled:
        return lowered
    views = {s.name: s for s in lowered.steps if isinstance(s, Alias)}
    rewriter = _Rewriter(lowered, views, Records(store.cache, Target.cpu().key))
    steps: list[Step] = []
    for step in lowered.steps:
        product = _product(step, lowered, views) if isinstance(step, Call) else None
        steps += [step] if product is None else rewriter.rewrite(product, journal)
    return replace(
        lowered, steps=_without_unused_views(steps, lowered), buffers=rewriter.buffers, constants=rewriter.constants
    )


def _without_unused_views(steps: list[Step], lowered: Lowered) -> list[Step]:
    used = {o.name for o in lowered.outputs if isinstance(o, Ref)}
    kept: list[Step] = []
    for step in reversed(steps):
        if isinstance(step, Alias):
            if step.name not in used:
                continue
            used.add(step.of)
        elif isinstance(step, Call):
            used |= set(refs(step.args)) | set(refs(step.kwargs))
        kept.append(step)
    return kept[::-1]


class _Rewriter:
    def __init__(self, lowered: Lowered, views: dict[str, Alias], records: Records) -> None:
        self.buffers = dict(lowered.buffers)
        self.constants = dict(lowered.constants)
        self.views = views
        self.records = records
        self.packed: dict[Alias, str] = {}
        self.flipped = 0

    def rewrite(self, product: Product, journal: Journal) -> list[Step]:
        winner = self._winner(product)
        journal.note("library", f"{product.call.origin}: {winner} for {product.sizes}")
        if winner == "aten":
            return [product.call]
        steps: list[Step] = []
        if winner == "onednn-packed":
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

    def _winner(self, product: Product) -> str:
        candidates = ["aten", "onednn", *(["onednn-packed"] if product.packable else [])]
        facts = {
            "op": product.call.op,
            "mkn": list(product.sizes),
            "strides": [[_number(x) for x in product.a.strides], [_number(x) for x in product.b.strides]],
            "bias": product.bias is not None,
            "candidates": candidates,
            "threads": torch.get_num_threads(),
            "torch": torch.__version__,
        }
        key = RecordKey("cpu matrix product", facts)
        found = self.records.get(key)
        if found is None or found.get("winner") not in candidates:
            times = _measure(product, candidates)
            best = min(times, key=lambda c: times[c])
            found = {"winner": best if times[best] < times["aten"] * (1 - MARGIN) else "aten", "seconds": times}
            self.records.put(key, found)
        return str(found["winner"])


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
    m, k, n = _number(a.shape[0]), _number(a.shape[1]), _number(b.shape[1])
    if not isinstance(a.shape[1], int) or not isinstance(b.shape[1], int) or 0 in (m, k, n):
        return None
    return Product(call, a, b, None if bias is None else call.args[0].name, (m, k, n), b.of in lowered.constants)


def _as_view(name: str, lowered: Lowered, views: dict[str, Alias]) -> Alias | None:
    if name in views:
        return views[name] if views[name].of in lowered.buffers else None
    spec = lowered.buffers.get(name)
    return None if spec is None else Alias(name, name, spec.shape, spec.strides, 0)


def _number(x: Int) -> int:
    """A size as a number; one known only at run time is assumed."""
    return x if isinstance(x, int) else max(bounds(x)[0] or 0, ASSUMED_ROWS)


def _view(tensor: torch.Tensor, view: Alias) -> torch.Tensor:
    assert isinstance(view.offset, int)
    return tensor.as_strided(view.shape, view.strides, tensor.storage_offset() + view.offset)  # type: ignore[arg-type]


def _measure(product: Product, candidates: list[str]) -> dict[str, float]:
    """Median seconds of each candidate on random data of the product's shape and layout, interleaved."""
    m, k, n = product.sizes
    a, b = _random(product.a, (m, k)), _random(product.b, (k, n))
    bias = torch.randn(n) if product.bias is not None else None
    runs = {c: _run(c, a, b, bias) for c in candidates}
    times: dict[str, list[float]] = {c: [] for c in candidates}
    for run in runs.values():
        run()
    for _ in range(REPEATS):
        for name, run in runs.items():
            start = time.perf_counter()
            run()
            times[name].append(time.perf_counter() - start)
    return {name: statistics.median(values) for name, values in times.items()}


def _random(view: Alias, shape: tuple[int, int]) -> torch.Tensor:
    """Random data in the view's orientation (row- or column-major)."""
    column_major = _number(view.strides[0]) < _number(view.strides[1])
    return torch.randn(shape[::-1]).t() if column_major else torch.randn(shape)


def _run(candidate: str, a: torch.Tensor, b: torch.Tensor, bias: torch.Tensor | None) -> Callable[[], Any]:
    if candidate == "aten":
        return (lambda: torch.mm(a, b)) if bias is None else lambda: torch.addmm(bias, a, b)
    weight = b.t()
    if candidate == "onednn-packed":
        weight = torch.ops.mkldnn._reorder_linear_weight(weight.contiguous(), a.shape[0])
    return lambda: torch.ops.mkldnn._linear_pointwise(a, weight, bias, "none", [], "")
