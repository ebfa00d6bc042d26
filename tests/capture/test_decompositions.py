"""Decompositions that fxopt has of its own, because torch's lose accuracy."""

from __future__ import annotations

import pytest
import torch

from fxopt.capture.decompositions import decompositions
from tests.numerics import assert_closer

aten = torch.ops.aten


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("reduction", [0, 1, 2])
def test_the_gradient_of_a_wide_soft_margin(dtype: torch.dtype, reduction: int) -> None:
    x, target = torch.linspace(10, 30, 16, dtype=dtype), torch.ones(16, dtype=dtype)
    op = aten.soft_margin_loss_backward.default
    grad = torch.ones((16,) if reduction == 0 else (), dtype=dtype)
    exact = op(grad.double(), x.double(), target.double(), reduction)
    got, eager = (f(grad, x, target, reduction) for f in (decompositions()[op], op))
    assert_closer(got, eager, exact)
    assert float((got / exact - 1).abs().max()) < 4 * torch.finfo(dtype).eps
