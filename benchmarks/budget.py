"""The time that a run may take, and what is skipped for it."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass, field

import torch

from benchmarks.workload import Workload
from fxopt.report.compare import Plan, Row
from fxopt.report.contenders import Contender


@dataclass
class Budget:
    """Decides what is skipped so that the run ends in time; what each contender's compilations took so far is its guide."""

    deadline: float
    compile_limit: float
    slow: bool
    longest: dict[tuple[str, str], float] = field(default_factory=dict)
    longest_case: dict[str, float] = field(default_factory=dict)

    @property
    def left(self) -> float:
        return self.deadline - time.monotonic()

    def why_skip(self, workload: Workload, contender: Contender) -> str:
        """Why `contender` should not even start on `workload`, or ""."""
        if contender.slow and workload.kind == "model" and not self.slow:
            return "skipped: compiles for minutes on whole models; ask for it with --slow"
        expected = self.longest.get((workload.kind, contender.name), 0.0)
        if self.left <= expected:
            return (
                f"skipped: {max(0.0, self.left):.0f} s of the time budget left, its compilations took up to {expected:.0f} s"
            )
        return ""

    def limit(self) -> float:
        """Seconds that one compilation may take now."""
        return max(1.0, min(self.compile_limit, self.left))

    def fits(self, workload: Workload) -> bool:
        """Whether a whole case of this kind can be expected to end in time."""
        return self.left > self.longest_case.get(workload.kind, 0.0)

    def learn(self, workload: Workload, rows: Sequence[Row], took: float = 0.0) -> None:
        """What the case's compilations, and all of it, took."""
        self.longest_case[workload.kind] = max(self.longest_case.get(workload.kind, 0.0), took)
        for row in rows:
            key = (workload.kind, row.contender)
            self.longest[key] = max(self.longest.get(key, 0.0), row.compile_seconds or 0.0)

    def plan(self, workload: Workload, device: torch.device, seconds: float, cold: bool) -> Plan:
        return Plan(
            device,
            seconds=min(seconds, max(0.5, self.left / 4)),
            compile_limit=self.limit(),
            cold=cold,
            flush=workload.kind == "kernel",
            skip=lambda contender: self.why_skip(workload, contender),
        )
