"""Extrema, quotients, remainders, powers and shifts as eager has them."""

# mypy: disable-error-code="no-untyped-def,no-untyped-call,misc,untyped-decorator"

from __future__ import annotations

import triton
import triton.language as tl
from triton.language.extra import libdevice

from fxopt.codegen.triton_helpers.interpreter import INTERPRETED


@triton.jit
def maximum(a, b):
    """The larger; NaN when either is NaN."""
    return tl.where((a > b) | (a != a), a, b)


@triton.jit
def minimum(a, b):
    """The smaller; NaN when either is NaN."""
    return tl.where((a < b) | (a != a), a, b)


@triton.jit
def largest(a, b):
    """The larger; NaN when either is NaN; either zero for zeros of both signs. One instruction where the GPU has it."""
    return tl.maximum(a, b, propagate_nan=tl.PropagateNan.ALL)


@triton.jit
def smallest(a, b):
    """The smaller; NaN when either is NaN; either zero for zeros of both signs."""
    return tl.minimum(a, b, propagate_nan=tl.PropagateNan.ALL)


LARGER_INT8 = tl.constexpr("""{ .reg .b32 a, b, even, odd;
    shl.b32 a, $1, 8;
    shl.b32 b, $2, 8;
    max.s16x2 even, a, b;
    max.s16x2 odd, $1, $2;
    prmt.b32 $0, even, odd, 0x7351; }""")
"""The larger of four int8 each: as upper bytes of 16 bits, whose lower bytes decide nothing that is kept."""


@triton.jit
def each_larger_int8(a, b):
    """The larger one."""
    return tl.maximum(a, b)


@triton.jit
def larger_int8(a, b):
    """As `each_larger_int8`, four at a time."""
    if INTERPRETED or a.numel % 4 != 0 or a.shape != b.shape:
        return each_larger_int8(a, b)
    else:
        return tl.inline_asm_elementwise(LARGER_INT8, "=r,r,r", [a, b], dtype=tl.int8, is_pure=True, pack=4)


@triton.jit
def divide(a, b):
    """a / b in floating point, correctly rounded (float32's plain `/` in Triton is approximate)."""
    if a.dtype == tl.float32:
        return tl.div_rn(a, b)
    else:
        return a / b


@triton.jit
def divide_many(a, b):
    """a / b in float32 for a `b` that many elements of `a` share: its inverse is taken once, and two corrections (Markstein
    1990) make each quotient the correctly rounded one. One division has as many instructions and a branch, so that those of
    a thread wait for each other. Where |a| < 2**-60, or the result below 2**-126, it is within two units of the last place.
    """
    scale = tl.where(tl.abs(b) < 2.0**-100, 2.0**64, tl.where(tl.abs(b) > 2.0**100, 2.0**-64, 1.0))
    near_one = b * scale
    inverse = tl.div_rn(tl.full([], 1.0, tl.float32), near_one)
    rough = a * inverse
    quotient = tl.fma(tl.fma(-rough, near_one, a), inverse, rough)
    quotient = tl.fma(tl.fma(-quotient, near_one, a), inverse, quotient)
    exact = (tl.abs(a) >= 2.0**-60) & (tl.abs(quotient) < float("inf"))  # what is infinite or NaN has no corrections
    return tl.where(exact, quotient, rough) * scale


@triton.jit
def share(a, total):
    """a / total in float32 for 0 <= a <= 1 <= total, correctly rounded but for results below 2**-126 (Markstein 1990): three
    instructions, where a division has eight and a slow path that every zero takes."""
    inverse = tl.div_rn(tl.full([], 1.0, tl.float32), total)
    quotient = a * inverse
    return tl.fma(tl.fma(-quotient, total, a), inverse, quotient)


@triton.jit
def share_before_rounding(a, total):
    """`share` to two units in float32's last place."""
    return a * (1.0 / total)


@triton.jit
def square_root(a):
    if a.dtype == tl.float32:
        return tl.sqrt_rn(a)
    else:
        return tl.sqrt(a)


@triton.jit
def inverse(b):
    """1 / b in float32 for b >= 1 or NaN: correctly rounded (Markstein 1990), or off by two units where below 2**-126.
    Without a branch, where a division has a slow path."""
    if INTERPRETED:
        return tl.div_rn(tl.full([], 1.0, tl.float32), b)
    else:
        large = b >= 8.507059173023462e37  # 2**126
        scaled = tl.where(large, b * 0.25, b)
        near = tl.inline_asm_elementwise(
            "rcp.approx.ftz.f32 $0, $1;", "=f,f", [scaled], dtype=tl.float32, is_pure=True, pack=1
        )
        return tl.where(large, near * 0.25, tl.fma(tl.fma(-scaled, near, 1.0), near, near))


@triton.jit
def sign(a):
    """-1, 0 or 1 in the dtype of `a`; 0 for NaN, as torch.sign."""
    return (a > 0).to(a.dtype) - (a < 0).to(a.dtype)


@triton.jit
def float_remainder(a, b):
    """torch.remainder: fmod moved to the divisor's sign."""
    r = libdevice.fmod(a, b)
    return tl.where((r != 0) & ((r < 0) != (b < 0)), r + b, r)


@triton.jit
def float_floordiv(a, b):
    """torch.floor_divide, as c10::div_floor_floating defines it."""
    r = libdevice.fmod(a, b)
    q = divide(a - r, b)
    q = tl.where((r != 0) & ((r < 0) != (b < 0)), q - 1.0, q)
    down = tl.floor(q)
    down = tl.where(q - down > 0.5, down + 1.0, down)
    zero = libdevice.copysign(q * 0.0, divide(a, b))
    return tl.where(b == 0, divide(a, b), tl.where(q != 0, down, zero))


@triton.jit
def int_floordiv(a, b):
    """Signed division towards minus infinity. Unsigned arguments never take the correction."""
    q = a // b
    r = a - q * b
    return tl.where((r != 0) & ((r < 0) != (b < 0)), q - 1, q)


@triton.jit
def int_remainder(a, b):
    """The remainder with the divisor's sign."""
    r = a % b
    return tl.where((r != 0) & ((r < 0) != (b < 0)), r + b, r)


@triton.jit
def int_pow(a, b):
    """a**b modulo 2**bits by squaring; for negative b what C++ torch gives: 1, +-1 or 0."""
    result = a * 0 + 1
    base = a
    left = b
    for _ in range(b.dtype.primitive_bitwidth):
        result = tl.where((left & 1) != 0, result * base, result)
        base = base * base
        left = left >> 1
    parity = tl.where((b & 1) != 0, a, a * a)
    unit = (a == 1) | (a * a == 1) & (a * 0 - 1 == a)
    return tl.where(b < 0, tl.where(unit, parity, a * 0), result)


@triton.jit
def shift_left(a, b):
    """a << b; 0 for a shift outside [0, bits)."""
    bits: tl.constexpr = a.dtype.primitive_bitwidth
    inside = (b >= 0) & (b < bits)
    return tl.where(inside, a << tl.where(inside, b, b * 0), a * 0)


@triton.jit
def shift_right(a, b):
    """a >> b (arithmetic when signed); a shift outside [0, bits) acts as one by bits - 1."""
    bits: tl.constexpr = a.dtype.primitive_bitwidth
    inside = (b >= 0) & (b < bits)
    return a >> tl.where(inside, b, b * 0 + (bits - 1))
