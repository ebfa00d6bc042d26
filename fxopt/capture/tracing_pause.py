"""No garbage collections while Dynamo traces for fxopt, either: a tenth of a warm start's time.

A backend is called when Dynamo has traced. Before, only Dynamo's callbacks for the start and the end of a compilation run,
for every backend; whose compilation it is, the frame that called them knows. Where that looks otherwise in another torch,
nothing is paused.
"""

from __future__ import annotations

import contextlib
import sys
from typing import Any

from torch._dynamo.callback import callback_handler

from fxopt.garbage import collection_paused

_FRAMES = 12
"""So far up is Dynamo's compilation above its callbacks: 6 in the versions that were read."""

_paused = contextlib.ExitStack()  # Dynamo tells of the first start and the last end of those that are nested


def pause_while_tracing() -> None:
    """From the next compilation on, with this backend only. `torch.compiler.reset` forgets it; calling again is free."""
    if _on_start not in callback_handler.start_callbacks:
        callback_handler.register_start_callback(_on_start)
        callback_handler.register_end_callback(_on_end)


def _on_start(_: Any) -> None:
    if _backend_name() == "fxopt":
        _paused.enter_context(collection_paused())


def _on_end(_: Any) -> None:
    _paused.close()


def _backend_name() -> str | None:
    """What the backend of the compilation is called that runs callbacks now."""
    frame = sys._getframe()
    for _ in range(_FRAMES):
        if frame.f_back is None:
            break
        frame = frame.f_back
        if "compiler_fn" in frame.f_locals:
            name: str | None = getattr(frame.f_locals["compiler_fn"], "compiler_name", None)
            return name
    return None
