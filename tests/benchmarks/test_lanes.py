"""Jobs side by side: shares of cores and GPUs, order, and what a job inherits."""

from __future__ import annotations

import os
import subprocess
import sys
import threading

import pytest

from benchmarks.lanes import Lane, deal, lanes


def test_lanes_share_cores_and_take_gpus_in_turn(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(2, 12)))
    shares = lanes(4, devices=("5", "7"))
    assert [sorted(lane.cores) for lane in shares] == [[2, 3], [4, 5], [6, 7], [8, 9]]
    assert [lane.environment["CUDA_VISIBLE_DEVICES"] for lane in shares] == ["5", "7", "5", "7"]
    assert [(sorted(lane.cores), lane.environment) for lane in lanes(2, 3)] == [([2, 3, 4], {}), ([5, 6, 7], {})]
    for count, cores in ((11, 0), (2, 6)):
        with pytest.raises(ValueError, match="do not fit on 10 cores"):
            lanes(count, cores)


def test_jobs_are_dealt_in_order_to_whoever_is_free() -> None:
    among = [Lane(frozenset(os.sched_getaffinity(0)), {"LANE": name}) for name in "ab"]
    long, done = threading.Event(), list[tuple[int, str]]()

    def run(job: int, lane: Lane) -> None:
        if job == 0:
            assert long.wait(60)
        done.append((job, lane.environment["LANE"]))
        if job == 3:
            long.set()

    deal(range(4), among, run)
    assert [job for job, _ in done] == [1, 2, 3, 0]
    assert {lane for job, lane in done if job} == {"b"}


def test_a_failed_job_is_raised_after_all_others() -> None:
    done: list[int] = []

    def run(job: int, lane: Lane) -> None:
        if job == 0:
            raise LookupError("no such model")
        done.append(job)

    with pytest.raises(LookupError, match="no such model"):
        deal(range(3), lanes(1), run)
    assert done == [1, 2]


def test_processes_of_a_job_have_its_cores_and_the_caller_all_of_them() -> None:
    before = os.sched_getaffinity(0)
    heard: list[str] = []

    def run(job: int, lane: Lane) -> None:
        command = [sys.executable, "-c", "import os; print(sorted(os.sched_getaffinity(0)))"]
        heard.append(subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip())

    deal([0], [Lane(frozenset([min(before)]), {})], run)
    assert heard == [str([min(before)])]
    assert os.sched_getaffinity(0) == before
