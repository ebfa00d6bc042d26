"""Device functions that printed Triton kernels call: operators whose exact eager semantics take several instructions.

Real `@triton.jit` functions; printed kernels import this module as `h`. Arguments are tensors of one dtype unless said.
"""

# mypy: disable-error-code="no-untyped-def,no-untyped-call,misc,untyped-decorator"

from __future__ import annotations

import struct

import triton
import triton.language as tl
from triton import knobs
from triton.language.extra import libdevice

INTERPRETED = tl.constexpr(knobs.runtime.interpret)


@triton.jit
def maximum(a, b):
    """The larger; NaN when either is NaN."""
    return tl.where((a > b) | (a != a), a, b)


@triton.jit
def minimum(a, b):
    """The smaller; NaN when either is NaN."""
    return tl.where((a < b) | (a != a), a, b)


@triton.jit
def log_add_exp(a, b):
    """log(exp(a) + exp(b)); equal infinities have no difference."""
    high = maximum(a, b)
    low = minimum(a, b)
    return tl.where((high == low) & (tl.abs(high) == float("inf")), high, high + libdevice.log1p(libdevice.exp(low - high)))


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


FLUSHING_EXP = tl.constexpr("{ .reg .f32 t; mul.f32 t, $1, 0f3FB8AA3B; ex2.approx.ftz.f32 $0, t; }")


@triton.jit
def sign(a):
    """-1, 0 or 1 in the dtype of `a`; 0 for NaN, as torch.sign."""
    return (a > 0).to(a.dtype) - (a < 0).to(a.dtype)


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


@triton.jit
def floor_index(a, b):
    """Floor division of an index expression that may be negative; b > 0."""
    q = a // b
    return tl.where(q * b > a, q - 1, q)


@triton.jit
def as_natural(x):
    """An int64 as int32; -1 where that is not the same or negative."""
    return tl.where((x >= 0) & (x < 2147483648), x, -1).to(tl.int32)


@triton.jit
def wrap_index(i, size):
    """A negative index counted from the end."""
    return tl.where(i < 0, i + size, i)


@triton.jit
def philox_words(seed, counter):
    """The four words of philox4x32-10 with key `seed`, counter (low, high word of `counter`, 0, 0); Salmon, SC 2011."""
    bits = counter.to(tl.uint64, bitcast=True)
    low = (bits & 0xFFFFFFFF).to(tl.uint32)
    high = (bits >> 32).to(tl.uint32)
    zero = low * 0
    return tl.philox(seed, low, high, zero, zero)


@triton.jit
def rand(seed, counter):
    """float32 uniform in [0, 1) from word `counter` % 4 at `counter` // 4."""
    return rand_word(seed, counter >> 2, counter & 3)


@triton.jit
def rand_word(seed, counter, word):
    """float32 uniform in [0, 1) from word number `word` at `counter`.

    Where a thread holds four neighbours from a multiple of 4 on, LLVM computes the words once and selects nothing: 30
    instructions an element instead of 58 (sm_90, 16 elements a thread).
    """
    a, b, c, d = philox_words(seed, counter)
    chosen = tl.where(word < 2, tl.where(word == 0, a, b), tl.where(word == 2, c, d))
    return (chosen >> 8).to(tl.float32) * 5.9604644775390625e-08


@triton.jit
def randn(seed, counter):
    """float32 standard normal: Box-Muller on words 0 and 1; the logarithm's argument is in (0, 1]."""
    a, b, _c, _d = philox_words(seed, counter)
    u = ((a >> 8) + 1).to(tl.float32) * 5.9604644775390625e-08
    v = (b >> 8).to(tl.float32) * 5.9604644775390625e-08
    return tl.sqrt_rn(-2.0 * libdevice.log(u)) * libdevice.cos(6.283185307179586 * v)


@triton.jit
def randint(seed, counter, low, high):
    """int64 in [low, high): words 0 (low half) and 1 as one uint64, modulo the range."""
    a, b, _c, _d = philox_words(seed, counter)
    word = a.to(tl.uint64) | (b.to(tl.uint64) << 32)
    span = (high - low).to(tl.uint64, bitcast=True)
    return (word % span).to(tl.int64, bitcast=True) + low


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


@triton.jit
def largest(a, b):
    """The larger; NaN when either is NaN; either zero for zeros of both signs. One instruction where the GPU has it."""
    return tl.maximum(a, b, propagate_nan=tl.PropagateNan.ALL)


@triton.jit
def smallest(a, b):
    """The smaller; NaN when either is NaN; either zero for zeros of both signs."""
    return tl.minimum(a, b, propagate_nan=tl.PropagateNan.ALL)


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
def flushing_exp(a):
    """exp(a) with values below 2**-126 flushed to zero, which does not show in a sum that is at least 1: two instructions
    instead of five. Off by a relative 1e-7 times 1 + |a|."""
    if INTERPRETED or a.dtype != tl.float32:
        return tl.exp(a)
    else:
        return tl.inline_asm_elementwise(FLUSHING_EXP, "=f,f", [a], dtype=tl.float32, is_pure=True, pack=1)


@triton.jit
def softmax_stats(max_a, sum_a, max_b, sum_b):
    """Joins two (max, sum of exp(x - max)); equal infinite maxima count as no distance (Milakov and Gimelshein 2018).

    One of the two sums keeps its scale, so one exponential is enough. Its absolute error is below a rounding error of the
    final sum, which is at least 1, so the fast exponential is as good as an exact one.
    """
    top = largest(max_a, max_b)
    scale = tl.where(max_a == max_b, 1.0, flushing_exp(tl.minimum(max_a, max_b) - top))
    return top, tl.where(max_a == top, sum_a + sum_b * scale, sum_a * scale + sum_b)


@triton.jit
def finite_base(top):
    """What elements up to `top` are measured from: 0 where all are -inf, so that no difference is NaN."""
    return tl.where(top == float("-inf"), 0.0, top)


@triton.jit
def softmax_step(top, total, x):
    """(max, sum of exp(x - max)) of accumulators [n, m], each joined with its share of the neighbours in `x` [n, m * k].

    An accumulator changes its scale once for k elements, which then take five instructions each.
    """
    share: tl.constexpr = x.shape[1] // top.shape[1]
    own = tl.reshape(x, [top.shape[0], top.shape[1], share])
    new = largest(top, tl.reduce(own, 2, largest))
    base = finite_base(new)
    terms = tl.sum(flushing_exp(own - tl.expand_dims(base, 2)), 2)
    return new, total * flushing_exp(top - base) + terms


@triton.jit
def weighted_softmax(max_a, sum_a, term_a, weight_a, max_b, sum_b, term_b, weight_b):
    """Joins two (max, sum of exp(x - max), sum of w * (x - max), sum of w): what is relative to the lower maximum moves by
    the distance times its weights. Nothing moves from -inf, the maximum of no elements and of those that are -inf.
    """
    top, total = softmax_stats(max_a, sum_a, max_b, sum_b)
    low = tl.minimum(max_a, max_b)
    moved = tl.where((max_a == max_b) | (low == float("-inf")), 0.0, low - top)
    return top, total, term_a + term_b + tl.where(max_a == top, weight_b, weight_a) * moved, weight_a + weight_b


@triton.jit
def weighted_softmax_step(top, total, term, weight, x, y, w):
    """`softmax_step` with the sums of w * (y - max) and of w beside it, for `y` that is `x` where `w` is not zero."""
    share: tl.constexpr = x.shape[1] // top.shape[1]
    own = tl.reshape(x, [top.shape[0], top.shape[1], share])
    values = tl.reshape(y, [top.shape[0], top.shape[1], share])
    weights = tl.reshape(w, [top.shape[0], top.shape[1], share])
    new = largest(top, tl.reduce(own, 2, largest))
    base = finite_base(new)
    terms = tl.sum(flushing_exp(own - tl.expand_dims(base, 2)), 2)
    weighted = tl.sum(weights * (values - tl.expand_dims(base, 2)), 2)
    moved = tl.where(top == float("-inf"), 0.0, top - base)
    return new, total * flushing_exp(top - base) + terms, term + weight * moved + weighted, weight + tl.sum(weights, 2)


@triton.jit
def three_sums(a, b, c, d, e, f):
    return a + d, b + e, c + f


@triton.jit
def softmax_total(top, total):
    """The sum for a finished row: NaN when its maximum is infinite, as exp(inf - inf) makes it in eager."""
    return tl.where(tl.abs(top) == float("inf"), float("nan"), total)


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


@triton.jit
def group_sum(x, SIZE: tl.constexpr):
    """Of a column [n, 1], the sum over each SIZE neighbours, for all of these."""
    groups: tl.constexpr = x.shape[0] // SIZE
    total = tl.sum(tl.reshape(x, [groups, SIZE]), 1, keep_dims=True)
    return tl.reshape(tl.broadcast_to(total, [groups, SIZE]), [groups * SIZE, 1])


@triton.jit
def bring(places):
    """Let the L2 cache have the lines at `places`. That changes no memory: whoever writes them meanwhile does so there."""
    if not INTERPRETED:
        tl.inline_asm_elementwise(
            "prefetch.global.L2 [$1]; mov.u32 $0, 0;", "=r,l", [places], dtype=tl.int32, is_pure=False, pack=1
        )


@triton.constexpr_function
def elements_of_line(dtype):
    """Of those 128 bytes that the L2 cache takes at a time."""
    return 1024 // dtype.primitive_bitwidth
