"""The C++ compiler as a program that may be missing, broken, killed or stuck."""

from __future__ import annotations

import os
import subprocess
import threading
import time
from pathlib import Path

import pytest

from fxopt.codegen import cxx


@pytest.fixture(autouse=True)
def _forgetful(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cxx, "_broken", {})
    cxx.version.cache_clear()


def script(folder: Path, body: str) -> tuple[str, ...]:
    path = folder / f"compiler{len(list(folder.iterdir()))}"
    path.write_text(f"#!/bin/sh\n{body}\n")
    path.chmod(0o700)
    return (str(path),)


def is_running(pid: int) -> bool:
    done = subprocess.run(["ps", "-o", "stat=", "-p", str(pid)], capture_output=True, text=True)
    return bool(done.stdout.strip()) and not done.stdout.startswith("Z")


def test_a_command_that_hangs_is_ended_with_its_children(tmp_path: Path) -> None:
    note = tmp_path / "pid"
    command = script(tmp_path, f"sleep 600 & echo $! > {note}; wait")
    assert cxx.execute(command, 1.0) == ("", "it did not finish within 1 s")
    deadline = time.monotonic() + 10
    while is_running(int(note.read_text())):
        assert time.monotonic() < deadline, "the child outlives its parent"
        time.sleep(0.05)


def test_running_commands_end_when_the_block_is_interrupted(tmp_path: Path) -> None:
    command = script(tmp_path, "sleep 600")
    results: list[tuple[str, str | None]] = []
    thread = threading.Thread(target=lambda: results.append(cxx.execute(command, 600.0)))

    def interrupted() -> None:
        with cxx.ended_with_the_block():
            thread.start()
            while not cxx._running:
                time.sleep(0.01)
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interrupted()
    thread.join(timeout=30)
    assert results == [("", "it was ended by signal 9")]


@pytest.mark.parametrize(
    ("body", "reason"),
    [
        ("echo 'fatal error: no such thing' >&2; exit 1", "fatal error: no such thing"),
        ("echo 'In file included from x' >&2; echo 'y.cpp:1: error: no' >&2; exit 1", "y.cpp:1: error: no"),
        ("exit 3", "exit status 3"),
        ("kill -SEGV $$", "it was ended by signal 11"),
    ],
)
def test_reasons_are_short_and_telling(tmp_path: Path, body: str, reason: str) -> None:
    assert cxx.execute(script(tmp_path, body), 30.0)[1] == reason


def test_what_cannot_be_executed() -> None:
    _, reason = cxx.execute(["/no/such/compiler"], 1.0)
    assert reason is not None and "could not be run" in reason


def test_a_compiler_that_works_is_not_blamed() -> None:
    compiler = cxx.find_compiler()
    assert compiler is not None, "the tests need a C++ compiler"
    assert cxx.blame(compiler) is None and cxx.unusable() is None and cxx.version(compiler)


def test_a_broken_compiler_is_found_out_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    log = tmp_path / "log"
    (command,) = script(tmp_path, f"echo $* >> {log}; case $* in --version) echo mock 1.0;; *) exit 7;; esac")
    monkeypatch.setenv("FXOPT_CXX", command)
    assert cxx.unusable() is None, "nothing speaks against it yet"
    reason = cxx.blame((command,))
    assert reason is not None and command in reason and "exit status 7" in reason and "FXOPT_CXX" in reason
    assert cxx.unusable() == reason == cxx.blame((command,))
    assert len(log.read_text().splitlines()) == 2, "one version, one probe"


def test_success_without_a_file_is_not_believed(tmp_path: Path) -> None:
    assert "writes no file" in str(cxx.blame(script(tmp_path, "exit 0")))


def test_a_compiler_that_never_tells_its_version(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cxx, "PROBE_SECONDS", 0.5)
    monkeypatch.setenv("FXOPT_CXX", script(tmp_path, "sleep 600")[0])
    assert "did not finish" in str(cxx.unusable())


def test_a_forced_compiler_that_does_not_exist_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FXOPT_CXX", "/no/such/compiler -O2")
    assert cxx.find_compiler() is None and "/no/such/compiler" in str(cxx.unusable())
    monkeypatch.setenv("FXOPT_CXX", 'unbalanced "quote')
    assert cxx.find_compiler() is None and cxx.unusable() is not None


def test_the_search_falls_through_to_the_first_that_exists(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("FXOPT_CXX", raising=False)
    monkeypatch.setenv("CXX", "/no/such/compiler")
    monkeypatch.setenv("PATH", str(tmp_path))
    assert cxx.find_compiler() is None and cxx.unusable() == cxx.NOT_FOUND
    (tmp_path / "clang++").write_text("#!/bin/sh\n")
    os.chmod(tmp_path / "clang++", 0o700)
    assert cxx.find_compiler() == ("clang++",)


def test_a_forked_process_leaves_the_commands_of_its_parent_alone(tmp_path: Path) -> None:
    """A child that ends, or is interrupted, ends what it runs itself."""
    go = tmp_path / "go"
    command = script(tmp_path, f"while [ ! -e {go} ]; do sleep 0.05; done; echo done")
    results: list[tuple[str, str | None]] = []
    thread = threading.Thread(target=lambda: results.append(cxx.execute(command, 60.0)))
    thread.start()
    while not cxx._running:
        time.sleep(0.01)
    child = os.fork()
    if child == 0:
        cxx.end_all()
        os._exit(0)
    os.waitpid(child, 0)
    go.touch()
    thread.join(timeout=30)
    assert results == [("done\n", None)]
