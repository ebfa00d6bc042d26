"""Exponentials and what is made of them: logistic functions, tanh, erf and GELU, exact or for results that are rounded."""

# mypy: disable-error-code="no-untyped-def,no-untyped-call,misc,untyped-decorator"

from __future__ import annotations

import struct

import triton
import triton.language as tl
from triton.language.extra import libdevice

from fxopt.codegen.triton_helpers.arithmetic import divide, inverse, maximum, minimum
from fxopt.codegen.triton_helpers.interpreter import INTERPRETED

FLUSHING_EXP = tl.constexpr("{ .reg .f32 t; mul.f32 t, $1, 0f3FB8AA3B; ex2.approx.ftz.f32 $0, t; }")


@triton.jit
def flushing_exp(a):
    """exp(a) with values below 2**-126 flushed to zero, which does not show in a sum that is at least 1: two instructions
    instead of five. Off by a relative 1e-7 times 1 + |a|."""
    if INTERPRETED or a.dtype != tl.float32:
        return tl.exp(a)
    else:
        return tl.inline_asm_elementwise(FLUSHING_EXP, "=f,f", [a], dtype=tl.float32, is_pure=True, pack=1)


@triton.jit
def log_add_exp(a, b):
    """log(exp(a) + exp(b)); equal infinities have no difference."""
    high = maximum(a, b)
    low = minimum(a, b)
    return tl.where((high == low) & (tl.abs(high) == float("inf")), high, high + libdevice.log1p(libdevice.exp(low - high)))


@triton.jit
def sigmoid(a):
    if a.dtype == tl.float32:
        return inverse(1.0 + libdevice.exp(a * -1.0))
    else:
        return divide(tl.full([], 1.0, a.dtype), 1.0 + libdevice.exp(a * -1.0))


FAST_SIGMOID = tl.constexpr(
    "{ .reg .f32 t; mul.f32 t, $1, 0fBFB8AA3B; ex2.approx.ftz.f32 t, t; add.f32 t, t, 0f3F800000;"
    " rcp.approx.ftz.f32 $0, t; }"
)


@triton.jit
def fast_sigmoid(a):
    """Within a few units in float32's last place, for results that are rounded to half precision; zero below 2**-126, where
    exp overflows in eager soon."""
    if INTERPRETED:
        return 1.0 / (1.0 + tl.exp(a * -1.0))
    else:
        return tl.inline_asm_elementwise(FAST_SIGMOID, "=f,f", [a], dtype=tl.float32, is_pure=True, pack=1)


@triton.jit
def tanh_plus_one(a):
    """1 + tanh(a) for results that are rounded to half precision, without the cancellation near -1: a few instructions, and
    half of the compile time of a product's epilogue, where libdevice's tanh has two forms for each element."""
    return 2.0 / (1.0 + tl.exp(a * -2.0))


LOG2_ERFC = (
    -4.535859261523001e-05,
    0.0004455076123122126,
    -0.0014894416090101004,
    -0.0007746296469122171,
    0.02825368195772171,
    -0.14848162233829498,
    -0.9184163808822632,
    -1.6279085874557495,
)
"""log2(erfc(x)) / x on [0, 4] as a polynomial, highest power first: fitted with the weight erfc (a minimax fit by Lawson's
algorithm), so that the absolute error of erfc is the same all over."""


COARSE_LOG2_ERFC = (
    -1.53181604e-03,
    2.13113384e-02,
    -1.31698725e-01,
    -9.32370054e-01,
    -1.62434946e00,
)
"""The same with a relative error of erfc of 2e-4 at most up to 3.6, for results rounded to 8 bits, whose own is 6e-2."""


def _erf_plus_one(coefficients: tuple[float, ...]) -> str:
    """PTX of `erf_plus_one`. As one statement it takes a quarter of the compile time of a product's epilogue less."""
    first, *others = (f"0f{struct.pack('>f', c).hex().upper()}" for c in coefficients)
    steps = [f"mov.f32 p, {first};", *(f"fma.rn.f32 p, p, x, {c};" for c in others)]
    return f"""{{ .reg .f32 x, p; .reg .pred negative;
    abs.f32 x, $1;
    {" ".join(steps)}
    mul.f32 p, p, x;
    ex2.approx.ftz.f32 p, p;
    sub.f32 x, 0f40000000, p;
    setp.lt.f32 negative, $1, 0f00000000;
    selp.f32 $0, p, x, negative; }}"""


def _coarse_gelu() -> str:
    """PTX of `coarse_gelu`, with the polynomial's argument scaled within its coefficients."""
    scaled = (c * 0.5 ** ((len(COARSE_LOG2_ERFC) - k) / 2) for k, c in enumerate(COARSE_LOG2_ERFC))
    first, *others = (f"0f{struct.pack('>f', c).hex().upper()}" for c in scaled)
    steps = [f"mov.f32 p, {first};", *(f"fma.rn.f32 p, p, x, {c};" for c in (*others, "0fBF800000"))]
    return f"""{{ .reg .f32 x, p, above;
    min.NaN.f32 x, $1, 0f41800000;
    abs.f32 x, x;
    {" ".join(steps)}
    ex2.approx.ftz.f32 p, p;
    max.f32 above, $1, 0f00000000;
    neg.f32 x, x;
    fma.rn.f32 $0, x, p, above; }}"""


ERF_PLUS_ONE = tl.constexpr(_erf_plus_one(LOG2_ERFC))


COARSE_ERF_PLUS_ONE = tl.constexpr(_erf_plus_one(COARSE_LOG2_ERFC))


COARSE_GELU = tl.constexpr(_coarse_gelu())


COEFFICIENTS, COARSE_COEFFICIENTS = tl.constexpr(LOG2_ERFC), tl.constexpr(COARSE_LOG2_ERFC)


@triton.jit
def erf_plus_one(a):
    """1 + erf(a) of float32, which normal distributions want, in half of what libdevice's erf takes.

    For a below zero erfc(-a) = 2^(a polynomial), with an absolute error of at most 7e-8, where a correctly rounded erf
    leaves 4.5e-8. Beyond 4, the polynomial goes to minus infinity, as the logarithm does.
    """
    if INTERPRETED:
        return by_polynomial(a, COEFFICIENTS, 8)
    else:
        return tl.inline_asm_elementwise(ERF_PLUS_ONE, "=f,f", [a], dtype=tl.float32, is_pure=True, pack=1)


@triton.jit
def coarse_erf_plus_one(a):
    """1 + erf(a) to a relative error of 2e-4, for results that are rounded to 8 bits."""
    if INTERPRETED:
        return by_polynomial(a, COARSE_COEFFICIENTS, 5)
    else:
        return tl.inline_asm_elementwise(COARSE_ERF_PLUS_ONE, "=f,f", [a], dtype=tl.float32, is_pure=True, pack=1)


@triton.jit
def coarse_gelu(a):
    """a / 2 * (1 + erf(a / sqrt(2))) to the same error: max(a, 0) - |a| * erfc(|a| / sqrt(2)) / 2 needs no choice between
    two tails. Infinities and NaN give what the exact form does: a is bounded above, where the tail is zero.
    """
    if INTERPRETED:
        x = tl.abs(tl.minimum(a, 16.0, propagate_nan=tl.PropagateNan.ALL))
        half = 0.5 * by_polynomial(-0.7071067811865476 * x, COARSE_COEFFICIENTS, 5)
        return tl.fma(-x, half, tl.maximum(a, 0.0))
    else:
        return tl.inline_asm_elementwise(COARSE_GELU, "=f,f", [a], dtype=tl.float32, is_pure=True, pack=1)


@triton.jit
def by_polynomial(a, COEFFICIENTS: tl.constexpr, COUNT: tl.constexpr):
    """1 + erf(a) by a polynomial as LOG2_ERFC is one, of COUNT coefficients."""
    x = tl.abs(a)
    p = tl.fma(x, COEFFICIENTS[0], COEFFICIENTS[1])
    for k in tl.static_range(2, COUNT):
        p = tl.fma(p, x, COEFFICIENTS[k])
    tail = tl.exp2(p * x)
    return tl.where(a < 0.0, tail, 2.0 - tail)
