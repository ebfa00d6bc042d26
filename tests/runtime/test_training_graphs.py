"""Training with CUDA graphs, acted out on the CPU: gradients are those without, whatever happens around the calls."""

from __future__ import annotations

import copy
import gc
import sys
import weakref
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch._subclasses import FakeTensorMode
from torch.utils.checkpoint import checkpoint

from fxopt import compiler, plan_cache
from fxopt.codegen.replay_build import ReplayCode
from fxopt.ir import attention_backends, attention_op
from fxopt.ir.graph import Phase
from fxopt.runtime import backward_pieces, capturable, recording, training_graph, training_window
from fxopt.runtime.backward_pieces import choose_backward_pieces
from fxopt.runtime.capturable import Choice, Facts, whole
from fxopt.runtime.cuda_graph import GraphedExecutor, Turns
from fxopt.runtime.footprint import footprint
from fxopt.runtime.in_parts import InPieces
from fxopt.runtime.plan import Plan
from fxopt.runtime.recording import record
from fxopt.runtime.split import Parts, split
from fxopt.runtime.training_graph import BackwardRecording, GraphedBackward, GraphedForward, SavedMemory
from fxopt.runtime.training_window import choose_window
from tests.runtime.fake_graphs import FakeDriver, Function, address_of

CPU = torch.device("cpu")


class ActedBackward(GraphedBackward):
    """Once it may overwrite what it has read, it does."""

    def _record(self, values: list[Any], signature: tuple[Any, ...]) -> recording.Recording:
        driver: Any = self._turns.driver
        driver.memory += [owner for memory in training_graph._memories for owner in memory._owners]  # the pool has it
        made = super()._record(values, signature)
        if isinstance(made, BackwardRecording):
            replay: Any = made.replay
            replay.overwritten += [address_of(values[loan.at]) for loan in made.loans]
        return made


class Binder:
    """Stands for an executor of which one part is captured."""

    kept_as = None

    def __init__(self, executor: Any, parts: Parts, driver: FakeDriver) -> None:
        self.plan, self.executor, self.parts, self.driver = executor.plan, executor, parts, driver

    def __call__(self, inputs: list[Any]) -> Any:
        return self.executor(inputs)

    def part(self, made: Plan) -> Any:
        run = self.executor.part(made)
        if made is not self.parts.captured.plan:
            return run
        self.driver.function = Function(lambda *values: run(list(values)))
        self.driver.function.plan = made
        return self.driver.function


class Stage:
    """Everything that has been compiled, with its acted device; plans run as if they were on a GPU."""

    def __init__(self) -> None:
        self.forwards: list[GraphedForward] = []
        self.backwards: list[GraphedBackward] = []
        self.notes: list[str] = []
        self.draws = False  # whether library ops do
        self.in_pieces = False  # whether backwards are
        self.in_windows = False  # whether steps at the ends run plainly
        self.windows: list[Parts] = []
        self.code: ReplayCode | None = None  # for replays

    def with_graphs(self, executor: Any, phase: Phase, options: Any, journal: Any, extension: Any) -> Any:
        if phase is Phase.INFERENCE:
            return executor
        if self.in_windows:
            return self.windowed(executor, phase)
        pieces = choose_backward_pieces(executor.plan) if phase is Phase.BACKWARD and self.in_pieces else None
        if pieces is None:
            return self.graphed(executor, phase)
        runs = [(executor.part(piece.part.plan), piece) for piece in pieces.pieces]
        made = [(self.graphed(run, phase) if piece.choice else run, piece.part.takes) for run, piece in runs]
        return InPieces(executor, made)

    def graphed(self, executor: Any, phase: Phase) -> Any:
        function = Function(lambda *values: executor(list(values)))
        function.plan = executor.plan
        return self._made(function, whole(executor.plan), FakeDriver(function, 0, executor.plan.saved), phase)

    def windowed(self, executor: Any, phase: Phase) -> Any:
        choice = choose_window(executor.plan, phase)
        assert isinstance(choice, Choice)
        self.windows.append(choice.parts)
        if choice.parts.is_whole:
            return self.graphed(executor, phase)
        driver = FakeDriver(Function(tuple), 0, choice.parts.captured.plan.saved)
        return self._made(Binder(executor, choice.parts, driver), choice.parts, driver, phase)

    def _made(self, executor: Any, parts: Parts, driver: FakeDriver, phase: Phase) -> Any:
        found = replace(capturable.traits(parts.captured), device=CPU, steps=1 << 20, draws=self.draws)
        driver.seeds = found.seeds
        kind = GraphedForward if phase is Phase.FORWARD else ActedBackward
        made = kind(executor, found, Turns(driver), 4, lambda _, text: self.notes.append(text), parts, self.code)
        (self.forwards if phase is Phase.FORWARD else self.backwards).append(made)  # type: ignore[arg-type]
        return made

    def counts(self) -> tuple[int, int]:
        """Replays of forwards and of backwards so far."""
        return tuple(sum(_replayed(made) for made in kind) for kind in (self.forwards, self.backwards))  # type: ignore


def _replayed(made: GraphedExecutor) -> int:
    return sum(what == "replay" for what, _ in made._turns.driver.log)  # type: ignore[attr-defined]


@pytest.fixture
def stage(monkeypatch: pytest.MonkeyPatch) -> Stage:
    torch.compiler.reset()
    found = Stage()
    monkeypatch.setattr(compiler, "with_graphs", found.with_graphs)
    monkeypatch.setattr(plan_cache, "with_graphs", found.with_graphs)
    monkeypatch.setattr(capturable, "gpu", lambda plan: CPU)
    monkeypatch.setattr(training_graph, "LEAST_OVERWRITTEN", 1)
    return found


class Layers(nn.Module):
    def __init__(self, drop: float = 0.0) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.norm, self.up, self.down, self.drop = nn.LayerNorm(8), nn.Linear(8, 16), nn.Linear(16, 8), drop

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + self.down(F.dropout(F.gelu(self.up(self.norm(x))), self.drop, self.training))


class Attended(nn.Module):
    """Attention over the rows, with two heads, as it is compiled for a GPU."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.qkv = nn.Linear(8, 24)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        query, key, value = self.qkv(x).view(1, -1, 3, 2, 4).permute(2, 0, 3, 1, 4)
        out: torch.Tensor = attention_op.attention_forward(query, key, value)[0]
        return out


class Headed(Attended):
    """With more results than anything else in it. What it saves has views into the midst of what a product has made."""

    def __init__(self) -> None:
        super().__init__()
        self.head = nn.Linear(8, 256, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        out: torch.Tensor = self.head(super().forward(x).transpose(1, 2).reshape(-1, 8).tanh())
        return out


def data(seed: int, rows: int = 4) -> torch.Tensor:
    return torch.randn(rows, 8, generator=torch.Generator().manual_seed(seed))


Run = Callable[[torch.Tensor], torch.Tensor]


class Pair:
    """A compiled model and an equal one in eager; `agree` compares their gradients."""

    def __init__(self, drop: float = 0.0, make: Callable[[], nn.Module] | None = None) -> None:
        self.mine, self.theirs = (make() if make else Layers(drop) for _ in range(2))
        self.run: Run = torch.compile(self.mine, backend="fxopt", options={"strict": True})

    def losses(self, seed: int) -> tuple[torch.Tensor, torch.Tensor]:
        return self.run(data(seed)).pow(2).sum(), self.theirs(data(seed)).pow(2).sum()

    def step(self, seed: int) -> None:
        for loss in self.losses(seed):
            loss.backward()

    def agree(self) -> None:
        for mine, theirs in zip(self.mine.parameters(), self.theirs.parameters(), strict=True):
            torch.testing.assert_close(mine.grad, theirs.grad)

    def clear(self) -> None:
        for model in (self.mine, self.theirs):
            model.zero_grad()

    def warm(self) -> Pair:
        """Three steps: forward is captured in the second, backward in the third."""
        for k in range(3):
            self.step(k)
            self.agree()
            self.clear()
        return self


def test_compiled_code_replays_forwards_and_backwards(stage: Stage, compiled_code: ReplayCode) -> None:
    stage.code = compiled_code
    pair = Pair().warm()
    pair.step(4)
    pair.step(5)
    pair.agree()
    assert stage.counts() == (4, 3)
    (forward,), (backward,) = stage.forwards, stage.backwards
    assert forward._play is None and forward._latest is not None and forward._latest.play_within is not None
    assert backward._play is None and backward._latest is not None and backward._latest.play_within is not None


def test_little_that_is_saved_is_left_alone(
    stage: Stage, compiled_code: ReplayCode, monkeypatch: pytest.MonkeyPatch
) -> None:
    """So that a replay is one call of compiled code, over a retained graph, too."""
    monkeypatch.setattr(training_graph, "LEAST_OVERWRITTEN", 1 << 20)
    stage.code = compiled_code
    pair = Pair().warm()
    (backward,) = stage.backwards
    recording: Any = backward._latest
    assert backward._play is not None and recording.loans == () and not recording.overwritten
    before = stage.counts()
    losses = pair.losses(5)
    for _ in range(3):
        for loss in losses:
            loss.backward(retain_graph=True)
        pair.agree()
    assert stage.counts() == (before[0] + 1, before[1] + 3)


@pytest.fixture
def pieces(stage: Stage, monkeypatch: pytest.MonkeyPatch) -> Stage:
    """Backwards are cut wherever that can be."""
    stage.in_pieces = True
    for name, value in (("SMALLEST", 1), ("PIECE_STEPS", 1), ("PASSING_SHARE", 1e6)):
        monkeypatch.setattr(backward_pieces, name, value)
    return stage


@pytest.mark.parametrize("set_to_none", [True, False])
def test_a_backward_in_pieces(pieces: Stage, set_to_none: bool) -> None:
    pair = Pair()
    for k in range(6):
        pair.step(k)
        if k != 2:  # two steps are added up
            pair.agree()
            for model in (pair.mine, pair.theirs):
                model.zero_grad(set_to_none=set_to_none)
    replayed = [_replayed(piece) for piece in pieces.backwards]
    assert replayed.count(4) > 1 and replayed.count(4) + replayed.count(0) == len(replayed), "4, or nothing saved is read"
    ends = [made._latest for made in pieces.backwards if isinstance(made._latest, BackwardRecording)]
    assert sum(len(each.loans) for each in ends) == len(ends[-1].memory.tensors), "each is overwritten after its last piece"


def test_pieces_whose_forward_ran_plainly(pieces: Stage) -> None:
    pair = Pair().warm()
    replays, graphs = pieces.counts(), sum(piece.graphs for piece in pieces.backwards)
    losses = [loss for seed in (5, 6) for loss in pair.losses(seed)]
    for loss in reversed(losses):
        loss.backward()
    pair.agree()
    assert pieces.counts() == (replays[0] + 1, replays[1] + graphs)


@pytest.mark.parametrize("copied", [8e7, 1e12])
def test_ends_that_run_plainly(stage: Stage, monkeypatch: pytest.MonkeyPatch, copied: float) -> None:
    """A large result and its gradient: where a copy takes longer than steps, those that make and read them run plainly."""
    stage.in_windows = True
    monkeypatch.setattr(Facts, "obstacle", lambda self, step: None)
    monkeypatch.setattr(training_window, "COPY_BYTES_PER_SECOND", copied)
    monkeypatch.setattr(training_window, "MIN_STEPS", 1)
    pair = Pair(make=Headed).warm()
    for k in range(2):
        pair.step(k)
        pair.agree()
    losses = [loss for seed in (5, 6) for loss in pair.losses(seed)]  # the second forward runs plainly
    for loss in (*losses[:2], *losses):
        loss.backward(retain_graph=True)
    pair.agree()
    forward, backward = stage.windows
    assert (forward.after is not None, backward.before is not None) == (copied < 1e9, copied < 1e9)
    assert stage.counts() == (5, 3)
    memory, moved = stage.forwards[0]._latest.memory, stage.backwards[0]._traits.moved  # type: ignore[union-attr]
    assert memory.given_up() and any(x.storage_offset() for x in memory.tensors)
    plan = stage.backwards[0].plan
    given = [plan.inputs[i].name for i in moved if i < len(plan.inputs)]
    assert all(name.startswith(("tangents", "primals")) for name in given), "nothing saved is copied"


def test_lengths_that_vary_beside_plain_ends(stage: Stage, monkeypatch: pytest.MonkeyPatch) -> None:
    """What is made before a replay has sizes that follow from those of the inputs."""

    def first_steps_apart(plan: Plan, phase: Phase) -> Choice:
        return Choice(split(plan, 2, None, lends=False) if phase is Phase.BACKWARD else whole(plan), "")

    stage.in_windows = True
    monkeypatch.setattr(sys.modules[__name__], "choose_window", first_steps_apart)
    pair = Pair(make=Headed)
    pair.run = torch.compile(pair.mine, backend="fxopt", dynamic=True)
    for k in range(12):
        for run in (pair.run, pair.theirs):
            run(data(k, 6 + 2 * (k % 2))).pow(2).sum().backward()
        pair.agree()
        pair.clear()
    assert stage.windows[1].before is not None and sum(made.graphs for made in stage.backwards) == 2


def test_steps_replay_from_the_second_and_third_on(stage: Stage) -> None:
    pair = Pair()
    optimizers = [torch.optim.SGD(model.parameters(), lr=1e-3) for model in (pair.mine, pair.theirs)]
    for k, counts in enumerate([(0, 0), (1, 0), (2, 1), (3, 2), (4, 3)]):
        for optimizer in optimizers:
            optimizer.zero_grad()
        pair.step(k)
        pair.agree()
        assert stage.counts() == counts
        for optimizer in optimizers:
            optimizer.step()
    assert any("stay allocated between calls" in note for note in stage.notes)


def test_a_backward_uses_the_scratch_memory_of_its_forward(stage: Stage) -> None:
    for _ in range(2):
        Pair().warm()
    kinds: Any = (stage.forwards, stage.backwards)
    forwards, backwards = ([pool for made in kind for pool in made._turns.driver.pools] for kind in kinds)
    assert forwards == backwards and forwards[0] is not forwards[1]


def test_gradients_and_losses_are_nobodys_memory_but_the_callers(stage: Stage) -> None:
    pair = Pair().warm()
    kept = []
    for k in range(4):
        mine, theirs = pair.losses(k)
        mine.backward()
        theirs.backward()
        kept.append((mine, theirs, *zip(pair.mine.parameters(), pair.theirs.parameters(), strict=True)))
        kept[-1] = [(mine, theirs)] + [(a.grad, b.grad) for a, b in kept[-1][2:]]  # type: ignore[assignment]
        pair.clear()
    for pairs in kept:
        for mine, theirs in pairs:  # type: ignore[misc]
            torch.testing.assert_close(mine, theirs)
    assert stage.counts() == (6, 5)


def test_gradients_accumulate(stage: Stage) -> None:
    pair = Pair().warm()
    for k in range(3):
        pair.step(k)
        pair.agree()
    assert stage.counts() == (5, 4)


def test_forwards_before_a_backward(stage: Stage) -> None:
    pair = Pair().warm()
    for order in ([0, 1, 2], [2, 1, 0], [1, 2, 0]):
        before = stage.counts()
        losses = [pair.losses(k) for k in range(3)]
        for k in order:
            for loss in losses[k]:
                loss.backward()
            pair.agree()
        pair.clear()
        del loss, losses
        assert stage.counts() == (before[0] + 1, before[1] + 1), "one set of activations, so one replay each"


def test_the_graph_of_autograd_is_retained(stage: Stage) -> None:
    pair = Pair().warm()
    before = stage.counts()
    losses = pair.losses(5)
    for _ in range(2):
        for loss in losses:
            loss.backward(retain_graph=True)
        pair.agree()
        pair.step(6)  # plainly: what the first forward has saved is still wanted
        pair.agree()
    assert stage.counts() == (before[0] + 1, before[1]), "its replay would destroy what is retained"
    del loss, losses
    pair.step(7)
    pair.agree()
    assert stage.counts() == (before[0] + 2, before[1] + 1)


def test_a_graph_that_is_retained_in_each_step(stage: Stage, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(training_graph, "RETAINED_CALLS", 2)
    pair = Pair()
    replays = []
    for k in range(7):
        losses = pair.losses(k)
        for loss in losses:
            loss.backward(retain_graph=True)
            loss.backward()
        del loss, losses
        pair.agree()
        pair.clear()
        replays.append(stage.counts()[1])
    assert replays == [0, 1, 2, 3, 5, 7, 9], "in the end both of a step's backwards are replayed"


def test_a_backward_overwrites_what_only_it_can_read(stage: Stage) -> None:
    pair = Pair().warm()
    (forward,), (backward,) = stage.forwards, stage.backwards
    recording: Any = backward._latest
    memory = forward._latest.memory  # type: ignore[union-attr]
    assert recording.overwritten == memory.given_up() == memory.idle() and len(recording.loans) == len(memory.tensors)
    losses = pair.losses(5)
    for loss in losses:
        loss.backward()
    pair.agree()
    assert all(bool((x == -77).all()) for x in memory.tensors)


def test_a_pool_begins_with_what_forward_and_backward_hold(stage: Stage) -> None:
    """Known from the backward's first run, which is a plain one; nothing is added for the backward's capture."""
    Pair().warm()
    (forward,), (backward,) = stage.forwards, stage.backwards
    memory = forward._latest.memory  # type: ignore[union-attr]
    drivers: list[Any] = [forward._turns.driver, backward._turns.driver]
    held = footprint(backward.plan, CPU)
    assert held is not None and max(memory.nbytes, held.peak) < forward.room < memory.nbytes + held.peak + (1 << 12)
    assert [driver.peaks for driver in drivers] == [[forward.room + forward.room // training_graph.ROOM], [0]]


@pytest.mark.filterwarnings("error:Accessing the data pointer")
def test_tensors_without_memory_are_not_asked_where_they_are(stage: Stage) -> None:
    """Stand-ins of a torch mode, which sees the call."""
    Pair().step(0)
    (forward,), (backward,) = stage.forwards, stage.backwards
    with FakeTensorMode() as mode:
        stands = [mode.from_tensor(torch.randn(4)) for _ in range(max(len(forward.plan.outputs), len(backward.plan.inputs)))]
        for made in (forward, backward):
            driver: Any = made._turns.driver
            driver.watched = True
            function: Any = made._executor
            function.fn = lambda *values, made=made: tuple(stands[: len(made.plan.outputs)])
            made(stands[: len(made.plan.inputs)])


def test_inputs_that_take_too_long_to_copy_take_no_memory(stage: Stage, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(training_graph, "COPY_SHARE", 0.0)
    pair = Pair().warm()
    (forward,) = stage.forwards
    driver: Any = forward._turns.driver
    assert driver.captures == 0 and len(stage.notes) == 1 and "not captured: copying its inputs" in stage.notes[0]
    pair.step(5)
    pair.agree()


def test_a_forward_whose_backward_has_not_run_begins_with_nothing(stage: Stage) -> None:
    pair = Pair()
    for k in range(3):
        pair.losses(k)
    (forward,) = stage.forwards
    driver: Any = forward._turns.driver
    assert forward.left and forward.room == 0 and driver.peaks == [0]


def test_memory_that_one_forward_has_left_and_another_has_taken(stage: Stage) -> None:
    """Two models in turns: where one has saved something, the other does later. That says nothing about the first one."""
    for model in (Layers(), Attended()):
        torch.compile(model, backend="fxopt", options={"strict": True})(data(0)).sum().backward()
    (first, second), (_, backward) = stage.forwards, stage.backwards
    places = [torch.zeros(1 << 10) for _ in range(max(len(made.plan.outputs) for made in stage.forwards))]
    for forward in (first, second):
        forward.room, function = 0, forward._executor
        function.fn = lambda *values: tuple(map(address_of, places))  # type: ignore[attr-defined]
    first._plainly([], ((), ()))
    results = second._plainly([], ((), ()))
    saved = [results[i].detach() for i in second._own_results]
    backward._has_asked = False
    backward._ask_for_room([saved[i % len(saved)] for i in range(len(backward.plan.inputs))])
    assert first.room == 0 and second.room > 0


def test_a_piece_that_is_captured_anew_can_be_replayed(pieces: Stage, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also one that overwrites nothing of its own, but in the memory of what the pieces before it do."""
    monkeypatch.setattr(training_graph, "RETAINED_CALLS", 2)
    monkeypatch.setattr(training_graph, "LEAST_OVERWRITTEN", 200)
    pair = Pair().warm()
    latest = [made._latest for made in pieces.backwards]
    assert any(isinstance(made, BackwardRecording) and made.overwritten and not made.loans for made in latest)
    for k in range(8):
        losses = pair.losses(k)
        for loss in losses:
            loss.backward(retain_graph=True)
            loss.backward()
        del loss, losses
        pair.agree()
        pair.clear()
    drivers: list[Any] = [made._turns.driver for made in pieces.backwards]
    assert max(driver.captures for driver in drivers) == 2


def test_what_has_been_given_up_is_captured_elsewhere(stage: Stage) -> None:
    """A second capture in the pool could lie over what it reads; and it must not destroy anything."""
    pair = Pair().warm()
    (backward,) = stage.backwards
    backward._kept.clear()
    backward._use(None)
    before = stage.counts()
    losses = pair.losses(5)
    for _ in range(2):
        for loss in losses:
            loss.backward(retain_graph=True)
        pair.agree()
    assert stage.counts() == (before[0] + 1, before[1] + 2)
    assert backward._turns.driver.pools[-1] is None  # type: ignore[attr-defined]


def test_a_forward_without_backward(stage: Stage) -> None:
    pair = Pair().warm()
    before = stage.counts()
    dropped = pair.losses(5)
    pair.step(6)
    pair.agree()
    assert stage.counts() == (before[0] + 1, before[1]), "its activations are held"
    del dropped
    pair.step(7)
    pair.agree()
    assert stage.counts() == (before[0] + 2, before[1] + 1)


def test_an_exception_between_forward_and_backward(stage: Stage) -> None:
    pair = Pair().warm()
    before = stage.counts()
    for k in range(3):
        try:
            loss = pair.losses(k)
            raise ZeroDivisionError(str(loss[0].item()))
        except ZeroDivisionError:
            del loss
        gc.collect()
        pair.step(k)
        pair.agree()
    assert stage.counts() == (before[0] + 6, before[1] + 3)


def test_hooks_that_may_read_on_streams_of_their_own_see_no_shared_memory(stage: Stage) -> None:
    pair = Pair().warm()
    before = stage.counts()
    with torch.autograd.graph.saved_tensors_hooks(lambda x: x, lambda x: x):
        pair.step(5)
    assert stage.counts() == before
    with torch.autograd.graph.save_on_cpu():
        pair.step(5)
    pair.agree()
    assert stage.counts()[0] == before[0] + 1


def test_saved_tensors_that_somebody_keeps(stage: Stage, monkeypatch: pytest.MonkeyPatch) -> None:
    """A hook that packs what is saved, and keeps it longer than the backward."""
    monkeypatch.setattr(training_graph, "PATIENT_HOOKS", {__name__})
    pair = Pair().warm()
    before = stage.counts()
    stolen: list[torch.Tensor] = []

    def pack(x: torch.Tensor) -> Any:
        stolen.append(x)
        return x.clone()

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
        pair.step(5)
    pair.agree()
    values = [x.clone() for x in stolen]
    pair.step(6)
    assert stage.counts() == (before[0] + 1, before[1]), "moved by the hook, kept by its list"
    assert all(map(torch.equal, stolen, values))
    stolen.clear()
    pair.step(7)
    pair.agree()
    assert stage.counts() == (before[0] + 2, before[1] + 1)


def compiled_node(loss: torch.Tensor) -> Any:
    """The node of the compiled function in the graph of `loss`."""
    node: Any = loss.grad_fn
    while not hasattr(node, "saved_tensors"):
        node = node.next_functions[0][0]
    return node


def test_saved_tensors_that_are_read_through_their_node(stage: Stage) -> None:
    """Before the backward and by a hook in its midst, in passing or kept: those that are kept nobody overwrites."""
    pair = Pair().warm()
    before = stage.counts()
    for keeps in (False, True):
        loss, want = pair.losses(5)
        node = compiled_node(loss)
        seen = [x.clone() for x in node.saved_tensors]
        within: list[torch.Tensor] = []
        node.register_prehook(lambda grads, node=node, within=within: within.extend(x.clone() for x in node.saved_tensors))
        kept = node.saved_tensors if keeps else ()
        loss.backward()
        want.backward()
        pair.agree()
        assert len(seen) == len(within) > 0 and all(map(torch.equal, within, seen))
        assert all(map(torch.equal, kept, seen))
        with pytest.raises(RuntimeError, match="freed"):
            _ = node.saved_tensors
        del loss, want, node, kept
    assert stage.counts() == (before[0] + 2, before[1] + 1)
    pair.step(6)
    pair.agree()
    assert stage.counts() == (before[0] + 3, before[1] + 2)


def test_a_backward_that_makes_a_graph(stage: Stage) -> None:
    """AOTAutograd refuses the second backward; what the first one has saved is as it was."""
    pair = Pair().warm()
    before = stage.counts()
    loss, want = pair.losses(5)
    mine = torch.autograd.grad(loss, pair.mine.parameters(), create_graph=True)
    theirs = torch.autograd.grad(want, pair.theirs.parameters(), create_graph=True)
    torch.testing.assert_close(mine, theirs)
    with pytest.raises(RuntimeError, match="double backward"):
        mine[0].sum().backward()
    loss.backward()
    want.backward()
    pair.agree()
    assert stage.counts() == (before[0] + 1, before[1] + 1), "the first one would have destroyed what the last one reads"


def test_losses_of_one_forward_are_differentiated_one_by_one(stage: Stage) -> None:
    pair = Pair().warm()
    before = stage.counts()
    for k in range(2):
        outs = [run(data(k)) for run in (pair.run, pair.theirs)]
        for row in range(4):
            for out in outs:
                out[row].sum().backward(retain_graph=row < 3)
            pair.agree()
        del out, outs
        pair.clear()
    assert stage.counts() == (before[0] + 2, before[1] + 1 + 3), "the last; from four calls on one that destroys nothing"


def test_two_models_in_turns(stage: Stage) -> None:
    pairs = [Pair(), Pair()]
    for k in range(5):
        losses = [loss for pair in pairs for loss in pair.losses(k)]
        for loss in losses:
            loss.backward()
        del loss, losses
        for pair in pairs:
            pair.agree()
            pair.clear()
    assert stage.counts() == (8, 6)


def test_one_model_with_weights_shared_by_two_places(stage: Stage) -> None:
    pair = Pair()

    def losses(k: int) -> list[torch.Tensor]:
        return [(run(run(data(k)) * 0.5)).sum() for run in (pair.run, pair.theirs)]

    for k in range(5):
        for loss in losses(k):
            loss.backward()
        del loss
        pair.agree()
        pair.clear()
    assert stage.counts()[0] >= 4


def test_evaluation_in_between(stage: Stage) -> None:
    pair = Pair(0.0).warm()
    loss, want = pair.losses(5)
    with torch.no_grad():
        torch.testing.assert_close(pair.run(data(6)), pair.theirs(data(6)))
    loss.backward()
    want.backward()
    pair.agree()
    assert stage.counts() == (3, 2)


def test_checkpointing(stage: Stage) -> None:
    pair = Pair()
    for k in range(5):
        for run in (pair.run, pair.theirs):
            x = data(k).requires_grad_()
            checkpoint(run, x, use_reentrant=False).pow(2).sum().backward()
        pair.agree()
        pair.clear()
    forwards, backwards = stage.counts()
    assert forwards >= 6 and backwards >= 2


@pytest.mark.parametrize("in_the_graph", [False, True])
def test_dropout_has_the_masks_that_it_has_without_graphs(in_the_graph: bool, stage: Stage) -> None:
    stage.draws = in_the_graph

    def curve(graphs: bool) -> list[Any]:
        torch.compiler.reset()
        pair = Pair(0.5)
        torch.manual_seed(3)
        out: list[Any] = []
        for k in range(6):
            if not graphs:
                for made in (*stage.forwards, *stage.backwards):
                    made._declined = True
            loss = pair.run(data(k)).pow(2).sum()
            loss.backward()
            out.append((loss.detach(), [copy.deepcopy(p.grad) for p in pair.mine.parameters()]))
            del loss
            pair.mine.zero_grad()
        return out

    plain = curve(False)
    assert stage.counts() == (0, 0)
    got = curve(True)
    torch.testing.assert_close(got, plain, rtol=0, atol=0)
    assert stage.counts() == (5, 4) and not torch.equal(got[3][0], got[4][0])


def test_lengths_that_vary(stage: Stage) -> None:
    model, eager = Layers(), Layers()
    run = torch.compile(model, backend="fxopt", dynamic=True)
    for k in range(24):
        rows = 3 + k % 6
        for f in (run, eager):
            f(data(k, rows)).pow(2).sum().backward()
    for mine, theirs in zip(model.parameters(), eager.parameters(), strict=True):
        torch.testing.assert_close(mine.grad, theirs.grad)
    assert sum(made.graphs for made in stage.forwards) == training_graph.SIZES_KEPT


def test_forwards_with_weights_that_are_gone_give_their_memory_back(stage: Stage, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(training_graph, "STALE_REPLAYS", 2)
    pair = Pair().warm()
    alive = []
    for _ in range(3):
        for p in pair.mine.parameters():
            alive.append(p.data)
            p.data = p.data.clone()
        for seed in range(5):
            pair.step(seed)
            pair.agree()
            pair.clear()
        assert stage.forwards[0].graphs == 2, "the one before was in use a moment ago"
        assert stage.backwards[0].graphs == 2, "a third would keep the memory of a forward that is gone"


def test_a_forward_that_is_not_captured_any_more_gives_its_memory_back(stage: Stage) -> None:
    """Its backwards, which nobody can replay then, would keep it."""
    pair = Pair().warm()
    (forward,), (backward,) = stage.forwards, stage.backwards
    memory = weakref.ref(forward._latest.memory)  # type: ignore[union-attr]
    losses = pair.losses(5)
    forward._decline("a test wants it so")
    for loss in losses:
        loss.backward()
    del loss, losses
    pair.step(6)
    pair.agree()
    assert backward.graphs == 0 and memory() is None
    pair.step(7)
    pair.agree()


def test_another_stream_is_waited_for_and_then_left_alone(stage: Stage) -> None:
    pair = Pair().warm()
    driver: Any = stage.forwards[0]._turns.driver
    before = stage.counts()[0]
    for k in range(training_graph.STREAM_CHANGES + 3):
        driver.current = 100 + k
        pair.step(k)
        pair.agree()
    assert driver.log.count(("synchronize", 0)) == training_graph.STREAM_CHANGES
    assert stage.counts()[0] == before + training_graph.STREAM_CHANGES


def test_who_uses_a_storage() -> None:
    results = [torch.randn(4), torch.randn(6)]
    results.append(results[1][2:])
    memory = SavedMemory(results, (), object(), FakeDriver(Function(tuple), 0))
    tensors = memory.tensors
    assert memory.is_idle() and memory.nbytes == 16 + 24 + 16
    for alias in (lambda: tensors[0].detach(), lambda: tensors[1].untyped_storage(), lambda: tensors[2].view(2, 2)):
        held = alias()
        assert not memory.is_idle()
        del held
        assert memory.is_idle()


def test_empty_tensors_are_no_part_of_saved_memory() -> None:
    """They have no address of their own."""
    memory = SavedMemory([torch.empty(0, 3), torch.randn(4)], (), object(), FakeDriver(Function(tuple), 0))
    assert memory.is_idle()
    loans = memory.loans([x.detach() for x in (*memory.tensors, torch.empty(0))], range(3))
    assert [(loan.at, loan.storage) for loan in loans] == [(1, 1)]


def test_a_view_that_is_saved_does_not_hold_its_own_memory(stage: Stage, monkeypatch: pytest.MonkeyPatch) -> None:
    """Fused attention's results and statistics are views of what its kernels wrote, some of it padded."""
    exact = attention_backends._FORWARD[attention_backends.MATH]

    def viewed(x: attention_backends.Inputs, statistics: bool) -> attention_backends.Outputs:
        out, sums = exact(x, statistics)
        return out[..., : x.value.shape[-1]], sums.view(x.query.shape[:3]) if sums is not None else None

    monkeypatch.setitem(attention_backends._FORWARD, attention_backends.MATH, viewed)
    model, theirs = Attended(), Attended()
    run = torch.compile(model, backend="fxopt", options={"strict": True})
    for k in range(5):
        for f in (run, theirs):
            f(data(k, 6)).pow(2).sum().backward()
        for p, q in zip(model.parameters(), theirs.parameters(), strict=True):
            torch.testing.assert_close(p.grad, q.grad)
    assert stage.counts() == (4, 3), stage.notes


def test_a_note_names_what_is_held_elsewhere(stage: Stage, monkeypatch: pytest.MonkeyPatch) -> None:
    exact = attention_backends._FORWARD[attention_backends.MATH]
    held: list[Any] = []

    def hoarding(x: attention_backends.Inputs, statistics: bool) -> attention_backends.Outputs:
        out, sums = exact(x, statistics)
        held.append(sums.detach() if sums is not None else None)
        return out, sums

    monkeypatch.setitem(attention_backends._FORWARD, attention_backends.MATH, hoarding)
    run = torch.compile(Attended(), backend="fxopt", options={"strict": True})
    for k in range(3):
        run(data(k, 6)).pow(2).sum().backward()
    (note,) = [n for n in stage.notes if "held elsewhere" in n]
    assert "not captured: 1 of " in note and "float32 [1, 2, 6], of fxopt::attention_forward.default" in note


def on_a_gpu(fixed: tuple[int, ...] = ()) -> capturable.Traits:
    return capturable.Traits(torch.device("cuda", 0), (), fixed, (), (), seeds=0, steps=100)


def test_what_only_the_host_reads_is_saved_as_it_is() -> None:
    """The number of attention's backend: the same object's memory in each replay, in use at any time."""
    number = torch.tensor(2)
    function = Function(lambda: (number,))
    made = record(function, [], (), on_a_gpu(), FakeDriver(function, 0, saved=1), saved=1, pool=object())
    assert (made.results.kept, [x.tensor for x in made.results.host]) == ([], [number])
    assert made.play([], 7)[0].data_ptr() == number.data_ptr()
    memory = SavedMemory([], [x.tensor for x in made.results.host], object(), FakeDriver(function, 0))
    view = number.view(1)
    assert memory.is_idle() and view.data_ptr() in memory.addresses


def test_a_backward_keeps_the_numbers_that_it_was_captured_with() -> None:
    """Else another number could come to lie where one has been, and the backward would replay another backend's."""
    number = torch.tensor(2)
    function = Function(lambda n: (torch.zeros(0),))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(recording, "_check_result", lambda value, traits: None)
        made = record(function, [number], (), on_a_gpu(fixed=(0,)), FakeDriver(function, 0))
    assert made.addresses == [number.data_ptr()] and made.read == (number,)
