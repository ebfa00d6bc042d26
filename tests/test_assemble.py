"""From schedule to plan: what may share memory, and where sizes come from."""

from __future__ import annotations

import torch

from fxopt.assemble import in_place_pairs
from fxopt.lower.schedule import schedule
from tests.lower.test_schedule import lowered, rand, regions


def pairs(fn, *args: torch.Tensor) -> list[list[tuple[str, str]]]:  # type: ignore[no-untyped-def]
    return [list(in_place_pairs(region)) for region in regions(schedule(lowered(fn, *args)))]


def test_a_pointwise_result_may_overwrite_its_operand() -> None:
    assert pairs(lambda x: x * 2 + 1, rand(4, 6)) != [[]]


def test_an_operand_read_at_another_index_stays() -> None:
    assert pairs(lambda x: x + torch.ops.aten.permute.default(x, [1, 0]), rand(5, 5)) == [[]]


def test_a_row_that_is_read_again_after_a_store_stays() -> None:
    def fn(x: torch.Tensor, y: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        h = x + y
        return h, torch.softmax(h, -1)

    assert pairs(fn, rand(4, 6), rand(4, 6)) == [[]]
