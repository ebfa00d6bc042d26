"""Conversions to types of 8 and 16 bits and from them, where Triton's own differ from eager's or are slow."""

# mypy: disable-error-code="no-untyped-def,no-untyped-call,misc,untyped-decorator"

from __future__ import annotations

import triton
import triton.language as tl

from fxopt.codegen.triton_helpers.arithmetic import largest, smallest
from fxopt.codegen.triton_helpers.interpreter import INTERPRETED


@triton.jit
def nan_beyond_float8e4(x):
    """`x`, a float32, or NaN where rounding it to float8_e4m3fn would go beyond the largest value."""
    return tl.where(tl.abs(x) <= 464.0, x, float("nan"))


@triton.jit
def saturated_to_float8e4(x):
    """A float32 as float8_e4m3fn, the largest value of what is beyond it, NaN of NaN: what the GPU's conversion does."""
    if INTERPRETED:
        x = smallest(largest(x, -448.0), 448.0)
    return x.to(tl.float8e4nv)


@triton.jit
def to_float8e5(x):
    """A float32 as float8_e5m2, infinite beyond its largest value."""
    bits = x.to(tl.float8e5).to(tl.uint8, bitcast=True)
    infinite = tl.where(x < 0, 0xFC, 0x7C).to(tl.uint8)
    return tl.where(tl.abs(x) >= 61440.0, infinite, bits).to(tl.float8e5, bitcast=True)


@triton.jit
def rounded_to_int8(x, LOW: tl.constexpr, HIGH: tl.constexpr):
    """A float32 rounded to even, between LOW and HIGH, as int8; zero for NaN.

    Adding 1.5 * 2**23 rounds, and leaves the integer in the lowest bits: conversions to integers and from them have a
    quarter of the rate of other instructions, and are most of the time of an int8 product's epilogue. The bounds come after
    the sum, which may then be one instruction with a product before it, and make LOW of NaN.
    """
    moved = x + 12582912.0
    whole = tl.minimum(tl.maximum(moved, 12582912.0 + LOW), 12582912.0 + HIGH)
    bits = whole.to(tl.int32, bitcast=True)
    if LOW != 0:
        bits = tl.where(moved == moved, bits, 0)
    return bits.to(tl.int8)


SCALED_TO_INT8 = tl.constexpr("""{ .reg .f32 a, b, c, d; .reg .b32 p, q, r, s, high;
    mul.sat.f32 a, $1, $5;
    mul.sat.f32 b, $2, $6;
    mul.sat.f32 c, $3, $7;
    mul.sat.f32 d, $4, $8;
    fma.rn.f32 a, a, 0f00000080, 0f00000000;
    fma.rn.f32 b, b, 0f00000080, 0f00000000;
    fma.rn.f32 c, c, 0f00000080, 0f00000000;
    fma.rn.f32 d, d, 0f00000080, 0f00000000;
    mov.b32 p, a; mov.b32 q, b; mov.b32 r, c; mov.b32 s, d;
    cvt.pack.sat.s8.s32.b32 high, s, r, 0;
    cvt.pack.sat.s8.s32.b32 $0, q, p, high; }""")
"""Four float32 times 128ths of a factor to int8: bounded to 0 and 1, which makes 0 of NaN, then times 2**-142, the bits of
which denormal number are the 128 times as large one, rounded, of which 127 is the most that int8 has. Zero is added, for
which the sign of a negative zero goes."""


@triton.jit
def scaled_to_int8(x, factor):
    """x * factor rounded to even, between 0 and 127, as int8, zero for NaN: of float32 x and of what a relu makes of it.

    Of a negative factor that is zero throughout, as it is of zero.
    """
    factor = tl.maximum(tl.full([], 1.0, tl.float32) * factor, 0.0)
    if INTERPRETED or x.numel % 4 != 0:
        return rounded_to_int8(x * factor, 0.0, 127.0)
    else:
        return tl.inline_asm_elementwise(
            SCALED_TO_INT8, "=r,f,f,f,f,f,f,f,f", [x, factor * 0.0078125], dtype=tl.int8, is_pure=True, pack=4
        )


TWO_ROUNDED_TO_BFLOAT16 = tl.constexpr(
    "{ .reg .b32 both; cvt.rn.bf16x2.f32 both, $3, $2; shl.b32 $0, both, 16; and.b32 $1, both, 0xFFFF0000; }"
)


TWO_ROUNDED_TO_FLOAT16 = tl.constexpr(
    "{ .reg .b32 both; .reg .b16 low, high; cvt.rn.f16x2.f32 both, $3, $2; mov.b32 {low, high}, both;"
    " cvt.f32.f16 $0, low; cvt.f32.f16 $1, high; }"
)


@triton.jit
def each_rounded_to_half(x, HALF: tl.constexpr):
    """A float32 rounded to HALF, as a float32."""
    return x.to(HALF).to(tl.float32)


@triton.jit
def rounded_to_half(x, HALF: tl.constexpr):
    """As `each_rounded_to_half`, two at a time, since the conversion of one has an eighth of the rate of other instructions,
    on the unit that computes exponentials."""
    if INTERPRETED or x.numel % 2 != 0:
        return each_rounded_to_half(x, HALF)
    elif tl.bfloat16 == HALF:
        return tl.inline_asm_elementwise(TWO_ROUNDED_TO_BFLOAT16, "=r,=r,f,f", [x], dtype=tl.float32, is_pure=True, pack=2)
    else:
        return tl.inline_asm_elementwise(TWO_ROUNDED_TO_FLOAT16, "=f,=f,f,f", [x], dtype=tl.float32, is_pure=True, pack=2)


INT8_TO_FLOAT32 = tl.constexpr("""{ .reg .b32 bytes, bits;
    xor.b32 bytes, $4, 0x80808080;
    prmt.b32 bits, bytes, 0x4B000000, 0x7540;
    sub.f32 $0, bits, 0f4B000080;
    prmt.b32 bits, bytes, 0x4B000000, 0x7541;
    sub.f32 $1, bits, 0f4B000080;
    prmt.b32 bits, bytes, 0x4B000000, 0x7542;
    sub.f32 $2, bits, 0f4B000080;
    prmt.b32 bits, bytes, 0x4B000000, 0x7543;
    sub.f32 $3, bits, 0f4B000080; }""")
"""Four int8 to float32: 128 is added, the bits of 2**23 with the sum q below are 2**23 + q, and 2**23 + 128 is taken off."""


@triton.jit
def int8_to_float32(x):
    """int8 as float32, without the GPU's conversion, which has a quarter of the rate of other instructions."""
    if INTERPRETED:
        return x.to(tl.float32)
    else:
        return tl.inline_asm_elementwise(INT8_TO_FLOAT32, "=f,=f,=f,=f,r", [x], dtype=tl.float32, is_pure=True, pack=4)
