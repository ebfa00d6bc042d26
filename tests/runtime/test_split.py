"""Plans in parts do what the whole does, wherever they are cut, and with the part in the middle replayed."""

from __future__ import annotations

import functools
from dataclasses import replace
from typing import Any

import pytest
import torch

from fxopt.ir.graph import Role
from fxopt.ir.region import Alias, Call, Ref
from fxopt.runtime import capturable
from fxopt.runtime.capturable import Choice, Traits, choose, traits
from fxopt.runtime.cuda_graph import GraphedExecutor, Turns
from fxopt.runtime.executor import Executor
from fxopt.runtime.in_parts import InParts
from fxopt.runtime.memory import plan_memory
from fxopt.runtime.plan import Plan
from fxopt.runtime.split import Part, Parts, split
from tests.runtime.fake_graphs import FakeDriver, Function
from tests.runtime.plans import CPU, buffer, plan, tensor


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


def network(*obstacle: Call, at: int = 0) -> Plan:
    """With an obstacle before step `at`."""
    inputs = [tensor("x", 4, 4), tensor("w", 4, 4, role=Role.PARAMETER), tensor("state", 4, 4, role=Role.STATE)]
    buffers = [*(buffer(f"h{k}", *((1, 4) if k == 3 else (4, 4))) for k in range(7)), buffer("s", dtype=torch.int64)]
    buffers += [buffer("turned", 4, 4, strides=(1, 4)), buffer("row", 1, 4), buffer("noise", 4, 4)]
    return plan_memory(plan(inputs, buffers, [*STEPS[:at], *obstacle, *STEPS[at:]], OUTPUTS))


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


def acted(made: Plan, parts: Parts, found: Traits) -> tuple[GraphedExecutor, FakeDriver, list[str]]:
    driver = FakeDriver(Function(lambda: ()), found.seeds)
    binder: Any = Binder(made, parts, driver)
    notes = list[str]()
    way = functools.partial(InParts, parts, binder)
    return GraphedExecutor(binder, found, Turns(driver), 4, lambda _, text: notes.append(text), way), driver, notes


def graphed(begin: int, end: int | None, lends: bool) -> tuple[GraphedExecutor, FakeDriver, list[str]]:
    parts = split(network(), begin, end, lends)
    return acted(network(), parts, on_the_cpu(traits(on_a_gpu(parts.captured))))


def on_a_gpu(part: Part) -> Part:
    return Part(moved(part.plan, "cpu", "cuda:0"), part.takes)


def moved(made: Plan, source: str, target: str) -> Plan:
    return Plan.from_json(made.to_json().replace(f'"{source}"', f'"{target}"'))


def on_the_cpu(found: Traits) -> Traits:
    return replace(found, device=CPU, steps=100)


@pytest.mark.parametrize("lends", [True, False])
@pytest.mark.parametrize(("begin", "end"), [(0, 6), (2, 8), (4, 7), (1, None), (0, RUNNING)])
def test_the_part_in_the_middle_is_replayed(begin: int, end: int | None, lends: bool) -> None:
    run, driver, notes = graphed(begin, end, lends)
    alike(run, bound(network()))
    assert driver.captures == 1 and sum(what == "replay" for what, _ in driver.log) == 3 and not notes


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
    found = choice.parts
    before, captured, after = (
        p and Part(moved(p.plan, "cuda:0", "cpu"), p.takes) for p in (found.before, found.captured, found.after)
    )
    assert captured is not None
    run, driver, notes = acted(made, Parts(before, captured, after, found.lent), on_the_cpu(traits(found.captured)))
    alike(run, bound(made), torch.ones(()))
    assert driver.captures == 1 and not notes
