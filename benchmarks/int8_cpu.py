"""int8 products on a CPU by the library's calls, beside float32: `python -m benchmarks.int8_cpu --out FOLDER`.

Rows of MiniLM's layers by weights [N, K]: float32 by ATen and by oneDNN with a packed weight, `aten::_int_mm` with its int32
sums, and `onednn::qlinear_pointwise`, which takes unsigned rows and a packed weight and gives float32. Signed rows have no
fast kernel there (seconds). Best of several turns, in microseconds.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from torch import Tensor

from benchmarks.results import revision, target_facts, versions

SHAPES = tuple((m, k, n) for m in (16, 128, 1024) for k, n in ((384, 384), (384, 1152), (384, 1536), (1536, 384)))


def calls(m: int, k: int, n: int) -> dict[str, Callable[[], Tensor]]:
    """The contenders by name."""
    x, weight, bias = torch.randn(m, k), torch.randn(n, k), torch.randn(n)
    rows = torch.randint(-127, 128, (m, k), dtype=torch.int8)
    few, scales = torch.randint(-127, 128, (n, k), dtype=torch.int8), torch.rand(n)
    unsigned, zeros = (rows.int() + 128).to(torch.uint8), torch.zeros(n, dtype=torch.int64)
    float_packed = torch.ops.mkldnn._reorder_linear_weight(weight, m)
    packed = torch.ops.onednn.qlinear_prepack(few, [m, k])
    after = (bias, 1.0, 0, torch.float32, "none", [], "")
    return {
        "float32": lambda: torch.addmm(bias, x, weight.t()),
        "float32 packed": lambda: torch.ops.mkldnn._linear_pointwise(x, float_packed, bias, "none", [], ""),
        "_int_mm": lambda: torch._int_mm(rows, few.t()),
        "qlinear unsigned": lambda: torch.ops.onednn.qlinear_pointwise(unsigned, 0.01, 128, packed, scales, zeros, *after),
    }


def measured(shape: tuple[int, int, int], turns: int) -> dict[str, Any]:
    runs = calls(*shape)
    best = {name: float("inf") for name in runs}
    for _ in range(turns + 1):  # the first one packs and allocates
        for name, run in runs.items():
            start = time.perf_counter()
            run()
            best[name] = min(best[name], time.perf_counter() - start)
    return {"mkn": list(shape), "microseconds": {name: seconds * 1e6 for name, seconds in best.items()}}


def main(
    out: Annotated[Path, typer.Option(help="folder for int8_cpu.json")],
    turns: Annotated[int, typer.Option(help="of each contender and shape")] = 20,
) -> None:
    """Time int8 products on this machine's CPU."""
    document: dict[str, Any] = {"target": target_facts(torch.device("cpu")), "versions": versions(), "commit": revision()}
    document["cases"] = [measured(shape, turns) for shape in SHAPES]
    for case in document["cases"]:
        typer.echo(f"{case['mkn']}: " + ", ".join(f"{name} {us:.0f}" for name, us in case["microseconds"].items()))
    out.mkdir(parents=True, exist_ok=True)
    (out / "int8_cpu.json").write_text(json.dumps(document, indent=1) + "\n")


if __name__ == "__main__":
    typer.run(main)
