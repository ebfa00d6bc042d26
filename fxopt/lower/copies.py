"""Regions that only copy, and batches of matrices seen through them: what a product is given in a layout that it wants.

A library's product wants matrices one evenly spaced batch after another, so heads that lie between rows are copied apart,
and keys that a group of query heads shares are repeated. Kernels of ours read them where they are.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate
from math import prod
from operator import mul

import torch

from fxopt.ir.exprs import Int, Sym, coefficient, substitute
from fxopt.ir.loops import Load, Op, Scalar
from fxopt.ir.region import Matrix, Region

_EXACT = (torch.float32, torch.float64)
"""What a narrower floating type is cast to and back without a loss."""

Dims = tuple[tuple[int, int], ...]
"""(size, stride) of dimensions, outermost first."""


@dataclass(frozen=True)
class Copy:
    """Every element of `target` is one of `source`. `loops` are (size, stride in target, stride in source)."""

    source: str
    target: str
    loops: tuple[tuple[int, int, int], ...]
    source_offset: int
    target_offset: int

    def turned(self) -> Copy:
        """The same pairs of elements, seen from the source; right where no element is copied twice."""
        loops = tuple((size, there, here) for size, here, there in self.loops)
        return Copy(self.target, self.source, loops, self.target_offset, self.source_offset)


@dataclass(frozen=True)
class Matrices:
    """Matrices [rows, columns] in `buffer`; `dims` say where each begins, from `offset` on."""

    buffer: str
    offset: int
    dims: Dims
    row: int
    column: int

    @staticmethod
    def of(matrix: Matrix, count: int) -> Matrices | None:
        """`count` matrices; None where something is symbolic."""
        known = [n for n in (matrix.offset, matrix.batch, matrix.row, matrix.column) if isinstance(n, int)]
        if len(known) < 4:
            return None
        return Matrices(matrix.buffer, known[0], ((count, known[1]),), known[2], known[3])

    def through(self, copy: Copy, rows: int, columns: int) -> Matrices | None:
        """The same elements where `copy`, whose target they are in, has them from; None where that is no batch."""
        ((count, stride),) = self.dims
        left = [loop for loop in copy.loops if loop[0] > 1]
        strides: list[int] = []
        for size, here in ((rows, self.row), (columns, self.column)):
            own = [loop for loop in left if loop[:2] == (size, here)]
            if size > 1 and not own:
                return None
            strides += [own[0][2]] if own else [0]
            left = [loop for loop in left if loop not in own[:1]]
        left.sort(key=lambda loop: -loop[1])
        begins = accumulate((size for size, _, _ in reversed(left)), mul, initial=1)
        evenly = all(here == stride * n for (_, here, _), n in zip(reversed(left), begins, strict=False))
        if not evenly or prod(size for size, _, _ in left) != count or self.offset != copy.target_offset:
            return None
        dims = tuple((size, there) for size, _, there in left)
        return Matrices(copy.source, copy.source_offset, dims, strides[0], strides[1])

    def split(self, *sizes: int) -> tuple[int, ...] | None:
        """The strides of the matrices numbered by dimensions of these sizes, outermost first; None where none are right."""
        dims, strides = [d for d in self.dims if d[0] > 1], list[int]()
        for wanted in reversed(sizes):
            if wanted == 1:
                strides.append(0)
                continue
            if not dims:
                return None
            size, stride = dims.pop()
            while size % wanted and dims and dims[-1][1] == stride * size:
                size *= dims.pop()[0]
            if size % wanted:
                return None
            strides.append(stride)
            if size > wanted:
                dims.append((size // wanted, stride * wanted))
        return None if dims else tuple(reversed(strides))


def copies_of(region: Region) -> list[Copy] | None:
    """What `region` does, if it only copies from buffers to buffers of the same dtype; else None."""
    if region.nest.reduced or region.across is not None:
        return None
    found = [_copy(region, k) for k in range(len(region.nest.stores))]
    known = [c for c in found if c is not None]
    return known if len(known) == len(found) else None


def _copy(region: Region, k: int) -> Copy | None:
    store = region.nest.stores[k]
    load = _loaded(store.value)
    if load is None or store.mode != "set" or store.indirect or load.indirect:
        return None
    if region.buffers[store.buffer].dtype != load.dtype:
        return None
    points = region.nest.points
    here, there = _linear(store.index, points), _linear(load.index, points)
    sizes = [s.size for s in points]
    numbers = [n for n in (*here, *there, *sizes) if isinstance(n, int)]
    if len(numbers) < len(here) + len(there) + len(sizes):
        return None
    loops = tuple(zip(sizes, here[1:], there[1:], strict=True))
    return Copy(load.buffer, store.buffer, loops, there[0], here[0])  # type: ignore[arg-type]  # all are numbers


def _loaded(value: Scalar) -> Load | None:
    """The load that `value` is, of the same dtype, cast to a wider one in between or not."""
    dtype = value.dtype
    while isinstance(value, Op) and value.name == "cast" and value.args[0].dtype in (dtype, *_EXACT):
        value = value.args[0]
    return value if isinstance(value, Load) and value.dtype == dtype else None


def _linear(index: Int, points: Sequence[Sym]) -> list[Int | None]:
    """The constant part of `index` and its strides along `points`, None where it is not linear."""
    return [substitute(index, dict.fromkeys(points, 0)), *(coefficient(index, sym) for sym in points)]
