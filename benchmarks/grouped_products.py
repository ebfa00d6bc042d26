"""The experts of a mixture, rows sorted by expert, on a GPU: `python -m benchmarks.grouped_products --out FOLDER`.

Each case is the feed-forward layer of one model: a grouped product over gate and up, their activation, a grouped product
down, times the rows' weights. It runs in eager, under Inductor, under fxopt, and under fxopt with contractions switched off,
where both products are the library's. Rows are spread over the experts at random, as a router does. Times are of the device
alone, interleaved in one process; values are compared with float64. All cases take about a minute.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import torch
import torch.nn.functional as F
import typer
from torch import Tensor

from benchmarks.choosing import containing
from benchmarks.kernels_micro import excess
from benchmarks.results import revision, target_facts, versions
from fxopt.lower.contractions import NAME
from fxopt.report.contenders import Contender, pick
from fxopt.report.measure import interleaved

CONTENDERS = (*pick("eager,inductor,fxopt"), Contender("fxopt-library", "fxopt", options={"disable": (NAME,)}))


@dataclass(frozen=True)
class Case:
    """`tokens` that go to `chosen` of `experts` each."""

    name: str
    tokens: int
    chosen: int
    experts: int
    width: int
    hidden: int


CASES = (
    *(Case(f"mixtral-8x7b {n}", n, 2, 8, 4096, 14336) for n in (1, 64, 2048)),
    *(Case(f"qwen3-30b-a3b {n}", n, 8, 128, 2048, 768) for n in (1, 64, 2048)),
)


def experts(x: Tensor, gate_up: Tensor, down: Tensor, weights: Tensor, ends: Tensor) -> Tensor:
    """x [S, K], gate_up [E, 2 I, K], down [E, K, I], weights [S], ends [E]."""
    gate, up = torch._grouped_mm(x, gate_up.transpose(-1, -2), offs=ends).chunk(2, -1)
    return torch._grouped_mm(F.silu(gate) * up, down.transpose(-1, -2), offs=ends) * weights[:, None]


def exact(x: Tensor, gate_up: Tensor, down: Tensor, weights: Tensor, ends: Tensor) -> Tensor:
    """The same in float64, expert by expert."""
    out, start = torch.zeros_like(x, dtype=torch.float64), 0
    for e, end in enumerate(ends.tolist()):
        gate, up = (x[start:end].double() @ gate_up[e].double().t()).chunk(2, -1)
        out[start:end] = (F.silu(gate) * up) @ down[e].double().t()
        start = end
    return out * weights.double()[:, None]


def operands(case: Case, device: torch.device, dtype: torch.dtype) -> tuple[Tensor, ...]:
    generator = torch.Generator(device).manual_seed(0)

    def normal(*shape: int, scale: float = 1.0) -> Tensor:
        return torch.empty(shape, device=device, dtype=dtype).normal_(std=scale, generator=generator)

    rows = case.tokens * case.chosen
    scores = torch.rand((case.tokens, case.experts), device=device, generator=generator)
    counts = torch.bincount(scores.topk(case.chosen).indices.flatten(), minlength=case.experts)
    return (
        normal(rows, case.width),
        normal(case.experts, 2 * case.hidden, case.width, scale=0.02),
        normal(case.experts, case.width, case.hidden, scale=0.02),
        torch.rand(rows, device=device, generator=generator).to(dtype),
        counts.cumsum(0).to(torch.int32),
    )


def measured(case: Case, device: torch.device, dtype: torch.dtype, seconds: float) -> dict[str, Any]:
    """Times of all contenders, and their errors over what is allowed."""
    torch.compiler.reset()
    args = operands(case, device, dtype)
    with torch.no_grad():
        runs = {c.name: _bound(c.compile(experts, device), args) for c in CONTENDERS}
        results, wanted = {name: run() for name, run in runs.items()}, exact(*args)
        timings = interleaved(runs, device, seconds=seconds, ahead=device.type == "cuda")
    found = {}
    typer.echo(f"{case.name} tokens")
    for name, timing in timings.items():
        error = excess([results[name]], [results["eager"]], [wanted])
        found[name] = {"seconds": timing.median, "quartiles": timing.quartiles, "error over allowed": error}
        typer.echo(f"  {name:<14} {timing.median * 1e6:9.1f} us   error over allowed {error:.2f}")
    return {"case": case.name, "dtype": str(dtype), "contenders": found}


def _bound(fn: Callable[..., Tensor], args: tuple[Tensor, ...]) -> Callable[[], Tensor]:
    return lambda: fn(*args)


def main(
    out: Annotated[Path, typer.Option(help="folder for grouped_products_<device>.json")],
    device: str = "cuda",
    only: Annotated[str, typer.Option(help="cases whose names contain this")] = "",
    seconds: Annotated[float, typer.Option(help="of timing, each case")] = 2.0,
) -> None:
    """Time the experts of mixtures."""
    where = torch.device(device)
    chosen = containing(CASES, only, lambda case: case.name)
    document: dict[str, Any] = {"target": target_facts(where), "versions": versions(), "commit": revision(), "cases": []}
    out.mkdir(parents=True, exist_ok=True)
    for case in chosen:
        document["cases"].append(measured(case, where, torch.bfloat16, seconds))
        (out / f"grouped_products_{where.type}.json").write_text(json.dumps(document, indent=1) + "\n")


if __name__ == "__main__":
    typer.run(main)
