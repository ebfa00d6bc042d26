"""RMS norms before products, stored or as factors of their rows: `python -m benchmarks.norm_scales --out FOLDER`.

For each model two layers with frozen weights: what the tuner measured in its contests, then the time of the layers with
norms stored, with every norm as factors that may be, with their squares added up by the product before where there is one,
and as the tuner has it, interleaved with eager; all are compared with float64. Without a GPU there are no contests.
"""

from __future__ import annotations

import contextlib
import copy
import json
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any
from unittest import mock

import torch
import torch.nn.functional as F
import typer
from torch import Tensor, nn

from benchmarks.choosing import containing_any
from benchmarks.fused_products import BEST, TUNING_SECONDS, kept
from benchmarks.kernels_micro import excess
from benchmarks.region_layers import Chain, Gated, Heads, RmsNorm, RotaryHeads
from benchmarks.results import revision, target_facts, versions
from fxopt.cli import pick_device
from fxopt.lower import norm_scales
from fxopt.lower.norm_scales import SCALED, SCALED_FUSED, STORED, SUMMED, SUMMED_FUSED
from fxopt.report.measure import interleaved

WAYS = {STORED: (STORED,), SCALED: (SCALED, SCALED_FUSED), SUMMED: (SUMMED, SUMMED_FUSED), BEST: ()}


@dataclass(frozen=True)
class Model:
    """`heads` of `head` features each (of keys and values `kv_heads`), an MLP of `hidden` features, gated or with a relu."""

    name: str
    batch: int
    tokens: int
    width: int
    hidden: int
    heads: int
    kv_heads: int
    head: int
    gated: bool = True

    @property
    def tiny(self) -> Model:
        return Model(self.name, 1, 8, 32, 64, 2, 1 if self.kv_heads < self.heads else 2, 16, self.gated)


MODELS = (
    Model("llama-1b", 1, 2048, 2048, 8192, 32, 8, 64),
    Model("t5-base", 8, 512, 768, 3072, 12, 12, 64, gated=False),
    Model("llama-8b", 1, 2048, 4096, 14336, 32, 8, 128),
)


class Decoder(nn.Module):
    """A layer of `model`, norms before attention and MLP."""

    def __init__(self, model: Model) -> None:
        super().__init__()
        heads = RotaryHeads if model.gated else Heads
        sizes = (model.width, model.head, model.heads, model.kv_heads)
        self.heads = heads(*sizes, biases="", norm=RmsNorm(model.width))
        self.out = nn.Linear(model.heads * model.head, model.width, bias=False)
        self.mlp: nn.Module = Gated(model.width, model.hidden, F.silu, RmsNorm(model.width))
        if not model.gated:
            self.mlp = Chain(RmsNorm(model.width), nn.Linear(model.width, model.hidden, bias=False), F.relu)
        self.down = nn.Linear(model.hidden, model.width, bias=False)
        self.rotates, self.grouped = model.gated, model.kv_heads < model.heads

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        q, k, v = self.heads(x, cos, sin) if self.rotates else self.heads(x)
        seen = F.scaled_dot_product_attention(q, k, v, is_causal=self.rotates, enable_gqa=self.grouped)
        x = x + self.out(seen.transpose(1, 2).flatten(2))
        return x + self.down(self.mlp(x))


class Stack(nn.Module):
    def __init__(self, model: Model) -> None:
        super().__init__()
        self.layers = nn.ModuleList([Decoder(model) for _ in range(2)])

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        for layer in self.layers:
            x = layer(x, cos, sin)
        return x


def first_calls(model: Model, device: torch.device, dtype: torch.dtype) -> dict[str, float]:
    """Seconds of a first call with an empty cache, without and with contests of norms, after one of another model."""
    seconds = {}
    for name, sizes, disabled in (("", model.tiny, ()), ("without", model, (norm_scales.NAME,)), ("with", model, ())):
        torch.compiler.reset()
        stack = Stack(sizes).to(device, dtype).eval().requires_grad_(False)
        angles = torch.zeros(1, sizes.tokens, sizes.head, device=device, dtype=dtype)
        x = torch.randn(sizes.batch, sizes.tokens, sizes.width, device=device, dtype=dtype)
        with kept(BEST):
            run = torch.compile(stack, backend="fxopt", options={"freeze": True, "disable": disabled})
            start = time.perf_counter()
            run(x, angles.cos(), angles)
        seconds[name] = time.perf_counter() - start
    return {name: s for name, s in seconds.items() if name}


def measured(model: Model, device: torch.device, dtype: torch.dtype, seconds: float) -> dict[str, Any]:
    """Contests, errors and times of each of WAYS, as JSON data."""
    torch.compiler.reset()
    torch.manual_seed(0)
    stack = Stack(model).to(device, dtype).eval().requires_grad_(False)
    for name, parameter in stack.named_parameters():
        if "norm" in name or name.endswith("mlp.0.weight"):
            parameter.uniform_(0.5, 1.5)
    shape = (model.batch, model.tokens, model.width)
    angles = torch.rand(1, model.tokens, model.head, device=device) * 6.28
    args = [torch.randn(shape, device=device, dtype=dtype), angles.cos().to(dtype), angles.sin().to(dtype)]
    eager = stack(*args)
    exact = copy.deepcopy(stack).double()(*(a.double() for a in args))
    calls: dict[str, Callable[[], Tensor]] = {"eager": lambda: stack(*args)}
    entry: dict[str, Any] = {"model": model.name, "contests": {}, "excess_error": {}, "compile_seconds": {}}
    with tempfile.TemporaryDirectory() as cache:
        for number, (way, labels) in enumerate(WAYS.items()):
            start = time.perf_counter()
            with kept(*labels, cache=cache) as contests:
                # Dynamo takes what it has compiled with equal options.
                options = {"freeze": True, "tuning_seconds": TUNING_SECONDS + number}
                run = torch.compile(stack, backend="fxopt", options=options)
                got = run(*args)
            entry["compile_seconds"][way] = time.perf_counter() - start
            entry["contests"] |= {n: f for n, f in contests.items() if any(label.startswith(STORED) for label in f)}
            entry["excess_error"][way] = excess([got], [eager], [exact])
            calls[way] = lambda run=run: run(*args)  # type: ignore[misc]
        timings = interleaved(calls, device, seconds=seconds, ahead=device.type == "cuda")
    entry["us"] = {name: timing.median * 1e6 for name, timing in timings.items()}
    entry["quartiles_us"] = {name: [q * 1e6 for q in timing.quartiles] for name, timing in timings.items()}
    return entry


def report(entry: dict[str, Any]) -> str:
    lines = [entry["model"]]
    for name, figures in entry["contests"].items():
        ordered = sorted(figures.items(), key=lambda each: each[1])
        lines.append(f"  {name}: " + ", ".join(f"{label} {us:.1f}" for label, us in ordered))
    for way, us in entry["us"].items():
        error, compiled = entry["excess_error"].get(way, 0.0), entry["compile_seconds"].get(way, 0.0)
        lines.append(f"  {way:<12} {us:9.1f} us   error over allowed {error:.2f}   compiled in {compiled:.1f} s")
    return "\n".join(lines)


def main(
    out: Annotated[Path, typer.Option(help="folder for norm_scales.json")],
    device: Annotated[str, typer.Option(help="cuda, cpu or auto")] = "auto",
    only: Annotated[str, typer.Option(help="comma-separated: models whose names contain one of these")] = "",
    dtype: str = "bfloat16",
    seconds: Annotated[float, typer.Option(help="of timing for each model")] = 1.0,
    first: Annotated[bool, typer.Option("--first-calls", help="only seconds of first calls")] = False,
    every: Annotated[bool, typer.Option("--every", help="contests of norms before many columns, too")] = False,
    limit: Annotated[float, typer.Option(help="begin no further model after so many seconds")] = 300.0,
    tiny: Annotated[bool, typer.Option("--tiny", help="tiny sizes, to try the harness itself")] = False,
) -> None:
    """Compare norms that are stored with norms as factors."""
    where, began = pick_device(device), time.perf_counter()
    entries: list[dict[str, Any]] = []
    facts = {**target_facts(where), **versions(), "revision": revision()}
    most = dict.fromkeys(("MOST_COLUMNS", "MOST_COLUMNS_OF_TWO"), 1 << 30) if every else {}
    chosen = containing_any(MODELS, only, lambda m: m.name)
    out.mkdir(parents=True, exist_ok=True)
    for model in chosen if first else ():
        found = first_calls(model.tiny if tiny else model, where, getattr(torch, dtype))
        typer.echo(f"{model.name}: first call {found['without']:.2f} s, with contests of norms {found['with']:.2f} s")
    for model in chosen if not first else ():
        if time.perf_counter() - began < limit:
            with mock.patch.multiple(norm_scales, **most) if most else contextlib.nullcontext():
                entries.append(measured(model.tiny if tiny else model, where, getattr(torch, dtype), seconds))
            typer.echo(report(entries[-1]))
            text = json.dumps({"device": facts, "dtype": dtype, "models": entries}, indent=1)
            (out / "norm_scales.json").write_text(text + "\n")
    if any(error > 1 for entry in entries for error in entry["excess_error"].values()):
        raise typer.Exit(1)


if __name__ == "__main__":
    typer.run(main)
