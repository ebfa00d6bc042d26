"""Values stored by one kernel or computed in several: where both are lowered, and that both have the program's values."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from fxopt.capture.decompositions import decompositions
from fxopt.ir.region import Call, Region
from fxopt.lower import Lowered, cost, groupings
from fxopt.lower import schedule as schedule_module
from fxopt.lower.groupings import AGAIN, BOTH, IN_TWO, MARGIN, STORED, WHOLE, regrouped, with_groupings
from fxopt.lower.schedule import schedule
from tests.lower.capturing import moved
from tests.lower.harness import lower
from tests.lower.interpreter import run_lowered
from tests.lower.test_schedule import arguments, lowered, random_program
from tests.numerics import assert_closer, to_float64

F = torch.nn.functional
BF16 = torch.bfloat16
Program = Callable[..., Tensor | tuple[Tensor, ...]]


def empty(*shape: int, dtype: torch.dtype = BF16) -> Tensor:
    return torch.empty(*shape, dtype=dtype, device="meta")


def grouped(fn: Program, *args: Tensor, mode: str = "default") -> Lowered:
    """`fn` scheduled for a GPU, with its groupings."""
    return with_groupings(schedule(moved(lower(fn, args, decompose=decompositions()), "cuda")), mode)


def labels(low: Lowered) -> list[list[str]]:
    return [[way.label for way in each.ways] for each in low.groupings]


def check(fn: Program, *args: Tensor) -> Lowered:
    """`grouped`, after comparing the values of each way with eager's."""
    low = grouped(fn, *args)
    eager, exact = (out if isinstance(out, tuple) else (out,) for out in (fn(*args), fn(*to_float64(args))))
    for n in (0, 1):
        chosen = regrouped(low, {each.name: each.ways[n] for each in low.groupings})
        got = tuple(run_lowered(moved(chosen, "cpu"), dict(zip(low.inputs, args, strict=True))))
        assert_closer(got, eager, exact)
    return low


@pytest.fixture
def tiny(monkeypatch: pytest.MonkeyPatch) -> None:
    """Sizes do not matter, and rows of more than eight elements are not held."""
    monkeypatch.setitem(schedule_module.LAUNCH_BYTES, "cuda", 0)
    monkeypatch.setattr(cost, "LONGEST_HELD", 8)


def narrow(*shape: int) -> Tensor:
    return torch.randn(*shape, dtype=BF16)


def squeezed(x: Tensor, bias: Tensor, weight: Tensor) -> Tensor:
    """An activation whose channels are weighed by what is computed from their means."""
    y = F.silu(x + bias[:, None])
    return y * torch.sigmoid(torch.mm(y.mean(2), weight))[:, :, None]


def test_an_activation_is_stored_or_computed_again_across_a_product(tiny: None) -> None:
    low = check(squeezed, narrow(3, 4, 6), narrow(4), narrow(4, 4))
    assert labels(low) == [[STORED, AGAIN]]
    again = regrouped(low, {each.name: each.ways[1] for each in low.groupings})
    assert sum(isinstance(step, Call) for step in again.steps) == 1
    first, last = (step for step in again.steps if isinstance(step, Region))
    assert low.inputs[0] in last.reads()
    assert len(first.writes()) == 1, "what it stored is gone"


def test_the_estimate_decides_where_the_groupings_are_far_apart(monkeypatch: pytest.MonkeyPatch) -> None:
    args = empty(64, 256, 56 * 56), empty(256), empty(256, 256)
    assert labels(grouped(squeezed, *args)) == [[STORED, AGAIN]]
    stored, again = grouped(squeezed, *args).groupings[0].ways
    bytes_of = [sum(cost.traffic(s) for s in way.steps if isinstance(s, Region)) for way in (stored, again)]
    assert bytes_of[1] < bytes_of[0], "without arithmetic it would be fewer bytes"
    more = (2 + MARGIN) * bytes_of[0] / (64 * 256 * 56 * 56)
    monkeypatch.setattr(cost, "recomputation", lambda value, device: more)
    assert not grouped(squeezed, *args).groupings


def test_what_would_keep_more_memory_alive_over_a_product_stays_stored(tiny: None) -> None:
    def residual(x: Tensor, y: Tensor, weight: Tensor) -> Tensor:
        left, right = torch.mm(x, weight), torch.mm(y, weight)
        total = left.tanh() + right
        return torch.mm(F.softmax(total, -1), weight) + total

    args = (narrow(4, 4), narrow(4, 4), narrow(4, 4))
    assert not check(residual, *args).groupings

    def of_inputs(x: Tensor, y: Tensor, weight: Tensor) -> Tensor:
        total = x.tanh() + y
        return torch.mm(F.softmax(total, -1), weight) + total

    assert labels(check(of_inputs, *args)) == [[STORED, AGAIN]], "which live on anyway"


@pytest.mark.parametrize(("dtype", "ways"), [(torch.float32, [BOTH, STORED]), (BF16, [STORED, AGAIN])])
def test_what_two_kernels_compute_may_be_stored_by_the_first(tiny: None, dtype: torch.dtype, ways: list[str]) -> None:
    """Sums over other axes, which no kernel does together. The scheduler stores what is as much work as it saves bytes."""

    def fn(x: Tensor) -> tuple[Tensor, Tensor]:
        value = torch.exp(x * 2)
        return value.sum(1), value.sum((0, 2))

    assert labels(check(fn, torch.randn(5, 3, 2, dtype=dtype))) == [ways]


@pytest.mark.parametrize("dtype", [torch.float32, BF16])
def test_long_rows_of_several_operands_are_one_kernel_or_two(tiny: None, dtype: torch.dtype) -> None:
    def fn(x: Tensor, y: Tensor, z: Tensor) -> Tensor:
        return F.softmax(x * y + z, -1)

    low = check(fn, *(torch.randn(3, 16, dtype=dtype) for _ in range(3)))
    assert labels(low) == [[WHOLE, IN_TWO]]
    rows, elements = low.groupings[0].ways[1].steps
    assert isinstance(rows, Region) and isinstance(elements, Region)
    assert set(rows.reads()) == set(low.inputs) and set(elements.reads()).isdisjoint(low.inputs)
    assert not elements.nest.reduced
    assert not grouped(lambda x: F.softmax(x, -1), torch.randn(3, 16)).groupings, "one operand is loaded again as fast"
    assert not check(fn, *(torch.randn(3, 8, dtype=dtype) for _ in range(3))).groupings, "a row that is held"


def test_a_sum_that_long_rows_store_anyway_is_read_again(tiny: None) -> None:
    def fn(x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
        total = x * 2 + y
        return total, F.layer_norm(total, (16,))

    low = check(fn, torch.randn(3, 16), torch.randn(3, 16))
    assert labels(low) == [[WHOLE, IN_TWO]]
    assert len({name for step in low.groupings[0].ways[1].steps for name in step.writes()}) == 4, "both, and two of the rows"


def test_so_many_different_groupings_are_measured_and_equal_ones_count_once(tiny: None) -> None:
    def fn(*args: Tensor) -> tuple[Tensor, ...]:
        return tuple(F.softmax(x * y + y, -1) for x, y in zip(args[::2], args[1::2], strict=True))

    different = [torch.randn(3, 16 + n // 2) for n in range(12)]
    assert len(grouped(fn, *different).groupings) == groupings.MOST_DIFFERENT["default"]
    assert len(grouped(fn, *different, mode="max-autotune").groupings) == 6
    assert len(grouped(fn, *(torch.randn(3, 16) for _ in range(12))).groupings) == 6


def test_cpus_have_one_grouping(tiny: None) -> None:
    low = schedule(lower(squeezed, (narrow(3, 4, 6), narrow(4), narrow(4, 4)), decompose=decompositions()))
    assert with_groupings(low) is low


def test_what_is_changed_between_is_not_computed_again(tiny: None) -> None:
    low = schedule(moved(lower(squeezed, (narrow(3, 4, 6), narrow(4), narrow(4, 4))), "cuda"))
    assert with_groupings(low).groupings
    product = next(k for k, step in enumerate(low.steps) if isinstance(step, Call))
    for name, count in ((low.inputs[0], 0), ("scratch", 1)):
        between = Call("test::change", (), writes=(name,))
        changed = replace(low, steps=[*low.steps[:product], between, *low.steps[product:]])
        assert len(with_groupings(changed).groupings) == count


@pytest.mark.parametrize("inlined", [False, True], ids=["stored", "inlined"])
@pytest.mark.parametrize("seed", range(16))
def test_random_programs_keep_their_values_in_each_grouping(
    seed: int, inlined: bool, tiny: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Before anything is joined, so that there are many kernels. Sizes are symbols in every fourth."""
    monkeypatch.setattr(groupings, "MARGIN", 1e9)
    if inlined:
        monkeypatch.setattr(cost, "should_store", lambda value, readers: False)
    program, args = random_program(seed), arguments(seed)
    low = with_groupings(moved(lowered(program, *args, dynamic=seed % 4 == 0), "cuda"), "max-autotune")
    other = regrouped(low, {each.name: each.ways[1] for each in low.groupings})
    got = run_lowered(moved(other, "cpu"), dict(zip(low.inputs, [a.clone() for a in args], strict=True)))
    want = program(*args)
    for g, w in zip(got, want if isinstance(want, tuple) else (want,), strict=True):
        torch.testing.assert_close(g, w, rtol=1e-9, atol=1e-9)
