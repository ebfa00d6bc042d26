"""The tour's own decisions: what is said of modes, what happens to kernels that cannot be built or do not load."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch.fx.experimental.proxy_tensor import make_fx

from fxopt import compiler, tune
from fxopt.errors import CacheError, RetreatError
from fxopt.ir.graph import Graph, Input, Phase, Role
from fxopt.ir.region import Call, Region
from fxopt.journal import RECENT, Journal
from fxopt.lower import Lowered, batching
from fxopt.options import Options

pytestmark = pytest.mark.usefixtures("fresh_cache")  # no plan of an earlier test is loaded instead
OPTIONS = Options.parse(None, None)


def network(x: torch.Tensor, w: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    h = torch.mm(torch.tanh(x) + 1, w)
    return torch.softmax(h, -1), h.sum(0)


def arguments() -> list[torch.Tensor]:
    return [torch.randn(6, 8), torch.randn(8, 10)]


def graph_of(fn: Any, args: list[torch.Tensor]) -> Graph:
    gm = make_fx(fn, tracing_mode="fake")(*args)
    inputs = [Input(n.name, Role.USER) for n in gm.graph.nodes if n.op == "placeholder"]
    return Graph(gm, inputs, Phase.INFERENCE, "test")


def compile_and_run(journal: Journal) -> None:
    """The values of `network`, and an emptied list of inputs, whatever was built."""
    args = arguments()
    run = compiler.compile_graph(graph_of(network, args), args, OPTIONS, journal)
    given = list(args)
    torch.testing.assert_close(tuple(run(given)), network(*args))
    assert given == []


def breaking(monkeypatch: pytest.MonkeyPatch, is_broken: Any) -> list[Lowered]:
    """Make `tune.choose` fail for regions that `is_broken`; the lowerings that it was given."""
    real, seen = tune.choose, []

    def choose(lowered: Lowered, *rest: Any) -> tuple[Lowered, dict[str, tune.Choice], list[tuple[Region, str]]]:
        seen.append(lowered)
        lowered, chosen, failed = real(lowered, *rest)
        regions = [s for s in lowered.steps if isinstance(s, Region)]
        return lowered, chosen, [*failed, *((r, "broken on purpose") for r in regions if is_broken(r))]

    monkeypatch.setattr(compiler.tune, "choose", choose)
    return seen


def has_tanh(region: Region) -> bool:
    return any("tanh" in node for node in region.nodes)


def test_what_is_built_is_noted() -> None:
    journal = Journal("test", strict=True)
    compile_and_run(journal)
    assert journal.retreats == []
    assert journal.kernels
    assert [op for op, _ in journal.library] == ["aten::mm.default"]
    assert {"passes", "lowering", "scheduling", "kernels", "assemble"} <= journal.seconds.keys()


def test_a_kernel_that_fails_leaves_its_nodes_to_the_library(monkeypatch: pytest.MonkeyPatch) -> None:
    seen = breaking(monkeypatch, has_tanh)
    journal = Journal("test")
    compile_and_run(journal)
    calls = {s.op for s in seen[-1].steps if isinstance(s, Call)}
    assert len(seen) == 2
    assert "aten::tanh.default" in calls
    assert journal.kernels, "the others are still generated"
    assert any("tanh" in what and reason == "broken on purpose" for what, reason in journal.retreats)


def test_when_every_kernel_fails_the_whole_graph_runs_as_library_calls(monkeypatch: pytest.MonkeyPatch) -> None:
    breaking(monkeypatch, lambda region: True)
    journal = Journal("test")
    compile_and_run(journal)
    assert journal.kernels == []
    assert len(journal.library) >= 4


def test_a_retreat_that_does_not_end_gives_up_on_the_graph_s_kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    breaking(monkeypatch, has_tanh)
    monkeypatch.setattr(compiler, "MAX_ATTEMPTS", 1)
    journal = Journal("test")
    compile_and_run(journal)
    assert journal.kernels == []
    assert ("the whole graph", "kernels still failed to build after 1 attempts") in journal.retreats


def test_strict_names_what_would_have_fallen_back(monkeypatch: pytest.MonkeyPatch) -> None:
    breaking(monkeypatch, has_tanh)
    with pytest.raises(RetreatError, match=r"tanh.*broken on purpose.*strict=True"):
        compile_and_run(Journal("test", strict=True))


def test_a_batch_without_a_kernel_is_its_regions_again(monkeypatch: pytest.MonkeyPatch) -> None:
    """There are no batched kernels for CPUs, so saying that there are makes one fail."""
    monkeypatch.setattr(batching, "BATCHED_DEVICES", ("cpu",))
    args = [torch.randn(k + 1) for k in range(10)]

    def many(*xs: torch.Tensor) -> tuple[torch.Tensor, ...]:
        return tuple(x.sin() * 2 for x in xs)

    journal = Journal("test", strict=True)
    run = compiler.compile_graph(graph_of(many, args), args, OPTIONS, journal)
    torch.testing.assert_close(tuple(run(list(args))), many(*args))
    assert journal.retreats == [] and journal.kernels and journal.library == []
    assert journal.provisional, "the next process may do better"
    ((topic, said),) = journal.notes
    assert topic == "batching" and "10 regions" in said and "Triton" in said

    plain = Journal("test", strict=True)
    compiler.compile_graph(graph_of(many, args), args, Options.parse(None, {"disable": ["batching"]}), plain)
    assert not plain.notes and not plain.provisional


def test_kernels_that_never_load_are_tried_twice_and_the_graph_runs_as_it_was(
    monkeypatch: pytest.MonkeyPatch, fresh_cache: object
) -> None:
    attempts = []

    def refuse(*args: object) -> None:
        attempts.append(args)
        raise CacheError("cannot load kernel k: wrong machine")

    monkeypatch.setattr(compiler, "Executor", refuse)
    torch.compiler.reset()
    RECENT.clear()
    x = torch.randn(4)
    with pytest.warns(UserWarning, match="does not load: cannot load kernel k: wrong machine"):
        got = torch.compile(lambda x: x.sin() + 1, backend="fxopt")(x)
    torch.testing.assert_close(got, x.sin() + 1)
    assert len(attempts) == 2
    assert [what for j in RECENT for what, _ in j.retreats] == ["the whole graph"]
