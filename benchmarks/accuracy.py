"""What precision costs on trained models: `python -m benchmarks.accuracy prepare --data FOLDER`, then `run`.

Each model (real_models.py) runs on data that it was not calibrated with: in eager float32, which the others' outputs are
held against, in eager in the dtype asked for, with each precision's arithmetic emulated in eager, and compiled by fxopt in
each precision. Emulated rows have errors and no times. The file is written after each task.
"""

from __future__ import annotations

import contextlib
import functools
import json
import re
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from torch import Tensor, nn

import fxopt
from benchmarks.choosing import names_of
from benchmarks.outputs import cosines, outputs_of, relative_error
from benchmarks.precision_search import BudgetRun, Limits, missing, row_line, table
from benchmarks.real_models import TASKS, Batch, Run, Task, load, prepare
from benchmarks.results import folded, revision, rounded, target_facts, versions
from fxopt.errors import CalibrationError
from fxopt.precision import PRECISIONS as KNOWN
from fxopt.quant.batches import compiled_apart
from fxopt.quant.emulate import LayerCall, obstacle, quantized, treated, with_table
from fxopt.quant.ranges import METHODS
from fxopt.report.measure import interleaved

app = typer.Typer(add_completion=False, help=__doc__, pretty_exceptions_enable=False)

PRECISIONS = ("fp8", "int8", "int8-group", "int8-weight", "int4-weight")


def emulated(model: nn.Module, precision: str, layers: frozenset[str], calibration: fxopt.Calibration | None) -> Run:
    """Runs `model` with those of `layers` in `precision` that can be, activations scaled by row without a calibration."""

    def treat(call: LayerCall) -> Tensor | None:
        if call.name not in layers or obstacle(call, precision):
            return None
        if calibration is None:  # without which convolutions stay high
            return quantized(call, precision) if call.window is None else None
        return with_table(call, precision, calibration, call.name)

    def run(batch: Batch) -> Tensor:
        with treated(model, treat):
            return model(*batch)

    return run


def _fitted(task: Task, precision: str, layers: frozenset[str], calibration: fxopt.Calibration) -> Run:
    table = fxopt.activation_aware(calibration, task.model, task.calibration, precision)
    return emulated(task.model, precision, layers, table)


def compiled(model: nn.Module, options: dict[str, Any]) -> Run:
    # Without dynamic sizes each shape is a graph of its own, as its calls in the measured loop need it.
    fast = compiled_apart(model, "fxopt", options, dynamic=False)
    return lambda batch: fast(*batch)


def _ways(task: Task) -> Iterator[tuple[str, Callable[[], Run]]]:
    """Names of the rows and what makes their runs."""
    calibration = fxopt.calibrate(task.model, task.calibration, progress=False)
    model, layers = task.model, frozenset(layer.name for layer in calibration.layers if layer.obstacle is None)
    yield "eager", lambda: lambda batch: model(*batch)
    tables = {f", {method}": calibration.with_method(method) for method in METHODS}
    tables[", smoothed"] = smoothed = fxopt.smoothed(calibration, model)
    with contextlib.suppress(CalibrationError):  # raised where no two layers follow each other
        tables[", equalized"] = fxopt.equalized(calibration, model)
    for precision in PRECISIONS:
        scaled = {"": None} | (tables if KNOWN[precision].activations else {})
        for how, scales in scaled.items():
            yield f"emulated {precision}{how}", functools.partial(emulated, model, precision, layers, scales)
        yield f"emulated {precision}, activation-aware", functools.partial(_fitted, task, precision, layers, calibration)
    yield "fxopt", lambda: compiled(model, {"freeze": True})
    for precision in PRECISIONS:
        static = KNOWN[precision].activations is not None
        for how, scales in ({"": None} | ({", amax": calibration, ", smoothed": smoothed} if static else {})).items():
            options = {"precision": precision} | ({} if scales is None else {"calibration": scales})
            yield f"fxopt {precision}{how}", functools.partial(compiled, model, options)


def measured(
    task: Task, exact: list[Tensor], device: torch.device, seconds: float, ways: Mapping[str, Callable[[], Run]]
) -> Iterator[list[dict[str, Any]]]:
    """One row for each way: errors to `exact`, the judge's figures and, if it is one to be timed, its time.

    All rows so far after each one.
    """
    rows: list[dict[str, Any]] = []
    runs: dict[str, Callable[[], Any]] = {}
    for name, make in ways.items():
        run = make()
        outputs = outputs_of(run, task.evaluation)
        row = {
            "way": name,
            "error": relative_error(outputs, exact),
            "mean_cosine": float(cosines(outputs, exact).mean()),
            "least_cosine": float(cosines(outputs, exact).min()),
            **task.judge(outputs),
        }
        typer.echo("  ".join([f"  {name:<28}", *(f"{k} {v:.4f}" for k, v in row.items() if k != "way")]))
        rows.append(row)
        if not name.startswith("emulated"):
            runs[name] = lambda run=run: run(task.timed)
        yield rows
    with torch.no_grad():
        timings = interleaved(runs, device, seconds=seconds) if seconds and runs else {}
    for row in rows:
        if row["way"] in timings:
            row["seconds"] = timings[row["way"]].median
            typer.echo(f"  {row['way']:<28}  {row['seconds'] * 1e3:.3f} ms")
    yield rows


@app.command("prepare")
def prepare_command(
    data: Annotated[Path, typer.Option(help="folder for the tasks' files, 55 MB in all")],
    only: Annotated[str, typer.Option(help="tasks, by commas")] = ",".join(TASKS),
    half: Annotated[bool, typer.Option("--half", help="weights rounded to float16: files of half the size")] = False,
) -> None:
    """Write the tasks' files: needs the packages of the extra `accuracy`, and minutes of training."""
    for name in names_of(only, TASKS, "task"):
        typer.echo(prepare(name, data, half))


def _begun(device: str, dtype: str, out: Path, what: str) -> tuple[torch.device, torch.dtype, dict[str, Any]]:
    """(the device, the models' dtype, a document that gets its rows under `what`); makes the folder `out`."""
    where = torch.device(device)
    own = getattr(torch, dtype or ("float32" if where.type == "cpu" else "bfloat16"))
    out.mkdir(parents=True, exist_ok=True)
    return where, own, {"target": target_facts(where), "versions": versions(), "commit": revision(), what: []}


@app.command()
def run(
    data: Annotated[Path, typer.Option(help="folder that `prepare` has filled")],
    out: Annotated[Path, typer.Option(help="folder for accuracy_<device>.json")],
    device: str = "cpu",
    dtype: Annotated[str, typer.Option(help="of the models; float32 on a CPU and bfloat16 on a GPU if not given")] = "",
    only: Annotated[str, typer.Option(help="tasks, by commas; all if not given")] = "",
    seconds: Annotated[float, typer.Option(help="of timing, each task; 0 for none")] = 5.0,
    match: Annotated[str, typer.Option(help="a regular expression in the names of rows")] = "",
) -> None:
    """Errors, figures and times of each task in each precision."""
    chosen = names_of(only, TASKS, "task") if only else TASKS
    where, own, document = _begun(device, dtype, out, "tasks")
    for name in chosen:
        torch.compiler.reset()
        typer.echo(f"{name}, {own}")
        reference = load(name, data, where, torch.float32)
        exact = outputs_of(lambda batch, model=reference.model: model(*batch), reference.evaluation)
        task = load(name, data, where, own)
        found = {"task": name, "dtype": str(own), "float32": reference.judge(exact), "rows": []}
        document["tasks"].append(found)
        ways = {way: make for way, make in _ways(task) if re.search(match, way)}
        for rows in measured(task, exact, where, seconds, ways):
            found["rows"] = rows
            (out / f"accuracy_{where.type}.json").write_text(json.dumps(document, indent=1) + "\n")


@app.command()
def search(
    data: Annotated[Path, typer.Option(help="folder that `prepare` has filled")],
    out: Annotated[Path, typer.Option(help="folder for precision_search_<device>.json")],
    device: str = "cpu",
    dtype: Annotated[str, typer.Option(help="of the models; float32 on a CPU and bfloat16 on a GPU if not given")] = "",
    only: Annotated[str, typer.Option(help="tasks, by commas")] = ",".join(TASKS),
    budgets: Annotated[str, typer.Option(help="relative errors that quantizing may add")] = "0.01,0.02,0.05,0.1",
    precisions: Annotated[str, typer.Option(help="to choose from")] = "fp8,int8,int8-dynamic",
    rows: Annotated[int, typer.Option(help="of each batch to search with; 0 for all")] = 16,
    trials: Annotated[int, typer.Option(help="layers and precisions tried one by one; gradients rank the others")] = 32,
    layer_seconds: Annotated[float, typer.Option(help="of timing, each shape of layer")] = 0.5,
    seconds: Annotated[float, typer.Option(help="of timing whole models, each budget")] = 3.0,
    minutes: Annotated[float, typer.Option(help="time budget; what does not fit is left for --resume")] = 9.0,
    resume: Annotated[bool, typer.Option("--resume", help="keep the budgets already in the results file")] = False,
) -> None:
    """Budget against reached error, figures and speed of what `fxopt.quantize` returns, on data it has not seen.

    Layers are measured once for each task; the file is written after each budget.
    """
    start, chosen = time.monotonic(), names_of(only, TASKS, "task")
    allowed = names_of(precisions, KNOWN, "precision")
    where, own, document = _begun(device, dtype, out, "searches")
    path = out / f"precision_search_{where.type}.json"
    entries: list[dict[str, Any]] = document["searches"]
    if resume and path.exists():
        entries += json.loads(path.read_text())["searches"]
    limits, longest = Limits(rows, trials, layer_seconds, seconds), 0.0
    for name in chosen:
        todo = missing(entries, name, own, [float(x) for x in budgets.split(",")])
        if not todo or _left(start, minutes) < longest:
            continue
        torch.compiler.reset()
        typer.echo(f"{name}, {own}: layers are measured")
        tried = BudgetRun(load(name, data, where, own), load(name, data, where, torch.float32), allowed, limits)
        entry, longest = tried.entry(own), max(longest, tried.took)
        typer.echo(table(entry)[1] + f"; searched for {tried.took:.0f} s")
        entries.append(entry)
        slowest = 0.0
        for budget in todo:
            if _left(start, minutes) < slowest:
                typer.echo(f"  budget {budget:g} does not fit into {minutes:g} minutes")
                continue
            begun = time.monotonic()
            entry["budgets"].append(tried.within(budget))
            typer.echo(row_line(entry["budgets"][-1], len(entry["layers"])))
            path.write_text(folded(rounded(document)) + "\n")
            slowest = max(slowest, time.monotonic() - begun)
    typer.echo("\n".join(line for entry in entries for line in table(entry)))


def _left(start: float, minutes: float) -> float:
    return start + 60 * minutes - time.monotonic()


if __name__ == "__main__":
    app()
