"""What happened while a graph was compiled: retreats, pass counts, times, kernels. `report` turns it into text."""

from __future__ import annotations

import contextlib
import time
import warnings
from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass, field

from fxopt.errors import RetreatError

WARNING = "warning"
"""The topic of notes that are told to the user."""

_told: set[str] = set()


def warn_once(kind: str, text: str, stacklevel: int = 2) -> None:
    """A Python warning, once in a process for each `kind`."""
    if kind not in _told:
        _told.add(kind)
        warnings.warn(text, stacklevel=stacklevel)


@dataclass
class KernelEntry:
    """One step of the plan that runs generated code. `nbytes` counts bytes read and written once each (0 when symbolic)."""

    name: str
    language: str
    origins: tuple[str, ...]
    choice: str
    nbytes: int
    source: str


@dataclass
class Journal:
    """The record of one compilation; `strict` turns retreats into RetreatError."""

    graph: str
    strict: bool = False
    retreats: list[tuple[str, str]] = field(default_factory=list)  # (what, reason)
    passes: list[tuple[str, int, float]] = field(default_factory=list)  # (name, rewrites, seconds)
    seconds: dict[str, float] = field(default_factory=dict)
    kernels: list[KernelEntry] = field(default_factory=list)
    library: list[tuple[str, str]] = field(default_factory=list)  # (op, origin)
    contests: dict[str, dict[str, float]] = field(default_factory=dict)  # region -> seconds of each configuration measured
    notes: list[tuple[str, str]] = field(default_factory=list)  # (topic, text)
    memory: dict[str, int] = field(default_factory=dict)  # bytes at the plan's peak, in all and by part, beside the inputs
    provisional: bool = False  # compiled as far as time and tools allowed today: not to be remembered
    _part: str | None = None  # the part of a phase that is being timed

    def retreat(self, what: str, reason: str) -> None:
        """Note that `what` runs as ATen and why. Raises RetreatError when strict."""
        if self.strict:
            raise RetreatError(f"{self.graph}: {what} falls back to ATen: {reason} (strict=True forbids this)")
        if (what, reason) not in self.retreats:  # a graph is lowered again when a kernel was not built
            self.retreats.append((what, reason))

    def note(self, topic: str, text: str) -> None:
        self.notes.append((topic, text))

    def warn(self, text: str) -> None:
        """Note `text` and tell the user: a Python warning, once in a process, however often the graph is compiled."""
        self.note(WARNING, text)
        warn_once(text, text, stacklevel=3)

    @contextlib.contextmanager
    def timed(self, phase: str) -> Iterator[None]:
        """Add the wall time of the block to `seconds[phase]`.

        A part of a phase is called "phase: part", and counts in its phase. Within another part, it does not count in that.
        """
        start, around = time.perf_counter(), self._part
        if ": " in phase:
            self._part = phase
        try:
            yield
        finally:
            taken, self._part = time.perf_counter() - start, around
            self.seconds[phase] = self.seconds.get(phase, 0.0) + taken
            if around is not None and ": " in phase:
                self.seconds[around] = self.seconds.get(around, 0.0) - taken


RECENT: deque[Journal] = deque(maxlen=256)
"""Journals of the latest compilations in this process, oldest first. `explain` reads those that its own call added."""
