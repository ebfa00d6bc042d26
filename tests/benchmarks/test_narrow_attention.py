"""The benchmark of attention in 8 bits: its caches stand for what they were made of, its cases differ."""

from __future__ import annotations

import pytest
import torch

from benchmarks.narrow_attention import CASES, FP8, line, stored


@pytest.mark.parametrize(("dtype", "limit"), [(torch.int8, 0.012), (FP8, 0.04)])
@pytest.mark.parametrize("by_row", [False, True])
def test_caches_stand_for_their_values(dtype: torch.dtype, limit: float, by_row: bool) -> None:
    x = torch.randn(2, 3, 40, 16)
    values, scale = stored(x, dtype, by_row)
    assert values.dtype == dtype and tuple(scale.shape) == ((2, 3, 40, 1) if by_row else ())
    assert float((values.float() * scale - x).norm() / x.norm()) < limit


def test_cases_have_names_of_their_own() -> None:
    assert len({case.label for case in CASES}) == len(CASES)
    shown = line({"case": CASES[0].label, "us": {"half": 3.0}, "error": {"half": 0.01}})
    assert "half     3.0 us (1.0e-02)" in shown
