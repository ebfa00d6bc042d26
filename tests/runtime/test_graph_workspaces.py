"""When cuBLAS's workspaces may be freed around a capture."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any

import pytest
import torch

from fxopt.runtime import graph_driver
from fxopt.runtime.graph_driver import _Workspaces


class Pool:
    id = (0, 5)


class Allocator:
    """Counts how often workspaces were freed; `segments` are the pools that it has memory in."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.freed = 0
        self.segments: list[tuple[int, int]] = [(0, 0)]
        monkeypatch.setattr(graph_driver, "_clear_workspaces", self.clear)
        monkeypatch.setattr(torch.cuda, "memory_snapshot", lambda: [{"segment_pool_id": s} for s in self.segments])

    def clear(self) -> None:
        self.freed += 1


@pytest.fixture
def allocator(monkeypatch: pytest.MonkeyPatch) -> Allocator:
    monkeypatch.setattr(threading, "enumerate", lambda: [threading.current_thread()])  # none of the test runner's
    return Allocator(monkeypatch)


def test_none_is_left_before_and_after_a_capture(allocator: Allocator) -> None:
    workspaces = _Workspaces()
    for _ in range(2):
        workspaces.drop_before(0)
        workspaces.drop_after(0)
    assert allocator.freed == 4


def in_another_thread(work: Callable[[], Any]) -> None:
    thread = threading.Thread(target=work)
    thread.start()
    thread.join()


def test_a_capture_in_another_thread_ends_it(allocator: Allocator) -> None:
    workspaces = _Workspaces()
    in_another_thread(lambda: workspaces.drop_before(0))
    workspaces.drop_before(0)
    workspaces.drop_after(0)
    assert allocator.freed == 0


@pytest.mark.parametrize(("name", "freed"), [("loader", 0), ("fxopt_replay", 1)])
def test_other_threads(allocator: Allocator, name: str, freed: int, monkeypatch: pytest.MonkeyPatch) -> None:
    other = threading.Thread(name=name)
    monkeypatch.setattr(threading, "enumerate", lambda: [threading.current_thread(), other])
    _Workspaces().drop_before(0)
    assert allocator.freed == freed


def test_pools_of_others(allocator: Allocator, monkeypatch: pytest.MonkeyPatch) -> None:
    own = Pool()
    monkeypatch.setattr(graph_driver, "_pools", {own})
    allocator.segments.append(own.id)
    workspaces = _Workspaces()
    workspaces.drop_before(0)
    assert allocator.freed == 1
    allocator.segments.append((0, 9))
    workspaces.drop_before(0)
    assert allocator.freed == 1
    allocator.segments.pop()
    workspaces.drop_before(0)
    assert allocator.freed == 1, "a graph may use one that lies in another's pool"


def test_a_torch_that_cannot_free_them(allocator: Allocator, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(graph_driver, "_clear_workspaces", None)
    workspaces = _Workspaces()
    workspaces.drop_before(0)
    workspaces.drop_after(0)
    assert allocator.freed == 0
