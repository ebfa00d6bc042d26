"""Regions of nine models against the best of eager, Inductor and its max-autotune: `python -m benchmarks.regions`.

In a contest all contenders freeze weights or none does, and all are timed interleaved, on the device alone. The contests
with max-autotune, which takes long to compile, come after all others, so that a run that ends early has seen every region
under the rest; `--resume` goes on where the last one stopped.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import chain, zip_longest
from pathlib import Path
from typing import Annotated

import torch
import typer

from benchmarks.budget import Budget
from benchmarks.choosing import containing_any, named
from benchmarks.crew import Crew, usable_devices
from benchmarks.plot import plot_bars
from benchmarks.region_catalog import REGIONS, Region
from benchmarks.region_summary import Case, standings, summarize, summary_tables
from benchmarks.results import Results
from benchmarks.workload import Job, Workload
from fxopt.cli import pick_device, pick_dtype
from fxopt.report.compare import Plan
from fxopt.report.contenders import Contender, pick
from fxopt.report.tables import open_console

CASE_BYTES = 9 << 30
"""Of which one GPU has room for eight cases. Attention in float64 with all its scores takes 14 GiB, but only the one case
whose turn it is computes float64 values; while they compile, cases take 1 or 2.
"""


@dataclass(frozen=True)
class Contest:
    """Who meets on a region. `eager` must be among them, by which errors are judged, and `copy` for bandwidths."""

    name: str
    frozen: bool
    contenders: str


PLAIN, FROZEN = "plain", "frozen"
CONTESTS = {
    contest.name: contest
    for contest in (
        Contest(PLAIN, False, "eager,copy,inductor,fxopt"),
        Contest(FROZEN, True, "eager,copy,inductor-freezing,fxopt-freeze"),
        Contest("tuned", False, "eager,copy,inductor-max-autotune-no-cudagraphs,fxopt"),
        Contest("tuned-frozen", True, "eager,copy,inductor-max-autotune-no-cudagraphs-freezing,fxopt-freeze"),
    )
}
BY_NAME = {region.name: region for region in REGIONS}


def workload_of(region: Region, contest: Contest) -> Workload:
    return Workload(f"{region.name} {contest.name}", "region", region.build, region.full, region.tiny)


WORKLOADS = {w.name: w for region in REGIONS for contest in CONTESTS.values() for w in [workload_of(region, contest)]}


def region_and_contest(workload: str) -> tuple[Region, Contest]:
    """Those that a workload's name is made of."""
    region, _, contest = workload.partition(" ")
    return BY_NAME[region], CONTESTS[contest]


def contenders_of(job: Job) -> Sequence[Contender]:
    return pick(region_and_contest(job[0].name)[1].contenders)


def plan_case(budget: Budget, workload: Workload, device: torch.device, seconds: float, warm: bool) -> Plan:
    """One pass, timed on the device alone, with weights and activations out of the L2 cache."""
    usual = budget.plan(workload, device, seconds, cold=not warm)
    return replace(usual, split=True, flush=True, ahead=True, replay=False)


def choose(only: str, contests: str) -> list[tuple[Region, Contest]]:
    """Contest after contest, each over the regions whose names contain one of `only`, models taking turns.

    Freezing is nothing to a region without weights. Raises UnknownName, with all names, for another name.
    """
    wanted = named(contests, CONTESTS, "contest")
    regions = containing_any(REGIONS, only, lambda region: region.name)
    models = [[r for r in regions if r.model == model] for model in dict.fromkeys(r.model for r in regions)]
    turns = [r for r in chain.from_iterable(zip_longest(*models)) if r is not None]
    return [(region, contest) for contest in wanted for region in turns if region.weighted or not contest.frozen]


def summary_of(cases: Sequence[Case]) -> dict[str, dict[str, object]]:
    """By freezing: the summary, and under "regions_over_best" how many times faster than the best peer fxopt is."""
    summary = {}
    for title, frozen in ((PLAIN, False), (FROZEN, True)):
        own = [
            (region.name, case)
            for case in cases
            for region, c in [region_and_contest(case["workload"])]
            if c.frozen == frozen
        ]
        if own:
            found = standings(own, {name: region.kind for name, region in BY_NAME.items()})
            best = {f"{s.region} {s.dtype}": s.least[0] for s in found}
            summary[title] = {**summarize(found, own), "regions_over_best": best}
    return summary


def main(
    device: Annotated[str, typer.Option(help="cuda, cpu or auto")] = "auto",
    dtype: Annotated[str, typer.Option(help="bfloat16, float16 or float32")] = "bfloat16",
    only: Annotated[str, typer.Option(help="comma-separated: regions whose names contain one of these")] = "",
    contests: Annotated[str, typer.Option(help="which, in order")] = ",".join(CONTESTS),
    seconds: Annotated[float, typer.Option(help="timing per contest, all contenders together")] = 1.0,
    minutes: Annotated[float, typer.Option(help="time budget; what does not fit is left for --resume")] = 9.0,
    compile_limit: Annotated[float, typer.Option(help="seconds that one compilation may take")] = 200.0,
    warm: Annotated[bool, typer.Option("--warm", help="use the user's caches instead of empty ones")] = False,
    tiny: Annotated[bool, typer.Option("--tiny", help="tiny sizes, to try the harness itself")] = False,
    out: Annotated[Path, typer.Option(help="results file; a plot is saved beside it")] = Path("benchmarks/out/regions.json"),
    resume: Annotated[bool, typer.Option("--resume", help="keep what is already in the results file")] = False,
    processes: Annotated[int, typer.Option(min=1, help="worker processes on each GPU, or on the CPU")] = 1,
    gpus: Annotated[int, typer.Option(min=0, help="how many of the visible GPUs to use; 0: all")] = 0,
) -> None:
    """Check and time every region in every contest; JSON after every case, a summary and a plot at the end."""
    found = choose(only, contests)
    where, console = pick_device(device), open_console()
    pick_dtype(dtype)  # a wrong name ends the run before anything is measured
    chosen = [workload_of(region, contest) for region, contest in found]
    todo = [(workload, workload.sizes(tiny), dtype) for workload in chosen]
    used = usable_devices(where, gpus)
    settings = {"tiny": tiny, "seconds": seconds, "minutes": minutes, "warm": warm, "processes": processes, "gpus": used}
    conditions = {"l2": "flushed before each call", "cuda_graphs": "none"}
    results = Results(out, where, settings | conditions, resume, compact=True)
    budget = Budget(time.monotonic() + 60 * minutes, compile_limit, slow=True)
    crew = Crew("benchmarks.regions", where, processes, used)
    left = crew.run(todo, contenders_of, results, budget, seconds, warm, lambda job: CASE_BYTES)
    results.data["summary"] = summary = summary_of(results.data["cases"])
    results.save()
    for title, entry in summary.items():
        for table in summary_tables(title, entry):
            console.print(table)
    console.print(f"{len(todo) - left} of {len(todo)} contests done; results: {out}")
    bars = {title: entry["regions_over_best"] for title, entry in summary.items()}
    if picture := plot_bars(
        results.data, bars, out.with_suffix(".png"), "times as fast as the best peer (higher is better)"
    ):
        console.print(f"plot: {picture}")


if __name__ == "__main__":
    typer.run(main)
