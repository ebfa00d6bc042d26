"""Gradients of group norms by the kernel whose programs hold whole groups: values as close to float64 as eager's."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from fxopt.lower import Lowered, group_sums
from fxopt.lower.ways import replaced
from tests.lower.contracting import alternatives
from tests.numerics import assert_closer, to_float64

pytestmark = [pytest.mark.gpu, pytest.mark.usefixtures("fresh_cache")]


def step(norm: Callable[..., Tensor], x: Tensor, weight: Tensor, bias: Tensor, groups: int) -> tuple[Tensor | None, ...]:
    """The result and the gradients of a norm's arguments."""
    own = [t.detach().clone().requires_grad_() for t in (x, weight, bias)]
    out = norm(own[0], groups, own[1], own[2])
    out.backward(x.cos())
    return out.detach(), *(t.grad for t in own)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    ("images", "channels", "groups", "space"),
    [(64, 32, 8, 1024), (300, 32, 8, 50), (2048, 64, 8, 16), (16, 256, 32, 2048)],
)
def test_gradients_in_one_kernel(
    images: int, channels: int, groups: int, space: int, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    together, seen = group_sums.with_group_sums, []

    def always(lowered: Lowered) -> Lowered:
        low = together(lowered)
        seen.extend(alternatives(low))
        return replaced(low, {each.name: each.ways[1] for each in alternatives(low)})

    monkeypatch.setattr(group_sums, "with_group_sums", always)
    monkeypatch.setattr(group_sums, "LEAST_BYTES", 0)
    torch.compiler.reset()
    x, weight, bias = (
        torch.randn(shape, device="cuda", dtype=dtype) for shape in ((images, channels, space), channels, channels)
    )
    actual = step(torch.compile(F.group_norm, backend="fxopt"), x, weight, bias, groups)
    assert len(seen) == 1
    wide = to_float64((x, weight, bias))
    assert_closer(actual, step(F.group_norm, x, weight, bias, groups), step(F.group_norm, *wide, groups))
