"""Half-precision values are computed in float32 and rounded in memory; how the loop IR says that one is rounded before."""

from __future__ import annotations

import torch

from fxopt.ir.loops import Const, Load, Op, Scalar

HALVES = (torch.float16, torch.bfloat16)
"""Types that are computed in float32 and rounded in memory."""


def rounded(x: Scalar) -> Scalar:
    """`x` exactly as it would be read back from memory.

    For casts, whose rounding is what the user asked for, and for comparisons of half types: a value computed inline has
    more bits than its stored copy, and the two must be equal (as in `x == x.amax()`, which a maximum's gradient asks). A
    round trip through the bits is the loop IR's way to say so.
    """
    if x.dtype not in HALVES or isinstance(x, (Load, Const)) or unrounded(x) is not x:
        return x
    return Op("bitcast", (Op("bitcast", (x,), torch.int16),), x.dtype)


def unrounded(x: Scalar) -> Scalar:
    """What `rounded` was given, if `x` is a result of it: for a store, which rounds anyway."""
    if isinstance(x, Op) and x.name == "bitcast" and isinstance(bits := x.args[0], Op) and bits.name == "bitcast":
        inner = bits.args[0]
        return inner if inner.dtype == x.dtype else x
    return x
