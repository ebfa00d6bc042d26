"""What is computed at compile time, what deliberately is not, and that outputs stay fresh."""

from __future__ import annotations

import torch

from fxopt.ir.graph import Role
from tests.passes.graphs import assert_identical, calls, capture, execute, optimize


def test_a_mask_that_is_true_everywhere_disappears() -> None:
    def function(x: torch.Tensor) -> torch.Tensor:
        mask = torch.arange(8)[None, :] >= torch.zeros(8, dtype=torch.int64)[:, None]
        return torch.where(mask, x, -float("inf")).exp()

    args = (torch.randn(8, 8),)
    graph, context = optimize(function, args)
    assert calls(graph) == ["exp"]
    assert any(r.rule == "constant_folding.uniform" for r in context.log)
    assert_identical(graph, function, args)


def test_a_causal_mask_stays_arithmetic() -> None:
    graph, _ = optimize(lambda x: x.masked_fill(torch.arange(8)[None] > torch.arange(8)[:, None], 0.0), (torch.randn(8, 8),))
    assert "arange" in calls(graph)
    assert len(graph.inputs) == 1


def test_values_from_frozen_inputs_become_constants() -> None:
    def function(x: torch.Tensor, w: torch.Tensor, s: torch.Tensor) -> torch.Tensor:
        return x @ (w * s[:, None]).t()

    args = (torch.randn(4, 6), torch.randn(5, 6), torch.randn(5))
    graph, _ = optimize(function, args, frozen=(1, 2))
    assert [i.role for i in graph.inputs] == [Role.USER, Role.CONSTANT, Role.CONSTANT, Role.CONSTANT]
    assert calls(graph) == ["permute", "mm"]
    folded = graph.inputs[3].value
    assert folded is not None
    assert torch.equal(folded, args[1] * args[2][:, None])
    assert torch.equal(execute(graph, args)[0], function(*args))


def test_a_view_of_a_frozen_input_is_not_copied() -> None:
    graph, _ = optimize(lambda x, w: x @ w.t(), (torch.randn(4, 6), torch.randn(5, 6)), frozen=(1,))
    assert len(graph.inputs) == 2


def test_a_folded_value_that_would_grow_too_much_is_computed_at_run_time() -> None:
    graph, _ = optimize(lambda x, w: x + w.repeat(1024, 1024), (torch.randn(1024, 1024), torch.randn(1, 1)), frozen=(1,))
    assert "repeat" in calls(graph)
    assert len(graph.inputs) == 2


def test_a_folded_output_is_fresh_at_every_call() -> None:
    args = (torch.randn(3), torch.randn(3))
    graph, _ = optimize(lambda x, w: (x + w, w * 2, torch.cumsum(torch.ones(3), 0)), args, frozen=(1,))
    first, second = execute(graph, args), execute(graph, args)
    assert all(a.data_ptr() != b.data_ptr() for a, b in zip(first, second, strict=True))


def test_small_values_that_need_more_than_a_loop_are_embedded() -> None:
    def function(x: torch.Tensor) -> torch.Tensor:
        return x * torch.cumsum(torch.arange(16), 0).float().sqrt()

    args = (torch.randn(16),)
    graph, _ = optimize(function, args)
    assert "cumsum" not in calls(graph)
    assert torch.equal(execute(graph, args)[0], function(*args))


def test_negative_zero_and_nan_are_kept() -> None:
    def function(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        mixed = torch.where(torch.arange(4) > 1, -torch.zeros(4), torch.zeros(4))
        return torch.copysign(x, mixed), torch.full((4,), float("nan")).sqrt() + x

    args = (torch.randn(4),)
    graph, _ = optimize(function, args)
    assert_identical(graph, function, args)


def test_random_values_are_not_constants() -> None:
    graph, _ = optimize(lambda x: x + torch.randn(4).cumsum(0), (torch.randn(4),))
    assert "randn" in calls(graph)


def test_sizes_that_are_symbols_are_left_alone() -> None:
    args = (torch.randn(4, 6),)
    before = len(calls(capture(lambda x: x + torch.ones_like(x), args, dynamic=True)))
    graph, _ = optimize(lambda x: x + torch.ones_like(x), args, dynamic=True)
    assert len(calls(graph)) == before
