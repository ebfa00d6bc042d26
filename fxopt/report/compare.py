"""One case under every contender: compile each from cold caches, judge its results, then time all of them interleaved."""

from __future__ import annotations

import signal
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import asdict, dataclass, field, replace
from typing import Any

import torch

from fxopt.journal import Journal
from fxopt.report.cases import Case, Tensors, relative_error
from fxopt.report.contenders import Contender, caches_under
from fxopt.report.explanation import journals
from fxopt.report.measure import Call, Timing, interleaved, kernels_seen, memory_in_use, peak_memory

Progress = Callable[[str, float], None]


@dataclass
class Row:
    """What one contender did on one case. Times in seconds, memory in bytes; None where it does not apply.

    `cache` says what compilation could find: "cold" (empty directories), "cold, first use" when the compiler itself was also
    loaded for the first time in this process, or "user" for the directories the user has. `error` is the largest relative
    error of an output against float64. `kernels` counts launches of one call by name; on CPU, fxopt's own kernels come from
    its record, since they are no operators of torch. `peak_bytes` is beyond what was in use before this one was compiled
    (weights, inputs, other contenders). `choices` are the tuner's decisions and `retreats` what fxopt ran as
    ATen. `skipped` is why there is no measurement. `outputs`, the tensors of one step, are kept when the Plan asks for it.
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
    """How to compare: `seconds` of timing per case, a limit for one compilation, and whether caches start empty."""

    device: torch.device
    seconds: float = 10.0
    compile_limit: float | None = None
    cold: bool = True
    flush: bool = False
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


def compare(
    case: Case, contenders: Sequence[Contender], plan: Plan, progress: Progress = lambda what, share: None
) -> list[Row]:
    """Rows in the order of `contenders`. A contender that fails or is skipped has a row that says why.

    `progress` is called with what is being done and the share of the whole (0 to 1). Dynamo's caches are reset.
    """
    torch.compiler.reset()
    _load_dynamo()
    exact = case.exact()
    rows = [Row(c.name, c.mode_label, c.frozen) for c in contenders]
    calls: dict[str, Call] = {}
    with tempfile.TemporaryDirectory(prefix="fxopt-cold-", ignore_cleanup_errors=True) as root:
        for number, (contender, row) in enumerate(zip(contenders, rows, strict=True)):
            progress(f"compiling {contender.name}", 0.7 * number / len(rows))
            row.skipped = _why_not(contender, case) or plan.skip(contender)
            if not row.skipped:
                _prepare(case, contender, row, plan, exact, f"{root}/{number}", calls)
        _time(calls, rows, plan, progress)
    torch.compiler.reset()
    return rows


def _why_not(contender: Contender, case: Case) -> str:
    return "freezing is for inference" if contender.frozen and case.training else ""


def _load_dynamo() -> None:
    """So that the first contender is not charged for importing what all of them share."""
    torch.compile(lambda x: x + 1, backend="eager")(torch.zeros(1))


def _prepare(
    case: Case, contender: Contender, row: Row, plan: Plan, exact: Tensors | None, root: str, calls: dict[str, Call]
) -> None:
    """Compile, check and profile one contender; on success its call joins `calls`, else `row.skipped` says why."""
    row.cache = _cache_state(contender, plan.cold)
    base = memory_in_use(plan.device)
    try:
        compiled = contender.compile(case.module, plan.device)
        with caches_under(root) if plan.cold else nullcontext(), journals() as graphs:
            row.compile_seconds = _compile(case, compiled, plan)
            if case.reset is not None:
                case.reset()
            outputs = case.drive(compiled)
        row.error = None if exact is None else relative_error(outputs, exact)
        row.outputs = outputs if plan.keep_outputs else None
        del outputs
        _inspect(case, contender, compiled, row, plan, graphs, base)
    except Exception as error:
        row.skipped = f"failed: {_summary(error)}"
        return
    calls[contender.name] = lambda: case.drive(compiled)


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


def _inspect(
    case: Case, contender: Contender, compiled: Callable[..., Any], row: Row, plan: Plan, graphs: list[Journal], base: int
) -> None:
    for _ in range(2):  # CUDA graphs record on the second and third call
        case.drive(compiled)
    row.choices = dict(Counter(f"{k.language} {k.choice}".strip() for j in graphs for k in j.kernels))
    row.retreats = [r for j in graphs for r in j.retreats]
    row.peak_bytes = peak_memory(lambda: case.drive(compiled), plan.device, base)
    if plan.profile and contender.countable(plan.device):
        row.kernels = kernels_seen(lambda: case.drive(compiled), plan.device)
        if plan.device.type == "cpu":
            row.kernels = dict(Counter(row.kernels) + Counter(k.name for j in graphs for k in j.kernels))


def _summary(error: BaseException) -> str:
    """The error's name and first two lines: the first of torch's names only the backend, the second what it raised."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return f"{type(error).__name__}: {' '.join(lines[:2])}"[:300]


def _time(calls: dict[str, Call], rows: list[Row], plan: Plan, progress: Progress) -> None:
    if not calls:
        return
    timings: dict[str, Timing] = interleaved(
        calls,
        plan.device,
        seconds=plan.seconds,
        max_rounds=plan.max_rounds,
        flush=plan.flush,
        tick=lambda share: progress("timing", 0.7 + 0.3 * share),
    )
    for row in rows:
        if row.contender in timings:
            row.seconds, row.quartiles = timings[row.contender].median, timings[row.contender].quartiles


def speedup(row: Row, rows: Sequence[Row], base: str = "eager") -> float | None:
    """How many times faster `row` is than contender `base` of the same case; None when either has no time."""
    reference = next((r.seconds for r in rows if r.contender == base), None)
    return None if reference is None or row.seconds is None else reference / row.seconds
