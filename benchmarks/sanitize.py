"""The kernel suite under compute-sanitizer: `python -m benchmarks.sanitize --out FILE`.

    python -m benchmarks.sanitize --warm 90 --limit 85 --out FOLDER/sanitizer_h200.json

Tests of generated kernels run once as they are, spread over all devices and cores, so that kernels are built and choices
made. Those that passed run under the tools, side by side in shards, in the order of SUITE, with an allocation for each
tensor: an access beyond one is seen. What has not ended after `limit` seconds is cut; the file names the tests left.
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
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from itertools import pairwise
from pathlib import Path
from typing import Annotated

import torch
import typer

from benchmarks.choosing import names_of
from benchmarks.crew import usable_devices
from benchmarks.dealing import shared_threads, visible_devices
from benchmarks.results import target_facts
from fxopt.cli import pick_device

SUITE = (
    "tests/gpu/test_attention_kernels_cuda.py",
    "tests/gpu/test_conv_kernels_cuda.py",
    "tests/gpu/test_gemm_cuda.py",
    "tests/gpu/test_group_norms_cuda.py",
    "tests/gpu/test_narrow_attention_cuda.py",
    "tests/gpu/test_scored_attention_cuda.py",
    "tests/test_end_to_end.py",
    "tests/gpu/test_quantized_convolutions_cuda.py",
    "tests/gpu/test_hand_attention_cuda.py",
    "tests/gpu/test_device_functions_cuda.py",
    "tests/gpu/test_linear_cross_entropy_cuda.py::test_values_and_gradients",
    "tests/gpu/test_optimizers_cuda.py::test_steps_are_as_near_to_float64_as_eager_ones",
    "tests/gpu/test_optimizers_cuda.py::test_half_precision_parameters",
    "tests/gpu/test_quantized_cuda.py::test_casts_have_torchs_bits",
    "tests/gpu/test_quantized_cuda.py::test_compiled_layers_are_as_exact_as_their_operands",
    "tests/gpu/test_quantize_cuda.py::test_histograms_of_a_graph_are_those_of_the_op",
    "tests/gpu/test_quantize_cuda.py::test_models_in_each_precision",
    "tests/gpu/test_convolutions_cuda.py",
    "tests/gpu/test_groupings_cuda.py",
    "tests/gpu/test_fp8_training_cuda.py",
    "tests/gpu/test_quantized_cuda.py::test_every_kernel_of_one_row_has_the_values_of_a_norm_between_products",
)
PLACES = ("/usr/local/cuda/bin/compute-sanitizer", "/usr/local/cuda/compute-sanitizer/compute-sanitizer")
TOOLS = ("memcheck", "racecheck", "initcheck", "synccheck")
PYTEST = ("-m", "pytest", "-v", "-m", "gpu", "-p", "no:cacheprovider", "--no-header", "--tb=line")
LIBRARIES = ("at6native", "cutlass", "xmma", "nvjet", "cublas", "cudnn", "fmha", "flash")
"""Parts of the names of kernels that are not ours: they are not checked, and take no longer than without a tool."""
PORT, PORTS = 49152, 10
"""Of a tool's talk with what it watches: the first of as many as it tries, which tools side by side must not share."""
CONNECT = 60
"""Seconds that a tool waits for what it has started."""
GRACE = 15
"""Seconds that interrupted runs have to write their summaries."""
SHOWN = 40
"""Lines of findings that are kept."""
_SUMMARY = re.compile(r"=+ (?:ERROR|RACECHECK) SUMMARY: (\d+)")
_NOTHING = re.compile(r"=+ +(?:COMPUTE-SANITIZER|(?:ERROR|RACECHECK) SUMMARY: 0 .*)?$")
_OUTCOME = re.compile(r"(PASSED|FAILED|ERROR|SKIPPED)\b[^\n]*\[\s*\d+%\]")
_OUTCOME_OF_WORKER = re.compile(r"^\[gw\d+\] \[\s*\d+%\] ([A-Z]+) (\S+::.*?)\s*$", re.MULTILINE)


@dataclass(frozen=True)
class Finding:
    """What a tool came to. `found` are errors or hazards of the shards that got to their summaries, `silent` counts the
    others; `failed` and `left` name tests that failed and that did not run to their end; `details` is the beginning of what
    it said."""

    tool: str
    found: int
    silent: int
    passed: int
    failed: list[str]
    left: list[str]
    seconds: float
    details: list[str]

    @property
    def clean(self) -> bool:
        return self.found == self.silent == 0 and not self.failed and self.passed > 0


@dataclass(frozen=True)
class Shard:
    """Tests that one process runs under a tool, with its output at `log`."""

    tool: str
    tests: Sequence[str]
    log: Path
    process: subprocess.Popen[bytes]


def sanitizer() -> str | None:
    """The tool's path; None where there is none."""
    known = [shutil.which("compute-sanitizer"), *(place for place in PLACES if Path(place).exists())]
    return next((place for place in known if place), None)


def tool_command(program: str, tool: str, number: int) -> list[str]:
    """What stands before the command that is to run under `tool`, as the one with this number of those side by side."""
    options = ["--tool", tool, "--target-processes", "application-only"]
    options += ["--port", str(PORT + PORTS * number), "--max-connections", str(PORTS), "--launch-timeout", str(CONNECT)]
    options += [f"--kernel-name-exclude=kns={part}" for part in LIBRARIES]
    threads = ["--racecheck-num-workers", "1"] if tool == "racecheck" else []  # as many as there are cores otherwise
    return [program, *options, *threads]


def outcomes(text: str, tests: Sequence[str]) -> dict[str, str]:
    """What became of each of `tests` that ended, by the output of pytest -v, into which a tool may have written."""
    places = sorted((at, test) for test in tests if (at := text.find(f"{test} ")) >= 0)
    bounds = pairwise([*places, (len(text), "")])
    found = {test: _OUTCOME.search(text, at + len(test), end) for (at, test), (end, _) in bounds}
    return {test: m.group(1) for test, m in found.items() if m}


def outcomes_of_workers(text: str) -> dict[str, str]:
    """The same of pytest -v with workers."""
    return {m.group(2): m.group(1) for m in _OUTCOME_OF_WORKER.finditer(text)}


def read(tool: str, text: str, tests: Sequence[str], seconds: float) -> Finding:
    """Judge the output of pytest -v with `tests` under `tool`."""
    lines = text.splitlines()
    summaries = [int(m.group(1)) for line in lines if (m := _SUMMARY.match(line))]
    said = [line for line in lines if line.startswith("========= ") and not _NOTHING.match(line)]
    ended = outcomes(text, tests)
    failed = [test for test, outcome in ended.items() if outcome in ("FAILED", "ERROR")]
    passed = sum(outcome == "PASSED" for outcome in ended.values())
    left = [test for test in tests if test not in ended]
    return Finding(tool, sum(summaries), int(not summaries), passed, failed, left, round(seconds, 1), said[:SHOWN])


def joined(findings: Sequence[Finding]) -> Finding:
    """One of the shards of one tool."""
    return Finding(
        findings[0].tool,
        sum(f.found for f in findings),
        sum(f.silent for f in findings),
        sum(f.passed for f in findings),
        [test for f in findings for test in f.failed],
        [test for f in findings for test in f.left],
        max(f.seconds for f in findings),
        [line for f in sorted(findings, key=lambda f: -f.found) for line in f.details][:SHOWN],
    )


def _begin(
    command: Sequence[str], environment: Mapping[str, str], log: Path, stack: contextlib.ExitStack
) -> subprocess.Popen[bytes]:
    """What is left of it ends with `stack`."""
    with log.open("wb") as output:
        process = subprocess.Popen(
            command, env={**os.environ, **environment}, stdout=output, stderr=subprocess.STDOUT, start_new_session=True
        )
    stack.callback(_end, process)
    return process


def _wait(process: subprocess.Popen[bytes], until: float) -> bool:
    """Whether it has ended by itself at the time `until` of time.monotonic."""
    with contextlib.suppress(subprocess.TimeoutExpired):
        process.wait(max(0.0, until - time.monotonic()))
    return process.returncode is not None


def _interrupt(process: subprocess.Popen[bytes]) -> None:
    """What runs within a tool is interrupted alone; the tool then sums up."""
    with contextlib.suppress(OSError):
        for pid in Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split():
            os.kill(int(pid), signal.SIGINT)


def _end(process: subprocess.Popen[bytes]) -> None:
    """With what it started: a tool may end before what it watched does."""
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()


def warm_up(
    suite: Sequence[str], places: Sequence[str], workers: int, environment: Mapping[str, str], folder: Path, seconds: float
) -> tuple[list[str], dict[str, str]]:
    """Run the suite by `workers` processes on each of the devices `places`, for up to `seconds`.

    The tests in order, and what became of those that ended.
    """
    options = [f"--tx={workers}*popen//env:CUDA_VISIBLE_DEVICES={place}" for place in places]
    begun = time.monotonic()
    listed, done = folder / "sanitize-tests.log", folder / "sanitize-warm.log"
    commands = {
        listed: (sys.executable, *PYTEST, "--collect-only", "-qq", *suite),
        done: (sys.executable, *PYTEST, "--dist=load", "--maxschedchunk=1", *options, *suite),
    }
    with contextlib.ExitStack() as stack:
        for process in [_begin(command, environment, log, stack) for log, command in commands.items()]:
            _wait(process, begun + seconds)
    tests = [line for line in listed.read_text().splitlines() if re.match(r"\S+\.py::", line)]
    return tests, outcomes_of_workers(done.read_text(errors="replace"))


def run_shards(
    program: str,
    tools: Sequence[str],
    tests: Sequence[str],
    places: Sequence[str],
    each: int,
    environment: Mapping[str, str],
    folder: Path,
    seconds: float,
) -> list[Finding]:
    """Deal `tests` to `each` processes under every tool, on the devices `places` in turns, for up to `seconds`."""
    begun, shards = time.monotonic(), list[Shard]()
    with contextlib.ExitStack() as stack:
        for number in range(min(each, len(tests))):
            device = {"CUDA_VISIBLE_DEVICES": places[number % len(places)]}
            for tool in tools:
                log, own = folder / f"sanitize-{tool}-{number}.log", tests[number::each]
                command = (*tool_command(program, tool, len(shards)), sys.executable, *PYTEST, *own)
                shards.append(Shard(tool, own, log, _begin(command, {**environment, **device}, log, stack)))
        took = {shard.log: time.monotonic() - begun for shard in shards if _wait(shard.process, begun + seconds)}
        for shard in shards:
            if shard.log not in took:
                _interrupt(shard.process)
        until = time.monotonic() + GRACE
        for shard in shards:
            _wait(shard.process, until)
    found = [
        read(s.tool, s.log.read_text(errors="replace"), s.tests, took.get(s.log, time.monotonic() - begun)) for s in shards
    ]
    return [joined([f for f in found if f.tool == tool]) for tool in tools]


def main(
    tools: Annotated[str, typer.Option(help="comma-separated")] = "memcheck,racecheck",
    tests: Annotated[str, typer.Option(help="what pytest runs, separated by spaces")] = " ".join(SUITE),
    warm: Annotated[float, typer.Option(help="seconds for the run without a tool")] = 90.0,
    limit: Annotated[float, typer.Option(help="seconds for the runs under tools")] = 85.0,
    devices: Annotated[int, typer.Option(min=0, help="GPUs to use; 0: all")] = 0,
    processes: Annotated[int, typer.Option(min=0, help="in all; 0: one for each core")] = 0,
    out: Annotated[Path | None, typer.Option(help="JSON file to write; output of the runs lies beside it")] = None,
) -> None:
    """Run the suite under compute-sanitizer; exit with 1 when a tool has found something or has not said."""
    program = sanitizer()
    if program is None:
        raise typer.BadParameter("there is no compute-sanitizer on the PATH nor in " + ", ".join(PLACES))
    chosen, suite = names_of(tools, TOOLS, "tool"), tests.split()
    if not suite:
        raise typer.BadParameter("there are no tests to run")
    cuda = pick_device("cuda")
    places = visible_devices(usable_devices(cuda, devices))
    processes = max(processes or len(os.sched_getaffinity(0)), len(places), len(chosen))
    folder = Path(tempfile.mkdtemp(prefix="fxopt-sanitize-")) if out is None else out.parent
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix="fxopt-sanitize-", ignore_cleanup_errors=True) as caches:
        # Whoever reads a plan must have switched off what its maker had; without an allocator nothing is captured.
        environment = {
            **shared_threads(processes),
            "FXOPT_CACHE_DIR": f"{caches}/shared",
            "KEPT_CACHES": caches,
            "FXOPT_DISABLE": "cuda-graphs",
        }
        known, ended = warm_up(suite, places, processes // len(places), environment, folder, warm)
        ready = [test for test in known if ended.get(test) == "PASSED"]
        if not ready:
            raise typer.BadParameter(f"no test has passed without a tool: see {folder}/sanitize-warm.log")
        facts = {
            "device": target_facts(cuda),
            "torch": torch.__version__,
            "suite": suite,
            "unchecked": LIBRARIES,
            "devices": len(places),
            "processes": processes,
            "not_warmed": [test for test in known if test not in ended],
            "failed_before": [test for test, outcome in ended.items() if outcome in ("FAILED", "ERROR")],
        }
        environment["PYTORCH_NO_CUDA_MEMORY_CACHING"] = "1"  # an allocation for each tensor
        findings = run_shards(program, chosen, ready, places, processes // len(chosen), environment, folder, limit)
    text = json.dumps({**facts, "findings": [asdict(f) for f in findings]}, indent=1)
    print(text, flush=True)
    if out is not None:
        out.write_text(text + "\n")
    raise typer.Exit(int(not all(f.clean for f in findings)))


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(1))  # not without ending what was begun
    typer.run(main)
