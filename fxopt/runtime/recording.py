"""One captured run of a plan: what is copied in before it is replayed, and how its results are given out.

The memory of a captured run is overwritten by the next replay, its own or another graph's. So nobody outside ever sees it:
inputs are copied to the addresses that the captured kernels read, results are copied from where they write into fresh
tensors, except those that are lent until the next replay to who runs the rest of the plan. Copies are of bytes, from a
tensor's first element to the end of its last, so that any strides will do.

Where the device can do that, copies are part of the captured run, its beginning and its end (`copies.CopyNode`), and are
told before each replay what to copy; else they are enqueued around it.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol, cast

import torch

from fxopt.runtime.capturable import Traits
from fxopt.runtime.copies import Copy, CopyNode
from fxopt.runtime.draws import draw, given

LARGEST_GAPS = 4
"""A tensor is not copied when its memory, first to last element, is that many times its elements' and more than a MiB."""
MANY_RESULTS = 8
"""So many results of a dtype are allocated and copied together, which takes the host less than one after the other does: a
backward has one for each weight."""
_ALIGNMENT = 16

Run = Callable[[list[Any]], tuple[Any, ...]]


class CaptureRefused(Exception):
    """Why a run, looked at while it was captured, is not to be replayed."""


class Captured(Protocol):
    """A captured run (`CapturedGraph`): called with a stream, it is replayed there. `handle` is the driver's."""

    @property
    def handle(self) -> int: ...

    def __call__(self, stream: int) -> None: ...


class Telling(Captured, Protocol):
    """One with copies of its own (`CapturedGraph`)."""

    def tell(self, nodes: Sequence[CopyNode], copies: Sequence[Copy]) -> None: ...


class Driver(Protocol):
    """What a recording asks of its device (`GraphDriver`)."""

    def stream(self) -> int: ...

    def copy(self, target: int, source: int, nbytes: int, stream: int) -> None: ...

    def copies_in_graph(self) -> Callable[[Sequence[int]], tuple[CopyNode, ...]] | None: ...

    def allocate(self, nbytes: int) -> torch.UntypedStorage: ...

    def bytes_at(self, address: int, nbytes: int, keeps: Any = None) -> torch.Tensor: ...

    def capture(
        self, run: Callable[[], Any], pool: Any = None, draws: bool = False, peak: int = 0, products: bool = False
    ) -> tuple[Captured, Any]: ...


@dataclass(frozen=True)
class Move:
    """Input number `at`, copied before each replay: its layout in the captured run, its bytes, and where they go."""

    at: int
    shape: tuple[int, ...]
    strides: tuple[int, ...]
    nbytes: int
    target: int


@dataclass(frozen=True)
class Fresh:
    """Result number `at`, a tensor of its own memory, and where a replay leaves its bytes."""

    at: int
    shape: tuple[int, ...]
    strides: tuple[int, ...]
    dtype: torch.dtype
    nbytes: int
    source: int


@dataclass(frozen=True)
class Together:
    """Results of one dtype, their numbers and where a replay leaves them: tensors that do not own their memory."""

    positions: tuple[int, ...]
    sources: list[torch.Tensor]

    def copies(self) -> list[torch.Tensor]:
        """Tensors like them, of their own memory and undefined contents."""
        return list(map(torch.empty_like, self.sources))


@dataclass(frozen=True)
class Shared:
    """Results that share memory with each other: the bytes they lie in, and each with its offset in bytes in there.

    `size` is `nbytes` in whole elements of any dtype.
    """

    nbytes: int
    size: int
    source: int
    members: tuple[tuple[Fresh, int], ...]


@dataclass(frozen=True)
class OfInput:
    """Result number `at`: input number `input` itself, or (`view`) a view of it, `offset` elements from its first one."""

    at: int
    input: int
    view: bool
    input_strides: tuple[int, ...] = ()
    shape: tuple[int, ...] = ()
    strides: tuple[int, ...] = ()
    offset: int = 0


@dataclass(frozen=True)
class Kept:
    """Result number `at`, which stays where a replay leaves it; `tensor` is it.

    No view of anything: a view holds what it is a view of, which would count as a user of the memory.
    """

    at: int
    tensor: torch.Tensor


@dataclass(frozen=True)
class Nodes:
    """The copies that are part of a captured run, at its beginning and at its end."""

    before: tuple[CopyNode, ...]
    after: tuple[CopyNode, ...]


@dataclass
class Results:
    """How the results of a replay come about; `constants` has those that are no tensors, or lent, None in place of the
    others."""

    constants: list[Any] = field(default_factory=list)
    fresh: list[Fresh] = field(default_factory=list)
    together: list[Together] = field(default_factory=list)
    shared: list[Shared] = field(default_factory=list)
    of_inputs: list[OfInput] = field(default_factory=list)
    kept: list[Kept] = field(default_factory=list)
    host: list[Kept] = field(default_factory=list)
    """Those in the host's memory, which replays do not write."""

    @property
    def copied(self) -> list[tuple[int, int]]:
        """(source, bytes) of what is copied one by one, in that order."""
        fresh = [(x.source, x.nbytes) for x in self.fresh if x.nbytes]
        return fresh + [(x.source, x.nbytes) for x in self.shared]

    @property
    def nbytes(self) -> int:
        together = sum(span(x) for group in self.together for x in group.sources)
        return together + sum(nbytes for _, nbytes in self.copied)


@dataclass(eq=False)
class Recording:
    """A captured run, for inputs with `signature` (their sizes) and with these `addresses` of those that are not moved.

    `addresses` has an entry for each input, zero for those that are moved or not looked at. `read` are the inputs in the
    host's memory, whose values are part of what was captured: kept, so that their addresses stand for these values.
    `nodes` do the copies; without them these are enqueued before and after. `native` is the same for compiled code
    (`native_replay.py`), once there is such; `play_within` is what replays it in a turn that Python holds, where that code
    can.
    """

    signature: tuple[Any, ...]
    addresses: list[int]
    replay: Captured
    moves: tuple[Move, ...]
    seeds: tuple[int, ...]
    results: Results
    traits: Traits
    driver: Driver
    read: tuple[torch.Tensor, ...]
    nodes: Nodes | None = None
    native: Any = None
    play_within: Callable[[list[Any], int], tuple[Any, ...] | None] | None = None

    @property
    def copied(self) -> int:
        """Bytes copied in a call."""
        return sum(m.nbytes for m in self.moves) + self.results.nbytes

    def play(self, inputs: list[Any], stream: int) -> tuple[Any, ...]:
        """Run on `inputs`, which it empties, in the order of `stream`, the device's current one.

        Allocates before anything that the plan writes is written: who runs out of memory has changed nothing. What is copied
        before the captured run is let go of before that, what is read within only when the run has been enqueued.
        """
        if self.play_within is not None:
            made = self._around_results(inputs)
            played = self.play_within(inputs, stream)
            if played is not None:
                inputs.clear()
                return _with(played, made)
        results, traits = self.results, self.traits
        sources = self._sources(inputs)
        before = [(target, x.data_ptr(), nbytes) for (target, nbytes), x in zip(self._targets, sources, strict=True)]
        kept = [inputs[i] for i in traits.written]
        out = list(results.constants)
        for at, value in self._around_results(inputs):
            out[at] = value
        if self.nodes is None:
            self._enqueue(before, stream)
            sources.clear()
            for move in self.moves:
                inputs[move.at] = None
        for x in results.fresh:
            out[x.at] = torch.empty_strided(x.shape, x.strides, dtype=x.dtype, device=traits.device)
        groups = [(group, group.copies()) for group in results.together]
        bases = [torch.empty(s.size, dtype=torch.uint8, device=traits.device) for s in results.shared]
        copied = [*(out[x.at] for x in results.fresh if x.nbytes), *bases]
        after = [(x.data_ptr(), *what) for x, what in zip(copied, results.copied, strict=True)]
        if self.nodes is None:
            self.replay(stream)
            self._enqueue(after, stream)
        else:
            self._tell(self.nodes, before, after)
            self.replay(stream)
        inputs.clear()
        for group, targets in groups:
            torch._foreach_copy_(targets, group.sources)
            for position, result in zip(group.positions, targets, strict=True):
                out[position] = result
        for shared, base in zip(results.shared, bases, strict=True):
            for member, offset in shared.members:
                out[member.at] = _typed_view(base, member, offset)
        if kept:
            _count_writes(kept)
        return tuple(out)

    def replay_alone(self, stream: int) -> None:
        """Replay once more on what the last replay was given, if nothing has written that since, and without its results."""
        if self.nodes is not None:
            self._tell(self.nodes, [], [])
        self.replay(stream)

    @property
    def _targets(self) -> list[tuple[int, int]]:
        """(target, bytes) of what is copied into the captured run."""
        return [*((m.target, m.nbytes) for m in self.moves), *((target, 8) for target in self.seeds)]

    def _sources(self, inputs: list[Any]) -> list[torch.Tensor]:
        """What is copied there, each as it lies there."""
        found = [_laid_out(inputs[m.at], m.shape, m.strides) for m in self.moves]
        return found + [draw(self.traits.device) for _ in self.seeds]

    def _enqueue(self, copies: list[Copy], stream: int) -> None:
        for copy in copies:
            self.driver.copy(*copy, stream)

    def _tell(self, nodes: Nodes, before: list[Copy], after: list[Copy]) -> None:
        replay = cast(Telling, self.replay)
        replay.tell(nodes.before, before)
        replay.tell(nodes.after, after)

    def _around_results(self, inputs: list[Any]) -> list[tuple[int, Any]]:
        """The results that a replay does not write, or leaves where they are, with their positions."""
        results = self.results
        found = [(x.at, _from_input(x, inputs[x.input])) for x in results.of_inputs]
        return found + [(x.at, x.tensor.detach()) for x in (*results.kept, *results.host)]


def _with(results: tuple[Any, ...], more: list[tuple[int, Any]]) -> tuple[Any, ...]:
    """`results` with those in `more` at their positions."""
    if not more:
        return results
    out = list(results)
    for at, value in more:
        out[at] = value
    return tuple(out)


def record(
    run: Run,
    inputs: Sequence[Any],
    signature: tuple[Any, ...],
    traits: Traits,
    driver: Driver,
    lent: frozenset[int] = frozenset(),
    saved: int = 0,
    pool: Any = None,
    given_up: dict[int, torch.Tensor] | None = None,
) -> Recording:
    """Capture `run` on `inputs`, executing nothing. Raises CaptureRefused, and what `run` and the driver raise.

    Results at the positions `lent` are not copied: `play` returns the captured run's own, which other recordings' runs
    leave alone as long as this one exists, and its own next one overwrites.

    The last `saved` results, inputs excepted, are not copied either but left in memory of `pool`, which nothing but this
    recording and later ones that have nothing saved may be captured with: whoever plays it must know that nobody needs them
    any more. Without a pool, memory is that which all recordings of the device share.

    `given_up` are tensors in the places of the fixed inputs at these positions, in memory of `pool` that nobody else owns:
    the run takes them out of the dict, and what it makes once it has read one may lie there. A replay destroys them then.

    Where library ops draw from torch's generator, seeds are drawn in the captured run as well, in the order of the plan.
    """
    own = {} if given_up is None else given_up
    for i in traits.moved:
        _check_copyable(inputs[i], traits)
    copies = None if traits.draws else driver.copies_in_graph()

    def body() -> tuple[tuple[Move, ...], tuple[int, ...], Results, Nodes | None]:
        arguments = list(inputs)
        for i in traits.moved:
            arguments[i] = _twin(inputs[i], driver)
        count = 0 if traits.draws else traits.seeds
        seeds = [_strided(driver.allocate(8), torch.int64, (), ()) for _ in range(count)]
        lasting = (*traits.moved, *(i for i in traits.fixed if i not in own))
        seen = [arguments[i] for i in lasting]  # alive, so that no result takes their memory
        for i in tuple(own):
            arguments[i] = own.pop(i)
        moves = tuple(_move(i, x) for i, x in zip(traits.moved, seen, strict=False) if x.numel())
        before = copies([*(m.nbytes for m in moves), *(8 for _ in seeds)]) if copies else ()
        with contextlib.nullcontext() if traits.draws else given(seeds):
            outputs = run(arguments)
        sources = dict(zip(lasting, seen, strict=True))
        results = _results(outputs, sources, traits, lent, len(outputs) - saved)
        nodes = Nodes(before, copies([nbytes for _, nbytes in results.copied])) if copies else None
        return moves, tuple(s.data_ptr() for s in seeds), results, nodes

    replay, (moves, seeds, results, nodes) = driver.capture(body, pool, traits.draws, traits.peak, traits.products)
    if nodes is None:
        _gather(results, driver)
    read = tuple(inputs[i] for i in traits.fixed if _is_on_host(inputs[i], traits))
    addresses = [0] * len(inputs)
    for i in traits.fixed:
        addresses[i] = inputs[i].data_ptr()
    return Recording(signature, addresses, replay, moves, seeds, results, traits, driver, read, nodes)


# ---------------------------------------------------------------------- inputs


def span(x: torch.Tensor) -> int:
    """Bytes from the first element to the end of the last."""
    return _span(tuple(x.shape), x.stride(), x.dtype)


def _span(shape: Sequence[int], strides: Sequence[int], dtype: torch.dtype) -> int:
    if not math.prod(shape):
        return 0
    return (1 + sum((n - 1) * s for n, s in zip(shape, strides, strict=True))) * dtype.itemsize


def _check_copyable(x: torch.Tensor, traits: Traits) -> None:
    if x.device.type != traits.device.type:
        raise CaptureRefused("an input is elsewhere than on the GPU")
    if x.layout is not torch.strided or x.is_conj() or x.is_neg():
        raise CaptureRefused("an input is no plain tensor in memory")
    if span(x) > max(LARGEST_GAPS * x.numel() * x.dtype.itemsize, 1 << 20):
        raise CaptureRefused("an input is spread over much more memory than it has elements")


def _twin(x: torch.Tensor, driver: Driver) -> torch.Tensor:
    """A tensor with the layout of `x` and undefined contents."""
    return _strided(driver.allocate(span(x)), x.dtype, tuple(x.shape), x.stride())


def _strided(
    memory: torch.UntypedStorage, dtype: torch.dtype, shape: tuple[int, ...], strides: tuple[int, ...]
) -> torch.Tensor:
    return torch.empty(0, dtype=dtype, device=memory.device).set_(memory, 0, shape, strides)


def _move(at: int, twin: torch.Tensor) -> Move:
    return Move(at, tuple(twin.shape), twin.stride(), span(twin), twin.data_ptr())


def _laid_out(x: torch.Tensor, shape: tuple[int, ...], strides: tuple[int, ...]) -> torch.Tensor:
    """`x`, a tensor of this shape, with these strides. Elements that lie on one another there are equal in `x`."""
    if x.stride() == strides:
        return x
    out = torch.empty_strided(shape, strides, dtype=x.dtype, device=x.device)
    distinct = tuple(slice(0, n if s else 1) for n, s in zip(shape, strides, strict=True))
    out[distinct].copy_(x[distinct])
    return out


def _count_writes(tensors: list[torch.Tensor]) -> None:
    """Bump version counters, as what was captured did. Inference tensors have none."""
    counted = [t for t in tensors if not t.is_inference()]
    if counted:
        torch.autograd.graph.increment_version(counted)


# ---------------------------------------------------------------------- results


def _results(
    outputs: Sequence[Any], sources: dict[int, torch.Tensor], traits: Traits, lent: frozenset[int], copied: int
) -> Results:
    """How to make results like `outputs`, which a captured run returned; `sources` are the inputs that it was given.

    Those from number `copied` on stay where they are.
    """
    found = Results()
    owners = {x.untyped_storage().data_ptr(): i for i, x in sources.items() if x.numel()}
    groups: dict[int, list[tuple[int, torch.Tensor]]] = {}
    for at, value in enumerate(outputs):
        found.constants.append(None if isinstance(value, torch.Tensor) else value)
        if not isinstance(value, torch.Tensor):
            continue
        if at >= copied and _is_known_to_host(value, traits):
            found.host.append(Kept(at, value))
            continue
        _check_result(value, traits)
        memory = value.untyped_storage().data_ptr()
        if value.numel() and memory in owners:
            found.of_inputs.append(_of_input(at, value, owners[memory], sources))
        elif at in lent:
            found.constants[at] = value
        elif value.numel() and at >= copied:
            found.kept.append(Kept(at, value.detach()))
        elif value.numel():
            groups.setdefault(memory, []).append((at, value))
        else:
            found.fresh.append(_fresh(at, value))
    for members in groups.values():
        if len(members) == 1:
            found.fresh.append(_fresh(*members[0]))
        else:
            found.shared.append(_shared(members))
    return found


def _is_on_host(value: torch.Tensor, traits: Traits) -> bool:
    return value.device.type == "cpu" and traits.device.type != "cpu"


def _is_known_to_host(value: torch.Tensor, traits: Traits) -> bool:
    """What attention returns beside its result: the number of its backend, and without dropout a state of its generator that
    nobody reads, which the plan may think is on the GPU."""
    return _is_on_host(value, traits) and value.numel() <= 2 and value.dtype in (torch.int64, torch.uint64)


def _check_result(value: torch.Tensor, traits: Traits) -> None:
    if value.device.type != traits.device.type or type(value) not in (torch.Tensor, torch.nn.Parameter):
        raise CaptureRefused("a result is elsewhere than on the GPU")
    if value.layout is not torch.strided or value.is_conj() or value.is_neg():
        raise CaptureRefused("a result is no plain tensor in memory")


def _fresh(at: int, x: torch.Tensor) -> Fresh:
    return Fresh(at, tuple(x.shape), x.stride(), x.dtype, span(x), x.data_ptr() if x.numel() else 0)


def _gather(results: Results, driver: Driver) -> None:
    """Where there are many results that are dense in memory, take them from those that are copied one by one."""
    by_dtype: dict[torch.dtype, list[Fresh]] = {}
    for x in results.fresh:
        if x.nbytes and _is_dense(x.shape, x.strides):
            by_dtype.setdefault(x.dtype, []).append(x)
    for dtype, members in by_dtype.items():
        if len(members) < MANY_RESULTS:
            continue
        sources = [driver.bytes_at(x.source, x.nbytes).view(dtype).as_strided(x.shape, x.strides) for x in members]
        results.together.append(Together(tuple(x.at for x in members), sources))
        taken = {x.at for x in members}
        results.fresh = [x for x in results.fresh if x.at not in taken]


def _is_dense(shape: Sequence[int], strides: Sequence[int]) -> bool:
    """Whether the elements fill their memory, each at a place of its own: `torch.empty_like` then keeps the strides."""
    below = 1
    for size, stride in sorted(zip(shape, strides, strict=True), key=lambda dim: (dim[1], dim[0])):
        if size != 1 and stride != below:
            return False
        below *= size
    return True


def _shared(members: list[tuple[int, torch.Tensor]]) -> Shared:
    parts = [_fresh(at, x) for at, x in members]
    begin = max(min(p.source for p in parts) // _ALIGNMENT * _ALIGNMENT, members[0][1].untyped_storage().data_ptr())
    nbytes = max(p.source + p.nbytes for p in parts) - begin
    size = -(-nbytes // _ALIGNMENT) * _ALIGNMENT
    return Shared(nbytes, size, begin, tuple((p, p.source - begin) for p in parts))


def _of_input(at: int, value: torch.Tensor, owner: int, sources: dict[int, torch.Tensor]) -> OfInput:
    source = sources[owner]
    same = next((i for i, x in sources.items() if x is value), None)
    if same is not None:
        return OfInput(at, same, False)
    if value.dtype != source.dtype:
        raise CaptureRefused("a result is a view of an input as another dtype")
    offset = int(value.storage_offset() - source.storage_offset())
    return OfInput(at, owner, True, source.stride(), tuple(value.shape), value.stride(), offset)


def _from_input(recipe: OfInput, x: torch.Tensor) -> torch.Tensor:
    if not recipe.view:
        return x
    x = _laid_out(x, tuple(x.shape), recipe.input_strides)
    return x.as_strided(recipe.shape, recipe.strides, x.storage_offset() + recipe.offset).detach()


def _typed_view(base: torch.Tensor, x: Fresh, offset: int) -> torch.Tensor:
    return base.view(x.dtype).as_strided(x.shape, x.strides, offset // x.dtype.itemsize).detach()
