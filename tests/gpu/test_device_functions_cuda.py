"""Device functions written in PTX, which Triton's interpreter does not run."""

from __future__ import annotations

import pytest
import torch

pytestmark = pytest.mark.gpu


def test_a_normal_distribution() -> None:
    """1 + erf(x) to one unit in the last place of its largest value, 2: half a unit more than in the interpreter
    (`test_triton_values.py`), since the GPU's 2^x is not rounded correctly."""
    x = torch.linspace(-7, 7, 4096, device="cuda")
    actual = torch.compile(lambda x: 1 + torch.erf(x), backend="fxopt")(x)
    error = (actual.double() - 1 - torch.special.erf(x.double())).abs()
    assert error[:2048].max() < 1.2e-7 and error[2048:].max() < 2.4e-7


def test_a_normal_distribution_at_its_ends() -> None:
    x = torch.tensor([0.0, -0.0, float("inf"), -float("inf"), float("nan"), 100.0, -100.0], device="cuda").repeat(300)
    actual = torch.compile(lambda x: 1 + torch.erf(x), backend="fxopt")(x)
    torch.testing.assert_close(actual, 1 + torch.erf(x), equal_nan=True)
