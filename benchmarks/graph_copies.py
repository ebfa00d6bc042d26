"""What copies before and after a replay cost: launches of their own, or nodes of the graph that are set anew before each
launch: `python -m benchmarks.graph_copies --out FILE`.

A graph of small kernels, with a copy before and one after it, whose addresses may change from call to call. For each way:
host microseconds of a call in bursts with a free queue, and microseconds of a call when many are enqueued one after another.
"""

from __future__ import annotations

import ctypes
import json
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import torch
import typer

from fxopt.runtime.copies import THREADS, NodeParameters, copying_kernel, last_node, parameters
from fxopt.runtime.launch import check, driver

BURST, BURSTS = 20, 30
NODES = (20, 200, 600)


class Launches:
    """The copying kernel on addresses of two buffers, on a stream of its own."""

    def __init__(self) -> None:
        self.lib = driver()
        self.kernel = ctypes.c_void_p(copying_kernel(0))
        self.stream = torch.cuda.Stream()
        self.raw = ctypes.c_void_p(self.stream.cuda_stream)
        self.memory = torch.zeros(1 << 16, dtype=torch.uint8, device="cuda")
        self.kept: list[Any] = []

    def arguments(self, offset: int) -> Any:
        base = self.memory.data_ptr()
        made = parameters([(base + offset, base + 32768 + offset, 4096), (base + 8192, base + 40960, 16)])
        pointers = (ctypes.c_void_p * 1)(ctypes.addressof(made))
        self.kept += [made, pointers]
        return pointers

    def launch(self, pointers: Any) -> None:
        code = self.lib.cuLaunchKernel(self.kernel, 1, 2, 1, THREADS, 1, 1, 0, self.raw, pointers, None)
        check(self.lib, code, "launching")

    def captured(self, nodes: int, copies: bool) -> tuple[Any, Any, list[Any]]:
        """(what is launched, the graph, the handles of the copies' nodes)."""
        lib, graph, executable, found = self.lib, ctypes.c_void_p(), ctypes.c_void_p(), []
        check(lib, lib.cuStreamBeginCapture_v2(self.raw, 1), "beginning to capture")
        total = nodes + 2 * copies
        for k in range(total):
            self.launch(self.arguments(0))
            if copies and k in (0, total - 1):
                found.append(ctypes.c_void_p(last_node(lib, self.stream.cuda_stream)))
        check(lib, lib.cuStreamEndCapture(self.raw, ctypes.byref(graph)), "capturing")
        check(lib, lib.cuGraphInstantiateWithFlags(ctypes.byref(executable), graph, ctypes.c_uint64(0)), "instantiating")
        return executable, graph, found

    def set_node(self, executable: Any, node: Any, pointers: Any) -> Callable[[], None]:
        made = NodeParameters(self.kernel, 1, 2, 1, THREADS, 1, 1, 0, ctypes.cast(pointers, ctypes.c_void_p), None)
        self.kept.append(made)
        function, reference = self.lib.cuGraphExecKernelNodeSetParams, ctypes.byref(made)

        def call() -> None:
            check(self.lib, function(executable, node, reference), "setting a node")

        return call


def measured(call: Callable[[int], None]) -> dict[str, float]:
    """Host microseconds of `call(k)` in bursts, and the device's of one, for k that changes each time."""
    host, device = [], []
    for _ in range(BURSTS):
        torch.cuda.synchronize()
        start = time.perf_counter()
        for k in range(BURST):
            call(k)
        host.append((time.perf_counter() - start) / BURST * 1e6)
        torch.cuda.synchronize()
        start = time.perf_counter()
        for k in range(BURST * 5):
            call(k)
        torch.cuda.synchronize()
        device.append((time.perf_counter() - start) / (BURST * 5) * 1e6)
    return {"host_us": round(statistics.median(host), 2), "total_us": round(statistics.median(device), 2)}


def ways(nodes: int) -> dict[str, dict[str, float]]:
    run = Launches()
    lib, raw = run.lib, run.raw
    places = [run.arguments(16 * k) for k in range(8)]
    plain, _, _ = run.captured(nodes, copies=False)
    whole, graph, (first, last) = run.captured(nodes, copies=True)
    setters = [(run.set_node(whole, first, p), run.set_node(whole, last, p)) for p in places]

    def apart(k: int) -> None:
        run.launch(places[k % 8])
        check(lib, lib.cuGraphLaunch(plain, raw), "replaying")
        run.launch(places[k % 8])

    def by_the_driver(k: int) -> None:
        base = run.memory.data_ptr()
        lib.cuMemcpyDtoDAsync_v2(ctypes.c_uint64(base), ctypes.c_uint64(base + 32768), ctypes.c_size_t(4096), raw)
        check(lib, lib.cuGraphLaunch(plain, raw), "replaying")
        lib.cuMemcpyDtoDAsync_v2(ctypes.c_uint64(base), ctypes.c_uint64(base + 32768), ctypes.c_size_t(4096), raw)

    def as_nodes(k: int) -> None:
        before, after = setters[k % 8]
        before()
        after()
        check(lib, lib.cuGraphLaunch(whole, raw), "replaying")

    def unchanged(k: int) -> None:
        check(lib, lib.cuGraphLaunch(whole, raw), "replaying")

    def one_call(k: int) -> None:
        lib.cuStreamIsCapturing(raw, ctypes.byref(ctypes.c_int()))

    found = {}
    calls = {
        "launches of their own": apart,
        "copies by the driver": by_the_driver,
        "nodes that are set": as_nodes,
        "nodes, not set": unchanged,
        "an empty call of the driver": one_call,
    }
    for name, call in calls.items():
        found[name] = measured(call)
        print(nodes, name, found[name], flush=True)
    lib.cuGraphDestroy(graph)
    return found


def main(out: Annotated[Path | None, typer.Option(help="JSON file to write")] = None) -> None:
    """Compare ways to copy around a replay."""
    torch.zeros(1, device="cuda")  # from here on there is a context
    facts = {"device": torch.cuda.get_device_name(), "torch": torch.__version__, "nodes": {n: ways(n) for n in NODES}}
    if out is not None:
        out.parent.mkdir(parents=True, exist_ok=True)
        out.write_text(json.dumps(facts, indent=1) + "\n")


if __name__ == "__main__":
    typer.run(main)
