"""The benchmark of attention that is written out: its cases are found, and compiled each by itself."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from benchmarks.written_attention import CASES, Case, capped, copy_of
from fxopt.ir.region import Alternatives
from tests.lower.test_attention_kernels import searched


@pytest.mark.parametrize("case", [CASES[0], CASES[-1]], ids=lambda c: c.name)
def test_products_and_softmax_are_found(case: Case) -> None:
    low = searched(case.attend, *replace(case, rows=16, keys=32, width=16).inputs(torch.device("cpu")))
    assert sum(isinstance(s, Alternatives) for s in low.steps) == 1


def test_copies_have_code_of_their_own() -> None:
    one, two = (copy_of(capped, name) for name in ("one", "two"))
    assert one.__code__ is not two.__code__
    q, mask = torch.randn(1, 2, 3, 4), torch.zeros(3, 3)
    assert torch.equal(one(q, q, q, mask), capped(q, q, q, mask))
