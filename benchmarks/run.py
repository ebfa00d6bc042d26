"""`fxopt bench` (or `python -m benchmarks.run`): workloads under every contender, interleaved, within a time budget."""

from __future__ import annotations

import gc
import math
import random
import time
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Annotated

import torch
import typer
from rich.console import Console

from benchmarks.ahead import compile_and_measure
from benchmarks.budget import Budget
from benchmarks.choosing import contending, named
from benchmarks.crew import Crew, usable_devices
from benchmarks.kernels import KERNELS
from benchmarks.model_summary import summarize, summary_table
from benchmarks.models import END_TO_END, MODELS
from benchmarks.plot import plot_results
from benchmarks.results import Results
from benchmarks.workload import Job, Sizes, Workload
from fxopt.cli import pick_device, pick_dtype, progress_bar
from fxopt.report.cases import Case
from fxopt.report.compare import Plan, Row, compare, compile_ahead
from fxopt.report.contenders import Contender
from fxopt.report.tables import comparison_table, open_console

app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)
WORKLOADS = {w.name: w for w in (*KERNELS, *MODELS)}


def choose(names: str) -> list[Workload]:
    """Workloads from a comma-separated list of names, "kernels", "models", "inference", "train", "end-to-end" or "all".

    Raises UnknownName, with all names, for another.
    """
    groups = {
        "all": list(WORKLOADS.values()),
        "kernels": list(KERNELS),
        "models": list(MODELS),
        "inference": [w for w in MODELS if not w.training],
        "train": [w for w in MODELS if w.training],
        "end-to-end": [WORKLOADS[name] for name in END_TO_END],
    }
    known = {w.name: [w] for w in WORKLOADS.values()}
    found = named(names, groups | known, "workload")
    return list({w.name: w for group in found for w in group}.values())


def usual_dtype(workload: Workload, device: torch.device) -> str:
    """The dtype of a run that names none."""
    return (workload.dtype or "bfloat16") if device.type == "cuda" else "float32"


def plan_case(budget: Budget, workload: Workload, device: torch.device, seconds: float, warm: bool) -> Plan:
    """Whole steps as they run, host included."""
    return budget.plan(workload, device, seconds, cold=not warm)


def jobs(workloads: Sequence[Workload], tiny: bool, seed: int | None, draws: int) -> list[tuple[Workload, Sizes]]:
    """Each workload with its sizes; with a seed, `draws` random ones for each workload that has ranges."""
    if seed is None:
        return [(w, w.sizes(tiny)) for w in workloads]
    rng = random.Random(seed)
    return [(w, w.draw(rng, tiny)) for w in workloads if w.ranges for _ in range(draws)]


@app.command()
def bench(
    workloads: Annotated[str, typer.Option(help="names, or kernels, models, inference, train, end-to-end, all")] = "all",
    contenders: Annotated[str, typer.Option(help='names, "plain" (default modes) or "all"')] = "all",
    device: Annotated[str, typer.Option(help="cuda, cpu or auto")] = "auto",
    dtype: Annotated[
        str, typer.Option(help="float32, bfloat16, float16; default: float32 on CPU, the workload's or bfloat16 on CUDA")
    ] = "",
    tiny: Annotated[bool, typer.Option("--tiny", help="tiny sizes, to try the harness itself")] = False,
    seconds: Annotated[float, typer.Option(help="timing per case, all contenders together")] = 5.0,
    minutes: Annotated[
        float, typer.Option(help="time budget of the whole run; what does not fit is listed as skipped")
    ] = 60.0,
    compile_limit: Annotated[float, typer.Option(help="seconds that one compilation may take")] = 300.0,
    slow: Annotated[bool, typer.Option("--slow", help="max-autotune on whole models too")] = False,
    random_shapes: Annotated[
        int | None, typer.Option(help="seed: draw sizes at random instead of the standard ones")
    ] = None,
    draws: Annotated[int, typer.Option(help="how many random sizes per workload")] = 3,
    warm: Annotated[bool, typer.Option("--warm", help="use the user's caches instead of empty ones")] = False,
    out: Annotated[Path, typer.Option(help="results file; a plot is saved beside it")] = Path("benchmarks/out/results.json"),
    resume: Annotated[
        bool, typer.Option("--resume", help="keep the cases already in the results file, run the others")
    ] = False,
    gpus: Annotated[
        int, typer.Option(min=0, help="GPUs to use at once, each by a process of its own; 0: one, by this process")
    ] = 0,
    processes: Annotated[
        int, typer.Option(min=0, help="for each GPU; they compile everything ahead of the process that times; 0: none")
    ] = 0,
) -> None:
    """Compare fxopt with eager and Inductor on kernels and whole models; JSON after every case, tables and a plot."""
    wanted, chosen, where = choose(workloads), contending(contenders), pick_device(device)
    pick_dtype(dtype or "float32")  # a wrong name ends the run before anything is measured
    console = open_console()
    budget = Budget(time.monotonic() + 60 * minutes, compile_limit, slow)
    settings = {"tiny": tiny, "seconds": seconds, "minutes": minutes, "random_shapes": random_shapes, "warm": warm}
    settings |= {"gpus": gpus, "processes": processes, "compile_limit": compile_limit}
    results = Results(out, where, settings, resume)
    todo = [(w, sizes, dtype or usual_dtype(w, where)) for w, sizes in jobs(wanted, tiny, random_shapes, draws)]
    crew = Crew("benchmarks.run", where, max(1, processes), usable_devices(where, max(1, gpus)))
    if processes:
        compile_and_measure(crew, todo, chosen, results, budget, seconds)
    elif gpus:
        crew.run(todo, lambda job: chosen, results, budget, seconds, warm, lambda job: math.inf)
    else:
        measure(todo, chosen, results, budget, lambda w: plan_case(budget, w, where, seconds, warm), console)
    results.data["summary"] = summary = summarize(results.data["cases"])
    results.save()
    for own, entry in summary.items():
        console.print(summary_table(own, entry))
    console.print(f"results: {out}")
    if picture := plot_results(results.data, out.with_suffix(".png")):
        console.print(f"plot:    {picture}")


def measure(
    todo: Sequence[Job],
    chosen: Sequence[Contender],
    results: Results,
    budget: Budget,
    plan: Callable[[Workload], Plan],
    console: Console,
    whole: bool = False,
) -> int:
    """Run the cases that `results` does not have, each with a table; how many were left out.

    Where time ends, rows say what was skipped. With `whole`, cases run whole or not at all: those that do not fit are left
    to a later run.
    """
    left = 0
    with progress_bar(Console(stderr=True)) as progress:
        for number, (workload, sizes, dtype) in enumerate(todo):
            if results.has(workload, sizes, dtype):
                continue
            if whole and not budget.fits(workload):
                left += 1
                continue

            def report(what: str, share: float, number: int = number, name: str = workload.name) -> None:
                progress(f"{number + 1}/{len(todo)} {name}: {what}", (number + share) / len(todo))

            start = time.monotonic()
            rows = run_case(workload, sizes, pick_dtype(dtype), chosen, plan(workload), report)
            budget.learn(workload, rows, time.monotonic() - start)
            results.add(workload, sizes, dtype, rows)
            label = ", ".join(f"{k} {v}" for k, v in sizes.items())
            console.print(comparison_table(f"{workload.name} ({label}; {dtype})", rows))
    return left


def run_case(
    workload: Workload,
    sizes: Sizes,
    dtype: torch.dtype,
    chosen: Sequence[Contender],
    plan: Plan,
    progress: Callable[[str, float], None],
) -> list[Row]:
    """Rows of one case; when the case itself cannot be made or run, rows that say so: the other cases go on."""

    def build() -> Case:
        with nullcontext() if plan.caches else plan.turn():  # those who compiled it have not held the device either
            return workload.build(sizes, plan.device, dtype)

    def compared() -> list[Row]:
        return compare(build(), chosen, plan, progress, rebuild=build if plan.split else None)

    return _rows(compared, chosen, plan)


def compile_case(
    workload: Workload,
    sizes: Sizes,
    dtype: torch.dtype,
    chosen: Sequence[Contender],
    plan: Plan,
    progress: Callable[[str, float], None],
) -> list[Row]:
    """Compile a case into `plan.caches`; as `run_case`, without measurements."""

    def compiled(contender: Contender) -> Row:
        progress(f"compiling {contender.name}", 0.0)
        return compile_ahead(workload.build(sizes, plan.device, dtype), contender, plan)

    return _rows(lambda: [compiled(contender) for contender in chosen], chosen, plan)


def _rows(make: Callable[[], list[Row]], chosen: Sequence[Contender], plan: Plan) -> list[Row]:
    try:
        return make()
    except Exception as error:
        reason = f"failed: {type(error).__name__}: {error}"[:300]
        return [Row(c.name, c.mode_label, c.frozen, skipped=reason) for c in chosen]
    finally:
        if plan.device.type == "cuda":
            gc.collect()  # what a case holds may hold the case
            torch.cuda.empty_cache()


if __name__ == "__main__":
    app()
