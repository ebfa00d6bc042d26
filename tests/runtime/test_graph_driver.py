"""What is asked of the CUDA driver when captured runs are dropped, against one that knows which context is current."""

from __future__ import annotations

import ctypes
from typing import Any

import pytest

from fxopt.runtime.graph_driver import CapturedGraph, GraphDriver

OWN, OTHER = 7, 8


class Lib:
    """A driver's library, of one thread in which the contexts `stack` are current. `waits` has each wait's context."""

    def __init__(self, *stack: int) -> None:
        self.stack, self.waits, self.destroyed = list(stack), list[tuple[str, int]](), 0
        self.is_gone = False

    def _waited(self, what: str) -> int:
        if not self.stack:
            return 201
        self.waits.append((what, self.stack[-1]))
        return 0

    def cuCtxPushCurrent_v2(self, context: Any) -> int:
        if not self.is_gone:
            self.stack.append(context.value)
        return 709 * self.is_gone

    def cuCtxPopCurrent_v2(self, context: Any) -> int:
        context._obj.value = self.stack.pop()
        return 0

    def cuStreamSynchronize(self, stream: Any) -> int:
        assert stream is None
        return self._waited("stream")

    def cuCtxSynchronize(self) -> int:
        return self._waited("context")

    def cuThreadExchangeStreamCaptureMode(self, mode: Any) -> int:
        return 0

    cuEventSynchronize = cuThreadExchangeStreamCaptureMode

    def cuGraphExecDestroy(self, executable: Any) -> int:
        self.destroyed += 1
        return 0

    def cuGraphDestroy(self, graph: Any) -> int:
        return 0

    def cuGraphLaunch(self, executable: Any, stream: Any) -> int:
        return 0


def driver_of(lib: Lib) -> GraphDriver:
    """The device whose context is OWN, all of whose turns were on the default stream."""
    driver = object.__new__(GraphDriver)
    driver._lib, driver._context, driver._event = lib, ctypes.c_void_p(OWN), ctypes.c_void_p(1)
    driver.in_line = True
    return driver


@pytest.mark.parametrize("stack", [(), (OWN,), (OTHER,)], ids=["no context", "its own", "another device's"])
def test_a_graph_is_destroyed_after_the_replays_of_its_own_device(stack: tuple[int, ...]) -> None:
    """Whatever device is current where it is collected: the default stream is that of a context."""
    lib = Lib(*stack)
    driver = driver_of(lib)
    graph = CapturedGraph(lib, ctypes.c_void_p(2), ctypes.c_void_p(3), None, driver._after_turns, driver._call)
    del graph
    assert lib.waits == [("stream", OWN)] and lib.destroyed == 1 and lib.stack == [*stack]


@pytest.mark.parametrize("stack", [(), (OTHER,)], ids=["no context", "another device's"])
def test_memory_of_a_pool_is_let_go_of_when_its_own_device_has_nothing_to_do(stack: tuple[int, ...]) -> None:
    lib = Lib(*stack)
    driver_of(lib)._settle()
    assert lib.waits == [("context", OWN)] and lib.stack == [*stack]


def test_a_context_that_is_gone_takes_no_other_with_it() -> None:
    lib = Lib(OTHER)
    lib.is_gone = True
    with driver_of(lib)._after_turns():
        pass
    assert lib.stack == [OTHER]
