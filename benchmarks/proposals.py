"""How good the first proposals of the cost models of convolutions and attention are: `python -m benchmarks.proposals`.

Replays `results/conv_kernels_h100.json` and `results/attention_decoding_h100.json`, which have for each case the model's
estimate beside the time of the four or six configurations that it ranked first. Prints by how much the best of the first
one, two, three, ... is slower than the best of all that were measured.
"""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from statistics import geometric_mean
from typing import Any

import typer

RESULTS = Path(__file__).parent / "results"
Timed = tuple[float, float]
"""(estimate, measured), in seconds or microseconds."""


def convolutions(data: Mapping[str, Any]) -> Iterator[tuple[str, list[Timed]]]:
    """(way, the configurations of one case), the mean of a warm and a cold cache, as the tuner takes it."""
    for case in data["cases"]:
        ways: dict[str, list[Timed]] = defaultdict(list)
        for row in case["rows"]:
            if row["ours"] and "us_hot" in row:
                ways[row["label"].split()[0]].append((row["estimate_us"], (row["us_hot"] + row["us_cold"]) / 2))
        yield from ways.items()


def attention(data: Mapping[str, Any]) -> Iterator[tuple[str, list[Timed]]]:
    for case in data["entries"]:
        yield "attention", [(k["estimate"], k["seconds"]) for k in case["kernels"] if k.get("seconds") and not k["spills"]]


def regret(timed: Sequence[Timed], count: int) -> float:
    """By which factor the best of the `count` that are estimated lowest is slower than the best of all."""
    proposed = sorted(timed)[:count]
    return min(t for _, t in proposed) / min(t for _, t in timed)


def main() -> None:
    """A line for each way: the geometric mean of the factors and the worst, by the number of proposals."""
    cases: dict[str, list[list[Timed]]] = defaultdict(list)
    for file, read in (("conv_kernels_h100.json", convolutions), ("attention_decoding_h100.json", attention)):
        for way, timed in read(json.loads((RESULTS / file).read_text())):
            if len(timed) > 1:
                cases[way].append(timed)
    for way, found in cases.items():
        most = max(map(len, found))
        factors = ([regret(timed, count) for timed in found] for count in range(1, most))
        said = ", ".join(f"{n}: {geometric_mean(f):.3f} (at worst {max(f):.2f})" for n, f in enumerate(factors, 1))
        typer.echo(f"{way:<18} {len(found):>3} cases of up to {most} configurations; by proposals {said}")


if __name__ == "__main__":
    typer.run(main)
