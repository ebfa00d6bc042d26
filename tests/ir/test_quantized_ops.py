"""Ops of quantized products: what they compute, how weights are packed, and what they refuse."""

from __future__ import annotations

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from fxopt.ir.quantized_ops import (
    DEQUANTIZE,
    QUANTIZE_WEIGHT,
    SCALED_MM,
    WEIGHT_ONLY_MM,
    dequantized,
    unpacked,
)

FLOAT8 = torch.float8_e4m3fn
FORMS = [(FLOAT8, 8, 0), (torch.int8, 8, 0), (torch.uint8, 4, 16), (torch.uint8, 4, 0)]


@pytest.mark.parametrize(("dtype", "bits", "group"), FORMS)
def test_a_quantized_weight_is_within_half_a_step(dtype: torch.dtype, bits: int, group: int) -> None:
    weight = torch.randn(24, 48, generator=torch.Generator().manual_seed(0)) * torch.logspace(-3, 3, 24)[:, None]
    stored, scale = QUANTIZE_WEIGHT(weight, dtype, bits, group)
    assert stored.dtype == dtype
    assert scale.dtype == torch.float32
    back = dequantized(stored, scale, bits, group)
    step = scale[:, None] if bits == 8 else scale.repeat_interleave(48 // scale.shape[1], 1)
    allowed = weight.abs() / 16 + step / 2 if dtype == FLOAT8 else step * 0.5001
    assert ((back - weight).abs() <= allowed).all()
    largest = back.reshape(24, scale.numel() // 24, -1).abs().amax(-1)
    assert torch.allclose(largest, weight.reshape(24, scale.numel() // 24, -1).abs().amax(-1), rtol=1e-6)


def test_the_halves_of_a_byte_are_half_a_row_apart() -> None:
    weight = torch.arange(-7.0, 7.0)[None, :]  # 14 values whose scale is 1
    stored, scale = QUANTIZE_WEIGHT(weight, torch.uint8, 4, 0)
    assert scale.tolist() == [[1.0]]
    assert (stored & 15).tolist() == [[1, 2, 3, 4, 5, 6, 7]]
    assert (stored >> 4).tolist() == [[8, 9, 10, 11, 12, 13, 14]]
    assert torch.equal(unpacked(stored), weight.to(torch.int8))


@pytest.mark.parametrize(("dtype", "bits", "group"), FORMS)
def test_zero_and_bad_channels(dtype: torch.dtype, bits: int, group: int) -> None:
    weight = torch.ones(4, 32)
    weight[0] = 0
    weight[1, 3] = float("nan")
    weight[2] = 1e-44  # below the least normal number once it is divided
    stored, scale = QUANTIZE_WEIGHT(weight, dtype, bits, group)
    back = dequantized(stored, scale, bits, group)
    assert (scale[0] == 1).all()
    assert torch.equal(back[0], torch.zeros(32))
    assert back[1, : group or 32].isnan().all()
    assert back[2].abs().max() < 1e-37
    assert torch.allclose(back[3], torch.ones(32))


@pytest.mark.parametrize("out_dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("per_row", [False, True])
@pytest.mark.parametrize("dtype", [FLOAT8, torch.int8])
def test_scaled_products_are_those_of_float64(dtype: torch.dtype, per_row: bool, out_dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(1)
    a = torch.randint(-100, 100, (5, 33), generator=generator).float().to(dtype)
    b = torch.randint(-100, 100, (7, 33), generator=generator).float().to(dtype)
    scale_a = torch.rand(5, generator=generator) if per_row else torch.tensor(0.02)
    scale_b, bias = torch.rand(7, generator=generator), torch.randn(7, generator=generator)
    got = SCALED_MM(a, b, scale_a, scale_b, bias, out_dtype)
    rows = scale_a[:, None] if per_row else scale_a
    want = a.double() @ b.double().t() * rows.double() * scale_b.double() + bias
    assert got.dtype == out_dtype
    torch.testing.assert_close(got, want.to(out_dtype), rtol=1e-5 if out_dtype == torch.float32 else 2**-7, atol=1e-3)


@pytest.mark.parametrize(("dtype", "bits", "group"), FORMS)
def test_weight_only_products_are_those_of_float64(dtype: torch.dtype, bits: int, group: int) -> None:
    generator = torch.Generator().manual_seed(2)
    x, weight = torch.randn(3, 48, generator=generator).bfloat16(), torch.randn(20, 48, generator=generator)
    stored, scale = QUANTIZE_WEIGHT(weight, dtype, bits, group)
    bias = torch.randn(20, generator=generator)
    got = WEIGHT_ONLY_MM(x, stored, scale, bias, bits, group)
    want = x.double() @ dequantized(stored, scale, bits, group).double().t() + bias
    assert got.dtype == torch.bfloat16
    torch.testing.assert_close(got.double(), want, rtol=2**-8, atol=1e-5)


def test_fake_results_have_the_shapes_of_real_ones() -> None:
    with FakeTensorMode() as mode:
        weight = mode.from_tensor(torch.randn(16, 32))
        for dtype, bits, group in FORMS:
            stored, scale = QUANTIZE_WEIGHT(weight, dtype, bits, group)
            real = QUANTIZE_WEIGHT(torch.zeros(16, 32), dtype, bits, group)
            assert [(t.shape, t.dtype) for t in (stored, scale)] == [(t.shape, t.dtype) for t in real]
            x = mode.from_tensor(torch.randn(3, 32).half())
            assert WEIGHT_ONLY_MM(x, stored, scale, None, bits, group).shape == (3, 16)
        a = mode.from_tensor(torch.zeros(3, 32, dtype=torch.int8))
        b = mode.from_tensor(torch.zeros(16, 32, dtype=torch.int8))
        out = SCALED_MM(a, b, mode.from_tensor(torch.ones(3)), mode.from_tensor(torch.ones(())), None, torch.float16)
        assert (out.shape, out.dtype) == ((3, 16), torch.float16)


def test_torch_finds_no_fault_with_the_registration() -> None:
    ones, tests = torch.ones(()), ("test_schema", "test_faketensor")
    a, b = torch.ones(3, 16, dtype=torch.int8), torch.ones(8, 16, dtype=torch.int8)
    torch.library.opcheck(SCALED_MM, (a, b, ones, ones, None, torch.bfloat16), test_utils=tests)
    torch.library.opcheck(QUANTIZE_WEIGHT, (torch.randn(8, 16), torch.uint8, 4, 8), test_utils=tests)
    torch.library.opcheck(WEIGHT_ONLY_MM, (torch.randn(3, 16), b, torch.ones(8), None, 8, 0), test_utils=tests)
    torch.library.opcheck(DEQUANTIZE, (b.t(), ones, torch.bfloat16), test_utils=tests)


def test_what_is_refused() -> None:
    weight, ones = torch.randn(8, 16), torch.ones(())
    for dtype, bits, group in ((torch.int8, 4, 0), (torch.int8, 8, 5), (torch.uint8, 4, 5), (torch.int16, 8, 0)):
        with pytest.raises(ValueError):
            QUANTIZE_WEIGHT(weight, dtype, bits, group)
    a = torch.ones(3, 16, dtype=torch.int8)
    for other, scale, bias, out_dtype in (
        (a.to(FLOAT8), ones, None, torch.float32),
        (a[:, :8], ones, None, torch.float32),
        (a, torch.ones(2), None, torch.float32),
        (a, ones, torch.ones(2), torch.float32),
        (a, ones, None, torch.int32),
    ):
        with pytest.raises(ValueError):
            SCALED_MM(a, other, scale, ones, bias, out_dtype)
    for bits, scale in ((4, torch.ones(8)), (8, torch.ones(8, 1)), (3, torch.ones(8))):
        with pytest.raises(ValueError):
            WEIGHT_ONLY_MM(weight, a.new_ones(8, 16), scale, None, bits, 0)
    for values, scale, dtype in ((weight, ones, torch.float16), (a, torch.ones(3), torch.float16), (a, ones, torch.int32)):
        with pytest.raises(ValueError):
            DEQUANTIZE(values, scale, dtype)
