"""Every FXOPT_* environment variable, typed, in one place. Read at use, never on import, so a test may set them at any time.

Those that change what a graph is compiled to are folded into the options by `Options.parse`, or, like the C++ compiler, are
part of a kernel's key themselves (`codegen/cpp_build.py:toolchain_id`); keys need not look here.
"""

from __future__ import annotations

import os
import re
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Generic, TypeVar

T = TypeVar("T")


@dataclass(frozen=True)
class Knob(Generic[T]):
    """One environment variable. Where `parse` raises ValueError, the default holds, with a warning."""

    name: str
    parse: Callable[[str], T]
    default: T
    doc: str

    def get(self) -> T:
        """The current value; the default when unset, empty or malformed."""
        text = os.environ.get(self.name, "").strip()
        if not text:
            return self.default
        try:
            return self.parse(text)
        except ValueError as error:
            warnings.warn(f"ignoring {self.name}={text!r}: {error} ({self.doc})", stacklevel=2)
            return self.default


def _flag(text: str) -> bool:
    lowered = text.lower()
    if lowered in ("1", "true", "yes", "on"):
        return True
    if lowered in ("0", "false", "no", "off"):
        return False
    raise ValueError("expected 0 or 1")


def _count(text: str) -> int:
    value = int(text)
    if value < 0:
        raise ValueError("expected a number that is not negative")
    return value


def _seconds(text: str) -> float:
    value = float(text)
    if not 0 <= value < float("inf"):
        raise ValueError("expected a number of seconds")
    return value


def _size(text: str) -> int:
    """Bytes: "300000", "500MB" (powers of 1000), "2GiB" or "2G" (powers of 1024)."""
    found = re.fullmatch(r"(\d+(?:\.\d+)?)\s*(?:([kmgt])(i?b)?|b)?", text.lower())
    if found is None:
        raise ValueError("expected a number of bytes, or one with kB, MB, GB, KiB, MiB, GiB")
    number, prefix, binary = found.groups()
    return int(float(number) * (1000 if binary == "b" else 1024) ** ("kmgt".index(prefix) + 1 if prefix else 0))


def _names(text: str) -> tuple[str, ...]:
    return tuple(name.strip() for name in text.split(",") if name.strip())


def _path(text: str) -> Path | None:
    return Path(text).expanduser()


def _optional_count(text: str) -> int | None:
    return _count(text)


def _optional_text(text: str) -> str | None:
    return text


CACHE_DIR: Knob[Path | None] = Knob(
    "FXOPT_CACHE_DIR", _path, None, "directory for kernels and measurements; default $XDG_CACHE_HOME/fxopt or ~/.cache/fxopt"
)
CACHE_SIZE: Knob[int] = Knob(
    "FXOPT_CACHE_SIZE",
    _size,
    4 << 30,
    'how large that directory may grow before what was used least recently is deleted: bytes, or "2GiB"; default 4GiB, '
    "0 for no limit",
)
DUMP: Knob[str | None] = Knob(
    "FXOPT_DUMP", _optional_text, None, "directory that receives the graph after each pass that changed it"
)
DISABLE: Knob[tuple[str, ...]] = Knob(
    "FXOPT_DISABLE", _names, (), "comma-separated names of passes to switch off; cuda-graphs and early-launch are two, too"
)
FUEL: Knob[int | None] = Knob(
    "FXOPT_FUEL",
    _optional_count,
    None,
    "how many rewrites may be applied in all, for bisecting; unlimited when unset",
)
STRICT: Knob[bool] = Knob("FXOPT_STRICT", _flag, False, "1: raise RetreatError where something would fall back to ATen")
CXX: Knob[str | None] = Knob("FXOPT_CXX", _optional_text, None, "C++ compiler to use instead of $CXX, g++, c++ or clang++")
WORKERS: Knob[int | None] = Knob(
    "FXOPT_WORKERS", _optional_count, None, "compile worker processes; default: one per core, at most 16"
)
LOCK_DIR: Knob[Path | None] = Knob(
    "FXOPT_LOCK_DIR",
    _path,
    None,
    "directory of the locks by which processes that do not share a cache measure on a GPU one after the other; default: "
    "locks in the cache directory",
)

TUNING_SECONDS: Knob[float | None] = Knob(
    "FXOPT_TUNING_SECONDS",
    _seconds,
    None,
    "time for measuring kernels in one graph; 0: the cost model's choice, unmeasured; default: what the mode allows",
)

TRACEBACK: Knob[bool] = Knob("FXOPT_TRACEBACK", _flag, False, "1: the command line shows where an error was raised")

ALL: tuple[Knob[object], ...] = (
    *(CACHE_DIR, CACHE_SIZE, DUMP, DISABLE, FUEL, STRICT, CXX, WORKERS, LOCK_DIR, TUNING_SECONDS, TRACEBACK),  # type: ignore[assignment]
)
"""Every knob, for documentation and tests."""
