"""The matcher on patterns made up for it: scalars, several outputs, casts in between, backtracking, symbolic sizes."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import Any

import pytest
import torch

from fxopt.ir import spec
from fxopt.passes.context import Context
from fxopt.passes.matcher import Match, apply_pattern
from fxopt.passes.pattern import Anything, Parameter, Pattern, templates
from tests.passes.graphs import calls, capture, execute


def declare(
    pattern: Callable[..., Any],
    replacement: Callable[..., Any],
    examples: tuple[tuple[Any, ...], tuple[Any, ...]],
    guard: Callable[[Match], str | None] = lambda match: None,
    **settings: Any,
) -> Pattern:
    return Pattern("declared", pattern, replacement, examples, guard, list, list, **settings)


def apply(declared: Pattern, function: Callable[..., Any], args: tuple[torch.Tensor, ...], dynamic: bool = False) -> Context:
    """`declared` applied to `function` captured on `args`; the result obeys the graph's rules and has eager's values."""
    graph = capture(function, args, dynamic=dynamic)
    context = Context.without_options(graph)
    apply_pattern(context, declared)
    if not dynamic:
        spec.check(graph, "declared")
    graph.gm.recompile()
    expected = function(*args)
    for a, e in zip(execute(graph, args), expected if isinstance(expected, tuple) else (expected,), strict=True):
        torch.testing.assert_close(a, e)
    return context


def ones(*shape: int) -> torch.Tensor:
    return torch.ones(shape)


def test_scalars_are_parameters_bound_from_the_graph() -> None:
    seen: list[float] = []
    declared = declare(
        lambda x, scale: torch.tanh(x * scale),
        lambda x, scale: torch.tanh(x * scale),
        ((ones(2), 0.5), (ones(3), 0.25)),
        lambda match: seen.append(match.values["scale"]) or "only looking",
    )
    context = apply(declared, lambda x: torch.tanh(x * 0.125) + torch.tanh(3.0 * x), (torch.randn(4),))
    assert sorted(seen) == [0.125, 3.0]
    assert context.rejections == {("declared", "only looking"): 2}


def test_a_scalar_that_occurs_twice_must_agree() -> None:
    examples = ((ones(2), 0.5), (ones(3), 0.25))
    declared = declare(lambda x, s: torch.exp(x * s) + s, lambda x, s: s + torch.exp(x * s), examples)
    assert len(apply(declared, lambda x: torch.exp(x * 2.0) + 2.0, (torch.randn(4),)).log) == 1
    assert not apply(declared, lambda x: torch.exp(x * 2.0) + 3.0, (torch.randn(4),)).log


def test_a_tensor_that_occurs_twice_must_be_the_same() -> None:
    declared = declare(lambda x: x * torch.sigmoid(x), lambda x: torch.nn.functional.silu(x), ((ones(2),), (ones(3),)))
    assert len(apply(declared, lambda x, y: torch.sigmoid(x) * x + y, (torch.randn(4), torch.randn(4))).log) == 1
    assert not apply(declared, lambda x, y: torch.sigmoid(x) * y, (torch.randn(4), torch.randn(4))).log


@pytest.mark.parametrize("order", list(itertools.product([False, True], repeat=3)))
def test_commutative_operands_are_tried_in_every_order(order: tuple[bool, ...]) -> None:
    """((a*b) + exp(a)) * a: only one assignment of operands is consistent, so a wrong first choice must be taken back."""

    def function(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
        product = b * a if order[0] else a * b
        total = torch.exp(a) + product if order[1] else product + torch.exp(a)
        return a * total if order[2] else total * a

    declared = declare(
        lambda a, b: (a * b + torch.exp(a)) * a, lambda a, b: torch.addcmul(torch.exp(a), a, b) * a,
        ((ones(2), ones(2)), (ones(3), ones(3))),
    )  # fmt: skip
    assert len(apply(declared, function, (torch.randn(4), torch.randn(4))).log) == 1


def test_several_outputs() -> None:
    one = ((ones(2),), (ones(3),))
    declared = declare(lambda x: (torch.sin(x), torch.cos(x)), lambda x: (torch.sin(x) + 0.0, torch.cos(x) + 0.0), one)
    context = apply(declared, lambda x: (torch.sin(x) * 2, torch.cos(x) * 3), (torch.randn(4),))
    assert len(context.log) == 1
    assert calls(context.graph).count("add") == 2
    assert not apply(declared, lambda x, y: (torch.sin(x), torch.cos(y)), (torch.randn(4), torch.randn(4))).log


def test_an_output_may_feed_another() -> None:
    declared = declare(
        lambda x, r: ((y := x + r), torch.tanh(y)), lambda x, r: ((y := torch.add(r, x)), torch.tanh(y)),
        ((ones(2), ones(2)), (ones(3), ones(3))),
    )  # fmt: skip
    args = (torch.randn(4), torch.randn(4))
    assert len(apply(declared, lambda x, r: ((y := x + r), torch.tanh(y), y.exp()), args).log) == 1


def test_operands_computed_between_the_outputs_are_refused() -> None:
    declared = declare(
        lambda x, y: (torch.sin(x), torch.cos(y) * x), lambda x, y: (torch.sin(x), x * torch.cos(y)),
        ((ones(2), ones(2)), (ones(3), ones(3))),
    )  # fmt: skip
    context = apply(declared, lambda x: ((s := torch.sin(x)), torch.cos(s) * x), (torch.randn(4),))
    assert context.rejections == {("declared", "an operand is computed after the first output"): 1}


@pytest.mark.parametrize("through_casts", [False, True])
def test_casts_in_between_only_when_declared(through_casts: bool) -> None:
    declared = declare(
        lambda x: torch.rsqrt(torch.exp(x)),
        lambda x: torch.exp(x * -0.5),
        ((ones(2),), (ones(3),)),
        through_casts=through_casts,
    )
    context = apply(declared, lambda x: torch.rsqrt(torch.exp(x).double().float()), (torch.randn(4),))
    assert len(context.log) == int(through_casts)


def test_views_of_operands_may_have_other_users_but_results_not() -> None:
    declared = declare(
        lambda x, w: torch.mm(x, w.t()).exp(),
        lambda x, w: torch.exp(torch.mm(x, w.t())),
        ((ones(2, 3), ones(4, 3)), (ones(5, 6), ones(7, 6))),
    )
    args = (torch.randn(3, 4), torch.randn(5, 4))
    assert len(apply_canonical(declared, lambda x, w: (v := w.t()).sum() + torch.mm(x, v).exp(), args).log) == 1
    assert not apply_canonical(declared, lambda x, w: (p := torch.mm(x, w.t())).exp() + p.sum(), args).log


def test_a_replacement_with_other_strides_is_refused() -> None:
    declared = declare(lambda x: torch.exp(x), lambda x: torch.exp(x.t().contiguous().t()), ((ones(2, 3),), (ones(4, 5),)))
    context = apply(declared, lambda x: torch.exp(x), (torch.randn(3, 4),))
    assert not context.log
    assert [rule for rule, _ in context.rejections] == ["declared"]


def test_symbolic_sizes_match_without_guards() -> None:
    declared = declare(lambda x: x * torch.sigmoid(x), lambda x: torch.nn.functional.silu(x), ((ones(2, 3),), (ones(4, 5),)))
    context = apply(declared, lambda x: torch.sigmoid(x) * x, (torch.randn(3, 4),), dynamic=True)
    assert len(context.log) == 1


def test_literals_that_follow_sizes_match_anything_in_a_pattern() -> None:
    declared = declare(
        lambda x: x.view(-1).sum().view(x.dim() * 0 + 1), lambda x: x.sum().view(1), ((ones(2, 3),), (ones(4, 5),))
    )
    assert len(apply(declared, lambda x: x.view(-1).sum().view(1), (torch.randn(3, 4),)).log) == 1
    search, _ = templates(declare(lambda x: x.view(x.numel()), lambda x: x.view(-1), ((ones(2, 3),), (ones(4, 5),))))
    assert search.nodes[0].args == (Parameter("x"), [Anything()])


@pytest.mark.parametrize(
    ("pattern", "replacement", "message"),
    [
        (lambda x: x.exp(), lambda y: y.exp(), "the same parameters"),
        (lambda x: x.exp() if x.shape[0] == 2 else x.sin(), lambda x: x.exp(), "different ops"),
        (lambda x: x.exp(), lambda x: x.exp().view(x.numel(), 1).sum(1), "depends on sizes"),
    ],
)
def test_a_bad_declaration_says_why(pattern: Callable[..., Any], replacement: Callable[..., Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        templates(declare(pattern, replacement, ((ones(2),), (ones(3),))))


def apply_canonical(declared: Pattern, function: Callable[..., Any], args: tuple[torch.Tensor, ...]) -> Context:
    """`apply` where the function's views are spelled as the views pass leaves them."""
    return apply(declared, lambda *given: function(given[0], *(_Permuted(g) for g in given[1:])), args)


class _Permuted:
    """A matrix whose t() is spelled permute."""

    def __init__(self, matrix: torch.Tensor) -> None:
        self.matrix = matrix

    def t(self) -> torch.Tensor:
        return self.matrix.permute(1, 0)


def test_a_graph_without_a_needed_operator_is_passed_over() -> None:
    def untraceable(x: torch.Tensor) -> torch.Tensor:
        raise AssertionError("must not be traced")

    declared = declare(untraceable, untraceable, ((ones(2),), (ones(3),)), needs=(torch.ops.aten.mm.default,))
    assert not apply(declared, lambda x: x.exp(), (torch.randn(4),)).log
