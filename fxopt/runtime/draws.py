"""Seeds for the random numbers of a plan: drawn when a step asks for one, or before a captured run is played.

A captured run cannot draw: torch's generator counts on the host. Its seeds are drawn before each replay, in the order of the
plan, and written to where the captured kernels read them, so that a generator advances exactly as without capture.
"""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Iterator, Sequence

import torch

from fxopt.ir import random_ops

SEED = "fxopt::seed.default"


class _Given(threading.local):
    seeds: Iterator[torch.Tensor] | None = None


_given = _Given()


def draw(device: torch.device) -> torch.Tensor:
    """What `fxopt::seed` returns, int64 []; inside `given`, the next of the seeds given."""
    seeds = _given.seeds
    return random_ops.seed(device) if seeds is None else next(seeds)


@contextlib.contextmanager
def given(seeds: Sequence[torch.Tensor]) -> Iterator[None]:
    """`draw` in this thread returns these tensors in turn, and draws nothing."""
    _given.seeds = iter(seeds)
    try:
        yield
    finally:
        _given.seeds = None
