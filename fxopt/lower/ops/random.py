"""Random numbers as pure functions of a seed and an element index."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from fxopt.errors import UnsupportedError
from fxopt.ir import random_ops
from fxopt.ir.exprs import Int, ravel
from fxopt.ir.loops import IndexValue, Op, Scalar
from fxopt.lower.lowering import Lowering
from fxopt.lower.ops.elementwise import operand
from fxopt.lower.table import Table
from fxopt.lower.values import Computed, Value, at, pointwise

TABLE = Table()


def _drawn(ctx: Lowering, name: str, seed: Value, *bounds: Any) -> Computed:
    """The counter is the row-major element index, so the numbers depend on neither layout nor fusion."""
    out = ctx.out()
    if seed.device != out.device:
        raise UnsupportedError("a seed on another device")
    shape = ctx.sizes(out.shape)
    limits = tuple(operand(b, (), torch.int64) for b in bounds)

    def body(indices: tuple[Int, ...]) -> Scalar:
        return Op(name, (at(seed, ()), IndexValue(ravel(indices, shape)), *limits), out.dtype)

    return pointwise(shape, out.dtype, out.device, body, (seed,))


@TABLE.lowers(random_ops.rand)
def rand(ctx: Lowering, seed: Value, size: Sequence[Int]) -> Computed:
    return _drawn(ctx, "rand", seed)


@TABLE.lowers(random_ops.randn)
def randn(ctx: Lowering, seed: Value, size: Sequence[Int]) -> Computed:
    return _drawn(ctx, "randn", seed)


@TABLE.lowers(random_ops.randint)
def randint(ctx: Lowering, seed: Value, low: Int, high: Int, size: Sequence[Int]) -> Computed:
    if isinstance(low, int) and isinstance(high, int) and not 0 < high - low < 2**63:
        raise UnsupportedError("a range that kernels cannot draw from (or an empty one, an error of eager's)")
    return _drawn(ctx, "randint", seed, low, high)
