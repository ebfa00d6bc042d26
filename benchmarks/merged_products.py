"""Frozen transformer layers with and without merged products, on a GPU: `python -m benchmarks.merged_products --out FOLDER`.

Each layer runs in eager, under Inductor with freezing, under fxopt with freezing, and the same with the pass
merged_products switched off. Times are of the device alone, interleaved in one process; values are compared with float64.
The whole list takes about three minutes, `--only llama` one.
"""

from __future__ import annotations

import copy
import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import torch
import torch.nn.functional as F
import typer
from torch import Tensor, nn

from benchmarks.choosing import containing
from benchmarks.kernels_micro import excess
from benchmarks.results import revision, target_facts, versions
from fxopt.report.contenders import Contender, pick
from fxopt.report.measure import interleaved

APART = Contender(
    "fxopt-freeze-apart", "fxopt", options={"freeze": True, "disable": ("merged_products",)}, frozen=True
)  # fmt: skip
CONTENDERS = (*pick("eager,inductor-freezing,fxopt-freeze"), APART)


class Encoder(nn.Module):
    """A layer of BERT's or ViT's: biases, norms before (`first`) or after, GELU."""

    def __init__(self, width: int, heads: int, hidden: int, first: bool) -> None:
        super().__init__()
        self.heads, self.first = heads, first
        self.q, self.k, self.v, self.o = (nn.Linear(width, width) for _ in range(4))
        self.up, self.down = nn.Linear(width, hidden), nn.Linear(hidden, width)
        self.norms = nn.ModuleList(nn.LayerNorm(width) for _ in range(2))

    def forward(self, x: Tensor) -> Tensor:
        for norm, part in zip(self.norms, (self.attend, self.feed), strict=True):
            x = x + part(norm(x)) if self.first else norm(x + part(x))
        return x

    def attend(self, x: Tensor) -> Tensor:
        q, k, v = (layer(x).unflatten(-1, (self.heads, -1)).transpose(1, 2) for layer in (self.q, self.k, self.v))
        return self.o(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))

    def feed(self, x: Tensor) -> Tensor:
        return self.down(F.gelu(self.up(x)))


class Llama(nn.Module):
    """A layer of Llama's: no biases, grouped heads, rotary embeddings, a gated feed-forward layer."""

    def __init__(self, width: int, heads: int, groups: int, hidden: int) -> None:
        super().__init__()
        self.head = width // heads
        self.q, self.o = (nn.Linear(width, width, bias=False) for _ in range(2))
        self.k, self.v = (nn.Linear(width, groups * self.head, bias=False) for _ in range(2))
        self.gate, self.up = (nn.Linear(width, hidden, bias=False) for _ in range(2))
        self.down = nn.Linear(hidden, width, bias=False)
        self.norms = nn.ModuleList(nn.RMSNorm(width, eps=1e-5) for _ in range(2))

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attend(self.norms[0](x))
        h = self.norms[1](x)
        return x + self.down(F.silu(self.gate(h)) * self.up(h))

    def attend(self, x: Tensor) -> Tensor:
        q, k, v = (layer(x).unflatten(-1, (-1, self.head)).transpose(1, 2) for layer in (self.q, self.k, self.v))
        out = F.scaled_dot_product_attention(self.rotated(q), self.rotated(k), v, is_causal=True, enable_gqa=True)
        return self.o(out.transpose(1, 2).flatten(2))

    def rotated(self, t: Tensor) -> Tensor:
        place = torch.arange(t.shape[2], device=t.device, dtype=torch.float32)
        speed = torch.arange(0, self.head, 2, device=t.device, dtype=torch.float32) / -self.head
        angle = (place[:, None] * 500000.0**speed).repeat(1, 2)
        left, right = t.chunk(2, -1)
        return t * angle.cos().to(t.dtype) + torch.cat([-right, left], -1) * angle.sin().to(t.dtype)


@dataclass(frozen=True)
class Case:
    name: str
    make: Callable[[], nn.Module]
    shape: tuple[int, int, int]


def _bert() -> nn.Module:
    return Encoder(768, 12, 3072, first=False)


def _vit() -> nn.Module:
    return Encoder(768, 12, 3072, first=True)


def _llama() -> nn.Module:
    return Llama(4096, 32, 8, 14336)


CASES = (
    Case("bert-base 32 x 128", _bert, (32, 128, 768)),
    Case("bert-base 1 x 128", _bert, (1, 128, 768)),
    Case("vit-b 64 x 197", _vit, (64, 197, 768)),
    Case("llama-8b 1 x 2048", _llama, (1, 2048, 4096)),
    *(Case(f"llama-8b {n} x 1", _llama, (n, 1, 4096)) for n in (1, 8, 64)),
)


def measured(case: Case, device: torch.device, dtype: torch.dtype, seconds: float) -> dict[str, Any]:
    """Times of all contenders, and their errors over what is allowed."""
    torch.compiler.reset()
    torch.manual_seed(0)
    model = case.make().to(device, dtype).eval()
    x = torch.randn(case.shape, device=device, dtype=dtype)
    with torch.no_grad():
        runs = {c.name: _bound(c.compile(model, device), x) for c in CONTENDERS}
        results = {name: run() for name, run in runs.items()}
        exact = copy.deepcopy(model).double()(x.double())
        timings = interleaved(runs, device, seconds=seconds, ahead=device.type == "cuda")
    found = {}
    typer.echo(f"{case.name}, {str(dtype).removeprefix('torch.')}")
    for name, timing in timings.items():
        error = excess([results[name]], [results["eager"]], [exact])
        found[name] = {"seconds": timing.median, "quartiles": timing.quartiles, "error over allowed": error}
        typer.echo(f"  {name:<20} {timing.median * 1e6:9.1f} us   error over allowed {error:.2f}")
    return {"case": case.name, "dtype": str(dtype), "contenders": found}


def _bound(fn: Callable[..., Tensor], x: Tensor) -> Callable[[], Tensor]:
    return lambda: fn(x)


def main(
    out: Annotated[Path, typer.Option(help="folder for merged_products_<device>.json")],
    device: str = "cuda",
    only: Annotated[str, typer.Option(help="cases whose names contain this")] = "",
    seconds: Annotated[float, typer.Option(help="of timing, each case")] = 3.0,
) -> None:
    """Time frozen layers with and without merged products."""
    where, dtype = torch.device(device), torch.bfloat16
    chosen = containing(CASES, only, lambda case: case.name)
    document: dict[str, Any] = {"target": target_facts(where), "versions": versions(), "commit": revision(), "cases": []}
    out.mkdir(parents=True, exist_ok=True)
    for case in chosen:
        document["cases"].append(measured(case, where, dtype, seconds))
        (out / f"merged_products_{where.type}.json").write_text(json.dumps(document, indent=1) + "\n")


if __name__ == "__main__":
    typer.run(main)
