"""The command line: `fxopt run | bench | explain | cache`."""

from __future__ import annotations

import contextlib
import importlib
import importlib.metadata
import importlib.util
import json
import os
import platform
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

from fxopt import __version__, cli_cache, knobs
from fxopt.errors import FxoptError

if TYPE_CHECKING:
    import torch

    from fxopt.report.compare import Row

app = typer.Typer(add_completion=False, no_args_is_help=True, pretty_exceptions_enable=False, help=__doc__)
app.add_typer(cli_cache.app, name="cache")


def _version(wanted: bool) -> None:
    if wanted:
        print(f"fxopt {__version__}, torch {importlib.metadata.version('torch')}, Python {platform.python_version()}")
        raise typer.Exit


@app.callback()
def _any(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Print what is installed, and exit.")
    ] = False,
) -> None: ...


DeviceOption = Annotated[str, typer.Option(help='"cuda", "cpu", or "auto": CUDA where there is a GPU')]
DtypeOption = Annotated[str, typer.Option(help="float32, bfloat16 or float16")]


def pick_device(name: str) -> torch.device:
    import torch

    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise FxoptError(f"unknown device {name!r}; use cpu, cuda or auto") from error
    if device.type == "cuda" and not torch.cuda.is_available():
        raise FxoptError("there is no CUDA device here; use --device cpu")
    return device


def pick_dtype(name: str) -> torch.dtype:
    import torch

    dtypes = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
    if name not in dtypes:
        raise FxoptError(f"unknown dtype {name!r}; use {', '.join(dtypes)}")
    return dtypes[name]


@contextlib.contextmanager
def progress_bar(console: Console) -> Iterator[Any]:
    """Yields a function (what, share from 0 to 1) that moves a bar on `console`."""
    columns = (TextColumn("{task.description:<44}"), BarColumn(), TimeElapsedColumn())
    with Progress(*columns, console=console, transient=True) as bar:
        task = bar.add_task("", total=1.0)
        yield lambda what, share: bar.update(task, description=what, completed=share)


@app.command()
def run(
    device: DeviceOption = "auto",
    dtype: DtypeOption = "float32",
    seconds: Annotated[float, typer.Option(help="how long to time, all contenders together", min=0.1)] = 20.0,
    contenders: Annotated[str, typer.Option(help='comma-separated names, "plain" or "all"; else the usual five')] = "",
    out: Annotated[Path | None, typer.Option("--json", help="also write the rows to this file")] = None,
) -> None:
    """The main job: compile a trained sentence encoder, compare all contenders, and show what it understood."""
    from fxopt.report import minilm
    from fxopt.report.compare import Plan, compare
    from fxopt.report.contenders import pick
    from fxopt.report.tables import open_console

    console, where = open_console(), pick_device(device)
    chosen = pick(contenders) if contenders else minilm.contenders()
    case = minilm.case(where, pick_dtype(dtype))
    with progress_bar(Console(stderr=True)) as progress:
        rows = compare(case, chosen, Plan(where, seconds=seconds, keep_outputs=True), progress)
    _print_main_job(console, rows, where, dtype)
    _print_meaning(console, rows)
    if out is not None:
        out.write_text(json.dumps([r.to_dict() for r in rows], indent=1) + "\n")
    if failed := [r.contender for r in rows if r.contender.startswith("fxopt") and r.skipped]:
        raise FxoptError(f"{', '.join(failed)} did not run; the table says why")


def _print_main_job(console: Console, rows: list[Row], device: torch.device, dtype: str) -> None:
    import torch

    from fxopt.report.tables import comparison_table

    place = torch.cuda.get_device_name(device) if device.type == "cuda" else f"{torch.get_num_threads()} CPU threads"
    console.print(comparison_table(f"all-MiniLM-L6-v2, 16 sentences of 64 tokens, {dtype}, {place}", rows))
    console.print(
        "[dim]time: median, interleaved. error: largest, relative to the largest embedding value, against float64. compile: "
        "first call from empty caches (* with loading the compiler). kernels: launches per call.[/dim]"
    )
    for row in rows:
        for what, reason in row.retreats:
            console.print(f"[yellow]{row.contender}: {what} ran as ATen: {reason}[/yellow]", highlight=False)


def _print_meaning(console: Console, rows: list[Row]) -> None:
    """What the model says about the sentences, from the outputs that were just measured: proof that it is a real one."""
    from fxopt.report import minilm

    ran = [r for r in rows if r.outputs is not None]
    if not ran:
        return
    best = next((r for r in ran if r.contender.startswith("fxopt")), ran[-1])
    assert best.outputs is not None
    texts = minilm.sentences()
    console.print(f"\n[bold]Most similar sentences, by the embeddings of {best.contender}[/bold]")
    for cosine, i, j in minilm.similar_pairs(best.outputs[0], 4):
        console.print(f"{cosine:.2f}  {_cut(texts[i])}\n      {_cut(texts[j])}", highlight=False)


def _cut(text: str, width: int = 100) -> str:
    return text if len(text) <= width else text[:width].rsplit(" ", 1)[0] + " ..."


@app.command(context_settings={"allow_extra_args": True, "ignore_unknown_options": True}, add_help_option=False)
def bench(context: typer.Context) -> None:
    """The benchmark harness of the source checkout: kernels and whole models. `fxopt bench --help` lists its options."""
    checkout = Path(__file__).resolve().parent.parent
    if not (checkout / "benchmarks" / "run.py").exists():
        raise FxoptError("the benchmarks come with the source checkout, not with the package: run fxopt bench from one")
    sys.path.insert(0, str(checkout))
    try:
        importlib.import_module("benchmarks.run").app(context.args, prog_name="fxopt bench", standalone_mode=False)
    except typer.BadParameter as error:
        if not isinstance(error, ValueError):
            raise
        raise FxoptError(str(error)) from error  # a name that there is not


@app.command()
def explain(
    target: Annotated[str, typer.Argument(help='"minilm", or "module:function" returning (model, args)')] = "minilm",
    device: DeviceOption = "auto",
    freeze: Annotated[bool, typer.Option(help="treat weights as constants")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="print JSON, kernel sources included")] = False,
) -> None:
    """What fxopt makes of a model: kernels and what fused into them, library calls, retreats, time per phase."""
    import torch

    import fxopt

    model, args = _target(target, pick_device(device))
    with torch.no_grad():
        explanation = fxopt.explain(model, *args, fxopt_options={"freeze": True} if freeze else None)
    print(json.dumps(explanation.to_dict(), indent=1) if as_json else explanation)


def _target(target: str, device: torch.device) -> tuple[Any, tuple[Any, ...]]:
    if target == "minilm":
        from fxopt.report import minilm

        case = minilm.case(device)
        return case.module, case.inputs
    module, _, function = target.partition(":")
    sys.path.insert(0, os.getcwd())
    try:
        factory = getattr(importlib.import_module(module), function)
    except (ImportError, AttributeError, ValueError) as error:
        raise FxoptError(f'cannot load {target!r} ({error}); give "minilm" or "module:function"') from error
    try:
        model, args = factory()
    except Exception as error:
        problem = f"{type(error).__name__}: {error}".splitlines()[0]
        raise FxoptError(f"{target} is to take no argument and return (model, args), a tuple: {problem}") from error
    if not callable(model):
        raise FxoptError(
            f"{target} is to return (model, args), model being a module or function, not {type(model).__name__}"
        )
    if not isinstance(args, (tuple, list)):
        raise FxoptError(f"{target} is to return (model, args), with args a tuple such as (x,), not a {type(args).__name__}")
    return model, tuple(args)


def main() -> None:
    """Entry point of the console script: an expected error is one line on stderr and exit status 1."""
    # The profiler's own log lines would run through the progress bar.
    os.environ.setdefault("KINETO_LOG_LEVEL", "6")
    try:
        app()
    except (FxoptError, ValueError) as error:
        if not isinstance(error, FxoptError) and knobs.TRACEBACK.get():
            raise
        print(f"fxopt: {error}", file=sys.stderr)
        sys.exit(1)


if __name__ == "__main__":
    main()
