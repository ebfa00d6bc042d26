"""What joins two partial results of a reduction, or one with an element."""

# mypy: disable-error-code="no-untyped-def,no-untyped-call,misc,untyped-decorator"

from __future__ import annotations

import triton
import triton.language as tl

from fxopt.codegen.triton_helpers.arithmetic import divide, inverse
from fxopt.codegen.triton_helpers.interpreter import INTERPRETED


@triton.jit
def product(a, b):
    return a * b


@triton.jit
def addition(a, b):
    return a + b


@triton.jit
def either(a, b):
    return a | b


@triton.jit
def both(a, b):
    return a & b


@triton.jit
def three_sums(a, b, c, d, e, f):
    return a + d, b + e, c + f


@triton.jit
def run_sums(block, RUN: tl.constexpr):
    """The sums of RUN neighbours each in the rows of a block [R, C]: [R, C / RUN]."""
    return tl.sum(tl.reshape(block, [block.shape[0], block.shape[1] // RUN, RUN]), 2)


@triton.jit
def run_ends(numbers, RUN: tl.constexpr):
    """The last of RUN rising numbers each, of [1, C]: [1, C / RUN]."""
    return tl.max(tl.reshape(numbers, [1, numbers.shape[1] // RUN, RUN]), 2)


@triton.jit
def group_sum(x, SIZE: tl.constexpr):
    """Of a column [n, 1], the sum over each SIZE neighbours, for all of these."""
    groups: tl.constexpr = x.shape[0] // SIZE
    total = tl.sum(tl.reshape(x, [groups, SIZE]), 1, keep_dims=True)
    return tl.reshape(tl.broadcast_to(total, [groups, SIZE]), [groups * SIZE, 1])


@triton.jit
def arg_max(a, i, b, j):
    """The (value, index) pair that comes first: NaN, then the larger value, then the smaller index."""
    a_nan = a != a
    b_nan = b != b
    tie = (a == b) | (a_nan & b_nan)
    first = (a_nan & (b == b)) | ((a > b) & (b == b)) | (tie & (i < j))
    return tl.where(first, a, b), tl.where(first, i, j)


@triton.jit
def arg_min(a, i, b, j):
    """The (value, index) pair that comes first: NaN, then the smaller value, then the smaller index."""
    a_nan = a != a
    b_nan = b != b
    tie = (a == b) | (a_nan & b_nan)
    first = (a_nan & (b == b)) | ((a < b) & (b == b)) | (tie & (i < j))
    return tl.where(first, a, b), tl.where(first, i, j)


_LARGER_PLACE = (
    "{{ .reg .b32 larger, nan; set.gt.u32.{0}x2 larger, $1, $2; set.nan.u32.{0}x2 nan, $1, $1; or.b32 larger, larger, nan;"
    " lop3.b32 $0, larger, $3, $4, 0xCA; }}"
)


BFLOAT16_LARGER_PLACE = tl.constexpr(_LARGER_PLACE.format("bf16"))


FLOAT16_LARGER_PLACE = tl.constexpr(_LARGER_PLACE.format("f16"))


@triton.jit
def each_larger_place(value, top, PLACE: tl.constexpr, other, HALF: tl.constexpr):
    """PLACE where `value` is larger than `top` or NaN, else `other`, an int32."""
    return tl.where((value > top) | (value != value), PLACE, other)


@triton.jit
def larger_place(value, top, PLACE: tl.constexpr, other, HALF: tl.constexpr):
    """As `each_larger_place`, two at a time, of float32 that hold values of HALF, and numbers that fit 16 bits."""
    if INTERPRETED or value.numel % 2 != 0:
        return each_larger_place(value, top, PLACE, other, HALF)
    else:
        asm: tl.constexpr = BFLOAT16_LARGER_PLACE if tl.bfloat16 == HALF else FLOAT16_LARGER_PLACE
        args = [value.to(HALF), top.to(HALF), tl.full([], PLACE, tl.int16), other.to(tl.int16)]
        return tl.inline_asm_elementwise(asm, "=r,r,r,r,r", args, dtype=tl.int16, is_pure=True, pack=2).to(tl.int32)


@triton.jit
def welford(mean_a, m2_a, n_a, mean_b, m2_b, n_b):
    """Joins two (mean, sum of squared distances, count); Chan, Golub and LeVeque 1979."""
    n = n_a + n_b
    share = tl.where(n == 0.0, 0.0, n_b / tl.where(n == 0.0, 1.0, n))
    delta = mean_b - mean_a
    mean = tl.where(share == 1.0, mean_b, mean_a + delta * share)
    return mean, m2_a + m2_b + tl.where(n_a == 0.0, 0.0, delta * delta * n_a * share), n


@triton.jit
def welford_step(mean, m2, x, count):
    """(mean, sum of squared distances) with `x` added as element number `count` (a scalar); Welford 1962."""
    delta = x - mean
    if count.dtype == tl.float32:
        share = inverse(count)
    else:
        share = divide(tl.full([], 1.0, count.dtype), count)
    mean += delta * share
    return mean, m2 + delta * (x - mean)
