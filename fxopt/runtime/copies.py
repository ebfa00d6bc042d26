"""The kernel that does several copies in one launch: the driver makes it of copies.ptx, and it has to prove itself first."""

from __future__ import annotations

import ctypes
import functools
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from fxopt.runtime.launch import check, context_of, driver

MOST = 32
"""Copies in one launch."""
THREADS = 256
_PTX = Path(__file__).parent / "copies.ptx"
_PROBES = ((0, 0, 16), (16, 48, 4096), (5000, 5001, 777), (8191, 9000, 1), (10000, 10008, 8), (12288, 12288, 70001))
"""Copies by which the kernel is judged: where from, where to, bytes."""
_PROBE_BYTES = 90_000


class Copies(ctypes.Structure):
    """Its parameter: (target, source, bytes) of each."""

    _fields_ = (("all", ctypes.c_uint64 * 3 * MOST),)


@functools.cache
def copying_kernel(index: int) -> int:
    """The handle of the kernel on that device, which is the current one; 0 where the driver refuses it or it copies wrongly.

    Waits for the device at its first call.
    """
    device, lib = torch.device("cuda", index), driver()
    context_of(index, lib, "loading the kernel of copies")
    module, function = ctypes.c_void_p(), ctypes.c_void_p()
    if lib.cuModuleLoadData(ctypes.byref(module), _PTX.read_bytes() + b"\0"):
        return 0
    check(lib, lib.cuModuleGetFunction(ctypes.byref(function), module, b"fxopt_copies"), "looking for a kernel")
    return int(function.value or 0) if _is_right(lib, function, device) else 0


def _is_right(lib: Any, function: ctypes.c_void_p, device: torch.device) -> bool:
    source = torch.arange(_PROBE_BYTES, device=device).mul_(2654435761).bitwise_right_shift_(7).to(torch.uint8)
    got, want = torch.zeros_like(source), torch.zeros_like(source)
    for a, b, n in _PROBES:
        want[b : b + n] = source[a : a + n]
    copies = parameters([(got.data_ptr() + b, source.data_ptr() + a, n) for a, b, n in _PROBES])
    pointers = (ctypes.c_void_p * 1)(ctypes.addressof(copies))
    stream = ctypes.c_void_p(torch.cuda.current_stream(device).cuda_stream)
    code = lib.cuLaunchKernel(function, 3, len(_PROBES), 1, THREADS, 1, 1, 0, stream, pointers, None)
    return code == 0 and bool(torch.equal(got, want))


def parameters(copies: Sequence[tuple[int, int, int]]) -> Copies:
    """(target, source, bytes) of each, at most MOST."""
    made = Copies()
    for k, one in enumerate(copies):
        made.all[k][:] = one
    return made
