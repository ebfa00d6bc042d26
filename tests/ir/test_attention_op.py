"""The attention op: eager's own values, layouts as fused kernels give them, autocast as on eager's attention."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch._subclasses.fake_tensor import FakeTensorMode

from fxopt.ir.attention_op import attention

HEADS_LAST = torch.randn(2, 7, 3, 8).transpose(1, 2)
PACKED = torch.randn(2, 7, 3, 24)[..., :8].transpose(1, 2)


@pytest.mark.parametrize("query", [torch.randn(2, 3, 7, 8), HEADS_LAST, PACKED], ids=["dense", "heads last", "packed"])
@pytest.mark.parametrize("options", [{}, {"is_causal": True}, {"scale": 0.3}, {"attn_mask": torch.ones(7, 7).tril().bool()}])
def test_values_and_layout_are_eagers(query: torch.Tensor, options: dict[str, Any]) -> None:
    key, value = torch.randn(2, 3, 7, 8), torch.randn(2, 3, 7, 8)
    want = F.scaled_dot_product_attention(query, key, value, **options)
    assert torch.equal(attention(query, key, value, **options), want)
    with FakeTensorMode() as mode:
        fake = attention(*(mode.from_tensor(x) for x in (query, key, value)))
    assert fake.shape == want.shape
    assert fake.stride() == want.stride()


def test_torch_finds_no_fault_with_the_registration() -> None:
    for dtype in (torch.float32, torch.bfloat16):
        args = tuple(torch.randn(2, 3, 7, 8).to(dtype) for _ in range(3))
        torch.library.opcheck(attention, args, test_utils=("test_schema", "test_faketensor", "test_aot_dispatch_static"))


def test_the_memory_efficient_layout_of_float32_on_cuda() -> None:
    with FakeTensorMode():
        q, k, v = (torch.empty(2, 3, 7, 8, device="cuda") for _ in range(3))
        assert attention(q, k, v).stride() == (7 * 3 * 8, 8, 3 * 8, 1)
        assert attention(q.half(), k.half(), v.half()).stride() == q.stride()


def test_grouped_queries_and_wide_values_have_their_shape() -> None:
    q, k, v = torch.randn(2, 4, 7, 8), torch.randn(2, 2, 5, 8), torch.randn(2, 2, 5, 6)
    want = F.scaled_dot_product_attention(q, k, v, enable_gqa=True)
    with FakeTensorMode() as mode:
        fake = attention(*(mode.from_tensor(x) for x in (q, k, v)), enable_gqa=True)
    assert fake.shape == want.shape == attention(q, k, v, enable_gqa=True).shape


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.float64])
def test_autocast_casts_what_it_casts_for_eager(dtype: torch.dtype) -> None:
    q, k, v = (torch.randn(2, 3, 7, 8).to(dtype) for _ in range(3))
    mask = torch.randn(7, 7).to(dtype)
    with torch.autocast("cpu", torch.bfloat16):
        got, want = attention(q, k, v, mask), F.scaled_dot_product_attention(q, k, v, mask)
    assert got.dtype == want.dtype == (dtype if dtype == torch.float64 else torch.bfloat16)
    assert torch.equal(got, want)


def test_the_result_is_fresh_memory() -> None:
    """Over one key the weights are all one, and a decomposed attention might hand out its value."""
    q, k, v = torch.randn(1, 1, 1, 4), torch.randn(1, 1, 1, 4), torch.randn(1, 1, 1, 4)
    assert attention(q, k, v).data_ptr() != v.data_ptr()
