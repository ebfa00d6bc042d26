"""What calibration costs beside an eager pass over the same data: `python -m benchmarks.calibration --out FOLDER`.

`fxopt.calibrate` asks its loader for one batch after another; this loader notes how long each took until it was asked
again, and in between runs the same batch in eager. The first batches compile, and are reported apart. Workloads are the
models of `fxopt bench` in their full sizes; on a CPU, MiniLM by default.
"""

from __future__ import annotations

import json
import statistics
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any

import torch
import typer

from benchmarks.models import choose
from benchmarks.results import revision, target_facts, versions
from benchmarks.workload import Workload
from fxopt.cli import pick_device, pick_dtype
from fxopt.quant.calibrate import calibrate
from fxopt.report.backends import resolve_backend
from fxopt.report.cases import Case

FIRST = 2
"""Batches that compile and warm up."""


class TimedLoader:
    """Yields one case's inputs `batches` times; notes the seconds of each calibrated and of each eager pass."""

    def __init__(self, case: Case, device: torch.device, batches: int) -> None:
        self.case, self.device, self.batches = case, device, batches
        self.calibrated: list[float] = []
        self.eager: list[float] = []

    def __iter__(self) -> Iterator[tuple[Any, ...]]:
        for _ in range(self.batches):
            start = self._now()
            self.case.drive(self.case.module)
            self.eager.append(self._now() - start)
            start = self._now()
            yield self.case.inputs
            self.calibrated.append(self._now() - start)

    def _now(self) -> float:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        return time.perf_counter()


def measured(workload: Workload, device: torch.device, dtype: torch.dtype, batches: int, tiny: bool) -> dict[str, Any]:
    """Seconds of a calibrated and of an eager pass (medians after the first batches), and what came of it."""
    name = workload.name
    case = workload.build(workload.sizes(tiny), device, dtype)
    loader = TimedLoader(case, device, FIRST + batches)
    start = time.perf_counter()
    calibration = calibrate(case.module, loader, progress=False, backend=resolve_backend("fxopt"))
    total = time.perf_counter() - start
    eager, calibrated = (statistics.median(times[FIRST:]) for times in (loader.eager, loader.calibrated))
    typer.echo(
        f"{name:<12} {len(calibration.layers):4d} layers  eager {eager * 1e3:8.2f} ms  calibrated {calibrated * 1e3:8.2f} ms"
        f"  ({calibrated / eager:.2f} times)  compiled in {loader.calibrated[0]:.1f} s"
    )
    return {
        "workload": name,
        "dtype": str(dtype),
        "layers": len(calibration.layers),
        "batches": batches,
        "eager seconds": eager,
        "calibrated seconds": calibrated,
        "first batch seconds": loader.calibrated[0],
        "seconds in all, eager passes too": total,
    }


def main(
    out: Annotated[Path, typer.Option(help="folder for calibration_<device>.json")],
    device: str = "auto",
    dtype: Annotated[str, typer.Option(help="bfloat16 on a GPU and float32 on a CPU by default")] = "",
    workloads: Annotated[str, typer.Option(help="names, by commas")] = "",
    batches: int = 20,
    tiny: bool = False,
) -> None:
    """Time calibration against eager passes."""
    where = pick_device(device)
    precise = pick_dtype(dtype or ("bfloat16" if where.type == "cuda" else "float32"))
    names = workloads or ("bert-base,vit-b,gpt2,llama-1b" if where.type == "cuda" else "minilm")
    chosen = choose(names)
    document: dict[str, Any] = {"target": target_facts(where), "versions": versions(), "commit": revision(), "cases": []}
    out.mkdir(parents=True, exist_ok=True)
    for workload in chosen:
        document["cases"].append(measured(workload, where, precise, batches, tiny))
        (out / f"calibration_{where.type}.json").write_text(json.dumps(document, indent=1) + "\n")


if __name__ == "__main__":
    typer.run(main)
