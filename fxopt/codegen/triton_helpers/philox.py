"""Random numbers of a counter-based generator: the same bits whatever was fused."""

# mypy: disable-error-code="no-untyped-def,no-untyped-call,misc,untyped-decorator"

from __future__ import annotations

import triton
import triton.language as tl
from triton.language.extra import libdevice


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
