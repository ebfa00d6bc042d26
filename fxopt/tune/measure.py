"""What a candidate costs, by running it on this GPU: the one place where compilation asks the hardware."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

import torch

from fxopt.ir.exprs import Int, evaluate, free_symbols
from fxopt.ir.region import BufferSpec, Region
from fxopt.journal import Journal
from fxopt.runtime.launch import CudaError, load_cubin

if TYPE_CHECKING:
    from fxopt.tune.choose import Choice

BUDGET_SECONDS = 20.0
"""Time for measuring in one graph; regions past it take the cost model's first candidate."""

ROUNDS = 5
LAUNCHES = 8
ASSUMED_SIZE = 256


class Measurements:
    """Times candidates of regions, interleaved, on data of the region's shapes. One per compilation; it keeps the budget."""

    def __init__(self, journal: Journal, budget: float = BUDGET_SECONDS) -> None:
        self.journal, self.left = journal, budget

    def compare(self, region: Region, choices: Sequence[Choice]) -> list[float] | None:
        """Seconds of one run of each choice (infinity for one that fails), or None when nothing can be measured now."""
        if self.left <= 0:
            self.journal.note("tuning", f"{region.name}: not measured, the time budget is spent")
            return None
        start = time.perf_counter()
        try:
            with torch.cuda.device(region.device):
                return _compare(region, choices)
        except torch.cuda.OutOfMemoryError:
            self.journal.note("tuning", f"{region.name}: not measured, the GPU is out of memory")
            return None
        finally:
            self.left -= time.perf_counter() - start


def _compare(region: Region, choices: Sequence[Choice]) -> list[float]:
    sizes = assumed_sizes(region, choices)
    tensors = {name: _allocate(spec, sizes) for name, spec in region.buffers.items()}
    runs = [_runner(choice, tensors, sizes) for choice in choices]
    times: list[list[float]] = [[] for _ in choices]
    for run in runs:
        _seconds(run, 2)
    for _ in range(ROUNDS):
        for k, run in enumerate(runs):
            times[k].append(_seconds(run, LAUNCHES))
    return [statistics.median(t) for t in times]


def _seconds(run: Callable[[], None] | None, launches: int) -> float:
    if run is None:
        return float("inf")
    start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    start.record()
    for _ in range(launches):
        run()
    end.record()
    end.synchronize()
    return float(start.elapsed_time(end)) / 1e3 / launches


def _runner(choice: Choice, shared: dict[str, torch.Tensor], sizes: dict[str, int]) -> Callable[[], None] | None:
    """A function that runs `choice` once on the current stream; None when it does not load."""
    tensors = shared | {spec.name: _allocate(spec, sizes) for spec in choice.scratch}
    stream = torch.cuda.current_stream().cuda_stream
    launches = []
    for source, artifact in choice.kernels:
        try:
            launcher = load_cubin(artifact.path, artifact.meta, torch.cuda.current_device()).bind(artifact.entry)
        except CudaError:
            return None
        grid = [evaluate(g, sizes) for g in source.grid]
        pointers = [tensors[name].data_ptr() for name in source.buffers]
        launches.append((launcher, (stream, *grid, *pointers, *(evaluate(s, sizes) for s in source.sizes))))

    def run() -> None:
        for launcher, arguments in launches:
            launcher(*arguments)

    return run


def assumed_sizes(region: Region, choices: Sequence[Choice]) -> dict[str, int]:
    """A number for every size symbol: what is measured when a size is known only at run time."""
    given: list[Int] = [x for spec in region.buffers.values() for x in (*spec.shape, *spec.strides)]
    given += [x for choice in choices for source, _ in choice.kernels for x in (*source.sizes, *source.grid)]
    given += [x for choice in choices for spec in choice.scratch for x in spec.shape]
    out: dict[str, int] = {}
    for x in given:
        for sym in free_symbols(x):
            low, high = sym.lo, sym.hi
            out[sym.name] = min(max(ASSUMED_SIZE, low), high if high is not None else max(ASSUMED_SIZE, low))
    return out


def _allocate(spec: BufferSpec, sizes: dict[str, int]) -> torch.Tensor:
    """Memory for a buffer: random floats; zeros for other types, which are indices as often as not and must stay in bounds."""
    extent = max(evaluate(spec.extent, sizes), 1)
    if spec.dtype.is_floating_point:
        return torch.randn(extent, device=spec.device, dtype=torch.float32).to(spec.dtype)
    return torch.zeros(extent, device=spec.device, dtype=spec.dtype)


