"""The order in which kernels take their elements: turned where the L2 cache holds only the end of what was touched."""

from __future__ import annotations

import torch
from torch import Tensor

from fxopt.ir.region import Region
from fxopt.lower.direction import FITS_IN_CACHE
from fxopt.lower.schedule import schedule
from tests.lower.capturing import moved
from tests.lower.harness import lower


def directions(rows: int, device: str = "cuda") -> list[tuple[bool, bool]]:
    """(backwards, reread) of channels' statistics and of what is made with them, over `rows` x 8 x 512 float32 elements."""

    def fn(x: Tensor) -> Tensor:
        return x - x.mean((0, 2), keepdim=True)

    steps = schedule(moved(lower(fn, (torch.empty(rows, 8, 512),)), device)).steps
    return [(s.backwards, s.reread) for s in steps if isinstance(s, Region)]


def test_what_is_larger_than_the_cache_is_read_from_its_end() -> None:
    assert directions(4096) == [(False, True), (True, False)]


def test_what_the_cache_holds_is_read_as_before() -> None:
    assert directions(FITS_IN_CACHE // (4096 * 8)) == [(False, False), (False, False)]
    assert directions(4096, "cpu") == [(False, False), (False, False)]


def test_what_a_library_call_reads_next_stays_in_the_cache() -> None:
    """Many programs of one kernel would otherwise ask the cache to drop what they store."""

    def fn(x: Tensor, weight: Tensor) -> Tensor:
        return torch.softmax(x, 1) @ weight

    steps = schedule(moved(lower(fn, (torch.empty(1024, 65536), torch.empty(65536, 8))), "cuda")).steps
    (region,) = (s for s in steps if isinstance(s, Region))
    assert region.reread and not region.backwards
