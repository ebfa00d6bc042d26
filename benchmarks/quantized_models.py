"""Whole models in each precision, beside themselves: `python -m benchmarks.quantized_models --out FOLDER`.

Each workload (a model of `fxopt bench`) runs in eager, compiled and frozen in its own dtype, and in each precision, with
scales from a calibration over its own inputs where the precision takes some. Times are interleaved in one process. Beside
them stands the relative error of the outputs to the own ones in eager, and which layers stay high. Weights are random:
what precisions cost in accuracy, `benchmarks.accuracy` tells.
"""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Annotated, Any

import torch
import typer

from benchmarks.choosing import names_of
from benchmarks.models import choose
from benchmarks.results import revision, target_facts, versions
from fxopt.cli import pick_device, pick_dtype
from fxopt.journal import RECENT
from fxopt.precision import HIGH, PRECISIONS
from fxopt.quant.calibrate import calibrate
from fxopt.quant.search import quantize
from fxopt.quant.table import Calibration
from fxopt.report.backends import resolve_backend, unshared
from fxopt.report.cases import Case, Tensors
from fxopt.report.measure import interleaved

ON_GPU = "resnet50-fp16,bert-base,vit-b,llama-1b,llama-1b-decode"
ON_CPU = "minilm"

EAGER, OWN, SEARCHED = "eager", "own", "searched"
SEARCH_SECONDS = 0.1
"""For each shape of layer."""


def contenders(calibration: Calibration, wanted: list[str]) -> dict[str, dict[str, Any]]:
    """torch.compile's options, by precision; `OWN` is the model's own, compiled and frozen."""
    return {OWN: {"freeze": True}} | {p: {"precision": p, "calibration": calibration} for p in wanted}


def measured(
    case: Case, device: torch.device, wanted: list[str], seconds: float, budget: float | None = None
) -> dict[str, Any]:
    """By contender: seconds, error, quantized layers, seconds to compile; with `budget` also what fxopt.quantize finds."""
    torch.compiler.reset()
    backend = resolve_backend("fxopt")
    calibration = calibrate(case.module, [case.inputs], progress=False, backend=backend)  # type: ignore[arg-type]
    exact = case.drive(case.module)
    found: dict[str, dict[str, Any]] = {EAGER: {"error": 0.0, "high": []}}
    runs = {EAGER: lambda: case.drive(case.module)}
    for name, options in contenders(calibration, wanted).items():
        compiled = torch.compile(unshared(case.module), backend=backend, options=options)
        start = time.perf_counter()
        result = case.drive(compiled)
        found[name] = {"first call seconds": time.perf_counter() - start, "error": relative_norm(result, exact)}
        notes = [text for topic, text in RECENT[-1].notes if topic == "precision"]
        found[name] |= {"layers": len(calibration.names()), "high": [text for text in notes if "stays high" in text]}
        for _ in range(3):  # CUDA graphs are recorded
            case.drive(compiled)
        runs[name] = lambda compiled=compiled: case.drive(compiled)
    if budget is not None:
        start = time.perf_counter()
        searched = quantize(case.module, [case.inputs], budget, seconds=SEARCH_SECONDS, progress=False, backend=backend)
        found[SEARCHED] = {"search seconds": time.perf_counter() - start, "budget": budget, "refused": searched.refused}
        result = case.drive(searched.model)
        high = [name for name, precision in searched.decisions.rules if precision == HIGH]
        found[SEARCHED] |= {"error": relative_norm(result, exact), "layers": len(calibration.names()), "high": high}
        runs[SEARCHED] = lambda: case.drive(searched.model)
    timings = interleaved(runs, device, seconds=seconds)
    for name, timing in timings.items():
        found[name] |= {"seconds": timing.median, "quartiles": timing.quartiles}
    for name, timing in timings.items():
        ratio, high = timings[OWN].median / timing.median, len(found[name]["high"])
        typer.echo(
            f"  {name:<14} {timing.median * 1e3:9.3f} ms  {ratio:5.2f}x  error {found[name]['error']:.4f}  {high} stay high"
            f"  first call {found[name].get('first call seconds', 0.0):.1f} s"
        )
    return found


def relative_norm(actual: Tensors, exact: Tensors) -> float:
    """|actual - exact| / |exact| over all floating outputs together."""
    pairs = [(a.double(), e.double()) for a, e in zip(actual, exact, strict=True) if e.is_floating_point()]
    difference = sum(float((a - e).square().sum()) for a, e in pairs)
    return float((difference / max(sum(float(e.square().sum()) for _, e in pairs), 1e-300)) ** 0.5)


def main(
    out: Annotated[Path, typer.Option(help="folder for quantized_models_<device>.json")],
    device: str = "auto",
    dtype: Annotated[
        str, typer.Option(help="the workload's on a GPU (most: bfloat16) and float32 on a CPU by default")
    ] = "",
    workloads: Annotated[str, typer.Option(help="names, by commas")] = "",
    precisions: Annotated[str, typer.Option(help="names, by commas")] = ",".join(
        name for name, given in PRECISIONS.items() if name != HIGH and not given.has_groups
    ),
    seconds: Annotated[float, typer.Option(help="of timing, each workload")] = 3.0,
    budget: Annotated[float, typer.Option(help="also what fxopt.quantize finds within this relative error; 0: not")] = 0.0,
    minutes: Annotated[float, typer.Option(help="no workload is begun after these")] = 9.0,
    tiny: bool = False,
) -> None:
    """Time models in each precision."""
    wanted = names_of(precisions, PRECISIONS, "precision")
    where = pick_device(device)
    chosen = choose(workloads or (ON_GPU if where.type == "cuda" else ON_CPU))
    end = time.monotonic() + 60 * minutes
    document: dict[str, Any] = {"target": target_facts(where), "versions": versions(), "commit": revision(), "cases": []}
    out.mkdir(parents=True, exist_ok=True)
    for workload in chosen:
        name = workload.name
        if time.monotonic() > end:
            typer.echo(f"{name}: no time left")
            continue
        typer.echo(name)
        usual = (workload.dtype or "bfloat16") if where.type == "cuda" else "float32"
        precise = pick_dtype(dtype or usual)
        case = workload.build(workload.sizes(tiny), where, precise)
        entry = measured(case, where, wanted, seconds, budget or None)
        document["cases"].append({"workload": name, "dtype": str(precise), "contenders": entry})
        (out / f"quantized_models_{where.type}.json").write_text(json.dumps(document, indent=1) + "\n")


if __name__ == "__main__":
    typer.run(main)
