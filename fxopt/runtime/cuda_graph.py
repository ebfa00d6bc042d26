"""An executor that replays CUDA graphs: when to capture, what to replay, in which order.

The first call with the same sizes and addresses runs as without graphs, which loads libraries and lets them choose; the
second one, in the same thread, captures; later ones replay. What does not fit, or cannot be captured, runs as without.

Replays of one device share memory (`graph_driver.py`), so they take turns: copies in, replay and copies out are enqueued
under one lock, and when the stream is another one than the last time, it waits for what the last one has enqueued. The end
of a turn is an event, except as long as all turns are on the default stream, which is always there to record one.
"""

from __future__ import annotations

import functools
import operator
import threading
from collections import OrderedDict
from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any, Protocol, cast

import torch

from fxopt.errors import FxoptError
from fxopt.ir.graph import Phase
from fxopt.journal import Journal
from fxopt.options import Options
from fxopt.runtime import backward_pieces, branches, training_window
from fxopt.runtime.branch_contest import BranchContest, TimingDriver
from fxopt.runtime.capturable import (
    Choice,
    Pieces,
    Traits,
    choose,
    choose_pieces,
    flaw,
    gpu,
    too_dear,
    traits,
)
from fxopt.runtime.executor import Executor
from fxopt.runtime.in_parts import InParts, InPieces, Way, Whole
from fxopt.runtime.native_replay import NAME as NATIVE
from fxopt.runtime.native_replay import Device, Extension, Play, plays, plays_within, replayer
from fxopt.runtime.plan import Plan
from fxopt.runtime.recording import Recording, record
from fxopt.runtime.training_window import choose_window

NAME = "cuda-graphs"
"""What `FXOPT_DISABLE` and `options={"disable": ...}` call it."""
DEFAULT_STREAM = 0
PER_THREAD_STREAM = 2
"""The driver's handle of a default stream that each thread has of its own."""
REPLAYS_PER_CAPTURE = 32
"""When there are as many graphs as may be kept, replays that have to come before another one takes a graph's place."""
SEEN_PER_GRAPH = 8
"""How many keys are remembered as seen, for each graph that may be kept."""

Note = Callable[[str, str], None]
Key = tuple[Any, tuple[int, ...]]


class OrderingDriver(TimingDriver, Protocol):
    """A device with streams (`GraphDriver`). `in_line` is whether all turns so far were on the default stream, and none of
    their ends was recorded."""

    in_line: bool

    def is_captured(self) -> bool: ...

    def is_watched(self) -> bool: ...

    def is_current(self) -> bool: ...

    def enter(self) -> AbstractContextManager[Any]: ...

    def record(self, stream: int) -> None: ...

    def wait(self, stream: int) -> None: ...

    def synchronize(self) -> None: ...

    def native(self) -> Device: ...

    def new_pool(self) -> Any: ...


class Turns:
    """Who may use the memory that the captured runs of one device share. One turn at a time, each on one stream.

    Compiled code (`native_replay.py`) takes its turns by the same `lock`, `owner` and `last`, and the driver's `in_line`.
    """

    def __init__(self, driver: OrderingDriver) -> None:
        self.driver = driver
        self.lock = threading.RLock()  # entered again by a signal handler that calls the model
        self.owner = 0  # the thread whose turn it is
        self.last: int | None = None  # the stream of the last turn

    def take(self, work: Callable[[int], Any], nested: Callable[[], Any]) -> Any:
        """What `work(stream)` returns, in a turn on the current stream; `nested()` when this thread is inside of one."""
        me = threading.get_ident()
        with self.lock:
            if self.owner == me:
                return nested()
            driver = self.driver
            if self.owner:  # somebody was interrupted while leaving, perhaps before the end of his turn was recorded
                driver.synchronize()
            stream = driver.stream()
            self.owner, has_followed = me, False
            try:
                if self.last != stream or stream == PER_THREAD_STREAM:
                    self._follow(stream)
                has_followed = True
                return work(stream)
            finally:
                if has_followed:
                    if not driver.in_line:  # now: a stream may be gone, or be captured, when somebody has to wait for it
                        driver.record(stream)
                    self.last = stream
                self.owner = 0

    def _follow(self, stream: int) -> None:
        """What is enqueued on `stream` from here on runs after the last turn, which was on another one."""
        driver = self.driver
        if driver.in_line and self.last is None and stream == DEFAULT_STREAM:
            return
        if driver.in_line and self.last is not None:
            driver.record(self.last)
        driver.in_line = False
        driver.wait(stream)


class GraphedExecutor:
    """Runs a plan on one GPU as `executor` does, by replaying what was captured where possible.

    Called like an `Executor`, from any thread and on any stream. At most `limit` graphs are kept, the least recently used
    are dropped. `note(topic, text)` is told why a plan that seemed capturable is not captured after all. `make_way` is asked
    before the first capture what is captured; without it, that is the whole plan. `extension` is the compiled code for
    replays, where it is wanted. `contest` is asked for a faster run after each capture of the whole plan.
    """

    def __init__(
        self,
        executor: Executor,
        found: Traits,
        turns: Turns,
        limit: int,
        note: Note,
        make_way: Callable[[], Way] | None = None,
        extension: Extension | None = None,
        contest: BranchContest | None = None,
    ) -> None:
        self.plan, self.kept_as = executor.plan, executor.kept_as
        self._boxed_call = True
        self._contest = contest
        self._executor, self._traits, self._turns, self._note = executor, found, turns, note
        self._make_way, self._way = make_way, cast(Way, Whole(executor))
        self._limit = limit
        self._inputs_are = _comparison(found.fixed)
        self._extension = extension
        self._latest: Recording | None = None
        self._play: Play | None = None  # the latest, in compiled code; looks itself whether it fits
        self._kept: OrderedDict[Key, Recording] = OrderedDict()
        self._seen: OrderedDict[Key, set[int]] = OrderedDict()  # the threads that have run it
        self._declined = False
        self._captures = self._replays = 0
        self._lock = threading.RLock()

    def __call__(self, inputs: list[Any]) -> tuple[Any, ...]:
        results = self.replayed(inputs)
        if results is not None:
            inputs.clear()
            return results
        driver = self._turns.driver
        if self._declined or driver.is_captured():
            return self._executor(inputs)
        if driver.is_watched():  # AOTAutograd watches the first call, so that has to count
            return self._plainly(inputs, self._key(inputs) if _are_plain(inputs) else None)
        if not driver.is_current():
            with driver.enter():
                return self._run(inputs)
        return self._run(inputs)

    def replayed(self, inputs: list[Any] | tuple[Any, ...]) -> tuple[Any, ...] | None:
        """The results, if compiled code can replay the latest recording for these inputs; else None, and nothing has
        happened. Depends on no mode of autograd's."""
        play = self._play
        if play is None:
            return None
        results = play(inputs)
        if results is not None:
            self._replays += 1
        return results

    def _run(self, inputs: list[Any]) -> tuple[Any, ...]:
        recording = self._latest
        if recording is None or not self._fits(recording, inputs):
            return self._otherwise(inputs)
        if recording.native is None and self._extension is not None:
            self._use(recording)  # the code may be there by now
        return self._replay(recording, self._way.begin(inputs))

    def _use(self, recording: Recording | None) -> None:
        """Try this recording first in the next call."""
        self._latest, self._play = recording, None
        module = None if recording is None or self._extension is None else self._extension()
        if recording is None or module is None:
            return
        if recording.native is None:
            try:
                recording.native = replayer(module, recording, self._turns, self._turns.driver.native())
            except Exception as error:  # Python can do without
                self._extension = None
                self._note(NATIVE, f"replays go through Python: {type(error).__name__}: {error}")
                return
        device = self._turns.driver.native()
        if plays_within(recording, device):
            recording.play_within = recording.native.play_within
        if self._replays_at_once(recording) and isinstance(self._way, Whole) and plays(recording, device):
            self._play = recording.native

    def _replays_at_once(self, recording: Recording) -> bool:
        """Whether nothing but the inputs decides about a replay of the whole plan."""
        return True

    def _fits(self, recording: Recording, inputs: list[Any]) -> bool:
        if self._traits.varying and self._signature(inputs) != recording.signature:
            return False
        if recording.native is not None and recording.native.has_fixed(inputs):
            return True
        return self._inputs_are(inputs, recording.addresses)

    def _signature(self, inputs: list[Any]) -> tuple[Any, ...]:
        """The sizes and strides that may differ from call to call."""
        found = []
        for i in self._traits.varying:
            x = inputs[i]
            found.append((tuple(x.shape), x.stride()) if isinstance(x, torch.Tensor) else x)
        return tuple(found)

    def _key(self, inputs: list[Any]) -> Key:
        return self._signature(inputs), tuple(inputs[i].data_ptr() for i in self._traits.fixed)

    def _replay(self, recording: Recording, values: list[Any]) -> tuple[Any, ...]:
        """`values` are what the captured part takes, and what is needed after it."""
        results = self._replay_if(lambda stream: True, recording, values)
        assert results is not None
        return results

    def _replay_if(
        self, may_replay: Callable[[int], bool], recording: Recording, values: list[Any]
    ) -> tuple[Any, ...] | None:
        """The results of a call by a replay; None, and no more has happened, where `may_replay(stream)`, asked in the turn,
        says no. Within another turn of this thread's the call runs plainly."""
        way = self._way

        def work(stream: int) -> tuple[Any, ...] | None:
            if not may_replay(stream):
                return None
            self._replays += 1
            results = recording.play(way.handed(values), stream)
            return way.end(values, results) if way.lent else results

        def nested() -> tuple[Any, ...]:
            results = way.captured(way.handed(values))
            return way.end(values, results) if way.lent else results

        results: tuple[Any, ...] | None = self._turns.take(work, nested)
        return results if results is None or way.lent else way.end(values, results)

    def _otherwise(self, inputs: list[Any]) -> tuple[Any, ...]:
        """A call that the latest recording does not fit."""
        key = self._key(inputs)
        with self._lock:
            recording = self._kept.get(key)
            if recording is not None:
                self._kept.move_to_end(key)
                self._use(recording)
            seen = threading.get_ident() in self._seen.get(key, ())
        if recording is None and not (seen and self._may_capture() and self._has_way()):
            return self._plainly(inputs, key)
        way = self._way
        values = way.begin(inputs)
        if recording is None:
            recording = self._turns.take(lambda stream: self._capture(key, values), lambda: None)
        return self._rest(values) if recording is None else self._replay(recording, values)

    def _rest(self, values: list[Any]) -> tuple[Any, ...]:
        """The results of a call that has begun its way, without a replay."""
        way = self._way
        return way.end(values, way.captured(way.handed(values)))

    def _plainly(self, inputs: list[Any], key: Key | None) -> tuple[Any, ...]:
        """Run without graphs; this thread may capture what has this key afterwards."""
        result = self._executor(inputs)
        if key is not None:
            with self._lock:
                self._seen.setdefault(key, set()).add(threading.get_ident())
                self._seen.move_to_end(key)
                while len(self._seen) > SEEN_PER_GRAPH * self._limit:
                    self._seen.popitem(last=False)
        return result

    def _has_way(self) -> bool:
        with self._lock:
            if self._declined:
                return False
            try:
                if self._make_way is not None:
                    self._way, self._make_way = self._make_way(), None
            except FxoptError as error:
                self._decline(str(error))
                return False
            return True

    def _may_capture(self) -> bool:
        """Keys that take turns, more of them than graphs are kept, must not capture again and again."""
        return len(self._kept) < self._limit or self._replays >= REPLAYS_PER_CAPTURE * (self._captures - self._limit + 1)

    def _capture(self, key: Key, values: list[Any]) -> Recording | None:
        with self._lock:
            if key in self._kept:  # another thread was faster
                return self._kept[key]
            while len(self._kept) >= self._limit:
                self._kept.popitem(last=False)
        try:
            recording = self._record(values, key[0])
        except Exception as error:
            self._decline(str(error).partition("\n")[0] or type(error).__name__)
            return None
        objection = self._objection(recording)
        if objection is not None:
            self._decline(objection)
            return None
        if self._contest is not None:
            recording = self._contest.faster(recording, values, self._turns.driver)
        with self._lock:
            self._kept[key] = recording
            self._use(recording)
            self._captures += 1
        return recording

    def _record(self, values: list[Any], signature: tuple[Any, ...]) -> Recording:
        way = self._way
        return record(way.captured, values, signature, self._traits, self._turns.driver, way.lent)

    def _objection(self, recording: Recording) -> str | None:
        """Why it is not to be replayed after all."""
        return too_dear(recording.copied, self._traits.steps)

    def _decline(self, reason: str) -> None:
        self._declined = True
        self._use(None)
        self._kept.clear()
        self._seen.clear()
        self._note(NAME, f"not captured: {reason}")

    @property
    def written(self) -> tuple[int, ...]:
        """Positions of the inputs that the plan changes; a replay counts that in their versions."""
        return self._traits.written

    @property
    def graphs(self) -> int:
        """How many captured runs are kept now."""
        return len(self._kept)


def _are_plain(inputs: list[Any]) -> bool:
    """Whether the tensors among them have memory of their own, and are not the stand-ins of a mode."""
    return all(type(x) in (torch.Tensor, torch.nn.Parameter) for x in inputs if isinstance(x, torch.Tensor))


def _comparison(fixed: tuple[int, ...]) -> Callable[[list[Any], list[int]], bool]:
    """A function that says whether the tensors at these positions of a list are where a list of addresses says."""
    if not fixed:
        return lambda inputs, addresses: True
    in_c = getattr(torch._C, "_tensors_data_ptrs_at_indices_equal", None)
    if in_c is not None:
        positions = list(fixed)
        return lambda inputs, addresses: bool(in_c(inputs, addresses, positions))
    pick = operator.itemgetter(*fixed, fixed[0])  # two at least, so that it returns a tuple
    data_ptr = torch.Tensor.data_ptr
    return lambda inputs, addresses: tuple(map(data_ptr, pick(inputs))) == pick(addresses)


_turns: dict[int, Turns] = {}
_turns_lock = threading.Lock()


def _turns_at(index: int) -> Turns:
    from fxopt.runtime.graph_driver import GraphDriver

    with _turns_lock:
        if index not in _turns:
            with torch.cuda.device(index):
                _turns[index] = Turns(GraphDriver(index))
        return _turns[index]


def with_graphs(
    executor: Executor, phase: Phase, options: Options, journal: Journal, extension: Extension | None = None
) -> Executor | GraphedExecutor | InPieces:
    """What runs `executor`'s plan: with CUDA graphs on a GPU, unless switched off or impossible; in training only where
    mode="reduce-overhead" asks for them. Replays are left to the code of `extension`, as soon as it is there.

    The journal says which, and why.
    """
    training = phase is not Phase.INFERENCE
    device = gpu(executor.plan)
    if device is None or (training and options.mode != "reduce-overhead"):
        return executor
    choice = _switched_off(options) or (_in_training(executor.plan, phase, options) if training else _parts(executor.plan))
    if isinstance(choice, str):
        journal.note(NAME, f"not captured: {choice}")
        return executor
    try:
        made = _Made(_turns_at(device.index or 0), options, journal, extension)
        if isinstance(choice, Pieces):
            run: GraphedExecutor | InPieces = made.in_pieces(choice, executor, phase)
        else:
            run = made.graphed(choice, executor, phase)
    except (OSError, RuntimeError, FxoptError) as error:
        journal.note(NAME, f"not captured: {error}")
        return executor
    journal.note(NAME, choice.note)
    made.tell_of_native_code()
    return run


def _parts(plan: Plan) -> Choice | Pieces | str:
    return choose_pieces(plan) or choose(plan)


class _Made:
    """Makes executors with graphs for one plan."""

    def __init__(self, turns: Turns, options: Options, journal: Journal, extension: Extension | None) -> None:
        self._turns, self._options, self._journal = turns, options, journal
        self._found = extension
        wanted = extension is not None and NATIVE not in options.disable and extension.reason is None
        self._extension = extension if wanted else None

    def tell_of_native_code(self) -> None:
        """Note how replays are done."""
        if self._extension is not None:
            text = "replays are one call of compiled code as soon as that is there, and go through Python until then"
            self._journal.note(NATIVE, text)
        elif self._found is not None and NATIVE not in self._options.disable:
            self._journal.note(NATIVE, f"replays go through Python: {self._found.reason}")

    def graphed(self, choice: Choice, executor: Executor, phase: Phase) -> GraphedExecutor:
        parts, limit, note = choice.parts, self._options.cuda_graph_limit, self._journal.note
        found = traits(parts.captured)
        if phase is not Phase.INFERENCE:
            from fxopt.runtime.training_graph import GraphedBackward, GraphedForward

            made = GraphedForward if phase is Phase.FORWARD else GraphedBackward
            return made(executor, found, self._turns, limit, note, parts, self._extension)
        if not parts.is_whole:
            way = functools.partial(InParts, parts, executor)
            return GraphedExecutor(executor, found, self._turns, limit, note, way, self._extension)
        wanted = branches.NAME not in self._options.disable
        contest = BranchContest(executor, found, functools.partial(note, branches.NAME)) if wanted else None
        return GraphedExecutor(executor, found, self._turns, limit, note, extension=self._extension, contest=contest)

    def in_pieces(self, choice: Pieces, executor: Executor, phase: Phase) -> InPieces:
        """Raises PlanError and CacheError where a part cannot be bound."""
        runs = list[tuple[Callable[[list[Any]], tuple[Any, ...]], tuple[int, ...]]]()
        for piece in choice.pieces:
            run = executor.part(piece.part.plan)
            runs.append((run if piece.choice is None else self.graphed(piece.choice, run, phase), piece.part.takes))
        return InPieces(executor, runs)


def _in_training(plan: Plan, phase: Phase, options: Options) -> Choice | Pieces | str:
    """All that does not end in large values, a backward perhaps in pieces."""
    if reason := flaw(plan):
        return reason
    in_pieces = phase is Phase.BACKWARD and backward_pieces.NAME not in options.disable
    pieces = backward_pieces.choose_backward_pieces(plan) if in_pieces else None
    return pieces or choose_window(plan, phase, ends=training_window.NAME not in options.disable)


def _switched_off(options: Options) -> str | None:
    return "switched off" if not options.cuda_graphs or NAME in options.disable else None
