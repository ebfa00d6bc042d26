"""The benchmark of quantized convolutions: every form computes what its exact form does, and cases have times and errors."""

from __future__ import annotations

import pytest
import torch

pytest.importorskip("triton")

from benchmarks.quantized_convolutions import FORMS, Case, measured, totals

CPU = torch.device("cpu")


@pytest.mark.parametrize("case", [Case(6, 16, 32, 3, 2, False, 1), Case(5, 32, 32, 1, 1, True, 3)], ids=lambda c: c.name)
def test_a_case_has_times_and_errors(case: Case) -> None:
    entry = measured(case, 2, CPU, 0.01, None, tuple(FORMS))
    found = entry["contenders"]
    assert set(found) == set(FORMS) and not entry["failed"]
    assert all(each["seconds"] > 0 for each in found.values())
    assert found["float16"]["error"] < 1e-3 and max(each["error"] for each in found.values()) < 0.05
    assert totals([entry])["int8"] == case.count * found["int8"]["seconds"]
