"""Attention written out by hand on a GPU: rows hidden throughout are eager's with whatever backend is chosen."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from tests.passes.test_hand_attention import added, compiled, filled

pytestmark = pytest.mark.gpu
S, E = 24, 64


def operands(dtype: torch.dtype) -> list[Tensor]:
    generator = torch.Generator("cuda").manual_seed(0)
    return [torch.randn(2, 3, S, E, device="cuda", dtype=dtype, generator=generator) for _ in range(3)]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("value", [-math.inf, -1e9])
@pytest.mark.parametrize("fn", [added, filled])
def test_hidden_rows(fn: Callable[..., Tensor], value: float, dtype: torch.dtype) -> None:
    hidden = (torch.arange(S, device="cuda") == 3)[:, None] | torch.ones(S, S, device="cuda", dtype=torch.bool).triu(1)
    q, k, v = operands(dtype)

    def call(q: Tensor, k: Tensor, v: Tensor, hidden: Tensor) -> Tensor:
        if fn is filled:
            return filled(q, k, v, hidden, value)
        return added(q, k, v, torch.zeros(S, S, device="cuda", dtype=q.dtype).masked_fill(hidden, value))

    result, count, reasons = compiled(call, q, k, v, hidden)
    assert count == 1, reasons
    tolerance = 1e-5 if dtype == torch.float32 else 2e-2
    torch.testing.assert_close(result, call(q, k, v, hidden), equal_nan=True, atol=tolerance, rtol=tolerance)
