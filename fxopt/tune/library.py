"""Which library runs a matrix product on the CPU: ATen's own (MKL or OpenBLAS) or oneDNN, by measurement.

Both compute the same float32 product; which is faster depends on the processor by a factor of two. `lower/cpu_products.py`
says which calls are products and how each form is called.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence
from typing import Any

import torch

from fxopt.ir.exprs import assumed
from fxopt.ir.region import Alias
from fxopt.journal import Journal
from fxopt.lower import Lowered
from fxopt.lower.cpu_products import ATEN, PACKED, Product, find_products, with_forms
from fxopt.options import Options
from fxopt.runtime.artifacts import ArtifactStore
from fxopt.target import Target
from fxopt.tune.records import RecordKey, Records

REPEATS = 5
MARGIN = 0.05
"""A form must win by more than this to replace torch's own choice; noise is smaller."""

HOPELESS = 1.5
"""A form that took this much longer than another at its first turn gets no second one."""

SECONDS_PER_PRODUCT = 0.15
"""When the next turn would end after this, the turns so far decide."""

BUDGET_SECONDS = {"default": 3.0, "reduce-overhead": 3.0, "max-autotune": 30.0}
"""Time for measuring products in one graph, by mode; those past it are left to ATen for now."""


def choose_library(lowered: Lowered, options: Options, store: ArtifactStore, journal: Journal) -> Lowered:
    """`lowered`, not yet scheduled, with every float32 matrix product on the CPU given to the library that is fastest at its
    shape.
    """
    if not torch.backends.mkldnn.is_available() or not torch.backends.mkldnn.enabled or options.tuning_seconds == 0:
        return lowered
    budget = BUDGET_SECONDS[options.mode] if options.tuning_seconds is None else options.tuning_seconds
    contests = _Contests(Records(store.cache, Target.cpu().key), budget, journal)
    return with_forms(lowered, {product: contests.winner(product) for product in find_products(lowered)})


class _Contests:
    """Winners from the records, or measured within the budget of one graph."""

    def __init__(self, records: Records, budget: float, journal: Journal) -> None:
        self.records, self.left, self.journal = records, budget, journal

    def winner(self, product: Product) -> str:
        key = RecordKey("cpu matrix product", _facts(product))
        found = self.records.get(key)
        if found is None or found.get("winner") not in product.forms:
            if self.left <= 0:
                self.journal.provisional = True
                self.journal.note("library", f"{product.call.origin}: not measured, the time budget is spent")
                return ATEN
            found = self._measured(product)
            self.records.put(key, found)
        winner = str(found["winner"])
        self.journal.note("library", f"{product.call.origin}: {winner} for {product.sizes}")
        return winner

    def _measured(self, product: Product) -> dict[str, Any]:
        start = time.perf_counter()
        seconds = _measure(product)
        self.left -= time.perf_counter() - start
        best = min(seconds, key=lambda form: seconds[form])
        return {"winner": best if seconds[best] < seconds[ATEN] * (1 - MARGIN) else ATEN, "seconds": seconds}


def _facts(product: Product) -> dict[str, Any]:
    return {
        "op": product.call.op,
        "mkn": list(product.sizes),
        "strides": [[assumed(x) for x in product.a.strides], [assumed(x) for x in product.b.strides]],
        "bias": product.bias is not None,
        "candidates": list(product.forms),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
    }


def _measure(product: Product) -> dict[str, float]:
    """Median seconds of each form on random data of the product's shape and layout, interleaved.

    The first turn of each, unmeasured, pays for what the library sets up once.
    """
    m, k, n = product.sizes
    generator = torch.Generator().manual_seed(0)  # the user's own keeps its state
    a, b = _random(product.a, (m, k), generator), _random(product.b, (k, n), generator)
    bias = torch.randn(n, generator=generator) if product.bias is not None else None
    runs = {form: _run(form, a, b, bias) for form in product.forms}
    for run in runs.values():
        run()
    times = {form: [_timed(run)] for form, run in runs.items()}
    fastest = min(t[0] for t in times.values())
    rivals = [form for form in runs if times[form][0] < HOPELESS * fastest]
    _take_turns(rivals, runs, times)
    return {form: statistics.median(values) for form, values in times.items()}


def _take_turns(rivals: Sequence[str], runs: dict[str, Callable[[], Any]], times: dict[str, list[float]]) -> None:
    if len(rivals) < 2:
        return
    turn = sum(times[form][0] for form in rivals)
    for k in range(1, REPEATS):
        if k > 1 and k * turn > SECONDS_PER_PRODUCT:
            return
        for form in rivals:
            times[form].append(_timed(runs[form]))


def _timed(run: Callable[[], Any]) -> float:
    start = time.perf_counter()
    run()
    return time.perf_counter() - start


def _random(view: Alias, shape: tuple[int, int], generator: torch.Generator) -> torch.Tensor:
    """Random data in the view's orientation (row- or column-major)."""
    if assumed(view.strides[0]) < assumed(view.strides[1]):
        return torch.randn(shape[::-1], generator=generator).t()
    return torch.randn(shape, generator=generator)


def _run(form: str, a: torch.Tensor, b: torch.Tensor, bias: torch.Tensor | None) -> Callable[[], Any]:
    if form == ATEN:
        return (lambda: torch.mm(a, b)) if bias is None else lambda: torch.addmm(bias, a, b)
    weight = b.t()
    if form == PACKED:
        weight = torch.ops.mkldnn._reorder_linear_weight(weight.contiguous(), a.shape[0])
    return lambda: torch.ops.mkldnn._linear_pointwise(a, weight, bias, "none", [], "")
