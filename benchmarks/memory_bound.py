"""Memory-bound kernels and optimizer steps against the speed of a copy: `python -m benchmarks.memory_bound`.

Each pass, forward or backward, of each kernel moves at least so many bytes; a copy of as many, timed among the contenders,
says how fast this device moves them. The order of the cases spreads dtypes, sizes and row lengths, so that a run that ends
early has seen some of everything; `--resume` goes on where the last one stopped.

On GPUs, and with `--processes`, cases run in worker processes (`benchmarks/case_worker.py`): several on each GPU compile at
once and take turns at measuring.
"""

from __future__ import annotations

import random
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated

import torch
import typer

from benchmarks import liger
from benchmarks.budget import Budget
from benchmarks.choosing import contending, named
from benchmarks.crew import Crew, usable_devices
from benchmarks.memory_bound_kernels import SWEEP
from benchmarks.optimizers import OPTIMIZERS
from benchmarks.plot import plot_shares
from benchmarks.results import Results
from benchmarks.run import measure
from benchmarks.summary import summarize, summary_tables
from benchmarks.workload import Job, Workload
from fxopt.cli import pick_device, pick_dtype
from fxopt.report.compare import Plan
from fxopt.report.contenders import Contender
from fxopt.report.tables import open_console

WORKLOADS = {w.name: w for w in (*SWEEP, *OPTIMIZERS)}
MIB = 1 << 20
FLOAT64_COPIES = 8
"""About as many float64 tensors of the main input's size does a kernel's reference take, its backward included."""

OTHER_BYTES = 8 << 30
"""About as much does an optimizer's case take."""


@dataclass(frozen=True)
class Grid:
    """The main input's size in MiB (0: the workload's own tiny sizes), the length of its rows, and the dtypes."""

    dtypes: Sequence[str]
    megabytes: Sequence[float]
    lengths: Sequence[int]
    tiny: bool = False

    def cells(self, workload: Workload) -> list[tuple[tuple[str, float, int], Job]]:
        """Each cell's traits and its job. The workload's nearest row length stands for one that it has not."""
        if self.tiny or "cols" not in workload.full:
            return [((dtype, 0.0, 0), (workload, workload.sizes(self.tiny), dtype)) for dtype in self.dtypes]
        low, high = workload.ranges["cols"]
        lengths = sorted({max(low, min(high, length)) for length in self.lengths})
        found = []
        for dtype in self.dtypes:
            for size in self.megabytes:
                for cols in lengths:
                    rows = int(size * MIB) // (pick_dtype(dtype).itemsize * cols)
                    if rows:
                        found.append(((dtype, size, cols), (workload, {"rows": rows, "cols": cols}, dtype)))
        return found


def spread(cells: Sequence[tuple[tuple[str, float, int], Job]], rng: random.Random) -> list[Job]:
    """The jobs in an order in which each next one has what its predecessors had least of."""
    rest, used, order = rng.sample(cells, len(cells)), Counter[tuple[int, str | float]](), []
    while rest:
        traits, job = chosen = min(rest, key=lambda cell: sum(used[t] for t in enumerate(cell[0])))
        rest.remove(chosen)
        used.update(enumerate(traits))
        order.append(job)
    return order


def plan_jobs(workloads: Sequence[Workload], grid: Grid, seed: int) -> list[Job]:
    """One cell of every workload, then another of every one, and so on; `seed` decides which comes first."""
    orders = [spread(grid.cells(w), random.Random(f"{seed} {w.name}")) for w in workloads]
    longest = max(map(len, orders), default=0)
    return [order[turn] for turn in range(longest) for order in orders if turn < len(order)]


def choose(names: str) -> list[Workload]:
    """Workloads by comma-separated names, "kernels", "optimizers" or "all". Raises UnknownName."""
    groups = {"all": list(WORKLOADS.values()), "kernels": list(SWEEP), "optimizers": list(OPTIMIZERS)}
    found = named(names, groups | {name: [w] for name, w in WORKLOADS.items()}, "workload")
    return list({w.name: w for group in found for w in group}.values())


def present(contenders: Sequence[Contender]) -> tuple[list[Contender], dict[str, str]]:
    """The contenders that can run here, and why others cannot."""
    absent = {} if liger.available() else {"liger": "liger-kernel is not installed"}
    return [c for c in contenders if c.name not in absent], {c.name: absent[c.name] for c in contenders if c.name in absent}


def plan_case(budget: Budget, workload: Workload, device: torch.device, seconds: float, warm: bool) -> Plan:
    """Passes apart. An optimizer's step is timed as it runs, host included: hundreds of tensors keep it busy."""
    usual = budget.plan(workload, device, seconds, cold=not warm)
    return replace(usual, split=True, ahead=workload.kind == "kernel", replay=workload.kind != "kernel")


def expected_bytes(job: Job) -> float:
    """About the memory that a case needs at most."""
    workload, sizes, _ = job
    return FLOAT64_COPIES * 8.0 * sizes["rows"] * sizes["cols"] if workload.kind == "kernel" else float(OTHER_BYTES)


def _numbers(text: str) -> list[float]:
    return [float(n) for n in text.split(",") if n.strip()]


def main(
    device: Annotated[str, typer.Option(help="cuda, cpu or auto")] = "auto",
    dtype: Annotated[str, typer.Option(help="comma-separated: bfloat16, float32, float16")] = "bfloat16,float32",
    megabytes: Annotated[str, typer.Option(help="sizes of the main input in MiB")] = "16,128,1024",
    rows_of: Annotated[str, typer.Option(help="lengths of its rows in elements")] = "64,1024,8192,131072",
    workloads: Annotated[str, typer.Option(help="names, kernels, optimizers or all")] = "all",
    contenders: Annotated[str, typer.Option(help="names; eager and copy must be among them")] = (
        "eager,copy,inductor,fxopt,liger,fused"
    ),
    seconds: Annotated[float, typer.Option(help="timing per case, all contenders and passes together")] = 1.0,
    minutes: Annotated[float, typer.Option(help="time budget; cases that do not fit are left for --resume")] = 9.0,
    compile_limit: Annotated[float, typer.Option(help="seconds that one compilation may take")] = 120.0,
    seed: Annotated[int, typer.Option(help="which cases come first")] = 0,
    warm: Annotated[bool, typer.Option("--warm", help="use the user's caches instead of empty ones")] = False,
    tiny: Annotated[bool, typer.Option("--tiny", help="tiny sizes, to try the harness itself")] = False,
    out: Annotated[Path, typer.Option(help="results file; a plot is saved beside it")] = Path(
        "benchmarks/out/memory_bound.json"
    ),
    resume: Annotated[bool, typer.Option("--resume", help="keep the cases already in the results file")] = False,
    processes: Annotated[int, typer.Option(min=1, help="worker processes on each GPU, or on the CPU")] = 1,
    gpus: Annotated[int, typer.Option(min=0, help="how many of the visible GPUs to use; 0: all")] = 0,
) -> None:
    """Check and time every pass under every contender; JSON after every case, a summary and a plot at the end."""
    wanted, (chosen, absent) = choose(workloads), present(contending(contenders))
    where, console = pick_device(device), open_console()
    grid = Grid(dtype.split(","), _numbers(megabytes), [int(n) for n in _numbers(rows_of)], tiny)
    if missing := {"eager", "copy"} - {c.name for c in chosen}:
        raise typer.BadParameter(f"contenders lack {' and '.join(sorted(missing))}, by which all others are judged")
    for name, reason in absent.items():
        console.print(f"without {name}: {reason}")
    todo = plan_jobs(wanted, grid, seed)
    used = usable_devices(where, gpus)
    settings = {"tiny": tiny, "seconds": seconds, "minutes": minutes, "seed": seed, "warm": warm, "absent": absent}
    results = Results(out, where, settings | {"processes": processes, "gpus": used}, resume, compact=True)
    budget = Budget(time.monotonic() + 60 * minutes, compile_limit, slow=False)
    if where.type == "cuda" or processes > 1:
        crew = Crew("benchmarks.memory_bound", where, processes, used)
        left = crew.run(todo, lambda job: chosen, results, budget, seconds, warm, expected_bytes)
    else:
        left = measure(
            todo, chosen, results, budget, lambda w: plan_case(budget, w, where, seconds, warm), console, whole=True
        )
    results.data["summary"] = summarize(results.data)
    results.save()
    for table in summary_tables(results.data["summary"]):
        console.print(table)
    console.print(f"{len(todo) - left} of {len(todo)} cases done; results: {out}")
    if picture := plot_shares(results.data, out.with_suffix(".png")):
        console.print(f"plot: {picture}")


if __name__ == "__main__":
    typer.run(main)
