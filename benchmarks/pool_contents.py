"""What the memory consists of that a model under fxopt holds between calls: `python -m benchmarks.pool_contents`.

    python -m benchmarks.pool_contents --workloads resnet50-fp16-b1,convnext-t,bert-base-b1 --out FILE

For each pool of torch's allocator (of CUDA graphs, and the common one) after some calls: segments and what of them is in
use, the largest blocks in use with the lines that asked for them, and the largest requests that were ever answered from it.
"""

from __future__ import annotations

import json
from collections import Counter, defaultdict
from pathlib import Path
from typing import Annotated, Any

import torch
import typer

from benchmarks.choosing import named
from benchmarks.models import choose
from benchmarks.results import target_facts
from fxopt.cli import pick_device, pick_dtype
from fxopt.report.contenders import CONTENDERS

CALLS = 4
LISTED = 12
"""Blocks and requests that are listed for each pool."""
OWN = ("torch/", "python3", "runpy")
"""Parts of the names of files whose frames do not say who asked."""


def _asker(frames: list[dict[str, Any]]) -> str:
    """The innermost lines of Python that are not torch's."""
    lines = [
        f"{Path(f['filename']).name}:{f['line']} {f['name']}" for f in frames if not any(o in f["filename"] for o in OWN)
    ]
    return " < ".join(lines[:3])


def contents(snapshot: dict[str, Any]) -> list[dict[str, Any]]:
    """An entry for each pool and stream, largest first; sizes in MiB."""
    pools: dict[tuple[Any, int], list[dict[str, Any]]] = defaultdict(list)
    for segment in snapshot["segments"]:
        pools[tuple(segment["segment_pool_id"]), segment["stream"]].append(segment)
    found = []
    for (pool, stream), segments in pools.items():
        blocks = [b for s in segments for b in s["blocks"] if b["state"] != "inactive"]
        ranges = [(s["address"], s["address"] + s["total_size"]) for s in segments]
        requests: Counter[tuple[int, str]] = Counter()
        for trace in snapshot["device_traces"]:
            for event in trace:
                if event["action"] == "alloc" and any(low <= event["addr"] < high for low, high in ranges):
                    requests[event["size"], _asker(event.get("frames", []))] += 1
        found.append(
            {
                "pool": str(pool),
                "stream": stream,
                "reserved": _mib(sum(s["total_size"] for s in segments)),
                "in use": _mib(sum(b["size"] for b in blocks)),
                "segments": sorted((_mib(s["total_size"]) for s in segments), reverse=True)[:LISTED],
                "largest in use": [
                    [_mib(b["size"]), _asker(b.get("frames", []))]
                    for b in sorted(blocks, key=lambda b: b["size"], reverse=True)[:LISTED]
                ],
                "largest requests": [
                    [_mib(size), count, who] for (size, who), count in sorted(requests.items(), reverse=True)
                ][:LISTED],
            }
        )
    return sorted(found, key=lambda entry: -entry["reserved"])


def _mib(size: int) -> float:
    return round(size / 2**20, 2)


def main(
    workloads: Annotated[
        str, typer.Option(help="comma-separated")
    ] = "resnet50-fp16-b1,convnext-t,bert-base-b1,bert-base,gpt2",
    contender: str = "fxopt",
    device: str = "cuda",
    dtype: str = "bfloat16",
    tiny: Annotated[bool, typer.Option(help="small sizes, to try the script")] = False,
    out: Annotated[Path | None, typer.Option(help="JSON file to write")] = None,
) -> None:
    """Say what torch's allocator holds, and for whom."""
    chosen, (way,) = choose(workloads), named(contender, CONTENDERS, "contender")
    place, facts = pick_device(device), dict[str, Any]()
    for known in chosen:
        name = known.name
        torch.compiler.reset()
        case = known.build(known.sizes(tiny), place, pick_dtype(dtype))
        torch.cuda.empty_cache()
        torch.cuda.memory._record_memory_history(max_entries=400_000, stacks="python")
        compiled = way.compile(case.module, place)
        for _ in range(CALLS):
            case.drive(compiled)
        torch.cuda.synchronize()
        torch.cuda.empty_cache()
        facts[name] = contents(torch.cuda.memory._snapshot())
        torch.cuda.memory._record_memory_history(enabled=None)
        for entry in facts[name]:
            print(
                f"{name}: pool {entry['pool']}, stream {entry['stream']}: {entry['reserved']} MiB, {entry['in use']} in use"
            )
            print(f"    segments {entry['segments']}")
            for what in ("largest in use", "largest requests"):
                print(f"    {what}:", *(f"\n        {line}" for line in entry[what]))
        del compiled, case
        if out is not None:
            out.parent.mkdir(parents=True, exist_ok=True)
            out.write_text(json.dumps({"device": target_facts(place), "workloads": facts}, indent=1) + "\n")


if __name__ == "__main__":
    typer.run(main)
