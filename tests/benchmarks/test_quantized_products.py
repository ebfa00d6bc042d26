"""The benchmark of quantized products: every layer computes what its exact form does, and a case has times and errors."""

from __future__ import annotations

import pytest
import torch

pytest.importorskip("triton")

from benchmarks.quantized_products import FORMS, GROUP, Case, error, exact, measured, summing
from fxopt.ir import quantized_ops

SMALL = Case("small", 5, 2 * GROUP, 24, "silu-gate")
CPU = torch.device("cpu")


@pytest.mark.parametrize("name", FORMS)
def test_layers_are_their_exact_forms(name: str) -> None:
    x, weight = torch.randn(5, SMALL.inner).bfloat16(), torch.randn(24, SMALL.inner).bfloat16()
    bias, residual = torch.randn(24).bfloat16(), torch.randn(5, 24).bfloat16()
    layer = FORMS[name](SMALL, weight, bias)
    assert error(layer(x, residual), exact(layer, x, residual)) < 0.01
    unquantized = FORMS["bf16"](SMALL, weight, bias)
    assert error(layer(x, residual), exact(unquantized, x, residual)) < 0.5


def test_a_case_has_times_and_errors() -> None:
    found = measured(SMALL, CPU, 0.01, None, ("bf16", "int4-weight"))["contenders"]
    assert set(found) == {"bf16", "int4-weight"}
    assert all(each["seconds"] > 0 and each["error"] < 0.01 for each in found.values())


def test_how_sums_are_kept_is_restored() -> None:
    before = quantized_ops.LONGEST_IMPRECISE_SUM
    with summing(0):
        assert quantized_ops.LONGEST_IMPRECISE_SUM == 0
    assert before == quantized_ops.LONGEST_IMPRECISE_SUM
