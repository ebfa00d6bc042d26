"""Memory for intermediate values on the CPU, kept between calls and shared by all executors of the process.

A large allocation returned to the system costs its page faults again at the next call: for a 6 MB activation more than a
kernel that fills it. One running call takes one block for all its slots and gives it back at the end; concurrent calls take
different blocks. CUDA needs none of this, as torch's caching allocator keeps memory itself.
"""

from __future__ import annotations

import threading

import torch

PAGE = 4096
LARGEST_KEPT = 1 << 29
"""Bytes; a block above that goes back to the system, as it would from eager."""
MOST_KEPT = 4

_kept: list[torch.Tensor] = []
_lock = threading.Lock()


def take(nbytes: int) -> torch.Tensor:
    """A block of at least `nbytes` bytes (uint8, contents undefined) that nobody else has."""
    with _lock:
        fitting = [i for i, block in enumerate(_kept) if block.numel() >= nbytes]
        if fitting:
            return _kept.pop(min(fitting, key=lambda i: _kept[i].numel()))
        if _kept:
            _kept.pop(min(range(len(_kept)), key=lambda i: _kept[i].numel()))  # the new one replaces it
    with torch.inference_mode(False):  # the block outlives the mode this call may run in
        return torch.empty(-(-nbytes // PAGE) * PAGE, dtype=torch.uint8)


def give(block: torch.Tensor) -> None:
    """Hand a block back."""
    if block.numel() <= LARGEST_KEPT:
        with _lock:
            _kept.append(block)
            if len(_kept) > MOST_KEPT:
                _kept.pop(min(range(len(_kept)), key=lambda i: _kept[i].numel()))
