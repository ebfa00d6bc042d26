"""Which matrices a product's epilogue reads beside the product, and the function that brings them into the cache before.

An epilogue that adds a residual waits for memory: each time, in a persistent program. Which part it will read is known long
before, and one instruction a line of 128 bytes asks for it.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from fxopt.codegen.templates.gemm_problem import GemmConfig
from fxopt.codegen.triton_block import BlockFunction
from fxopt.ir.exprs import add, coefficient, mul, symbol
from fxopt.ir.loops import Masked, postorder
from fxopt.ir.region import Contraction

LINE_BYTES = 128
LARGEST_OFFSET = 2**31
"""Offsets are computed in int32."""


@dataclass(frozen=True)
class Residual:
    """Element (row, column) is number `first + row * pitch + column` of `buffer`, each of `itemsize` bytes."""

    buffer: str
    itemsize: int
    pitch: int
    first: int


def residuals(contraction: Contraction) -> tuple[Residual, ...]:
    """What the epilogue of `contraction`, of one product of known size, loads at every element, rows of it contiguous."""
    (batch, row, column), (_, m, _, n) = contraction.axes, contraction.sizes
    nest = contraction.region.nest
    if (
        batch is not None
        or contraction.ends
        or contraction.c is not None
        or not isinstance(m, int)
        or not isinstance(n, int)
    ):
        return ()
    if any(isinstance(node, Masked) for node in postorder(nest.roots)):
        return ()
    found = []
    for load in dict.fromkeys(nest.loads()):
        pitch = coefficient(load.index, row)
        if load.buffer in contraction.products or load.indirect or not isinstance(pitch, int) or pitch <= 0:
            continue
        first = add(load.index, mul(add(mul(symbol(row), pitch), symbol(column)), -1))
        if isinstance(first, int) and first >= 0 and first + m * pitch < LARGEST_OFFSET:
            found.append(Residual(load.buffer, load.dtype.itemsize, pitch, first))
    return tuple(dict.fromkeys(found))


def with_prefetch(contraction: Contraction, config: GemmConfig) -> GemmConfig | None:
    """`config` with residuals brought into the cache ahead; None if there are none, or its template cannot."""
    plain = config.tma and config.split == 1 and not config.has_narrow_tiles
    whole = isinstance(n := contraction.sizes[3], int) and n % config.block_n == 0
    return replace(config, prefetch=True) if plain and whole and residuals(contraction) else None


def print_prefetch(name: str, contraction: Contraction, config: GemmConfig, epilogue: BlockFunction) -> str:
    """The function `name`(y, x, extra), where `extra` has the parameters of `epilogue`: see `templates/gemm.py`."""
    parameters = dict(zip(epilogue.buffers, epilogue.parameters, strict=False))
    lines = []
    for each in residuals(contraction):
        line = LINE_BYTES // each.itemsize
        count = max(config.block_n // line, 1)
        columns = "x" if count == 1 else f"(x + tl.arange(0, {count})[None, :] * {line})"
        lines.append(f"    h.bring({parameters[each.buffer]} + (y * {each.pitch} + {columns} + {each.first}))")
    return "\n".join(["@triton.jit", f"def {name}(y, x, extra):", f"    {', '.join(epilogue.parameters)}, = extra", *lines])
