"""Attention in 8 bits on a GPU: `python -m benchmarks.narrow_attention --out FOLDER`.

Caches: a decoding step over keys and values in int8 or float8, with one scale or one for each row, against the same over
bfloat16 ("half") and with the cache widened by a kernel apart ("apart"). Throughout: query, key and value behind a product
by elements, quantized as `options={"precision": {"*@attention": "fp8"}}` does it, casts included, against bfloat16. Each
with the contests that the tuner held, in microseconds, and the relative error against float64. Times are the device's
alone: the host is kept ahead of it, and inputs are not in the L2 cache.
"""

from __future__ import annotations

import json
import time
import types
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, Any

import torch
import torch.nn.functional as F
import typer
from torch import Tensor, nn

import fxopt
from benchmarks.choosing import containing
from benchmarks.fused_products import kept
from benchmarks.results import target_facts, versions
from fxopt.report.measure import interleaved

BF16, FP8 = torch.bfloat16, torch.float8_e4m3fn
TUNING_SECONDS = 10.0

Call = Callable[[], Tensor]


@dataclass(frozen=True)
class Case:
    """query [batch, heads, rows, width], keys and values [batch, groups, keys, width]. `stored`: the type of a cache, with
    `by_row` a scale for each of its rows; None for fp8 throughout."""

    name: str
    batch: int
    heads: int
    groups: int
    rows: int
    keys: int
    width: int
    stored: torch.dtype | None = None
    by_row: bool = False
    causal: bool = False

    @property
    def label(self) -> str:
        kind = "fp8 throughout" if self.stored is None else f"{self.stored}".removeprefix("torch.") + " cache"
        return f"{self.name} b{self.batch} {self.keys} keys, {kind}{' by row' * self.by_row}"


CASES = (
    *(Case("llama-8b decode", b, 32, 8, 1, 8192 // b, 128, dtype) for b in (1, 8) for dtype in (torch.int8, FP8)),
    Case("llama-8b decode", 1, 32, 8, 1, 2048, 128, torch.int8, by_row=True),
    Case("llama-8b decode", 8, 32, 8, 1, 8192, 128, torch.int8, by_row=True),
    Case("llama-8b decode", 8, 32, 8, 1, 8192, 128, FP8),
    Case("llama-8b prefill", 1, 32, 8, 2048, 2048, 128, causal=True),
    Case("encoder, long", 2, 16, 16, 4096, 4096, 128),
    Case("bert-base", 32, 12, 12, 128, 128, 64),
    Case("vit-b", 64, 12, 12, 197, 197, 64),
)


class Attention(nn.Module):
    def __init__(self, causal: bool, grouped: bool) -> None:
        super().__init__()
        self.causal, self.grouped = causal, grouped

    def forward(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        out = F.scaled_dot_product_attention(q * 2, k * 2, v * 2, is_causal=self.causal, enable_gqa=self.grouped)
        return out.transpose(1, 2).flatten(2)


def over_cache(q: Tensor, k: Tensor, v: Tensor, k_scale: Tensor, v_scale: Tensor) -> Tensor:
    """A cache as int8 or float8 caches are used: widened in front of attention."""
    k, v = k.to(q.dtype) * k_scale.to(q.dtype), v.to(q.dtype) * v_scale.to(q.dtype)
    return F.scaled_dot_product_attention(q, k, v, enable_gqa=True).transpose(1, 2).flatten(2)


def over_half(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return F.scaled_dot_product_attention(q, k, v, enable_gqa=True).transpose(1, 2).flatten(2)


def operands(case: Case, device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator(device).manual_seed(0)

    def made(length: int, heads: int) -> Tensor:
        shape = (case.batch, length, heads, case.width)
        return torch.empty(shape, device=device, dtype=BF16).normal_(generator=generator).transpose(1, 2)

    return made(case.rows, case.heads), made(case.keys, case.groups), made(case.keys, case.groups)


def stored(x: Tensor, dtype: torch.dtype, by_row: bool) -> tuple[Tensor, Tensor]:
    """`x` in 8 bits, heads outside rows as in a cache, and its scale."""
    largest = 127.0 if dtype == torch.int8 else 448.0
    wide = x.float()
    scale = (wide.abs().amax(-1, keepdim=True) if by_row else wide.abs().amax()) / largest
    values = wide / scale
    return (values.round() if dtype == torch.int8 else values).to(dtype).contiguous(), scale


def compiled(function: Callable[..., Tensor], name: str, options: dict[str, Any]) -> Callable[..., Tensor]:
    """Compiled apart from other versions of the same code."""
    if isinstance(function, types.FunctionType):
        function = types.FunctionType(function.__code__.replace(co_name=name), function.__globals__, name)
    given = {"tuning_seconds": TUNING_SECONDS, "cuda_graphs": False} | options
    return torch.compile(function, backend="fxopt", dynamic=False, options=given)


def contenders(
    case: Case, device: torch.device
) -> tuple[dict[str, tuple[Callable[..., Tensor], tuple[Tensor, ...]]], Tensor]:
    """By name, what is called with which arguments; and the result that all should have, in float64."""
    q, k, v = operands(case, device)
    if case.stored is None:
        model = Attention(case.causal, case.heads != case.groups).eval()
        table = fxopt.calibrate(model, [(q, k, v)], observe=("attention",), progress=False)
        options = {"precision": {"*@attention": "fp8"}, "calibration": table}
        calls = {"half": (compiled(model, "half", {}), (q, k, v)), "fxopt": (compiled(model, "fp8", options), (q, k, v))}
        return calls, _in_parts(model, q, k, v)
    keys, values = (stored(x, case.stored, case.by_row) for x in (k, v))
    args = (q, keys[0], values[0], keys[1], values[1])
    half = (q, *(x.contiguous() for x in (k, v)))
    apart = {"disable": ("stored_attention",)}
    exact = over_half(q.double(), *(x.double() * s.double() for x, s in (keys, values)))
    return {
        "half": (compiled(over_half, "half", {}), half),
        "apart": (compiled(over_cache, "apart", apart), args),
        "fxopt": (compiled(over_cache, "stored", {}), args),
    }, exact


def _in_parts(model: nn.Module, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """In float64, sample by sample: all scores at once would not fit."""
    return torch.cat([model(*(x[i : i + 1].double() for x in (q, k, v))) for i in range(min(len(q), 2))])


def measure(case: Case, device: torch.device, seconds: float) -> dict[str, Any]:
    entry: dict[str, Any] = {"case": case.label, "shape": {n: str(x) for n, x in asdict(case).items()}}
    entry |= {"error": {}, "contests": {}, "compile_seconds": {}}
    torch.compiler.reset()
    steps: dict[str, Call] = {}
    with torch.no_grad():
        calls, exact = contenders(case, device)
        for name, (call, args) in calls.items():
            start = time.perf_counter()
            with kept(name) as contests:
                got = call(*args)
            entry["compile_seconds"][name] = time.perf_counter() - start
            entry["contests"][name] = dict(contests)
            off = got[: len(exact)].double() - exact
            entry["error"][name] = float(off.norm() / exact.norm())
            steps[name] = lambda call=call, args=args: call(*args)  # type: ignore[misc]
        timings = interleaved(steps, device, seconds=seconds, ahead=True)
    entry["us"] = {name: timings[name].median * 1e6 for name in steps}
    return entry


def line(entry: dict[str, Any]) -> str:
    if "failed" in entry:
        return f"{entry['case']:<52} {entry['failed']}"
    return f"{entry['case']:<52} " + "  ".join(
        f"{name} {us:7.1f} us ({entry['error'][name]:.1e})" for name, us in entry["us"].items()
    )


def main(
    out: Annotated[Path, typer.Option(help="folder for narrow_attention.json")],
    seconds: Annotated[float, typer.Option(help="of timing a case")] = 0.6,
    only: Annotated[str, typer.Option(help="cases whose label has this")] = "",
    minutes: Annotated[float, typer.Option(help="after which no further case begins")] = 10.0,
) -> None:
    """Time each case on this machine's first GPU."""
    device, begin = torch.device("cuda", 0), time.monotonic()
    chosen = containing(CASES, only, lambda case: case.label)
    out.mkdir(parents=True, exist_ok=True)
    entries: list[dict[str, Any]] = []
    for case in chosen:
        if time.monotonic() - begin > 60 * minutes:
            break
        try:
            entries.append(measure(case, device, seconds))
        except RuntimeError as error:
            entries.append({"case": case.label, "failed": str(error).partition("\n")[0]})
        typer.echo(line(entries[-1]))
        document = {"target": target_facts(device), "versions": versions(), "cases": entries}
        (out / "narrow_attention.json").write_text(json.dumps(document, indent=1) + "\n")


if __name__ == "__main__":
    typer.run(main)
