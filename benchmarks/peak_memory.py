"""Memory of whole models under each contender: `python -m benchmarks.peak_memory`.

Each contender of each workload runs in a process of its own, after calls that compile and warm up. Counted is what comes
beside weights and inputs: what torch's allocator has handed out at most during a call, results included; what it had
reserved for that from the device, where gaps and the private memory of CUDA graphs count, too; and what stays reserved
between calls.
"""

from __future__ import annotations

import json
import sys
import time
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from rich import box
from rich.console import Console
from rich.table import Table

from benchmarks.choosing import contending
from benchmarks.compile_time import fill_from_process
from benchmarks.models import choose
from benchmarks.results import Results
from benchmarks.workload import Sizes, Workload
from fxopt.cli import pick_device, pick_dtype, progress_bar
from fxopt.report.cases import Case
from fxopt.report.contenders import CONTENDERS
from fxopt.report.explanation import journals
from fxopt.report.tables import open_console

INFERENCE = "bert-base,gpt2,resnet50,vit-b,convnext-t,llama-1b"
STANDARD = f"{INFERENCE},bert-base-train,gpt2-train,resnet50-train,vit-b-train"
DEFAULT = "eager,inductor,inductor-reduce-overhead,fxopt"
WARM_UP = 4
"""Calls: the first compiles, CUDA graphs are recorded in the second or third."""

app = typer.Typer(add_completion=False)


@dataclass
class Memory:
    """Bytes beside weights and inputs. `peak`: handed out by torch's allocator at most during a call; `reserved`: taken from
    the device by the end of a call that began with an empty cache; `held`: still reserved between calls, results dropped.
    `plan` is what fxopt's journals tell of each graph. `skipped` is why there is no measurement.
    """

    contender: str
    peak: int | None = None
    reserved: int | None = None
    held: int | None = None
    plan: dict[str, dict[str, int]] = field(default_factory=dict)
    skipped: str = ""

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


def measured(case: Case, contender: str, device: torch.device) -> dict[str, Any]:
    """The fields of a Memory for `case` under `contender`; on a CPU only `plan`."""
    for parameter in case.module.parameters() if isinstance(case.module, torch.nn.Module) else ():
        parameter.grad = None
    base, reserved = _in_use(device)
    compiled = CONTENDERS[contender].compile(case.module, device)
    with journals() as graphs:
        for _ in range(WARM_UP):
            case.drive(compiled)
    plan = {j.graph: j.memory for j in graphs if j.memory}
    if device.type != "cuda":
        return {"plan": plan}
    held = _in_use(device)[1] - reserved
    torch.cuda.reset_peak_memory_stats(device)
    case.drive(compiled)
    torch.cuda.synchronize(device)
    return {
        "peak": torch.cuda.max_memory_allocated(device) - base,
        "reserved": torch.cuda.max_memory_reserved(device) - reserved,
        "held": held,
        "plan": plan,
    }


def _in_use(device: torch.device) -> tuple[int, int]:
    """Bytes that the allocator has handed out and reserved, with an empty cache; zeros on a CPU."""
    if device.type != "cuda":
        return 0, 0
    torch.cuda.synchronize(device)
    torch.cuda.empty_cache()
    return torch.cuda.memory_allocated(device), torch.cuda.memory_reserved(device)


def run_child(workload: Workload, sizes: Sizes, row: Memory, device: torch.device, dtype: str, limit: float) -> None:
    """Fill `row` from a new process, which is ended after `limit` seconds."""
    command = [sys.executable, "-m", "benchmarks.peak_memory", "one", workload.name, row.contender]
    command += ["--sizes", json.dumps(sizes), "--device", str(device), "--dtype", dtype]
    fill_from_process(row, command, limit)


def summary_table(cases: list[dict[str, Any]]) -> Table:
    """By workload and contender: peak, reserved and held, in MiB."""
    table = Table(title="MiB beside weights and inputs: peak / reserved / held", title_justify="left", box=box.SIMPLE_HEAD)
    names = list(dict.fromkeys(r["contender"] for c in cases for r in c["rows"]))
    for name in ("", *names):
        table.add_column(name, justify="right" if name else "left")
    for case in cases:
        rows = {r["contender"]: r for r in case["rows"]}
        table.add_row(case["workload"], *(_cell(rows.get(name)) for name in names))
    return table


def _cell(row: dict[str, Any] | None) -> str:
    if row is None or row["peak"] is None:
        return "-" if row is None or not row["skipped"] else "failed"
    return " / ".join(f"{row[what] / 2**20:.0f}" for what in ("peak", "reserved", "held"))


@app.command()
def one(
    workload: str,
    contender: str,
    sizes: Annotated[str, typer.Option(help="JSON")],
    device: str = "cpu",
    dtype: str = "float32",
) -> None:
    """Print the memory of one workload under one contender: the child of `compare`."""
    (known,) = choose(workload)
    where = pick_device(device)
    case = known.build(json.loads(sizes), where, pick_dtype(dtype))
    typer.echo(json.dumps(measured(case, contender, where)))


@app.command()
def compare(
    workloads: Annotated[str, typer.Option(help="model workloads, comma-separated")] = STANDARD,
    contenders: Annotated[str, typer.Option(help="names of contenders")] = DEFAULT,
    device: Annotated[str, typer.Option(help="cuda, cpu or auto")] = "auto",
    dtype: Annotated[str, typer.Option(help="default: bfloat16 on CUDA, float32 on CPU")] = "",
    limit: Annotated[float, typer.Option(help="seconds that one process may take")] = 200.0,
    minutes: Annotated[float, typer.Option(help="time budget; what does not fit is left for --resume")] = 60.0,
    tiny: Annotated[bool, typer.Option("--tiny", help="tiny sizes, to try the harness itself")] = False,
    out: Annotated[Path, typer.Option(help="results file")] = Path("benchmarks/out/peak_memory.json"),
    resume: Annotated[bool, typer.Option("--resume", help="keep the workloads already in the results file")] = False,
) -> None:
    """Peak memory of every workload under every contender; JSON after every workload, a table at the end."""
    todo, among = choose(workloads), contending(contenders)
    where, end = pick_device(device), time.monotonic() + 60 * minutes
    dtype = dtype or ("bfloat16" if where.type == "cuda" else "float32")
    pick_dtype(dtype)
    results = Results(out, where, {"tiny": tiny, "warm_up": WARM_UP}, resume)
    with progress_bar(Console(stderr=True)) as progress:
        for number, workload in enumerate(todo):
            sizes, rows = workload.sizes(tiny), []
            if results.has(workload, sizes, dtype):
                continue
            for contender in among:
                progress(f"{workload.name}: {contender.name}", number / len(todo))
                rows.append(row := Memory(contender.name))
                left = end - time.monotonic()
                if left <= 0:
                    break
                run_child(workload, sizes, row, where, dtype, min(limit, left))
            else:
                results.add(workload, sizes, dtype, rows)
    console = open_console()
    console.print(summary_table(results.data["cases"]))
    console.print(f"results: {out}")


if __name__ == "__main__":
    app()
