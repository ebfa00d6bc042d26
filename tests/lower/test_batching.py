"""Regions that differ in buffers and sizes only become one batch, where nothing waits and little is kept alive by it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch

from fxopt.ir.region import Batch, Call, Region, Step
from fxopt.lower import Lowered
from fxopt.lower.batching import FEWEST_MEMBERS, form
from fxopt.lower.schedule import MAX_DISTANCE, schedule
from tests.lower.interpreter import run_lowered
from tests.lower.test_schedule import lowered

CUDA = torch.device("cuda", 0)
SIZES = ((7,), (1,), (4, 5), (2, 3, 4), (64,), (1, 9), (33,), (3, 3), (1,), (128,))
Tensors = list[torch.Tensor]


def on_cuda(low: Lowered) -> Lowered:
    """`low` as if for a GPU; its memory stays where the interpreter has it."""
    return replace(low, steps=[replace(s, device=CUDA) if isinstance(s, Region) else s for s in low.steps])


def scheduled(fn: Callable[..., Any], *args: torch.Tensor, batch: bool = True) -> list[Step]:
    """The steps of `fn`, scheduled for a GPU; its results and what it does to its arguments are checked."""
    low = schedule(on_cuda(lowered(fn, *(a.clone() for a in args))), batch=batch)
    mine, eager = [a.clone() for a in args], [a.clone() for a in args]
    got = run_lowered(low, dict(zip(low.inputs, mine, strict=True)))
    want = fn(*eager)
    torch.testing.assert_close(tuple(got), want if isinstance(want, tuple) else (want,))
    torch.testing.assert_close(mine, eager)
    return low.steps


def batches(steps: list[Step]) -> list[Batch]:
    return [s for s in steps if isinstance(s, Batch)]


def regions(steps: list[Step]) -> list[Region]:
    return [s for s in steps if isinstance(s, Region)]


def tensors(*shapes: tuple[int, ...], dtype: torch.dtype = torch.float64) -> Tensors:
    return [torch.rand(shape).to(dtype) for shape in shapes]


def copy_(x: torch.Tensor, value: torch.Tensor) -> None:
    torch.ops.aten.copy_.default(x, value)


def adamw(*args: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """One step over as many parameters as there are gradients, moments and counts; all in place."""
    count = len(args) // 5
    groups = zip(*(args[k * count : (k + 1) * count] for k in range(5)), strict=True)
    for p, g, m, v, step in groups:
        one = step + 1
        mean, square = m * 0.9 + g * 0.1, v * 0.999 + g * g * 0.001
        scale = (1 - 0.9**one) / 1e-3
        copy_(p, p * 0.99 - mean / ((square / (1 - 0.999**one)).sqrt() + 1e-8) / scale)
        copy_(m, mean)
        copy_(v, square)
        copy_(step, one)
    return ()


def state(shapes: tuple[tuple[int, ...], ...]) -> Tensors:
    return [*(t for _ in range(4) for t in tensors(*shapes)), *(torch.tensor(3.0).double() for _ in shapes)]


def test_an_optimizer_step_is_two_batches_whatever_the_sizes() -> None:
    steps = scheduled(adamw, *state(SIZES))
    assert [len(b.members) for b in batches(steps)] == [len(SIZES)] * 2
    assert regions(steps) == []
    update, counts = batches(steps)
    assert sorted(update.elements) == [1, 1, 7, 9, 9, 20, 24, 33, 64, 128]
    assert [bool(spec.shape) for spec in update.body.buffers.values()].count(False) == 1, "the count is read once"
    assert set(counts.elements) == {1}


def test_dtypes_have_batches_of_their_own() -> None:
    def fn(*xs: torch.Tensor) -> tuple[torch.Tensor, ...]:
        return tuple(x.sin() * 2 for x in xs)

    xs = [*tensors(*SIZES), *tensors(*SIZES, dtype=torch.float32)]
    found = batches(scheduled(fn, *xs))
    assert sorted(len(b.members) for b in found) == [len(SIZES)] * 2


def test_few_regions_are_no_batch() -> None:
    def fn(*xs: torch.Tensor) -> tuple[torch.Tensor, ...]:
        return tuple(x.sin() for x in xs)

    args = tensors(*SIZES)[: FEWEST_MEMBERS - 1]
    assert not batches(scheduled(fn, *args))
    assert batches(scheduled(fn, *tensors(*SIZES)[:FEWEST_MEMBERS]))
    assert not batches(scheduled(fn, *tensors(*SIZES), batch=False))


def test_regions_named_to_stay_apart_do() -> None:
    def fn(*xs: torch.Tensor) -> tuple[torch.Tensor, ...]:
        return tuple(x.sin() for x in xs)

    low = on_cuda(lowered(fn, *tensors(*SIZES)))
    (one, *_) = regions(low.steps)
    found = schedule(low, apart=frozenset(one.nodes))
    assert [len(b.members) for b in batches(found.steps)] == [len(SIZES) - 1]
    assert one.name in [r.name for r in regions(found.steps)]


def test_what_waits_for_another_is_not_in_its_batch() -> None:
    def fn(x: torch.Tensor) -> torch.Tensor:
        for _ in range(10):
            x = torch.mm(x, x).sin()
        return x

    assert not batches(scheduled(fn, torch.rand(4, 4, dtype=torch.float64)))


def test_two_dependent_rounds_are_two_batches() -> None:
    def fn(*xs: torch.Tensor) -> tuple[torch.Tensor, ...]:
        first = [torch.mm(x, x).sin() for x in xs]
        return tuple(torch.mm(x, x).sin() for x in first)

    found = batches(scheduled(fn, *tensors(*((k, k) for k in range(2, 12)))))
    assert [len(b.members) for b in found] == [10, 10]


def test_a_tensor_that_all_read_once_does_not_keep_them_apart() -> None:
    def fn(rate: torch.Tensor, *xs: torch.Tensor) -> tuple[torch.Tensor, ...]:
        for x in xs:
            copy_(x, x - x.cos() * rate)
        return ()

    steps = scheduled(fn, torch.rand((), dtype=torch.float64), *tensors(*SIZES, (64,), (64,)))
    assert [len(b.members) for b in batches(steps)] == [12] and not regions(steps)


def test_accesses_that_differ_are_no_form() -> None:
    def one(fn: Callable[..., Any], *args: torch.Tensor) -> Region:
        (region,) = regions(schedule(on_cuda(lowered(fn, *args))).steps)
        return region

    x, y = torch.rand(4, 6), torch.rand(6, 4)
    assert form(one(lambda x: x.sin(), x)) is not None
    assert form(one(lambda x: x.sin(), x.t())) is not None, "dense in another order"
    assert form(one(lambda x, y: x + y.t(), x, y)) is None, "two orders"
    assert form(one(lambda x, y: x + y[0, 0], x, y)) is not None
    assert form(one(lambda x, y: x + y[0, 1], x, y)) is None
    assert form(one(lambda x: x[:, :3].sin(), x)) is None, "gaps"
    assert form(one(lambda x: x.sum(0), x)) is None
    assert form(one(lambda x: torch.arange(6) * 2 + x, x)) is None, "its own index is a value"
    assert form(one(lambda x: x.cumsum(0), x)) is None
    (cpu,) = regions(schedule(lowered(lambda x: x.sin(), x)).steps)
    assert form(cpu) is None


def test_the_same_expression_over_any_shape_is_one_form() -> None:
    def fn(x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        return x * 2 + y

    found = []
    for shape in ((4, 6), (5,), (2, 3, 4), (1,), (1, 1)):
        x = torch.rand(shape)
        (region,) = regions(schedule(on_cuda(lowered(fn, x, x.clone()))).steps)
        found.append(form(region))
    assert all(f is not None for f in found)
    assert len({f.key for f in found if f}) == 1
    assert [f.elements for f in found if f] == [24, 5, 24, 1, 1]
    assert {f.walked for f in found if f} == {(True, True, True), None}


def test_regions_of_unknown_size_are_left_alone() -> None:
    low = schedule(on_cuda(lowered(lambda *xs: tuple(x.sin() for x in xs), *tensors(*SIZES[2:]), dynamic=True)))
    assert not batches(low.steps)


@pytest.mark.parametrize(("rows", "batched"), [(8, True), (1 << 18, False)])
def test_large_values_do_not_wait_for_each_other(rows: int, batched: bool) -> None:
    """Casts of gradients, say: were they one batch, all of the products before them would be alive at once."""

    def fn(*xs: torch.Tensor) -> tuple[torch.Tensor, ...]:
        return tuple(torch.mm(x, x.t()[:, :4]).sin() for x in xs)

    low = schedule(on_cuda(lowered(fn, *(torch.empty(rows, 4) for _ in range(FEWEST_MEMBERS)))))
    assert bool(batches(low.steps)) == batched


def test_small_values_do_not_wait_long() -> None:
    def fn(*xs: torch.Tensor) -> tuple[torch.Tensor, ...]:
        return tuple(torch.mm(x, x).sin() for x in xs)

    many = [torch.empty(40, 40) for _ in range(MAX_DISTANCE)]
    low = schedule(on_cuda(lowered(fn, *many)))
    assert len(batches(low.steps)) >= 2
    calls = [isinstance(s, Call) for s in low.steps]
    assert calls.index(False) < 60


def test_stores_that_nobody_wants_are_left_out_of_the_batch() -> None:
    def fn(*xs: torch.Tensor) -> tuple[torch.Tensor, ...]:
        out = []
        for k, x in enumerate(xs):
            new = x.sin() + 1
            out.append(new if k % 2 else new * 2)
        return tuple(out)

    found = batches(scheduled(fn, *tensors(*SIZES, *SIZES)))
    assert sorted(len(b.members) for b in found) == [len(SIZES)] * 2
    assert all(len(b.body.nest.stores) == 1 for b in found)


def test_a_sample_is_a_part_of_limited_size() -> None:
    (batch, _) = batches(scheduled(adamw, *state(SIZES)))
    sample = batch.sample(4 * 8 * 40)
    assert sum(sample.elements) == 40 and sample.body is batch.body
    assert len(sample.arguments) == len(sample.elements) < len(batch.elements)
    assert {n for names in sample.arguments for n in names} == set(sample.buffers)
    assert sum(batch.sample(1 << 30).elements) == sum(batch.elements)
