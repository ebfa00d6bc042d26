"""What a second stream within a CUDA graph is worth: `python -m benchmarks.branches --out FILE`.

ResNet-50 at batch 1 has the widest graph among the workloads: where a stage begins, a shortcut may run beside two
convolutions. Each of its four such blocks is captured twice, with the same kernels of fxopt's: all of them in a row, and the
shortcut on another stream from the block's input to the last convolution, which adds it. Three projections of the same
rows are the other kind of width; fxopt makes one kernel of them, which `early_launch` times. Microseconds of a replay, the
median of interleaved rounds.
"""

from __future__ import annotations

import json
import statistics
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from torch import nn

from benchmarks.results import target_facts
from fxopt.cli import pick_device

STAGES = {
    "stage 1": (64, 64, 56, 1),
    "stage 2": (256, 128, 56, 2),
    "stage 3": (512, 256, 28, 2),
    "stage 4": (1024, 512, 14, 2),
}
"""Channels of the input, of the inner convolutions (the result has four times as many), side of the input, stride."""
REPLAYS = 20
ROUNDS = 15
OPTIONS = {"cuda_graphs": False}


def _unit(taken: int, made: int, window: int, stride: int = 1) -> list[nn.Module]:
    return [nn.Conv2d(taken, made, window, stride, window // 2, bias=False), nn.BatchNorm2d(made)]


class Tail(nn.Module):
    """The last convolution of a block, with the residual."""

    def __init__(self, inner: int) -> None:
        super().__init__()
        self.unit = nn.Sequential(*_unit(inner, 4 * inner, 1))

    def forward(self, x: torch.Tensor, shortcut: torch.Tensor) -> torch.Tensor:
        return (self.unit(x) + shortcut).relu()


class Block:
    """A block of a stage in three compiled parts."""

    def __init__(self, channels: int, inner: int, stride: int, device: torch.device) -> None:
        head = nn.Sequential(*_unit(channels, inner, 1), nn.ReLU(), *_unit(inner, inner, 3, stride), nn.ReLU())
        parts = (head, nn.Sequential(*_unit(channels, 4 * inner, 1, stride)), Tail(inner))
        made = [p.to(device, torch.float16, memory_format=torch.channels_last).eval() for p in parts]
        self.head, self.shortcut, self.tail = (torch.compile(p, backend="fxopt", options=OPTIONS) for p in made)
        self.side, self.fork, self.join = torch.cuda.Stream(device), torch.cuda.Event(), torch.cuda.Event()

    def in_a_row(self, x: torch.Tensor) -> torch.Tensor:
        return self.tail(self.head(x), self.shortcut(x))

    def side_by_side(self, x: torch.Tensor) -> torch.Tensor:
        self.fork.record()
        with torch.cuda.stream(self.side):
            self.side.wait_event(self.fork)
            shortcut = self.shortcut(x)
            self.join.record()
        hidden = self.head(x)
        torch.cuda.current_stream().wait_event(self.join)
        return self.tail(hidden, shortcut)


def captured(run: Callable[[torch.Tensor], torch.Tensor], x: torch.Tensor) -> tuple[torch.cuda.CUDAGraph, torch.Tensor]:
    """A graph of it, and its result."""
    for _ in range(3):
        run(x)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = run(x)
    return graph, out


def replay_us(graph: torch.cuda.CUDAGraph) -> float:
    begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    begin.record()
    for _ in range(REPLAYS):
        graph.replay()
    end.record()
    end.synchronize()
    return begin.elapsed_time(end) / REPLAYS * 1e3


def measure(name: str, device: torch.device) -> dict[str, Any]:
    channels, inner, side, stride = STAGES[name]
    torch.compiler.reset()
    torch.manual_seed(0)
    x = torch.randn(1, channels, side, side, device=device, dtype=torch.float16).to(memory_format=torch.channels_last)
    with torch.no_grad():
        block = Block(channels, inner, stride, device)
        graphs = {"in a row": captured(block.in_a_row, x), "side by side": captured(block.side_by_side, x)}
    times: dict[str, list[float]] = {way: [] for way in graphs}
    for _ in range(ROUNDS):
        for way, (graph, _) in graphs.items():
            times[way].append(replay_us(graph))
    row, beside = (out for _, out in graphs.values())
    entry: dict[str, Any] = {way: round(statistics.median(found), 2) for way, found in times.items()}
    return {"block": name, **entry, "same values": bool(torch.equal(row, beside))}


def main(out: Annotated[Path | None, typer.Option(help="JSON file to write")] = None) -> None:
    """Measure blocks of ResNet-50 with their shortcuts in the row and beside it."""
    device = pick_device("cuda")
    facts: dict[str, Any] = {"device": target_facts(device), "torch": torch.__version__, "blocks": []}
    for name in STAGES:
        facts["blocks"].append(measure(name, device))
        print(json.dumps(facts["blocks"][-1]), flush=True)
        if out is not None:
            out.parent.mkdir(parents=True, exist_ok=True)
            out.write_text(json.dumps(facts, indent=1) + "\n")


if __name__ == "__main__":
    typer.run(main)
