"""Cases dealt to worker processes, several to each device, so that compilations overlap while timing does not.

A worker is a process with one visible device. Requests and answers are lines of JSON on its pipes: {"ready": true} first;
then for each request any number of {"progress": ..., "contender": ...} and one {"rows": [...], "broken": contender or ""}. A
worker that dies or breaks is replaced and costs its case the contender that it was busy with: the case is dealt once more
without. A case that ran out of memory is dealt once more with a device of its own.
"""

from __future__ import annotations

import contextlib
import json
import math
import os
import select
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

START_SECONDS, STEP_SECONDS = 180.0, 300.0
"""How long a worker may take to start, and for one step of a case besides compiling."""

UNREPLACED = 2
"""A place gives up after so many workers in a row that could not start."""

Request = dict[str, Any]
RawRow = dict[str, Any]


class WorkerDied(Exception):
    """The process ended, or was ended because it took too long. The text says why, as far as is known."""


class Worker:
    """`python ARGUMENTS` with `environment` added to this process's."""

    def __init__(self, arguments: Sequence[str], environment: Mapping[str, str]) -> None:
        self._errors = tempfile.TemporaryFile()  # noqa: SIM115  (open as long as the process)
        self._received = b""
        self._process = subprocess.Popen(
            [sys.executable, *arguments],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._errors,
            env={**os.environ, **environment},
            start_new_session=True,
        )

    def tell(self, request: Request) -> None:
        """Send a line; what becomes of it, `hear` tells."""
        assert self._process.stdin is not None
        with contextlib.suppress(OSError):
            self._process.stdin.write(json.dumps(request).encode() + b"\n")
            self._process.stdin.flush()

    def hear(self, until: float) -> dict[str, Any]:
        """The next line of an answer. Raises WorkerDied when there is none by the time `until` of time.monotonic."""
        assert self._process.stdout is not None
        output = self._process.stdout.fileno()
        while b"\n" not in self._received:
            if not select.select([output], [], [], max(0.0, until - time.monotonic()))[0]:
                raise WorkerDied("took too long")
            data = os.read(output, 1 << 16)
            if not data:
                raise WorkerDied(self._last_words())
            self._received += data
        line, _, self._received = self._received.partition(b"\n")
        said: dict[str, Any] = json.loads(line)
        return said

    def _last_words(self) -> str:
        with contextlib.suppress(subprocess.TimeoutExpired):
            self._process.wait(5)
        end = self._errors.seek(0, os.SEEK_END)
        self._errors.seek(max(0, end - 2000))
        lines = self._errors.read().decode(errors="replace").strip().splitlines()
        return f"the process ended with {self._process.returncode}{': ' + lines[-1] if lines else ''}"

    def close(self) -> None:
        """End the process and what it started in its session."""
        with contextlib.suppress(OSError):
            os.killpg(self._process.pid, signal.SIGKILL)
        self._process.wait()
        for stream in (self._process.stdin, self._process.stdout, self._errors):
            with contextlib.suppress(OSError):
                assert stream is not None
                stream.close()


@dataclass(frozen=True)
class Assignment:
    """A case to run: its position among all, the memory it may need, and contenders to leave out with the reason."""

    number: int
    need: float
    without: Mapping[str, str] = field(default_factory=dict)


class Dealer:
    """Which case a place runs next: the first that is `ready` and fits into what the place's others leave of `room`."""

    def __init__(self, needs: Sequence[float], room: float, ready: Callable[[int], bool] = lambda number: True) -> None:
        self._room, self._ready = room, ready
        self._waiting = [Assignment(number, min(need, room)) for number, need in enumerate(needs)]
        self._running: dict[int, list[Assignment]] = {}
        self._changed = threading.Condition()

    def take(self, place: int, until: float) -> Assignment | None:
        """Waits while nothing fits; None when nothing is left, or at the time `until` of time.monotonic."""
        with self._changed:
            while (self._waiting or any(self._running.values())) and time.monotonic() < until:
                running = self._running.setdefault(place, [])
                left = self._room - sum(a.need for a in running)
                fitting = (a for a in self._waiting if not running or a.need <= left)
                chosen = next((a for a in fitting if self._ready(a.number)), None)
                if chosen is not None:
                    self._waiting.remove(chosen)
                    running.append(chosen)
                    return chosen
                self._changed.wait(min(1.0, max(0.0, until - time.monotonic())))
            return None

    def finish(self, place: int, assigned: Assignment, again: Assignment | None = None) -> None:
        """`assigned` is over; `again` goes to the end of the queue."""
        with self._changed:
            self._running[place].remove(assigned)
            if again is not None:
                self._waiting.append(again)
            self._changed.notify_all()


@dataclass
class Pool:
    """Workers in `places`, each an environment; `arguments` start one. `failed_rows` makes a request's rows by what is wrong
    with each contender, or with all of them (""). One compilation may take `compile_seconds`. Where `cores` are given the
    workers keep to them."""

    arguments: Sequence[str]
    places: Sequence[Mapping[str, str]]
    per_place: int
    deadline: float
    failed_rows: Callable[[Request, Mapping[str, str]], list[RawRow]]
    say: Callable[[str], None]
    compile_seconds: float = 0.0
    cores: Collection[int] = ()

    def run(
        self,
        requests: Sequence[Request],
        needs: Sequence[float],
        room: float,
        done: Callable[[int, list[RawRow]], None],
        ready: Callable[[int], bool] = lambda number: True,
    ) -> None:
        """Run all requests until the deadline, at which begun ones are cut off; `done` gets each one's rows as they come.

        None begins before it is `ready`, and a request's own "without" may grow until then.
        """
        dealer, guard = Dealer(needs, room, ready), threading.Lock()

        def finished(number: int, rows: list[RawRow]) -> None:
            with guard:
                done(number, rows)

        threads = [
            threading.Thread(target=self._serve, args=(place, dealer, requests, finished), daemon=True)
            for _ in range(self.per_place)
            for place in range(len(self.places))
        ]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()

    def _serve(
        self, place: int, dealer: Dealer, requests: Sequence[Request], done: Callable[[int, list[RawRow]], None]
    ) -> None:
        """Run case after case in one worker, which is replaced when it dies."""
        if self.cores:
            os.sched_setaffinity(0, self.cores)  # of this thread, and of the processes which it starts
        worker: Worker | None = None
        unstarted = 0
        while unstarted < UNREPLACED and (chosen := dealer.take(place, self.deadline)) is not None:
            again: Assignment | None = chosen
            try:
                worker = worker or self._started(place)
                unstarted = 0
                again, alive = self._run(worker, chosen, requests[chosen.number], done)
                if not alive:
                    worker.close()
                    worker = None
            except WorkerDied as death:
                unstarted += 1
                self.say(f"a worker did not start: {death}")
            finally:
                dealer.finish(place, chosen, again)
        if worker is not None:
            worker.close()

    def _started(self, place: int) -> Worker:
        worker = Worker(self.arguments, self.places[place])
        try:
            worker.hear(min(self.deadline, time.monotonic() + START_SECONDS))
        except WorkerDied:
            worker.close()
            raise
        return worker

    def _run(
        self, worker: Worker, assigned: Assignment, request: Request, done: Callable[[int, list[RawRow]], None]
    ) -> tuple[Assignment | None, bool]:
        """Run one case: what is to be done again, and whether the worker can go on."""
        contender = ""
        without = {**request.get("without", {}), **assigned.without}
        worker.tell({**request, "without": without, "left": self.deadline - time.monotonic()})
        try:
            while "rows" not in (
                said := worker.hear(min(self.deadline, time.monotonic() + self.compile_seconds + STEP_SECONDS))
            ):
                contender = said["contender"]
        except WorkerDied as death:
            if time.monotonic() >= self.deadline:
                return None, False
            self.say(f"{request['workload']}: {contender}: {death}")
            culprits = {**assigned.without, contender: f"failed: {death}"}
            if contender and contender not in assigned.without:
                return replace(assigned, without=culprits), False
            done(assigned.number, self.failed_rows(request, culprits))
            return None, False
        if assigned.need < math.inf and any("OutOfMemoryError" in row["skipped"] for row in said["rows"]):
            return replace(assigned, need=math.inf), not said.get("broken")
        if (culprit := said.get("broken")) and culprit not in assigned.without:
            reason = next(row["skipped"] for row in said["rows"] if row["contender"] == culprit)
            return replace(assigned, without={**assigned.without, culprit: reason}), False
        done(assigned.number, said["rows"])
        return None, not said.get("broken")


def visible_devices(count: int) -> list[str]:
    """What CUDA_VISIBLE_DEVICES has to be for each of the first `count` devices that this process sees."""
    chosen = [name.strip() for name in os.environ.get("CUDA_VISIBLE_DEVICES", "").split(",") if name.strip()]
    return (chosen or [str(k) for k in range(count)])[:count]


def shared_threads(workers: int) -> dict[str, str]:
    """An environment in which each of `workers` processes uses its share of the cores, for compiling too."""
    share = str(max(1, len(os.sched_getaffinity(0)) // workers))
    return dict.fromkeys(("OMP_NUM_THREADS", "MKL_NUM_THREADS", "FXOPT_WORKERS", "TORCHINDUCTOR_COMPILE_THREADS"), share)
