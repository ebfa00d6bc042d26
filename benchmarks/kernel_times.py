"""Where the time of memory-bound passes goes, kernel by kernel: `python -m benchmarks.kernel_times --cases ... --out FILE`.

A case is `workload:rowsxcols:dtype` of `memory_bound`. Beside the times of whole passes stand those of each kernel, by
torch's profiler, of eager, Inductor and fxopt, and what fxopt's tuner has measured for each configuration of each region.
"""

from __future__ import annotations

import json
import re
import time
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any

import torch
import typer

from benchmarks import memory_bound
from benchmarks.budget import Budget
from benchmarks.crew import Crew, usable_devices
from benchmarks.memory_bound import WORKLOADS, expected_bytes
from benchmarks.results import Results
from benchmarks.run import measure
from benchmarks.workload import Job, Workload
from fxopt.cli import pick_device, pick_dtype
from fxopt.errors import FxoptError
from fxopt.options import suggestion
from fxopt.report.compare import Plan
from fxopt.report.contenders import pick
from fxopt.report.tables import open_console

__all__ = ["WORKLOADS", "plan_case"]

EXAMPLE = "layer-norm:8192x4096:bfloat16"


def plan_case(budget: Budget, workload: Workload, device: torch.device, seconds: float, warm: bool) -> Plan:
    """As `memory_bound` has it, with the times of kernels."""
    return replace(memory_bound.plan_case(budget, workload, device, seconds, warm), kernel_times=True)


def job(text: str) -> Job:
    """The case that `text` describes. Raises ValueError for other text."""
    given = re.fullmatch(r"([^:]+):(\d+)x(\d+):(\w+)", text.strip())
    if given is None:
        raise ValueError(f"{text!r} is no case of memory_bound: write workload:rowsxcols:dtype, as {EXAMPLE}")
    name, rows, cols, dtype = given.groups()
    if name not in WORKLOADS:
        problem = f"no workload {name!r}{suggestion(name, WORKLOADS)}; there are {', '.join(WORKLOADS)}"
        raise ValueError(f"{text!r} is no case of memory_bound: {problem}")
    try:
        pick_dtype(dtype)
    except FxoptError as error:
        raise ValueError(f"{text!r} is no case of memory_bound: {error}") from error
    return WORKLOADS[name], {"rows": int(rows), "cols": int(cols)}, dtype


def lines(data: dict[str, Any]) -> list[str]:
    """What `data`, of a results file, says of each pass: a line for each contender, its kernels and its contests."""
    out = []
    for case in data["cases"]:
        sizes = case["sizes"]
        out.append(f"{case['workload']} {sizes['rows']}x{sizes['cols']} {case['dtype']}")
        for row in case["rows"]:
            if row["seconds"] is None:
                continue
            kernels = ", ".join(f"{name[:40]} {s * 1e6:.1f}" for name, s in row["kernel_seconds"].items())
            out.append(f"  {row['part']:<8} {row['contender']:<9} {row['seconds'] * 1e6:8.1f} us: {kernels}")
        for region, seconds in next((r["contests"] for r in case["rows"] if r["contests"]), {}).items():
            figures = ", ".join(f"{label}: {s * 1e6:.1f}" for label, s in seconds.items())
            out.append(f"  contest {region}: {figures}")
    return out


def main(
    cases: Annotated[str, typer.Option(help="comma-separated, each workload:rowsxcols:dtype")],
    device: Annotated[str, typer.Option(help="cuda, cpu or auto")] = "auto",
    contenders: Annotated[str, typer.Option(help="names; eager and copy must be among them")] = "eager,copy,inductor,fxopt",
    seconds: Annotated[float, typer.Option(help="timing per case, all contenders and passes together")] = 0.4,
    minutes: Annotated[float, typer.Option(help="time budget; cases that do not fit are left out")] = 9.0,
    compile_limit: Annotated[float, typer.Option(help="seconds that one compilation may take")] = 120.0,
    out: Annotated[Path, typer.Option(help="results file")] = Path("benchmarks/out/kernel_times.json"),
    processes: Annotated[int, typer.Option(min=1, help="worker processes on the GPU, or on the CPU")] = 1,
) -> None:
    """Time every case and print its kernels."""
    where, console = pick_device(device), open_console()
    try:
        todo, chosen = [job(text) for text in cases.split(",")], pick(contenders)
    except ValueError as error:
        raise typer.BadParameter(str(error)) from error
    results = Results(out, where, {"seconds": seconds, "minutes": minutes, "processes": processes})
    budget = Budget(time.monotonic() + 60 * minutes, compile_limit, slow=False)
    if where.type == "cuda" or processes > 1:
        crew = Crew("benchmarks.kernel_times", where, processes, usable_devices(where, 1))
        left = crew.run(todo, lambda each: chosen, results, budget, seconds, False, expected_bytes)
    else:
        left = measure(
            todo, chosen, results, budget, lambda w: plan_case(budget, w, where, seconds, False), console, whole=True
        )
    results.save()
    for line in lines(json.loads(out.read_text())):
        console.print(line, soft_wrap=True, markup=False, highlight=False)
    console.print(f"{len(todo) - left} of {len(todo)} cases done; results: {out}")


if __name__ == "__main__":
    typer.run(main)
