"""Joining regions: the same values in fewer kernels, and only where order and iteration allow."""

from __future__ import annotations

import random
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch.fx.experimental.proxy_tensor import make_fx

from fxopt.ir.graph import Graph, Input, Phase, Role
from fxopt.ir.region import Region
from fxopt.journal import Journal
from fxopt.lower import Lowered, lower_graph
from fxopt.lower.schedule import schedule
from tests.lower.interpreter import run_lowered


def lowered(fn: Callable[..., Any], *args: torch.Tensor) -> Lowered:
    gm = make_fx(fn, tracing_mode="fake")(*args)
    inputs = [Input(n.name, Role.USER) for n in gm.graph.nodes if n.op == "placeholder"]
    return lower_graph(Graph(gm, inputs, Phase.INFERENCE, "test"), Journal("test"))


def regions(low: Lowered) -> list[Region]:
    return [s for s in low.steps if isinstance(s, Region)]


def check(fn: Callable[..., Any], *args: torch.Tensor) -> list[Region]:
    """Schedule `fn` and compare with eager; returns the regions left."""
    low = schedule(lowered(fn, *args))
    copies = [a.clone() for a in args]
    got = run_lowered(low, dict(zip(low.inputs, copies, strict=True)))
    want = fn(*args)
    for g, w in zip(got, want if isinstance(want, tuple) else (want,), strict=True):
        torch.testing.assert_close(g, w, rtol=1e-9, atol=1e-9)
    return regions(low)


def rand(*shape: int) -> torch.Tensor:
    return torch.randn(*shape, dtype=torch.float64)


def test_softmax_is_one_kernel() -> None:
    assert len(check(lambda x: torch.softmax(x + 1, -1), rand(6, 16))) == 1


def test_softmax_with_its_input_and_a_row_sum_is_one_kernel() -> None:
    def fn(x: torch.Tensor, y: torch.Tensor) -> tuple[torch.Tensor, ...]:
        h = x + y
        p = torch.softmax(h, -1)
        return h, p, (p * x).sum(1)

    joined = check(fn, rand(6, 16), rand(6, 16))
    assert len(joined) == 1
    assert set(joined[0].nest.writes()).isdisjoint(joined[0].nest.reads()), "intermediates pass in registers"


def test_column_and_row_reductions_are_two_kernels() -> None:
    assert len(check(lambda x: (x.sum(0), x.sum(1)), rand(6, 16))) == 2


def test_reductions_with_different_numbers_of_rows_stay_apart() -> None:
    def fn(x: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        return (x * mask).sum(1) / mask.sum(1)

    assert len(check(fn, rand(3, 5, 7), rand(3, 5, 1))) >= 2


def test_independent_results_of_one_input_are_one_kernel() -> None:
    assert len(check(lambda x: (x.exp(), x.tanh(), x * 2), rand(6, 16))) == 1


def test_a_library_call_in_between_keeps_regions_apart() -> None:
    def fn(x: torch.Tensor) -> torch.Tensor:
        a = (x + 1).exp()
        return a + torch.mm(a, a)

    assert len(check(fn, rand(8, 8))) == 2


def test_mutation_waits_for_readers_of_the_old_value() -> None:
    def fn(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        old = torch.mm(x, x)
        new = x + 1
        torch.ops.aten.copy_.default(x, new)
        return old, new * 2

    x = rand(8, 8)
    low = schedule(lowered(lambda x: fn(x), x.clone()))
    mine, eager = x.clone(), x.clone()
    got = run_lowered(low, {low.inputs[0]: mine})
    want = fn(eager)
    torch.testing.assert_close(mine, eager)
    torch.testing.assert_close(tuple(got), want)


def test_an_index_computed_in_the_kernel_that_scatters_with_it() -> None:
    """The gradient of the maximum of a scalar: the index is a value of the same kernel, not of memory."""

    def fn(x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        return torch.scatter(torch.zeros((), dtype=torch.float64), 0, torch.max(x, 0).indices, y)

    check(fn, rand(1)[0], rand(1)[0])


def test_in_place_update_at_another_index_is_not_joined() -> None:
    def fn(x: torch.Tensor) -> torch.Tensor:
        y = torch.ops.aten.permute.default(x, [1, 0]) + x
        torch.ops.aten.copy_.default(x, y)
        return y * 2

    x = rand(8, 8)
    low = schedule(lowered(fn, x.clone()))
    mine, eager = x.clone(), x.clone()
    got = run_lowered(low, {low.inputs[0]: mine})
    want = fn(eager)
    torch.testing.assert_close(got[0], want)
    torch.testing.assert_close(mine, eager)


UNARY = [torch.exp, torch.tanh, lambda x: x * 0.5, lambda x: x + 1.0]


def random_program(seed: int) -> Callable[..., tuple[torch.Tensor, ...]]:
    """A random small function of two [4, 6] tensors and one [6] vector, mixing all that joins treats differently."""

    def program(a: torch.Tensor, b: torch.Tensor, c: torch.Tensor) -> tuple[torch.Tensor, ...]:
        rng = random.Random(seed)
        pool = [a, b, c.expand(4, 6)]
        for _ in range(rng.randint(4, 12)):
            x, y = rng.choice(pool), rng.choice(pool)
            kind = rng.randrange(8)
            if kind == 0:
                pool.append(torch.softmax(x, rng.randrange(2)))
            elif kind == 1:
                pool.append(x + y.sum(rng.randrange(2), keepdim=True))
            elif kind == 2:
                pool.append(x * y)
            elif kind == 3:
                pool.append(torch.mm(x, torch.mm(y.t(), x) * 0.01))
            elif kind == 4:
                pool.append((x.reshape(6, 4).t() * 2).reshape(4, 6))
            elif kind == 5:
                pool.append(x + torch.softmax(y.reshape(24), 0).reshape(4, 6))
            else:
                pool.append(rng.choice(UNARY)(torch.tanh(x)))
        return tuple(rng.sample(pool[3:], min(4, len(pool) - 3)))

    return program


@pytest.mark.parametrize("seed", range(40))
def test_random_programs_keep_their_values(seed: int) -> None:
    torch.manual_seed(seed)
    args = rand(4, 6), rand(4, 6), rand(6)
    program = random_program(seed)
    joined = check(program, *args)
    assert len(joined) <= len(regions(lowered(program, *args)))
