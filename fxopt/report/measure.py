"""Measuring contenders side by side: interleaved times, kernels that the profiler saw, peak memory."""

from __future__ import annotations

import math
import statistics
import time
from collections import Counter
from collections.abc import Callable, Hashable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeVar

import torch

Call = Callable[[], Any]
Key = TypeVar("Key", bound=Hashable)
MOST_FLUSHES = 100
"""Of the L2 cache before one call: some milliseconds."""

STEADY = 0.1
"""Quartiles of undisturbed times lie no further apart than this share of the median."""


@dataclass
class Timing:
    """Seconds per call: `median` of the samples and their quartiles."""

    samples: list[float] = field(default_factory=list)

    @property
    def median(self) -> float:
        return statistics.median(self.samples)

    @property
    def quartiles(self) -> tuple[float, float]:
        if len(self.samples) < 2:
            return self.median, self.median
        low, _, high = statistics.quantiles(self.samples, n=4, method="inclusive")
        return low, high

    @property
    def steady(self) -> bool:
        low, high = self.quartiles
        return high - low <= STEADY * self.median


def interleaved(
    calls: Mapping[Key, Call],
    device: torch.device,
    *,
    seconds: float,
    min_rounds: int = 3,
    max_rounds: int = 100,
    flush: bool = False,
    ahead: bool = False,
    patience: float = 1.0,
    tick: Callable[[float], None] = lambda share: None,
) -> dict[Key, Timing]:
    """Time warmed-up `calls` round by round, each once per round, for about `seconds` in all; up to `patience` times as long
    while the times of one are not `steady`.

    Interleaving spreads drift of the machine's clock and of its other tenants evenly. The order turns with every round. A
    sample is the mean of as many calls as fill 10 ms. On CUDA times are between device events; `flush` writes over the L2
    cache before every call, so that memory-bound kernels are not timed on cached inputs. With `ahead` it does so for as long
    as the host needs to launch the call, so that the time is the device's alone. `tick` gets the share done.
    """
    timer = _CudaTimer(device, flush or ahead) if device.type == "cuda" else _HostTimer()
    if ahead:
        timer.stay_ahead(calls.values())
    timings = {name: Timing() for name in calls}
    repeats = {name: timer.repeats(call) for name, call in calls.items()}
    start, order = time.perf_counter(), list(calls)
    for number in range(max_rounds):
        for name in order:
            timings[name].samples.append(timer.sample(calls[name], repeats[name]))
        order = order[1:] + order[:1]
        elapsed = time.perf_counter() - start
        tick(min(1.0, max(elapsed / max(seconds, 1e-9), (number + 1) / max_rounds)))
        if elapsed <= seconds or number + 1 < min_rounds:
            continue
        if elapsed > patience * seconds or all(timing.steady for timing in timings.values()):
            break
    tick(1.0)
    return timings


class _HostTimer:
    def stay_ahead(self, calls: Iterable[Call]) -> None:
        """Nothing to do: the host is the device."""

    def sample(self, call: Call, repeats: int) -> float:
        start = time.perf_counter()
        for _ in range(repeats):
            call()
        return (time.perf_counter() - start) / repeats

    def repeats(self, call: Call) -> int:
        return _repeats(lambda: self.sample(call, 1), 1000)


class _CudaTimer:
    def __init__(self, device: torch.device, flush: bool) -> None:
        self.device = device
        size = 4 * torch.cuda.get_device_properties(device).L2_cache_size
        self.scratch = torch.empty(size, dtype=torch.uint8, device=device) if flush else None
        self.flushes, self.flush_seconds = 1, 0.0

    def stay_ahead(self, calls: Iterable[Call]) -> None:
        """Flush before each call for twice the time that the slowest of `calls` keeps the host."""
        assert self.scratch is not None
        self.flush_seconds = self._between_events(self.scratch.zero_, 10)
        host = max(min(self._launching(call) for _ in range(3)) for call in calls)
        self.flushes = max(1, min(MOST_FLUSHES, math.ceil(2 * host / self.flush_seconds)))

    def _launching(self, call: Call) -> float:
        """Seconds until `call` returns on an idle device."""
        torch.cuda.synchronize(self.device)
        start = time.perf_counter()
        call()
        return time.perf_counter() - start

    def sample(self, call: Call, repeats: int) -> float:
        if self.scratch is not None:
            return statistics.median(self._between_events(call, 1) for _ in range(repeats))
        return self._between_events(call, repeats)

    def _between_events(self, call: Call, repeats: int) -> float:
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        if self.scratch is not None:
            for _ in range(self.flushes):
                self.scratch.zero_()
        start.record()
        for _ in range(repeats):
            call()
        end.record()
        end.synchronize()
        return start.elapsed_time(end) / 1e3 / repeats

    def repeats(self, call: Call) -> int:
        torch.cuda.synchronize(self.device)
        between = self.flushes * self.flush_seconds
        return _repeats(lambda: self._between_events(call, 1) + between, 200)


def _repeats(sample: Callable[[], float], limit: int) -> int:
    """Calls that fill 10 ms, by the fastest of up to three samples: one alone may have met a hiccup."""
    best = sample()
    for _ in range(2 if best < 0.1 else 0):
        best = min(best, sample())
    return max(1, min(limit, int(0.01 / max(best, 1e-9))))


def memory_in_use(device: torch.device) -> int:
    """Bytes that torch's CUDA allocator has handed out; 0 on CPU."""
    return torch.cuda.memory_allocated(device) if device.type == "cuda" else 0


def release_memory(device: torch.device) -> None:
    """Give what torch's CUDA allocator keeps for later back to the device, where other processes can have it."""
    if device.type == "cuda":
        torch.cuda.empty_cache()


def peak_memory(call: Call, device: torch.device, base: int) -> int | None:
    """Most bytes beyond `base` that torch's CUDA allocator had handed out during one call; None on CPU."""
    if device.type != "cuda":
        return None
    torch.cuda.synchronize(device)
    torch.cuda.reset_peak_memory_stats(device)
    call()
    torch.cuda.synchronize(device)
    return torch.cuda.max_memory_allocated(device) - base


def memory_taken(device: torch.device) -> int:
    """Bytes that torch's CUDA allocator has from the device and cannot give back; 0 on CPU."""
    release_memory(device)
    return torch.cuda.memory_reserved(device) if device.type == "cuda" else 0


def peak_taken(call: Call, device: torch.device, base: int) -> int | None:
    """Most bytes beyond `base` that torch's CUDA allocator had from the device during one call; None on CPU.

    That counts what only one user may use again, such as the pools of CUDA graphs, in whole segments.
    """
    if device.type != "cuda":
        return None
    memory_taken(device)
    torch.cuda.reset_peak_memory_stats(device)
    call()
    torch.cuda.synchronize(device)
    return torch.cuda.max_memory_reserved(device) - base


def kernels_seen(call: Call, device: torch.device) -> dict[str, int]:
    """Name -> launches in one call, as torch's profiler saw them.

    On CUDA these are device kernels (copies and fills by the copy engine apart). On CPU they are operators that compute
    something: ATen's innermost ones (metadata and allocation left out) and kernels that compilers announce to the profiler.
    """
    activities = [torch.profiler.ProfilerActivity.CPU]
    if device.type == "cuda":
        activities = [torch.profiler.ProfilerActivity.CUDA]
    with torch.profiler.profile(activities=activities) as profile:
        call()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
    events = profile.events() or []
    if device.type == "cuda":
        launched = [str(e.name) for e in events if str(e.device_type).endswith("CUDA")]
        return dict(Counter(n for n in launched if not n.startswith(("Memcpy", "Memset"))))
    return dict(Counter(n for e in events if e.cpu_parent is None for n in _computing(e)))


def kernel_seconds(call: Call, device: torch.device, rounds: int = 5) -> dict[str, float]:
    """Name -> median seconds of all launches of that kernel in one call, of `rounds`, each after the L2 cache was written
    over. {} on CPU."""
    if device.type != "cuda":
        return {}
    scratch = torch.empty(4 * torch.cuda.get_device_properties(device).L2_cache_size, dtype=torch.uint8, device=device)
    taken: dict[str, list[float]] = {}
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        for _ in range(rounds):
            scratch.zero_()
            call()
        torch.cuda.synchronize(device)
    for event in profile.events() or []:
        if str(event.device_type).endswith("CUDA") and not event.name.startswith(("Memcpy", "Memset")):
            taken.setdefault(str(event.name), []).append(event.time_range.elapsed_us() * 1e-6)
    return {name: statistics.median(times) * len(times) / rounds for name, times in taken.items()}


# Operators that compute nothing: views, metadata and allocation.
_FREE = frozenset(
    """view reshape _reshape_alias as_strided expand expand_as permute transpose t unsqueeze squeeze slice select
    narrow split chunk unbind flatten unflatten detach detach_ alias empty empty_strided empty_like resize_ set_
    resolve_conj resolve_neg _unsafe_view view_as lift_fresh is_nonzero item _local_scalar_dense dropout numpy_T
    mT to _to_copy contiguous result_type""".split()
)
# Library calls whose inner operators are their own business.
_WHOLE = (
    "aten::addmm", "aten::mm", "aten::bmm", "aten::baddbmm", "aten::mkldnn", "aten::_mkl", "aten::convolution",
    "aten::_scaled_dot_product", "mkldnn::", "mkl::",
)  # fmt: skip


def _computing(event: Any) -> list[str]:
    """Names of the computing operators at or below a profiler event, innermost ones only."""
    name = str(event.name)
    if name.startswith(_WHOLE):
        return [name]
    inner = [n for child in event.cpu_children for n in _computing(child)]
    # A reduction fills its result before it starts: that is part of it.
    if inner and inner not in (["aten::fill_"], ["aten::zero_"]):
        return inner
    namespace, _, op = name.partition("::")
    if op and namespace in ("aten", "quantized", "fxopt", "onednn"):
        return [] if op in _FREE else [name]
    return [name] if "cpp_fused" in name or "cpp_" in name[:12] else []


def total(counts: dict[str, int] | None) -> int | None:
    return None if counts is None else sum(counts.values())


def geometric_mean(values: Sequence[float]) -> float:
    return statistics.geometric_mean(values)
