"""Turns at a device: one process and one thread at a time, nested at will, and never for ever."""

from __future__ import annotations

import fcntl
import itertools
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
import torch

from fxopt.runtime.device_lock import device_identity, seconds_waited, turn

MEASURING = """
import sys, time
from pathlib import Path
from fxopt.runtime.device_lock import turn

for _ in range(15):
    with turn(Path(sys.argv[1]), "gpu-x") as held:
        start = time.monotonic()
        time.sleep(0.01)
        print(held, start, time.monotonic(), flush=True)
"""


def test_measured_sections_of_processes_never_overlap(tmp_path: Path) -> None:
    command = [sys.executable, "-c", MEASURING, str(tmp_path / "locks")]
    processes = [subprocess.Popen(command, stdout=subprocess.PIPE, text=True) for _ in range(2)]
    said = [line.split() for p in processes for line in p.communicate(timeout=120)[0].splitlines()]
    assert [p.returncode for p in processes] == [0, 0]
    assert [held for held, *_ in said] == ["True"] * 30
    sections = sorted((float(start), float(end)) for _, start, end in said)
    assert all(end <= start for (_, end), (start, _) in itertools.pairwise(sections))


def test_those_who_are_to_be_first_wait_for_their_turn_too(tmp_path: Path) -> None:
    command = [sys.executable, "-c", MEASURING, str(tmp_path)]
    with turn(tmp_path, "gpu-x"):
        other = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    sections = []
    for _ in range(15):
        with turn(tmp_path, "gpu-x", first=True) as held:
            start = time.monotonic()
            time.sleep(0.01)
            sections.append((start, time.monotonic()))
            assert held
        time.sleep(0.02)
    said = [line.split() for line in other.communicate(timeout=120)[0].splitlines()]
    sections += [(float(start), float(end)) for _, start, end in said]
    assert len(sections) == 30
    assert all(end <= start for (_, end), (start, _) in itertools.pairwise(sorted(sections)))


def test_one_thread_nests_turns_and_others_wait(tmp_path: Path) -> None:
    inside: list[bool] = []

    def other(patience: float) -> None:
        with turn(tmp_path, "gpu-x", patience) as held:
            inside.append(held)

    before = seconds_waited()
    with turn(tmp_path, "gpu-x") as outer:
        with turn(tmp_path, "gpu-x", patience=0.0) as inner:
            assert outer and inner
        thread = threading.Thread(target=other, args=(0.05,))
        thread.start()
        thread.join()
        assert inside == [False]  # the inner turn's end has not ended the outer one
    other(0.0)
    assert inside == [False, True]
    assert seconds_waited() - before >= 0.05


def test_waiting_ends_after_the_patience_and_with_the_other_holder(tmp_path: Path) -> None:
    other = open(tmp_path / "gpu-x", "w")  # noqa: SIM115  (closed in the middle)
    fcntl.flock(other, fcntl.LOCK_EX)
    start = time.monotonic()
    with turn(tmp_path, "gpu-x", patience=0.1) as held:
        assert not held
        assert time.monotonic() - start >= 0.1
    with turn(tmp_path, "gpu-y", patience=0.0) as held:
        assert held  # another device
    closing = threading.Timer(0.1, other.close)
    closing.start()
    with turn(tmp_path, "gpu-x") as held:
        assert held and other.closed


def test_a_turn_that_raises_is_over(tmp_path: Path) -> None:
    with pytest.raises(KeyError), turn(tmp_path, "gpu-x"):
        raise KeyError
    with open(tmp_path / "gpu-x") as file:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)


def test_where_no_file_can_be_locked_nobody_waits(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with turn(tmp_path / "file", "gpu-x") as held:
        assert not held
    (tmp_path / "gpu-x").symlink_to(tmp_path / "file")
    with turn(tmp_path, "gpu-x") as held:
        assert not held


def test_the_cpu_has_a_name() -> None:
    assert device_identity(torch.device("cpu")) == "cpu"
