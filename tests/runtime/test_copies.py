"""Copies that are nodes of a captured run, against a driver that records calls; on a GPU, against the real one."""

from __future__ import annotations

import ctypes
import random
import shutil
import subprocess
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from fxopt.runtime import copies
from fxopt.runtime.copies import MOST, MOST_BLOCKS, Copy, CopyNode, NodeParameters, capture_nodes, tell_nodes
from fxopt.runtime.launch import CudaError


class Capturing:
    """A driver whose stream is being captured: it gives handles to what is launched."""

    def __init__(self, code: int = 0) -> None:
        self.code, self.launches = code, list[tuple[Any, ...]]()
        self._last = (ctypes.c_void_p * 1)()

    def cuLaunchKernel(self, function: Any, *arguments: Any) -> int:
        *shape, stream, _, _ = arguments
        self.launches.append((function.value, *shape, stream.value))
        return self.code

    def cuStreamGetCaptureInfo_v2(self, stream: Any, status: Any, number: Any, graph: Any, nodes: Any, count: Any) -> int:
        self._last[0] = 100 + len(self.launches)
        nodes._obj.contents = ctypes.c_void_p.from_buffer(self._last)
        count._obj.value = 1
        return 0

    def cuGetErrorName(self, code: int, name: Any) -> None: ...

    cuGetErrorString = cuGetErrorName


def told(node: CopyNode) -> list[Copy]:
    """What the driver finds at the addresses that a node gives it."""
    address = ctypes.c_uint64.from_address(node.parameters.parameters).value
    found = copies.Copies.from_address(address)
    return [(target, source, nbytes) for target, source, nbytes in found.all[: node.parameters.grid_y]]


EMULATED = r"""
#define __device__
#define __global__
#define __grid_constant__
struct uint4 { unsigned x, y, z, w; };
struct { unsigned x, y; } gridDim, blockDim, blockIdx, threadIdx;
#include SOURCE
extern "C" void run(unsigned blocks, unsigned count, unsigned threads, const Copies* copies) {
  gridDim.x = blocks, blockDim.x = threads;
  for (blockIdx.y = 0; blockIdx.y < count; ++blockIdx.y)
    for (blockIdx.x = 0; blockIdx.x < blocks; ++blockIdx.x)
      for (threadIdx.x = 0; threadIdx.x < threads; ++threadIdx.x) fxopt_copies(*copies);
}
"""


def test_the_kernel_copies_every_byte_once_whatever_the_addresses(tmp_path: Path) -> None:
    """The kernel's text, compiled for the host and run one thread after the other."""
    compiler = shutil.which("g++") or shutil.which("clang++") or shutil.which("c++")
    if compiler is None:
        pytest.skip("no C++ compiler")
    (tmp_path / "emulated.cpp").write_text(EMULATED)
    source = Path(copies.__file__).parent / "copies.cu"
    command = [compiler, "-O1", "-shared", "-fPIC", f'-DSOURCE="{source}"', "emulated.cpp", "-o", "emulated.so"]
    subprocess.run(command, check=True, cwd=tmp_path)
    run = ctypes.CDLL(str(tmp_path / "emulated.so")).run
    rng = random.Random(0)
    for _ in range(200):
        memory = torch.randint(0, 256, (4, 1024), dtype=torch.uint8)
        got = memory.clone()
        wanted, base = memory.clone(), got.data_ptr()
        told = list[Copy]()
        for row in range(2):
            a, b, n = rng.randrange(64), rng.choice((0, 2, 4, 8, 16, rng.randrange(64))), rng.randrange(900)
            b = b if rng.random() < 0.5 else a % 16 + 16 * (b // 16)
            wanted[row, b : b + n] = wanted[row + 2, a : a + n]
            told.append((base + 1024 * row + b, base + 1024 * (row + 2) + a, n))
        made = copies.parameters(told)
        run(rng.randrange(1, 4), len(told), rng.choice((1, 32)), ctypes.byref(made))
        assert torch.equal(got, wanted), told


def test_nodes_have_room_for_all_copies() -> None:
    lib = Capturing()
    nodes = capture_nodes(lib, 9, 7, [16, 4097, *[1 << 30] * MOST])
    assert lib.launches == [(9, MOST_BLOCKS, MOST, 1, 256, 1, 1, 0, 7), (9, MOST_BLOCKS, 2, 1, 256, 1, 1, 0, 7)]
    assert [node.handle for node in nodes] == [101, 102]
    assert [told(node) for node in nodes] == [[(0, 0, 0)] * MOST, [(0, 0, 0)] * 2], "nothing is copied yet"
    assert capture_nodes(lib, 9, 7, []) == ()
    (small,) = capture_nodes(lib, 9, 7, [4096, 4097])
    assert small.parameters.grid_x == 2


def test_nodes_are_told_all_copies_once() -> None:
    nodes = capture_nodes(Capturing(), 9, 7, [16] * (MOST + 1))
    wanted = [(1000 + k, 2000 + k, 16) for k in range(MOST + 1)]
    changed: list[int] = []

    def change(node: Any, parameters: Any) -> None:
        assert isinstance(parameters._obj, NodeParameters) and parameters._obj.function == 9
        changed.append(node.value)

    tell_nodes(nodes, wanted, change)
    assert [copy for node in nodes for copy in told(node)] == wanted and changed == [101, 102]
    tell_nodes(nodes, wanted, change)
    assert changed == [101, 102], "they know"
    tell_nodes(nodes, wanted[:MOST], change)
    assert changed == [101, 102, 102] and told(nodes[1]) == [(0, 0, 0)], "the last copy is not done any more"


def test_a_driver_that_refuses_is_told_again() -> None:
    (node,) = capture_nodes(Capturing(), 9, 7, [16])
    copy = [(1, 2, 16)]

    def refuse(handle: Any, parameters: Any) -> None:
        raise CudaError("telling", 1, "CUDA_ERROR_INVALID_VALUE", "no")

    calls: list[Any] = []
    for _ in range(2):
        with pytest.raises(CudaError):
            node.tell(copy, refuse)
    node.tell(copy, lambda *arguments: calls.append(arguments))
    node.tell(copy, lambda *arguments: calls.append(arguments))
    assert len(calls) == 1
    with pytest.raises(CudaError, match="capturing copies"):
        capture_nodes(Capturing(code=900), 9, 7, [16])


@pytest.mark.parametrize("missing", ["kernel", "cuStreamGetCaptureInfo_v2", "cuGraphExecKernelNodeSetParams"])
def test_without_what_nodes_need(missing: str, monkeypatch: pytest.MonkeyPatch) -> None:
    calls = {"cuStreamGetCaptureInfo_v2", "cuGraphExecKernelNodeSetParams"} - {missing}
    monkeypatch.setattr(copies, "driver", lambda: SimpleNamespace(**dict.fromkeys(calls)))
    monkeypatch.setattr(copies, "copying_kernel", lambda index: int(missing != "kernel"))
    monkeypatch.setattr(copies, "_are_nodes_right", lambda *args: pytest.fail("asked"))
    assert not copies.can_be_told(0, 7)


def test_a_driver_that_refuses_has_no_nodes_unless_all_is_lost(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(copies, "driver", lambda: SimpleNamespace(**dict.fromkeys(copies._CALLS)))
    monkeypatch.setattr(copies, "copying_kernel", lambda index: 1)

    def fail(code: int) -> None:
        def are_right(*args: Any) -> bool:
            raise CudaError("capturing copies", code, "", "")

        monkeypatch.setattr(copies, "_are_nodes_right", are_right)

    fail(801)
    assert not copies.can_be_told(0, 7)
    fail(700)
    with pytest.raises(CudaError):
        copies.can_be_told(0, 7)
