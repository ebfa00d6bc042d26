"""The run of the kernel suite under compute-sanitizer, with a stand-in for the tool."""

from __future__ import annotations

import json
import subprocess
import time
from pathlib import Path
from typing import Any

import pytest
import torch
import typer

from benchmarks import sanitize
from benchmarks.sanitize import joined, outcomes, outcomes_of_workers, read, tool_command

IDS = ["tests/a.py::test_b[1]", "tests/a.py::test_b[two words]", "tests/a.py::test_c", "tests/a.py::test_d"]
OUTPUT = """tests/a.py::test_b[1] PASSED [ 3%]
tests/a.py::test_b[two words] ========= Invalid __global__ read of size 4 bytes
=========     at triton_kernel+0x10
=========
FAILED                                       [  6%]
tests/a.py::test_c PASSED[ 9%]
tests/a.py::test_d
"""


def test_errors_are_counted_with_what_was_said_of_them() -> None:
    text = f"========= COMPUTE-SANITIZER\n{OUTPUT}========= ERROR SUMMARY: 1 error"
    found = read("memcheck", text, IDS, 3.04)
    assert (found.found, found.silent, found.passed, found.seconds) == (1, 0, 2, 3.0)
    assert (found.failed, found.left) == ([IDS[1]], [IDS[3]])
    assert found.details == ["=========     at triton_kernel+0x10", "========= ERROR SUMMARY: 1 error"]


def test_shards_are_summed_up() -> None:
    clean = "========= RACECHECK SUMMARY: 0 hazards displayed (0 errors, 0 warnings)"
    first, second = read("racecheck", OUTPUT + clean, IDS, 1.0), read("racecheck", OUTPUT, IDS, 2.0)
    right = [IDS[0], IDS[2]]
    assert read("racecheck", OUTPUT + clean, right, 1.0).clean and not read("racecheck", clean, right, 1.0).clean
    assert not first.clean and not read("racecheck", OUTPUT, right, 1.0).clean
    both = joined([first, second])
    assert (both.found, both.silent, both.passed, both.seconds) == (0, 1, 4, 2.0)
    assert (both.failed, both.left) == ([IDS[1]] * 2, [IDS[3]] * 2)


def test_tools_side_by_side_have_ports_and_cores_of_their_own() -> None:
    commands = [tool_command("sanitizer", tool, number) for number, tool in enumerate(("memcheck", "racecheck", "memcheck"))]
    ports = [int(command[command.index("--port") + 1]) for command in commands]
    assert ports[1] - ports[0] == ports[2] - ports[1] >= int(commands[0][commands[0].index("--max-connections") + 1])
    assert [command.count("--racecheck-num-workers") for command in commands] == [0, 1, 0]


def test_outcomes_are_read_with_and_without_workers() -> None:
    assert outcomes(OUTPUT, IDS) == {IDS[0]: "PASSED", IDS[1]: "FAILED", IDS[2]: "PASSED"}
    text = f"{IDS[0]} \n[gw13] [  3%] PASSED {IDS[0]} \n{IDS[1]} \n[gw2] [  6%] FAILED {IDS[1]} \n{IDS[2]} \n"
    assert outcomes_of_workers(text) == {IDS[0]: "PASSED", IDS[1]: "FAILED"}


# Says that it is a tool, and of each test on which device it ran.
TOOL = """#!/bin/sh
while [ "${1#-}" != "$1" ] || [ "${1#*python}" = "$1" ]; do shift; done
echo "========= COMPUTE-SANITIZER"
"$@"
echo "========= ERROR SUMMARY: 0 errors"
"""
TESTS = """
import os, time
from pathlib import Path
import pytest

pytestmark = pytest.mark.gpu

def note(name, **seen):
    seen["place"] = os.environ["CUDA_VISIBLE_DEVICES"]
    seen["checked"] = "PYTORCH_NO_CUDA_MEMORY_CACHING" in os.environ
    with open("log", "a") as log:
        log.write(repr((name, seen)) + "\\n")
    return seen

@pytest.mark.parametrize("number", range(6))
def test_number(number):
    note(f"number {number}")

def test_wrong():
    assert 0

def test_slow():
    if note("slow")["checked"]:
        Path("slow").touch()
        time.sleep(600)
"""


def test_a_suite_is_run_in_shards_and_what_is_cut_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("xdist")
    tool = tmp_path / "compute-sanitizer"
    tool.write_text(TOOL)
    tool.chmod(0o755)
    (tmp_path / "pytest.ini").write_text("[pytest]\nmarkers = gpu\n")
    (tmp_path / "test_kernels.py").write_text(TESTS)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sanitize, "sanitizer", lambda: str(tool))
    monkeypatch.setattr(sanitize, "pick_device", lambda name: torch.device("cpu"))
    monkeypatch.setattr(sanitize, "visible_devices", lambda count: ["4", "GPU-a"])
    monkeypatch.setattr(sanitize, "GRACE", 60)
    wait = sanitize._wait

    def until_slow(process: subprocess.Popen[bytes], until: float) -> bool:
        while process.poll() is None and time.monotonic() < until:
            if slow.exists():
                slow.unlink()
                return False
            time.sleep(0.05)
        return wait(process, until)

    slow = tmp_path / "slow"
    monkeypatch.setattr(sanitize, "_wait", until_slow)
    out = tmp_path / "out" / "found.json"
    with pytest.raises(typer.Exit) as done:
        sanitize.main("memcheck", "test_kernels.py", warm=120, limit=120, devices=0, processes=2, out=out)
    assert done.value.exit_code == 0
    data = json.loads(out.read_text())
    assert data["failed_before"] == ["test_kernels.py::test_wrong"]
    assert data["not_warmed"] == []
    (found,) = data["findings"]
    assert (found["found"], found["silent"], found["passed"]) == (0, 0, 6)
    assert found["left"] == ["test_kernels.py::test_slow"]
    seen: list[tuple[str, dict[str, Any]]] = [eval(line) for line in (tmp_path / "log").read_text().splitlines()]
    places = {(facts["place"], facts["checked"]) for _, facts in seen}
    assert places == {(place, checked) for place in ("4", "GPU-a") for checked in (False, True)}
    plain, checked = (sorted(name for name, facts in seen if facts["checked"] is way) for way in (False, True))
    assert plain == checked


@pytest.mark.parametrize(
    ("tools", "tests", "wrong"),
    [("memchek", "a.py", "no tool 'memchek'"), (" ,", "a.py", "no tool is named"), ("memcheck", " ", "no tests")],
)
def test_options_are_judged_before_anything_runs(
    tools: str, tests: str, wrong: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """pytest without a name would run all tests that there are."""
    monkeypatch.setattr(sanitize, "sanitizer", lambda: "compute-sanitizer")
    monkeypatch.setattr(sanitize, "pick_device", lambda name: torch.device("cpu"))
    monkeypatch.setattr(sanitize, "visible_devices", lambda count: ["0"])
    monkeypatch.setattr(sanitize, "warm_up", lambda *_: pytest.fail("it runs"))
    with pytest.raises(typer.BadParameter, match=wrong):
        sanitize.main(tools, tests, warm=1, limit=1, devices=0, processes=1, out=None)
