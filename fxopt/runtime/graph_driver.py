"""Capturing and replaying CUDA graphs through the driver, by ctypes.

Not torch.cuda.CUDAGraph: that puts torch's random generator into a mode in which every other thread that draws meanwhile
gets an error, leaves it there when a capture fails, and launches two kernels before each replay to tell the graph where the
generator stands. Plans draw their seeds outside of the captured run (`runtime/draws.py`), so none of it is needed, except
for attention that drops (`runtime/drawing_graph.py`).

Captured runs of one device share one pool of torch's allocator, and all of it is scratch: nothing in there means anything
between two replays. Only training has others (`runtime/training_graph.py`). All are captured on a
stream that torch hands out to nobody else, because cuBLAS's workspaces belong to streams: another user of that stream would
write into the one that the graph uses.

A workspace is 32 MiB on Hopper. Where that harms nobody (`_Workspaces`), none is left over when a capture begins, nor when
it ends: the run that came before gives up its own, so that there are not two, and the captured run's is free for the next
captured one, within the pool that the graph keeps alive.
"""

from __future__ import annotations

import contextlib
import ctypes
import functools
import gc
import threading
import weakref
from collections.abc import Callable, Iterator, Sequence
from typing import Any, TypeVar

import torch

from fxopt.errors import FxoptError
from fxopt.runtime.branches import SideStream
from fxopt.runtime.copies import Copy, CopyNode, can_be_told, capture_nodes, copying_kernel, tell_nodes
from fxopt.runtime.drawing_graph import DrawingGraph, capture_drawing
from fxopt.runtime.launch import check, context_of, driver
from fxopt.runtime.native_replay import Device
from fxopt.runtime.solitude import is_alone

T = TypeVar("T")

COPIES_IN_GRAPH = True
"""Whether the copies before and after a captured run are nodes of its graph, where the device can do that."""
_NON_BLOCKING, _DISABLE_TIMING = 1, 2
_THREAD_LOCAL, _RELAXED = 1, 2
_NO_CONTEXT = 201
_PROBE_BYTES = 512
_SMALL_BYTES = 1 << 20
"""Below that, torch's allocator takes memory from segments of its own."""

_raw_stream = getattr(torch._C, "_cuda_getCurrentRawStream", None)
_active_modes = getattr(torch._C, "_len_torch_dispatch_stack", None)
_clear_workspaces = getattr(torch._C, "_cuda_clearCublasWorkspaces", None)
_device_number = getattr(torch._C, "_cuda_getDevice", None)
_empty_here = getattr(getattr(getattr(torch._C, "_dynamo", None), "guards", None), "_empty_strided_cuda", None)


class CaptureError(FxoptError):
    """A run could not be captured although nothing in it failed."""


class CapturedGraph:
    """An instantiated CUDA graph, with the pool that its memory is in. Destroyed with the last reference to it.

    `graph` is what it was made of, whose nodes stand for its own. `after_turns` is a block that begins when all replays of
    graphs in the pool are done.
    """

    def __init__(
        self,
        lib: Any,
        executable: ctypes.c_void_p,
        graph: ctypes.c_void_p,
        pool: Any,
        after_turns: Callable[[], contextlib.AbstractContextManager[None]],
        call: Callable[..., None],
    ) -> None:
        self._lib, self._pool = lib, pool
        self._executable, self._launch, self._call = executable, lib.cuGraphLaunch, call
        weakref.finalize(self, _destroy, lib, executable, graph, after_turns).atexit = False

    @property
    def handle(self) -> int:
        """The driver's cuGraphExec."""
        return int(self._executable.value or 0)

    def __call__(self, stream: int) -> None:
        """Replay on `stream` (a raw handle). Raises CudaError."""
        self._call(self._launch, "replaying a CUDA graph", self._executable, ctypes.c_void_p(stream))

    def tell(self, nodes: Sequence[CopyNode], copies: Sequence[Copy]) -> None:
        """Let following replays do these copies, and no others, by those of its nodes. Raises CudaError."""
        change = functools.partial(
            self._call, self._lib.cuGraphExecKernelNodeSetParams, "copying for a CUDA graph", self._executable
        )
        tell_nodes(nodes, copies, change)


def _destroy(
    lib: Any,
    executable: ctypes.c_void_p,
    graph: ctypes.c_void_p,
    after_turns: Callable[[], contextlib.AbstractContextManager[None]],
) -> None:
    with after_turns():
        lib.cuGraphExecDestroy(executable)
        lib.cuGraphDestroy(graph)


@contextlib.contextmanager
def _anywhere(lib: Any, context: ctypes.c_void_p) -> Iterator[None]:
    """A block in which that context is current, and this thread may call what a capture of its own forbids: for what comes
    with the last reference to something, in whatever thread that is, and beside whatever device."""
    mode, popped = ctypes.c_int(_RELAXED), ctypes.c_void_p()
    lib.cuThreadExchangeStreamCaptureMode(ctypes.byref(mode))
    is_pushed = lib.cuCtxPushCurrent_v2(context) == 0
    try:
        yield
    finally:
        if is_pushed:
            lib.cuCtxPopCurrent_v2(ctypes.byref(popped))
        lib.cuThreadExchangeStreamCaptureMode(ctypes.byref(mode))


class _Bytes:
    """Memory in the protocol by which libraries hand each other what is on a GPU. A tensor made of it keeps it, and so
    `keeps`, as long as anybody has the tensor's storage."""

    def __init__(self, address: int, nbytes: int, keeps: Any) -> None:
        self._keeps = keeps
        layout = {"shape": (nbytes,), "typestr": "|u1", "strides": None, "version": 3}
        self.__cuda_array_interface__ = {"data": (address, False), **layout}


class GraphDriver:
    """What capturing and replaying asks of one CUDA device. All of it is called with that device current."""

    def __init__(self, index: int) -> None:
        """Raises CudaError, and OSError without a driver."""
        self.index = index
        self._lib = driver()
        self._context = ctypes.c_void_p(context_of(index, self._lib, "asking for the context"))
        self._event, side = ctypes.c_void_p(), ctypes.c_void_p()
        self._call(self._lib.cuEventCreate, "making an event", ctypes.byref(self._event), _DISABLE_TIMING)
        self._call(self._lib.cuStreamCreate, "making a stream", ctypes.byref(side), _NON_BLOCKING)
        self._side = torch.cuda.ExternalStream(side.value, torch.device("cuda", index))
        self._second: SideStream | None = None
        self._pool: Callable[[], Any] = lambda: None
        self._tells_nodes: bool | None = None
        self.in_line = True
        self._memcpy = self._lib.cuMemcpyDtoDAsync_v2

    def _call(self, function: Any, what: str, *arguments: Any) -> None:
        code = function(*arguments)
        if code == _NO_CONTEXT and self._context:  # this thread has not called CUDA yet
            check(self._lib, self._lib.cuCtxSetCurrent(self._context), what)
            code = function(*arguments)
        if code:
            check(self._lib, code, what)

    def is_captured(self) -> bool:
        """Whether this thread's current stream is being captured."""
        return torch.cuda.is_current_stream_capturing()

    def is_watched(self) -> bool:
        """Whether a torch mode sees what this thread calls."""
        return _active_modes is not None and _active_modes() > 0

    def is_current(self) -> bool:
        """Whether the device is the current one."""
        return torch.cuda.current_device() == self.index

    def enter(self) -> contextlib.AbstractContextManager[Any]:
        """A block in which the device is the current one."""
        return torch.cuda.device(self.index)

    def stream(self) -> int:
        """The raw handle of the current stream; 0 for the default stream."""
        if _raw_stream is not None:
            return int(_raw_stream(self.index))
        return int(torch.cuda.current_stream(self.index).cuda_stream)

    def copy(self, target: int, source: int, nbytes: int, stream: int) -> None:
        """Copy bytes between addresses on the device, in the stream's order. Raises CudaError."""
        code = self._memcpy(
            ctypes.c_void_p(target), ctypes.c_void_p(source), ctypes.c_size_t(nbytes), ctypes.c_void_p(stream)
        )
        if code:
            self._call(
                self._memcpy,
                "copying for a CUDA graph",
                ctypes.c_void_p(target),
                ctypes.c_void_p(source),
                ctypes.c_size_t(nbytes),
                ctypes.c_void_p(stream),
            )

    def native(self) -> Device:
        """The same for compiled code."""
        lib = self._lib

        def address(name: str) -> int:
            function = getattr(lib, name, None)
            return int(ctypes.cast(function, ctypes.c_void_p).value or 0) if function is not None else 0

        return Device(
            copy=address("cuMemcpyDtoDAsync_v2"),
            launch=address("cuGraphLaunch"),
            record=address("cuEventRecord"),
            wait=address("cuStreamWaitEvent"),
            capturing=address("cuStreamIsCapturing"),
            launch_kernel=address("cuLaunchKernel"),
            tell=address("cuGraphExecKernelNodeSetParams"),
            copies=copying_kernel(self.index),
            event=int(self._event.value or 0),
            is_watched=_active_modes,
            current_device=_device_number or torch.cuda.current_device,
            stream=_raw_stream or (lambda index: int(torch.cuda.current_stream(index).cuda_stream)),
            empty=_empty_here or functools.partial(_empty, torch.device("cuda", self.index)),
            fail=functools.partial(_fail, lib),
        )

    def record(self, stream: int) -> None:
        """Remember this point of the stream for `wait`."""
        self._call(self._lib.cuEventRecord, "recording an event", self._event, ctypes.c_void_p(stream))

    def wait(self, stream: int) -> None:
        """What is enqueued on `stream` from here on runs after the point that was recorded last."""
        self._call(self._lib.cuStreamWaitEvent, "waiting for an event", ctypes.c_void_p(stream), self._event, 0)

    @contextlib.contextmanager
    def _after_turns(self) -> Iterator[None]:
        """A block in which a graph is destroyed. Afterwards its pool may be freed: not before replays are done, for
        unmapping memory does not wait for them.

        May come at any time, in a thread that captures or whose device is another one, too.
        """
        with _anywhere(self._lib, self._context):
            if self.in_line:  # no end of a turn was recorded
                with contextlib.suppress(FxoptError):
                    self._call(self._lib.cuStreamSynchronize, "waiting for the default stream", None)
            self._lib.cuEventSynchronize(self._event)
            yield

    def synchronize(self) -> None:
        """Wait until the device has nothing to do."""
        torch.cuda.synchronize(self.index)

    def allocate(self, nbytes: int) -> torch.UntypedStorage:
        """Memory that nothing is written to: torch.empty fills it where algorithms are to be deterministic."""
        return torch.UntypedStorage(nbytes, device=f"cuda:{self.index}")

    def bytes_at(self, address: int, nbytes: int, keeps: Any = None) -> torch.Tensor:
        """Memory of the device as a tensor (uint8) that does not own it. `keeps`, perhaps the pool it is in, lives as long
        as the storage, and until the device has done what is enqueued then."""
        memory = _Bytes(address, nbytes, keeps)
        if keeps is not None:
            weakref.finalize(memory, self._settle).atexit = False
        return torch.as_tensor(memory, device=f"cuda:{self.index}")

    def _settle(self) -> None:
        """Wait until the device has nothing to do, in whatever thread."""
        with contextlib.suppress(FxoptError), _anywhere(self._lib, self._context):
            self._call(self._lib.cuCtxSynchronize, "waiting for the device")

    def side_stream(self) -> SideStream:
        """A second stream for captures, which torch hands out to nobody else."""
        if self._second is None:
            stream = ctypes.c_void_p()
            self._call(self._lib.cuStreamCreate, "making a stream", ctypes.byref(stream), _NON_BLOCKING)
            self._second = SideStream(torch.cuda.ExternalStream(stream.value, torch.device("cuda", self.index)))
        return self._second

    def microseconds(self, work: Callable[[], None]) -> float:
        """What the device needs for what `work` enqueues on the current stream; waits for that."""
        begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        begin.record()
        work()
        end.record()
        end.synchronize()
        return float(begin.elapsed_time(end)) * 1e3

    def copies_in_graph(self) -> Callable[[Sequence[int]], tuple[CopyNode, ...]] | None:
        """What makes nodes for copies of so many bytes each, in order, called within a capture; None where nodes are not for
        that. May wait for the device."""
        if self._tells_nodes is None:
            self._tells_nodes = can_be_told(self.index, self._side.cuda_stream)
        if not (self._tells_nodes and COPIES_IN_GRAPH):
            return None
        return functools.partial(capture_nodes, self._lib, copying_kernel(self.index), self._side.cuda_stream)

    def new_pool(self) -> Any:
        """A pool of memory for captured runs that leave results in it for longer than to the next replay."""
        pool = torch.cuda.MemPool()
        _pools.add(pool)
        return pool

    def capture(
        self, run: Callable[[], T], pool: Any = None, draws: bool = False, peak: int = 0, products: bool = False
    ) -> tuple[CapturedGraph | DrawingGraph, T]:
        """(what replays `run` on a stream, the result of `run`).

        Nothing is executed. The memory of what `run` returns is scratch of the pool as soon as the caller lets go of it: it
        has the values of a replay from the replay to the next one of any graph of this pool, which without `pool` is the one
        that all graphs of this device share. What the caller holds on to no later capture takes, but earlier ones have, so
        that in the shared pool it is overwritten all the same. With `draws`, which wants a pool, `run` draws from torch's
        generator. Raises whatever `run` raises; RuntimeError and CaptureError where the driver or the allocator refuses.
        Afterwards all is as before.

        The memory begins with a place for `peak` bytes, what the run is known to hold, unless it is the shared pool and has
        begun before: taken from the device piece by piece, memory is left over wherever a larger piece follows. With
        `products` cuBLAS's workspace gets its place first.
        """
        _workspaces.drop_before(self.index)
        torch.cuda.empty_cache()  # runs without graphs have left as much memory there, where the pool cannot get at it
        if draws:
            generator = torch.cuda.default_generators[self.index]
            with _no_collections(), torch.cuda.stream(self._side):
                with torch.cuda.use_mem_pool(pool, self.index):
                    self._make_room(peak, products)
                return capture_drawing(run, self.index, pool, generator, self._destroy_torchs)
        if pool is None:
            pool = self._pool()
            if pool is None:
                pool = self.new_pool()
                self._pool = weakref.ref(pool)
            else:
                peak = 0
        stream, graph, executable = ctypes.c_void_p(self._side.cuda_stream), ctypes.c_void_p(), ctypes.c_void_p()
        lib = self._lib
        try:
            with _no_collections(), torch.cuda.stream(self._side), torch.cuda.use_mem_pool(pool, self.index):
                self._make_room(peak, products)
                self._call(lib.cuStreamBeginCapture_v2, "beginning to capture", stream, _THREAD_LOCAL)
                try:
                    probe = self.allocate(_PROBE_BYTES)
                    result = run()
                finally:
                    ended = lib.cuStreamEndCapture(stream, ctypes.byref(graph))
            check(lib, ended, "capturing")
            if not _is_in(pool, probe.data_ptr()):
                raise CaptureError("memory comes from another pool than the captured run's own")
            instantiate = lib.cuGraphInstantiateWithFlags
            self._call(instantiate, "instantiating a CUDA graph", ctypes.byref(executable), graph, ctypes.c_uint64(0))
        except BaseException:
            if graph:
                lib.cuGraphDestroy(graph)
            raise
        finally:
            _workspaces.drop_after(self.index)
        return CapturedGraph(lib, executable, graph, pool, self._after_turns, self._call), result

    def _make_room(self, peak: int, products: bool) -> None:
        """Where memory is taken from a pool: that of a workspace, and `peak` bytes, which nobody has afterwards."""
        if products:
            torch.cuda.current_blas_handle()  # the next run's workspace finds the place of this one's
        if peak > _SMALL_BYTES:
            with contextlib.suppress(torch.OutOfMemoryError):  # it may do with less at a time
                self.allocate(peak)

    def _destroy_torchs(self, graph: Any) -> None:
        with self._after_turns():
            graph.reset()


_pools: weakref.WeakSet[Any] = weakref.WeakSet()


class _Workspaces:
    """Frees cuBLAS's workspaces around captures: all of them, since torch has no way to choose.

    Not while another thread may be on the way from asking for its workspace to launching what uses it (`solitude.py`);
    fxopt's own threads call no library. Nor where others have captured graphs, whose workspaces are freed with these. One
    that was captured without may use a workspace in another graph's pool; from then on all of them stay.
    """

    def __init__(self) -> None:
        self._stay = _clear_workspaces is None
        self._lock = threading.Lock()

    def drop_before(self, device: int) -> None:
        """At the beginning of a capture on the device of that index."""
        with self._lock:
            if not self._stay and is_alone(device) and not _are_others_pools():
                assert _clear_workspaces is not None
                _clear_workspaces()
            else:
                self._stay = True

    def drop_after(self, device: int) -> None:
        """At its end."""
        with self._lock:
            if not self._stay and is_alone(device):
                assert _clear_workspaces is not None
                _clear_workspaces()
            else:
                self._stay = True


_workspaces = _Workspaces()


def _are_others_pools() -> bool:
    """Whether torch's allocator has private pools that are not this file's."""
    torch.cuda.empty_cache()  # pools that nobody has any more
    known = {(0, 0), *(tuple(pool.id) for pool in _pools)}
    return any(tuple(segment["segment_pool_id"]) not in known for segment in torch.cuda.memory_snapshot())


@contextlib.contextmanager
def _no_collections() -> Iterator[None]:
    """No garbage collection meanwhile, which might free what CUDA does not want freed while a stream is captured."""
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()


def _fail(lib: Any, what: str, code: int) -> None:
    check(lib, code, what)


def _empty(device: torch.device, shape: tuple[int, ...], strides: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
    return torch.empty_strided(shape, strides, dtype=dtype, device=device)


def _is_in(pool: Any, address: int) -> bool:
    return any(s["address"] <= address < s["address"] + s["total_size"] for s in pool.snapshot())
