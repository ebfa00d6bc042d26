"""A captured run with branches on a second stream, beside the one in a row: the faster of two that give the same results."""

from __future__ import annotations

import functools
import statistics
from collections.abc import Callable
from typing import Any, Protocol

import torch

from fxopt.runtime.branches import SideStream, branched
from fxopt.runtime.capturable import Traits
from fxopt.runtime.executor import Executor
from fxopt.runtime.recording import Driver, Recording, record

ROUNDS, REPLAYS = 5, 10
LEAST_GAIN = 1.01
"""How much faster a run has to be to be kept."""


class TimingDriver(Driver, Protocol):
    """A device that can say how long something takes (`GraphDriver`)."""

    def side_stream(self) -> SideStream: ...

    def microseconds(self, work: Callable[[], None]) -> float: ...


class BranchContest:
    """Decides for one plan, whose executor is `executor`; `note(text)` is told how it went."""

    def __init__(self, executor: Executor, traits: Traits, note: Callable[[str], None]) -> None:
        self._executor, self._traits, self._note = executor, traits, note
        self._is_wanted = not (traits.written or traits.seeds or traits.draws)

    def faster(self, recording: Recording, inputs: list[Any], driver: TimingDriver) -> Recording:
        """`recording`, or another one of the same plan for the same inputs. In a turn; both are replayed on `inputs`, which
        they do not change, since the plan writes no inputs and draws nothing."""
        plan = branched(self._executor.plan) if self._is_wanted else None
        if plan is None:
            self._is_wanted = False
            return recording
        try:
            run = self._executor.part(plan, driver.side_stream().ops())
            other = record(run, inputs, recording.signature, self._traits, driver)
            stream = driver.stream()
            if not _same(recording.play(list(inputs), stream), other.play(list(inputs), stream)):
                self._lose("its results differ")
                return recording
            times = _times([recording, other], inputs, stream, driver)
        except Exception as error:  # the run in a row is as good as ever
            self._lose(str(error).partition("\n")[0] or type(error).__name__)
            return recording
        better = times[0] > LEAST_GAIN * times[1]
        self._note(f"with branches on a second stream a replay takes {times[1]:.1f} us, in a row {times[0]:.1f}")
        if not better:
            self._is_wanted = False
        return other if better else recording

    def _lose(self, reason: str) -> None:
        self._is_wanted = False
        self._note(f"no branches on a second stream: {reason}")


def _times(recordings: list[Recording], inputs: list[Any], stream: int, driver: TimingDriver) -> list[float]:
    """Microseconds of a replay of each. They share memory, where one leaves nothing of the other's inputs."""

    def replays(recording: Recording) -> None:
        for _ in range(REPLAYS):
            recording.replay_alone(stream)

    found: list[list[float]] = [[] for _ in recordings]
    for _ in range(ROUNDS):
        for recording, times in zip(recordings, found, strict=True):
            recording.play(list(inputs), stream)  # for what it copies: indices of garbage end the context
            times.append(driver.microseconds(functools.partial(replays, recording)) / REPLAYS)
    return [statistics.median(times) for times in found]


def _same(some: tuple[Any, ...], others: tuple[Any, ...]) -> bool:
    return all(map(_equal, some, others))


def _equal(a: Any, b: Any) -> bool:
    if not isinstance(a, torch.Tensor):
        return bool(a == b)
    return bool(((a == b) | ((a != a) & (b != b))).all())
