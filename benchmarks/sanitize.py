"""The kernel suite under compute-sanitizer: `python -m benchmarks.sanitize --out FILE`.

    python -m benchmarks.sanitize --tools memcheck,racecheck --warm 40 --limit 90 --out FOLDER/sanitizer_h100.json

Tests of generated kernels run once as they are, so that kernels are built and choices made, then under the tools, side by
side, in the order of SUITE, with an allocation for each tensor: an access beyond one is seen. What has not begun after
`limit` seconds is left out, and the file says how many tests had passed.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, Any

import torch
import typer

from benchmarks.results import target_facts
from fxopt.cli import pick_device

SUITE = (
    "tests/test_end_to_end.py",
    "tests/gpu/test_attention_kernels_cuda.py",
    "tests/gpu/test_optimizers_cuda.py",
    "tests/gpu/test_gemm_cuda.py::test_grouped_products",
    "tests/gpu/test_gemm_cuda.py::test_layers_for_any_number_of_rows",
    "tests/gpu/test_conv_kernels_cuda.py::test_values",
    "tests/gpu/test_quantized_cuda.py::test_casts_have_torchs_bits",
    "tests/gpu/test_gemm_cuda.py::test_dual_products",
    "tests/gpu/test_gemm_cuda.py::test_values",
)
PLACES = ("/usr/local/cuda/bin/compute-sanitizer", "/usr/local/cuda/compute-sanitizer/compute-sanitizer")
GRACE = 15
"""Seconds that an interrupted run has to write its summary."""
SHOWN = 40
"""Lines of findings that are kept."""
_SUMMARY = re.compile(r"=+ (?:ERROR|RACECHECK) SUMMARY: (\d+)")


@dataclass(frozen=True)
class Finding:
    """What a run under one tool came to. `found` are errors or hazards, None where the tool has not got to its summary;
    `details` is the beginning of what it said."""

    tool: str
    found: int | None
    passed: int
    failed: int
    ended: bool
    seconds: float
    details: list[str]


def sanitizer() -> str | None:
    """The tool's path; None where there is none."""
    known = [shutil.which("compute-sanitizer"), *(place for place in PLACES if Path(place).exists())]
    return next((place for place in known if place), None)


def read(tool: str, text: str, ended: bool, seconds: float) -> Finding:
    """Judge the output of pytest -v under `tool`."""
    lines = text.splitlines()
    summaries = [int(m.group(1)) for line in lines if (m := _SUMMARY.match(line))]
    said = [line for line in lines if line.startswith("=========") and len(line) > len("=========") + 1]
    passed, failed = (len(re.findall(rf"^\S+::.* {word}", text, re.MULTILINE)) for word in ("PASSED", "FAILED"))
    found = sum(summaries) if summaries else None
    return Finding(tool, found, passed, failed, ended, round(seconds, 1), said[:SHOWN])


def _begin(before: list[str], suite: tuple[str, ...], environment: dict[str, str], log: Any) -> subprocess.Popen[bytes]:
    options = ["-v", "-m", "gpu", "-p", "no:cacheprovider", "--no-header", "--tb=line"]
    command = [*before, sys.executable, "-m", "pytest", *options, *suite]
    return subprocess.Popen(command, env=environment, stdout=log, stderr=subprocess.STDOUT, start_new_session=True)


def _wait(process: subprocess.Popen[bytes], until: float, within: bool) -> bool:
    """Whether it has ended by itself. What runs `within` a tool is interrupted alone; the tool then sums up."""
    try:
        process.wait(max(0.0, until - time.monotonic()))
        return True
    except subprocess.TimeoutExpired:
        inner = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split() if within else []
        for pid in map(int, inner or [process.pid]):
            os.kill(pid, signal.SIGINT)
    with contextlib.suppress(subprocess.TimeoutExpired):
        process.wait(GRACE)
    with contextlib.suppress(ProcessLookupError):  # the tool may end before what it watched does
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    return False


def main(
    tools: Annotated[str, typer.Option(help="comma-separated")] = "memcheck,racecheck",
    tests: Annotated[str, typer.Option(help="what pytest runs, separated by spaces")] = " ".join(SUITE),
    warm: Annotated[float, typer.Option(help="seconds for the run without a tool")] = 60.0,
    limit: Annotated[float, typer.Option(help="seconds for the runs under tools")] = 120.0,
    out: Annotated[Path | None, typer.Option(help="JSON file to write; output of the runs lies beside it")] = None,
) -> None:
    """Run the suite under compute-sanitizer; exit with 1 when a tool has found something or has not said."""
    program = sanitizer()
    if program is None:
        raise typer.BadParameter("there is no compute-sanitizer on the PATH nor in " + ", ".join(PLACES))
    suite = tuple(tests.split())
    folder = Path(tempfile.mkdtemp(prefix="fxopt-sanitize-")) if out is None else out.parent
    folder.mkdir(parents=True, exist_ok=True)
    environment = {**os.environ, "FXOPT_CACHE_DIR": str(folder / "cache")}
    with (folder / "sanitize-warm.log").open("wb") as log:
        _wait(_begin([], suite, environment, log), time.monotonic() + warm, within=False)
    # Captured runs have a pool of torch's caching allocator, which is off: an allocation for each tensor.
    environment |= {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1", "FXOPT_DISABLE": "cuda-graphs"}
    begun, start, findings = list[tuple[str, Path, subprocess.Popen[bytes]]](), time.monotonic(), list[Finding]()
    for tool in tools.split(","):
        path = folder / f"sanitize-{tool}.log"
        with path.open("wb") as log:
            before = [program, "--tool", tool, "--target-processes", "application-only"]
            begun.append((tool, path, _begin(before, suite, environment, log)))
    for tool, path, process in begun:
        ended = _wait(process, start + limit, within=True)
        findings.append(read(tool, path.read_text(errors="replace"), ended, time.monotonic() - start))
        print(json.dumps(asdict(findings[-1]), indent=1), flush=True)
        if out is not None:
            facts = {"device": target_facts(pick_device("cuda")), "torch": torch.__version__, "suite": suite}
            out.write_text(json.dumps({**facts, "findings": [asdict(f) for f in findings]}, indent=1) + "\n")
    raise typer.Exit(int(any(f.found != 0 for f in findings)))


if __name__ == "__main__":
    typer.run(main)
