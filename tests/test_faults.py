"""Bad input and broken surroundings, each in a process of its own: one clear warning, and the right result all the same."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import textwrap
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch
from torch._dynamo.exc import BackendCompilerFailed

ROOT = Path(__file__).parent.parent
QUICK = "import fxopt.codegen.cxx as c; c.PROBE_SECONDS = c.COMPILE_SECONDS = 1.0"


@dataclass
class Report:
    """What `tests/fault_job.py` printed, and what came out on stderr."""

    warnings: list[str]
    kernels: int
    retreats: list[list[str]]
    explained: str
    stderr: str = field(default="", repr=False)


def start(cache: Path | str, prelude: str = "", **environment: str) -> subprocess.Popen[str]:
    settings = os.environ | {"FXOPT_CACHE_DIR": str(cache), "OMP_NUM_THREADS": "1", "FXOPT_STRICT": ""} | environment
    return subprocess.Popen(
        [sys.executable, "-m", "tests.fault_job", textwrap.dedent(prelude)],
        cwd=ROOT,
        env=settings,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def finish(process: subprocess.Popen[str]) -> Report:
    out, err = process.communicate(timeout=300)
    assert process.returncode == 0, err
    return Report(**json.loads(out.splitlines()[-1]), stderr=err)


def job(cache: Path | str, prelude: str = "", **environment: str) -> Report:
    return finish(start(cache, prelude, **environment))


def the_warning(report: Report, *parts: str) -> None:
    """There was one warning, of one line, with these parts, and nothing else on stderr that looks like one."""
    assert len(report.warnings) == 1, report.warnings
    (message,) = report.warnings
    assert "\n" not in message and all(part in message for part in parts), message
    assert "falls back" not in report.stderr and "Traceback" not in report.stderr, report.stderr


def nothing_generated(report: Report, *parts: str) -> None:
    assert report.kernels == 0 and report.retreats
    assert all(part in report.explained for part in ("retreats to ATen", *parts)), report.explained


def all_generated(report: Report) -> None:
    assert report.kernels > 3 and not report.retreats


@pytest.fixture(scope="module")
def warm(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A cache that holds everything that the job needs."""
    cache = tmp_path_factory.mktemp("warm") / "cache"
    report = job(cache)
    all_generated(report)
    assert not report.warnings
    return cache


def compiler(folder: Path, body: str) -> str:
    path = folder / "compiler"
    path.write_text(f"#!/bin/sh\n{body}\n")
    path.chmod(0o700)
    return str(path)


# --- the compiler


def test_no_compiler_at_all(tmp_path: Path) -> None:
    report = job(tmp_path / "cache", PATH=str(tmp_path), CXX="", FXOPT_CXX="")
    the_warning(report, "no C++ compiler found", "install g++ or set CXX", "ATen")
    nothing_generated(report, "no C++ compiler found")


def test_a_chosen_compiler_that_does_not_exist(tmp_path: Path) -> None:
    report = job(tmp_path / "cache", FXOPT_CXX="/no/such/g++")
    the_warning(report, "FXOPT_CXX", "/no/such/g++")
    nothing_generated(report, "/no/such/g++")


@pytest.mark.parametrize(
    ("body", "reason"),
    [
        ("echo 'fatal error: out of luck' >&2; exit 1", "out of luck"),
        ("case $* in *--version*) echo mock;; *) sleep 900;; esac", "did not finish"),
    ],
    ids=["fails", "hangs"],
)
def test_a_compiler_that_does_not_work(tmp_path: Path, body: str, reason: str) -> None:
    command = compiler(tmp_path, body)
    report = job(tmp_path / "cache", QUICK, FXOPT_CXX=command)
    the_warning(report, command, "does not work", reason, "FXOPT_CXX")
    nothing_generated(report, reason)


def test_a_compiler_that_rejects_one_kernel(tmp_path: Path) -> None:
    real = shutil.which("g++") or shutil.which("c++") or shutil.which("clang++")
    body = 'for a in "$@"; do case $a in *.cpp) grep -q fx::exp $a && { echo "error: no exp" >&2; exit 1; };; esac; done'
    report = job(tmp_path / "cache", FXOPT_CXX=compiler(tmp_path, f'{body}\nexec {real} "$@"'))
    assert report.kernels > 0 and not report.warnings
    assert report.retreats and all(reason == "error: no exp" for _, reason in report.retreats)
    assert "error: no exp" in report.explained


# --- Triton


def test_triton_does_not_matter_on_a_cpu(warm: Path) -> None:
    report = job(warm, "import sys; sys.modules['triton'] = None")
    all_generated(report)
    assert not report.warnings


# --- the cache


def test_a_file_where_the_cache_should_be(tmp_path: Path) -> None:
    (tmp_path / "cache").write_text("mine")
    report = job(tmp_path / "cache")
    the_warning(report, str(tmp_path / "cache"), "not a directory", "FXOPT_CACHE_DIR")
    all_generated(report)
    assert (tmp_path / "cache").read_text() == "mine"


def test_a_cache_that_cannot_be_made() -> None:
    report = job("/proc/fxopt/cache")
    the_warning(report, "/proc/fxopt/cache", "FXOPT_CACHE_DIR")
    all_generated(report)


def test_a_cache_that_others_may_write_to(tmp_path: Path) -> None:
    (tmp_path / "cache").mkdir()
    (tmp_path / "cache").chmod(0o777)
    report = job(tmp_path / "cache")
    the_warning(report, str(tmp_path / "cache"), "other users may write", "chmod go-w")
    all_generated(report)
    assert not list((tmp_path / "cache").glob("blobs/*"))


def test_a_cache_of_somebody_else(warm: Path) -> None:
    prelude = f"""
        import os
        real = os.stat
        def stat(path, *args, **more):
            found = real(path, *args, **more)
            if str(path) != {str(warm)!r}:
                return found
            return os.stat_result((*found[:4], 12345, *found[5:10]))
        os.stat = stat
    """
    report = job(warm, prelude)
    the_warning(report, str(warm), "belongs to another user (uid 12345)")
    all_generated(report)


def test_a_full_disk(tmp_path: Path) -> None:
    prelude = f"""
        import errno, os
        real = os.replace
        def replace(source, target, **more):
            if str(target).startswith({str(tmp_path)!r}) and not os.path.basename(str(source)).startswith("kernels"):
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            return real(source, target, **more)
        os.replace = replace
    """
    report = job(tmp_path / "cache", prelude)
    the_warning(report, str(tmp_path / "cache"), "No space left", "free space")
    all_generated(report)


def test_damaged_entries_are_rebuilt_with_one_warning(warm: Path, tmp_path: Path) -> None:
    cache = tmp_path / "cache"
    shutil.copytree(warm, cache)
    for path in (*cache.glob("entries/*"), *cache.glob("blobs/*"), *cache.glob("records/*/*")):
        path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    report = job(cache)
    the_warning(report, "damaged", str(cache / "quarantine"), "built again")
    all_generated(report)
    again = job(cache)
    all_generated(again)
    assert not again.warnings


def test_sound_files_that_are_not_kernels(warm: Path, tmp_path: Path) -> None:
    """Checksums hold, but the shared objects are something else: they are built again, not loaded and not believed."""
    cache = tmp_path / "cache"
    shutil.copytree(warm, cache)
    script = """
        import hashlib, json, sys
        from pathlib import Path
        for path in Path(sys.argv[1]).glob("entries/*.json"):
            body = json.loads(path.read_bytes())["body"]
            code = b"no machine code"
            body["sha256"] = hashlib.sha256(code).hexdigest()
            body["blob"] = body["sha256"] + ".so"
            (Path(sys.argv[1]) / "blobs" / body["blob"]).write_bytes(code)
            digest = hashlib.sha256(json.dumps(body, sort_keys=True).encode()).hexdigest()
            path.write_text(json.dumps({"sha256": digest, "body": body}))
    """
    subprocess.run([sys.executable, "-c", textwrap.dedent(script), str(cache)], check=True)
    report = job(cache)
    all_generated(report)
    the_warning(report, "damaged")


def test_two_processes_on_one_cold_cache(tmp_path: Path) -> None:
    for report in map(finish, [start(tmp_path / "cache") for _ in range(2)]):
        all_generated(report)
        assert not report.warnings


def test_a_process_killed_while_it_compiles(tmp_path: Path) -> None:
    cache = tmp_path / "cache"
    process = start(cache)
    deadline = time.monotonic() + 120
    while not any(cache.glob("tmp/*/build-*")):
        assert process.poll() is None and time.monotonic() < deadline
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    process.communicate()
    report = job(cache)
    all_generated(report)
    assert not report.warnings


# --- options


@pytest.mark.parametrize(
    ("kwargs", "parts"),
    [
        ({"mode": "fastest"}, ["unknown mode 'fastest'", "reduce-overhead", "max-autotune"]),
        ({"options": {"frezee": True}}, ["unknown option 'frezee'", "did you mean 'freeze'", "strict"]),
        ({"options": {"freeze": "yes"}}, ["option 'freeze' must be a bool, got 'yes'"]),
        ({"options": {"mode": "max-autotun"}}, ["did you mean 'max-autotune'"]),
        ({"options": {"fuel": -1}}, ["'fuel' must be a number"]),
    ],
    ids=str,
)
def test_a_wrong_option_names_the_valid_ones(kwargs: dict[str, Any], parts: list[str]) -> None:
    torch.compiler.reset()
    with pytest.raises(BackendCompilerFailed) as caught:
        torch.compile(lambda x: x + 1, backend="fxopt", **kwargs)(torch.ones(2))
    assert all(part in str(caught.value) for part in parts), str(caught.value)


def test_a_malformed_knob_is_ignored_with_a_warning(warm: Path) -> None:
    report = job(warm, FXOPT_FUEL="many")
    assert report.warnings and all("FXOPT_FUEL='many'" in w for w in report.warnings)
    assert len(set(report.warnings)) == 1
    all_generated(report)
