"""Worker processes for tests that may end a process: requests and answers are lines of JSON on its stdin and stdout."""

from __future__ import annotations

import contextlib
import json
import math
import os
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator, Sequence
from typing import Any


class Worker:
    """`python -m MODULE ARGUMENTS...`, one of `processes` that share the machine's cores, and maybe its GPU.

    `patience` is how many seconds it may say nothing before it is killed.
    """

    def __init__(self, command: Sequence[str], patience: float, processes: int = 1, **environment: str) -> None:
        settings = {**os.environ, "PYTHONWARNINGS": "ignore", **environment}
        settings.setdefault("FXOPT_WORKERS", str(max(1, len(os.sched_getaffinity(0)) // processes)))
        self.patience = patience
        self.works = False
        """Whether it has ever said anything."""
        self.told = ""
        self.errors = tempfile.TemporaryFile()  # noqa: SIM115  (open as long as the process)
        self.process = subprocess.Popen(
            [sys.executable, *command],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self.errors,
            text=True,
            env=settings,
        )

    def ask(self, request: Any, until: float = math.inf) -> Iterator[dict[str, Any]]:
        """The lines of the answer, of which {"done": true} is the last; without that line, the process has died.

        At the time `until` (of time.monotonic) it is killed, whatever it does. {"died": reason} is kept for `last_words`.
        """
        assert self.process.stdin is not None and self.process.stdout is not None
        watch = self._watch(until)
        try:
            self.process.stdin.write(json.dumps(request) + "\n")
            self.process.stdin.flush()
            for line in self.process.stdout:
                watch.cancel()
                watch = self._watch(until)
                said = json.loads(line)
                self.works = True
                if "died" in said:
                    self.told = said["died"]
                    continue
                yield said
                if "done" in said:
                    return
        except OSError:
            return
        finally:
            watch.cancel()

    def _watch(self, until: float) -> threading.Timer:
        """A timer that ends the process when it says nothing for too long."""
        timer = threading.Timer(max(0.0, min(self.patience, until - time.monotonic())), self.process.kill)
        timer.daemon = True
        timer.start()
        return timer

    @property
    def last_words(self) -> str:
        """Why the process ended, as far as is known: what it told, or the last line that it printed."""
        if self.told:
            return self.told
        self.errors.seek(0, os.SEEK_END)
        self.errors.seek(max(0, self.errors.tell() - 2000))
        lines = self.errors.read().decode(errors="replace").strip().splitlines()
        return f"the process died or hung{': ' + lines[-1] if lines else ''}"

    def close(self) -> None:
        """End the process."""
        self.process.kill()
        self.process.wait()
        for pipe in (self.process.stdin, self.process.stdout):
            with contextlib.suppress(OSError):
                assert pipe is not None
                pipe.close()
