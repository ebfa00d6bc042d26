"""Processes that are quick to start: forks of one that has imported torch, Dynamo and fxopt and compiled nothing.

`python -m tests.fault_server` reads requests from stdin and answers on stdout, a line of JSON each: {"prelude",
"environment", "out", "err"} starts `tests.fault_job` with that environment and those files, and answers with its process id;
{"poll": pid} answers with its exit status, or null while it runs. What a job caches in memory dies with it, so jobs meet on
disk only.
"""

from __future__ import annotations

import atexit
import json
import os
import signal
import subprocess
import sys
import time
import traceback
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parent.parent


@dataclass
class Job:
    """A running job, seen from the test."""

    server: Server
    pid: int
    out: Path
    err: Path
    status: int | None = None

    def poll(self) -> int | None:
        """Its exit status; minus the signal when one ended it."""
        if self.status is None:
            self.status = self.server.ask({"poll": self.pid})
        return self.status

    def wait(self, seconds: float = 300) -> tuple[int, str, str]:
        """Exit status, stdout, stderr."""
        deadline = time.monotonic() + seconds
        while self.poll() is None:
            assert time.monotonic() < deadline, f"still running: {self.err.read_text()}"
            time.sleep(0.01)
        assert self.status is not None
        return self.status, self.out.read_text(), self.err.read_text()

    def kill(self) -> None:
        os.kill(self.pid, signal.SIGKILL)
        self.wait()


class Server:
    """The process that forks. A context manager."""

    def __init__(self, folder: Path) -> None:
        self._folder, self._started = folder, 0
        self._process = subprocess.Popen(
            [sys.executable, "-m", "tests.fault_server"],
            cwd=ROOT,
            env=os.environ | {"OMP_NUM_THREADS": "1"},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )

    def __enter__(self) -> Server:
        return self

    def __exit__(self, *_: object) -> None:
        self._process.communicate()

    def start(self, prelude: str, environment: dict[str, str]) -> Job:
        self._started += 1
        out, err = (self._folder / f"{self._started}.{kind}" for kind in ("out", "err"))
        pid = self.ask({"prelude": prelude, "environment": environment, "out": str(out), "err": str(err)})
        return Job(self, pid, out, err)

    def ask(self, request: dict[str, Any]) -> Any:
        assert self._process.stdin is not None and self._process.stdout is not None
        print(json.dumps(request), file=self._process.stdin, flush=True)
        return json.loads(self._process.stdout.readline())


def _import_everything() -> None:
    import torch

    import fxopt.compiler
    import fxopt.report
    import tests.fault_job  # noqa: F401
    from fxopt.codegen import cpp_build, cpp_headers

    # The source as it is loaded, should somebody edit it meanwhile.
    fxopt.plan_cache._own_source()
    cpp_build.headers_hash()
    cpp_headers.CALLS_BEFORE = 99  # the tests' compiler remembers kernels; headers take seconds
    model = torch.compile(torch.nn.Linear(2, 2), backend="aot_eager")
    model(torch.ones(2, 2)).sum()
    torch.compiler.reset()


def _run(request: dict[str, Any]) -> int:
    """In the child: the job, from its first line to what a process does at its end."""
    for descriptor, path in ((1, request["out"]), (2, request["err"])):
        file = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600)
        os.dup2(file, descriptor)
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    os.environ.clear()
    os.environ.update(request["environment"])
    atexit._clear()
    from tests import fault_job

    try:
        fault_job.main(request["prelude"])
        status = 0
    except BaseException:
        traceback.print_exc()
        status = 1
    atexit._run_exitfuncs()
    sys.stdout.flush()
    sys.stderr.flush()
    return status


def _serve() -> None:
    _import_everything()
    for line in sys.stdin:
        request = json.loads(line)
        if "poll" in request:
            pid, status = os.waitpid(request["poll"], os.WNOHANG)
            answer = os.waitstatus_to_exitcode(status) if pid else None
        else:
            answer = os.fork()
            if answer == 0:
                status = 1
                try:
                    status = _run(request)
                finally:
                    os._exit(status)
        print(json.dumps(answer), flush=True)


if __name__ == "__main__":
    _serve()
