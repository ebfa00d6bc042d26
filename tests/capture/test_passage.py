"""Replays go around AOTAutograd's wrappers where those do nothing, and only there; CUDA graphs are acted out on the CPU."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn

from fxopt import compiler, plan_cache
from fxopt.capture import passage
from fxopt.capture.passage import Passage
from fxopt.codegen.replay_build import ReplayCode
from fxopt.ir.graph import Phase
from fxopt.runtime import capturable
from fxopt.runtime.artifacts import ArtifactStore
from fxopt.runtime.cuda_graph import GraphedExecutor, Turns
from tests.runtime.fake_graphs import FakeDriver, Function

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def code(tmp_path_factory: pytest.TempPathFactory) -> ReplayCode:
    made = ReplayCode(ArtifactStore(tmp_path_factory.mktemp("replays") / "cache"))
    assert made.wait() is not None, made.reason
    return made


class Stage:
    """`passed` counts the calls that went through AOTAutograd's wrappers, `made` are the executors with graphs."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, code: ReplayCode) -> None:
        self.made: list[GraphedExecutor] = []
        self.passed = 0
        usual = Passage.__call__

        def counted(called: Passage, inputs: list[Any]) -> Any:
            self.passed += 1
            return usual(called, inputs)

        def with_graphs(executor: Any, phase: Phase, options: Any, journal: Any, extension: Any) -> Any:
            assert phase is Phase.INFERENCE and isinstance(extension, ReplayCode)
            found = replace(capturable.traits(capturable.whole(executor.plan).captured), device=CPU, steps=1 << 20)
            function = Function(lambda *values: executor(list(values)))
            function.plan, function.kept_as = executor.plan, executor.kept_as
            turns = Turns(FakeDriver(function, found.seeds))
            self.made.append(GraphedExecutor(function, found, turns, 4, lambda *note: None, extension=code))  # type: ignore[arg-type]
            return self.made[-1]

        monkeypatch.setattr(Passage, "__call__", counted)
        monkeypatch.setattr(compiler, "with_graphs", with_graphs)
        monkeypatch.setattr(plan_cache, "with_graphs", with_graphs)
        monkeypatch.setattr(capturable, "gpu", lambda plan: CPU)

    @property
    def replays(self) -> int:
        return sum(executor._replays for executor in self.made)


@pytest.fixture
def stage(monkeypatch: pytest.MonkeyPatch, code: ReplayCode) -> Iterator[Stage]:
    torch.compiler.reset()
    with torch.no_grad():
        yield Stage(monkeypatch, code)
    torch.compiler.reset()


def compiled(fn: Any, **settings: Any) -> Callable[..., Any]:
    return torch.compile(fn, backend="fxopt", **settings)


def network() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(8, 8), nn.GELU(), nn.LayerNorm(8)).eval()


def test_replays_go_around_in_a_cold_and_in_a_warm_start(stage: Stage) -> None:
    model = network()
    for start in ("cold", "warm"):
        torch.compiler.reset()
        run, before, replayed = compiled(model), stage.passed, stage.replays
        inputs = [torch.randn(4, 8) for _ in range(6)]
        kept = [run(x) for x in inputs]
        torch.testing.assert_close(kept, [model(x) for x in inputs])
        assert (stage.passed - before, stage.replays - replayed) == (2, 5), start


def test_weights_that_move_or_change_on_the_way_around(stage: Stage) -> None:
    model, x = network(), torch.randn(4, 8)
    run = compiled(model)
    for change in (lambda p: p, lambda p: p.mul_(2), lambda p: setattr(p, "data", p.data * 0.5)):
        for p in model.parameters():
            change(p)
        for _ in range(4):
            torch.testing.assert_close(run(x), model(x))
    assert stage.replays == 10, "only a call with weights in a new place is none"


def test_numbers_and_sizes_that_vary(stage: Stage) -> None:
    def fn(x: torch.Tensor) -> torch.Tensor:
        return (torch.relu(x) * x.shape[0]).sum()

    run = compiled(fn, dynamic=True)
    for n in (3, 4, 3, 4, 3, 3, 4, 4, 3):
        x = torch.randn(n, 5)
        torch.testing.assert_close(run(x), fn(x))
    assert (stage.replays, stage.passed) == (7, 7), "that of the call before is looked at first"


class Counting(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.seen = nn.Buffer(torch.zeros(4))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.seen.add_(x)
        return self.seen * 2


def test_what_is_written_is_counted_in_its_version(stage: Stage) -> None:
    model, want = Counting(), torch.zeros(4)
    run = compiled(model)
    for k in range(6):
        before = model.seen._version
        want += k
        torch.testing.assert_close(run(torch.full((4,), float(k))), want * 2)
        torch.testing.assert_close(model.seen, want)
        assert model.seen._version > before
    assert stage.replays == 5 and stage.passed == 2


@pytest.mark.parametrize(
    "fn",
    [lambda x: (x.relu(), x.view(-1)), lambda x: (x.relu(), x), lambda x: (x.relu()[1:], x.relu()[0])],
    ids=["view of an input", "an input", "views"],
)
def test_wrappers_that_make_views_are_not_left_out(stage: Stage, fn: Callable[..., Any]) -> None:
    run = compiled(fn)
    for _ in range(5):
        x = torch.randn(3, 4)
        got, want = run(x), fn(x)
        torch.testing.assert_close(got, want)
        assert [y is x for y in got] == [y is x for y in want]
        assert [y._base is x for y in got] == [y._base is x for y in want]


@pytest.mark.parametrize(
    ("fact", "value"),
    [
        ("num_mutated_inp_runtime_indices", 1),
        ("num_outputs_aliased", 1),
        ("num_intermediate_bases", 1),
        ("dynamic_outputs", True),
        ("tokens", {"print": None}),
        ("is_rng_op_functionalized", True),
        ("grad_enabled_mutation", False),
        ("mutated_graph_handled_indices_seen_by_autograd", [1, 2]),
    ],
)
def test_what_wrappers_have_to_do(fact: str, value: Any) -> None:
    idle = SimpleNamespace(
        num_mutated_inp_runtime_indices=0,
        num_outputs_aliased=0,
        num_intermediate_bases=0,
        dynamic_outputs=False,
        tokens={},
        is_rng_op_functionalized=False,
        grad_enabled_mutation=None,
        mutated_graph_handled_indices_seen_by_autograd=[1],
    )
    run = SimpleNamespace(replayed=lambda inputs: (7,), written=(1,))
    assert Passage(run, idle).replayed is run.replayed  # type: ignore[arg-type]
    assert Passage(run, SimpleNamespace(**{**vars(idle), fact: value})).replayed is None  # type: ignore[arg-type]
    assert Passage(run, None).replayed is None  # type: ignore[arg-type]


def test_wrappers_that_hand_on_something_else_are_not_left_out(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(passage, "_wrappers_do_nothing", lambda *facts: True)
    for change, want in ((lambda x: x, "replayed"), (lambda x: [*x, 1], "run"), (lambda x: x[::-1], "run")):

        class Run:
            def replayed(self, inputs: tuple[Any, ...]) -> tuple[Any, ...]:
                return ("replayed",)

            def __call__(self, inputs: list[Any]) -> tuple[Any, ...]:
                return ("run",)

        inner = Passage(Run(), object())
        call = inner.around(lambda *args, change=change, inner=inner: inner(change(list(args))))
        assert [call("a", "b")[0] for _ in range(3)] == ["run", want, want]


def test_inputs_in_lists(stage: Stage) -> None:
    run = compiled(lambda xs: xs[0] * 2 + xs[1])
    for _ in range(4):
        xs = [torch.randn(4), torch.randn(4)]
        torch.testing.assert_close(run(xs), xs[0] * 2 + xs[1])
    assert stage.replays == 3
