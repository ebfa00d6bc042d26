"""Whether this thread is the only one that may be calling CUDA's libraries now.

Python tells of other threads, autograd's among them once they have run Python code. These work only while the thread that
called `backward` waits for them, so those that a captured backward was seen in are no others.
"""

from __future__ import annotations

import sys
import threading

import torch

_ENGINE = ("_engine_run_backward", "torch.autograd.graph")
"""The innermost frame of a thread that waits for autograd: its function and module."""

_graph_task = getattr(torch._C, "_current_graph_task_id", None)
_has_context = getattr(torch._C, "_cuda_hasPrimaryContext", None)

_autograds: set[int] = set()


def see_backward() -> None:
    """Remember the calling thread if it is one of autograd's own, in which a backward runs for the main thread."""
    me, main = threading.get_ident(), threading.main_thread().ident
    if me != main and _is_in_backward() and _waits(main):
        _autograds.add(me)


def is_alone(device: int) -> bool:
    """Whether no other thread may be using CUDA's libraries; `device` is the index of the one that this thread uses.

    Asked in the main thread outside of a backward, or in autograd's thread while the main one waits for it and no other
    GPU is in use, whose thread would be at work as well. False wherever it is not sure.
    """
    me, main = threading.get_ident(), threading.main_thread().ident
    if me == main:
        quiet = not _is_in_backward()
    else:
        see_backward()
        quiet = me in _autograds and _is_in_backward() and _waits(main) and _is_only_device(device)
    others = (t for t in threading.enumerate() if t.ident not in (me, main) and t.ident not in _autograds)
    return quiet and all(map(_calls_no_library, others))


def _calls_no_library(thread: threading.Thread) -> bool:
    """One of fxopt's own, or the one by which tqdm redraws progress bars, which is there once anybody has shown one."""
    return thread.name.startswith("fxopt") or type(thread).__module__ == "tqdm._monitor"


def _is_in_backward() -> bool:
    return _graph_task is not None and _graph_task() >= 0


def _waits(thread: int | None) -> bool:
    """Whether the thread is where it waits for autograd."""
    frame = None if thread is None else sys._current_frames().get(thread)
    return frame is not None and (frame.f_code.co_name, frame.f_globals.get("__name__")) == _ENGINE


def _is_only_device(device: int) -> bool:
    if _has_context is None:
        return torch.cuda.device_count() == 1
    return not any(_has_context(index) for index in range(torch.cuda.device_count()) if index != device)
