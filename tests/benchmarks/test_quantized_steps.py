"""Kernels are put beside the steps that ran them, and limits are those of bytes and products."""

from __future__ import annotations

import pytest
import torch

from benchmarks.quantized_steps import Step, grouped, shown, steps_of, timed
from fxopt.ir.exprs import contiguous_strides
from fxopt.ir.region import BufferSpec
from fxopt.runtime.plan import Launch, Plan
from fxopt.target import Target

H100 = Target.cuda(90)


def test_what_lies_between_launches_belongs_to_the_call_there() -> None:
    steps = [Step("fx_norm", "", 0), Step("aten::mm.default", "", 0), Step("fx_gemm_add", "", 0), Step("aten::cat", "", 0)]
    timed(steps, [("fx_norm", 1.0), ("sm90_xmma_gemm", 2.0), ("splitKreduce", 3.0), ("fx_gemm_add", 4.0), ("copy", 5.0)])
    assert [s.us for s in steps] == [1.0, 5.0, 4.0, 5.0]


def test_a_limit_is_the_longer_time_of_bytes_and_products() -> None:
    bytes_alone = Step("fx_norm", "", 3_000_000)
    assert bytes_alone.limit(H100) == pytest.approx(1.0)
    half, eight = (Step("fx_gemm", "", 3000, [(4096, 4096, 4096, dtype)]) for dtype in (torch.bfloat16, torch.int8))
    assert half.limit(H100) == pytest.approx(2 * eight.limit(H100)) and half.limit(H100) > 100
    (line, other) = grouped([eight, bytes_alone, eight], H100)
    assert (line["step"], other["times"]) == ("fx_norm", 2)


def test_waiting_for_the_kernel_before_is_not_counted() -> None:
    assert shown([("a", 0.0, 10.0), ("b", 2.0, 9.0), ("c", 12.0, 1.0)]) == [("a", 10.0), ("b", 1.0), ("c", 1.0)]


def test_what_convolutions_multiply_and_gathers_read() -> None:
    device = torch.device("cuda", 0)

    def spec(name: str, dtype: torch.dtype, *shape: int) -> BufferSpec:
        return BufferSpec(name, dtype, device, shape, contiguous_strides(shape))

    image, weight = spec("x", torch.int8, 64, 32, 28, 28), spec("w", torch.int8, 64, 3, 3, 32)
    result, residual = spec("y", torch.int8, 64, 64, 14, 14), spec("r", torch.int8, 64, 64, 14, 14)
    table, rows, ids = spec("t", torch.float32, 30000, 8), spec("e", torch.float32, 16, 8), spec("i", torch.int64, 16)
    launches = (
        Launch("k", "triton", "fx_conv_max", ("x", "w", "r", "y"), ("y",), device),
        Launch("k", "triton", "fx_point_gather", ("t", "i", "e"), ("e",), device),
    )
    plan = Plan("test", (), (), (), (image, weight, result, residual, table, rows, ids), launches, ())
    convolution, gather = steps_of(plan)
    assert convolution.products == [(64 * 14 * 14, 9 * 32, 64, torch.int8)]
    assert gather.nbytes == 2 * 16 * 8 * 4 + 16 * 8


def test_weights_that_a_kernel_brings_for_a_later_one_are_read_by_that() -> None:
    device = torch.device("cuda", 0)
    row, weight, bias = (BufferSpec(n, torch.float32, device, (k,), (1,)) for n, k in (("x", 16), ("w", 4096), ("c", 16)))
    launches = (
        Launch("k", "triton", "fx_attention", ("x", "w"), (), device),
        Launch("k", "triton", "fx_row_sum", ("x", "w", "c"), (), device),
    )
    attention, product = steps_of(Plan("test", (), (weight,), (), (row, bias), launches, ()))
    assert (attention.nbytes, product.nbytes) == (16 * 4, (16 + 4096 + 16) * 4)
