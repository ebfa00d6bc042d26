"""The one estimate of what memory traffic and recomputation cost."""

from __future__ import annotations

from collections.abc import Iterable

import torch

from fxopt.ir.exprs import Int, assumed, coefficient, free_symbols
from fxopt.ir.loops import FLOAT_UNARY, Load, Nest, Op, Scalar, postorder
from fxopt.ir.region import BufferSpec, Region
from fxopt.ir.rows import walks
from fxopt.lower.values import Computed

EXPENSIVE_OPS = (FLOAT_UNARY - {"sqrt", "rsqrt"}) | {"pow", "atan2", "rand", "randn", "randint"}
MAX_NODES = 192
"""An expression larger than this is stored: registers and compile time grow with it, the traffic saved does not."""

MAX_LOADS = 24

LONGEST_HELD = 32768
"""Elements of a row that one program holds in registers at most."""

LONGEST_COLUMN = 256
"""The same where what is reduced is not contiguous, so that a program has whole cache lines of columns."""


def full_size_bytes(body: Scalar, rank_symbols: int) -> int:
    """Bytes per element of the loads in `body` that run over about as many elements as the value itself: those indexed by
    every loop symbol."""
    loads = (n for n in postorder((body,)) if isinstance(n, Load) and len(free_symbols(n.index)) >= rank_symbols)
    return sum(n.dtype.itemsize for n in loads)


def should_store(value: Computed, readers: int) -> bool:
    """Whether an expression with `readers` readers is cheaper stored once than recomputed in each of them.

    Counted in bytes per element: recomputing reads its inputs in every reader; storing reads them once, writes once and
    reads once per reader. Joining regions may later drop the write, so a tie is stored.
    """
    nodes = list(postorder((value.body,)))
    if len(nodes) > MAX_NODES or sum(isinstance(n, Load) for n in nodes) > MAX_LOADS:
        return True
    if readers <= 1:
        return False
    read = full_size_bytes(value.body, len(value.body.symbols()))
    expensive = is_expensive(nodes)
    recompute = readers * read
    stored = read + readers * value.dtype.itemsize  # one reader usually joins with the producer and reads nothing
    return read > 0 and (expensive or recompute >= stored)


def is_expensive(nodes: Iterable[Scalar]) -> bool:
    """Whether one of `nodes` is worth more than a load."""
    return any(isinstance(n, Op) and n.name in EXPENSIVE_OPS for n in nodes)


def recomputation(value: Scalar, device: torch.device) -> float:
    """What computing an element of `value` once more costs beside its loads, in bytes moved in that time."""
    nodes = [n for n in postorder((value,)) if isinstance(n, Op)]
    expensive = sum(n.name in EXPENSIVE_OPS for n in nodes)
    each, per_operator = (2.0, 0.1) if device.type == "cuda" else (8.0, 0.5)
    return each * expensive + per_operator * len(nodes)


def traffic(region: Region) -> float:
    """Bytes that a kernel of `region` moves: every buffer once, and again in each further walk over a row."""
    domain = [extent(s.size for s in (*nest.points, *nest.reduced)) for nest in region.nests]
    again = {} if region.across is not None or not is_walked_again(region.nest) else walks(region.nest)
    total = 0.0
    for nest, size in zip(region.nests, domain, strict=True):
        read: dict[str, int] = {}
        for load in nest.loads():
            read[load.buffer] = max(read.get(load.buffer, 0), again.get(load, 1))
        for name, times in read.items():
            total += times * _touched(region.buffers[name], size)
        total += sum(_touched(region.buffers[s.buffer], size) for s in nest.stores)
    return total


def _touched(spec: BufferSpec, iterations: int) -> int:
    """Bytes of the buffer that so many iterations touch at most: of a table that they pick rows of, no more than these."""
    return min(nbytes(spec), iterations * spec.dtype.itemsize)


def is_walked_again(nest: Nest) -> bool:
    """Whether a kernel walks over rows of `nest` again for what needs their sums, since they are too long to be held."""
    along = any(coefficient(load.index, s) == 1 for load in nest.loads() for s in nest.reduced)
    return bool(nest.reduced) and extent(s.size for s in nest.reduced) > (LONGEST_HELD if along else LONGEST_COLUMN)


def extent(sizes: Iterable[Int | None]) -> int:
    """The product of sizes, unknown ones assumed."""
    total = 1
    for size in sizes:
        if size is not None:
            total *= assumed(size)
    return total


def nbytes(spec: BufferSpec) -> int:
    """Bytes that one pass over the buffer's distinct elements moves."""
    distinct = (s for s, stride in zip(spec.shape, spec.strides, strict=True) if stride != 0)
    return extent(distinct) * spec.dtype.itemsize


def needs_split(points: int, length: int, device: torch.device) -> bool:
    """Whether a reduction of `points` rows of `length` has too few rows to keep the device busy one row per block."""
    enough = 256 if device.type == "cuda" else 16
    return points < enough and length >= 8192
