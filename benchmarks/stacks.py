"""Where the wall time of a block goes: the main thread's stack, sampled."""

from __future__ import annotations

import contextlib
import signal
import time
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path
from types import CodeType, FrameType

INTERVAL_SECONDS = 0.004

Stack = tuple[CodeType, ...]


@contextlib.contextmanager
def sampled(path: Path | None) -> Iterator[None]:
    """Write what the block spent its time in to `path`: a line for each stack, outermost function first, names separated by
    semicolons, then milliseconds. Flame graphs are drawn from this form. Nothing happens without a path.

    Only in the main thread, with SIGALRM unused. Functions of C count for the Python function that calls them.
    """
    if path is None:
        yield
        return
    seconds: defaultdict[Stack, float] = defaultdict(float)
    last = time.perf_counter()

    def note(_: int, frame: FrameType | None) -> None:
        nonlocal last
        now = time.perf_counter()
        seconds[_stack(frame)] += now - last
        last = now
        signal.setitimer(signal.ITIMER_REAL, INTERVAL_SECONDS)  # not periodic: samples must not meet on a slow machine

    before = signal.signal(signal.SIGALRM, note)
    signal.setitimer(signal.ITIMER_REAL, INTERVAL_SECONDS)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)
    lines: defaultdict[str, float] = defaultdict(float)
    for stack, spent in seconds.items():
        lines[";".join(map(_name, reversed(stack)))] += 1000 * spent
    path.write_text("".join(f"{names} {spent:.1f}\n" for names, spent in lines.items()))


def _stack(frame: FrameType | None) -> Stack:
    """Innermost function first."""
    codes = []
    while frame is not None:
        codes.append(frame.f_code)
        frame = frame.f_back
    return tuple(codes)


def _name(code: CodeType) -> str:
    return f"{Path(code.co_filename).stem}.{code.co_qualname}".replace(" ", "")
