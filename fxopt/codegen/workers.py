"""Compile workers: one clean helper process that imports the compiler once and forks workers from itself.

    user's process  --JSON lines over pipes-->  helper (python -m fxopt.codegen.workers)  --forks-->  workers

The helper is a fresh interpreter, so workers never inherit the user's CUDA context or OpenMP threads. Nothing is pickled.
A worker that dies has its job tried once more by another; one that takes too long is killed. The helper ends when the pipe
from the user's process closes, however that came about, and takes its workers with it.
"""

from __future__ import annotations

import atexit
import contextlib
import importlib
import json
import os
import select
import selectors
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from itertools import chain
from pathlib import Path
from queue import SimpleQueue
from typing import Any

from fxopt import knobs
from fxopt.errors import FxoptError

MOST_WORKERS = 16
FEW_CORES = 4
JOB_SECONDS = 120.0
"""A kernel takes a second of a core, ten on a crowded machine: a compiler that is still at it after this time hangs."""

START_SECONDS = 180.0
_REASON_LENGTH = 2000


class WorkersUnavailable(FxoptError):
    """The helper process cannot be started or keeps dying; the caller does the work itself."""


@dataclass(frozen=True)
class Outcome:
    """What became of one job: its value, or why there is none."""

    value: Any = None
    error: str | None = None


Heard = Callable[[int, Outcome], Iterable[dict[str, Any]]]
"""What is told the number of a job and its outcome, and gives the jobs that this leads to."""

_Numbered = Iterable[tuple[int, dict[str, Any]]]


def worker_count() -> int:
    """FXOPT_WORKERS, or one per core that this process may use, at most 16. 0 means: no processes.

    Of many cores one is left to the process that measures meanwhile: its launches must not wait for a core.
    """
    chosen, cores = knobs.WORKERS.get(), len(os.sched_getaffinity(0))
    return min(cores - (cores > FEW_CORES), MOST_WORKERS) if chosen is None else chosen


def resolve(name: str) -> Callable[..., Any]:
    """The function called "module:function"."""
    module, _, attribute = name.partition(":")
    found: Callable[..., Any] = getattr(importlib.import_module(module), attribute)
    return found


def describe(error: BaseException) -> str:
    """An exception as one text of bounded length, its end kept: compilers say the most important thing last."""
    text = f"{type(error).__name__}: {error}"
    return text if len(text) <= _REASON_LENGTH else "..." + text[-_REASON_LENGTH:]


# --- the user's side


class Pool:
    """Runs `function` ("module:function", JSON data in and out) in workers. Safe for several threads; one batch at a time.

    `warm_up` is run once in the helper before any worker is forked. The helper starts with the first batch or with `start`.
    If that leaves it idle, it runs `rehearsal`, whose traces in memory all workers inherit, and forks them before there are
    jobs. A job that takes longer than `job_seconds` is ended with its worker.
    """

    def __init__(
        self,
        function: str,
        warm_up: str | None,
        workers: int,
        job_seconds: float = JOB_SECONDS,
        rehearsal: str | None = None,
    ) -> None:
        self.setup = {
            "function": function,
            "warm_up": warm_up,
            "rehearsal": rehearsal,
            "workers": workers,
            "job_seconds": job_seconds,
        }
        self._lock = threading.RLock()
        self._process: subprocess.Popen[bytes] | None = None
        self._ready = False
        self._received = b""

    def start(self) -> None:
        """Start the helper without waiting for it. Raises WorkersUnavailable."""
        with self._lock:
            if self._process is None or self._process.poll() is not None:
                self.close()
                self._process = self._spawn()
                self._send(self._process, [self.setup])

    def run(self, jobs: Iterable[dict[str, Any]], heard: Heard | None = None) -> list[Outcome]:
        """One outcome per job, in order. Each job is begun as soon as `jobs` gives it, while the next ones are made.

        `heard` is called in this thread with the number of each job that has ended and its outcome, once `jobs` has no more;
        the jobs that it gives come after all others. Raises WorkersUnavailable when the helper cannot be started or dies
        twice, and what `jobs` or `heard` raises.
        """
        taken: list[dict[str, Any]] = []
        outcomes: dict[int, Outcome] = {}

        def numbered(jobs: Iterable[dict[str, Any]]) -> Iterator[tuple[int, dict[str, Any]]]:
            for job in jobs:
                taken.append(job)
                yield len(taken) - 1, job

        def following(number: int) -> _Numbered:
            return () if heard is None else numbered(heard(number, outcomes[number]))

        with self._lock:
            more = numbered(jobs)
            first = next(more, None)
            if first is None:
                return []
            try:
                try:
                    self._exchange(chain([first], more), outcomes, following)
                except WorkersUnavailable:
                    self.close()
                    missing = [(i, job) for i, job in enumerate(taken) if i not in outcomes]
                    self._exchange(chain(missing, more), outcomes, following)
            except BaseException:
                self.close()  # replies to an abandoned batch must not meet the next one
                raise
        return [outcomes[i] for i in range(len(taken))]

    def _exchange(self, jobs: _Numbered, outcomes: dict[int, Outcome], following: Callable[[int], _Numbered]) -> None:
        """Send `jobs` with their numbers, and those `following` each one that has ended; note the outcomes. Threads do it:
        jobs are made meanwhile, and helper and caller may otherwise each wait for the other to read."""
        self.start()
        assert self._process is not None
        process, failures = self._process, list[WorkersUnavailable]()
        outbox, awaited = SimpleQueue[dict[str, Any] | None](), SimpleQueue[int | None]()
        arrived = SimpleQueue[int | None]()

        def write() -> None:
            for message in iter(outbox.get, None):
                self._send(process, [message])

        def read() -> None:
            try:
                self._await_ready(process)
                for _ in iter(awaited.get, None):
                    reply = self._receive(process, None)
                    outcomes[reply["id"]] = Outcome(reply.get("value"), reply.get("error"))
                    arrived.put(reply["id"])
            except WorkersUnavailable as error:
                failures.append(error)
            finally:
                arrived.put(None)

        threads = [
            threading.Thread(target=task, name=f"fxopt_workers_{task.__name__}", daemon=True) for task in (write, read)
        ]
        for thread in threads:
            thread.start()
        try:
            running = 0
            while True:
                for number, job in jobs:
                    outbox.put({"id": number, "arguments": job})
                    awaited.put(number)
                    running += 1
                if running == 0 or (ended := arrived.get()) is None:
                    break
                running -= 1
                jobs = following(ended)
        except BaseException:
            _kill(process)  # no thread may wait for a reply when the pipes are closed
            raise
        finally:
            outbox.put(None)
            awaited.put(None)
            threads[1].join()
        if failures:
            _kill(process)
        threads[0].join()
        if failures:
            raise failures[0]

    def _spawn(self) -> subprocess.Popen[bytes]:
        environment = os.environ | {
            "PYTHONPATH": os.pathsep.join([str(Path(__file__).parents[2]), *(p for p in sys.path if p)]),
            "CUDA_VISIBLE_DEVICES": "",
            **dict.fromkeys(("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS"), "1"),
        }
        command = [sys.executable, "-P", "-m", "fxopt.codegen.workers"]
        try:
            return subprocess.Popen(
                command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, env=environment, start_new_session=True
            )
        except (OSError, TypeError, ValueError) as error:
            raise WorkersUnavailable(f"cannot start {command[0]}: {error}") from error

    def _await_ready(self, process: subprocess.Popen[bytes]) -> None:
        if not self._ready:
            reply = self._receive(process, START_SECONDS)
            if reply.get("error"):
                raise WorkersUnavailable(f"the compile helper cannot work: {reply['error']}")
            self._ready = True

    @staticmethod
    def _send(process: subprocess.Popen[bytes], messages: list[dict[str, Any]]) -> None:
        assert process.stdin is not None
        with contextlib.suppress(OSError, ValueError):  # a dead helper shows when its replies are awaited
            for message in messages:
                process.stdin.write(json.dumps(message).encode() + b"\n")
                process.stdin.flush()

    def _receive(self, process: subprocess.Popen[bytes], timeout: float | None) -> dict[str, Any]:
        assert process.stdout is not None
        output = process.stdout.fileno()
        while b"\n" not in self._received:
            if not select.select([output], [], [], timeout)[0]:
                raise WorkersUnavailable(f"the compile helper did not start within {timeout:.0f} s")
            data = os.read(output, 1 << 16)
            if not data:
                raise WorkersUnavailable("the compile helper process ended unexpectedly")
            self._received += data
        line, _, self._received = self._received.partition(b"\n")
        reply: dict[str, Any] = json.loads(line)
        return reply

    def close(self) -> None:
        """End the helper and its workers."""
        process, self._process = self._process, None
        self._ready, self._received = False, b""
        if process is None:
            return
        _kill(process)
        for stream in (process.stdin, process.stdout):
            with contextlib.suppress(OSError, ValueError):
                assert stream is not None
                stream.close()
        process.wait()


def _kill(process: subprocess.Popen[bytes]) -> None:
    """End a helper and its workers."""
    with contextlib.suppress(OSError):
        os.killpg(process.pid, signal.SIGKILL)


_pools: dict[tuple[int, str, int], Pool] = {}
_pools_lock = threading.Lock()


def shared_pool(function: str, warm_up: str | None, rehearsal: str | None = None) -> Pool:
    """This process's pool for `function` (a forked child gets its own)."""
    key = (os.getpid(), function, worker_count())
    with _pools_lock:
        if key not in _pools:
            _pools[key] = Pool(function, warm_up, key[2], rehearsal=rehearsal)
            atexit.register(_close_own, _pools[key], key[0])
        return _pools[key]


def _close_own(pool: Pool, pid: int) -> None:
    if os.getpid() == pid:
        pool.close()


# --- the helper's side


@dataclass
class _Worker:
    pid: int
    channel: socket.socket
    job: dict[str, Any] | None = None
    deadline: float = float("inf")
    received: bytes = b""


@dataclass
class _Helper:
    """The event loop of the helper: jobs come in on `source`, replies go out on `sink`."""

    source: int
    sink: int
    function: Callable[..., Any]
    limit: int
    job_seconds: float
    forks_ahead: bool = False
    queue: deque[dict[str, Any]] = field(default_factory=deque)
    workers: list[_Worker] = field(default_factory=list)
    received: bytes = b""

    def serve(self) -> None:
        """Until the user's process closes its end."""
        with selectors.DefaultSelector() as selector:
            selector.register(self.source, selectors.EVENT_READ)
            try:
                while self.forks_ahead and len(self.workers) < self.limit and not _is_readable(self.source):
                    self._fork(selector)
                while self._turn(selector):
                    self._assign(selector)
            finally:
                for worker in self.workers:
                    os.kill(worker.pid, signal.SIGKILL)

    def _turn(self, selector: selectors.BaseSelector) -> bool:
        soonest = min((w.deadline for w in self.workers), default=float("inf"))
        timeout = None if soonest == float("inf") else max(0.0, soonest - time.monotonic())
        for key, _ in selector.select(timeout):
            if key.data is None:
                if not self._take_jobs():
                    return False
            elif key.data in self.workers:
                self._hear(key.data, selector)
        for worker in [w for w in self.workers if w.deadline <= time.monotonic()]:
            self._end(worker, selector, f"took longer than {self.job_seconds:.0f} s", retry=False)
        return True

    def _take_jobs(self) -> bool:
        data = os.read(self.source, 1 << 20)
        *lines, self.received = (self.received + data).split(b"\n")
        self.queue.extend(json.loads(line) for line in lines)
        return bool(data)

    def _assign(self, selector: selectors.BaseSelector) -> None:
        while self.queue:
            worker = next((w for w in self.workers if w.job is None), None)
            if worker is None and len(self.workers) < self.limit:
                worker = self._fork(selector)
            if worker is None:
                return
            worker.job = self.queue.popleft()
            worker.deadline = time.monotonic() + self.job_seconds
            with contextlib.suppress(OSError):  # a dead worker is noticed by reading
                worker.channel.sendall(json.dumps(worker.job["arguments"]).encode() + b"\n")

    def _fork(self, selector: selectors.BaseSelector) -> _Worker:
        ours, theirs = socket.socketpair()
        pid = os.fork()
        if pid == 0:
            try:
                for other in (self.source, self.sink, ours.fileno(), *(w.channel.fileno() for w in self.workers)):
                    os.close(other)
                _work(theirs, self.function)
            finally:
                os._exit(0)
        theirs.close()
        worker = _Worker(pid, ours)
        self.workers.append(worker)
        selector.register(ours, selectors.EVENT_READ, worker)
        return worker

    def _hear(self, worker: _Worker, selector: selectors.BaseSelector) -> None:
        try:
            data = worker.channel.recv(1 << 20)
        except OSError:
            data = b""
        worker.received += data
        if not data:
            self._end(worker, selector, "the compile worker died", retry=True)
        elif worker.received.endswith(b"\n"):
            assert worker.job is not None
            self._reply({"id": worker.job["id"], **json.loads(worker.received)})
            worker.job, worker.deadline, worker.received = None, float("inf"), b""

    def _end(self, worker: _Worker, selector: selectors.BaseSelector, reason: str, retry: bool) -> None:
        """Remove a worker; its job is tried once more or fails."""
        selector.unregister(worker.channel)
        worker.channel.close()
        self.workers.remove(worker)
        with contextlib.suppress(ProcessLookupError):
            os.kill(worker.pid, signal.SIGKILL)
        os.waitpid(worker.pid, 0)
        if worker.job is None:
            return
        if retry and not worker.job.get("retried"):
            self.queue.appendleft({**worker.job, "retried": True})
        else:
            self._reply({"id": worker.job["id"], "error": reason})

    def _reply(self, message: dict[str, Any]) -> None:
        _write_all(self.sink, json.dumps(message).encode() + b"\n")


def _write_all(sink: int, data: bytes) -> None:
    view = memoryview(data)
    while view:
        view = view[os.write(sink, view) :]


def _work(channel: socket.socket, function: Callable[..., Any]) -> None:
    """A worker's life: one line of arguments in, one line of result out, until the helper closes the channel."""
    with tempfile.TemporaryFile() as log:
        os.dup2(log.fileno(), 1)
        os.dup2(log.fileno(), 2)
        for line in channel.makefile("rb"):
            log.seek(0)
            log.truncate()
            channel.sendall(json.dumps(_attempt(function, json.loads(line), log.fileno())).encode() + b"\n")


def _attempt(function: Callable[..., Any], arguments: dict[str, Any], log: int) -> dict[str, Any]:
    try:
        return {"value": function(**arguments)}
    except Exception as error:
        sys.stdout.flush()
        sys.stderr.flush()
        printed = os.pread(log, _REASON_LENGTH, 0).decode(errors="replace").strip()
        return {"error": describe(error) + (f"\n{printed}" if printed else "")}


@contextlib.contextmanager
def _protocol_streams() -> Iterator[tuple[int, int]]:
    """The pipes of this process, moved away from 0 and 1 so that no library's printing gets between the replies."""
    source, sink = os.dup(0), os.dup(1)
    null = os.open(os.devnull, os.O_RDONLY)
    os.dup2(null, 0)
    os.dup2(2, 1)
    os.close(null)
    yield source, sink


def _is_readable(source: int) -> bool:
    return bool(select.select([source], [], [], 0)[0])


def _read_line(source: int) -> bytes:
    line = b""
    while not line.endswith(b"\n"):
        byte = os.read(source, 1)
        if not byte:
            raise SystemExit(0)
        line += byte
    return line


def main() -> None:
    """The helper process: read the setup, warm up, say so, serve."""
    with _protocol_streams() as (source, sink):
        setup = json.loads(_read_line(source))
        try:
            function = resolve(setup["function"])
            if setup["warm_up"]:
                resolve(setup["warm_up"])()
        except Exception as error:
            _write_all(sink, json.dumps({"error": describe(error)}).encode() + b"\n")
            return
        _write_all(sink, b'{"ready": true}\n')
        idle = setup["rehearsal"] is not None and not _is_readable(source)
        if idle:
            with contextlib.suppress(Exception):  # what is wrong shows, with its reason, in the first job
                resolve(setup["rehearsal"])()
        _Helper(source, sink, function, setup["workers"], setup["job_seconds"], forks_ahead=idle).serve()


if __name__ == "__main__":
    main()
