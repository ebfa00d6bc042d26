"""CUDA graphs acted out on the CPU: a driver that records functions of tensors, and what they are handed to a policy as."""

from __future__ import annotations

import contextlib
import ctypes
import threading
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch

from fxopt.runtime.capturable import Traits
from fxopt.runtime.copies import MOST, Copies, Copy, CopyNode, NodeParameters, tell_nodes
from fxopt.runtime.cuda_graph import GraphedExecutor, Turns
from fxopt.runtime.draws import given
from fxopt.runtime.native_replay import Device, Extension
from fxopt.runtime.recording import span

Fn = Callable[..., tuple[Any, ...]]


class Function:
    """Stands for an executor: runs `fn` on its inputs, and can repeat that in the memory of the first time."""

    plan: Any = None
    kept_as = None

    def __init__(self, fn: Fn) -> None:
        self.fn, self.plain_runs = fn, 0
        self.captured: tuple[list[Any], tuple[Any, ...]] | None = None
        self.capturing: int | None = None  # the thread

    def __call__(self, inputs: list[Any]) -> tuple[Any, ...]:
        values = list(inputs)
        inputs.clear()
        if self.capturing != threading.get_ident():
            self.plain_runs += 1
            return self.fn(*values)
        before = [v.clone() if isinstance(v, torch.Tensor) and v.numel() else v for v in values]
        outputs = self.fn(*values)
        self.captured = values, outputs
        for value, old in zip(values, before, strict=True):  # a captured run is not executed
            if isinstance(value, torch.Tensor) and value.is_contiguous():
                value.data.copy_(old)
        return outputs


class FakeDriver:
    """A device whose memory is the CPU's. After each replay's turn the memory of the captured runs is overwritten."""

    one_launch = False  # whether it has a kernel that does several copies
    in_graph = True  # whether that can be part of captured runs

    def __init__(self, function: Function, seeds: int, saved: int = 0) -> None:
        self.function, self.seeds, self.saved = function, seeds, saved
        self.memory: list[Any] = []  # no tensor's storage, so that nobody seems to use one
        self.current, self.refusal = 7, ""
        self.user_captures = self.watched = False
        self.in_line = True
        self.log: list[tuple[str, int]] = []
        self.captures = 0
        self.code = 0  # what copies for compiled code return
        self.pools: list[Any] = []
        self.peaks: list[int] = []
        self.scratch: list[torch.Tensor] = []
        self.during_replay: Callable[[], None] = lambda: None
        self.replays: list[Callable[[int], None]] = []
        self.nodes: list[tuple[CopyNode, bool]] = []  # of the run that is being captured: whether it is before its end
        self.told: dict[int, list[Copy]] = {}  # by the handle of a node
        self.tellings = 0
        self.callbacks = self._callbacks()

    def stream(self) -> int:
        return self.current

    def is_captured(self) -> bool:
        return self.user_captures

    def is_watched(self) -> bool:
        return self.watched

    def is_current(self) -> bool:
        return True

    def enter(self) -> contextlib.AbstractContextManager[Any]:
        return contextlib.nullcontext()

    def copy(self, target: int, source: int, nbytes: int, stream: int) -> None:
        ctypes.memmove(target, source, nbytes)

    def copies_in_graph(self) -> Callable[[Sequence[int]], tuple[CopyNode, ...]] | None:
        return self.make_nodes if self.in_graph else None

    def make_nodes(self, sizes: Sequence[int]) -> tuple[CopyNode, ...]:
        made = tuple(CopyNode(1, sizes[k : k + MOST]) for k in range(0, len(sizes), MOST))
        for node in made:
            node.handle = 1 + len(self.told)
            self.told[node.handle] = []
            self.nodes.append((node, self.function.captured is None))
        return made

    def record(self, stream: int) -> None:
        self.log.append(("record", stream))
        for tensor in self.scratch:
            tensor.fill_(-77)

    def wait(self, stream: int) -> None:
        self.log.append(("wait", stream))

    def synchronize(self) -> None:
        self.log.append(("synchronize", 0))

    def native(self) -> Device:
        functions = (ctypes.cast(f, ctypes.c_void_p).value or 0 for f in self.callbacks)
        return Device(
            *functions,
            copies=1 if self.one_launch else 0,
            event=1,
            is_watched=lambda: int(self.watched),
            current_device=lambda: 0,
            stream=lambda index: self.current,
            empty=lambda shape, strides, dtype: torch.empty_strided(shape, strides, dtype=dtype),
            fail=_fail,
        )

    def _callbacks(self) -> tuple[Any, ...]:
        """The same as C functions of the driver's signatures."""
        number, address = ctypes.c_int, ctypes.c_void_p

        def copy(target: int, source: int, nbytes: int, stream: int | None) -> int:
            ctypes.memmove(target, source, nbytes)
            return self.code

        def launch(handle: int, stream: int | None) -> int:
            self.replays[handle - 1](stream or 0)
            return 0

        def record(event: int, stream: int | None) -> int:
            self.record(stream or 0)
            return 0

        def wait(stream: int | None, event: int, flags: int) -> int:
            self.wait(stream or 0)
            return 0

        def capturing(stream: int | None, status: Any) -> int:
            status[0] = self.user_captures
            return 0

        def kernel(function: int, *arguments: Any) -> int:
            _, count, *_, parameters, _ = arguments
            copies = Copies.from_address(parameters[0])
            self.log.append(("copies", count))
            for target, source, nbytes in list(copies.all)[:count]:
                ctypes.memmove(target, source, nbytes)
            return self.code

        def tell(executable: int, node: int, address: int) -> int:
            found = NodeParameters.from_address(address)
            copies = Copies.from_address(ctypes.c_uint64.from_address(found.parameters).value)
            self.tellings += 1
            if self.code == 0:
                self.told[node] = [(target, source, nbytes) for target, source, nbytes in copies.all[: found.grid_y]]
            return self.code

        return (
            ctypes.CFUNCTYPE(number, ctypes.c_uint64, ctypes.c_uint64, ctypes.c_size_t, address)(copy),
            ctypes.CFUNCTYPE(number, address, address)(launch),
            ctypes.CFUNCTYPE(number, address, address)(record),
            ctypes.CFUNCTYPE(number, address, address, ctypes.c_uint)(wait),
            ctypes.CFUNCTYPE(number, address, ctypes.POINTER(ctypes.c_int))(capturing),
            ctypes.CFUNCTYPE(number, address, *[ctypes.c_uint] * 7, address, ctypes.POINTER(address), address)(kernel),
            ctypes.CFUNCTYPE(number, address, address, address)(tell),
        )

    def allocate(self, nbytes: int) -> torch.UntypedStorage:
        self.memory.append(bytearray(nbytes or 1))
        return torch.frombuffer(self.memory[-1], dtype=torch.uint8).untyped_storage()

    def bytes_at(self, address: int, nbytes: int, keeps: Any = None) -> torch.Tensor:
        if not nbytes:
            return torch.empty(0, dtype=torch.uint8)
        memory = (ctypes.c_char * nbytes).from_address(address)
        memory.keeps = keeps  # type: ignore[attr-defined]
        return torch.frombuffer(memory, dtype=torch.uint8)

    def new_pool(self) -> object:
        return object()

    def capture(
        self, run: Callable[[], Any], pool: Any = None, draws: bool = False, peak: int = 0, products: bool = False
    ) -> tuple[Callable[[int], None], Any]:
        assert pool is not None or not self.saved
        self.pools.append(pool)
        self.peaks.append(peak)
        if self.refusal:
            raise RuntimeError(self.refusal)
        self.captures += 1
        state = torch.get_rng_state()
        self.nodes = []
        with self._capturing():
            result = run()
        before = [node.handle for node, is_first in self.nodes if is_first]
        after = [node.handle for node, is_first in self.nodes if not is_first]
        if draws:  # it has not been executed
            torch.set_rng_state(state)
        assert self.function.captured is not None
        values, outputs = self.function.captured
        self.function.captured = None
        inputs = {_memory(v) for v in values if isinstance(v, torch.Tensor)}
        made = [(i, x) for i, x in enumerate(outputs) if isinstance(x, torch.Tensor) and _memory(x) not in inputs]
        saved = {_memory(x) for i, x in made if i >= len(outputs) - self.saved}  # belongs to the recording
        self.scratch += [x for _, x in made if _memory(x) not in saved]
        made = [(i, address_of(x)) for i, x in made]
        values = [address_of(v) if isinstance(v, torch.Tensor) else v for v in values]
        count = 0 if draws else self.seeds
        places = self.memory[len(self.memory) - count :]  # a recording allocates those of its seeds last
        seeds = [torch.frombuffer(place, dtype=torch.int64)[0] for place in places]

        def replay(stream: int) -> None:
            self.log.append(("replay", stream))
            self.during_replay()
            self._copy_by(before)
            with contextlib.nullcontext() if draws else given(seeds):
                again = self.function.fn(*values)
            for i, x in made:
                x.copy_(again[i])
            self._copy_by(after)
            for x in replay.overwritten:  # type: ignore[attr-defined]
                x.fill_(-77)

        replay.overwritten = []  # type: ignore[attr-defined]  # what a test says that the run takes for scratch in the end
        self.replays.append(replay)
        replay.handle = len(self.replays)  # type: ignore[attr-defined]
        replay.tell = lambda *told: self.tell(replay.handle, *told)  # type: ignore[attr-defined]
        return replay, result

    def tell(self, executable: int, nodes: Sequence[CopyNode], copies: Sequence[Copy]) -> None:
        def change(node: Any, parameters: Any) -> None:
            address = ctypes.cast(parameters, ctypes.c_void_p)
            if code := self.callbacks[-1](executable, node, address):
                _fail("copying for a CUDA graph", code)

        tell_nodes(nodes, copies, change)

    def _copy_by(self, nodes: list[int]) -> None:
        for node in nodes:
            for target, source, nbytes in self.told[node]:
                ctypes.memmove(target, source, nbytes)

    @contextlib.contextmanager
    def _capturing(self) -> Iterator[None]:
        self.function.capturing = threading.get_ident()
        try:
            yield
        finally:
            self.function.capturing = None


def _memory(x: torch.Tensor) -> int:
    return x.untyped_storage().data_ptr()


def _fail(what: str, code: int) -> None:
    raise RuntimeError(f"{what}: {code}")


def address_of(x: torch.Tensor) -> torch.Tensor:
    """`x` in the same memory, which it does not keep: all that a captured run knows of an input is where it is."""
    if not x.numel():
        return x
    memory = (ctypes.c_char * span(x)).from_address(x.data_ptr())
    return torch.frombuffer(memory, dtype=torch.uint8).view(x.dtype).as_strided(x.shape, x.stride())


class Acted:
    """`fn` behind the policy; `moved`, `fixed` and the like are positions among its inputs (see `Traits`)."""

    extension: Extension | None = None

    def __init__(
        self,
        fn: Fn,
        moved: tuple[int, ...] = (0,),
        fixed: tuple[int, ...] = (),
        written: tuple[int, ...] = (),
        varying: tuple[int, ...] = (),
        seeds: int = 0,
        limit: int = 4,
    ) -> None:
        self.function = Function(fn)
        self.driver = FakeDriver(self.function, seeds)
        self.turns = Turns(self.driver)
        self.notes: list[str] = []
        found = Traits(torch.device("cpu"), moved, fixed, written, varying, seeds, steps=100)
        self.run = GraphedExecutor(
            self.function,  # type: ignore[arg-type]
            found,
            self.turns,
            limit,
            lambda _, text: self.notes.append(text),
            extension=self.extension,
        )

    def __call__(self, *args: Any) -> tuple[Any, ...]:
        inputs = list(args)
        out = self.run(inputs)
        assert not inputs, "the list is handed over"
        return out

    @property
    def replays(self) -> int:
        return sum(what == "replay" for what, _ in self.driver.log)

    def counts(self) -> tuple[int, int, int]:
        """(runs without a graph, captures, replays) so far."""
        return self.function.plain_runs, self.driver.captures, self.replays
