"""Kernels that hang or end their process when they are tried: no process tries them again.

    suspects/<key of the kernel>.json      {"kernel", "pid", "started", "hung"}

A document lies there while a kernel runs for the first time in a process. It is taken away when the kernel has ended. So
one that is left over, because the process hung or died meanwhile, says which kernel to avoid. Killing a process in just that
millisecond costs a candidate without need; `fxopt cache clear` gives it back.

Kernels run in the user's process. A process for each, in which one that hangs can be ended, would take a CUDA context: half
a second, half a gigabyte and the made-up data once more, for kernels whose loops are all counted. What hangs here is a
mistake in waiting for the hardware (a tensor map, a barrier), so it hangs at once, on any data, and need be seen only once.
"""

from __future__ import annotations

import contextlib
import os
import time
from collections.abc import Callable, Iterator
from pathlib import Path

from fxopt.errors import HungKernelError
from fxopt.runtime.cachedir import CacheDirectory

FOLDER = "suspects"

HANG_SECONDS = 30.0
"""A kernel that has not ended by then, on data of its problem's size, never will: slow candidates take milliseconds."""

_SPIN_SECONDS = 1e-3
_POLL_SECONDS = 1e-4


class Suspects:
    """The suspects of one cache directory. Without one (None) kernels are watched, but not remembered."""

    def __init__(self, cache: CacheDirectory | None, limit: float = HANG_SECONDS) -> None:
        self.cache, self.limit = cache, limit
        self._ended: set[str] = set()

    def reason(self, key: str) -> str | None:
        """Why the kernel must not be run, or None."""
        document = None if self.cache is None else self.cache.get_document(FOLDER, key)
        if not isinstance(document, dict):
            return None
        if document.get("hung"):
            return f"it did not end within {self.limit:.0f} s when it was tried"
        trying = document.get("pid"), document.get("started")
        return None if _is_alive(*trying) else "the process that tried it ended meanwhile"

    @contextlib.contextmanager
    def on_trial(self, key: str, name: str, finished: Callable[[], bool]) -> Iterator[None]:
        """In the block the kernel is launched; afterwards it has ended, as `finished` says, or HungKernelError is raised.

        The kernel stays a suspect when an error leaves the block. Once it has ended in this process, nothing is done.
        """
        if key in self._ended:
            yield
            return
        self._write(key, name, hung=False)
        yield
        if not _wait(finished, self.limit):
            self._write(key, name, hung=True)
            raise HungKernelError(
                f"the generated kernel {name} has not ended within {self.limit:.0f} s. It cannot be stopped, and this "
                "process cannot use its GPU any more: start it again. "
                + ("" if self.cache is None else f"{self._path(self.cache, key)} keeps the kernel from being tried again.")
            )
        self.clear(key)

    def clear(self, key: str) -> None:
        """The kernel has ended, or was never run: it is no suspect."""
        self._ended.add(key)
        if self.cache is not None:
            with contextlib.suppress(OSError):
                self._path(self.cache, key).unlink(missing_ok=True)

    def _write(self, key: str, name: str, hung: bool) -> None:
        cache, document = self.cache, {"kernel": name, "pid": os.getpid(), "started": _started(os.getpid()), "hung": hung}
        if cache is not None:
            cache.try_write(lambda: cache.put_document(FOLDER, key, document))

    @staticmethod
    def _path(cache: CacheDirectory, key: str) -> Path:
        return cache.path / FOLDER / f"{key}.json"


def _wait(finished: Callable[[], bool], limit: float) -> bool:
    start = time.monotonic()
    while not finished():
        waited = time.monotonic() - start
        if waited > limit:
            return False
        if waited > _SPIN_SECONDS:
            time.sleep(_POLL_SECONDS)
    return True


def _is_alive(pid: object, started: object) -> bool:
    """Whether the process that wrote a document still runs: it may be trying the kernel right now."""
    return isinstance(pid, int) and started is not None and _started(pid) == started


def _started(pid: int) -> int | None:
    """When the process was started, in the kernel's ticks since boot; None where there is none of that number."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return None
    return None if fields[0] in "ZX" else int(fields[19])
