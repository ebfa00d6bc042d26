"""Whatever callers do, in any order, from several threads and streams at once: no value is wrong.

Each thread has a random number generator of its own, so that what it does is the same in each run; what the others do
meanwhile is not. All results are kept to the end, where they are compared once more.
"""

from __future__ import annotations

import contextlib
import random
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import nn

from fxopt.runtime.cuda_graph import GraphedExecutor
from tests.gpu.networks import Worded, close, network, replays, x_of
from tests.gpu.test_islands_cuda import Gated, meanwhile

pytestmark = pytest.mark.gpu
THREADS = 4
ACTIONS = 120
"""Of each thread; fewer when `SECONDS` are over."""
SECONDS = 6.0
KEPT = 24
"""Results that a thread keeps until it has finished."""
WIDTH = 64


class Refused(Exception):
    """What a gate raises."""


class Cast:
    """The models of the test, compiled, and eagerly: shared ones that nobody changes, and one of each thread's own."""

    def __init__(self) -> None:
        torch.compiler.reset()
        self.shared: dict[str, tuple[nn.Module, Callable[..., Any]]] = {}
        self.own: list[tuple[nn.Module, Callable[..., Any]]] = []
        for name, model in (("plain", network(WIDTH, 6)), ("worded", Worded()), ("lengths", network(WIDTH, 3))):
            self.shared[name] = model, torch.compile(model, backend="fxopt", dynamic=name == "lengths")
        for _ in range(THREADS):
            model = Gated(WIDTH)
            model.total = None  # what threads add to it together has no order
            self.own.append((model, torch.compile(model, backend="fxopt")))
        self.rows = {"plain": 8, "worded": 512, "lengths": 4}

    def warm_up(self) -> None:
        """Compile everything here: afterwards threads only run."""
        for name, (_, run) in self.shared.items():
            for _ in range(3):
                run(x_of(0, self.rows[name], WIDTH))
        plain = self.shared["plain"][1]
        for _, run in self.own:
            for _ in range(3):
                run(x_of(0, 8, WIDTH))
        with _during_gates(plain):  # tensors that ops are given have other dispatch keys, so that this is one more graph
            self.own[0][1](x_of(0, 8, WIDTH))
        torch.cuda.synchronize()


class Actor:
    """One thread's calls: each result is compared with eager's at once or at the end."""

    def __init__(self, number: int, cast: Cast) -> None:
        self.number, self.cast, self.random = number, cast, random.Random(number)
        self.model, self.run = cast.own[number]
        self.kept: list[tuple[str, Any, Any]] = []
        self.done = 0
        self.failure: str | None = None

    def work(self, until: float) -> None:
        streams = [torch.cuda.Stream() for _ in range(2)]
        if self.number % 2:
            streams[0] = torch.cuda.default_stream()
        actions = [self.shared, self.own, self.other_weights, self.refused, self.nested]
        try:
            with torch.no_grad():
                while self.done < ACTIONS and time.monotonic() < until:
                    with torch.cuda.stream(self.random.choice(streams)):
                        if self.random.random() < 0.1:
                            torch.cuda._sleep(1_000_000)
                        self.random.choice(actions)()
                        if self.random.random() < 0.2:
                            torch.cuda.current_stream().synchronize()
                    self.done += 1
                    streams[0].wait_stream(streams[1])  # weights and kept results go from one to the other
                    streams[1].wait_stream(streams[0])
                for stream in streams:
                    stream.synchronize()
                for what, got, want in self.kept:
                    self.compare(what, got, want)
        except BaseException as error:
            self.failure = f"thread {self.number}, action {self.done}: {type(error).__name__}: {error}"
            raise

    def compare(self, what: str, got: Any, want: Any) -> None:
        try:
            close(got, want)
        except AssertionError as error:
            raise AssertionError(f"{what}: {error}") from error

    def check(self, what: str, got: Any, want: Any) -> None:
        if len(self.kept) < KEPT and self.random.random() < 0.5:
            self.kept.append((f"{what}, kept", got, want))
        else:
            self.compare(what, got, want)

    def x(self, rows: int) -> torch.Tensor:
        return x_of(self.random.randrange(1 << 30), rows, WIDTH)

    def shared(self) -> None:
        name = self.random.choice(list(self.cast.shared))
        model, run = self.cast.shared[name]
        x = self.x(self.random.choice((2, 3, 5, 7, 9)) if name == "lengths" else self.cast.rows[name])
        got = run(x)
        want = model(x)
        x.fill_(float("nan"))  # the caller's memory is the caller's after the call
        self.check(name, got, want)

    def own(self) -> None:
        x = self.x(8)
        self.check("own", self.run(x), self.model(x))

    def other_weights(self) -> None:
        parameters = list(self.model.parameters())
        how = self.random.choice(("in place", "moved", "swapped"))
        if how == "in place":
            for p in parameters:
                p.mul_(0.98)
        elif how == "moved":
            for p in self.random.sample(parameters, 3):
                p.data = p.data * 1.02
        else:
            one, other = self.model.parts[0], self.model.parts[1]
            for a, b in zip(one.parameters(), other.parameters(), strict=True):
                a.data, b.data = b.data, a.data
        for _ in range(self.random.randrange(3)):
            self.own()

    def refused(self) -> None:
        def refuse(x: torch.Tensor) -> None:
            raise Refused

        with _during_gates(refuse), contextlib.suppress(Refused):
            self.run(self.x(8))
            raise AssertionError("the gate has raised nothing")

    def nested(self) -> None:
        model, run = self.cast.shared["plain"]
        inner = list[tuple[Any, Any]]()
        with _during_gates(lambda x: inner.append((run(x), model(x)))):
            got = self.run(x := self.x(8))
        self.check("around", got, self.model(x))
        for mine, want in inner:
            self.check("within", mine, want)


@contextlib.contextmanager
def _during_gates(do: Callable[[torch.Tensor], None]) -> Iterator[None]:
    """Let this thread's gates do something beside their work."""
    meanwhile.do = do
    try:
        yield
    finally:
        del meanwhile.do


def test_threads_streams_weights_exceptions_and_calls_within_calls(made: list[GraphedExecutor]) -> None:
    with torch.no_grad():
        cast = Cast()
        cast.warm_up()
    turns = made[0]._turns
    turns.last, turns.driver.in_line = None, True  # as if there had been none: the device has nothing to do
    before = replays(made)
    actors = [Actor(n, cast) for n in range(THREADS)]
    until = time.monotonic() + SECONDS
    threads = [threading.Thread(target=actor.work, args=(until,)) for actor in actors]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert [actor.failure for actor in actors if actor.failure] == []
    assert min(actor.done for actor in actors) >= 20
    assert replays(made) - before > 20 * THREADS
