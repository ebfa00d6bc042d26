"""Running a batched kernel: its tables in device memory, and when they are written.

A member's place among the programs and its size never change; those two tables are made when the plan is bound. The
addresses may be others in each call. They are compared with the last call's, and only copied to the device again if one has
changed, or if the stream has: a table belongs to the stream that it was copied on, so that no kernel reads it before it is
there nor after its memory has become something else's. The page-locked memory that a copy comes from is taken from
torch's allocator each time, which hands it out again only when the copy is done. In a CUDA graph the copy runs at every
replay, so its source is kept for ever, and the table it writes is the graph's own.
"""

from __future__ import annotations

import ctypes
import functools
from array import array
from collections.abc import Sequence
from typing import Any

import torch

from fxopt.runtime.launch import Launcher

ALIGNMENT = 16
"""Bytes; memory of which a batched kernel accesses that much at once."""


def program_count(members: Sequence[int], block: int) -> int:
    """How many programs of `block` elements run members of these numbers of elements."""
    return sum(-(-count // block) for count in members)


def layout(members: Sequence[int], block: int) -> tuple[torch.Tensor, torch.Tensor]:
    """(the member of each program, [number of elements, first program] of each member)."""
    counts = torch.tensor([-(-count // block) for count in members], device="cpu")
    owners = torch.repeat_interleave(torch.arange(len(members), dtype=torch.int32, device="cpu"), counts)
    first = torch.cumsum(counts, 0) - counts
    return owners, torch.stack([torch.tensor(members, device="cpu"), first], 1)


@functools.cache
def device_layout(members: tuple[int, ...], block: int, device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
    """`layout` in the memory of `device`. Never freed, as kernels are never unloaded: launches may be in flight on any
    stream or recorded in CUDA graphs."""
    with torch.inference_mode(False):
        owners, sizes = layout(members, block)
        return _on_device(owners, device, wait=True), _on_device(sizes, device, wait=True)


def page_locked(count: int) -> torch.Tensor:
    """Host memory for `count` addresses that copies to a device are asynchronous from."""
    return torch.empty(count, dtype=torch.int64, device="cpu", pin_memory=True)


def _on_device(source: torch.Tensor, device: torch.device, wait: bool = False) -> torch.Tensor:
    """A copy, made in the current stream's order; with `wait` it is there for every stream on return."""
    return torch.empty_like(source, device=device).copy_(source, non_blocking=not wait)


_sources_of_graphs: list[torch.Tensor] = []
"""What the copies in CUDA graphs read."""


class BatchLauncher:
    """Launches one batched kernel on one device. Not to be shared between threads."""

    def __init__(self, launch: Launcher, members: tuple[int, ...], block: int, width: int, device: torch.device) -> None:
        """`launch` runs the kernel; a member has `width` addresses, a program does `block` elements."""
        self._launch, self._device = launch, device
        owners, sizes = device_layout(members, block, device)
        self._programs, self._owners, self._sizes = len(owners), owners.data_ptr(), sizes.data_ptr()
        self._count = len(members) * width
        self._spare: torch.Tensor | None = page_locked(self._count)  # a stream that is captured should not have to allocate
        self._table = torch.empty(0, device="cpu")
        self._known: Any = None

    def __call__(self, stream: int, addresses: tuple[int, ...]) -> None:
        """Run on `stream`, the current one; `addresses` are those of each member's buffers, one member after another."""
        if torch.cuda.is_current_stream_capturing():
            table = self._copied(addresses, self._for_ever())
        else:
            key = (stream, addresses)
            if key != self._known:
                self._known = None
                self._spare = self._spare if self._spare is not None else page_locked(self._count)
                self._table = self._copied(addresses, page_locked(self._count))
                self._known = key
            table = self._table
        self._launch(stream, self._programs, 1, 1, self._owners, self._sizes, table.data_ptr())

    def _copied(self, addresses: tuple[int, ...], staging: torch.Tensor) -> torch.Tensor:
        """`addresses` in device memory, by way of `staging`, in the current stream's order."""
        words = array("Q", addresses)
        ctypes.memmove(staging.data_ptr(), words.buffer_info()[0], 8 * self._count)
        return _on_device(staging, self._device)

    def _for_ever(self) -> torch.Tensor:
        staging, self._spare = self._spare, None
        if staging is None:
            staging = page_locked(self._count)
        _sources_of_graphs.append(staging)
        return staging
