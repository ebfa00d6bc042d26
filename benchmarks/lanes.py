"""Jobs side by side, each in a lane: cores, and where there are GPUs one of them, that its processes have to themselves."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from queue import SimpleQueue
from typing import TypeVar

J = TypeVar("J")


@dataclass(frozen=True)
class Lane:
    """`environment` is what its processes have beside this one's."""

    cores: frozenset[int]
    environment: Mapping[str, str]


def lanes(count: int, cores: int = 0, devices: Sequence[str] = ()) -> list[Lane]:
    """`count` lanes of `cores` each (0: an equal share of those that this process may use), and the `devices`, as
    CUDA_VISIBLE_DEVICES has them, in turn.

    ValueError when there are not enough cores.
    """
    own = sorted(os.sched_getaffinity(0))
    each = cores or len(own) // count
    if not 0 < each * count <= len(own):
        raise ValueError(f"{count} processes of {cores or 'some'} cores each do not fit on {len(own)} cores")
    return [
        Lane(
            frozenset(own[k * each : (k + 1) * each]),
            {"CUDA_VISIBLE_DEVICES": devices[k % len(devices)]} if devices else {},
        )
        for k in range(count)
    ]


def deal(jobs: Sequence[J], among: Sequence[Lane], run: Callable[[J, Lane], None]) -> None:
    """Run `jobs`, each in the first lane that is free, in their order; the first exception is raised when all have ended.

    Each runs in a thread that is held to the lane's cores, as are the processes which it starts.
    """
    free = SimpleQueue[Lane]()
    for lane in among:
        free.put(lane)

    def in_lane(job: J) -> None:
        lane = free.get()
        try:
            os.sched_setaffinity(0, lane.cores)  # of this thread
            run(job, lane)
        finally:
            free.put(lane)

    with ThreadPoolExecutor(len(among)) as threads:
        for done in [threads.submit(in_lane, job) for job in jobs]:
            done.result()
