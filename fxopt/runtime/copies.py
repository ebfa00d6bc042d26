"""The kernel that does several copies in one launch: the driver makes it of copies.ptx, and it has to prove itself first.

In a captured run it is a node, which is told before each replay what to copy: that takes the host less than a launch. A
replay that has been enqueued keeps what it was told (the driver's promise for cuGraphExecKernelNodeSetParams).
"""

from __future__ import annotations

import ctypes
import functools
import itertools
import struct
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

from fxopt.runtime.launch import CudaError, check, context_of, driver

MOST = 32
"""Copies in one launch."""
THREADS = 256
MOST_BLOCKS = 1024
"""Of one copy; a thread copies 16 bytes at a time."""
_PTX = Path(__file__).parent / "copies.ptx"
_PROBES = (
    *((0, 0, 16), (16, 48, 4096), (5000, 5001, 777), (8191, 9000, 1), (10000, 10008, 8), (12288, 12288, 70001)),
    *((83000, 83004, 1003), (84500, 84502, 777)),
)
"""Copies by which the kernel is judged: where from, where to, bytes."""
_PROBE_BYTES = 90_000


_CALLS = ("cuStreamGetCaptureInfo_v2", "cuGraphExecKernelNodeSetParams")
"""Of the driver, without which there are no nodes."""
_THREAD_LOCAL = 1

Copy = tuple[int, int, int]
"""Target, source, bytes."""


class Copies(ctypes.Structure):
    """Its parameter: (target, source, bytes) of each."""

    _fields_ = (("all", ctypes.c_uint64 * 3 * MOST),)


class NodeParameters(ctypes.Structure):
    """The driver's CUDA_KERNEL_NODE_PARAMS, first version."""

    _fields_ = (
        ("function", ctypes.c_void_p),
        *((f"{what}_{axis}", ctypes.c_uint) for what in ("grid", "block") for axis in "xyz"),
        ("shared", ctypes.c_uint),
        ("parameters", ctypes.c_void_p),
        ("extra", ctypes.c_void_p),
    )


class Told(ctypes.Structure):
    """What a node copies in the next replay, which compiled code may change, too. Not known unless `is_known`."""

    _fields_ = (("copies", Copies), ("is_known", ctypes.c_uint64))


class CopyNode:
    """The kernel as a node of a captured run, for copies of at most as many bytes as `sizes` says.

    As it is captured, it copies nothing. `handle` is the driver's, from then on.
    """

    def __init__(self, kernel: int, sizes: Sequence[int]) -> None:
        self.told, self.handle = Told(), 0
        self._pointers = (ctypes.c_void_p * 1)(ctypes.addressof(self.told.copies))
        blocks = max(1, min(-(-max(sizes) // (16 * THREADS)), MOST_BLOCKS))
        self._grid = blocks, len(sizes)
        pointers = ctypes.cast(self._pointers, ctypes.c_void_p)
        self.parameters = NodeParameters(kernel, *self._grid, 1, THREADS, 1, 1, 0, pointers, None)

    def capture(self, lib: Any, stream: int) -> None:
        """Make it the next node of what is captured on a stream. Raises CudaError."""
        function, raw = ctypes.c_void_p(self.parameters.function), ctypes.c_void_p(stream)
        code = lib.cuLaunchKernel(function, *self._grid, 1, THREADS, 1, 1, 0, raw, self._pointers, None)
        check(lib, code, "capturing copies")
        self.handle = last_node(lib, stream)

    def tell(self, copies: Sequence[Copy], change: Callable[[Any, Any], None]) -> None:
        """Let following replays do these copies. `change(node, parameters)` sets a node of what is replayed."""
        told, wanted = self.told, parameters(copies)
        if told.is_known and bytes(wanted) == bytes(told.copies):
            return
        told.is_known = 0  # also for who interrupts this, and if it fails
        ctypes.memmove(ctypes.addressof(told.copies), ctypes.addressof(wanted), ctypes.sizeof(Copies))
        change(ctypes.c_void_p(self.handle), ctypes.byref(self.parameters))
        told.is_known = 1


def capture_nodes(lib: Any, kernel: int, stream: int, sizes: Sequence[int]) -> tuple[CopyNode, ...]:
    """The next nodes of what is captured on a stream, for copies of these bytes in this order. Raises CudaError."""
    nodes = tuple(CopyNode(kernel, sizes[k : k + MOST]) for k in range(0, len(sizes), MOST))
    for node in nodes:
        node.capture(lib, stream)
    return nodes


def tell_nodes(nodes: Sequence[CopyNode], copies: Sequence[Copy], change: Callable[[Any, Any], None]) -> None:
    """Let following replays do these copies and no others by the nodes."""
    for k, node in enumerate(nodes):
        node.tell(copies[k * MOST : (k + 1) * MOST], change)


def last_node(lib: Any, stream: int) -> int:
    """The handle of the node that the next one captured on a stream depends on. Raises CudaError."""
    status, number, graph = ctypes.c_int(), ctypes.c_uint64(), ctypes.c_void_p()
    nodes, count = ctypes.POINTER(ctypes.c_void_p)(), ctypes.c_size_t()
    outs = map(ctypes.byref, (status, number, graph, nodes, count))
    check(lib, lib.cuStreamGetCaptureInfo_v2(ctypes.c_void_p(stream), *outs), "asking for a capture's last node")
    assert count.value == 1
    return int(nodes[0] or 0)


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


def can_be_told(index: int, side: int) -> bool:
    """Whether nodes do on that device, which is the current one, what they are told. `side` is a stream that nobody uses.

    Waits for the device.
    """
    lib, kernel = driver(), copying_kernel(index)
    if not kernel or not all(hasattr(lib, name) for name in _CALLS):
        return False
    try:
        return _are_nodes_right(lib, kernel, torch.device("cuda", index), side)
    except CudaError as error:
        if error.ends_context:
            raise
        return False


def _are_nodes_right(lib: Any, kernel: int, device: torch.device, side: int) -> bool:
    """Whether each of several replays, enqueued one after the other, does the copies that its node was told before it."""
    source, want = _probe(device)
    got = torch.zeros_like(want)
    graph, executable, stream = ctypes.c_void_p(), ctypes.c_void_p(), ctypes.c_void_p(side)

    def change(node: Any, told: Any) -> None:
        check(lib, lib.cuGraphExecKernelNodeSetParams(executable, node, told), "telling a node")

    torch.cuda.synchronize(device)
    check(lib, lib.cuStreamBeginCapture_v2(stream, _THREAD_LOCAL), "capturing copies")
    try:
        (node,) = capture_nodes(lib, kernel, side, [n for *_, n in _PROBES])
    finally:
        ended = lib.cuStreamEndCapture(stream, ctypes.byref(graph))
    try:
        check(lib, ended, "capturing copies")
        check(lib, lib.cuGraphInstantiateWithFlags(ctypes.byref(executable), graph, ctypes.c_uint64(0)), "capturing copies")
        check(lib, lib.cuGraphLaunch(executable, stream), "replaying copies")
        for a, b, n in _PROBES:
            node.tell([(got.data_ptr() + b, source.data_ptr() + a, n)], change)
            check(lib, lib.cuGraphLaunch(executable, stream), "replaying copies")
        torch.cuda.synchronize(device)
        return bool(torch.equal(got, want))
    finally:
        if executable:
            lib.cuGraphExecDestroy(executable)
        if graph:
            lib.cuGraphDestroy(graph)


def _probe(device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
    """What probes copy from, and what they make of zeros."""
    source = torch.arange(_PROBE_BYTES, device=device).mul_(2654435761).bitwise_right_shift_(7).to(torch.uint8)
    want = torch.zeros_like(source)
    for a, b, n in _PROBES:
        want[b : b + n] = source[a : a + n]
    return source, want


def _is_right(lib: Any, function: ctypes.c_void_p, device: torch.device) -> bool:
    source, want = _probe(device)
    got = torch.zeros_like(want)
    copies = parameters([(got.data_ptr() + b, source.data_ptr() + a, n) for a, b, n in _PROBES])
    pointers = (ctypes.c_void_p * 1)(ctypes.addressof(copies))
    stream = ctypes.c_void_p(torch.cuda.current_stream(device).cuda_stream)
    code = lib.cuLaunchKernel(function, 3, len(_PROBES), 1, THREADS, 1, 1, 0, stream, pointers, None)
    return code == 0 and bool(torch.equal(got, want))


def parameters(copies: Sequence[Copy]) -> Copies:
    """(target, source, bytes) of each, at most MOST."""
    made = Copies()
    struct.pack_into(f"={3 * len(copies)}Q", made, 0, *itertools.chain.from_iterable(copies))
    return made
