"""Products that were padded and are cut to size by what reads them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F

from fxopt.ir.region import Call, Contraction
from fxopt.lower.contractions import FUSED, LIBRARY
from tests.lower.contracting import alternatives, check_ways, searched

Fn = Callable[..., Any]


def half(*shape: int) -> torch.Tensor:
    return torch.randn(*shape).to(torch.bfloat16)


def logits(x: torch.Tensor, w: torch.Tensor) -> torch.Tensor:
    return (x @ F.pad(w, (0, 0, 0, 3)).t())[:, :13].clone(memory_format=torch.contiguous_format)


def with_bias(x: torch.Tensor, w: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    made = torch.addmm(F.pad(b, (0, 3)), x, F.pad(w, (0, 0, 0, 3)).t())
    return made[:, :13].relu() * 2


def ways(fn: Fn, *args: torch.Tensor) -> dict[str, tuple[Any, ...]]:
    found = alternatives(searched(fn, *args))
    return {way.label: way.steps for each in found for way in each.ways}


@pytest.mark.parametrize(("fn", "args"), [(logits, ()), (with_bias, (half(13),))])
def test_a_kernel_multiplies_what_counts(fn: Fn, args: tuple[torch.Tensor, ...]) -> None:
    """By the operand as it was: neither its padded copy nor a padded result exists."""
    given = half(48, 24), half(13, 24), *args
    found = ways(fn, *given)
    (fused,) = found[FUSED]
    assert isinstance(fused, Contraction)
    assert fused.sizes == (1, 48, 24, 13)
    assert fused.buffers[fused.b.buffer].shape == (13, 24)
    padded = {n for step in found[LIBRARY] if isinstance(step, Call) for n in step.outputs}
    assert not padded & {*fused.reads(), *fused.writes()}
    check_ways(fn, *given)


def test_a_padded_operand_with_other_readers_is_made_anyway() -> None:
    def fn(x: torch.Tensor, w: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        padded = F.pad(w, (0, 0, 0, 3))
        return (x @ padded.t())[:, :13].clone(memory_format=torch.contiguous_format), padded

    given = half(48, 24), half(13, 24)
    (fused,) = ways(fn, *given)[FUSED]
    assert fused.buffers[fused.b.buffer].shape == (16, 24)
    check_ways(fn, *given)


def _returned(x: torch.Tensor, w: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    made = x @ F.pad(w, (0, 0, 0, 3)).t()
    return made[:, :13].clone(memory_format=torch.contiguous_format), made


def _read_twice(x: torch.Tensor, w: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    made = x @ F.pad(w, (0, 0, 0, 3)).t()
    return made[:, :13].clone(memory_format=torch.contiguous_format), made.float().softmax(-1)


def _other_columns(x: torch.Tensor, w: torch.Tensor) -> torch.Tensor:
    return (x @ F.pad(w, (0, 0, 0, 3)).t())[:, 3:].clone(memory_format=torch.contiguous_format)


@pytest.mark.parametrize("fn", [_returned, _read_twice, _other_columns])
def test_a_result_that_is_wanted_elsewhere_stays_whole(fn: Fn) -> None:
    given = half(48, 24), half(13, 24)
    steps = [step for label, steps in ways(fn, *given).items() if label == FUSED for step in steps]
    assert all(step.sizes[3] == 16 for step in steps if isinstance(step, Contraction))
    check_ways(fn, *given)


def test_other_values_than_zeros_around_are_no_padding_of_these_rows() -> None:
    """The operand's first row lies in the second place: what it was copied from is not what is multiplied."""

    def fn(x: torch.Tensor, w: torch.Tensor) -> torch.Tensor:
        return (x @ F.pad(w, (0, 0, 1, 2)).t())[:, :13].clone(memory_format=torch.contiguous_format)

    given = half(48, 24), half(13, 24)
    for steps in ways(fn, *given).values():
        assert all(s.buffers[s.b.buffer].shape == (16, 24) for s in steps if isinstance(s, Contraction))
    check_ways(fn, *given)
