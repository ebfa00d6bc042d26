"""Compile workers: results in order, and whatever dies, hangs or raises costs its own job only."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import textwrap
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from fxopt.codegen import workers
from fxopt.codegen.workers import Outcome, Pool, WorkersUnavailable, worker_count
from fxopt.runtime import solitude

JOBS = "tests.codegen.worker_jobs"


@pytest.fixture
def pool() -> Iterator[Pool]:
    made = Pool(f"{JOBS}:job", f"{JOBS}:warm_up", 2, job_seconds=5.0)
    yield made
    made.close()


def job(kind: str, value: Any = None) -> dict[str, Any]:
    return {"kind": kind, "value": value}


def test_results_come_in_order(pool: Pool) -> None:
    large = "x" * 100_000  # more than a pipe holds
    outcomes = pool.run([job("double", f"{i}{large}") for i in range(12)])
    assert outcomes == [Outcome([f"{i}{large}"] * 2) for i in range(12)]
    assert pool.run([job("warm")]) == [Outcome(True)]
    assert pool.run([]) == []


def test_a_job_is_begun_while_the_next_one_is_made(pool: Pool, tmp_path: Path) -> None:
    def jobs() -> Iterator[dict[str, Any]]:
        yield job("touch", str(tmp_path / "begun"))
        deadline = time.monotonic() + 60
        while not (tmp_path / "begun").exists() and time.monotonic() < deadline:
            time.sleep(0.01)
        yield job("double", (tmp_path / "begun").exists())

    assert pool.run(jobs()) == [Outcome("touched"), Outcome([True, True])]


def test_threads_that_talk_to_the_helper_are_known_to_call_no_library(pool: Pool) -> None:
    """Attention is timed in CUDA graphs while kernels are compiled, and workspaces are freed around captures only where no
    other thread may be using one."""
    before, meanwhile = threading.enumerate(), list[threading.Thread]()

    def jobs() -> Iterator[dict[str, Any]]:
        yield job("double", 1)
        meanwhile.extend(t for t in threading.enumerate() if t not in before)
        yield job("double", 2)

    pool.run(jobs())
    assert len(meanwhile) == 2 and all(map(solitude._calls_no_library, meanwhile))


def test_an_outcome_is_heard_while_others_are_awaited(pool: Pool, tmp_path: Path) -> None:
    heard: list[tuple[int, Any]] = []

    def hear(number: int, outcome: Outcome) -> list[Any]:
        heard.append((number, outcome.value))
        (tmp_path / "heard").touch()
        return []

    pool.run([job("await", str(tmp_path / "heard")), job("double", 1)], hear)
    assert heard == [(1, [1, 1]), (0, True)]


def test_an_outcome_may_lead_to_more_jobs(pool: Pool, tmp_path: Path) -> None:
    def hear(number: int, outcome: Outcome) -> list[Any]:
        if number == 3:
            (tmp_path / "third").touch()
        return [job("double", number + 1)] if 0 < number < 3 else []

    outcomes = pool.run([job("await", str(tmp_path / "third")), job("double", 1)], hear)
    assert [o.value for o in outcomes] == [True, [1, 1], [2, 2], [3, 3]]


def test_jobs_that_an_outcome_has_led_to_outlive_the_helper(pool: Pool, tmp_path: Path) -> None:
    assert pool.run([job("double", 1)]) == [Outcome([1, 1])]

    def hear(number: int, outcome: Outcome) -> list[Any]:
        if number == 0:
            os.killpg(pool._process.pid, signal.SIGKILL)  # type: ignore[union-attr]
            return [job("double", 5)]
        return []

    assert pool.run([job("double", 4)], hear) == [Outcome([4, 4]), Outcome([5, 5])]


def test_an_error_in_hearing_ends_the_batch(pool: Pool) -> None:
    def hear(number: int, outcome: Outcome) -> None:
        raise KeyError("hung kernel")

    with pytest.raises(KeyError, match="hung kernel"):
        pool.run([job("hang"), job("double", 1)], hear)
    assert pool.run([job("double", 4)]) == [Outcome([4, 4])]


def test_an_error_in_making_jobs_ends_the_batch(pool: Pool) -> None:
    def jobs() -> Iterator[dict[str, Any]]:
        yield job("hang")
        raise KeyError("no kernel")

    with pytest.raises(KeyError, match="no kernel"):
        pool.run(jobs())
    assert pool.run([job("double", 4)]) == [Outcome([4, 4])]


def test_several_workers_at_once(pool: Pool) -> None:
    pids = {o.value for o in pool.run([job("pid") for _ in range(6)])}
    assert len(pids) == 2 and os.getpid() not in pids


def test_what_goes_wrong_stays_with_its_job(pool: Pool, tmp_path: Path) -> None:
    bad, dead, risen, good = pool.run(
        [job("raise", "bad kernel"), job("die"), job("die once", str(tmp_path / "m")), job("double", 1)]
    )
    assert bad.error is not None
    assert bad.error.startswith("ValueError: bad kernel") and "line 3 is wrong" in bad.error
    assert dead == Outcome(error="the compile worker died")
    assert risen == Outcome("survived") and good == Outcome([1, 1])


def test_a_hanging_job_is_ended() -> None:
    pool = Pool(f"{JOBS}:job", None, 2, job_seconds=0.5)
    hung, fine = pool.run([job("hang"), job("double", 2)])
    pool.close()
    assert hung.error is not None
    assert "took longer than" in hung.error and fine == Outcome([2, 2])


def children(pid: int) -> list[str]:
    return Path(f"/proc/{pid}/task/{pid}/children").read_text().split()


def test_an_idle_helper_rehearses_and_forks_its_workers_ahead() -> None:
    pool = Pool(f"{JOBS}:job", None, 3, rehearsal=f"{JOBS}:rehearse")
    pool.start()
    assert pool._process is not None
    deadline = time.monotonic() + 60
    while len(children(pool._process.pid)) < 3 and time.monotonic() < deadline:
        time.sleep(0.02)
    found = [o.value for o in pool.run([job("rehearsed") for _ in range(4)])]
    pool.close()
    assert found == [[found[0][1]] * 2] * 4  # once, in the helper


def test_a_broken_rehearsal_costs_nothing() -> None:
    pool = Pool(f"{JOBS}:job", None, 1, rehearsal=f"{JOBS}:broken_warm_up")
    assert pool.run([job("double", 5)]) == [Outcome([5, 5])]
    pool.close()


def test_a_killed_helper_is_replaced(pool: Pool, tmp_path: Path) -> None:
    assert pool.run([job("kill helper", str(tmp_path / "m")), job("double", 3)]) == [Outcome("survived"), Outcome([3, 3])]


def test_a_helper_that_cannot_work_says_why() -> None:
    with pytest.raises(WorkersUnavailable, match="no such compiler"):
        Pool(f"{JOBS}:job", f"{JOBS}:broken_warm_up", 1).run([job("warm")])


def test_no_interpreter_to_start(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "executable", "/no/such/python")
    with pytest.raises(WorkersUnavailable, match="/no/such/python"):
        Pool(f"{JOBS}:job", None, 1).run([job("warm")])


def test_helper_and_workers_end_with_their_user(tmp_path: Path) -> None:
    """Even when the user's process is killed while a job runs."""
    script = f"""
        from fxopt.codegen.workers import Pool
        pool = Pool("{JOBS}:job", None, 1)
        print(pool._process or "", flush=True)
        (outcome,) = pool.run([dict(kind="pid")])
        print(pool._process.pid, outcome.value, flush=True)
        pool.run([dict(kind="hang")])
    """
    user = subprocess.Popen(
        [sys.executable, "-c", textwrap.dedent(script)], stdout=subprocess.PIPE, text=True, cwd=Path.cwd()
    )
    assert user.stdout is not None
    user.stdout.readline()
    helper, worker = map(int, user.stdout.readline().split())
    user.send_signal(signal.SIGKILL)
    user.wait()
    deadline = time.monotonic() + 10
    while time.monotonic() < deadline and (_runs(helper) or _runs(worker)):
        time.sleep(0.05)
    assert not _runs(helper) and not _runs(worker)


def _runs(pid: int) -> bool:
    try:
        state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except FileNotFoundError:
        return False
    return state != "Z"


def test_worker_count(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FXOPT_WORKERS", "3")
    assert worker_count() == 3
    monkeypatch.delenv("FXOPT_WORKERS")
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(64)))
    assert worker_count() == workers.MOST_WORKERS
    for cores, expected in ((2, 2), (4, 4), (16, 15)):
        monkeypatch.setattr(os, "sched_getaffinity", lambda _, n=cores: set(range(n)))
        assert worker_count() == expected
