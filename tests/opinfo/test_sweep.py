"""The sweep's bookkeeping, with workers that only pretend: deaths, last words, hanging, the end of the time."""

from __future__ import annotations

import math
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from fxopt.target import Target
from tests.opinfo import compiled, judge, sweep, table, worker
from tests.opinfo.samples import Item, Problem
from tests.opinfo.sweep import BatchWorker, Sweep, read_records

PRETEND = """
import json, os, sys, time
say = lambda line: print(json.dumps(line), flush=True)
for line in sys.stdin:
    for op, dtype, mode, layout, number, device in json.loads(line):
        key = f"{op}|{dtype}|{mode}|{layout}|{number}"
        say({"doing": key})
        if op == "lost":
            say({"died": "device-side assert"})
        if op in ("lost", "dies"):
            os._exit(1)
        if op == "hangs":
            time.sleep(100)
        time.sleep(0.02 if op == "slow" else 0)
        say({"key": key, "status": "right", "generated": True})
    say({"done": True})
"""


@pytest.fixture(autouse=True)
def _pretending(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(BatchWorker, "COMMAND", ("-c", PRETEND))


def swept(path: Path, ops: list[str], minutes: float = math.inf, processes: int = 2) -> dict[str, dict[str, Any]]:
    """Records by op, of a sweep in batches of 16."""

    def todo() -> Iterator[Item]:
        yield from (Item(op, "float32", "forward", "given", k, "cuda") for k, op in enumerate(ops))

    Sweep(path, "triton", processes, minutes).run(todo())
    return {key.partition("|")[0] + key.rpartition("|")[2]: record for key, record in read_records(path).items()}


def test_a_death_costs_one_item_and_its_reason_is_kept(tmp_path: Path) -> None:
    ops = ["fine"] * 40
    ops[3], ops[20] = "dies", "lost"
    found = swept(tmp_path / "records", ops)
    assert len(found) == 40
    assert found["dies3"]["status"] == found["lost20"]["status"] == "crash"
    assert found["dies3"]["why"] == "the process died or hung" and found["lost20"]["why"] == "device-side assert"
    assert sum(r["status"] == "right" for r in found.values()) == 38


def test_a_worker_that_says_nothing_is_given_up(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sweep.PATIENCE, "triton", 2.0)
    found = swept(tmp_path / "records", ["fine", "hangs", "fine"], processes=1)
    assert [found[k]["status"] for k in ("fine0", "hangs1", "fine2")] == ["right", "crash", "right"]


def test_no_batch_is_begun_when_the_time_is_up(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sweep, "GRACE", 1.0)
    began = time.monotonic()
    found = swept(tmp_path / "records", ["slow"] * 2000 + ["hangs"], minutes=2 / 60)
    assert time.monotonic() - began < 10
    assert 16 <= len(found) < 2000 and all(r["status"] == "right" for r in found.values())
    assert len(found) % 16 == 0, "batches that were begun are finished"


def test_what_is_cut_off_is_nobodys_fault(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sweep, "GRACE", 0.5)
    found = swept(tmp_path / "records", ["fine", "hangs"], minutes=1 / 60, processes=1)
    assert list(found) == ["fine0"]


def test_workers_that_do_not_start_are_no_fault_of_the_items(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(BatchWorker, "COMMAND", ("-c", "import no_such_module"))
    with pytest.raises(RuntimeError, match="No module named 'no_such_module'"):
        swept(tmp_path / "records", ["fine"] * 40)
    assert not read_records(tmp_path / "records")


def test_items_that_cannot_be_listed_end_the_sweep(tmp_path: Path) -> None:
    def todo() -> Iterator[Item]:
        raise ValueError("no such op")
        yield

    with pytest.raises(RuntimeError, match="cannot be listed: ValueError: no such op"):
        Sweep(tmp_path / "records", "triton", 2).run(todo())


def test_a_batch_compiles_its_kernels_for_the_device_of_its_samples(monkeypatch: pytest.MonkeyPatch) -> None:
    """As far as that goes without a GPU: a sample with fake CUDA tensors is captured, and its kernels are printed."""
    given: list[tuple[str, list[str]]] = []

    def compile_kernels(sources: list[Any], target: Target, store: Any) -> None:
        given.append((target.key, [s.language for s in sources]))

    monkeypatch.setattr(Target, "current", staticmethod(lambda device: Target.cuda(90)))
    monkeypatch.setattr(compiled, "compile_kernels", compile_kernels)
    problem = Problem.of(Item("softmax", "float32", "forward", "given", 1))
    with FakeTensorMode(allow_non_fake_inputs=True):
        problem.tensors = [torch.empty(t.shape, device="cuda:0") for t in problem.tensors]
        batch = compiled.Batch("triton")
        call, outcome = batch.add(problem, dynamo=False)
        results = judge.evaluate(problem, call).outputs
        assert [r.device for r in results] == [torch.device("cuda", 0)] and outcome.graphs == 1
        assert all(t.device == torch.device("cuda", 0) for t in judge.nudged(problem, 1).tensors)
    batch.compile()
    assert given == [("cuda-sm90", ["triton"])]


def test_an_item_that_ends_the_cuda_context_ends_the_batch(monkeypatch: pytest.MonkeyPatch) -> None:
    def lost() -> None:
        raise RuntimeError("CUDA error: device-side assert triggered\nmore")

    monkeypatch.setattr(torch.cuda, "synchronize", lost)
    item = Item("add", "float32", "forward", "given", 0)
    done = {"key": item.key, "status": "error", "why": "run: it failed"}
    worker.check_device(item, done)
    with pytest.raises(worker.DeviceLost, match="run: it failed: RuntimeError: CUDA error: device-side assert triggered"):
        worker.check_device(Item("add", "float32", "forward", "given", 0, "cuda"), done)


def test_records_that_are_not_there_leave_the_tables(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sys.argv", ["table", str(tmp_path / "misspelt.jsonl"), str(tmp_path / "tables")])
    with pytest.raises(SystemExit):
        table.main()
    assert not (tmp_path / "tables").exists()


def test_ops_that_there_are_not(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr("sys.argv", ["sweep", "--ops", "add", "sofmax"])
    with pytest.raises(SystemExit):
        sweep.main()
    assert "no op is called 'sofmax'; did you mean 'softmax'?" in capsys.readouterr().err
