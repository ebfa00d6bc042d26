"""Cold and warm compilation of whole models, each in a process of its own: `python -m benchmarks.compile_time`.

Cold: the first call in a new process whose caches (fxopt's, Inductor's, Triton's) are empty. Warm: the same in another new
process with the caches that the cold one left.
"""

from __future__ import annotations

import compileall
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Annotated, Any

import typer
from rich import box
from rich.console import Console
from rich.table import Table

from benchmarks.models import MODELS
from benchmarks.plot import plot_first_calls
from benchmarks.results import Results
from benchmarks.run import Budget
from benchmarks.workload import Sizes, Workload
from fxopt.cli import pick_device, pick_dtype, progress_bar
from fxopt.report.contenders import caches_under, pick
from fxopt.report.tables import open_console

INFERENCE = "bert-base,gpt2,resnet50,vit-b"
STANDARD = ",".join([INFERENCE, *(f"{name}-train" for name in INFERENCE.split(","))])
ROOT = Path(__file__).resolve().parent.parent


@dataclass
class FirstCall:
    """A first call in a new process. Times in seconds.

    `import_seconds` (of the compiler's modules) is not part of `seconds`; `second_call` has nothing to compile any more.
    `own_seconds` is fxopt's share, the sum of its `phases`; `torch_phases` are torch's account of its own. `from_eager` is
    the largest relative difference from eager's results. `skipped` is why there is no measurement.
    """

    contender: str
    cache: str  # "cold" or "warm"
    seconds: float | None = None
    import_seconds: float | None = None
    second_call: float | None = None
    own_seconds: float | None = None
    phases: dict[str, float] = field(default_factory=dict)
    torch_phases: dict[str, float] = field(default_factory=dict)
    retreats: list[tuple[str, str]] = field(default_factory=list)
    from_eager: float | None = None
    skipped: str = ""

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


def run_child(workload: Workload, sizes: Sizes, row: FirstCall, device: str, dtype: str, limit: float) -> None:
    """Fill `row` from a new process, with the caches of this one's environment; after `limit` seconds it is ended."""
    command = [sys.executable, "-m", "benchmarks.first_call", workload.name, row.contender]
    command += ["--sizes", json.dumps(sizes), "--device", device, "--dtype", dtype]
    fill_from_process(row, command, limit)


def fill_from_process(row: Any, command: Sequence[str], limit: float) -> None:
    """Set the fields of `row` that the process prints as JSON in its last line, or `row.skipped` when it fails or takes
    more than `limit` seconds."""
    try:
        done = subprocess.run(command, cwd=ROOT, env=child_environment(), capture_output=True, text=True, timeout=limit)
    except subprocess.TimeoutExpired:
        row.skipped = f"failed: took longer than {limit:.0f} s"
        return
    if done.returncode:
        row.skipped = f"failed: {(done.stderr.strip() or 'no message').splitlines()[-1]}"[:300]
        return
    for name, value in json.loads(done.stdout.strip().splitlines()[-1]).items():
        setattr(row, name, value)


def compile_bytecode() -> None:
    """Give the checkout the bytecode that installing a package makes: Inductor has its own, and processes started in an
    environment that writes none (PYTHONDONTWRITEBYTECODE, as in containers) would compile every module of fxopt anew."""
    for package in ("fxopt", "benchmarks"):
        compileall.compile_dir(ROOT / package, quiet=2)


def child_environment() -> dict[str, str]:
    """This environment, in which the child finds the checkout's modules before any that are installed."""
    return {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, (str(ROOT), os.environ.get("PYTHONPATH", ""))))}


def summarize(cases: Sequence[dict[str, Any]]) -> dict[str, dict[str, float | None]]:
    """By workload: the median seconds of each contender, cold and warm, and fxopt's share of its warm starts."""
    table: dict[str, dict[str, float | None]] = {}
    for case in cases:
        entry: dict[str, float | None] = {}
        for name in dict.fromkeys(r["contender"] for r in case["rows"]):
            for cache in ("cold", "warm"):
                entry[f"{name} {cache}"] = _median(case, name, cache, "seconds")
        entry["fxopt's own share, warm"] = _median(case, "fxopt", "warm", "own_seconds")
        table[case["workload"]] = entry
    return table


def _median(case: dict[str, Any], contender: str, cache: str, what: str) -> float | None:
    values = [r[what] for r in case["rows"] if (r["contender"], r["cache"]) == (contender, cache) and r[what] is not None]
    return statistics.median(values) if values else None


def summary_table(summary: dict[str, dict[str, float | None]], cases: Sequence[dict[str, Any]]) -> Table:
    """Seconds, then fxopt's cold and warm starts as shares of Inductor's."""
    table = Table(title="first call, s", title_justify="left", caption_justify="left", pad_edge=False, box=box.SIMPLE_HEAD)
    columns = list(dict.fromkeys(name for entry in summary.values() for name in entry))
    ratios = {
        "cold/cold": ("fxopt cold", "inductor cold"),
        "warm/cold": ("fxopt warm", "inductor cold"),
        "warm/warm": ("fxopt warm", "inductor warm"),
    }
    for name in ("", *columns, *ratios):
        table.add_column(name, justify="right" if name else "left")
    for workload, entry in summary.items():
        shares = [(entry.get(a), entry.get(b)) for a, b in ratios.values()]
        cells = [f"{a / b:.2f}" if a and b else "-" for a, b in shares]
        table.add_row(workload, *("-" if entry.get(c) is None else f"{entry[c]:.2f}" for c in columns), *cells)
    failed = [
        f"{c['workload']} {r['contender']} {r['cache']}: {r['skipped']}" for c in cases for r in c["rows"] if r["skipped"]
    ]
    table.caption = "\n".join(failed) or None
    return table


def choose(names: str) -> list[Workload]:
    """Model workloads by comma-separated names. ValueError lists the valid ones."""
    known = {w.name: w for w in MODELS}
    wanted = [n.strip() for n in names.split(",") if n.strip()]
    if unknown := [n for n in wanted if n not in known]:
        raise ValueError(f"unknown workload {', '.join(unknown)}; valid: {', '.join(known)}")
    return [known[n] for n in dict.fromkeys(wanted)]


def main(
    workloads: Annotated[str, typer.Option(help="model workloads, comma-separated")] = STANDARD,
    contenders: Annotated[str, typer.Option(help="names of contenders")] = "inductor,fxopt",
    device: Annotated[str, typer.Option(help="cuda, cpu or auto")] = "auto",
    dtype: Annotated[str, typer.Option(help="default: bfloat16 on CUDA, float32 on CPU")] = "",
    batch: Annotated[int, typer.Option(help="batch size instead of the workload's (0)")] = 0,
    cold_runs: Annotated[int, typer.Option(help="new processes with empty caches, by turns; medians are compared")] = 1,
    warm_runs: Annotated[int, typer.Option(help="new processes with warm caches, after each cold one")] = 1,
    limit: Annotated[float, typer.Option(help="seconds that one process may take")] = 300.0,
    minutes: Annotated[float, typer.Option(help="time budget; workloads that do not fit are left for --resume")] = 60.0,
    tiny: Annotated[bool, typer.Option("--tiny", help="tiny sizes, to try the harness itself")] = False,
    out: Annotated[Path, typer.Option(help="results file; a plot is saved beside it")] = Path(
        "benchmarks/out/compile_time.json"
    ),
    resume: Annotated[bool, typer.Option("--resume", help="keep the workloads already in the results file")] = False,
) -> None:
    """Time first calls, cold and warm; JSON after every workload, a table and a plot at the end."""
    where, console = pick_device(device), open_console()
    dtype = dtype or ("bfloat16" if where.type == "cuda" else "float32")
    pick_dtype(dtype)
    names, todo = [c.name for c in pick(contenders) if c.backend is not None], choose(workloads)
    settings = {"tiny": tiny, "cold_runs": cold_runs, "warm_runs": warm_runs, "minutes": minutes, "batch": batch}
    results = Results(out, where, settings, resume)
    compile_bytecode()
    budget = Budget(time.monotonic() + 60 * minutes, limit, slow=True)
    left = 0
    with progress_bar(Console(stderr=True)) as progress:
        for number, workload in enumerate(todo):
            sizes = {**workload.sizes(tiny), **({"batch": batch} if batch else {})}
            if results.has(workload, sizes, dtype):
                continue
            if not budget.fits(workload):
                left += 1
                continue
            start, rows = time.monotonic(), []
            for _ in range(cold_runs):
                with tempfile.TemporaryDirectory(prefix="fxopt-first-call-", ignore_cleanup_errors=True) as root:
                    for cache in ("cold", *(["warm"] * warm_runs)):
                        for name in names:
                            progress(f"{workload.name}: {name}, {cache}", number / len(todo))
                            rows.append(row := FirstCall(name, cache))
                            with caches_under(os.path.join(root, name)):
                                run_child(workload, sizes, row, device=str(where), dtype=dtype, limit=budget.limit())
            budget.learn(workload, (), time.monotonic() - start)
            results.add(workload, sizes, dtype, rows)
    results.data["summary"] = summarize(results.data["cases"])
    results.save()
    console.print(summary_table(results.data["summary"], results.data["cases"]))
    console.print(f"{len(todo) - left} of {len(todo)} workloads done; results: {out}")
    if picture := plot_first_calls(results.data, out.with_suffix(".png")):
        console.print(f"plot: {picture}")


if __name__ == "__main__":
    typer.run(main)
