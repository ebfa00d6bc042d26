"""Worker processes for the cases of one program: several on each GPU, which compile at once and take turns at measuring.

A program whose cases run so is a module with `WORKLOADS` (by name) and `plan_case` (see `Suite`); the workers import it
(`benchmarks/case_worker.py`).
"""

from __future__ import annotations

import math
import tempfile
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from rich.console import Console

from benchmarks import dealing
from benchmarks.budget import Budget
from benchmarks.results import Results
from benchmarks.workload import Job, Workload
from fxopt.report.compare import Plan, Row, speedup
from fxopt.report.contenders import CONTENDERS, Contender

ROOM = 0.9
"""The share of a GPU's memory that the cases on it may be expected to need together."""


class Suite(Protocol):
    """What a worker needs of a program."""

    WORKLOADS: Mapping[str, Workload]

    def plan_case(self, budget: Budget, workload: Workload, device: torch.device, seconds: float, warm: bool) -> Plan: ...


def usable_devices(device: torch.device, wanted: int) -> int:
    """How many devices of the kind are used: of the visible GPUs `wanted` (0: all), or the one CPU."""
    return min(wanted or 1 << 16, torch.cuda.device_count()) if device.type == "cuda" else 1


@dataclass(frozen=True)
class Crew:
    """Workers for the program in module `suite`: `processes` on each of the first `gpus` GPUs, or on the CPU."""

    suite: str
    device: torch.device
    processes: int
    gpus: int

    def run(
        self,
        todo: Sequence[Job],
        contenders: Callable[[Job], Sequence[Contender]],
        results: Results,
        budget: Budget,
        seconds: float,
        warm: bool,
        expected_bytes: Callable[[Job], float],
    ) -> int:
        """Run the cases that `results` does not have, with a line on standard error for each.

        `expected_bytes` is about the memory that a case needs at most. Returns how many cases were left out.
        """
        console = Console(stderr=True)
        missing = [job for job in todo if not results.has(*job)]
        requests = [request(job, contenders(job), budget, seconds, warm) for job in missing]
        finished = len(todo) - len(missing)

        def done(number: int, raw: Sequence[dict[str, Any]]) -> None:
            nonlocal finished
            finished += 1
            rows = [Row.from_dict(row) for row in raw]
            results.add(*missing[number], rows)
            where = f"{finished}/{len(todo)}, {budget.left:.0f} s left"
            console.print(f"{where}: {in_a_line(missing[number], rows)}", highlight=False, soft_wrap=True)

        with tempfile.TemporaryDirectory(prefix="fxopt-bench-", ignore_cleanup_errors=True) as folder:
            pool = self.pool(folder, self.processes, budget.deadline, budget.compile_limit, console)
            room = ROOM * results.data["target"].get("memory_bytes", math.inf)
            pool.run(requests, [expected_bytes(job) for job in missing], room, done)
        return len(todo) - finished

    def pool(
        self,
        folder: str,
        processes: int,
        deadline: float,
        compile_limit: float,
        console: Console,
        cores: Collection[int] = (),
    ) -> dealing.Pool:
        """`processes` workers on each device, on `cores`; `folder` has their locks and what they write meanwhile."""
        common = {"TMPDIR": folder, "FXOPT_LOCK_DIR": f"{folder}/locks"}
        common |= dealing.shared_threads(processes * self.gpus)
        devices = dealing.visible_devices(self.gpus) if self.device.type == "cuda" else [""]
        return dealing.Pool(
            ("-m", "benchmarks.case_worker", self.suite, self.device.type),
            [common | {"CUDA_VISIBLE_DEVICES": name} for name in devices],
            processes,
            deadline,
            _failed,
            lambda text: console.print(text, highlight=False, soft_wrap=True),
            compile_limit,
            cores,
        )


def request(job: Job, contenders: Sequence[Contender], budget: Budget, seconds: float, warm: bool) -> dealing.Request:
    """What a worker is asked to run; contenders for which the budget has no time are left out."""
    workload, sizes, dtype = job
    return {
        "workload": workload.name,
        "sizes": sizes,
        "dtype": dtype,
        "contenders": [c.name for c in contenders],
        "without": {c.name: why for c in contenders if (why := budget.why_skip(workload, c))},
        "seconds": seconds,
        "warm": warm,
        "compile_limit": budget.compile_limit,
        "slow": budget.slow,
    }


def _failed(request: Mapping[str, Any], why: Mapping[str, str]) -> list[dict[str, Any]]:
    own = [CONTENDERS[name] for name in request["contenders"]]
    return [Row(c.name, c.mode_label, c.frozen, skipped=_why(c, why)).to_dict() for c in own]


def _why(contender: Contender, why: Mapping[str, str]) -> str:
    return why.get(contender.name) or f"failed: not run, because of {', '.join(f'{k} ({v})' for k, v in why.items())}"


def in_a_line(job: Job, rows: Sequence[Row]) -> str:
    """fxopt's speed-ups over Inductor by pass, and who failed."""
    peers = list(dict.fromkeys(row.contender for row in rows if row.contender.startswith("inductor")))
    told = [
        f"{row.part} {factor:.2f}x {peer if len(peers) > 1 else ''}".strip()
        for row in rows
        if row.contender.startswith("fxopt")
        for peer in peers
        if (factor := speedup(row, rows, peer))
    ]
    failed = sorted({f"{row.contender} FAILED" for row in rows if row.skipped.startswith("failed")})
    workload, sizes, dtype = job
    return f"{workload.name} {'x'.join(map(str, sizes.values()))} {dtype}: {', '.join([*told, *failed]) or 'done'}"
