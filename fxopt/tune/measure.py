"""What a candidate costs, by running it on this GPU: the one place where compilation asks the hardware."""

from __future__ import annotations

import contextlib
import functools
import logging
import math
import statistics
import time
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch

from fxopt import knobs
from fxopt.errors import FxoptError
from fxopt.ir.exprs import Int, assumed, evaluate, free_symbols, symbol
from fxopt.ir.kernel import Artifact, KernelSource
from fxopt.ir.region import Alias, BufferSpec, Call, Ref, Size
from fxopt.journal import Journal
from fxopt.lower.convolutions import BIAS_OF
from fxopt.lower.cost import nbytes
from fxopt.runtime.batch import BatchLauncher
from fxopt.runtime.device_lock import device_identity, turn
from fxopt.runtime.graph_driver import GraphDriver
from fxopt.runtime.launch import CudaError, load_cubin
from fxopt.runtime.plan_ops import resolve_op
from fxopt.target import Target
from fxopt.tune.suspects import Suspects

METHOD = 12
"""Number of this way of measuring, part of every record's key."""

ROUNDS = 5
FIRST_ROUNDS = 2
BEHIND = 1.25
"""After FIRST_ROUNDS, what takes this many times as long as the fastest is not measured further."""

SURE_ROUNDS = 3
APART = 1.03
"""After SURE_ROUNDS, nor is what took, in its best round, this many times as long as the fastest took in its worst."""

MOST_LAUNCHES = 8
SAMPLE_SECONDS = 200e-6
"""A sample is as many launches as fill this time, at most MOST_LAUNCHES."""

FILLER_BYTES = 1 << 28
FASTEST_MEMORY = 8e12
"""Bytes a second that no GPU fills faster."""

MOST_FILLS = 32

REPEATS = 8
"""Runs in a CUDA graph that is measured."""

CLOSE = 1.03
"""What takes so many times as long as the fastest in a row of launches is as fast: what it takes alone decides."""

MOST_COPIES, FEWEST_IN_TURN = 96, 8
"""Of buffers that are to be cold: what would need more is bound by its launch; and runs in one sample."""

OF_EQUAL_ELEMENTS = 0.75
"""What made-up buffers of equal elements hold: not 1, which a kernel that forgets to multiply by it would get away with."""

PATIENCE_SECONDS = 60.0
"""How long one compilation waits in all while other processes measure on its GPU; then it measures beside them."""

Run = Callable[[], object]


@dataclass(frozen=True)
class Memory:
    """Buffers that trials share. `bounds` says what the elements of a buffer of indices stay below, `ends` how many rows the
    groups have whose ends a buffer holds, `uniform` which floating buffers have equal elements, so that one may be read for
    all. Those in `cold` are never in the L2 cache when what is measured runs; nothing runs before or after it with `single`.
    """

    buffers: Mapping[str, BufferSpec]
    bounds: Mapping[str, Int] = field(default_factory=dict)
    ends: Mapping[str, int] = field(default_factory=dict)
    uniform: frozenset[str] = frozenset()
    cold: frozenset[str] = frozenset()
    single: bool = False


@dataclass(frozen=True)
class BoundCall:
    """A library call with what describes the tensors that it names."""

    call: Call
    buffers: Mapping[str, BufferSpec]
    views: tuple[Alias, ...]


@dataclass(frozen=True)
class Trial:
    """What is run to find out what it costs: kernels and library calls in order, with scratch buffers of their own."""

    label: str
    parts: tuple[tuple[KernelSource, Artifact] | BoundCall, ...]
    scratch: tuple[BufferSpec, ...] = ()


Check = Callable[[Memory, torch.device, Sequence[Trial], Suspects], frozenset[str]]
"""The labels of trials that must not be kept, however fast."""

log = logging.getLogger(__name__)


class Measurements:
    """Times candidates of regions, interleaved, on data of the region's shapes. One per compilation; it keeps the budget.

    Every sample starts with large fills and one launch that is not timed: while they run, the timed launches are queued, so
    that what is shorter than its launch or call on the host is told apart. The launches share their buffers, so what fits
    the L2 cache is found there, as in a model where the previous kernel has just written it. Weights and what was saved
    are not there, and the cache is full of what others wrote, which goes to memory as new lines come (an eighth of the time
    of 400 MB on an H200, for kernels that let all lines drive them out, and nothing for those that do not): launches with
    such a cache count as much, also lest few programs that a warm cache serves well enough look good. Where weights and
    states are most of what is read, and known not to be there (`Memory.cold`), only such launches count (`rotated_seconds`):
    in a row, as a plan has them, and alone for those of which that tells no difference (`with_ties_broken`), or where a plan
    has no others.
    """

    def __init__(self, journal: Journal, budget: float, suspects: Suspects | None = None) -> None:
        self.journal, self.left = journal, budget
        self.suspects = Suspects(None) if suspects is None else suspects
        self._patience = PATIENCE_SECONDS
        self._said = False

    @contextlib.contextmanager
    def turn(self, device: torch.device, cache: Path) -> Iterator[None]:
        """No other process with the same `cache` (or FXOPT_LOCK_DIR) measures on `device` in the block, unless this one has
        waited too long. Waiting is not charged to the budget."""
        if self.left <= 0:
            yield  # `compare` is going to measure nothing
            return
        start, patience = time.monotonic(), self._patience
        with turn_on(device, cache, patience) as held:
            self._patience = max(0.0, patience - (time.monotonic() - start))
            if not held and patience > 0.0 == self._patience:
                self.journal.note("tuning", "measured while another process measured on this GPU, after a long wait for it")
            yield

    def compare(
        self, name: str, memory: Memory, device: torch.device, trials: Sequence[Trial], check: Check | None = None
    ) -> list[float] | None:
        """Seconds of one run of each of `trials` (infinity for one that does not run), or None when nothing can be measured.

        `name` says whose trials they are; `memory` is what they share. What `check` names has
        infinity, too. Raises HungKernelError for one that does not end.
        """
        if self.left <= 0:
            self.journal.provisional = True
            if not self._said:
                self.journal.note("tuning", f"{name} and later regions: not measured, the time budget is spent")
            self._said = True
            return None
        start = time.perf_counter()
        try:
            with torch.cuda.device(device):
                wrong = check(memory, device, trials, self.suspects) if check is not None else frozenset()
                right = [t for t in trials if t.label not in wrong]
                timed = self._timed(memory, device, right)
        except torch.cuda.OutOfMemoryError:
            self.journal.note("tuning", f"{name}: not measured, the GPU is out of memory")
            self.journal.provisional = True
            return None
        finally:
            self.left -= time.perf_counter() - start
        for label in sorted(wrong):
            self.journal.note("tuning", f"{name}: {label} is no candidate, its values are not those of {trials[0].label}")
        seconds_of = {t.label: s for t, s in zip(right, timed, strict=True)}
        seconds = [seconds_of.get(t.label, math.inf) for t in trials]
        figures = ", ".join(f"{t.label}: {s * 1e6:.1f} us" for t, s in zip(trials, seconds, strict=True))
        log.info("%s: %s: %s", self.journal.graph, name, figures)
        return seconds

    def _timed(self, memory: Memory, device: torch.device, trials: Sequence[Trial]) -> list[float]:
        def alone(some: Sequence[Trial], cold: bool = True) -> list[float]:
            return time_trials(memory, device, some, self.suspects, cold)

        if memory.cold and memory.single:
            return alone(trials)
        rotated = rotated_seconds(memory, device, trials, self.suspects) if memory.cold else None
        if rotated is not None:
            return with_ties_broken(rotated, alone, trials)
        return [(a + b) / 2 for a, b in zip(alone(trials, cold=False), alone(trials), strict=True)]


def with_cold(
    memory: Memory, lasting: Collection[str], lasting_bytes: int, device: torch.device, single: bool = False
) -> Memory:
    """`memory` with what of it is `lasting`, a plan's weights and states, as cold, if that is more than half of what is
    touched, and the plan's `lasting_bytes` more than the L2 cache holds: by the time that they are read again, others have
    taken it. `single` says whether the plan runs nothing else.
    """
    cold = frozenset(lasting) & memory.buffers.keys()
    if device.type != "cuda" or not cold or lasting_bytes <= Target.current(device).l2_bytes:
        return memory
    whole = sum(map(nbytes, memory.buffers.values()))
    return replace(memory, cold=cold, single=single) if 2 * sum(nbytes(memory.buffers[n]) for n in cold) > whole else memory


def turn_on(device: torch.device, cache: Path, patience: float) -> contextlib.AbstractContextManager[bool]:
    """A turn on `device` among the processes with one `cache` (or FXOPT_LOCK_DIR), as `device_lock.turn` gives it."""
    return turn(knobs.LOCK_DIR.get() or cache / "locks", device_identity(device), patience)


def time_trials(
    memory: Memory, device: torch.device, trials: Sequence[Trial], suspects: Suspects, cold: bool = False
) -> list[float]:
    """Median seconds of one run of each trial on random data; infinity for one that does not run.

    `cold` times single launches right after the fill, which leaves nothing of the inputs in the L2 cache and its own lines
    to be written back.
    """
    sizes = assumed_sizes(memory, trials)
    tensors = made_up(memory, device, sizes)
    return interleaved([runner(trial, tensors, sizes, suspects) for trial in trials], device, cold)


def made_up(memory: Memory, device: torch.device, sizes: dict[str, int]) -> dict[str, torch.Tensor]:
    """A flat tensor for each buffer, random but the same at each call."""
    generator = torch.Generator(device).manual_seed(0)  # the user's own keeps its state
    tensors = {name: _made_up(spec, memory.bounds.get(name), sizes, generator) for name, spec in memory.buffers.items()}
    for name, rows in memory.ends.items():
        tensors[name].copy_(_even_ends(len(tensors[name]), rows))
    for name in memory.uniform:
        tensors[name].fill_(OF_EQUAL_ELEMENTS)
    return tensors


def rotated_seconds(memory: Memory, device: torch.device, trials: Sequence[Trial], suspects: Suspects) -> list[float] | None:
    """Median seconds of one run of each trial among others, each with buffers `memory.cold` of its own, of which nothing is
    left in the L2 cache when it is that one's turn again; the other buffers are shared, as activations that have just been
    written. Kernels start early after kernels, as a plan's do, which tells what they load before they wait.

    None where so many copies were needed that launches alone would be measured.
    """
    copies = -(-2 * Target.current(device).l2_bytes // max(1, sum(nbytes(memory.buffers[n]) for n in memory.cold)))
    if copies > MOST_COPIES:
        return None
    sizes = assumed_sizes(memory, trials)
    first = made_up(memory, device, sizes)
    others = [first | {n: first[n].clone() for n in memory.cold} for _ in range(1, copies)]
    count = copies * -(-FEWEST_IN_TURN // copies)
    sets = [(first, *others)[k % copies] for k in range(count)]
    able = [runner(trial, first, sizes, suspects) is not None for trial in trials]
    runs = [in_turn(trial, sets, sizes) if runs else None for trial, runs in zip(trials, able, strict=True)]
    return [seconds / count for seconds in interleaved(runs, device, cold=True)]


def with_ties_broken(
    rotated: Sequence[float], alone: Callable[[Sequence[Trial]], list[float]], trials: Sequence[Trial]
) -> list[float]:
    """`rotated`, the seconds of `trials`, where what they take `alone` tells those apart that are CLOSE to the fastest.

    In a row, a kernel's end is hidden by the next one's beginning; before a call, or as a plan's last, it is not.
    """
    fastest = min(rotated, default=float("inf"))
    close = [k for k, seconds in enumerate(rotated) if seconds <= fastest * CLOSE and seconds < float("inf")]
    if len(close) < 2:
        return list(rotated)
    single = alone([trials[k] for k in close])
    least = min(single)
    told = zip(close, single, strict=True)
    ordered = {k: min(fastest + (s - least), fastest * CLOSE) if s < float("inf") else s for k, s in told}
    return [ordered.get(k, seconds) for k, seconds in enumerate(rotated)]


def in_turn(trial: Trial, sets: Sequence[dict[str, torch.Tensor]], sizes: dict[str, int]) -> Run:
    """A function that runs `trial`, of kernels and calls that have run before, on each of `sets` of tensors in turn."""
    scratch = {spec.name: zeros(spec, sizes) for spec in trial.scratch}
    stream = torch.cuda.current_stream().cuda_stream
    launchers = [None if isinstance(part, BoundCall) else _launchers(part[1]) for part in trial.parts]
    runs: list[Run] = []
    after_kernel = False
    for tensors in sets:
        for part, pair in zip(trial.parts, launchers, strict=True):
            if isinstance(part, BoundCall):
                op, args, kwargs = bound_arguments(part, tensors, sizes)
                runs.append(functools.partial(op, *args, **kwargs))
            else:
                assert pair is not None
                given = arguments_of(part[0], tensors | scratch, sizes)
                runs.append(functools.partial(pair[after_kernel], stream, *given))
            after_kernel = pair is not None
    return functools.partial(_run_all, runs, (sets, scratch))


def _launchers(artifact: Artifact) -> tuple[Callable[..., None], Callable[..., None]]:
    """Of a kernel when the one before it has ended, and early."""
    kernel = load_cubin(artifact.path, artifact.meta, torch.cuda.current_device())
    return kernel.bind(artifact.entry), kernel.bind(artifact.entry, early=True)


def replayed(runs: Sequence[Run], device: torch.device) -> list[Run] | None:
    """For each of `runs`, which have run before, a replay of a CUDA graph that has it REPEATS times; None where one cannot
    be captured.

    A call that fills memory before its kernel (cuDNN's attention) is 6 us longer in a graph than its kernel on an H100,
    which launches in a stream do not show.
    """
    try:
        graphs = _graph_driver(torch.cuda.current_device() if device.index is None else device.index)
        captured = [graphs.capture(functools.partial(_repeated, run), graphs.new_pool())[0] for run in runs]
    except torch.OutOfMemoryError:
        raise
    except (RuntimeError, FxoptError, OSError) as error:
        log.info("not measured in CUDA graphs: %s", error)
        return None
    return [functools.partial(_replay, graph) for graph in captured]


@functools.cache
def _graph_driver(index: int) -> GraphDriver:
    return GraphDriver(index)


def _repeated(run: Run) -> None:
    for _ in range(REPEATS):
        run()


def _replay(graph: Callable[[int], None]) -> None:
    graph(torch.cuda.current_stream().cuda_stream)


def interleaved(runs: Sequence[Run | None], device: torch.device, cold: bool) -> list[float]:
    torch.cuda.synchronize(device)  # a thread of autograd's has the device's context from here on
    filler = torch.empty(FILLER_BYTES, dtype=torch.uint8, device=device)
    first = [_seconds(run, filler, 1, 1, cold=False) for run in runs]
    launches = 1 if cold else max(1, min(MOST_LAUNCHES, round(SAMPLE_SECONDS / max(min(first), 1e-9))))
    fills = [_fills(run, launches) for run in runs]
    times: list[list[float]] = [[] for _ in runs]
    for done in range(ROUNDS):
        most = _most(times, done)
        left = [k for k in range(len(runs)) if done < FIRST_ROUNDS or min(times[k]) <= most]
        if len(left) == 1 < len(runs):
            break  # more rounds would not change who is the fastest
        for k in left:
            times[k].append(_seconds(runs[k], filler, fills[k], launches, cold))
    return [statistics.median(t) for t in times]


def _most(times: Sequence[Sequence[float]], done: int) -> float:
    """How long the best round of a run may have taken that is measured further, after `done` rounds."""
    if done < FIRST_ROUNDS:
        return math.inf
    behind = BEHIND * min(map(min, times))
    return behind if done < SURE_ROUNDS else min(behind, APART * max(min(times, key=statistics.median)))


def _fills(run: Run | None, launches: int) -> int:
    """How many fills keep the GPU busy while the host queues the launches of a sample; library calls take it a while."""
    if run is None:
        return 0
    start = time.perf_counter()
    for _ in range(launches):
        run()
    host = time.perf_counter() - start
    torch.cuda.synchronize()
    return min(MOST_FILLS, 1 + math.ceil(host / (FILLER_BYTES / FASTEST_MEMORY)))


def _seconds(run: Run | None, filler: torch.Tensor, fills: int, launches: int, cold: bool) -> float:
    if run is None:
        return float("inf")
    start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    for _ in range(fills):
        filler.zero_()
    if not cold:
        run()
    start.record()
    for _ in range(launches):
        run()
    end.record()
    end.synchronize()
    return float(start.elapsed_time(end)) / 1e3 / launches


def runner(
    trial: Trial, shared: dict[str, torch.Tensor], sizes: dict[str, int], suspects: Suspects | None = None
) -> Run | None:
    """A function that runs `trial` once on the current stream; None when it does not load or a call in it fails.

    Its kernels have run once, watched as `suspects` do: HungKernelError for one that does not end.
    """
    watch = Suspects(None) if suspects is None else suspects
    tensors = shared | {spec.name: zeros(spec, sizes) for spec in trial.scratch}
    parts: list[Run] = []
    for part in trial.parts:
        run = _call(part, tensors, sizes) if isinstance(part, BoundCall) else launched(*part, tensors, sizes, watch)
        if run is None:
            return None
        parts.append(run)
    return functools.partial(_run_all, parts, tensors) if len(parts) > 1 or trial.scratch else parts[0]


def _run_all(runs: Sequence[Run], held: object) -> None:
    """All of `runs`, which know the memory that is `held` by addresses only."""
    for run in runs:
        run()


def launched(
    source: KernelSource, artifact: Artifact, tensors: dict[str, torch.Tensor], sizes: dict[str, int], suspects: Suspects
) -> Run | None:
    try:
        launcher = load_cubin(artifact.path, artifact.meta, torch.cuda.current_device()).bind(artifact.entry)
    except (CudaError, OSError):  # OSError: another process has just evicted its file
        return None
    if source.members:
        device, width = tensors[source.buffers[0]].device, len(source.buffers) // len(source.members)
        batch = BatchLauncher(launcher, source.members, source.block, width, device)
        pointers = tuple(tensors[name].data_ptr() for name in source.buffers)
        run: Run = functools.partial(batch, torch.cuda.current_stream().cuda_stream, pointers)
    else:
        stream = torch.cuda.current_stream().cuda_stream
        run = functools.partial(launcher, stream, *arguments_of(source, tensors, sizes))
    return run if _runs(run, artifact, suspects) else None


def arguments_of(source: KernelSource, tensors: Mapping[str, torch.Tensor], sizes: dict[str, int]) -> list[int]:
    """What a launch of the kernel of `source` on `tensors` takes after the stream."""
    pointers = (tensors[name].data_ptr() for name in source.buffers)
    return [*(evaluate(g, sizes) for g in source.grid), *pointers, *(evaluate(s, sizes) for s in source.sizes)]


def _runs(run: Run, artifact: Artifact, suspects: Suspects) -> bool:
    """Whether `run` launches its kernel, which then has ended. Raises HungKernelError; CudaError if the context is lost."""
    try:
        with suspects.on_trial(artifact.key, artifact.entry, lambda: torch.cuda.current_stream().query()):
            run()
    except CudaError as error:
        if error.ends_context:
            raise
        suspects.clear(artifact.key)
        log.info("%s cannot be a candidate: %s", artifact.entry, error)
        return False
    return True


def _call(bound: BoundCall, tensors: dict[str, torch.Tensor], sizes: dict[str, int]) -> Run | None:
    """The library call, which makes results of its own: what reads them afterwards finds random data of the same layout."""
    op, args, kwargs = bound_arguments(bound, tensors, sizes)

    def run() -> None:
        op(*args, **kwargs)

    try:
        run()
        hidden = bound.call.op in BIAS_OF and _hides_nan(op, args, BIAS_OF[bound.call.op])
    except torch.cuda.OutOfMemoryError:
        raise
    except RuntimeError as error:
        log.info("%s cannot be a candidate: %s", bound.call.op, error)
        return None
    if hidden:
        log.info("%s cannot be a candidate: its relu makes zero of NaN", bound.call.op)
    return None if hidden else run


def bound_arguments(
    bound: BoundCall, tensors: dict[str, torch.Tensor], sizes: dict[str, int]
) -> tuple[Callable[..., Any], Any, Any]:
    """The op of a library call, and its arguments as they are in `tensors`."""
    views = {v.name: v for v in bound.views}

    def argument(value: Any) -> Any:
        match value:
            case Ref(name):
                return strided(views.get(name), name, bound.buffers, tensors, sizes)
            case Size(expr):
                return evaluate(expr, sizes)
            case list() | tuple():
                return type(value)(argument(x) for x in value)
            case dict():
                return {k: argument(x) for k, x in value.items()}
        return value

    return resolve_op(bound.call.op), argument(bound.call.args), argument(bound.call.kwargs)


def _hides_nan(op: Callable[..., Any], args: Any, position: int) -> bool:
    """Whether relu in a fused convolution makes something else of NaN, as cuDNN's descriptors may say; torch's keeps it."""
    weight = args[1]
    bias = torch.full((len(weight),), float("nan"), dtype=weight.dtype, device=weight.device)
    return not bool(op(*args[:position], bias, *args[position + 1 :]).isnan().all())


def strided(
    view: Alias | None, name: str, buffers: Mapping[str, BufferSpec], tensors: dict[str, torch.Tensor], sizes: dict[str, int]
) -> torch.Tensor:
    """The buffer or view `name` as a tensor."""
    spec = buffers[name if view is None else view.of]
    shape, strides = (spec.shape, spec.strides) if view is None else (view.shape, view.strides)
    offset = 0 if view is None else evaluate(view.offset, sizes)
    given = ([evaluate(x, sizes) for x in shape], [evaluate(x, sizes) for x in strides])
    return tensors[spec.name].as_strided(*given, offset)


def assumed_sizes(memory: Memory, trials: Sequence[Trial]) -> dict[str, int]:
    """A number for every size symbol: what is measured when a size is known only at run time."""
    given: list[Int] = [x for spec in memory.buffers.values() for x in (*spec.shape, *spec.strides)]
    given += memory.bounds.values()
    for trial in trials:
        given += [x for spec in trial.scratch for x in spec.shape]
        for part in trial.parts:
            if not isinstance(part, BoundCall):
                given += [*part[0].sizes, *part[0].grid]
    return {sym.name: assumed(symbol(sym)) for x in given for sym in free_symbols(x)}


def _made_up(spec: BufferSpec, bound: Int | None, sizes: dict[str, int], generator: torch.Generator) -> torch.Tensor:
    """A buffer of random floats, of random indices below `bound`, of random bytes, or of bools, mostly true as in masks; of
    zeros for what is none of these."""
    extent = max(evaluate(spec.extent, sizes), 1)
    if spec.dtype == torch.bool:
        return torch.randint(8, (extent,), generator=generator, device=spec.device) > 0
    if spec.dtype.is_floating_point:
        narrow = spec.dtype.itemsize == 1  # no normal_ for these
        values = torch.empty(extent, device=spec.device, dtype=torch.float16 if narrow else spec.dtype)
        return values.normal_(generator=generator).to(spec.dtype)
    if bound is None and spec.dtype.itemsize == 1:  # quantized values
        return torch.randint(256, (extent,), generator=generator, device=spec.device, dtype=torch.uint8).view(spec.dtype)
    if bound is not None:
        below = min(max(evaluate(bound, sizes), 1), torch.iinfo(spec.dtype).max)
        return torch.randint(below, (extent,), generator=generator, device=spec.device, dtype=spec.dtype)
    return zeros(spec, sizes)


def _even_ends(groups: int, rows: int) -> torch.Tensor:
    """Where groups of about equal size end."""
    return torch.tensor([rows * (g + 1) // groups for g in range(groups)], dtype=torch.int32)


def zeros(spec: BufferSpec, sizes: dict[str, int]) -> torch.Tensor:
    """A flat tensor for the buffer, as scratch memory starts."""
    return torch.zeros(max(evaluate(spec.extent, sizes), 1), device=spec.device, dtype=spec.dtype)
