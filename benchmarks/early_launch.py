"""What launching kernels before the one before them has ended is worth, in models whose kernels are short.

    python -m benchmarks.early_launch --out FILE

Each workload is compiled twice with the same kernels: launched early, and one after the other; decoding steps once more,
early, with norms within the products' kernels where that is faster. "loop" is the mean time of calls that follow each other,
"replay" that of the largest CUDA graph's replays, both in microseconds, interleaved, medians over rounds. "timeline" has the
kernels of one call in order, as [name, microseconds since the first one's start, microseconds]; those launched early start
before the one before ends, so that their times include waiting for it. "equal" says whether the results of all calls of the
two ways with the same kernels are the same bits, as they must be.
"""

from __future__ import annotations

import functools
import gc
import json
import os
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from torch.autograd import DeviceType  # type: ignore[attr-defined]

from benchmarks.models import choose
from benchmarks.results import revision, target_facts, versions
from benchmarks.workload import Workload
from fxopt.cli import pick_device, pick_dtype
from fxopt.lower import row_norms
from fxopt.report.contenders import Contender
from fxopt.runtime.cuda_graph import GraphedExecutor
from fxopt.runtime.launch import NAME

WORKLOADS = "llama-1b-decode,bert-base-b1,gpt2-decode,vit-b-b1,resnet50-fp16-b1"
IN_TURN, EARLY, WITHIN = "in turn", "early", "early, norms within"
WAYS = {
    IN_TURN: Contender("fxopt", "fxopt", options={"disable": (NAME, row_norms.NAME)}),
    EARLY: Contender("fxopt", "fxopt", options={"disable": (row_norms.NAME,)}),
    WITHIN: Contender("fxopt", "fxopt"),
}


def replays(before: set[int]) -> Callable[[], None]:
    """What replays the largest CUDA graph made by an executor that is not among `before` (their identities)."""
    found = [x for x in gc.get_objects() if type(x) is GraphedExecutor and id(x) not in before and x._latest is not None]
    if not found:
        return lambda: None
    largest = max(found, key=lambda x: len(x.plan.steps))
    recording, driver = largest._latest, largest._turns.driver
    assert recording is not None
    return lambda: recording.replay_alone(driver.stream())


def executors() -> set[int]:
    return {id(x) for x in gc.get_objects() if type(x) is GraphedExecutor}


def mean(call: Callable[[], Any], count: int, wait: Callable[[], None]) -> float:
    """Microseconds of one of `count` calls that follow each other."""
    wait()
    start = time.perf_counter()
    for _ in range(count):
        call()
    wait()
    return (time.perf_counter() - start) / count * 1e6


def timeline(call: Callable[[], Any], device: torch.device, wait: Callable[[], None]) -> list[tuple[str, float, float]]:
    """(name, start, duration) of each kernel of one call, in microseconds from the first one's start."""
    if device.type != "cuda":
        return []
    # What torch itself does where it captures CUDA graphs: CUPTI crashes when it is taken down and set up again beside them.
    os.environ |= {"DISABLE_CUPTI_LAZY_REINIT": "1", "TEARDOWN_CUPTI": "0"}
    wait()
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        call()
        wait()
    found = [e for e in profile.events() if e.device_type == DeviceType.CUDA]
    spans = sorted((e.time_range.start, e.time_range.end, e.name) for e in found)
    first = spans[0][0] if spans else 0
    return [(name[:60], round(start - first, 2), round(end - start, 2)) for start, end, name in spans]


def measure(
    known: Workload, device: torch.device, dtype: torch.dtype | None, tiny: bool, calls: int, rounds: int
) -> dict[str, Any]:
    """JSON data of one workload."""
    workload = known.name
    case = known.build(known.sizes(tiny), device, dtype or pick_dtype(known.dtype or "bfloat16"))
    wait = torch.cuda.synchronize if device.type == "cuda" else (lambda: None)
    torch.compiler.reset()
    runs: dict[str, Callable[[], Any]] = {}
    graphs: dict[str, Callable[[], None]] = {}
    results: dict[str, list[torch.Tensor]] = {}
    entry: dict[str, Any] = {"workload": workload, "ways": {}, "equal": True}
    with torch.no_grad():
        for name, way in WAYS.items():
            if name == WITHIN and "decode" not in workload:
                continue
            before, start = executors(), time.perf_counter()
            runs[name] = functools.partial(way.compile(case.module, device), *case.inputs)
            results[name] = [runs[name]() for _ in range(4)]
            entry["ways"][name] = {"first_calls_s": round(time.perf_counter() - start, 2)}
            graphs[name] = replays(before)
        times: dict[tuple[str, str], list[float]] = {}
        for _ in range(rounds):
            for name, run in runs.items():
                times.setdefault((name, "loop"), []).append(mean(run, calls, wait))
                times.setdefault((name, "replay"), []).append(mean(graphs[name], calls, wait))
                results[name].append(run())
        for name, run in runs.items():
            own = entry["ways"][name]
            own |= {kind: round(statistics.median(times[name, kind]), 2) for kind in ("loop", "replay")}
            own["timeline"] = timeline(run, device, wait)
            own["kernels"] = len(own["timeline"])
            own["span"] = max((start + length for _, start, length in own["timeline"]), default=0.0)
            results[name].append(run())
        first = results[IN_TURN][0]
        entry["equal"] = all(torch.equal(first, x) for name in (IN_TURN, EARLY) for x in results[name])
        for name, own in entry["ways"].items():  # how far norms within products move the results
            own["difference"] = float((results[name][-1] - first).abs().max() / first.abs().max())
    return entry


def main(
    out: Annotated[Path | None, typer.Option(help="JSON file to write")] = None,
    workloads: Annotated[str, typer.Option(help="comma-separated")] = WORKLOADS,
    device: str = "cuda",
    dtype: Annotated[str, typer.Option(help="default: the workload's own")] = "",
    tiny: Annotated[bool, typer.Option(help="small sizes, to try the script")] = False,
    calls: int = 100,
    rounds: int = 7,
    seconds: Annotated[float, typer.Option(help="no workload is begun later than this")] = 75.0,
) -> None:
    """Measure what early launches are worth."""
    chosen = choose(workloads)
    place = pick_device(device)
    start = time.perf_counter()
    facts: dict[str, Any] = {"target": target_facts(place), "versions": versions(), "commit": revision(), "workloads": []}
    for workload in chosen:
        name = workload.name
        if time.perf_counter() - start > seconds:
            print(f"{name}: no time left")
            continue
        entry = measure(workload, place, pick_dtype(dtype) if dtype else None, tiny, calls, rounds)
        facts["workloads"].append(entry)
        for way, own in entry["ways"].items():
            print(
                f"{name:>18} {way:<20} loop {own['loop']:8.1f} us, replay {own['replay']:8.1f}, one call {own['span']:8.1f},"
                f" {own['kernels']} kernels, difference {own['difference']:.1e}, equal {entry['equal']}",
                flush=True,
            )
        if out is not None:
            out.parent.mkdir(parents=True, exist_ok=True)
            out.write_text(json.dumps(facts) + "\n")


if __name__ == "__main__":
    typer.run(main)
