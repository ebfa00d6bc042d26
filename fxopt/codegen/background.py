"""What is worth having compiled, but not worth waiting for: a thread finds or makes it behind the caller's back."""

from __future__ import annotations

import atexit
import logging
import os
import threading
import time
from abc import ABC, abstractmethod
from typing import Generic, TypeVar

from fxopt.codegen import cxx

T = TypeVar("T")

log = logging.getLogger("fxopt")

_END_SECONDS = 2.0
"""More than it takes to end the compiler, and to find out that it has ended."""


class Background(ABC, Generic[T]):
    """Calling it gives what `make` has made, once that is there, and None until then. The first call starts the thread.

    Nobody waits, and the commands that `cxx.execute` runs for it do not outlive this process. A subclass says in `without`
    what is done in its absence; `reason` is why there is none, when that is known.
    """

    without: str

    def __init__(self) -> None:
        self.reason: str | None = None
        self.is_ending = False
        self.process = os.getpid()
        self._made: T | None = None
        self._thread: threading.Thread | None = None
        self._lock = threading.Lock()

    @abstractmethod
    def make(self) -> T | str:
        """What is wanted, or why it cannot be had. Any exception is a reason, too."""

    def __call__(self) -> T | None:
        """What is there now; None as long as there is nothing."""
        if self._made is None and self._thread is None:
            with self._lock:
                if self._thread is None:
                    self._thread = threading.Thread(target=self._work, name=f"fxopt: {type(self).__name__}", daemon=True)
                    self._start(self._thread)
        return self._made

    def _start(self, thread: threading.Thread) -> None:
        try:
            thread.start()
            atexit.register(self._end)
        except RuntimeError as error:  # there are too many, or the interpreter ends
            self._give_up(error)

    def wait(self) -> T | None:
        """What is there when the thread has ended; None if there is nothing."""
        self()
        with self._lock:  # it has been started, or never will be
            thread = self._thread
        if thread is not None and thread.is_alive():
            thread.join()
        return self._made

    def _work(self) -> None:
        try:
            made = self.make()
            if isinstance(made, str):
                self._give_up(made)
            else:
                self._made = made
        except Exception as error:  # in a thread of nobody's: to be seen where the reason is
            self._give_up(error)

    def _give_up(self, reason: str | Exception) -> None:
        text = reason if isinstance(reason, str) else f"{type(reason).__name__}: {reason}".partition("\n")[0]
        self.reason = text
        if not self.is_ending:
            log.info("%s: %s", self.without, text)

    def _end(self) -> None:
        thread = self._thread
        if os.getpid() != self.process or thread is None:
            return
        self.is_ending = True
        deadline = time.monotonic() + _END_SECONDS
        while thread.is_alive() and time.monotonic() < deadline:  # a command may be about to be started
            cxx.end_all()
            thread.join(0.01)
