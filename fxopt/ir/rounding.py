"""Values of few bits are computed in float32 and rounded in memory; how the loop IR says that one is rounded before."""

from __future__ import annotations

import functools

import torch

from fxopt.ir.loops import Const, Load, Op, Scalar

HALVES = (torch.float16, torch.bfloat16)
"""Half-precision types."""

FLOAT8 = (torch.float8_e4m3fn, torch.float8_e5m2)
"""8-bit types that Triton kernels read and write."""

NARROW = (*HALVES, *FLOAT8)
"""Types that are computed in float32 and rounded in memory."""

_BITS = {1: torch.int8, 2: torch.int16}


@functools.cache
def saturates() -> bool:
    """Whether torch's casts to float8_e4m3fn make its largest value of what is beyond it (from 2.13 on), and not NaN."""
    return bool(torch.tensor(1000.0, device="cpu").to(torch.float8_e4m3fn).float().isfinite())


def rounded(x: Scalar) -> Scalar:
    """`x` exactly as it would be read back from memory.

    For casts, whose rounding is what the user asked for, and for comparisons of narrow types: a value computed inline has
    more bits than its stored copy, and the two must be equal (as in `x == x.amax()`, which a maximum's gradient asks). A
    round trip through the bits is the loop IR's way to say so.
    """
    if x.dtype not in NARROW or isinstance(x, (Load, Const)) or unrounded(x) is not x:
        return x
    return Op("bitcast", (Op("bitcast", (x,), _BITS[x.dtype.itemsize]),), x.dtype)


def unrounded(x: Scalar) -> Scalar:
    """What `rounded` was given, if `x` is a result of it: for a store, which rounds anyway."""
    if isinstance(x, Op) and x.name == "bitcast" and isinstance(bits := x.args[0], Op) and bits.name == "bitcast":
        inner = bits.args[0]
        return inner if inner.dtype == x.dtype else x
    return x
