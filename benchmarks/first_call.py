"""One process's first call of one compiled model, as JSON on standard output: the child of `compile_time`.

The caches are those of the environment. What is not compilation is done before the clock starts: imports (timed apart),
building the model, and an eager step that loads torch's own libraries.
"""

from __future__ import annotations

import importlib
import json
import os
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

import torch
import typer

from benchmarks.choosing import named
from benchmarks.models import choose
from benchmarks.stacks import sampled
from fxopt.cli import pick_device, pick_dtype
from fxopt.journal import Journal
from fxopt.report.backends import resolve_backend
from fxopt.report.cases import Case, Tensors, relative_error
from fxopt.report.contenders import CONTENDERS
from fxopt.report.explanation import journals

COMPILERS = {"inductor": "torch._inductor.compile_fx", "fxopt": "fxopt.compiler"}
"""The module that a backend imports at its first graph."""


def phases_of(graphs: Sequence[Journal]) -> dict[str, float]:
    """Seconds per phase over all graphs; parts of a phase are called "phase: part". Early passes are a phase too."""
    phases: dict[str, float] = {}
    for journal in graphs:
        for phase, seconds in journal.seconds.items():
            phases[phase] = phases.get(phase, 0.0) + seconds
        if not journal.seconds and journal.passes:
            phases["early passes"] = phases.get("early passes", 0.0) + sum(s for _, _, s in journal.passes)
    return phases


def own_share(phases: dict[str, float]) -> float:
    """The sum of the phases, parts of phases left out."""
    return sum(seconds for phase, seconds in phases.items() if ":" not in phase)


def _timed_step(case: Case, module: Any, device: torch.device) -> tuple[float, Tensors]:
    start = time.perf_counter()
    outputs = case.drive(module)
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter() - start, outputs


def _torch_phases() -> dict[str, float]:
    """Dynamo's and AOTAutograd's own account of the time, nested phases included in their parents."""
    from torch._dynamo.utils import compilation_time_metrics

    return {name: sum(times) for name, times in compilation_time_metrics.items()}


def first_call(case: Case, contender: str, device: torch.device, stacks: Path | None = None) -> dict[str, Any]:
    """Compile `case` under `contender`: seconds of the first and the second step, phases, distance from eager's results.

    `stacks` is where samples of the first step are written (see stacks.py), which makes it a few per cent longer.
    """
    chosen = CONTENDERS[contender]
    assert chosen.backend is not None, "eager compiles nothing"
    _, eager = _timed_step(case, case.module, device)
    torch.compile(lambda x: x + 1, backend="eager")(torch.zeros(1))  # Dynamo, which all contenders share
    start = time.perf_counter()
    importlib.import_module(COMPILERS[chosen.backend])
    imports = time.perf_counter() - start
    backend, options = resolve_backend(chosen.backend), dict(chosen.options) or None
    compiled = torch.compile(case.module, backend=backend, mode=chosen.mode, options=options)
    with journals() as graphs, sampled(stacks):
        seconds, outputs = _timed_step(case, compiled, device)
    phases = phases_of(graphs)
    return {
        "seconds": seconds,
        "import_seconds": imports,
        "second_call": _timed_step(case, compiled, device)[0],
        "phases": phases,
        "own_seconds": own_share(phases) if chosen.backend == "fxopt" else None,
        "retreats": [r for j in graphs for r in j.retreats],
        "torch_phases": _torch_phases(),
        "cores": len(os.sched_getaffinity(0)),
        "from_eager": relative_error(outputs, tuple(t.double() for t in eager)),
    }


def main(
    workload: str,
    contender: str,
    sizes: Annotated[str, typer.Option(help="JSON; default: the workload's")] = "",
    device: str = "cpu",
    dtype: str = "float32",
    stacks: Annotated[Path | None, typer.Option(help="write where the time goes to this file")] = None,
) -> None:
    """Print the record of one first call."""
    (found,), (way,) = choose(workload), named(contender, CONTENDERS, "contender")
    where = pick_device(device)
    case = found.build(json.loads(sizes) if sizes else found.sizes(tiny=False), where, pick_dtype(dtype))
    print(json.dumps(first_call(case, way.name, where, stacks)))


if __name__ == "__main__":
    typer.run(main)
