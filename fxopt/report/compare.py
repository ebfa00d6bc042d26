"""One case under every contender: compile each from cold caches, judge its results, then time all of them interleaved.

Compilation comes first, so that processes which share a device can compile at once and take turns (`Plan.turn`) at the rest:
float64 values, which need most memory, and timing.
"""

from __future__ import annotations

import functools
import signal
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import asdict, dataclass, field, replace
from typing import Any

import torch

from fxopt.capture import private
from fxopt.journal import Journal
from fxopt.report.cases import BACKWARD, Case, Tensors, relative_error
from fxopt.report.contenders import COPY, Contender, caches_under
from fxopt.report.explanation import journals
from fxopt.report.measure import (
    Call,
    Timing,
    interleaved,
    kernel_seconds,
    kernels_seen,
    memory_in_use,
    memory_taken,
    peak_memory,
    peak_taken,
    release_memory,
)
from fxopt.runtime.device_lock import seconds_waited

Progress = Callable[[str, float], None]
PATIENCE = 4.0
"""By how much timing may take longer where other processes, whose first steps run beside it, have disturbed it."""

LONGEST_STEP = 2.0
"""Seconds of a step beyond which another implementation is out: it would take the time of all others."""

EAGER_SHARE, ROUNDINGS = 4.0, 16.0
"""A value may be this many times as far from float64 as eager's, plus so many of its dtype's rounding errors."""


@dataclass
class Row:
    """What one contender did on one case. Times in seconds, memory in bytes; None where it does not apply.

    `cache` says what compilation could find: "cold" (empty directories), "cold, first use" when the compiler itself was also
    loaded for the first time in this process, or "user" for the directories the user has. `error` is the largest relative
    error of an output against float64. `kernels` counts launches of one call by name; on CPU, fxopt's own kernels come from
    its record, since they are no operators of torch. `peak_bytes` is beyond what was in use before this one was compiled
    (weights, inputs, other contenders); `reserved_bytes` is the same in what torch's allocator had from the device, which
    counts the pools of CUDA graphs between calls. `kernel_seconds` are the launches' times by name, where the Plan asks for
    them. `choices` are the tuner's decisions, `contests` the seconds of what it measured for each region, `retreats` what
    fxopt ran as ATen. `skipped` is why there is no measurement. `outputs`, the tensors of one step, are kept when the Plan
    asks for it.

    `part` is "" for a whole step; where a Plan splits passes it is "forward" or "backward", and `seconds`, `kernels`,
    `bytes_moved` (at least, see `Case.bytes_moved`) and `copy_share` (of the bandwidth of COPY with as many bytes) are
    the pass's own.
    """

    contender: str
    mode: str
    frozen: bool
    cache: str = ""
    compile_seconds: float | None = None
    seconds: float | None = None
    quartiles: tuple[float, float] | None = None
    error: float | None = None
    peak_bytes: int | None = None
    reserved_bytes: int | None = None
    kernels: dict[str, int] | None = None
    kernel_seconds: dict[str, float] = field(default_factory=dict)
    contests: dict[str, dict[str, float]] = field(default_factory=dict)
    choices: dict[str, int] = field(default_factory=dict)
    retreats: list[tuple[str, str]] = field(default_factory=list)
    skipped: str = ""
    outputs: Tensors | None = field(default=None, repr=False)
    part: str = ""
    bytes_moved: int | None = None
    copy_share: float | None = None

    @property
    def kernel_count(self) -> int | None:
        return None if self.kernels is None else sum(self.kernels.values())

    def to_dict(self) -> dict[str, Any]:
        """JSON data; tensors left out."""
        data = asdict(replace(self, outputs=None))
        del data["outputs"]
        return {**data, "kernel_count": self.kernel_count}

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> Row:
        """The row that `to_dict` made `data` of."""
        return cls(**{k: v for k, v in data.items() if k != "kernel_count"})


@dataclass
class Plan:
    """How to compare: `seconds` of timing per case, a limit for one compilation, and whether caches start empty.

    `split` times forward and backward each alone, and only of contenders whose values are right by EAGER_SHARE (eager has to
    be among them). `flush` and `ahead` are those of `interleaved`. `turn` makes what is held while values are judged,
    contenders timed and those that compile nothing run: a lock, where several processes share the device. Without `replay`
    fxopt makes no CUDA graphs in its default mode: where the device's time alone counts, copies of inputs and outputs are no
    part of a kernel. With `kernel_times` the profiler times each kernel of a pass. `caches` is a folder where compilations
    find what `compile_ahead` has left, instead of empty caches; but for their first steps the device is held, too.
    """

    device: torch.device
    seconds: float = 10.0
    compile_limit: float | None = None
    cold: bool = True
    caches: str | None = None
    flush: bool = False
    ahead: bool = False
    split: bool = False
    replay: bool = True
    kernel_times: bool = False
    max_rounds: int = 100
    profile: bool = True
    keep_outputs: bool = False
    skip: Callable[[Contender], str] = lambda contender: ""
    turn: Callable[[], AbstractContextManager[object]] = nullcontext


class SlowStepError(Exception):
    """An implementation takes too long to be timed beside others."""


class CompileTimeout(Exception):
    """A compilation took longer than its limit."""


@contextmanager
def time_limit(seconds: float | None) -> Iterator[None]:
    """Raise CompileTimeout in the block after `seconds`; no limit off the main thread, where signals cannot be handled."""
    if seconds is None or threading.current_thread() is not threading.main_thread():
        yield
        return

    def stop(signum: int, frame: Any) -> None:
        raise CompileTimeout(f"compilation took longer than {seconds:.0f} s")

    previous = signal.signal(signal.SIGALRM, stop)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, previous)


_loaded: set[str] = set()


class WrongValueError(Exception):
    """A contender's values are too far from float64."""


@dataclass
class _Subject:
    """What all contenders of one comparison share. `exact` and `traffic` are there while contenders are judged and timed."""

    case: Case
    plan: Plan
    rebuild: Callable[[], Case] | None
    exact: Tensors | None = None
    traffic: Mapping[str, int] = field(default_factory=dict)
    eager_error: float | None = None
    rough: Case | None = None
    """An equal case for compiling: what that does to its tensors does not reach those that are judged."""

    def case_for(self, contender: Contender, judged: bool) -> Case:
        """The case to compile or, if `judged`, to judge and time: one of the contender's own where inputs may change."""
        if self.rebuild is None:
            case = self.case
        elif contender.alternative or self.case.reset is not None:
            case = self.rebuild()
        elif judged:
            case = self.case
        else:
            case = self.rough = self.rough or self.rebuild()
        return case.alternatives[contender.alternative]() if contender.alternative else case

    def judge(self, case: Case, row: Row, outputs: Tensors) -> None:
        """Note the error; WrongValueError when split passes are not to be timed because of it."""
        exact = case.reference(outputs) if case.reference is not None else self.exact
        row.error = None if exact is None else relative_error(outputs, exact)
        if row.contender == "eager":
            self.eager_error = row.error
        elif self.plan.split and row.error is not None and self.eager_error is not None:
            eps = max(torch.finfo(t.dtype).eps for t in outputs if t.is_floating_point())
            if not row.error <= EAGER_SHARE * self.eager_error + ROUNDINGS * eps:
                raise WrongValueError(f"off by {row.error:.1e} relative to float64, eager by {self.eager_error:.1e}")


@dataclass
class _Entrant:
    """A contender on its way: `case` and `compiled` once it is compiled, `graphs` what fxopt compiled for it, `kernels` what
    each pass launches. `root` is the folder of its caches."""

    contender: Contender
    row: Row
    root: str
    case: Case | None = None
    compiled: Callable[..., Any] | None = None
    graphs: list[Journal] = field(default_factory=list)
    kernels: dict[str, dict[str, int]] = field(default_factory=dict)


def compare(
    case: Case,
    contenders: Sequence[Contender],
    plan: Plan,
    progress: Progress = lambda what, share: None,
    rebuild: Callable[[], Case] | None = None,
) -> list[Row]:
    """Rows in the order of `contenders`. A contender that fails or is skipped has a row that says why.

    `progress` is called with what is being done and the share of the whole (0 to 1). `rebuild` makes an equal case with new
    tensors: needed where a contender may change its inputs. Dynamo's caches are reset.
    """
    torch.compiler.reset()
    _load_dynamo()
    subject = _Subject(case, plan, rebuild)
    if rebuild is None:
        subject.exact = case.exact()  # before anybody can change the inputs
    with (
        tempfile.TemporaryDirectory(prefix="fxopt-cold-", ignore_cleanup_errors=True) as empty,
        private.saved_values_kept() if plan.split else nullcontext(),
    ):
        entrants, root = [], plan.caches or empty
        for number, contender in enumerate(contenders):
            progress(f"compiling {contender.name}", 0.6 * number / len(contenders))
            row = Row(contender.name, contender.mode_label, contender.frozen)
            row.skipped = _why_not(contender, case, plan) or plan.skip(contender)
            entrants.append(_Entrant(contender, row, f"{root}/{contender.name}"))
            if _compiles(contender):
                # Steps of somebody else's implementation may keep the device for long, and compile little.
                with plan.turn() if contender.alternative else nullcontext():
                    _attempt(entrants[-1], lambda entrant: _compile(subject, entrant))
        subject.rough = None
        release_memory(plan.device)  # before waiting: others need it
        with plan.turn():
            rows = _judge_and_time(subject, entrants, progress)
            release_memory(plan.device)  # before the next one's turn
    torch.compiler.reset()
    return rows


def compile_ahead(case: Case, contender: Contender, plan: Plan) -> Row:
    """Compile `case` into `plan.caches`, by two steps, for a later `compare`; a row without measurements but the time that
    the compilation took. Dynamo's caches are reset."""
    assert plan.caches is not None
    torch.compiler.reset()
    _load_dynamo()
    row = Row(contender.name, contender.mode_label, contender.frozen)
    row.skipped = _why_not(contender, case, plan) or plan.skip(contender)
    entrant = _Entrant(contender, row, f"{plan.caches}/{contender.name}")
    _attempt(entrant, lambda entrant: _first_steps(case, entrant, plan))
    _note_choices(row, entrant.graphs)
    torch.compiler.reset()
    return row


def _compiles(contender: Contender) -> bool:
    """Whether its first step compiles something; eager's needs much memory and no time."""
    return contender.backend is not None or bool(contender.alternative)


def _attempt(entrant: _Entrant, action: Callable[[_Entrant], object]) -> None:
    """Run `action` unless the contender is out; what it raises puts it out.

    An error after which the GPU cannot be used ends the comparison: it is raised here, while this contender is at work.
    """
    if entrant.row.skipped:
        return
    try:
        action(entrant)
    except Exception as error:
        entrant.row.skipped = f"failed: {_summary(error)}"
        entrant.case = entrant.compiled = None
        if torch.cuda.is_initialized():
            torch.cuda.synchronize()


def _judge_and_time(subject: _Subject, entrants: Sequence[_Entrant], progress: Progress) -> list[Row]:
    """Float64 values first, which are gone before the passes and what they save take memory."""
    plan = subject.plan
    if subject.rebuild is not None:
        subject.exact = subject.case.exact()
    if plan.split:
        subject.traffic = _traffic(subject.case)
    for number, entrant in enumerate(entrants):
        progress(f"checking {entrant.contender.name}", 0.6 + 0.1 * number / len(entrants))
        if entrant.contender != COPY:
            _attempt(entrant, lambda entrant: _check(subject, entrant))
    subject.exact = None
    release_memory(plan.device)
    rows: list[Row] = []
    calls: dict[tuple[str, str], Call] = {}
    for entrant in entrants:
        found: list[tuple[Row, Call]] = []
        _attempt(entrant, lambda entrant, found=found: found.extend(_passes(subject, entrant)))  # type: ignore[misc]
        if entrant.row.skipped:
            rows.append(entrant.row)
            continue
        for row, call in found:
            rows.append(row)
            calls[row.contender, row.part] = call
    _time(calls, rows, plan, progress)
    for row in rows if plan.kernel_times else ():
        if (row.contender, row.part) in calls and row.contender != COPY.name:
            row.kernel_seconds = kernel_seconds(calls[row.contender, row.part], plan.device)
    return rows


def _traffic(case: Case) -> Mapping[str, int]:
    if case.traffic is not None:
        return case.traffic
    outputs = case.drive(case.module)
    if case.reset is not None:
        case.reset()
    return case.bytes_moved(outputs)


def _load_dynamo() -> None:
    """So that the first contender is not charged for importing what all of them share."""
    torch.compile(lambda x: x + 1, backend="eager")(torch.zeros(1))


def _why_not(contender: Contender, case: Case, plan: Plan) -> str:
    if contender.alternative and contender.alternative not in case.alternatives:
        return f"no implementation of this by {contender.alternative}"
    if contender == COPY and not plan.split:
        return "a copy is compared with single passes"
    return "freezing is for inference" if contender.frozen and case.training else ""


def _copy(nbytes: int, device: torch.device) -> Call:
    """A copy that reads half of `nbytes` and writes the other half."""
    source = torch.ones(max(1, nbytes // 2), dtype=torch.uint8, device=device)
    return functools.partial(torch.empty_like(source).copy_, source)


def _compile(subject: _Subject, entrant: _Entrant) -> None:
    """Compile and run the first steps, and see which kernels they launch."""
    contender, row, plan = entrant.contender, entrant.row, subject.plan
    case = subject.case_for(contender, judged=not _compiles(contender))
    base, taken = memory_in_use(plan.device), memory_taken(plan.device)
    compiled = _first_steps(case, entrant, plan)
    with plan.turn() if plan.caches else nullcontext():
        _inspect(case, compiled, row, entrant.graphs)
        row.peak_bytes = peak_memory(lambda: case.drive(compiled), plan.device, base)
        row.reserved_bytes = peak_taken(lambda: case.drive(compiled), plan.device, taken)
        for part, call in _calls(case, compiled, plan).items():
            if plan.profile and contender.countable(plan.device):
                entrant.kernels[part] = _kernels(call, part, plan.device, entrant.graphs)
    if case.reset is not None:
        case.reset()
    # Code for a function's inputs does for those of another case; a module or an optimizer has tensors of its own.
    shared = subject.rebuild is not None and case.reset is None
    entrant.compiled, entrant.case = compiled, None if shared or contender.alternative else case


def _first_steps(case: Case, entrant: _Entrant, plan: Plan) -> Callable[..., Any]:
    """Compile, and note how long the first step took."""
    entrant.row.cache = _cache_state(entrant.contender, plan.cold)
    compiled = entrant.contender.compile(case.module, plan.device, plan.replay)
    with _own_caches(entrant, plan):
        entrant.row.compile_seconds = _first_step(case, compiled, plan)
        _second_step(case, compiled, entrant.contender, plan)
    return compiled


@contextmanager
def _own_caches(entrant: _Entrant, plan: Plan) -> Iterator[None]:
    with caches_under(entrant.root) if plan.cold or plan.caches else nullcontext(), journals() as graphs:
        yield
    entrant.graphs += graphs


def _calls(case: Case, compiled: Callable[..., Any], plan: Plan) -> Mapping[str, Call]:
    """What is timed: the passes, or a whole step under the name ""."""
    return case.passes(compiled) if plan.split else {"": lambda: case.drive(compiled)}


def _check(subject: _Subject, entrant: _Entrant) -> None:
    """Compare one step's values with float64."""
    if entrant.compiled is None:
        _compile(subject, entrant)
    if entrant.case is None:
        entrant.case = subject.case_for(entrant.contender, judged=True)
        if entrant.contender.alternative:  # it is no compilation, but the case's own module
            entrant.compiled = entrant.contender.compile(entrant.case.module, subject.plan.device)
        assert entrant.compiled is not None
        entrant.case.drive(entrant.compiled)  # should this spoil the inputs, the step that is judged shows it
        if entrant.case.reset is not None:
            entrant.case.reset()
    assert entrant.compiled is not None
    with _own_caches(entrant, subject.plan):
        outputs = entrant.case.drive(entrant.compiled)
    subject.judge(entrant.case, entrant.row, outputs)
    entrant.row.outputs = outputs if subject.plan.keep_outputs else None


def _passes(subject: _Subject, entrant: _Entrant) -> list[tuple[Row, Call]]:
    """The contender's rows (one a pass where passes are split), each with what to time."""
    row, plan = entrant.row, subject.plan
    if entrant.contender == COPY:
        return [(replace(row, part=p, bytes_moved=n), _copy(n, plan.device)) for p, n in subject.traffic.items()]
    assert entrant.case is not None and entrant.compiled is not None
    return [
        (replace(row, part=part, bytes_moved=subject.traffic.get(part), kernels=entrant.kernels.get(part)), call)
        for part, call in _calls(entrant.case, entrant.compiled, plan).items()
    ]


def _cache_state(contender: Contender, cold: bool) -> str:
    if contender.backend is None:
        return ""
    first = contender.backend not in _loaded
    _loaded.add(contender.backend)
    return ("cold, first use" if first else "cold") if cold else "user"


def _first_step(case: Case, compiled: Callable[..., Any], plan: Plan) -> float:
    """Seconds of the first step: compilation, forward and backward, and one execution. Waiting for turns is left out."""
    start = time.perf_counter() - seconds_waited()
    with time_limit(plan.compile_limit):
        case.drive(compiled)
        if plan.device.type == "cuda":
            torch.cuda.synchronize(plan.device)
    return time.perf_counter() - seconds_waited() - start


def _second_step(case: Case, compiled: Callable[..., Any], contender: Contender, plan: Plan) -> None:
    """It compiles again where the first step has changed its inputs' kind. Raises SlowStepError for an implementation of
    somebody else's, which has nothing to compile, that takes longer than LONGEST_STEP."""
    start = time.perf_counter()
    case.drive(compiled)
    if contender.alternative:
        if plan.device.type == "cuda":
            torch.cuda.synchronize(plan.device)
        if (took := time.perf_counter() - start) > LONGEST_STEP:
            raise SlowStepError(f"one step takes {took:.0f} s")


def _inspect(case: Case, compiled: Callable[..., Any], row: Row, graphs: list[Journal]) -> None:
    for _ in range(2):  # CUDA graphs record on the second and third call
        case.drive(compiled)
    _note_choices(row, graphs)


def _note_choices(row: Row, graphs: list[Journal]) -> None:
    row.choices = dict(Counter(f"{k.language} {k.choice}".strip() for j in graphs for k in j.kernels))
    row.retreats = [r for j in graphs for r in j.retreats]
    row.contests = {f"{j.graph} {name}": seconds for j in graphs for name, seconds in j.contests.items()}


def _kernels(call: Call, part: str, device: torch.device, graphs: list[Journal]) -> dict[str, int]:
    """Launches of one call; those of fxopt on a CPU from the journals of the graphs that the call runs."""
    seen = kernels_seen(call, device)
    if device.type == "cuda":
        return seen
    run = [j for j in graphs if not part or j.graph.endswith(BACKWARD) == (part == BACKWARD)]
    return dict(Counter(seen) + Counter(k.name for j in run for k in j.kernels))


def _summary(error: BaseException) -> str:
    """The error's name and first two lines: the first of torch's names only the backend, the second what it raised."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return f"{type(error).__name__}: {' '.join(lines[:2])}"[:300]


def _time(calls: Mapping[tuple[str, str], Call], rows: list[Row], plan: Plan, progress: Progress) -> None:
    if not calls:
        return
    timings: dict[tuple[str, str], Timing] = interleaved(
        calls,
        plan.device,
        seconds=plan.seconds,
        max_rounds=plan.max_rounds,
        flush=plan.flush,
        ahead=plan.ahead,
        patience=PATIENCE if plan.ahead else 1.0,
        tick=lambda share: progress("timing", 0.7 + 0.3 * share),
    )
    for row in rows:
        if (row.contender, row.part) in timings:
            timing = timings[row.contender, row.part]
            row.seconds, row.quartiles = timing.median, timing.quartiles
    for row in rows:
        if row.bytes_moved is not None:
            row.copy_share = speedup(row, rows, COPY.name)


def speedup(row: Row, rows: Sequence[Row], base: str = "eager") -> float | None:
    """How many times faster `row` is than contender `base` at the same; None when either has no time."""
    reference = next((r.seconds for r in rows if r.contender == base and r.part == row.part), None)
    return None if reference is None or row.seconds is None else reference / row.seconds
