"""Cases of which each contender is compiled ahead, all side by side, and timed where nothing else measures.

Compiling takes most of a run's time, of which a process keeps few cores busy. So each contender of each case is compiled by
whichever of many workers is free, into caches of its own: those of max-autotune last, since they may well not end. What is
compiled whole is timed by workers with cores to themselves: they find the caches, compile in seconds and run the contenders
in turns, holding the device's lock, for which compilers wait when they tune.
"""

from __future__ import annotations

import math
import os
import tempfile
import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass, field, replace

from rich.console import Console

from benchmarks.budget import Budget
from benchmarks.crew import Crew, in_a_line, request
from benchmarks.dealing import Pool, RawRow, Request
from benchmarks.results import Results
from benchmarks.workload import Job, Workload
from fxopt.report.compare import Row
from fxopt.report.contenders import Contender

COMPILING = 0.8
"""The share of the time after which nothing is compiled any more: what is left is for timing the last cases."""

TIMERS, TIMING_CORES = 2, 2
"""Processes that time on each device, of which one prepares its next case meanwhile, and the cores of each, where there are
as many again for the others."""

COMPILE_WORKERS, THREADS = ("FXOPT_WORKERS", "TORCHINDUCTOR_COMPILE_THREADS"), "4"
"""For each compilation: many of them wait for the device or run on one core, so that there may be more than cores."""

WARM_LIMIT = 90.0
"""Seconds that a compilation may take which finds its caches."""


@dataclass
class _Entry:
    """A case with what a worker is asked for, and its compilations so far. `cut` are contenders for which time ran out."""

    job: Job
    ask: Request
    waiting: set[str]
    compiled: dict[str, Row] = field(default_factory=dict)
    cut: set[str] = field(default_factory=set)

    def note(self, row: Row) -> None:
        """`row` says how the compilation went."""
        self.compiled[row.contender] = row
        if row.skipped:
            self.ask["without"][row.contender] = row.skipped
        self.waiting.discard(row.contender)

    def give_up(self) -> None:
        """What has not been compiled will not be."""
        for name in sorted(self.waiting):
            self.ask["without"][name] = "skipped: not compiled before the time for it had passed"
        self.cut |= self.waiting
        self.waiting.clear()

    def completed(self, row: Row) -> Row:
        """The timed `row` with what its compilation took and measured from empty caches."""
        made = self.compiled.get(row.contender)
        if made is None or row.skipped:
            return row
        contests = made.contests | row.contests
        return replace(row, cache=made.cache, compile_seconds=made.compile_seconds, contests=contests)


def precedence(workload: Workload, contender: Contender) -> tuple[bool, bool, bool]:
    """Larger for what is compiled earlier: fxopt, then the others, of each the training steps first, which take three times
    as long; last max-autotune, which takes ten times as long, and beside whose tuning nobody gets a turn at the device."""
    return not contender.slow, contender.backend == "fxopt", workload.training


@dataclass
class _Run:
    """The cases that are to be run, until the budget's deadline."""

    entries: Sequence[_Entry]
    contenders: Sequence[Contender]
    results: Results
    budget: Budget
    console: Console = field(default_factory=lambda: Console(stderr=True))

    def compile(self, pool: Pool) -> None:
        """All that is to be compiled; what is not at the pool's deadline is given up."""
        tasks = [(entry, c) for entry in self.entries for c in self.contenders if c.name in entry.waiting]
        tasks.sort(key=lambda task: precedence(task[0].job[0], task[1]), reverse=True)

        def compiled(number: int, raw: list[RawRow]) -> None:
            entry, row = tasks[number][0], Row.from_dict(raw[0])
            if "CompileTimeout" in row.skipped and time.monotonic() > pool.deadline - 1:
                return  # it is the run's time that has passed
            entry.note(row)
            took = row.skipped or f"compiled in {row.compile_seconds:.0f} s"
            self._say(f"{entry.job[0].name} {row.contender}: {took}")

        asks = [{**entry.ask, "contenders": [c.name], "without": {}, "ahead": True} for entry, c in tasks]
        try:
            pool.run(asks, [1.0] * len(asks), math.inf, compiled)
        finally:
            for entry in self.entries:
                entry.give_up()

    def measure(self, pool: Pool) -> None:
        """Each case as soon as nothing of it waits."""

        def measured(number: int, raw: list[RawRow]) -> None:
            entry = self.entries[number]
            rows = [entry.completed(Row.from_dict(row)) for row in raw]
            self.results.add(*entry.job, rows, unfinished=bool(entry.cut))
            self._say(in_a_line(entry.job, rows))

        asks = [{**entry.ask, "compile_limit": pool.compile_seconds} for entry in self.entries]
        pool.run(asks, [1.0] * len(asks), math.inf, measured, lambda number: not self.entries[number].waiting)

    def _say(self, text: str) -> None:
        self.console.print(f"{self.budget.left:.0f} s left: {text}", highlight=False, soft_wrap=True)


def compile_and_measure(
    crew: Crew, todo: Sequence[Job], contenders: Sequence[Contender], results: Results, budget: Budget, seconds: float
) -> None:
    """Run the cases that `results` does not have whole, with `crew.processes` compilations at once on each device.

    A case that lacks a contender for want of time is noted as unfinished: a later run makes it whole.
    """
    cores = sorted(os.sched_getaffinity(0))
    apart = TIMERS * TIMING_CORES * crew.gpus
    apart = apart if 2 * apart <= len(cores) else 0
    with tempfile.TemporaryDirectory(prefix="fxopt-bench-", ignore_cleanup_errors=True) as folder:
        entries = [_entry(job, contenders, budget, seconds, folder) for job in todo if not results.has(*job)]
        run = _Run(entries, contenders, results, budget)
        until = budget.deadline - (1 - COMPILING) * budget.left
        compilers = crew.pool(folder, crew.processes, until, budget.compile_limit, run.console, cores[apart:])
        compilers.places = [{**place, **dict.fromkeys(COMPILE_WORKERS, THREADS)} for place in compilers.places]
        timers = crew.pool(
            folder, TIMERS, budget.deadline, min(WARM_LIMIT, budget.compile_limit), run.console, cores[:apart]
        )
        compiling = threading.Thread(target=run.compile, args=(compilers,), daemon=True)
        compiling.start()
        run.measure(timers)
        compiling.join()
    order = {job[0].name: at for at, job in enumerate(todo)}
    results.data["cases"].sort(key=lambda case: order.get(case["workload"], len(order)))


def _entry(job: Job, contenders: Sequence[Contender], budget: Budget, seconds: float, folder: str) -> _Entry:
    ask = request(job, contenders, budget, seconds, warm=False)
    workload, sizes, dtype = job
    ask["caches"] = f"{folder}/{workload.name}-{'x'.join(map(str, sizes.values()))}-{dtype}"
    compiling = [c.name for c in contenders if c.backend is not None and not (c.frozen and workload.training)]
    return _Entry(job, ask, {name for name in compiling if name not in ask["without"]})
