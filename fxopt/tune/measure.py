"""What a candidate costs, by running it on this GPU: the one place where compilation asks the hardware."""

from __future__ import annotations

import logging
import statistics
import time
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import torch

from fxopt.ir.exprs import Int, assumed, evaluate, free_symbols, symbol
from fxopt.ir.region import Batch, BufferSpec, Region
from fxopt.journal import Journal
from fxopt.lower.cost import nbytes
from fxopt.runtime.batch import BatchLauncher
from fxopt.runtime.launch import CudaError, load_cubin

if TYPE_CHECKING:
    from fxopt.tune.choose import Choice

METHOD = 3
"""Number of this way of measuring, part of every record's key."""

ROUNDS = 5
MOST_LAUNCHES = 8
SAMPLE_SECONDS = 200e-6
"""A sample is as many launches as fill this time, at most MOST_LAUNCHES."""

FILLER_BYTES = 1 << 28
Run = Callable[[], object]

log = logging.getLogger(__name__)


class Measurements:
    """Times candidates of regions, interleaved, on data of the region's shapes. One per compilation; it keeps the budget.

    Every sample starts with a large fill and one launch that is not timed: while they run, the timed launches are queued, so
    that kernels shorter than the launch overhead are told apart. The launches share their buffers, so what fits the L2 cache
    is found there, as in a model where the previous kernel has just written it. Weights and what the forward saved are
    not there: where that makes a difference, launches with a cold cache count as much, lest few programs that a warm cache
    serves well enough look good.
    """

    def __init__(self, journal: Journal, budget: float) -> None:
        self.journal, self.left = journal, budget
        self._said = False

    def compare(self, region: Region | Batch, choices: Sequence[Choice]) -> list[float] | None:
        """Seconds of one run of each choice (infinity for one that does not load), or None when nothing can be measured."""
        if self.left <= 0:
            self.journal.provisional = True
            if not self._said:
                self.journal.note("tuning", f"{region.name} and later regions: not measured, the time budget is spent")
            self._said = True
            return None
        start = time.perf_counter()
        try:
            with torch.cuda.device(region.device):
                seconds = time_choices(region, choices)
                if _may_stay_in_cache(region):
                    cold = time_choices(region, choices, cold=True)
                    seconds = [(a + b) / 2 for a, b in zip(seconds, cold, strict=True)]
        except torch.cuda.OutOfMemoryError:
            self.journal.note("tuning", f"{region.name}: not measured, the GPU is out of memory")
            self.journal.provisional = True
            return None
        finally:
            self.left -= time.perf_counter() - start
        figures = ", ".join(f"{c.label}: {s * 1e6:.1f} us" for c, s in zip(choices, seconds, strict=True))
        log.info("%s: %s: %s", self.journal.graph, region.name, figures)
        return seconds


def _may_stay_in_cache(region: Region | Batch) -> bool:
    """Whether one launch leaves part of what the next one reads in the L2 cache."""
    cache = getattr(torch.cuda.get_device_properties(region.device), "L2_cache_size", 0)
    return sum(nbytes(spec) for spec in region.buffers.values()) < 2 * cache


def time_choices(region: Region | Batch, choices: Sequence[Choice], cold: bool = False) -> list[float]:
    """Median seconds of one run of each choice on random data; infinity for one that does not load.

    `cold` times single launches right after the fill, which leaves nothing of the inputs in the L2 cache.
    """
    sizes = assumed_sizes(region, choices)
    generator = torch.Generator(region.device).manual_seed(0)  # the user's own keeps its state
    tensors = {name: _allocate(spec, sizes, generator) for name, spec in region.buffers.items()}
    runs = [runner(choice, tensors, sizes) for choice in choices]
    return interleaved(runs, region.device, cold)


def eager_seconds(run: Run, device: torch.device) -> float:
    """Median seconds of `run`, which puts any work on the current stream, timed like a candidate with a cold cache."""
    return interleaved([run], device, cold=True)[0]


def interleaved(runs: Sequence[Run | None], device: torch.device, cold: bool) -> list[float]:
    filler = torch.empty(FILLER_BYTES, dtype=torch.uint8, device=device)
    first = [_seconds(run, filler, 1, cold=False) for run in runs]
    launches = max(1, min(MOST_LAUNCHES, round(SAMPLE_SECONDS / max(min(first), 1e-9))))
    times: list[list[float]] = [[] for _ in runs]
    for _ in range(ROUNDS):
        for k, run in enumerate(runs):
            times[k].append(_seconds(run, filler, 1 if cold else launches, cold))
    return [statistics.median(t) for t in times]


def _seconds(run: Run | None, filler: torch.Tensor, launches: int, cold: bool) -> float:
    if run is None:
        return float("inf")
    start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    filler.zero_()
    if not cold:
        run()
    start.record()
    for _ in range(launches):
        run()
    end.record()
    end.synchronize()
    return float(start.elapsed_time(end)) / 1e3 / launches


def runner(choice: Choice, shared: dict[str, torch.Tensor], sizes: dict[str, int]) -> Run | None:
    """A function that runs `choice` once on the current stream; None when it does not load."""
    tensors = shared | {spec.name: _allocate(spec, sizes) for spec in choice.scratch}
    stream = torch.cuda.current_stream().cuda_stream
    launches: list[tuple[Callable[..., None], tuple[Any, ...]]] = []
    for source, artifact in choice.kernels:
        try:
            launcher = load_cubin(artifact.path, artifact.meta, torch.cuda.current_device()).bind(artifact.entry)
        except (CudaError, OSError):  # OSError: another process has just evicted its file
            return None
        grid = [evaluate(g, sizes) for g in source.grid]
        pointers = [tensors[name].data_ptr() for name in source.buffers]
        if source.members:
            device, width = tensors[source.buffers[0]].device, len(source.buffers) // len(source.members)
            batch = BatchLauncher(launcher, source.members, source.block, width, device)
            launches.append((batch, (stream, tuple(pointers))))
            continue
        launches.append((launcher, (stream, *grid, *pointers, *(evaluate(s, sizes) for s in source.sizes))))

    def run() -> None:
        for launcher, arguments in launches:
            launcher(*arguments)

    return run


def assumed_sizes(region: Region | Batch, choices: Sequence[Choice]) -> dict[str, int]:
    """A number for every size symbol: what is measured when a size is known only at run time."""
    given: list[Int] = [x for spec in region.buffers.values() for x in (*spec.shape, *spec.strides)]
    given += [x for choice in choices for source, _ in choice.kernels for x in (*source.sizes, *source.grid)]
    given += [x for choice in choices for spec in choice.scratch for x in spec.shape]
    return {sym.name: assumed(symbol(sym)) for x in given for sym in free_symbols(x)}


def _allocate(spec: BufferSpec, sizes: dict[str, int], generator: torch.Generator | None = None) -> torch.Tensor:
    """Memory for a buffer: random floats where there is a `generator`, else zeros (float8 has no normal_)."""
    extent = max(evaluate(spec.extent, sizes), 1)
    if generator is not None and spec.dtype.is_floating_point and spec.dtype.itemsize > 1:
        return torch.empty(extent, device=spec.device, dtype=spec.dtype).normal_(generator=generator)
    return torch.zeros(extent, device=spec.device, dtype=spec.dtype)
