"""Which of torch's backends computes each attention, by measurement on this GPU.

Eager's rule looks at what a backend can do, not at how fast it is at the problem: on Hopper cuDNN is up to 1.75 times as
fast as FlashAttention; the rule also changes from version to version. Every forward is a contest: of forwards where no
gradient is wanted, else of forwards with their backwards, for one backend computes both. Candidates are what the user has
enabled and torch says the problem suits; one whose values differ from those of eager's choice, rows hidden throughout
included, is out, and so is one that a single run shows to be hopeless. Where nobody is left beside eager's choice, nothing
is measured.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from fxopt.ir.attention_backends import (
    AUTO,
    CUDNN,
    MATH,
    Inputs,
    Settings,
    backward_by,
    dense_strides,
    eagers_choice,
    enabled_backends,
    forward_by,
    supports,
)
from fxopt.ir.attention_op import empty_gradients
from fxopt.ir.exprs import Int, assumed, evaluate, free_symbols, prod, symbol
from fxopt.journal import Journal
from fxopt.lower import Lowered
from fxopt.lower.attention_calls import AttentionCall, Operand, find_attention, with_backends
from fxopt.options import Options
from fxopt.runtime.artifacts import ArtifactStore
from fxopt.runtime.cuda_graph import NAME as CUDA_GRAPHS
from fxopt.target import Target
from fxopt.tune import measure
from fxopt.tune.contest import NOISE
from fxopt.tune.records import RecordKey, Records

METHOD = 3
"""Number of this way of measuring, part of every record's key."""

BUDGET_SECONDS = {"default": 5.0, "reduce-overhead": 5.0, "max-autotune": 30.0}
"""Time for measuring attention in one graph, by mode; calls past it are decided by rule for now. A contest takes 30 to 100
ms and, for cuDNN, the building of a plan each way, half a second to a second, which the call itself then finds built."""

MOST_SCORE_BYTES = 1 << 30
"""The backend that stores all scores is no candidate where they take more."""

TOLERANCE = {torch.float16: 0.05, torch.bfloat16: 0.05}
"""By how much of the largest row's norm a row of a result may differ from that of eager's choice: far above roundings, far
below another treatment of hidden rows."""

EXACT_TOLERANCE = 0.01

HOPELESS = 2.0
"""A candidate that takes this many times as long as the quickest, in one run, is not measured further."""

FEW_ROWS = 128
"""With fewer query rows than this, cuDNN is not taken without measuring."""

CUDNN_WIDTHS = (64, 128)

ASSUMED_SIZES = (512, 128, 32, 8)
"""What a size that is known only at run time is taken to be: the first for which the scores take few enough products."""

MOST_PRODUCTS = 1 << 36

HIDDEN = 0.25
"""Share of the keys that masks of made-up data hide."""


def choose_attention(lowered: Lowered, options: Options, store: ArtifactStore, journal: Journal) -> Lowered:
    """`lowered` with every attention on a GPU, in alternatives too, given the backend that is fastest for it.

    With options.tuning_seconds 0 nothing is measured, nor are records looked at: cuDNN runs what it is known to be fastest
    at, eager's rule the rest. Where the user asks for deterministic algorithms, or enables one backend only, eager's rule
    holds.
    """
    calls = [found for found in find_attention(lowered) if is_measurable(found.device)]
    if not calls or torch.are_deterministic_algorithms_enabled() or len(enabled_backends()) < 2:
        return lowered
    budget = BUDGET_SECONDS[options.mode] if options.tuning_seconds is None else options.tuning_seconds
    replayed = options.cuda_graphs and CUDA_GRAPHS not in options.disable
    contests = _Contests(store, budget, journal, measures=options.tuning_seconds != 0, replayed=replayed)
    return with_backends(lowered, {found: contests.winner(found) for found in calls})


def is_measurable(device: torch.device) -> bool:
    """CPUs have one fused backend, which eager's rule takes."""
    return device.type == "cuda"


def by_rule(call: AttentionCall, target: Target) -> str:
    """The backend without measuring: cuDNN on Hopper for the widths that its kernels are made for, else eager's rule."""
    query, key, value = (call.operands[name] for name in ("query", "key", "value"))
    square = not call.settings.is_causal or query.shape[2] == key.shape[2]
    suits = query.dtype in TOLERANCE and call.is_static and "attn_mask" not in call.operands and square
    width, rows = query.shape[3], query.shape[2]
    suits = suits and width == value.shape[3] and width in CUDNN_WIDTHS and isinstance(rows, int) and rows >= FEW_ROWS
    return CUDNN if suits and target.is_hopper and CUDNN in enabled_backends() else AUTO


class _Contests:
    """Winners from the records, or measured within the budget of one graph."""

    def __init__(self, store: ArtifactStore, budget: float, journal: Journal, measures: bool, replayed: bool) -> None:
        self.store, self.left, self.journal, self.measures, self.replayed = store, budget, journal, measures, replayed
        self.records: dict[str, Records] = {}

    def winner(self, call: AttentionCall) -> str:
        target = Target.current(call.device)
        if not self.measures:
            return by_rule(call, target)
        problem = Problem.of(call, self.replayed)
        records = self.records.setdefault(target.key, Records(self.store.cache, target.key))
        key = RecordKey("attention", problem.facts(target))
        found = records.get(key)
        if found is None or found.get("winner") not in (AUTO, *problem.candidates):
            measured = self._measured(call, problem)
            if isinstance(measured, str):
                self.journal.note("attention", f"{call.call.origin}: not measured, {measured}")
                return by_rule(call, target)
            found = measured
            records.put(key, found)
        winner = str(found["winner"])
        figures = ", ".join(f"{name} {s * 1e6:.1f} us" for name, s in found.get("seconds", {}).items())
        self.journal.note("attention", f"{call.call.origin}: {winner} ({figures})")
        return winner

    def _measured(self, call: AttentionCall, problem: Problem) -> dict[str, Any] | str:
        """The record of a contest, or why there is none."""
        if self.left <= 0:
            self.journal.provisional = True
            return "the time budget is spent"
        start = time.perf_counter()
        try:
            with measure.turn_on(call.device, self.store.directory, measure.PATIENCE_SECONDS):
                eager, seconds = time_backends(problem, call.device)
        except torch.OutOfMemoryError:
            self.journal.provisional = True
            return "the GPU is out of memory"
        except RuntimeError as error:  # assumed sizes that do not fit together
            return str(error).partition("\n")[0]
        finally:
            self.left -= time.perf_counter() - start
        winner = _winner(eager, seconds)
        return {"winner": winner if winner in problem.candidates else AUTO, "eager": eager, "seconds": seconds}


def _winner(eager: str, seconds: Mapping[str, float]) -> str:
    """The fastest; eager's choice where none beats it by more than noise, and its rule where that did not run."""
    if eager not in seconds:
        return AUTO
    best = min(seconds, key=lambda name: seconds[name])
    return best if seconds[best] < seconds[eager] * (1 - NOISE) else eager


# ---------------------------------------------------------------------- the problem


@dataclass(frozen=True)
class Layout:
    """A tensor in memory, in elements; `misalignment` counts from the last 16-byte boundary."""

    dtype: torch.dtype
    shape: tuple[int, ...]
    strides: tuple[int, ...]
    misalignment: int

    @classmethod
    def of(cls, operand: Operand, sizes: Mapping[str, int]) -> Layout:
        shape, strides = (tuple(evaluate(n, sizes) for n in ns) for ns in (operand.shape, operand.strides))
        return cls(operand.dtype, shape, strides, evaluate(operand.offset, sizes) % max(1, 16 // operand.dtype.itemsize))

    @property
    def facts(self) -> list[Any]:
        return [str(self.dtype), list(self.shape), list(self.strides), self.misalignment]


@dataclass(frozen=True)
class Problem:
    """All that a contest depends on, in numbers: sizes that are known only at run time are assumed. `results` are the
    strides that the plan wants a forward's results in, None for one that nobody reads; `replayed` says that it will be
    part of a CUDA graph."""

    op: str
    operands: dict[str, Layout]
    settings: Settings
    results: tuple[tuple[int, ...] | None, ...]
    candidates: tuple[str, ...]
    replayed: bool = False

    @classmethod
    def of(cls, call: AttentionCall, replayed: bool = False) -> Problem:
        sizes = _assumed_sizes(call)
        results = [None if r is None else tuple(evaluate(n, sizes) for n in r.strides) for r in call.results]
        operands = {name: Layout.of(operand, sizes) for name, operand in call.operands.items()}
        candidates = [b for b in enabled_backends() if call.is_static or b != CUDNN]  # a plan for every new size: too slow
        return cls(call.call.op, operands, call.settings, tuple(results), tuple(candidates), replayed and len(results) == 1)

    @property
    def trains(self) -> bool:
        return len(self.results) > 1

    @property
    def score_bytes(self) -> int:
        batch, heads, rows, _ = self.operands["query"].shape
        return 4 * batch * heads * rows * self.operands["key"].shape[2]

    def facts(self, target: Target) -> dict[str, Any]:
        return {
            "op": self.op,
            "operands": {name: layout.facts for name, layout in self.operands.items()},
            "causal": self.settings.is_causal,
            "scaled": self.settings.scale is not None,
            "grouped": self.settings.enable_gqa,
            "results": [None if r is None else list(r) for r in self.results],
            "candidates": list(self.candidates),
            "replayed": self.replayed,
            "device": target.name,
            "torch": torch.__version__,
            "cudnn": torch.backends.cudnn.version(),
            "method": [METHOD, measure.METHOD],
        }


def _assumed_sizes(call: AttentionCall) -> dict[str, int]:
    """A number for every size symbol, such that the problem is measured in a moment."""
    numbers: list[Int] = [n for operand in call.operands.values() for n in operand.numbers]
    numbers += [n for spec in call.results if spec is not None for n in spec.strides]
    symbols = {sym for n in numbers for sym in free_symbols(n)}
    query, key = call.operands["query"].shape, call.operands["key"].shape
    products = prod((*query, key[2]))
    sizes: dict[str, int] = {}
    for typical in ASSUMED_SIZES:
        sizes = {sym.name: assumed(symbol(sym), typical) for sym in symbols}
        if evaluate(products, sizes) <= MOST_PRODUCTS:
            break
    return sizes


# ---------------------------------------------------------------------- measuring

Results = tuple["Tensor | None", ...]


def time_backends(problem: Problem, device: torch.device) -> tuple[str, dict[str, float]]:
    """(eager's choice, median seconds of each backend that is in the contest to its end).

    When `problem` trains, of a forward and its backward together. Raises torch.OutOfMemoryError.
    """
    with torch.cuda.device(device), torch.no_grad():
        tensors = make_tensors(problem, device)
        inputs = _inputs(problem, tensors)
        eager = eagers_choice(inputs, problem.trains)
        able = [b for b in problem.candidates if b != eager and supports(b, inputs, problem.trains)]
        if problem.score_bytes > MOST_SCORE_BYTES:
            able = [b for b in able if b != MATH]
        runs = {name: runner(problem, tensors, name) for name in (eager, *able)}
        rough = {name: _seconds_once(runs[name], device) for name in agreeing(runs, eager)}
        left = promising(rough, eager)
        if len(left) < 2:
            return eager, {name: rough[name] for name in left}
        seconds = _seconds([runs[name] for name in left], device, problem.replayed)
    return eager, dict(zip(left, seconds, strict=True))


def _seconds(runs: Sequence[measure.Run], device: torch.device, replayed: bool) -> list[float]:
    """Median seconds of each of `runs`, as a CUDA graph replays it if `replayed`."""
    replays = measure.replayed(runs, device) if replayed else None
    if replays is None:
        return measure.interleaved(runs, device, cold=False)
    return [s / measure.REPEATS for s in measure.interleaved(replays, device, cold=False)]


def promising(seconds: Mapping[str, float], reference: str) -> list[str]:
    """The names of those that may be the fastest, judged by one run each, and `reference` in any case."""
    most = HOPELESS * min(seconds.values(), default=0.0)
    return [name for name in seconds if name == reference or seconds[name] <= most]


def _seconds_once(run: Callable[[], object], device: torch.device) -> float:
    """Of one run, host and device, after it has run before."""
    torch.cuda.synchronize(device)
    start = time.perf_counter()
    run()
    torch.cuda.synchronize(device)
    return time.perf_counter() - start


def agreeing(runs: Mapping[str, Callable[[], Results]], reference: str) -> list[str]:
    """The names of those that run and give what `reference` gives, itself first; none when that does not run."""
    want = _attempt(runs[reference])
    if want is None:
        return []
    others = [name for name in runs if name != reference]
    return [reference, *(name for name in others if (got := _attempt(runs[name])) is not None and _agree(got, want))]


def _attempt(run: Callable[[], Results]) -> Results | None:
    try:
        return run()
    except torch.OutOfMemoryError:
        raise
    except RuntimeError:  # a backend that refuses the problem after all costs only itself
        return None


def _agree(got: Results, want: Results) -> bool:
    pairs = [(g, w) for g, w in zip(got, want, strict=True) if g is not None and w is not None]
    return all(_close(g, w) for g, w in pairs)


def _close(got: Tensor, want: Tensor) -> bool:
    """Whether each row differs by little of the largest row, and what is not finite is so in both."""
    a, b = got.float(), want.float()
    if not torch.equal(a.isfinite(), b.isfinite()) or not torch.equal(a.isnan(), b.isnan()):
        return False
    a, b = (x.nan_to_num(nan=0.0, posinf=0.0, neginf=0.0) for x in (a, b))
    if not b.numel():
        return True
    tolerance = TOLERANCE.get(got.dtype, EXACT_TOLERANCE)
    return bool((a - b).norm(dim=-1).amax() <= tolerance * b.norm(dim=-1).amax())


def runner(problem: Problem, tensors: Mapping[str, Tensor], backend: str) -> Callable[[], Results]:
    """A function that runs `problem` by `backend` and copies what is not in the plan's layout, as the executor does.

    It returns the result and, when `problem` trains, the gradients.
    """
    inputs = _inputs(problem, tensors)
    if not problem.trains:
        return lambda: (_as_planned(forward_by(backend, inputs, statistics=False)[0], problem.results[0]),)
    planned = [x.stride() for x in empty_gradients(*inputs[:3])]

    def run() -> Results:
        found = forward_by(backend, inputs, statistics=True)
        out, statistics = (_as_planned(x, strides) for x, strides in zip(found, problem.results[:2], strict=True))
        assert out is not None
        assert statistics is not None
        gradients = backward_by(backend, inputs, tensors["grad"], out, statistics)
        return (out, *(_as_planned(x, strides) for x, strides in zip(gradients, planned, strict=True)))

    return run


def _inputs(problem: Problem, tensors: Mapping[str, Tensor]) -> Inputs:
    return Inputs(tensors["query"], tensors["key"], tensors["value"], tensors.get("attn_mask"), problem.settings)


def _as_planned(x: Tensor | None, strides: tuple[int, ...] | None) -> Tensor | None:
    if x is None or strides is None or x.stride() == strides:
        return x
    return torch.empty_strided(x.shape, strides, dtype=x.dtype, device=x.device).copy_(x)


def make_tensors(problem: Problem, device: torch.device) -> dict[str, Tensor]:
    """Random operands in the problem's layouts; masks that hide some keys, and the first of several rows throughout.

    When `problem` trains, also "grad", the gradient of the result, in the result's layout.
    """
    generator = torch.Generator(device).manual_seed(0)  # the user's own keeps its state
    tensors = {name: _made(layout, device, generator) for name, layout in problem.operands.items()}
    mask = tensors.get("attn_mask")
    if mask is not None:
        _hide(mask, generator)
    if problem.trains:
        shape = (*tensors["query"].shape[:3], tensors["value"].shape[3])
        strides = problem.results[0] or dense_strides(shape, tensors["query"].stride())
        tensors["grad"] = _made(Layout(tensors["query"].dtype, shape, strides, 0), device, generator)
    return tensors


def _made(layout: Layout, device: torch.device, generator: torch.Generator) -> Tensor:
    pairs = zip(layout.shape, layout.strides, strict=True)
    extent = 1 + sum((size - 1) * stride for size, stride in pairs) + layout.misalignment
    memory = torch.empty(max(extent, 1), dtype=layout.dtype, device=device)
    if layout.dtype.is_floating_point:
        memory.normal_(generator=generator)
    return memory.as_strided(layout.shape, layout.strides, layout.misalignment)


def _hide(mask: Tensor, generator: torch.Generator) -> None:
    """Overwrite a mask that may be expanded."""
    own = mask[tuple(slice(0, 1) if stride == 0 else slice(None) for stride in mask.stride())]
    hidden = torch.rand(own.shape, generator=generator, device=mask.device) < HIDDEN
    hidden[..., 0] = False
    if own.shape.numel() > own.shape[-1]:
        hidden.view(-1, own.shape[-1])[0] = True
    own.copy_(~hidden if mask.dtype == torch.bool else torch.where(hidden, -torch.inf, 0.0))
