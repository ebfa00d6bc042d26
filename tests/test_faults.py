"""Bad input and broken surroundings, each in a process of its own: one clear warning, and the right result all the same."""

from __future__ import annotations

import json
import os
import random
import shutil
import subprocess
import sys
import textwrap
import time
import warnings
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch
from torch._dynamo.exc import BackendCompilerFailed

from fxopt.runtime.artifacts import ArtifactStore
from tests.compilers import REAL, compiler
from tests.fault_server import ROOT, Job, Server

QUICK = "import fxopt.codegen.cxx as c; c.PROBE_SECONDS = c.COMPILE_SECONDS = 1.0"
FROM_PLAN = "plan: loaded from the cache"


@dataclass
class Report:
    """What `tests/fault_job.py` printed, and what came out on stderr."""

    warnings: list[str]
    kernels: int
    retreats: list[list[str]]
    explained: str
    stderr: str = field(default="", repr=False)


class Surroundings:
    """What the jobs of this file share: a server, and a compiler that remembers what it has compiled."""

    server: Server
    compiler: str


@pytest.fixture(scope="module", autouse=True)
def surroundings(tmp_path_factory: pytest.TempPathFactory, remembering_compiler: str) -> Iterator[None]:
    Surroundings.compiler = remembering_compiler
    with Server(tmp_path_factory.mktemp("jobs")) as Surroundings.server:
        yield


def settings(cache: Path | str, **changes: str) -> dict[str, str]:
    fixed = {"FXOPT_CACHE_DIR": str(cache), "OMP_NUM_THREADS": "1", "FXOPT_STRICT": "", "FXOPT_CXX": Surroundings.compiler}
    return dict(os.environ) | fixed | changes


def start(cache: Path | str, prelude: str = "", **environment: str) -> Job:
    return Surroundings.server.start(textwrap.dedent(prelude), settings(cache, **environment))


def finish(job: Job) -> Report:
    return report(*job.wait())


def report(status: int, out: str, err: str) -> Report:
    assert status == 0, err
    return Report(**json.loads(out.splitlines()[-1]), stderr=err)


def job(cache: Path | str, prelude: str = "", **environment: str) -> Report:
    return finish(start(cache, prelude, **environment))


def fresh_job(cache: Path, prelude: str = "", folder: Path = ROOT) -> Report:
    """In a new interpreter that imports everything itself, fxopt and the job from `folder`."""
    command = [sys.executable, "-m", "tests.fault_job", textwrap.dedent(prelude)]
    done = subprocess.run(command, cwd=folder, env=settings(cache), capture_output=True, text=True, timeout=300)
    return report(done.returncode, done.stdout, done.stderr)


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


def nothing_wrong(report: Report) -> None:
    all_generated(report)
    assert not report.warnings


def all_sound(cache: Path) -> None:
    """Every file in `cache` is whole and where it belongs."""
    store = ArtifactStore(cache)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert all(store.get(path.stem) for path in cache.glob("entries/*"))
        for path in (*cache.glob("plans/*"), *cache.glob("autograd/*"), *cache.glob("records/*/*"), *cache.glob("usage*")):
            assert path.suffix == ".json"
            assert store.cache.get_document(str(path.parent.relative_to(cache)), path.stem) is not None
    known = {"autograd", "blobs", "claims", "entries", "lock", "plans", "quarantine", "records", "tmp", "usage.json"}
    assert {path.name for path in cache.iterdir()} <= known
    assert not any((cache / "quarantine").iterdir())


@pytest.fixture(scope="module")
def warm(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A cache that holds everything that the job needs."""
    cache = tmp_path_factory.mktemp("warm") / "cache"
    nothing_wrong(job(cache))
    return cache


@pytest.fixture
def cache(warm: Path, tmp_path: Path) -> Path:
    """A warm cache to spoil."""
    return Path(shutil.copytree(warm, tmp_path / "cache"))


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
    body = 'for a in "$@"; do case $a in *.cpp) grep -q fx::exp $a && { echo "error: no exp" >&2; exit 1; };; esac; done'
    report = job(tmp_path / "cache", FXOPT_CXX=compiler(tmp_path, f'{body}\nexec {Surroundings.compiler} "$@"'))
    assert report.kernels > 0 and not report.warnings
    assert report.retreats and all(reason == "error: no exp" for _, reason in report.retreats)
    assert "error: no exp" in report.explained


# --- Triton


def test_triton_does_not_matter_on_a_cpu(cache: Path) -> None:
    nothing_wrong(fresh_job(cache, "import sys; sys.modules['triton'] = None"))


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


@pytest.mark.parametrize(("folder", "mode"), [("", 0o777), ("entries", 0o770)])
def test_a_cache_that_others_may_write_to(cache: Path, folder: str, mode: int) -> None:
    (cache / folder).chmod(mode)
    report = job(cache)
    the_warning(report, str(cache), "other users may write", "chmod go-w")
    all_generated(report)
    assert FROM_PLAN not in report.explained


def test_a_link_where_a_folder_should_be(cache: Path, tmp_path: Path) -> None:
    (cache / "blobs").rename(tmp_path / "elsewhere")
    (cache / "blobs").symlink_to(tmp_path / "elsewhere")
    report = job(cache)
    the_warning(report, str(cache), "blobs/: it is a symbolic link")
    all_generated(report)
    assert FROM_PLAN not in report.explained


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


def test_a_read_only_disk(cache: Path) -> None:
    prelude = f"""
        import errno, os
        real = os.open
        def open(path, flags, *mode, **more):
            if str(path).startswith({str(cache)!r}) and flags & (os.O_WRONLY | os.O_RDWR | os.O_CREAT):
                raise OSError(errno.EROFS, os.strerror(errno.EROFS))
            return real(path, flags, *mode, **more)
        os.open = open
    """
    report = job(cache, prelude)
    the_warning(report, str(cache), "Read-only file system", "FXOPT_CACHE_DIR")
    all_generated(report)


@pytest.mark.parametrize(("option", "reason"), [("size=300k", "No space left"), ("ro", "Read-only file system")])
def test_a_disk_of_its_own(tmp_path: Path, option: str, reason: str) -> None:
    """Where this process may mount one: a compiler that meets a full disk, too, is not blamed."""
    mount = ["mount", "-t", "tmpfs", "-o", option, "none", str(tmp_path)]
    if shutil.which("mount") is None or subprocess.run(mount, capture_output=True).returncode:
        pytest.skip("this process may not mount a file system")
    try:
        report = job(tmp_path / "cache")
    finally:
        subprocess.run(["umount", str(tmp_path)], check=True)
    the_warning(report, str(tmp_path / "cache"), reason, "FXOPT_CACHE_DIR")
    all_generated(report)


def spoil(path: Path, how: int) -> None:
    """Cut off, alter in one bit, or empty a file."""
    data = path.read_bytes()
    middle = len(data) // 2
    path.write_bytes([data[:middle], data[:middle] + bytes([data[middle] ^ 1]) + data[middle + 1 :], b""][how % 3])


@pytest.mark.parametrize("kind", ["entries", "blobs", "plans", "autograd", "records"])
def test_damaged_files_are_set_aside_with_one_warning(cache: Path, kind: str) -> None:
    if kind == "records":
        shutil.rmtree(cache / "plans")  # with a plan nothing needs to be chosen
    for how, path in enumerate(sorted(p for p in (cache / kind).rglob("*") if p.is_file())):
        spoil(path, how)
    report = job(cache)
    the_warning(report, "damaged", kind, str(cache / "quarantine"), "built again")
    all_generated(report)
    shutil.rmtree(cache / "quarantine")
    again = job(cache)
    nothing_wrong(again)
    assert FROM_PLAN in again.explained
    all_sound(cache)


def test_sound_files_that_are_not_kernels(cache: Path) -> None:
    """Checksums hold, but the shared objects are something else: they are built again, not loaded and not believed."""
    store = ArtifactStore(cache)
    for path in cache.glob("entries/*.json"):
        body = json.loads(path.read_bytes())["body"]
        store.put(path.stem, "cpp", body["entry"], b"no machine code", {}, {})
    report = job(cache)
    all_generated(report)
    the_warning(report, "damaged")


def test_eight_processes_on_one_cold_cache(tmp_path: Path) -> None:
    cache, log = tmp_path / "cache", tmp_path / "log"
    body = f'case $* in *.cpp*) echo >>{log};; esac; exec {Surroundings.compiler} "$@"'
    command = compiler(tmp_path, body)
    for report in map(finish, [start(cache, FXOPT_CXX=command) for _ in range(8)]):
        nothing_wrong(report)
    assert len(log.read_text()) <= 2 * len(list(cache.glob("blobs/*"))), "kernels are built about once, not by each"
    all_sound(cache)
    assert not any((cache / "tmp").iterdir())
    after = job(cache, FXOPT_CXX=command)
    nothing_wrong(after)
    assert FROM_PLAN in after.explained


def wait_for(job: Job, cache: Path, pattern: str) -> None:
    deadline = time.monotonic() + 120
    while not any(cache.glob(pattern)):
        assert job.poll() is None and time.monotonic() < deadline
        time.sleep(0.005)


def test_a_process_killed_while_it_compiles(tmp_path: Path) -> None:
    cache = tmp_path / "cache"
    killed = start(cache, FXOPT_CXX=str(REAL))
    wait_for(killed, cache, "tmp/*/build-*")
    killed.kill()
    nothing_wrong(job(cache))
    all_sound(cache)


SLOW_WRITES = """
    import os, time
    real = os.replace
    def replace(source, target):
        time.sleep(0.03)
        real(source, target)
        time.sleep(0.03)
    os.replace = replace
"""


def test_processes_killed_while_they_write(tmp_path: Path) -> None:
    cache = tmp_path / "cache"
    for pattern in ("blobs/*", "entries/*", "plans/*"):
        killed = start(cache, SLOW_WRITES)
        wait_for(killed, cache, pattern)
        time.sleep(random.uniform(0, 0.2))
        killed.kill()
        all_sound(cache)
    last = job(cache)
    nothing_wrong(last)
    all_sound(cache)


# --- versions


@pytest.mark.parametrize("what", ["torch", "compiler"])
def test_another_version_loads_nothing_of_this_one(cache: Path, tmp_path: Path, what: str) -> None:
    other = compiler(tmp_path, f'case $* in *--version*) echo another version;; *) exec {Surroundings.compiler} "$@";; esac')
    prelude = "import torch; torch.__version__ = type(torch.__version__)('99.0')" if what == "torch" else ""
    before = set(cache.glob("entries/*"))
    report = job(cache, prelude, **({"FXOPT_CXX": other} if what == "compiler" else {}))
    nothing_wrong(report)
    assert FROM_PLAN not in report.explained
    assert len(set(cache.glob("entries/*")) - before) == len(before), "every kernel was built"
    again = job(cache)
    nothing_wrong(again)
    assert FROM_PLAN in again.explained, "what was there is not lost"


def test_another_source_of_fxopt_loads_no_plans_of_this_one(cache: Path, tmp_path: Path) -> None:
    no_code = shutil.ignore_patterns("__pycache__")
    shutil.copytree(ROOT / "fxopt", tmp_path / "fxopt", ignore=no_code)
    (tmp_path / "tests").mkdir()
    shutil.copy(ROOT / "tests" / "fault_job.py", tmp_path / "tests")
    with open(tmp_path / "fxopt" / "assemble.py", "a") as file:
        file.write("\n# edited\n")
    prelude = f"""
        import fxopt.codegen.cpp_headers
        assert fxopt.__file__.startswith({str(tmp_path)!r})
        fxopt.codegen.cpp_headers.CALLS_BEFORE = 99
    """
    report = fresh_job(cache, prelude, tmp_path)
    nothing_wrong(report)
    assert FROM_PLAN not in report.explained
    assert not list(cache.glob("quarantine/*"))


# --- the size cap


def age(cache: Path) -> None:
    for path in cache.rglob("*"):
        os.utime(path, (time.time() - 1e5,) * 2)


def test_a_cache_beyond_its_cap(cache: Path) -> None:
    age(cache)
    plans, kernels, records = (set(cache.glob(pattern)) for pattern in ("plans/*", "entries/*", "records/*/*"))
    ArtifactStore(cache).put("ab" * 32, "cpp", "old", b"old", {}, {})
    age(cache)
    nothing_wrong(job(cache, FXOPT_CACHE_SIZE="1", FXOPT_DISABLE="cse"))
    assert not plans & set(cache.glob("plans/*")) and any(cache.glob("plans/*"))
    assert kernels == set(cache.glob("entries/*")), "those in use stay, the other goes"
    assert records <= set(cache.glob("records/*/*"))
    all_sound(cache)


LOST = """
    from fxopt.runtime.artifacts import ArtifactStore
    real, lost = ArtifactStore.METHOD, []
    def method(store, key, *rest, **more):
        found = real(store, key, *rest, **more)
        if found is not None and len(lost) < MOST and key not in lost:
            lost.append(key)
            for entry in (store.directory / "entries").iterdir():
                if found.path.name in entry.read_text():
                    entry.unlink()
            found.path.unlink(missing_ok=True)
        return found
    ArtifactStore.METHOD = method
"""


@pytest.mark.parametrize("most", ["1", "99"])
@pytest.mark.parametrize("method", ["get", "put"])
def test_kernels_evicted_before_they_are_loaded(cache: Path, method: str, most: str) -> None:
    if method == "put":
        shutil.rmtree(cache)
    nothing_wrong(job(cache, LOST.replace("METHOD", method).replace("MOST", most)))
    all_sound(cache)


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
