"""Many lengths under CUDA graphs: `python -m benchmarks.lengths --out FILE`.

A small transformer is called with sequences of random lengths, of which few come often (Zipf). Ways: no graphs; a graph
for each of the lengths used last, up to a limit, of one plan of symbolic sizes; and buckets: who calls pads to the next
multiple of 32, so that there are few lengths. For each way: compilations, captures, share of calls that were replays,
microseconds of a call (mean, host and device), and memory held between calls beside that of weights.
"""

from __future__ import annotations

import gc
import json
import random
import time
from pathlib import Path
from typing import Annotated, Any

import torch
import torch.nn.functional as F
import typer
from torch import nn

from benchmarks.results import target_facts
from fxopt.cli import pick_device
from fxopt.report.explanation import journals
from fxopt.runtime.cuda_graph import GraphedExecutor

BUCKET = 32
LIMITS = (4, 16, 64)
WAYS = ("without graphs", *(f"graphs of {limit} lengths" for limit in LIMITS), f"buckets of {BUCKET}")


class Layer(nn.Module):
    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.norms = nn.ModuleList(nn.LayerNorm(width) for _ in range(2))
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.up, self.down = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        q, k, v = self.qkv(self.norms[0](x)).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        x = x + self.out(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))
        return x + self.down(F.gelu(self.up(self.norms[1](x))))


def drawn(calls: int, longest: int, seed: int = 0) -> list[int]:
    """`calls` lengths of 2 to `longest`: the k-th likeliest comes 1 / k as often as the likeliest."""
    rng = random.Random(seed)
    lengths = rng.sample(range(2, longest + 1), longest - 1)
    return rng.choices(lengths, [1 / k for k in range(1, longest)], k=calls)


def padded(length: int) -> int:
    return -(-length // BUCKET) * BUCKET


def measure(way: str, layers: int, width: int, longest: int, calls: int, device: torch.device) -> dict[str, Any]:
    """One way, on two rounds of the same calls: the second is timed."""
    torch.compiler.reset()
    gc.collect()
    torch.cuda.empty_cache()
    torch.manual_seed(0)
    model = nn.Sequential(*(Layer(width, 8) for _ in range(layers))).to(device, torch.bfloat16).eval()
    before = torch.cuda.memory_reserved()
    limit = next((n for n in LIMITS if way == f"graphs of {n} lengths"), longest)
    options = {"cuda_graphs": way != "without graphs", "cuda_graph_limit": limit}
    run = torch.compile(model, backend="fxopt", options=options)
    lengths = drawn(calls, longest)
    if way.startswith("buckets"):
        lengths = [padded(n) for n in lengths]
    inputs = {n: torch.randn(1, n, width, device=device, dtype=torch.bfloat16) for n in set(lengths)}
    known = {id(x) for x in gc.get_objects() if type(x) is GraphedExecutor}
    with torch.no_grad(), journals() as found:
        for n in lengths:
            run(inputs[n])
        made = [x for x in gc.get_objects() if type(x) is GraphedExecutor and id(x) not in known]
        replayed = sum(x._replays for x in made)
        torch.cuda.synchronize()
        start = time.perf_counter()
        for n in lengths:
            run(inputs[n])
        torch.cuda.synchronize()
        seconds = time.perf_counter() - start
    replayed = sum(x._replays for x in made) - replayed
    inputs.clear()
    gc.collect()
    torch.cuda.empty_cache()
    return {
        "way": way,
        "lengths": len(set(lengths)),
        "compilations": len([j for j in found if j.graph.startswith("graph ")]),
        "captures": sum(x._captures for x in made),
        "replayed": round(replayed / calls, 3),
        "us": round(seconds / calls * 1e6, 1),
        "held_mib": round((torch.cuda.memory_reserved() - before) / 2**20, 1),
    }


def main(
    out: Annotated[Path | None, typer.Option(help="JSON file to write")] = None,
    calls: int = 1000,
    longest: int = 400,
    layers: int = 6,
    width: int = 512,
) -> None:
    """Measure what graphs are worth where lengths vary."""
    device = pick_device("cuda")
    sizes = {"calls": calls, "longest": longest, "layers": layers, "width": width}
    facts: dict[str, Any] = {"device": target_facts(device), "torch": torch.__version__, **sizes, "ways": []}
    for way in WAYS:
        facts["ways"].append(measure(way, layers, width, longest, calls, device))
        print(json.dumps(facts["ways"][-1]), flush=True)
        if out is not None:
            out.parent.mkdir(parents=True, exist_ok=True)
            out.write_text(json.dumps(facts, indent=1) + "\n")


if __name__ == "__main__":
    typer.run(main)
