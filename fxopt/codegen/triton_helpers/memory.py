"""Indices, and what is brought into the cache."""

# mypy: disable-error-code="no-untyped-def,no-untyped-call,misc,untyped-decorator"

from __future__ import annotations

import triton
import triton.language as tl

from fxopt.codegen.triton_helpers.interpreter import INTERPRETED


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
