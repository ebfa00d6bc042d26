"""Products with their epilogues in compiled layers, on a GPU: `python -m benchmarks.fused_products --out FOLDER`.

For each layer: the contests that the tuner held, with the time of every way and configuration in microseconds; then the
layer compiled again with each way kept wherever there is one, its values compared with float64 and its time taken,
interleaved with eager. Every compilation has a cache of its own, so that each way is what runs.
"""

from __future__ import annotations

import contextlib
import copy
import functools
import json
import os
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any
from unittest import mock

import torch
import torch.nn.functional as F
import typer
from torch import Tensor, nn

from benchmarks.choosing import containing
from benchmarks.kernels_micro import excess
from benchmarks.results import target_facts, versions
from fxopt.lower.contractions import FUSED, LIBRARY, ROW, TWO
from fxopt.report.measure import interleaved
from fxopt.tune import alternatives

TUNING_SECONDS = 20.0
BEST = "best"
"""The way that the tuner chooses."""


class Mlp(nn.Module):
    def __init__(self, width: int, hidden: int, activation: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.up, self.down, self.activation = nn.Linear(width, hidden), nn.Linear(hidden, width), activation

    def forward(self, x: Tensor) -> Tensor:
        return x + self.down(self.activation(self.up(x)))


class Gated(nn.Module):
    def __init__(self, width: int, hidden: int, activation: Callable[[Tensor], Tensor], merged: bool = False) -> None:
        super().__init__()
        self.weights = nn.ModuleList([nn.Linear(width, 2 * hidden)] if merged else [nn.Linear(width, hidden) for _ in "gu"])
        self.down, self.activation = nn.Linear(hidden, width), activation

    def forward(self, x: Tensor) -> Tensor:
        results = [layer(x) for layer in self.weights]
        gate, up = results if len(results) == 2 else results[0].chunk(2, dim=-1)
        return x + self.down(self.activation(gate) * up)


@dataclass(frozen=True)
class Layer:
    name: str
    module: Callable[[], nn.Module]
    shape: tuple[int, ...]
    train: bool = False

    @property
    def title(self) -> str:
        return f"{self.name}{' train' if self.train else ''}"


def layers() -> Iterator[Layer]:
    for train in (False, True):
        yield Layer("bert mlp", lambda: Mlp(768, 3072, F.gelu), (32, 128, 768), train)
        yield Layer("vit mlp", lambda: Mlp(768, 3072, F.gelu), (64, 197, 768), train)
        yield Layer("swiglu 2048", lambda: Gated(2048, 5632, F.silu), (1, 2048, 2048), train)
        yield Layer("merged geglu 2048", lambda: Gated(2048, 5632, F.gelu, merged=True), (1, 2048, 2048), train)
    for rows in (1, 8, 64):
        yield Layer(f"swiglu decode {rows}", lambda: Gated(4096, 14336, F.silu), (rows, 1, 4096))
        yield Layer(f"merged swiglu decode {rows}", lambda: Gated(4096, 14336, F.silu, merged=True), (rows, 1, 4096))
    yield Layer("swiglu 4096", lambda: Gated(4096, 14336, F.silu), (1, 2048, 4096))


Figures = dict[str, float]


@contextlib.contextmanager
def kept(*ways: str, cache: str = "") -> Iterator[dict[str, Figures]]:
    """Compilations in the block keep the fastest of `ways` where there is one, and have `cache` or an empty one. Yields the
    contests, in order: microseconds by label.
    """
    contests: dict[str, Figures] = {}
    real = alternatives.decide

    def decide(key: Any, name: str, *rest: Any) -> Any:
        found = real(key, name, *rest)
        if found is None:
            return None
        winner, figures = found
        contests[f"{len(contests)} {name}"] = {label: seconds * 1e6 for label, seconds in figures.items()}
        own = {label: s for label, s in figures.items() if label.split()[0] in ways}
        return (min(own, key=lambda label: own[label]) if own else winner), figures

    with (
        tempfile.TemporaryDirectory() as folder,
        mock.patch.dict(os.environ, FXOPT_CACHE_DIR=cache or folder),
        mock.patch.object(alternatives, "decide", decide),
    ):
        yield contests


def results(step: Callable[[Tensor], Tensor], module: nn.Module, x: Tensor, weight: Tensor) -> list[Tensor]:
    """The output and, where x wants one, the gradients of (output * weight).sum()."""
    if not x.requires_grad:
        with torch.no_grad():
            return [step(x)]
    y = step(x)
    return [y.detach(), *torch.autograd.grad(y, [x, *module.parameters()], weight)]


def measure(layer: Layer, device: torch.device) -> dict[str, Any]:
    """Contests, errors and times of `layer` with each way, as JSON data."""
    torch.manual_seed(0)
    module = layer.module().to(device, torch.bfloat16)
    x = torch.randn(layer.shape, device=device, dtype=torch.bfloat16, requires_grad=layer.train)
    weight = torch.randn_like(x)
    eager = results(module, module, x, weight)
    double = copy.deepcopy(module).double()
    exact = results(double, double, x.detach().double().requires_grad_(layer.train), weight.double())
    del double
    entry: dict[str, Any] = {"layer": layer.title, "excess_error": {}, "compile_seconds": {}}
    for way in (BEST, LIBRARY, FUSED, TWO, ROW):
        torch._dynamo.reset()
        start = time.perf_counter()
        with kept(way) as contests:
            compiled = torch.compile(module, backend="fxopt", options={"tuning_seconds": TUNING_SECONDS})
            got = results(compiled, module, x, weight)
        if way == BEST:
            entry["contests"] = dict(contests)
        elif not any(label.split()[0] == way for figures in contests.values() for label in figures):
            continue
        entry["compile_seconds"][way] = time.perf_counter() - start
        entry["excess_error"][way] = excess(got, eager, exact)
        # Dynamo drops compiled code on a reset, so each way is timed beside eager while it is there.
        pair = {"eager": module, way: compiled}
        calls = {name: functools.partial(results, step, module, x, weight) for name, step in pair.items()}
        times = interleaved(calls, device, seconds=1.0)
        entry.setdefault("ms", {})[way] = {name: times[name].median * 1e3 for name in pair}
    return entry


def report(entry: dict[str, Any]) -> Sequence[str]:
    lines = [entry["layer"]]
    for name, figures in entry["contests"].items():
        ordered = sorted(figures.items(), key=lambda each: each[1])
        lines.append(f"  {name}: " + ", ".join(f"{label} {us:.1f}" for label, us in ordered))
    for way, error in entry["excess_error"].items():
        times = entry["ms"][way]
        wrong = "" if error <= 1 else f"  WRONG ({error:.1f} times what is allowed)"
        lines.append(f"  {way:<8} {times[way]:8.3f} ms, eager {times['eager']:8.3f}{wrong}")
    return lines


def main(
    out: Annotated[Path, typer.Option(help="folder for fused_products.json")],
    only: Annotated[str, typer.Option(help="layers whose title contains this")] = "",
    seconds: Annotated[float, typer.Option(help="begin no further layer after so long")] = 500.0,
) -> None:
    """Check and time every way of the products in a few layers on this machine's first GPU."""
    chosen = containing(layers(), only, lambda layer: layer.title)
    device = torch.device("cuda", 0)
    out.mkdir(parents=True, exist_ok=True)
    data: dict[str, Any] = {"target": target_facts(device), "versions": versions(), "layers": []}
    began = time.perf_counter()
    for layer in chosen:
        if time.perf_counter() - began < seconds:
            data["layers"].append(measure(layer, device))
            typer.echo("\n".join(report(data["layers"][-1])))
            (out / "fused_products.json").write_text(json.dumps(data, indent=1) + "\n")
            torch.cuda.empty_cache()
    if any(error > 1 for entry in data["layers"] for error in entry["excess_error"].values()):
        raise typer.Exit(1)


if __name__ == "__main__":
    typer.run(main)
