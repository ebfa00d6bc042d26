"""The benchmark of grouped products: its layer is what it says, and its exact values are eager's."""

from __future__ import annotations

import pytest
import torch

pytest.importorskip("triton")

from benchmarks import grouped_products
from benchmarks.grouped_products import Case, experts, measured, operands
from fxopt.report.contenders import pick

SMALL = Case("small", 9, 2, 4, 32, 16)


def test_rows_are_spread_over_all_experts() -> None:
    x, *_, ends = operands(SMALL, torch.device("cpu"), torch.bfloat16)
    assert len(x) == ends[-1] == 18 and len(ends) == 4
    assert experts(*operands(SMALL, torch.device("cpu"), torch.bfloat16)).shape == x.shape


def test_a_case_has_times_and_errors(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(grouped_products, "CONTENDERS", tuple(pick("eager")))
    entry = measured(SMALL, torch.device("cpu"), torch.bfloat16, 0.01)["contenders"]["eager"]
    assert entry["seconds"] > 0 and 0 < entry["error over allowed"] < 1
