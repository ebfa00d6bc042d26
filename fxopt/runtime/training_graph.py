"""Training with CUDA graphs: a forward and a backward that replay, and the memory of what the one saves for the other.

A captured forward leaves what it saves where it was captured, in memory of its own, and the captured backward reads it
there. That memory is in use from a replay until nobody holds any of it: backward has run, or its autograd graph was dropped.
A forward that finds it in use runs plainly, and so does its backward, which is given other addresses. All other results,
gradients among them, are copied, as in inference. So whatever else the forward has used is scratch, which the backward is
captured with, and so is what the backward has read for the last time, if nobody else can.

Pieces of memory that were taken from the device one by one never become a larger one when they are free. So the pool begins
with one piece for all that forward and backward hold at a time.

So values do not depend on what the caller does between forward and backward: backward is captured by the addresses of
living tensors, whatever they are, and neither overwrites anything that anybody can still read.
"""

from __future__ import annotations

import functools
import sys
import threading
import weakref
from collections import Counter, OrderedDict
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch.multiprocessing.reductions import StorageWeakRef

from fxopt.ir.region import Call, refs
from fxopt.runtime.capturable import Traits, buffer_of, known, too_dear
from fxopt.runtime.cuda_graph import NAME, GraphedExecutor, Key, Note, Turns, _comparison
from fxopt.runtime.executor import Executor
from fxopt.runtime.footprint import peak_with
from fxopt.runtime.in_parts import InParts, Way
from fxopt.runtime.lifetimes import Lifetimes, nbytes
from fxopt.runtime.native_replay import Extension
from fxopt.runtime.plan import Launch, Plan, defined
from fxopt.runtime.recording import CaptureRefused, Driver, Kept, Recording, record, span
from fxopt.runtime.solitude import see_backward
from fxopt.runtime.split import Parts
from fxopt.runtime.training_window import COPY_SHARE

SIZES_KEPT = 4
"""How many forwards of a graph with symbolic sizes are kept captured; each keeps the memory of its activations."""
STALE_REPLAYS = 256
"""A captured forward goes when another one is captured and it was not among that many last replays: its weights are gone."""
ROOM = 32
"""One part in so many is added to what forward and backward hold at a time, where their pool begins: with none, ResNet-50's
takes 2 % more by `benchmarks.pool_model`, since what a value leaves may be too small for the next."""
STREAM_CHANGES = 8
"""How often a captured forward follows its caller to another stream, which the host has to wait for."""

LEAST_OVERWRITTEN = 32 << 20
"""Bytes of saved memory below which a backward leaves it alone: a replay that need not ask who holds it is one call of
compiled code, and the host decides in models that save so little."""
RETAINED_CALLS = 4
"""After so many calls of a captured backward that would destroy what its caller retains, one is captured that does not."""

PATIENT_HOOKS = frozenset({"torch.utils.checkpoint", "torch.autograd.graph"})
"""Modules whose hooks for saved tensors use these only in the order of the current stream, or as long as they hold them."""

_top_hooks = getattr(torch._C._autograd, "_top_saved_tensors_default_hooks", None)
_use_count = getattr(torch._C, "_storage_Use_Count", None)


@dataclass(frozen=True)
class Loan:
    """Input number `at` of a backward: in which storage of a SavedMemory it lies, by number, and its layout there."""

    at: int
    storage: int
    dtype: torch.dtype
    shape: tuple[int, ...]
    strides: tuple[int, ...]
    offset: int


class SavedMemory:
    """The tensors in which a captured forward leaves what it saves. Others see aliases of them.

    `constants` are saved with them but never written, so that they may be in use at any time. `pool` is where the tensors
    are, and scratch memory of the forward. `tensors` do not own their memory, nor do aliases of them, though these keep the
    pool: it may be given up to a backward that is captured in the same pool, whose run then overwrites what it has read.
    """

    def __init__(
        self, results: Sequence[torch.Tensor], constants: Sequence[torch.Tensor], pool: Any, driver: Driver
    ) -> None:
        """`results` own the memory. Raises CaptureRefused when this torch does not say who uses a storage, or what is done
        to saved tensors."""
        if _use_count is None or _top_hooks is None:
            raise CaptureRefused("this torch does not tell who uses saved tensors")
        self.pool = pool
        owners = {x.untyped_storage()._cdata: x.untyped_storage() for x in results}
        numbers = {cdata: k for k, cdata in enumerate(owners)}
        self._owners: list[torch.UntypedStorage | None] = list(owners.values())
        self._storages = [driver.bytes_at(x.data_ptr(), x.nbytes(), pool).untyped_storage() for x in owners.values()]
        self._number = {storage.data_ptr(): k for k, storage in enumerate(self._storages) if storage.nbytes()}
        self._in = [numbers[x.untyped_storage()._cdata] for x in results]
        self.tensors = tuple(
            _within(self._storages[k], x.dtype, tuple(x.shape), x.stride(), int(x.storage_offset()))
            for k, x in zip(self._in, results, strict=True)
        )
        own = Counter(self._in)
        self._handles = [storage._cdata for storage in self._storages]
        users = [own[k] + 1 for k in range(len(owners))]  # each of the tensors, and the object held here
        self._unused = [*users, *self._users()[len(owners) :]]
        held = enumerate(zip(owners.values(), users, strict=True))
        self._lost = frozenset(k for k, (owner, count) in held if _use_count(owner._cdata) != count)  # to the run itself
        self.taken_at = 0  # the number of the last replay that has written it
        self.writer: Callable[[], ForwardRecording | None] = lambda: None  # as long as it may be replayed
        self.addresses = frozenset(x.data_ptr() for x in (*results, *constants))
        self._stream: int | None = None
        self._stream_changes = 0
        with _lock:
            _memories.add(self)

    @property
    def nbytes(self) -> int:
        return sum(map(span, self.tensors))

    def _users(self) -> list[int]:
        """How many use each storage, and then, how many the object that stands for it in Python, of which there is one."""
        assert _use_count is not None
        return [*map(_use_count, self._handles), *map(sys.getrefcount, self._storages)]

    def is_idle(self) -> bool:
        """Whether nobody else holds any of it. Work that reads it has then been enqueued."""
        return not self._lost and self._users() == self._unused

    def idle(self) -> frozenset[int]:
        """The storages, by number, that nobody else holds."""
        count = len(self._storages)
        same = [now == before for now, before in zip(self._users(), self._unused, strict=True)]
        return frozenset(k for k in range(count) if same[k] and same[count + k] and k not in self._lost)

    def held(self) -> list[int]:
        """Which of the tensors lie in memory that somebody else holds, by their numbers."""
        idle = self.idle()
        return [i for i, k in enumerate(self._in) if k not in idle]

    def take(self, stream: int, turns: Turns) -> bool:
        """Whether it may be written now, in the order of `stream`. Called in a turn."""
        if not self.is_idle():
            return False
        if self._stream is not None and self._stream != stream:
            if self._stream_changes == STREAM_CHANGES:
                return False
            self._stream_changes += 1
            turns.driver.synchronize()  # who has read it last may have done so plainly, on the other stream
        self._stream = stream
        return True

    def loans(self, values: Sequence[Any], positions: Iterable[int]) -> tuple[Loan, ...]:
        """Those of `values` at these positions that are tensors in this memory."""
        found = []
        for i in positions:
            x = values[i]
            storage = self._number.get(x.untyped_storage().data_ptr())
            if storage is not None and type(x) is torch.Tensor:
                found.append(Loan(i, storage, x.dtype, tuple(x.shape), x.stride(), int(x.storage_offset())))
        return tuple(found)

    def is_owned(self, loans: Iterable[Loan]) -> bool:
        """Whether none of it has been given up."""
        return all(self._owners[loan.storage] is not None for loan in loans)

    def give_up(self, loans: Iterable[Loan]) -> dict[int, torch.Tensor]:
        """Tensors as the loans were, by position, that alone own their memory from here on."""
        found = {}
        for loan in loans:
            owner = self._owners[loan.storage]
            assert owner is not None
            found[loan.at] = _within(owner, loan.dtype, loan.shape, loan.strides, loan.offset)
        for loan in loans:
            self._owners[loan.storage] = None
        return found

    def size(self, storage: int) -> int:
        """Its bytes."""
        return int(self._storages[storage].nbytes())

    def given_up(self) -> frozenset[int]:
        """The storages, by number, of which something captured in the pool may have taken the place."""
        return frozenset(k for k, owner in enumerate(self._owners) if owner is None)

    def lend(self, values: list[Any], loans: Iterable[Loan]) -> None:
        """Put tensors as the loans were back among `values`."""
        for loan in loans:
            values[loan.at] = _within(self._storages[loan.storage], loan.dtype, loan.shape, loan.strides, loan.offset)


def _within(
    storage: torch.UntypedStorage, dtype: torch.dtype, shape: tuple[int, ...], strides: tuple[int, ...], offset: int
) -> torch.Tensor:
    return torch.empty(0, dtype=dtype, device=storage.device).set_(storage, offset, shape, strides)


def _take_back(values: list[Any], loans: Iterable[Loan]) -> None:
    """Let go of the loans among `values`."""
    for loan in loans:
        values[loan.at] = None


def _may_be_read_unseen() -> bool:
    """Whether a hook gets to see what is saved now that may read it on a stream of its own.

    torch's allocator learns of such reads by `record_stream`, and waits for them; a replay would not.
    """
    assert _top_hooks is not None
    hooks = _top_hooks(True)
    return hooks is not None and any(getattr(hook, "__module__", "") not in PATIENT_HOOKS for hook in hooks)


_memories: weakref.WeakSet[SavedMemory] = weakref.WeakSet()
_forwards: weakref.WeakSet[GraphedForward] = weakref.WeakSet()
_lock = threading.RLock()


@dataclass(eq=False, kw_only=True)
class ForwardRecording(Recording):
    """A captured forward, with the memory of what it saves."""

    memory: SavedMemory


@dataclass(eq=False, kw_only=True)
class BackwardRecording(Recording):
    """A captured backward in the pool of a captured forward. `loans` are what it reads there and whose memory it then uses
    otherwise. Where any of the storages `overwritten` is held by others than its inputs, it must not be replayed;
    `refusals` counts those calls."""

    memory: SavedMemory
    loans: tuple[Loan, ...]
    overwritten: frozenset[int]
    refusals: int = 0


class GraphedForward(GraphedExecutor):
    """Runs a forward plan by replaying it, or what of `parts` is captured, where the memory of what it saves is free."""

    def __init__(
        self,
        executor: Executor,
        found: Traits,
        turns: Turns,
        limit: int,
        note: Note,
        parts: Parts,
        extension: Extension | None = None,
    ) -> None:
        most = min(limit, SIZES_KEPT) if found.varying else limit
        super().__init__(executor, found, turns, most, note, _way(parts, executor), extension)
        self._captured = parts.captured.plan
        self._own_results = _own_results(self.plan)
        self.left = frozenset[StorageWeakRef]()
        """The storages that the last plain run has made for the backward. Addresses are soon another's."""
        self.room = 0
        """Bytes that the backward, which has run plainly, holds at most, together with what is left of these."""
        with _lock:
            _forwards.add(self)

    def _plainly(self, inputs: list[Any], key: Key | None) -> tuple[Any, ...]:
        results = super()._plainly(inputs, key)
        if key is not None:  # else they may be stand-ins without memory
            self.left = frozenset(StorageWeakRef(results[i].untyped_storage()) for i in self._own_results)
        return results

    def _record(self, values: list[Any], signature: tuple[Any, ...]) -> Recording:
        self._drop_stale()
        saved, found, way = self._captured.saved, self._traits, self._way
        copied = sum(span(values[i]) for i in found.moved)
        if dear := too_dear(copied, found.steps, COPY_SHARE):  # known before any memory is taken for it
            raise CaptureRefused(dear)
        driver = self._turns.driver
        pool = driver.new_pool()
        most = max(self.room, found.peak + copied) if self.room else 0
        found = replace(found, peak=most + most // ROOM)
        made = record(way.captured, values, signature, found, driver, way.lent, saved, pool)
        results = made.results
        memory = SavedMemory([kept.tensor for kept in results.kept], [kept.tensor for kept in results.host], pool, driver)
        results.kept = [Kept(kept.at, tensor) for kept, tensor in zip(results.kept, memory.tensors, strict=True)]
        memory.taken_at = self._replays
        recording = ForwardRecording(**vars(made), memory=memory)
        memory.writer = weakref.ref(recording)
        return recording

    def _replays_at_once(self, recording: Recording) -> bool:
        return False

    def _drop_stale(self) -> None:
        with self._lock:
            for key, kept in list(self._kept.items()):
                assert isinstance(kept, ForwardRecording)
                if self._replays - kept.memory.taken_at > STALE_REPLAYS:
                    del self._kept[key]
            if all(kept is not self._latest for kept in self._kept.values()):
                self._use(None)

    def _objection(self, recording: Recording) -> str | None:
        assert isinstance(recording, ForwardRecording)
        if not recording.memory.is_idle():
            return self._who_is_held(recording)
        dear = too_dear(recording.copied, self._traits.steps, COPY_SHARE)
        if dear is None:
            size = recording.memory.nbytes / 2**20
            self._note(NAME, f"{size:.1f} MiB that are saved for the backward stay allocated between calls")
        return dear

    def _who_is_held(self, recording: ForwardRecording) -> str:
        kept = [recording.results.kept[i] for i in recording.memory.held()]
        found = f"{len(kept)} of {len(recording.results.kept)} tensors saved for the backward are also held elsewhere"
        if not kept:
            return found  # let go of meanwhile, by another thread
        one = kept[0]
        layout = f"{str(one.tensor.dtype).removeprefix('torch.')} {list(one.tensor.shape)}"
        return f"{found}, the first of them result {one.at}, {layout}, of {_maker(self._captured, one.at)}"

    def _replay(self, recording: Recording, values: list[Any]) -> tuple[Any, ...]:
        assert isinstance(recording, ForwardRecording)
        memory = recording.memory

        def may_write(stream: int) -> bool:
            if _may_be_read_unseen() or not memory.take(stream, self._turns):
                return False
            memory.taken_at = self._replays + 1
            return True

        results = self._replay_if(may_write, recording, values)
        return self._rest(values) if results is None else results


def _way(parts: Parts, executor: Executor) -> Callable[[], Way] | None:
    """What makes the way around what is captured; None where that is the whole plan."""
    return None if parts.is_whole else functools.partial(InParts, parts, executor)


def _own_results(plan: Plan) -> tuple[int, ...]:
    """Positions of the tensors that a forward plan has made and saves."""
    root = Lifetimes.of(plan).root
    others = {x.name for x in plan.inputs} | {x.name for x in plan.constants}
    first = len(plan.outputs) - plan.saved
    saved = [(i, {root.get(name, name) for name in refs(out)}) for i, out in enumerate(plan.outputs[first:], first)]
    return tuple(i for i, names in saved if names and names.isdisjoint(others))


def _maker(plan: Plan, at: int) -> str:
    """What makes result number `at` of a plan: a library op, with where in the model it is, or a kernel."""
    root = Lifetimes.of(plan).root
    made = {root.get(name, name) for name in refs(plan.outputs[at])}
    for step in reversed(plan.steps):
        if not isinstance(step, Launch | Call) or made.isdisjoint(root.get(n, n) for n in (*defined(step), *step.writes)):
            continue
        return f"{step.op} ({step.origin})" if isinstance(step, Call) else step.label or step.entry
    return "an input or constant"


class GraphedBackward(GraphedExecutor):
    """Runs a backward plan by replaying it on what a captured forward has saved.

    Which of its inputs those are is seen at the first call that has some. From then on they are used where they are, and a
    call with any of them elsewhere runs plainly. Of `parts` one is captured.
    """

    def __init__(
        self,
        executor: Executor,
        found: Traits,
        turns: Turns,
        limit: int,
        note: Note,
        parts: Parts,
        extension: Extension | None = None,
    ) -> None:
        super().__init__(executor, found, turns, limit, note, _way(parts, executor), extension)
        self._captured = parts.captured
        self._later = frozenset(() if parts.after is None else parts.after.takes)
        """Positions among the inputs, and what is made of them before the replay, that are read after it."""
        self._given = tuple(i for i in found.moved if i < len(self.plan.inputs))
        """Of what is copied: the inputs; the others are made before the replay."""

    _knows_saved = False
    _has_asked = False
    _sparing = frozenset[Key]()
    """What is captured so that it destroys nothing, since its caller retains that."""

    def __call__(self, inputs: list[Any]) -> tuple[Any, ...]:
        driver = self._turns.driver
        if not self._kept:
            see_backward()
        if not self._knows_saved:
            if driver.is_captured() or driver.is_watched():
                return self._executor(inputs)
            if not self._look_for_saved(inputs):
                self._ask_for_room(inputs)
                return self._executor(inputs)
        return super().__call__(inputs)

    def _look_for_saved(self, inputs: list[Any]) -> bool:
        with self._lock:
            if self._knows_saved:
                return True
            with _lock:
                places = [memory.addresses for memory in _memories]
            known = frozenset[int]().union(*places)
            saved = [i for i in self._given if inputs[i].data_ptr() in known] if known else []
            if not saved:
                return False
            fixed = tuple(sorted({*self._traits.fixed, *saved}))
            moved = tuple(i for i in self._traits.moved if i not in saved)
            self._inputs_are = _comparison(fixed)
            self._traits = replace(self._traits, fixed=fixed, moved=moved)
            self._knows_saved = True
            return True

    def _ask_for_room(self, inputs: list[Any]) -> None:
        """Tell the forward that has made some of `inputs` how much memory it should begin with."""
        with _lock:
            forwards = [] if self._has_asked else list(_forwards)
        storages = {i: inputs[i].untyped_storage() for i in self._given} if forwards else {}
        for forward in forwards:
            left, given = {storage.cdata for storage in forward.left}, dict[int, list[int]]()
            for i, storage in storages.items():
                if storage.nbytes() and storage._cdata in left:
                    given.setdefault(storage._cdata, []).append(i)
            if not given:
                continue
            self._has_asked = True
            names = [x.name for x in self.plan.inputs]
            pieces = [([names[i] for i in positions], storages[positions[0]].nbytes()) for positions in given.values()]
            plan = self._captured.plan
            held = peak_with(plan, self._traits.device, pieces)
            if held is not None:
                twins = storages.keys() - {i for positions in given.values() for i in positions}
                made = [x for i, x in zip(self._captured.takes, plan.inputs, strict=True) if i >= len(inputs)]
                copied = sum(span(inputs[i]) for i in twins) + sum(known(nbytes(buffer_of(x))) for x in made)
                forward.room = max(forward.room, held + copied)

    def _record(self, values: list[Any], signature: tuple[Any, ...]) -> Recording:
        """Captured with the memory that the forward has used and not saved, and that of what only this call can read."""
        way, found, driver = self._way, self._traits, self._turns.driver
        kept = {*found.written, *self._later}
        places = {values[i].data_ptr() for i in found.fixed}
        with _lock:
            memory = next((memory for memory in _memories if not places.isdisjoint(memory.addresses)), None)
        if memory is None:
            return record(way.captured, values, signature, found, driver, way.lent)
        loans = memory.loans(values, [i for i in found.fixed if i not in kept])
        if not memory.is_owned(loans) or self._key(values) in self._sparing:
            # An earlier capture takes the place of what this one reads, or of what is retained: not in the same pool.
            return record(way.captured, values, signature, found, driver, way.lent)
        _take_back(values, loans)
        idle = memory.idle()
        memory.lend(values, loans)
        loans = tuple(loan for loan in loans if loan.storage in idle)
        size = sum(memory.size(k) for k in {loan.storage for loan in loans})
        if size < LEAST_OVERWRITTEN:
            loans = ()
        found = replace(found, peak=0)  # the forward has begun the pool
        given = memory.give_up(loans)
        made = record(way.captured, values, signature, found, driver, way.lent, pool=memory.pool, given_up=given)
        if loans:
            self._note(NAME, f"{size / 2**20:.1f} MiB that the forward has saved are its own as soon as it has read them")
        return BackwardRecording(**vars(made), memory=memory, loans=loans, overwritten=memory.given_up())

    def _replays_at_once(self, recording: Recording) -> bool:
        return not (isinstance(recording, BackwardRecording) and recording.overwritten)

    def _replay(self, recording: Recording, values: list[Any]) -> tuple[Any, ...]:
        if self._replays_at_once(recording):
            return super()._replay(recording, values)
        assert isinstance(recording, BackwardRecording)
        memory, loans, overwritten = recording.memory, recording.loans, recording.overwritten

        def may_destroy(stream: int) -> bool:
            _take_back(values, loans)
            if memory.is_idle() or overwritten <= memory.idle():
                return True
            memory.lend(values, loans)  # the graph of autograd is retained, say
            return False

        results = self._replay_if(may_destroy, recording, values)
        if results is not None:
            return results
        recording.refusals += 1
        if recording.refusals == RETAINED_CALLS:  # the next call captures one that destroys nothing
            self._sparing |= set(self._drop(lambda kept: kept is recording))
        return self._rest(values)

    def _plainly(self, inputs: list[Any], key: Key | None) -> tuple[Any, ...]:
        # What reads the memory of a forward that is not replayed any more would keep that memory.
        self._drop(lambda kept: isinstance(kept, BackwardRecording) and kept.memory.writer() is None)
        return super()._plainly(inputs, key)

    def _drop(self, is_gone: Callable[[Recording], bool]) -> list[Key]:
        """Keep none of which that is true; their keys."""
        with self._lock:
            gone = {key: kept for key, kept in self._kept.items() if is_gone(kept)}
            if gone:
                self._kept = OrderedDict((key, kept) for key, kept in self._kept.items() if key not in gone)
            if any(kept is self._latest for kept in gone.values()):
                self._use(None)
            return list(gone)

    def _objection(self, recording: Recording) -> str | None:
        return too_dear(recording.copied, self._traits.steps, COPY_SHARE)
