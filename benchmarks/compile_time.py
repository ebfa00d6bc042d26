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
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import IO, Annotated, Any

import typer
from rich import box
from rich.console import Console
from rich.table import Table

from benchmarks.choosing import contending
from benchmarks.crew import usable_devices
from benchmarks.dealing import visible_devices
from benchmarks.lanes import Lane, deal, lanes
from benchmarks.models import choose
from benchmarks.plot import plot_first_calls
from benchmarks.results import Results
from benchmarks.workload import Sizes, Workload
from fxopt.cli import pick_device, pick_dtype
from fxopt.report.contenders import cache_variables
from fxopt.report.tables import open_console

INFERENCE = "bert-base,gpt2,resnet50,vit-b"
STANDARD = ",".join([INFERENCE, *(f"{name}-train" for name in INFERENCE.split(","))])
ROOT = Path(__file__).resolve().parent.parent


@dataclass
class FirstCall:
    """A first call in a new process. Times in seconds.

    `import_seconds` (of the compiler's modules) is not part of `seconds`; `second_call` has nothing to compile any more.
    `own_seconds` is fxopt's share, the sum of its `phases`; `torch_phases` are torch's account of its own. `from_eager` is
    the largest relative difference from eager's results. `process_seconds` is the process from start to end, `cores` how
    many it could use. `skipped` is why there is no measurement.
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
    process_seconds: float | None = None
    cores: int | None = None
    skipped: str = ""

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


def run_child(
    workload: Workload, sizes: Sizes, row: FirstCall, device: str, dtype: str, limit: float, environment: Mapping[str, str]
) -> None:
    """Fill `row` from a new process with `environment` beside this one's; after `limit` seconds it is ended."""
    command = [sys.executable, "-m", "benchmarks.first_call", workload.name, row.contender]
    command += ["--sizes", json.dumps(sizes), "--device", device, "--dtype", dtype]
    start = time.monotonic()
    fill_from_process(row, command, limit, environment)
    row.process_seconds = time.monotonic() - start


def fill_from_process(row: Any, command: Sequence[str], limit: float, environment: Mapping[str, str] | None = None) -> None:
    """Set the fields of `row` that the process prints as JSON in its last line, or `row.skipped` when it fails or takes
    more than `limit` seconds. It has `environment` beside this process's."""
    own = child_environment() | dict(environment or {})
    with tempfile.TemporaryFile() as out, tempfile.TemporaryFile() as errors:  # pipes would wait for a killed one's children
        try:
            status = subprocess.run(command, cwd=ROOT, env=own, stdout=out, stderr=errors, timeout=limit).returncode
        except subprocess.TimeoutExpired:
            row.skipped = f"failed: took longer than {limit:.0f} s"
            return
        if status:
            row.skipped = f"failed: {_last_line(errors) or 'no message'}"[:300]
            return
        for name, value in json.loads(_last_line(out)).items():
            setattr(row, name, value)


def _last_line(file: IO[bytes]) -> str:
    file.seek(0)
    return "".join(file.read().decode(errors="replace").strip().splitlines()[-1:])


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
    found = sorted({r["cores"] for c in cases for r in c["rows"] if r.get("cores")})
    title = f"first call, s{f', cores: {found[0]}' if len(found) == 1 else ''}"
    table = Table(title=title, title_justify="left", caption_justify="left", pad_edge=False, box=box.SIMPLE_HEAD)
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


@dataclass
class Run:
    """What the workloads of one run share; several threads may `measure` at once.

    Each gets `cold_runs` new processes of each contender, each with `warm_runs` after it, and at most `limit` seconds. At
    the `deadline` of time.monotonic what has begun is cut off.
    """

    contenders: Sequence[str]
    device: str
    dtype: str
    cold_runs: int
    warm_runs: int
    limit: float
    deadline: float
    results: Results
    console: Console
    _guard: threading.Lock = field(default_factory=threading.Lock)

    def measure(self, job: tuple[Workload, Sizes], lane: Lane) -> None:
        """Time all first calls of a workload; the results file has each as soon as it is known."""
        (workload, sizes), rows = job, list[FirstCall]()
        stop = min(time.monotonic() + self.limit, self.deadline)
        for row, caches in self._planned():
            if time.monotonic() >= self.deadline:
                return
            if (left := stop - time.monotonic()) <= 0:
                row.skipped = f"failed: the workload took longer than {self.limit:.0f} s"
            else:
                environment = {**lane.environment, **caches}
                run_child(workload, sizes, row, device=self.device, dtype=self.dtype, limit=left, environment=environment)
            if row.skipped and time.monotonic() >= self.deadline:
                return
            rows.append(row)
            self._note(job, rows)

    def _planned(self) -> Iterator[tuple[FirstCall, dict[str, str]]]:
        """The first calls of one workload in order, each with the environment that names its caches."""
        for _ in range(self.cold_runs):
            with tempfile.TemporaryDirectory(prefix="fxopt-first-call-", ignore_cleanup_errors=True) as root:
                for cache in ("cold", *(["warm"] * self.warm_runs)):
                    for name in self.contenders:
                        yield FirstCall(name, cache), cache_variables(os.path.join(root, name))

    def _note(self, job: tuple[Workload, Sizes], rows: Sequence[FirstCall]) -> None:
        planned, row = self.cold_runs * (1 + self.warm_runs) * len(self.contenders), rows[-1]
        with self._guard:
            self.results.add(*job, self.dtype, rows, unfinished=len(rows) < planned)
            took = row.skipped or f"{row.seconds:.2f} s with {row.cores} cores"
            left = self.deadline - time.monotonic()
            text = f"{job[0].name}: {row.contender}, {row.cache}: {took} ({left:.0f} s left)"
            self.console.print(text, highlight=False, soft_wrap=True)


def longest_first(workloads: Sequence[Workload]) -> list[Workload]:
    """Training steps before inference, so that none of them is begun when the others are done."""
    return sorted(workloads, key=lambda w: not w.training)


def main(
    workloads: Annotated[str, typer.Option(help="model workloads, comma-separated")] = STANDARD,
    contenders: Annotated[str, typer.Option(help="names of contenders")] = "inductor,fxopt",
    device: Annotated[str, typer.Option(help="cuda, cpu or auto")] = "auto",
    dtype: Annotated[str, typer.Option(help="default: bfloat16 on CUDA, float32 on CPU")] = "",
    batch: Annotated[int, typer.Option(help="batch size instead of the workload's (0)")] = 0,
    cold_runs: Annotated[int, typer.Option(help="new processes with empty caches, by turns; medians are compared")] = 1,
    warm_runs: Annotated[int, typer.Option(help="new processes with warm caches, after each cold one")] = 1,
    processes: Annotated[
        int, typer.Option(min=1, help="workloads side by side, with cores of their own and the visible GPUs in turn")
    ] = 1,
    cores: Annotated[int, typer.Option(min=0, help="cores of each; 0: an equal share")] = 0,
    limit: Annotated[float, typer.Option(help="seconds that one workload may take")] = 600.0,
    minutes: Annotated[float, typer.Option(help="time budget; what is not timed by then is left for --resume")] = 60.0,
    tiny: Annotated[bool, typer.Option("--tiny", help="tiny sizes, to try the harness itself")] = False,
    out: Annotated[Path, typer.Option(help="results file; a plot is saved beside it")] = Path(
        "benchmarks/out/compile_time.json"
    ),
    resume: Annotated[bool, typer.Option("--resume", help="keep the finished workloads in the results file")] = False,
) -> None:
    """Time first calls, cold and warm; JSON after every call, a table and a plot at the end."""
    deadline = time.monotonic() + 60 * minutes
    where, console = pick_device(device), open_console()
    dtype = dtype or ("bfloat16" if where.type == "cuda" else "float32")
    pick_dtype(dtype)
    names, todo = [c.name for c in contending(contenders) if c.backend is not None], choose(workloads)
    among = lanes(processes, cores, visible_devices(usable_devices(where, processes)) if where.type == "cuda" else ())
    settings = {"tiny": tiny, "cold_runs": cold_runs, "warm_runs": warm_runs, "minutes": minutes, "batch": batch}
    settings |= {"processes": processes, "cores": len(among[0].cores)}
    results = Results(out, where, settings, resume)
    compile_bytecode()
    run = Run(names, str(where), dtype, cold_runs, warm_runs, limit, deadline, results, Console(stderr=True))
    jobs = [(w, {**w.sizes(tiny), **({"batch": batch} if batch else {})}) for w in longest_first(todo)]
    deal([job for job in jobs if not results.has(*job, dtype)], among, run.measure)
    order = [w.name for w in todo]
    results.data["cases"].sort(key=lambda case: order.index(case["workload"]) if case["workload"] in order else len(order))
    results.data["summary"] = summarize(results.data["cases"])
    results.save()
    console.print(summary_table(results.data["summary"], results.data["cases"]))
    done = sum(results.has(*job, dtype) for job in jobs)
    console.print(f"{done} of {len(todo)} workloads done; results: {out}")
    if picture := plot_first_calls(results.data, out.with_suffix(".png")):
        console.print(f"plot: {picture}")


if __name__ == "__main__":
    typer.run(main)
