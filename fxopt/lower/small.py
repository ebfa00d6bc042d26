"""Reductions that need no loop: of a single element, and of none."""

from __future__ import annotations

import torch

from fxopt.errors import UnsupportedError
from fxopt.ir.loops import Const, Op, Scalar
from fxopt.lower.values import cast


def trivial_reduction(kind: str, args: tuple[Scalar, ...], dtype: torch.dtype, output: int) -> Scalar:
    """The reduction of a single element."""
    if kind in ("argmax", "argmin"):
        return cast(args[1], dtype)
    if kind in ("welford", "softmax_stats") and output == 1:
        # NaN for infinities, as over many elements
        difference = Op("sub", (cast(args[0], dtype), cast(args[0], dtype)), dtype)
        return difference if kind == "welford" else Op("exp", (difference,), dtype)
    return cast(args[0], dtype)


def empty_reduction(kind: str, dtype: torch.dtype, output: int) -> Scalar:
    """The reduction of no elements: a constant, so that no kernel reads memory that is not there."""
    if kind not in _OF_NOTHING:
        raise UnsupportedError(f"{kind} of no elements is an error")
    return Const(_OF_NOTHING[kind][output], dtype)


_OF_NOTHING: dict[str, tuple[float, ...]] = {
    "sum": (0,),
    "prod": (1,),
    "any": (False,),
    "all": (True,),
    "welford": (float("nan"), 0.0),
    "softmax_stats": (-float("inf"), 0.0),
}
