"""Each rewrite rule: where it applies, where it must not, and that every bit, stride and alias stays eager's."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

from tests.passes.graphs import assert_identical, calls, execute, optimize

aten = torch.ops.aten
INF, NAN = float("inf"), float("nan")


def special(*shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    """Random numbers with -0.0, 0.0, infinities, NaN and a denormal among them (where the dtype has them)."""
    x = torch.randn(*shape) * 4
    if dtype.is_floating_point:
        values = torch.tensor([-0.0, 0.0, INF, -INF, NAN, 1e-40])
        x.view(-1)[: len(values)] = values[: x.numel()]
    return x.to(dtype)


F = special(3, 4)
H = special(3, 4, dtype=torch.bfloat16)
I = torch.arange(12).reshape(3, 4) - 5  # noqa: E741
B = I > 0
T = special(4, 3).t()

REMOVED: dict[str, tuple[str, Callable[..., Any], tuple[torch.Tensor, ...], int]] = {
    # name: (pass, function, arguments, calls left)
    "integer + 0": ("no_ops", lambda x: (x + 0).relu(), (I,), 1),
    "0 + integer": ("no_ops", lambda x: torch.add(torch.zeros_like(x), x).relu(), (I,), 1),
    "float - 0": ("no_ops", lambda x: (x - 0.0).exp(), (F,), 1),
    "x * 1": ("no_ops", lambda x: (x * 1).exp(), (F,), 1),
    "1 * x": ("no_ops", lambda x: (torch.ones(4) * x).exp(), (F,), 1),
    "x / 1": ("no_ops", lambda x: (x / 1.0).exp(), (H,), 1),
    "x ** 1": ("no_ops", lambda x: (x**1.0).exp(), (F,), 1),
    "cast to the same dtype": ("no_ops", lambda x: aten._to_copy(x, dtype=torch.float32).exp(), (F,), 1),
    "clone": ("no_ops", lambda x: x.clone().exp(), (T,), 1),
    "expand to the same shape": ("no_ops", lambda x: x.expand(3, 4).exp(), (F,), 1),
    "whole slice": ("no_ops", lambda x: x[0:3].exp(), (F,), 1),
    "identity permute": ("no_ops", lambda x: x.permute(0, -1).exp(), (F,), 1),
    "transpose of a dimension with itself": ("no_ops", lambda x: x.transpose(1, -1).exp(), (F,), 1),
    "cat of one": ("no_ops", lambda x: torch.cat([x]).exp(), (F,), 1),
    "cat with nothing": ("no_ops", lambda x: torch.cat([torch.empty(0), x]).exp(), (F,), 1),
    "pad by nothing": ("no_ops", lambda x: aten.constant_pad_nd(x, [0, 0], 1.0).exp(), (F,), 1),
    "roll by nothing": ("no_ops", lambda x: aten.roll(x, [0], [1]).exp(), (F,), 1),
    "flip of one": ("no_ops", lambda x: aten.flip(x[:1], [0]).exp(), (F,), 2),
    "mask with true": ("no_ops", lambda x: torch.logical_not(x & torch.full_like(x, True)), (B,), 1),
    "or with zero": ("no_ops", lambda x: (x | 0).relu(), (I,), 1),
    "where with a constant": ("no_ops", lambda x, y: torch.where(torch.full((1,), True), x, y).exp(), (F, -F), 1),
    "where of equal arms": ("no_ops", lambda c, x: torch.where(c, x, x).exp(), (B, F), 1),
    "masked_fill of nothing": ("no_ops", lambda x: x.masked_fill(torch.zeros(3, 4, dtype=torch.bool), 1).exp(), (F,), 1),
    "floor of integers": ("no_ops", lambda x: torch.floor(x).relu(), (I,), 1),
    "relu of relu": ("no_ops", lambda x: x.relu().relu().exp(), (F,), 2),
    "maximum with itself": ("no_ops", lambda x: torch.maximum(x, x).exp(), (F,), 1),
    "slice_scatter of everything": ("no_ops", lambda x, y: aten.slice_scatter(x, y).exp(), (F, -F), 1),
    "copy": ("no_ops", lambda x, y: aten.copy(x, y).exp(), (F, -F), 1),
    "transposed twice": ("views", lambda x: x.t().transpose(0, 1).exp(), (F,), 1),
    "permuted twice": ("views", lambda x: x.reshape(3, 2, 2).permute(2, 0, 1).permute(0, 2, 1).exp(), (F,), 3),
    "view of view": ("views", lambda x: x.view(12).view(2, 6).unsqueeze(0).exp(), (F,), 2),
    "view there and back": ("views", lambda x: x.view(12).view(3, 4).exp(), (F,), 1),
    "permuted ones": ("views", lambda x: x.view(3, 1, 4).permute(1, 0, 2).reshape(3, 4).exp(), (F,), 1),
    "unsafe view": ("views", lambda x: aten._unsafe_view(x.exp(), [12]).exp(), (F,), 3),
    "slice of slice": ("views", lambda x: x[:, 1:][:, -2:].exp(), (F,), 2),
    "expand of expand": ("views", lambda x: x[:1].expand(3, 4).expand(2, 3, 4).exp(), (F,), 3),
    "not not": ("algebra", lambda x: x.logical_not().logical_not().any(), (B,), 1),
    "minus minus": ("algebra", lambda x: x.neg().neg().exp(), (F,), 1),
    "float -> double -> float": ("algebra", lambda x: x.double().float().exp(), (F,), 1),
    "bfloat16 -> float -> bfloat16": ("algebra", lambda x: x.float().bfloat16().exp(), (H,), 1),
    "bfloat16 -> float -> double": ("algebra", lambda x: x.float().double().exp(), (H,), 2),
    "bool -> int -> float": ("algebra", lambda x: x.int().float().exp(), (B,), 2),
    "integer chain": ("algebra", lambda x: (x + 3 + 4).relu(), (I,), 2),
    "integer products": ("algebra", lambda x: (x * 3 * 4).relu(), (I,), 2),
    "repeated call": ("cse", lambda x: x.exp() + x.exp().sin(), (F,), 3),
    "repeated commuted": ("cse", lambda x, y: (x + y).exp() * (y + x), (F, -F), 3),
}

KEPT: dict[str, tuple[str, Callable[..., Any], tuple[torch.Tensor, ...]]] = {
    "float + 0 turns -0.0 into 0.0": ("no_ops", lambda x: (x + 0.0).sign(), (F,)),
    "float - -0.0 does too": ("no_ops", lambda x: (x - -0.0).sign(), (F,)),
    "a product that changes the dtype": ("no_ops", lambda x: (x * 1.0).exp(), (I,)),
    "a sum that changes the shape": ("no_ops", lambda x: (x + torch.zeros(2, 3, 4, dtype=torch.int64)).relu(), (I,)),
    "a copy that changes the strides": (
        "no_ops",
        lambda x: aten.clone(x, memory_format=torch.contiguous_format).view(12),
        (T,),
    ),
    "floor of floats": ("no_ops", lambda x: torch.floor(x).exp(), (F,)),
    "integer & 1": ("no_ops", lambda x: (x & 1).relu(), (I,)),
    "float -> bfloat16 -> float": ("algebra", lambda x: x.bfloat16().float().exp(), (F,)),
    "double -> float -> double": ("algebra", lambda x: x.float().double().exp(), (F.double(),)),
    "int64 -> float -> int64": ("algebra", lambda x: x.float().long().relu(), (I * 10**9,)),
    "float -> int -> float": ("algebra", lambda x: x.nan_to_num(0, 9, 9).int().float().exp(), (F,)),
    "x / 3": ("algebra", lambda x: (x / 3.0).exp(), (F,)),
    "float products": ("algebra", lambda x: (x * 3.0 * 5.0).exp(), (F,)),
    "x ** 4": ("algebra", lambda x: (x**4).exp(), (F,)),
    "a slice with a step": ("views", lambda x: x[:, ::2][:, 1:].exp(), (F,)),
    "a view of another dtype": ("views", lambda x: x.view(torch.int32).view(12).relu(), (F,)),
    "1 and 1.0": ("cse", lambda x: (x + 1, x + 1.0), (F,)),
    "0.0 and -0.0": ("cse", lambda x: torch.copysign(x, 0.0 * x).exp() + (x - 0.0).exp() + (x - -0.0).exp(), (F,)),
}


@pytest.mark.parametrize("name", REMOVED)
def test_rule_applies_and_changes_no_bit(name: str) -> None:
    only, function, args, left = REMOVED[name]
    graph, context = optimize(function, args, only=only)
    assert any(r.rule.startswith(f"{only}.") for r in context.log)
    assert_identical(graph, function, args)
    assert len(calls(graph)) <= left


@pytest.mark.parametrize("name", KEPT)
def test_rule_does_not_apply(name: str) -> None:
    only, function, args = KEPT[name]
    graph, context = optimize(function, args, only=only)
    assert not [r for r in context.log if r.rule.startswith(f"{only}.") and r.rule != "views.as_permute"]
    assert_identical(graph, function, args)


@pytest.mark.parametrize("name", [*REMOVED, *KEPT])
def test_whole_pipeline_changes_no_bit(name: str) -> None:
    _, function, args, *_ = REMOVED.get(name) or KEPT[name]
    graph, _ = optimize(function, args)
    assert_identical(graph, function, args)


@pytest.mark.parametrize("exponent", [2, 2.0, 3, 0.5, -1, -0.5])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_powers_are_computed_as_eager_computes_them(exponent: float, dtype: torch.dtype) -> None:
    x = torch.randn(64, dtype=dtype)
    graph, _ = optimize(lambda x: x**exponent, (x,), only="algebra")
    assert "pow" not in calls(graph)
    torch.testing.assert_close(execute(graph, (x,))[0], x**exponent, rtol=2 * torch.finfo(dtype).eps, atol=0, equal_nan=True)


@pytest.mark.parametrize(
    ("dtype", "exponent"), [(torch.float16, 14), (torch.float16, -14), (torch.bfloat16, 100), (torch.float32, -3)]
)
def test_division_by_a_power_of_two_is_exact(dtype: torch.dtype, exponent: int) -> None:
    x = special(5, 7, dtype=dtype)
    graph, _ = optimize(lambda x: x / 2.0**exponent, (x,), only="algebra")
    assert calls(graph) == ["mul"]
    assert_identical(graph, lambda x: x / 2.0**exponent, (x,))


@pytest.mark.parametrize(("dtype", "exponent"), [(torch.float16, 15), (torch.float16, -15), (torch.float32, 127)])
def test_division_stays_where_the_reciprocal_is_not_normal(dtype: torch.dtype, exponent: int) -> None:
    graph, _ = optimize(lambda x: x / 2.0**exponent, (special(4, 4, dtype=dtype),), only="algebra")
    assert calls(graph) == ["div"]


def test_sum_of_an_expand_is_at_least_as_accurate() -> None:
    def function(x: torch.Tensor) -> torch.Tensor:
        return x.expand(7, 1000).sum(1)

    x = torch.randn(7, 1)
    graph, _ = optimize(function, (x,), only="algebra")
    assert "sum" not in calls(graph)
    zeros = -torch.zeros(7, 1)
    assert_identical(graph, function, (zeros,))
    exact = function(x.double())
    assert (execute(graph, (x,))[0] - exact).abs().max() <= (function(x) - exact).abs().max() + exact.abs().max() * 6e-8


@pytest.mark.parametrize("seed", range(12))
def test_random_chains_of_rewritable_ops(seed: int) -> None:
    """Twenty ops drawn from those that rules know, chained: the pipeline must not change a bit of any output."""
    function, args = _random_chain(seed)
    graph, _ = optimize(function, args)
    assert_identical(graph, function, args)


STEPS: list[Callable[[torch.Tensor], torch.Tensor]] = [
    lambda x: x * 1,
    lambda x: x - 0.0,
    lambda x: x + 0.0,
    lambda x: x.clone(),
    lambda x: x.t(),
    lambda x: x.transpose(0, 1),
    lambda x: x.contiguous().view(-1).view(4, 4),
    lambda x: x.reshape(16).reshape(2, 8).reshape(4, 4),
    lambda x: x.unsqueeze(0).expand(1, 4, 4).squeeze(0),
    lambda x: torch.cat([x[:2], x[2:]]),
    lambda x: x.double().float(),
    lambda x: x.neg().neg(),
    lambda x: x / 4.0,
    lambda x: torch.where(torch.ones(4, 4, dtype=torch.bool), x, -x),
    lambda x: torch.maximum(x, x),
    lambda x: x[:, 0:4][0:4],
    lambda x: x + x.clone(),
    lambda x: x.flip(0).flip(0),
]


def _random_chain(seed: int) -> tuple[Callable[..., Any], tuple[torch.Tensor, ...]]:
    generator = torch.Generator().manual_seed(seed)
    picks = torch.randint(len(STEPS), (20,), generator=generator).tolist()

    def function(x: torch.Tensor) -> tuple[torch.Tensor, ...]:
        kept = []
        for number, pick in enumerate(picks):
            x = STEPS[pick](x)
            if number % 6 == 5:
                kept.append(x)
        return (*kept, x)

    return function, (special(4, 4),)
