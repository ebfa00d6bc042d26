"""Plans in parts do what the whole does, wherever they are cut, and with the part in the middle replayed."""

from __future__ import annotations

import functools
import weakref
from dataclasses import replace
from typing import Any

import pytest
import torch

from fxopt.codegen.replay_build import ReplayCode
from fxopt.ir.graph import Role
from fxopt.ir.region import Alias, Call, Ref, Size
from fxopt.runtime import capturable
from fxopt.runtime.capturable import Choice, Pieces, Traits, choose, choose_pieces, traits
from fxopt.runtime.cuda_graph import GraphedExecutor, Turns
from fxopt.runtime.executor import Executor
from fxopt.runtime.in_parts import InParts, InPieces
from fxopt.runtime.memory import plan_memory
from fxopt.runtime.plan import Plan, SymbolSource
from fxopt.runtime.split import Mentions, Part, Parts, row, split, with_steps
from tests.runtime.fake_graphs import FakeDriver, Function
from tests.runtime.plans import CPU, S0, buffer, plan, tensor


def product(a: str, b: str, target: str) -> Call:
    return Call("aten::mm.default", (Ref(a), Ref(b)), outputs=(target,))


STEPS = [
    product("x", "w", "h0"),
    Alias("turned", "h0", (4, 4), (1, 4), 0),
    product("turned", "w", "h1"),
    Call("aten::copy_.default", (Ref("state"), Ref("h1")), {}, (None,), writes=("state",)),
    product("h0", "h1", "h2"),
    Call("fxopt::seed.default", (CPU,), {}, ("s",), effect=True),
    Alias("row", "h2", (1, 4), (4, 1), 4),
    product("row", "h1", "h3"),
    Call("fxopt::rand.default", (Ref("s"), [4, 4]), {}, ("noise",)),
    Call("aten::add.Tensor", (Ref("h2"), Ref("noise")), {}, ("h4",)),
    product("h4", "w", "h5"),
    Call("aten::add_.Tensor", (Ref("h1"), 1.0), {}, (None,), writes=("h1",)),
    product("h4", "h5", "h6"),
]
RUNNING = sum(isinstance(step, Call) for step in STEPS)
OUTPUTS = [Ref("h6"), Ref("turned"), Ref("h1"), Ref("x"), Ref("row"), 7, Ref("h3"), Ref("state")]


def network(*obstacle: Call, at: int = 0, more: tuple[int, ...] = ()) -> Plan:
    """With an obstacle before step `at`, and before those of `more`, which come later."""
    inputs = [tensor("x", 4, 4), tensor("w", 4, 4, role=Role.PARAMETER), tensor("state", 4, 4, role=Role.STATE)]
    buffers = [*(buffer(f"h{k}", *((1, 4) if k == 3 else (4, 4))) for k in range(7)), buffer("s", dtype=torch.int64)]
    buffers += [buffer("turned", 4, 4, strides=(1, 4)), buffer("row", 1, 4), buffer("noise", 4, 4)]
    steps, begin = list[Any](), 0
    for end in (at, *more):
        steps += [*STEPS[begin:end], *obstacle]
        begin = end
    return plan_memory(plan(inputs, buffers, [*steps, *STEPS[begin:]], OUTPUTS))


def given(seed: int) -> list[Any]:
    generator = torch.Generator().manual_seed(seed)
    x, w = (torch.randn(4, 4, generator=generator) / 2 for _ in range(2))
    return [x, w, torch.zeros(4, 4)]


def bound(made: Plan) -> Executor:
    return Executor(Plan.from_json(made.to_json()), {})


def same(got: tuple[Any, ...], want: tuple[Any, ...], inputs: list[Any]) -> None:
    """Values, layouts, and who shares memory with whom."""
    torch.testing.assert_close(got, want)
    assert [g.stride() for g in got if isinstance(g, torch.Tensor)] == [
        w.stride() for w in want if isinstance(w, torch.Tensor)
    ]
    assert got[3] is inputs[0] and got[7] is inputs[2]
    got[4].zero_()
    assert got[0].abs().min() > 0, "h6 is not the memory of h2"


CUTS = [(b, e) for b in (0, 1, 4) for e in range(b + 1, RUNNING + 1, 2)] + [(0, None), (2, None), (RUNNING - 1, None)]


@pytest.mark.parametrize("lends", [True, False])
@pytest.mark.parametrize(("begin", "end"), CUTS)
def test_parts_one_after_another_are_the_whole(begin: int, end: int | None, lends: bool) -> None:
    way = InParts(split(network(), begin, end, lends), bound(network()))
    mine, others = given(0), given(0)
    torch.manual_seed(1)
    want = bound(network())(list(others))
    torch.manual_seed(1)
    inputs = list(mine)
    values = way.begin(inputs)
    assert not inputs, "the list is handed over"
    got = way.end(values, way.captured(way.handed(values)))
    same(got, want, mine)
    torch.testing.assert_close(mine[2], others[2])


@pytest.mark.parametrize("lends", [True, False])
def test_what_is_saved_comes_from_the_captured_part_at_once(lends: bool) -> None:
    """Views into the midst of something, too: made again they would lie where nobody expects them."""
    returned = network()
    outputs = [out for k, out in enumerate(returned.outputs) if k != 4]  # a view that is returned is saved as a copy
    whole = replace(returned, outputs=(*outputs, Ref("row"), Ref("noise")), saved=2)
    whole = plan_memory(with_steps(whole, Mentions(returned).steps))
    parts = split(whole, 0, 7, lends, left={"h2", "noise"})
    captured, after = parts.captured.plan, parts.after
    assert captured.saved == 4 and captured.outputs[-4:] == (Ref("h2"), Ref("noise"), Ref("row"), Ref("noise"))
    assert after is not None and after.plan.saved == 0 and after.plan.outputs[-2:] == (None, None)
    assert not parts.lent & {at for _, at in parts.direct}
    way, mine, others = InParts(parts, bound(whole)), given(0), given(0)
    torch.manual_seed(1)
    want = bound(whole)(list(others))
    torch.manual_seed(1)
    values = way.begin(list(mine))
    made = way.captured(way.handed(values))
    got = way.end(values, made)
    assert got[-2] is made[-2] and got[-1] is made[-1]
    torch.testing.assert_close(got, want)


class Binder:
    """Stands for an executor of `made`: what it binds for the captured part can be captured on the CPU."""

    kept_as = None

    def __init__(self, made: Plan, parts: Parts, driver: FakeDriver) -> None:
        self.plan, self.captured, self.driver = made, parts.captured.plan, driver
        self.whole = bound(made)

    def __call__(self, inputs: list[Any]) -> tuple[Any, ...]:
        return self.whole(inputs)

    def part(self, made: Plan) -> Any:
        run = bound(made)
        if made is not self.captured:
            return run
        self.driver.function = Function(lambda *args: run(list(args)))
        return self.driver.function


def acted(
    made: Plan, parts: Parts, found: Traits, code: ReplayCode | None = None
) -> tuple[GraphedExecutor, FakeDriver, list[str]]:
    driver = FakeDriver(Function(lambda: ()), found.seeds)
    binder: Any = Binder(made, parts, driver)
    notes = list[str]()
    way = functools.partial(InParts, parts, binder)
    return GraphedExecutor(binder, found, Turns(driver), 4, lambda _, text: notes.append(text), way, code), driver, notes


def graphed(
    begin: int, end: int | None, lends: bool, code: ReplayCode | None = None
) -> tuple[GraphedExecutor, FakeDriver, list[str]]:
    parts = split(network(), begin, end, lends)
    return acted(network(), parts, on_the_cpu(traits(on_a_gpu(parts.captured))), code)


def on_a_gpu(part: Part) -> Part:
    return replace(part, plan=moved(part.plan, "cpu", "cuda:0"))


def moved(made: Plan, source: str, target: str) -> Plan:
    return Plan.from_json(made.to_json().replace(f'"{source}"', f'"{target}"'))


def on_a_cpu(parts: Parts) -> Parts:
    before, captured, after = (
        p and replace(p, plan=moved(p.plan, "cuda:0", "cpu")) for p in (parts.before, parts.captured, parts.after)
    )
    assert captured is not None
    return Parts(before, captured, after, parts.lent)


def on_the_cpu(found: Traits) -> Traits:
    return replace(found, device=CPU, steps=100)


@pytest.mark.parametrize("lends", [True, False])
@pytest.mark.parametrize(("begin", "end"), [(0, 6), (2, 8), (4, 7), (1, None), (0, RUNNING)])
def test_the_part_in_the_middle_is_replayed(begin: int, end: int | None, lends: bool) -> None:
    run, driver, notes = graphed(begin, end, lends)
    alike(run, bound(network()))
    assert driver.captures == 1 and sum(what == "replay" for what, _ in driver.log) == 3 and not notes


@pytest.mark.parametrize("lends", [True, False])
@pytest.mark.parametrize(("begin", "end"), [(0, 6), (2, 8), (1, None)])
def test_compiled_code_replays_it(begin: int, end: int | None, lends: bool, compiled_code: ReplayCode) -> None:
    run, driver, notes = graphed(begin, end, lends, compiled_code)
    alike(run, bound(network()))
    assert driver.captures == 1 and sum(what == "replay" for what, _ in driver.log) == 3 and not notes
    assert run._latest is not None and run._latest.play_within is not None and run._play is None


def alike(run: Any, plain: Executor, *more: torch.Tensor) -> None:
    """Assert that four calls of both do the same, one after another on one weight and one state."""
    _, weight, mine = given(0)
    theirs = mine.clone()
    torch.manual_seed(3)
    wanted = [plain([given(k)[0], weight, theirs, *more]) for k in range(4)]
    torch.manual_seed(3)
    calls = [[given(k)[0], weight, mine, *more] for k in range(4)]
    for inputs, got, want in zip(calls, [run(list(inputs)) for inputs in calls], wanted, strict=True):
        same(got, want, inputs)
    torch.testing.assert_close(mine, theirs)


def test_a_capture_that_fails_in_parts_ends_the_call_and_runs_the_whole_later() -> None:
    run, driver, notes = graphed(2, 8, True)
    driver.refusal = "no"
    weight, state = torch.randn(4, 4), torch.zeros(4, 4)
    for k in range(3):
        inputs = [given(k)[0], weight, state]
        torch.manual_seed(k)
        want = bound(network())([*inputs[:2], state.clone()])
        torch.manual_seed(k)
        same(run(list(inputs)), want, inputs)
    assert notes == ["not captured: no"] and driver.captures == 0


def test_a_call_inside_a_replay_in_parts() -> None:
    run, driver, _ = graphed(1, 7, True)
    state = torch.zeros(4, 4)
    weight = given(0)[1]
    for k in range(2):
        run([given(k)[0], weight, state])
    inner: list[Any] = []
    driver.during_replay = lambda: None if inner else inner.append(run([given(5)[0], weight, state.clone()]))
    torch.manual_seed(0)
    run([given(2)[0], weight, state])
    torch.manual_seed(0)
    bound(network())([given(2)[0], weight, state.clone()])
    (got,) = inner
    torch.testing.assert_close(got[2], bound(network())([given(5)[0], weight, state.clone()])[2])


@pytest.mark.parametrize("copies", ["cheap", "dear"])
@pytest.mark.parametrize("at", [*range(len(STEPS) + 1), None])
def test_whatever_is_chosen_does_what_the_whole_does(at: int | None, copies: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(capturable, "MIN_STEPS", 2)
    monkeypatch.setattr(capturable, "COPY_SHARE", float("inf"))
    if copies == "dear":
        monkeypatch.setattr(capturable, "COPY_BYTES_PER_SECOND", 1e6)
    obstacle = Call("aten::_local_scalar_dense.default", (Ref("one"),), {}, (None,))
    made = network(*([] if at is None else [obstacle]), at=at or 0)
    made = replace(made, inputs=(*made.inputs, tensor("one")))
    choice = choose(moved(made, "cpu", "cuda:0"))
    assert isinstance(choice, Choice)
    run, driver, notes = acted(made, on_a_cpu(choice.parts), on_the_cpu(traits(choice.parts.captured)))
    alike(run, bound(made), torch.ones(()))
    assert driver.captures == 1 and not notes


ROWS = [(), (1,), (5,), (RUNNING,), (2, 5), (1, 2, 3), (4, 6, RUNNING), tuple(range(1, RUNNING))]


@pytest.mark.parametrize("cuts", ROWS)
def test_a_row_of_parts_is_the_whole(cuts: tuple[int, ...]) -> None:
    parts = row(network(), cuts)
    assert len(parts) == len(cuts) + 1
    run = InPieces(bound(network()), [(bound(part.plan), part.takes) for part in parts])
    alike(run, bound(network()))
    inputs = given(0)
    run(inputs)
    assert not inputs, "the list is handed over"


def test_parts_between_which_a_value_dies_let_go_of_it() -> None:
    steps = [product("x", "w", "h0"), product("h0", "w", "h1"), product("h1", "w", "h2")]
    made = plan([tensor("x", 4, 4), tensor("w", 4, 4)], [buffer(f"h{k}", 4, 4) for k in range(3)], steps, [Ref("h2")])
    alive = list[Any]()
    held = list[list[bool]]()

    def watching(run: Executor) -> Any:
        def watched(inputs: list[Any]) -> tuple[Any, ...]:
            out = run(inputs)
            alive.extend(weakref.ref(x) for x in out)
            held.append([x() is not None for x in alive])
            return out

        return watched

    InPieces(bound(made), [(watching(bound(part.plan)), part.takes) for part in row(made, (1, 2))])(given(0)[:2])
    assert held == [[True], [False, True], [False, False, True]]


@pytest.mark.parametrize("cuts", [(1,), (2,), (1, 2), (3,)])
def test_parts_of_a_plan_with_symbolic_sizes(cuts: tuple[int, ...]) -> None:
    steps = [
        Call("aten::mm.default", (Ref("x"), Ref("w")), outputs=("h0",)),
        Call("aten::relu.default", (Ref("h0"),), outputs=("h1",)),
        Call("aten::new_zeros.default", (Ref("w"), [Size(S0)]), outputs=("h2",)),
    ]
    made = plan(
        [tensor("w", 4, 4), tensor("x", S0, 4)],
        [buffer("h0", S0, 4), buffer("h1", S0, 4), buffer("h2", S0)],
        steps,
        [Ref("h1"), Ref("h2"), Size(S0 + 1)],
        symbols=(SymbolSource("s0", 1),),
    )
    made = plan_memory(made)
    parts = row(made, cuts)
    run = InPieces(bound(made), [(bound(part.plan), part.takes) for part in parts])
    for n in (3, 7):
        x, w = torch.randn(n, 4), torch.randn(4, 4)
        got = run([w, x])
        torch.testing.assert_close(got, ((x @ w).relu(), torch.zeros(n), n + 1))
    assert [x.name for x in parts[-1].plan.inputs if x.name == "x"], "the size is told by an input that no step reads"


@pytest.mark.parametrize("copies", ["cheap", "dear"])
@pytest.mark.parametrize("places", [(0, 6), (3, 7), (2, 6, 9), (4, 9, 13), (0, 3, 7, 10, 13)])
def test_parts_of_a_row_are_replayed(places: tuple[int, ...], copies: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(capturable, "MIN_STEPS", 1)
    monkeypatch.setattr(capturable, "PIECE_STEPS", 2)
    monkeypatch.setattr(capturable, "COPY_SHARE", float("inf"))
    if copies == "dear":
        monkeypatch.setattr(capturable, "COPY_BYTES_PER_SECOND", 1e6)
    obstacle = Call("aten::_local_scalar_dense.default", (Ref("one"),), {}, (None,))
    made = network(obstacle, at=places[0], more=places[1:])
    made = replace(made, inputs=(*made.inputs, tensor("one")))
    choice = choose_pieces(moved(made, "cpu", "cuda:0"))
    assert isinstance(choice, Pieces)
    drivers = list[FakeDriver]()
    runs = list[tuple[Any, tuple[int, ...]]]()
    for piece in choice.pieces:
        part = replace(piece.part, plan=moved(piece.part.plan, "cuda:0", "cpu"))
        if piece.choice is None:
            runs.append((bound(part.plan), part.takes))
            continue
        found = on_the_cpu(traits(piece.choice.parts.captured))
        run, driver, notes = acted(part.plan, on_a_cpu(piece.choice.parts), found)
        drivers.append(driver)
        runs.append((run, part.takes))
        assert not notes
    assert len(drivers) >= 2
    alike(InPieces(bound(made), runs), bound(made), torch.ones(()))
    assert [driver.captures for driver in drivers] == [1] * len(drivers)
    steps = [len(Mentions(piece.part.plan).steps) for piece in choice.pieces if piece.choice is None]
    assert sum(steps) >= len(places), "obstacles run plainly"


def test_a_captured_part_holds_nothing_that_it_has_read() -> None:
    """What a backward reads last gives its memory to what is made next, though only a part of the plan is captured."""

    class Bound:
        def part(self, made: Plan) -> Any:
            def run(arguments: list[Any]) -> tuple[Any, ...]:
                places = [weakref.ref(x) for x in arguments]
                arguments.clear()
                return tuple(place() is None for place in places)

            return run

    executor: Any = Bound()
    way = InParts(split(replace(network(), outputs=(Ref("h6"),)), 0, 4, lends=True), executor)
    assert way.captured(given(0)) == (True, True, True)
    values = given(0)
    assert way.captured(way.handed(values)) == (True, False, True), "but for the weight, which is read again"
    assert [x is None for x in values] == [True, False, True]
