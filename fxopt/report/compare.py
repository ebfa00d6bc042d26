"""One case under every contender: compile each from cold caches, judge its results, then time all of them interleaved."""

from __future__ import annotations

import functools
import signal
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import asdict, dataclass, field, replace
from typing import Any

import torch

from fxopt.capture import private
from fxopt.journal import Journal
from fxopt.report.cases import BACKWARD, Case, Tensors, relative_error
from fxopt.report.contenders import COPY, Contender, caches_under
from fxopt.report.explanation import journals
from fxopt.report.measure import Call, Timing, interleaved, kernels_seen, memory_in_use, peak_memory

Progress = Callable[[str, float], None]
EAGER_SHARE, ROUNDINGS = 4.0, 16.0
"""A value may be this many times as far from float64 as eager's, plus so many of its dtype's rounding errors."""


@dataclass
class Row:
    """What one contender did on one case. Times in seconds, memory in bytes; None where it does not apply.

    `cache` says what compilation could find: "cold" (empty directories), "cold, first use" when the compiler itself was also
    loaded for the first time in this process, or "user" for the directories the user has. `error` is the largest relative
    error of an output against float64. `kernels` counts launches of one call by name; on CPU, fxopt's own kernels come from
    its record, since they are no operators of torch. `peak_bytes` is beyond what was in use before this one was compiled
    (weights, inputs, other contenders). `choices` are the tuner's decisions and `retreats` what fxopt ran as
    ATen. `skipped` is why there is no measurement. `outputs`, the tensors of one step, are kept when the Plan asks for it.

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
    kernels: dict[str, int] | None = None
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


@dataclass
class Plan:
    """How to compare: `seconds` of timing per case, a limit for one compilation, and whether caches start empty.

    `split` times forward and backward each alone, and only of contenders whose values are right by EAGER_SHARE (eager has to
    be among them). `flush` and `ahead` are those of `interleaved`.
    """

    device: torch.device
    seconds: float = 10.0
    compile_limit: float | None = None
    cold: bool = True
    flush: bool = False
    ahead: bool = False
    split: bool = False
    max_rounds: int = 100
    profile: bool = True
    keep_outputs: bool = False
    skip: Callable[[Contender], str] = lambda contender: ""


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
    """What all contenders of one comparison share: exact values, bytes to move, and eager's error once it is known."""

    case: Case
    plan: Plan
    exact: Tensors | None
    traffic: Mapping[str, int]
    eager_error: float | None = None

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


def compare(
    case: Case,
    contenders: Sequence[Contender],
    plan: Plan,
    progress: Progress = lambda what, share: None,
    rebuild: Callable[[], Case] | None = None,
) -> list[Row]:
    """Rows in the order of `contenders`. A contender that fails or is skipped has a row that says why.

    `progress` is called with what is being done and the share of the whole (0 to 1). `rebuild` makes an equal case with
    tensors of its own for each contender: needed where one may change its inputs. Dynamo's caches are reset.
    """
    torch.compiler.reset()
    _load_dynamo()
    subject = _Subject(case, plan, case.exact(), _traffic(case) if plan.split else {})
    rows, calls = [], {}
    with (
        tempfile.TemporaryDirectory(prefix="fxopt-cold-", ignore_cleanup_errors=True) as root,
        private.saved_values_kept() if plan.split else nullcontext(),
    ):
        for number, contender in enumerate(contenders):
            progress(f"compiling {contender.name}", 0.7 * number / len(contenders))
            for row, call in _prepare(subject, contender, f"{root}/{number}", rebuild):
                rows.append(row)
                if call is not None:
                    calls[row.contender, row.part] = call
        _time(calls, rows, plan, progress)
    torch.compiler.reset()
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


def _prepare(
    subject: _Subject, contender: Contender, root: str, rebuild: Callable[[], Case] | None
) -> list[tuple[Row, Call | None]]:
    """Compile, check and profile one contender: its rows (one a pass where passes are split), each with what to time."""
    row, plan = Row(contender.name, contender.mode_label, contender.frozen), subject.plan
    row.skipped = _why_not(contender, subject.case, plan) or plan.skip(contender)
    if row.skipped:
        return [(row, None)]
    try:
        if contender == COPY:
            return [(replace(row, part=p, bytes_moved=n), _copy(n, plan.device)) for p, n in subject.traffic.items()]
        case = subject.case if rebuild is None else rebuild()
        if contender.alternative:
            case = case.alternatives[contender.alternative]()
        return _build(subject, case, contender, row, root)
    except Exception as error:
        row.skipped = f"failed: {_summary(error)}"
        return [(row, None)]


def _copy(nbytes: int, device: torch.device) -> Call:
    """A copy that reads half of `nbytes` and writes the other half."""
    source = torch.ones(max(1, nbytes // 2), dtype=torch.uint8, device=device)
    return functools.partial(torch.empty_like(source).copy_, source)


def _build(subject: _Subject, case: Case, contender: Contender, row: Row, root: str) -> list[tuple[Row, Call | None]]:
    plan = subject.plan
    row.cache = _cache_state(contender, plan.cold)
    base = memory_in_use(plan.device)
    compiled = contender.compile(case.module, plan.device)
    with caches_under(root) if plan.cold else nullcontext(), journals() as graphs:
        row.compile_seconds = _compile(case, compiled, plan)
        if case.reset is not None:
            case.reset()
        outputs = case.drive(compiled)
    subject.judge(case, row, outputs)
    row.outputs = outputs if plan.keep_outputs else None
    del outputs
    _inspect(case, compiled, row, plan, graphs, base)
    passes = case.passes(compiled) if plan.split else {"": lambda: case.drive(compiled)}
    rows = [replace(row, part=part, bytes_moved=subject.traffic.get(part)) for part in passes]
    for own in rows:
        if plan.profile and contender.countable(plan.device):
            own.kernels = _kernels(passes[own.part], own.part, plan.device, graphs)
    return [(own, passes[own.part]) for own in rows]


def _cache_state(contender: Contender, cold: bool) -> str:
    if contender.backend is None:
        return ""
    first = contender.backend not in _loaded
    _loaded.add(contender.backend)
    return ("cold, first use" if first else "cold") if cold else "user"


def _compile(case: Case, compiled: Callable[..., Any], plan: Plan) -> float:
    """Seconds of the first step: compilation, forward and backward, and one execution."""
    start = time.perf_counter()
    with time_limit(plan.compile_limit):
        case.drive(compiled)
        if plan.device.type == "cuda":
            torch.cuda.synchronize(plan.device)
    return time.perf_counter() - start


def _inspect(case: Case, compiled: Callable[..., Any], row: Row, plan: Plan, graphs: list[Journal], base: int) -> None:
    for _ in range(2):  # CUDA graphs record on the second and third call
        case.drive(compiled)
    row.choices = dict(Counter(f"{k.language} {k.choice}".strip() for j in graphs for k in j.kernels))
    row.retreats = [r for j in graphs for r in j.retreats]
    row.peak_bytes = peak_memory(lambda: case.drive(compiled), plan.device, base)


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
