"""What the workers of test_workers.py run."""

from __future__ import annotations

import os
import signal
import sys
import time
from pathlib import Path
from typing import Any

WARM = False
REHEARSED_IN = 0


def warm_up() -> None:
    global WARM
    WARM = True
    print("libraries print what they like")


def rehearse() -> None:
    global REHEARSED_IN
    REHEARSED_IN = os.getpid()


def broken_warm_up() -> None:
    raise ImportError("no such compiler")


def job(kind: str, value: Any = None) -> Any:
    print("noise on standard output")
    match kind:
        case "double":
            return [value, value]
        case "warm":
            return WARM
        case "rehearsed":
            return [REHEARSED_IN, os.getppid()]
        case "touch":
            Path(value).touch()
            return "touched"
        case "await":
            deadline = time.monotonic() + 60
            while not Path(value).exists() and time.monotonic() < deadline:
                time.sleep(0.01)
            return Path(value).exists()
        case "pid":
            time.sleep(0.05)
            return os.getpid()
        case "raise":
            print("error: line 3 is wrong", file=sys.stderr)
            raise ValueError(value)
        case "die":
            os.kill(os.getpid(), signal.SIGKILL)
        case "die once":
            marker = Path(value)
            if not marker.exists():
                marker.touch()
                os.kill(os.getpid(), signal.SIGKILL)
            return "survived"
        case "kill helper":
            marker = Path(value)
            if not marker.exists():
                marker.touch()
                os.kill(os.getppid(), signal.SIGKILL)
            return "survived"
        case "hang":
            time.sleep(600)
    raise AssertionError(kind)
