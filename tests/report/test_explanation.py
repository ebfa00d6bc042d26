"""fxopt.explain on models small enough to compile in seconds."""

from __future__ import annotations

import pytest
import torch

import fxopt
from fxopt.journal import RECENT, Journal
from fxopt.report.explanation import journals


def test_journals_are_those_of_the_block_only() -> None:
    RECENT.append(Journal("earlier"))
    with journals() as found:
        RECENT.append(Journal("inside"))
    RECENT.append(Journal("later"))
    assert [j.graph for j in found] == ["inside"]


def test_inference_names_the_graph_and_what_it_became() -> None:
    model = torch.nn.Sequential(torch.nn.Linear(8, 8), torch.nn.GELU(), torch.nn.LayerNorm(8)).eval()
    with torch.no_grad():
        explanation = fxopt.explain(model, torch.randn(4, 8))
    assert len(explanation.graphs) == 1
    assert explanation.graphs[0].graph.endswith("inference")
    assert explanation.kernels >= 1
    assert explanation.breaks == ()


def test_memory_of_the_plan_and_of_eager() -> None:
    """Eager holds two tensors at a time, and a plan without intermediate values its result alone; from the cache, too."""
    for _ in range(2):
        (journal,) = fxopt.explain(lambda x: x.exp().sin().cos(), torch.randn(1 << 18)).graphs
        assert journal.memory["peak"] == journal.memory["outputs"] == 1 << 20
        assert journal.memory["eager"] == 2 << 20


def test_training_compiles_the_backward_and_leaves_grad_alone() -> None:
    model = torch.nn.Sequential(torch.nn.Linear(8, 8), torch.nn.Tanh())
    explanation = fxopt.explain(model, torch.randn(4, 8))
    assert [g.graph.split()[-1] for g in explanation.graphs] == ["forward", "backward"]
    assert all(p.grad is None for p in model.parameters())


def test_a_graph_break_is_named_with_its_place() -> None:
    def broken(x: torch.Tensor) -> torch.Tensor:
        y = torch.sin(x)
        torch._dynamo.graph_break()
        return torch.cos(y)

    explanation = fxopt.explain(broken, torch.randn(5))
    assert len(explanation.graphs) == 2
    assert len(explanation.breaks) == 1
    assert "graph_break" in explanation.breaks[0]


def test_an_error_of_the_model_is_raised_as_it_is() -> None:
    with pytest.raises(RuntimeError, match=r"shape|size|mat1"):
        fxopt.explain(lambda a, b: a @ b, torch.randn(2, 3), torch.randn(2, 3))


def test_breaks_that_leave_no_graph_before_them_are_named_too() -> None:
    def talkative(x: torch.Tensor) -> torch.Tensor:
        print("hello")
        return x.sin()

    explanation = fxopt.explain(talkative, torch.randn(3))
    assert len(explanation.graphs) == 1
    assert len(explanation.breaks) == 1
    assert fxopt.explain(torch.sin, torch.randn(3)).breaks == ()


def test_what_cannot_be_called_is_refused() -> None:
    with pytest.raises(TypeError, match="takes a module or function and its arguments, not 'int'"):
        fxopt.explain(3, torch.randn(3))  # type: ignore[arg-type]
