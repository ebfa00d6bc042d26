"""Dealing cases to worker processes: what fits where, and what a dead worker costs. The workers here are stand-ins."""

from __future__ import annotations

import math
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

from benchmarks.dealing import Dealer, Pool, RawRow, visible_devices

# Runs "contenders" of a case in order; a case says which of them end the process, break it, run out of memory or hang.
WORKER = """
import json, os, sys, time
print('{"ready": true}', flush=True)
for line in sys.stdin:
    case = json.loads(line)
    with open(case["log"], "a") as log:
        log.write(f"{os.getpid()} {os.environ['PLACE']} {case['workload']} {sorted(case['without'])}\\n")
    rows, broken = [], ""
    for name in ("eager", "liger", "fxopt"):
        print(json.dumps({"progress": "compiling " + name, "contender": name}), flush=True)
        skipped = case["without"].get(name, "")
        if not skipped and case.get("dies") == name:
            sys.exit("illegal memory access")
        if not skipped and case.get("breaks") == name:
            broken, skipped = name, "failed: CUDA error"
        if case.get("hungry") and not os.path.exists(case["log"] + ".fed"):
            open(case["log"] + ".fed", "w").close()
            skipped = "failed: OutOfMemoryError: 16 GiB"
        if case.get("hangs"):
            time.sleep(600)
        rows.append({"contender": name, "skipped": skipped})
    print(json.dumps({"rows": rows, "broken": broken}), flush=True)
    if broken:
        break
"""


class Run:
    """What a pool of stand-in workers made of `cases`."""

    def __init__(self, tmp_path: Path, cases: list[dict[str, Any]], *, places: int = 1, worker: str = WORKER) -> None:
        self.rows: dict[str, list[RawRow]] = {}
        self.said: list[str] = []
        seconds = 3.0 if any("hangs" in case for case in cases) else 60.0
        log = tmp_path / "log"
        log.touch()
        environments = [{"PLACE": str(k)} for k in range(places)]
        pool = Pool(("-c", worker), environments, 2, time.monotonic() + seconds, self.failed, self.said.append)

        def done(number: int, rows: list[RawRow]) -> None:
            assert cases[number]["workload"] not in self.rows
            self.rows[cases[number]["workload"]] = rows

        pool.run([{**case, "log": str(log)} for case in cases], [1.0] * len(cases), math.inf, done)
        self.log = [line.split(" ", 3) for line in log.read_text().splitlines()]

    @staticmethod
    def failed(request: Mapping[str, Any], why: Mapping[str, str]) -> list[RawRow]:
        return [{"contender": name, "skipped": why.get(name, "lost")} for name in ("eager", "liger", "fxopt")]

    def skipped(self, workload: str) -> dict[str, str]:
        return {row["contender"]: row["skipped"] for row in self.rows[workload]}


def test_all_cases_are_run_once_and_by_all_workers(tmp_path: Path) -> None:
    run = Run(tmp_path, [{"workload": f"w{k}"} for k in range(40)], places=2)
    assert set(run.rows) == {f"w{k}" for k in range(40)}
    assert sorted(workload for _, _, workload, _ in run.log) == sorted(run.rows)
    assert {place for _, place, _, _ in run.log} == {"0", "1"}


def test_a_worker_that_dies_costs_its_case_one_contender(tmp_path: Path) -> None:
    cases = [{"workload": "bad", "dies": "liger"}, *({"workload": f"w{k}"} for k in range(6))]
    run = Run(tmp_path, cases)
    assert len(run.rows) == 7
    assert run.skipped("bad") == {
        "eager": "", "liger": "failed: the process ended with 1: illegal memory access", "fxopt": ""
    }  # fmt: skip
    assert [without for _, _, workload, without in run.log if workload == "bad"] == ["[]", "['liger']"]
    assert all(set(run.skipped(f"w{k}").values()) == {""} for k in range(6))
    assert any("illegal memory access" in text for text in run.said)


def test_a_worker_whose_device_is_broken_is_replaced(tmp_path: Path) -> None:
    run = Run(tmp_path, [{"workload": "bad", "breaks": "fxopt"}, {"workload": "good"}])
    assert run.skipped("bad") == {"eager": "", "liger": "", "fxopt": "failed: CUDA error"}
    assert run.skipped("good")["fxopt"] == ""
    first, second = [pid for pid, _, workload, _ in run.log if workload == "bad"]
    assert first != second


def test_what_ran_out_of_memory_runs_once_more(tmp_path: Path) -> None:
    run = Run(tmp_path, [{"workload": "large", "hungry": True}, {"workload": "small"}])
    assert set(run.skipped("large").values()) == {""}
    assert len([1 for _, _, workload, _ in run.log if workload == "large"]) == 2


def test_at_the_deadline_begun_cases_are_cut_off(tmp_path: Path) -> None:
    start = time.monotonic()
    run = Run(tmp_path, [{"workload": "quick"}, {"workload": "endless", "hangs": True}])
    assert time.monotonic() - start < 30
    assert set(run.rows) == {"quick"}


def test_workers_that_cannot_start_end_the_run(tmp_path: Path) -> None:
    run = Run(tmp_path, [{"workload": "w"}], worker="raise SystemExit('no such module')")
    assert run.rows == {}
    assert any("no such module" in text for text in run.said)


def test_what_does_not_fit_beside_others_waits_for_room() -> None:
    dealer = Dealer([60.0, 50.0, 10.0, 200.0], room=70.0)
    later = time.monotonic() + 60
    first, small = dealer.take(0, later), dealer.take(0, later)
    assert first is not None and small is not None
    assert (first.number, small.number) == (0, 2)
    other = dealer.take(1, later)
    assert other is not None and other.number == 1
    assert dealer.take(0, time.monotonic() + 0.05) is None  # needs a place of its own
    dealer.finish(0, first)
    dealer.finish(0, small)
    alone = dealer.take(0, later)
    assert alone is not None and alone.number == 3
    for place, assigned in ((0, alone), (1, other)):
        dealer.finish(place, assigned)
    assert dealer.take(0, later) is None


def test_devices_are_those_that_this_process_sees(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    assert visible_devices(2) == ["0", "1"]
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "3,GPU-ab")
    assert visible_devices(2) == ["3", "GPU-ab"]
    assert visible_devices(1) == ["3"]
