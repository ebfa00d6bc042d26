"""Attention that no library computes, written out, on a GPU: `python -m benchmarks.written_attention --out FOLDER`.

For each case: eager, Inductor, and fxopt with products and softmax apart ("library") and as one kernel ("kernel"),
interleaved; the contest that the tuner held, in microseconds; errors against float64 next to eager's.
"""

from __future__ import annotations

import json
import time
import types
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import torch
import torch.nn.functional as F
import typer
from torch import Tensor

from benchmarks.fused_products import kept
from benchmarks.kernels_micro import excess
from benchmarks.results import target_facts, versions
from fxopt.lower.attention_kernels import KERNEL, LIBRARY
from fxopt.report.measure import interleaved

TUNING_SECONDS = 20.0
CAP = 50.0
WINDOW = 1024


def capped(q: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> Tensor:
    """As in Gemma 2."""
    k, v = repeated(k, q), repeated(v, q)
    scores = torch.matmul(q, k.transpose(2, 3)) * q.shape[-1] ** -0.5
    scores = torch.tanh(scores / CAP) * CAP + mask
    weights = F.softmax(scores, dim=-1, dtype=torch.promote_types(q.dtype, torch.float32)).to(q.dtype)
    return torch.matmul(weights, v).transpose(1, 2).contiguous()


def precise_bias(q: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> Tensor:
    """A float32 bias of half products, as ALiBi often is, and a window, made of positions."""
    away = torch.arange(q.shape[2], device=q.device)[:, None] - torch.arange(k.shape[2], device=q.device)
    slopes = torch.exp2(
        -torch.arange(1, q.shape[1] + 1, device=q.device, dtype=torch.promote_types(q.dtype, torch.float32)) / 2
    )
    scores = torch.matmul(q, repeated(k, q).mT) * q.shape[-1] ** -0.5 - away * slopes[:, None, None]
    scores = scores.masked_fill((away < 0) | (away >= WINDOW), float("-inf"))
    return torch.matmul(torch.softmax(scores, -1).to(q.dtype), repeated(v, q)).transpose(1, 2).contiguous()


def repeated(x: Tensor, query: Tensor) -> Tensor:
    """transformers' `repeat_kv`."""
    batch, groups, length, width = x.shape
    count = query.shape[1] // groups
    return x if count == 1 else x[:, :, None].expand(batch, groups, count, length, width).reshape(batch, -1, length, width)


def copy_of(function: Callable[..., Tensor], name: str) -> Callable[..., Tensor]:
    """A function with code of its own, which Dynamo compiles whatever it has compiled before."""
    return types.FunctionType(function.__code__.replace(co_name=name), function.__globals__, name)


@dataclass(frozen=True)
class Case:
    name: str
    attend: Callable[..., Tensor]
    batch: int
    heads: int
    groups: int
    rows: int
    keys: int
    width: int

    def inputs(self, device: torch.device) -> tuple[Tensor, ...]:
        generator = torch.Generator(device).manual_seed(0)

        def made(length: int, heads: int) -> Tensor:
            shape = (self.batch, length, heads, self.width)
            return torch.empty(shape, device=device, dtype=torch.bfloat16).normal_(generator=generator).transpose(1, 2)

        positions = torch.arange(self.rows, device=device)[:, None] + (self.keys - self.rows)
        hidden = torch.arange(self.keys, device=device) > positions
        least = torch.finfo(torch.bfloat16).min
        mask = torch.zeros(self.rows, self.keys, device=device, dtype=torch.bfloat16).masked_fill(hidden, least)
        return made(self.rows, self.heads), made(self.keys, self.groups), made(self.keys, self.groups), mask[None, None]


CASES = (
    Case("gemma2 prefill", capped, 1, 8, 4, 2048, 2048, 256),
    Case("gemma2 decode", capped, 1, 8, 4, 1, 4096, 256),
    Case("gemma2 decode", capped, 8, 8, 4, 1, 4096, 256),
    Case("bias and window", precise_bias, 1, 32, 32, 2048, 2048, 128),
    Case("bias and window", precise_bias, 4, 16, 16, 1024, 1024, 64),
)


CONTENDERS = ("inductor", LIBRARY, KERNEL)


def measure(case: Case, device: torch.device, seconds: float, contenders: Sequence[str] = CONTENDERS) -> dict[str, Any]:
    """One entry of the results."""
    inputs = case.inputs(device)
    entry: dict[str, Any] = {"case": f"{case.name} b{case.batch}", "excess_error": {}, "compile_seconds": {}, "contests": {}}
    with torch.no_grad():
        eager, exact = case.attend(*inputs), case.attend(*(x.double() for x in inputs))
        steps: dict[str, Callable[[], Tensor]] = {"eager": lambda: case.attend(*inputs)}
        for name in contenders:
            backend = "inductor" if name == "inductor" else "fxopt"
            options = {} if name == "inductor" else {"options": {"tuning_seconds": TUNING_SECONDS, "cuda_graphs": False}}
            start = time.perf_counter()
            with kept(name) as contests:
                compiled = torch.compile(copy_of(case.attend, name), backend=backend, dynamic=False, **options)  # type: ignore[call-overload]
                got = compiled(*inputs)
            entry["compile_seconds"][name] = time.perf_counter() - start
            entry["excess_error"][name] = excess([got], [eager], [exact])
            entry["contests"] |= {each: figures for each, figures in contests.items() if name == KERNEL}
            steps[name] = lambda compiled=compiled: compiled(*inputs)  # type: ignore[misc]
        del eager, exact
        timings = interleaved(steps, device, seconds=seconds, ahead=True)
    entry["us"] = {name: timings[name].median * 1e6 for name in steps}
    return entry


def line(entry: dict[str, Any]) -> str:
    if "error" in entry:
        return f"{entry['case']:<24} {entry['error']}"
    wrong = [name for name, error in entry["excess_error"].items() if error > 1]
    figures = " ".join(f"{name} {us:8.1f}" for name, us in entry["us"].items())
    return f"{entry['case']:<24} {figures}{f' WRONG: {wrong}' if wrong else ''}"


def main(
    out: Annotated[Path, typer.Option(help="folder for written_attention.json")],
    seconds: Annotated[float, typer.Option(help="of timing a case")] = 1.5,
) -> None:
    """Time each case on this machine's first GPU."""
    device = torch.device("cuda", 0)
    out.mkdir(parents=True, exist_ok=True)
    entries: list[dict[str, Any]] = []
    for case in CASES:
        try:
            entries.append(measure(case, device, seconds))
        except RuntimeError as error:
            entries.append({"case": case.name, "error": str(error).partition("\n")[0]})
        typer.echo(line(entries[-1]))
        document = {"target": target_facts(device), "versions": versions(), "cases": entries}
        (out / "written_attention.json").write_text(json.dumps(document, indent=1) + "\n")


if __name__ == "__main__":
    typer.run(main)
