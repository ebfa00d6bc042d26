"""Duplicates are removed from joint graphs as torch removes them, and logs are printed only for those who read them."""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import fx, nn
from torch._functorch import compile_utils, partitioners
from torch._functorch._aot_autograd import graph_compile
from torch._logging._internal import trace_log
from torch.fx.experimental.proxy_tensor import make_fx

from fxopt.backend import compile_dynamo_graph
from fxopt.capture import joint_graph
from fxopt.capture.joint_graph import remove_duplicates, without_unread_logs
from fxopt.options import Options


def traced(function: Callable[..., Any], *inputs: torch.Tensor) -> fx.GraphModule:
    return make_fx(function, tracing_mode="fake")(*inputs)


def twice(x: torch.Tensor, y: torch.Tensor) -> list[torch.Tensor]:
    return [(x.sin() + y.cos()) * x.sin().sum(), y.cos().max(0)[0] + y.cos().max(0)[1]]


def literals(x: torch.Tensor, y: torch.Tensor) -> list[torch.Tensor]:
    return [torch.add(x, 1).exp() + torch.add(x, 1.0).exp() + torch.add(x, True).exp() + torch.add(x, 1).log()]


def written_between(x: torch.Tensor, y: torch.Tensor) -> list[torch.Tensor]:
    before = x.sin() * 2
    x.add_(1)
    return [before + x.sin() * 3 + x.sin() * 4]


def random_twice(x: torch.Tensor, y: torch.Tensor) -> list[torch.Tensor]:
    return [torch.rand_like(x) + torch.rand_like(x) + torch.bernoulli(y.sigmoid()) * torch.bernoulli(y.sigmoid())]


def equal_results(x: torch.Tensor, y: torch.Tensor) -> list[torch.Tensor]:
    return [x.sin(), x.sin(), x.view(6), x.view(6) * 2]


@pytest.mark.parametrize("function", [twice, literals, written_between, random_twice, equal_results])
def test_as_torch_removes_them(function: Callable[..., Any]) -> None:
    inputs = torch.randn(2, 3), torch.randn(2, 3)
    expected = compile_utils.fx_graph_cse(traced(function, *inputs).graph)
    found = remove_duplicates(traced(function, *inputs).graph)
    found.lint()
    assert [str(n.target) for n in found.nodes] == [str(n.target) for n in expected.nodes]
    for seen, wanted in zip(found.nodes, expected.nodes, strict=True):
        assert str(seen.args) == str(wanted.args)


def test_what_it_does_not_know_is_left_to_torch(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[fx.Graph] = []
    monkeypatch.setattr(compile_utils, "fx_graph_cse", lambda graph: asked.append(graph) or graph)
    gm = traced(twice, torch.randn(2, 3), torch.randn(2, 3))
    remove_duplicates(gm.graph)
    assert not asked
    with gm.graph.inserting_before(gm.graph.output_node()):
        gm.graph.call_function(len, ([],))
    remove_duplicates(gm.graph)
    assert asked == [gm.graph]


def train(model: nn.Module) -> None:
    torch.compiler.reset()

    def compile_graph(*_: Any) -> Any:
        raise NotImplementedError  # the graph runs as it is

    compiled = torch.compile(model, backend=lambda gm, inputs: compile_dynamo_graph(gm, inputs, Options(), compile_graph))
    compiled(torch.randn(2, 3)).sum().backward()


def nobody_listens(monkeypatch: pytest.MonkeyPatch) -> None:
    """pytest's own handlers listen to structured traces while a test runs."""
    monkeypatch.setattr(trace_log, "handlers", [h for h in trace_log.handlers if hasattr(h, "root_dir")])


def test_the_partitioner_gets_it_and_prints_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    nobody_listens(monkeypatch)
    printed: list[fx.GraphModule] = []
    original = fx.GraphModule.print_readable
    monkeypatch.setattr(fx.GraphModule, "print_readable", lambda gm, *a, **k: printed.append(gm) or original(gm, *a, **k))
    graphs: list[fx.Graph] = []
    monkeypatch.setattr(joint_graph, "_sharing_memory_with_results", lambda graph: graphs.append(graph) or set())
    train(nn.Linear(3, 3))
    assert len(graphs) == 1
    assert not printed
    assert partitioners.fx_graph_cse is compile_utils.fx_graph_cse


def test_logs_that_are_read_are_written(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    nobody_listens(monkeypatch)
    untouched = graph_compile._log_joint_graph
    with without_unread_logs():
        assert graph_compile._log_joint_graph is not untouched
        assert graph_compile._log_joint_graph("any", config=1) is None
    assert graph_compile._log_joint_graph is untouched
    with caplog.at_level(logging.INFO, graph_compile.aot_joint_log.name), without_unread_logs():
        assert graph_compile._log_joint_graph is untouched
    monkeypatch.setattr(trace_log, "handlers", [logging.NullHandler()])
    with without_unread_logs():
        assert graph_compile._log_joint_graph is untouched


class Averaged(nn.Module):
    """Its result is computed with a running average that it has updated, as `update` does."""

    def __init__(self, update: Callable[[torch.Tensor, torch.Tensor], torch.Tensor]) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.up, self.down, self.update = nn.Linear(8, 16), nn.Linear(16, 8), update
        self.register_buffer("average", torch.linspace(0.5, 1.0, 16))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.up(x).tanh()
        out: torch.Tensor = self.down(x * self.update(self.average, x.detach().mean(0)))
        return out


def updated(average: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
    return average.mul_(0.9).add_(x * 0.1)


def before_it_is_updated(average: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
    factor = average.view(4, 4).t().reshape(-1) * 3
    average.lerp_(x, 0.1)
    return factor


def as_it_was(average: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
    factor = average.clone()
    average.lerp_(x, 0.1)
    return factor


@pytest.mark.parametrize("update", [updated, before_it_is_updated, as_it_was])
def test_the_backward_computes_nothing_of_inputs_that_have_changed(update: Any) -> None:
    torch.compiler.reset()
    models = [Averaged(update) for _ in range(2)]
    run = torch.compile(models[0], backend="fxopt", options={"strict": True})
    for k in range(2):
        x = torch.randn(4, 8, generator=torch.Generator().manual_seed(k))
        for f in (run, models[1]):
            f(x).pow(2).sum().backward()
        torch.testing.assert_close(*([p.grad for p in model.parameters()] for model in models))
        torch.testing.assert_close(models[0].average, models[1].average)
