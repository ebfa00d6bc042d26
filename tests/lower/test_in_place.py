"""State that an op changes in part is written in its own memory, unless something still needs the old contents."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

from fxopt.ir.region import Region
from fxopt.lower import Lowered
from fxopt.lower.schedule import schedule
from tests.lower.capturing import assert_same, library_calls, lower_function
from tests.lower.interpreter import run_lowered

aten = torch.ops.aten

Step = Callable[[torch.Tensor, torch.Tensor, torch.Tensor], Any]


def _index_put(cache: torch.Tensor, rows: torch.Tensor, new: torch.Tensor) -> torch.Tensor:
    return aten.index_put.default(cache, [None, rows], new)


def _index_copy(cache: torch.Tensor, rows: torch.Tensor, new: torch.Tensor) -> torch.Tensor:
    return aten.index_copy.default(cache, 1, rows, new)


def _slice(cache: torch.Tensor, rows: torch.Tensor, new: torch.Tensor) -> torch.Tensor:
    return aten.slice_scatter.default(cache, new, 1, 2, 4)


def _own_slice(cache: torch.Tensor, rows: torch.Tensor, new: torch.Tensor) -> torch.Tensor:
    return aten.slice_scatter.default(cache, cache[:, 2:4] + new, 1, 2, 4)


def _select(cache: torch.Tensor, rows: torch.Tensor, new: torch.Tensor) -> torch.Tensor:
    return aten.select_scatter.default(cache, new[:, 0] * 2, 1, -1)


def _run(step: Step) -> Lowered:
    """Check the results and the mutation of `step`, as lowered and as scheduled; what it lowered to."""
    args = (torch.randn(3, 6), torch.tensor([4, 1]), torch.randn(3, 2))
    lowered = lower_function(step, args)
    assert set(library_calls(lowered)) <= {"aten::copy_.default"}
    _check(step, args, lowered)
    _check(step, args, schedule(lower_function(step, args)))
    return lowered


def _check(step: Step, args: tuple[torch.Tensor, ...], lowered: Lowered) -> None:
    expected, actual = (tuple(a.clone() for a in args) for _ in range(2))
    want = step(*expected)
    got = run_lowered(lowered, dict(zip(lowered.inputs, actual, strict=True)))
    for g, w in zip(got, want if isinstance(want, tuple) else (want,), strict=True):
        assert_same(g, w)
    assert_same(actual[0], expected[0])


def _written_elements(lowered: Lowered) -> int:
    sizes = []
    for step in lowered.steps:
        assert isinstance(step, Region)
        count = 1
        for s in step.nest.points:
            assert isinstance(s.size, int)
            count *= s.size
        sizes.append(count)
    return sum(sizes)


@pytest.mark.parametrize("update", [_index_put, _index_copy, _slice, _own_slice, _select])
def test_only_the_changed_part_is_written(update: Step) -> None:
    def step(cache: torch.Tensor, rows: torch.Tensor, new: torch.Tensor) -> torch.Tensor:
        changed = update(cache, rows, new)
        read = changed.sin()
        aten.copy_.default(cache, changed)
        return read

    lowered = _run(step)
    assert _written_elements(lowered) <= 6 + 18  # the changed part and the result


@pytest.mark.parametrize("update", [_index_put, _slice])
def test_old_contents_wanted_by_an_expression_are_stored_first(update: Step) -> None:
    def step(cache: torch.Tensor, rows: torch.Tensor, new: torch.Tensor) -> torch.Tensor:
        old = cache * 2
        changed = update(cache, rows, new)
        result = old + changed
        aten.copy_.default(cache, changed)
        return result

    _run(step)


@pytest.mark.parametrize("update", [_index_put, _slice, _select])
def test_old_contents_wanted_through_a_view_forbid_it(update: Step) -> None:
    def step(cache: torch.Tensor, rows: torch.Tensor, new: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        view, parts = cache.t(), cache.split(2, 1)
        changed = update(cache, rows, new)
        result = view.t() + changed, parts[1] + changed[:, :2]
        aten.copy_.default(cache, changed)
        return result

    _run(step)


def test_an_update_that_reads_elsewhere_is_not_done_in_place() -> None:
    def step(cache: torch.Tensor, rows: torch.Tensor, new: torch.Tensor) -> torch.Tensor:
        changed = aten.slice_scatter.default(cache, cache[:, 1:3] + new, 1, 2, 4)
        aten.copy_.default(cache, changed)
        return new + 1

    _run(step)


def test_two_updates_of_one_cache() -> None:
    def step(cache: torch.Tensor, rows: torch.Tensor, new: torch.Tensor) -> torch.Tensor:
        changed = _slice(_index_put(cache, rows, new), rows, new)
        aten.copy_.default(cache, changed)
        return changed.exp()

    _run(step)
