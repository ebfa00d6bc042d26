"""Turns at one device: processes that measure on it wait for each other, lest their kernels slow each other down.

A turn is a lock of a file named after the device's UUID, which all processes see alike whatever CUDA_VISIBLE_DEVICES says.
The system frees it when its holder dies. Threads of one process wait for each other too; one thread may nest turns.

Waiting can be bounded, because nothing but the quality of a measurement depends on it: whoever has waited too long goes on,
and so does everybody where there are no file locks.
"""

from __future__ import annotations

import contextlib
import fcntl
import math
import os
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import torch

_POLL_SECONDS = 0.01


@dataclass
class _Lock:
    """This process's side of one lock file. What `owner` guards belongs to the thread that holds it."""

    owner: threading.RLock = field(default_factory=threading.RLock)
    turns: int = 0


_locks: dict[tuple[int, Path], _Lock] = {}
_locks_guard = threading.Lock()
_waited = 0.0


def device_identity(device: torch.device) -> str:
    """The device's name in the file system: "gpu-" and its UUID, or "cpu". Loads CUDA for a CUDA device."""
    if device.type != "cuda":
        return device.type
    return f"gpu-{torch.cuda.get_device_properties(device).uuid}"


def seconds_waited() -> float:
    """Seconds that threads of this process have waited for their turns so far."""
    return _waited


@contextlib.contextmanager
def turn(folder: Path, identity: str, patience: float = math.inf, first: bool = False) -> Iterator[bool]:
    """Hold the device called `identity` among all who use `folder`, which is created when needed.

    Waits for up to `patience` seconds; those who are to be `first` wait for ever, in the system's queue, which is served
    before whoever asks from time to time. Yields whether the device is held; False means that others may be using it.
    """
    path = folder.absolute() / identity
    with _locks_guard:
        lock = _locks.setdefault((os.getpid(), path), _Lock())  # a forked child holds nothing of its parent's
    start = time.monotonic()
    held = lock.owner.acquire(timeout=min(patience, threading.TIMEOUT_MAX))
    with contextlib.ExitStack() as stack:
        if held:
            stack.callback(lock.owner.release)
            if lock.turns == 0:
                held = _lock_file(path, start + patience, stack, first)
            lock.turns += 1
            stack.callback(_leave, lock)
        _note_wait(time.monotonic() - start)
        yield held


def _leave(lock: _Lock) -> None:
    lock.turns -= 1


def _lock_file(path: Path, deadline: float, stack: contextlib.ExitStack, queued: bool) -> bool:
    """Lock `path` until `stack` unwinds; whether that was possible before `deadline`, for which who is `queued` does not
    look."""
    try:
        path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        handle = os.open(path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600)
        stack.callback(os.close, handle)
        while True:
            try:
                fcntl.flock(handle, fcntl.LOCK_EX | (0 if queued else fcntl.LOCK_NB))
            except BlockingIOError:
                if time.monotonic() >= deadline:
                    return False
                time.sleep(_POLL_SECONDS)
            else:
                # Not left to close(): a child forked meanwhile has the file open too.
                stack.callback(fcntl.flock, handle, fcntl.LOCK_UN)
                return True
    except OSError:
        return False


def _note_wait(seconds: float) -> None:
    global _waited
    with _locks_guard:
        _waited += seconds
