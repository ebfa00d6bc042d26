"""Whether nobody else may be using CUDA's libraries, with autograd's thread acted out: a CPU's backward needs none."""

from __future__ import annotations

import threading
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from fxopt.runtime import solitude
from fxopt.runtime.solitude import is_alone, see_backward


class Task:
    """Which threads autograd is at work in."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.busy = set[int]()
        monkeypatch.setattr(solitude, "_graph_task", lambda: 0 if threading.get_ident() in self.busy else -1)

    def backward(self, work: Callable[[], Any], monkeypatch: pytest.MonkeyPatch, waiting: bool = True) -> Any:
        """The result of `work` in a thread of autograd's, while this one waits for it where `backward` does."""
        found: list[Any] = []
        done = threading.Lock()
        done.acquire()

        def run() -> None:
            self.busy.add(threading.get_ident())
            try:
                while waiting and not solitude._waits(threading.main_thread().ident):
                    pass
                found.append(work())
            finally:
                self.busy.clear()
                done.release()

        threading.Thread(target=run, name="Dummy-1").start()
        if waiting:  # by a call that has no frame of its own
            engine = SimpleNamespace(_execution_engine=SimpleNamespace(run_backward=done.acquire))
            monkeypatch.setattr(torch.autograd.graph, "Variable", engine)
            torch.autograd.graph._engine_run_backward(True)  # type: ignore[arg-type]
        else:
            done.acquire()
        return found[0]


@pytest.fixture
def task(monkeypatch: pytest.MonkeyPatch) -> Task:
    runner = [t for t in threading.enumerate() if t is not threading.main_thread()]
    listed = threading.enumerate
    monkeypatch.setattr(threading, "enumerate", lambda: [t for t in listed() if t not in runner])
    monkeypatch.setattr(solitude, "_autograds", set())
    monkeypatch.setattr(solitude, "_has_context", lambda index: index == 0)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    return Task(monkeypatch)


def test_the_main_thread(task: Task) -> None:
    assert is_alone(0)
    task.busy.add(threading.get_ident())
    assert not is_alone(0), "the threads of other devices are at work as well"


@pytest.mark.parametrize(("name", "alone"), [("loader", False), ("fxopt_replay", True)])
def test_another_thread(task: Task, name: str, alone: bool) -> None:
    stop = threading.Event()
    other = threading.Thread(target=stop.wait, name=name)
    other.start()
    try:
        assert is_alone(0) == alone
    finally:
        stop.set()
        other.join()


def test_the_thread_that_redraws_progress_bars(task: Task) -> None:
    tqdm = pytest.importorskip("tqdm")
    monitor = tqdm.TMonitor(tqdm.tqdm, 60)
    try:
        assert monitor in threading.enumerate() and is_alone(0)
    finally:
        monitor.exit()


def test_autograds_thread_while_the_main_one_waits(task: Task, monkeypatch: pytest.MonkeyPatch) -> None:
    assert task.backward(lambda: is_alone(0), monkeypatch)
    assert not task.backward(lambda: is_alone(1), monkeypatch), "device 0 is in use, too"
    assert not task.backward(lambda: is_alone(0), monkeypatch, waiting=False)


def test_autograds_thread_is_idle_outside_of_a_backward(task: Task, monkeypatch: pytest.MonkeyPatch) -> None:
    stop, found = threading.Event(), []
    monkeypatch.setattr(solitude, "_waits", lambda thread: True)

    def worker() -> None:
        task.busy.add(threading.get_ident())
        see_backward()
        task.busy.clear()
        found.append(True)
        stop.wait()

    thread = threading.Thread(target=worker, name="Dummy-2")
    thread.start()
    try:
        while not found:
            pass
        assert is_alone(0)
        monkeypatch.setattr(solitude, "_autograds", set())
        assert not is_alone(0)
    finally:
        stop.set()
        thread.join()


def test_a_thread_of_nobodys_is_not_alone(task: Task, monkeypatch: pytest.MonkeyPatch) -> None:
    found: list[bool] = []
    thread = threading.Thread(target=lambda: (see_backward(), found.append(is_alone(0))))
    thread.start()
    thread.join()
    assert found == [False] and not solitude._autograds
