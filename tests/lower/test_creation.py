"""Tensors made from nothing, casts and random numbers."""

from __future__ import annotations

import math

import pytest
import torch

from fxopt.ir import random_ops
from fxopt.ir.loops import Op, postorder
from fxopt.lower.schedule import schedule
from tests.lower.harness import check, lower, outputs

DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.int64, torch.uint8, torch.bool)


@pytest.mark.parametrize("dtype", DTYPES)
def test_constants(dtype):
    x = torch.ones(2, 3, dtype=dtype)
    check(
        lambda v: (torch.zeros_like(v), torch.ones_like(v), torch.full_like(v, 1), v.new_full((4,), 1), v.new_zeros(2, 2)), x
    )
    check(lambda v: (v, torch.zeros(3, dtype=dtype), torch.ones((), dtype=dtype), torch.full((2, 1), 1, dtype=dtype)), x)


def test_constants_of_odd_values():
    x = torch.rand(2)
    check(lambda v: (v * 2, torch.full((2,), math.nan), torch.full((2,), -math.inf), torch.full((2,), True)), x)
    check(lambda v, s: (torch.fill(v, s), torch.fill(v, 3)), x, torch.tensor(2.5))


def test_constants_take_the_layout_of_their_model():
    check(lambda v: torch.zeros_like(v), torch.rand(2, 3, 4, 5).to(memory_format=torch.channels_last))


def test_uninitialised_tensors_have_the_right_form():
    (got,) = outputs(lambda v: torch.empty_like(v) * 0 + v, torch.rand(3, 4))
    assert got.shape == (3, 4)


@pytest.mark.parametrize("limits", [(0, 7, 1), (3, -8, -2), (-5, 5, 3), (0.5, 3.0, 0.3), (1, 2, 0.25), (0, 0, 1)])
def test_ranges(limits):
    for dtype in (None, torch.float64, torch.float32):
        check(lambda v, d=dtype: (v.neg(), torch.arange(*limits, dtype=d)), torch.rand(1))


def test_long_ranges_do_not_drift():
    """In float32, start + i * step loses the last digits of i * step; eager keeps them."""
    (got,) = outputs(lambda v: torch.arange(0.0, 1e4, 0.1) + 0 * v, torch.zeros(1))
    torch.testing.assert_close(got, torch.arange(0.0, 1e4, 0.1), rtol=2e-7, atol=0)


@pytest.mark.parametrize("steps", [1, 2, 7, 50])
def test_linspace(steps):
    x = torch.zeros(1)
    check(lambda v: (v.neg(), torch.linspace(-2.0, 11.0, steps), torch.linspace(5, -3, steps, dtype=torch.float64)), x)


def test_diagonals_and_triangles():
    check(lambda v: (v.neg(), torch.eye(4), torch.eye(2, 5, dtype=torch.int64)), torch.rand(1))
    x = torch.rand(2, 4, 3)
    check(lambda v: (v.tril(), v.triu(), v.tril(-1), v.triu(2)), x)
    check(lambda v: v.tril(1), torch.rand(5, 5).t())


@pytest.mark.parametrize("source", DTYPES)
@pytest.mark.parametrize("target", DTYPES)
def test_casts(source, target):
    values = torch.tensor([0.0, 1.0, 2.75, 3.5, 100.25])
    check(lambda v: v.to(target, copy=True), values.to(source))


def test_casts_of_special_values():
    x = torch.tensor([0.0, -0.0, math.inf, math.nan, -2.5, 1e30])
    check(lambda v: (v.bool(), v.double(), v.bfloat16()), x)


def test_a_copy_broadcasts_and_converts():
    copy = torch.ops.aten.copy.default
    check(lambda v, s: copy(v, s), torch.zeros(2, 3, dtype=torch.float64), torch.tensor([1, 2, 3]))


# ---------------------------------------------------------------------- random numbers


@pytest.mark.parametrize("seed", [0, 12345, -(2**60)])
def test_random_numbers_are_those_of_eager(seed):
    s = torch.tensor(seed)
    for fn in (
        lambda v: random_ops.rand(v, [3, 5]),
        lambda v: random_ops.randint(v, -4, 9, [2, 7]),
        lambda v: random_ops.rand(v, [2, 3]).t() * 2,
    ):
        torch.testing.assert_close(outputs(fn, s)[0], fn(s), rtol=0, atol=0)
    torch.testing.assert_close(outputs(lambda v: random_ops.randn(v, [40]), s)[0], random_ops.randn(s, [40]))


def test_a_range_that_kernels_cannot_draw_from_is_left_to_eager():
    with pytest.raises(AssertionError, match="randint"):
        outputs(lambda v: random_ops.randint(v, -(2**63), 2**63 - 1, [3]), torch.tensor(1))


@pytest.mark.parametrize("half", [torch.bfloat16, torch.float16])
def test_a_cast_to_a_half_type_rounds(half: torch.dtype) -> None:
    """As in memory, whatever is fused around it: what a value loses by it is a value too."""
    x = torch.linspace(-3.0, 3.0, 101) ** 3

    def parts(x: torch.Tensor) -> tuple[torch.Tensor, ...]:
        high = x.to(half)
        return high, (x - high.float()).to(half), x == high.float(), high.long(), (x * 2).to(half).float()

    for got, want in zip(outputs(parts, x), parts(x), strict=True):
        assert torch.equal(got, want)


def test_a_stored_cast_is_rounded_once() -> None:
    """In the store; a round trip before it would be work for nothing."""
    (region,) = schedule(lower(lambda x: x.bfloat16(), (torch.randn(8),))).steps
    assert not any(isinstance(n, Op) and n.name == "bitcast" for n in postorder(region.nest.roots))
