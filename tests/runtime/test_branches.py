"""Steps beside others: where branches are found, that plans with them do what they did, and which captured run is kept."""

from __future__ import annotations

from collections.abc import Mapping
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from fxopt.ir.kernel import Artifact
from fxopt.ir.region import Call, Ref
from fxopt.runtime import branch_contest
from fxopt.runtime.branch_contest import BranchContest
from fxopt.runtime.branches import branched
from fxopt.runtime.capturable import Traits
from fxopt.runtime.executor import Executor
from fxopt.runtime.memory import plan_memory
from fxopt.runtime.plan import Launch, Plan
from tests.runtime.plans import buffer, increment, launch, plan, tensor

N = 8


def step(source: str, target: str) -> Launch:
    return increment(source, target, N)


def join(a: str, b: str, target: str) -> Launch:
    """target = 2 * a + b"""
    return launch("axpy", a, b, target, sizes=(N,))


def call(op: str, argument: Any) -> Call:
    """s = op(x, argument)"""
    return Call(op, (Ref("x"), argument), outputs=("s",))


def network(steps: list[Any], result: str) -> Plan:
    names = dict.fromkeys(n for s in steps for n in (s.writes if isinstance(s, Launch) else s.outputs))
    return plan([tensor("x", N)], [buffer(n, N) for n in names], steps, [Ref(result)])


BLOCK = [step("x", "a"), step("a", "b"), step("b", "c"), step("x", "s"), join("c", "s", "out")]
"""A shortcut of one step beside three, after them in the plan."""


def told(made: Plan | None) -> list[str]:
    """Targets of launches, and names of local ops."""
    assert made is not None
    running = [s for s in made.steps if isinstance(s, Launch | Call)]
    return [s.buffers[-1] if isinstance(s, Launch) else s.op.removeprefix("local:") for s in running]


def test_a_shortcut_is_a_branch_from_the_blocks_input_on() -> None:
    assert told(branched(network(BLOCK, "out"))) == ["fork", "s", "back", "a", "b", "c", "join", "out"]


def test_what_a_branch_touches_shares_its_memory_with_nothing() -> None:
    steps = [
        step("x", "e"),
        step("e", "a"),
        step("a", "b"),
        step("b", "c"),
        step("e", "t"),
        step("t", "s"),
        join("c", "s", "o"),
    ]
    made = branched(network([*steps, step("o", "out")], "out"))
    assert told(made) == ["e", "fork", "t", "s", "back", "a", "b", "c", "join", "o", "out"]
    assert made is not None and {"e", "t", "s"}.isdisjoint(made.placement)


def test_blocks_one_after_another() -> None:
    second = [step("out", "d"), step("d", "e"), step("out", "r"), join("r", "e", "last")]
    got = told(branched(network([*BLOCK, *second], "last")))
    assert got == ["fork", "s", "back", "a", "b", "c", "join", "out", "fork", "r", "back", "d", "e", "join", "last"]


@pytest.mark.parametrize(
    "steps",
    [
        [step("x", "a"), step("a", "b"), join("b", "x", "out")],
        [step("x", "a"), step("x", "s"), join("a", "s", "out")],
        [step("x", "s"), step("s", "a"), step("a", "b"), join("b", "s", "out")],
        [step("x", "a"), step("a", "b"), step("x", "s"), join("s", "a", "u"), join("b", "s", "v"), join("u", "v", "out")],
        [
            step("x", "a"),
            step("a", "b"),
            Call("aten::mm.default", (Ref("x"), Ref("x")), outputs=("s",)),
            join("b", "s", "out"),
        ],
        [step("x", "a"), step("a", "b"), Call("aten::view.default", (Ref("x"), [N]), outputs=("s",)), join("b", "s", "out")],
    ],
    ids=["nothing", "one beside one", "in a row", "read by another", "cuBLAS", "a view"],
)
def test_no_branches(steps: list[Any]) -> None:
    assert branched(network(steps, "out")) is None


def test_a_branch_waits_for_who_reads_what_it_writes() -> None:
    """`s` is written a second time, in the branch, after `b` has read it."""
    steps = [step("x", "s"), step("x", "a"), join("a", "s", "b"), step("b", "c"), step("c", "d"), step("x", "s")]
    made = branched(network([*steps, join("d", "s", "out")], "out"))
    assert told(made) == ["s", "a", "b", "fork", "s", "back", "c", "d", "join", "out"]


@pytest.mark.parametrize("steps", [BLOCK, [*BLOCK[3:4], *BLOCK[:3], *BLOCK[4:]]])
def test_the_values_are_those_in_a_row(steps: list[Any], kernels: Mapping[str, Artifact]) -> None:
    log: list[str] = []
    made = network(steps, "out")
    whole = Executor(Plan.from_json(plan_memory(made).to_json()), kernels)
    ops = {name: lambda *args, name=name: log.append(name) for name in ("fork", "back", "join")}
    with_branches = branched(made)
    assert with_branches is not None
    x = torch.randn(N)
    torch.testing.assert_close(whole.part(with_branches, ops)([x]), whole([x]), rtol=0, atol=0)
    assert log == ["fork", "back", "join"]


class Run:
    """A captured run with results and a time. All of them share memory: the inputs that lie there are those of the last
    one played, until another one is."""

    signature = ()
    has_inputs: Run | None = None

    def __init__(self, value: float, us: float) -> None:
        self.value, self.us, self.replays = value, us, 0

    def play(self, inputs: list[Any], stream: int) -> tuple[Any, ...]:
        Run.has_inputs = self
        inputs.clear()
        return torch.tensor([self.value, float("nan")]), 3

    def replay_alone(self, stream: int) -> None:
        assert Run.has_inputs is self, "its inputs are not there"
        self.replays += 1


class Device:
    def __init__(self, runs: list[Run]) -> None:
        self.runs = runs

    def side_stream(self) -> Any:
        return SimpleNamespace(ops=dict)

    def stream(self) -> int:
        return 7

    def microseconds(self, work: Any) -> float:
        before = [run.replays for run in self.runs]
        work()
        return sum(run.us * (run.replays - n) for run, n in zip(self.runs, before, strict=True))


def contest(row: Run, beside: Run | Exception, monkeypatch: pytest.MonkeyPatch, **facts: Any) -> tuple[Run, list[str]]:
    """Which run is kept in two captures, and what is said."""
    captured: list[Any] = []

    def record(*args: Any) -> Run:
        captured.append(args)
        if isinstance(beside, Exception):
            raise beside
        return beside

    monkeypatch.setattr(branch_contest, "record", record)
    notes: list[str] = []
    executor = SimpleNamespace(plan=network(BLOCK, "out"), part=lambda *args: None)
    known: dict[str, Any] = {"written": (), "seeds": 0} | facts
    traits = Traits(torch.device("cpu"), moved=(0,), fixed=(), varying=(), steps=5, **known)
    made = BranchContest(executor, traits, notes.append)  # type: ignore[arg-type]
    device = Device([row, *([beside] if isinstance(beside, Run) else [])])
    kept: Any = made.faster(row, [None], device)  # type: ignore[arg-type]
    again: Any = made.faster(row, [None], device)  # type: ignore[arg-type]
    assert again is kept and len(captured) == (2 if kept is beside else len(notes)), "who lost is not captured again"
    return kept, notes


def test_the_faster_run_is_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    row, beside = Run(1.0, 10.0), Run(1.0, 8.0)
    kept, notes = contest(row, beside, monkeypatch)
    assert kept is beside and notes[0] == "with branches on a second stream a replay takes 8.0 us, in a row 10.0"
    row = Run(1.0, 10.0)
    assert contest(row, Run(1.0, 9.95), monkeypatch)[0] is row


def test_a_run_with_other_results_or_that_fails_is_not_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    row = Run(1.0, 10.0)
    assert contest(row, Run(1.5, 1.0), monkeypatch) == (row, ["no branches on a second stream: its results differ"])
    kept, notes = contest(row, RuntimeError("no memory\nat all"), monkeypatch)
    assert kept is row and notes == ["no branches on a second stream: no memory"]


@pytest.mark.parametrize("facts", [{"written": (0,)}, {"seeds": 1}, {"draws": True}])
def test_what_cannot_be_done_twice_is_not_tried(facts: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    row = Run(1.0, 10.0)
    assert contest(row, Run(1.0, 1.0), monkeypatch, **facts) == (row, [])
