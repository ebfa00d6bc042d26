"""Configurations of reductions down columns: points are contiguous, what is reduced is not."""

from __future__ import annotations

from fxopt.codegen.configs.demands import (
    LINE_BYTES,
    VALUES_PER_THREAD,
    coalesced_per_thread,
    narrowest_bytes,
    one_access,
    pressure,
    streaming_accesses,
)
from fxopt.codegen.triton_config import TritonConfig, next_power_of_2
from fxopt.codegen.triton_tiling import Tiling
from fxopt.ir.exprs import coefficient
from fxopt.ir.loops import Reduce, postorder
from fxopt.target import Target

_SMALL = 1 << 18  # elements that the L2 cache serves, whatever the access pattern

_STATES = {"welford": 2, "softmax_stats": 2, "weighted_softmax": 4}
"""What reductions carry for each lane, if more than one value."""


def column_configs(tiling: Tiling, rows: int, row: int, target: Target) -> list[TritonConfig]:
    """Points are contiguous and the reduced axis is strided: whole cache lines along x, and as much r as registers allow.

    Where too few points remain to fill the GPU, `reductions` cuts the reduced axis; what is too small for that (joining
    the parts above all) is bound by latency, so it reads half lines in more programs, all loads at once.
    """
    line = max(8, LINE_BYTES // narrowest_bytes(tiling))
    width = min(next_power_of_2(rows), line)
    if rows * row <= _SMALL:
        while width > line // 2 and -(-rows // width) < target.sm_count:
            width //= 2
    values = min(column_values(tiling), coalesced_per_thread(tiling))
    found = []
    light = min(values, one_access(tiling))
    shapes = [(width, values, 4), (width, light, 4), (width, values, 8), (2 * width, values, 4), (4 * width, values, 8)]
    if len(streaming_accesses(tiling)) == 1:  # half an access each, of which LLVM unrolls more: more lines asked for
        shapes.insert(3, (width, max(2, light // 2), 4))
    if not _aligned_rows(tiling):  # element by element: more threads, each with fewer
        shapes = [(width, min(16, values), 8), (width // 2, min(16, values), 8), *shapes]
    for bx, per_thread, warps in shapes:
        bx = min(bx, next_power_of_2(rows))
        size = max(1, min(next_power_of_2(row), per_thread * 32 * warps // bx))
        found.append(TritonConfig(bx, r_block=size, persistent=is_whole(tiling, size), num_warps=warps))
    return found


def _aligned_rows(tiling: Tiling) -> bool:
    """Whether what is contiguous along the points starts at multiples of 16 bytes whatever the reduced index."""
    if not tiling.x.symbols:
        return True
    for access in tiling.accesses:
        if coefficient(access.index, tiling.x.symbols[-1]) == 1:
            strides = [coefficient(access.index, s) for s in tiling.r.symbols]
            if any(isinstance(s, int) and s * access.itemsize % 16 for s in strides):
                return False
    return True


def column_values(tiling: Tiling) -> int:
    """Elements per thread and step: every stream's block and every reduction's accumulators stay in registers."""
    kinds = {n.operands: n.kind for n in postorder(tiling.nest.roots) if isinstance(n, Reduce)}.values()
    carried = sum(_STATES.get(kind, 1) for kind in kinds)
    room = 2 * VALUES_PER_THREAD // (pressure(tiling) + 2 * carried)
    return max(8, min(32, next_power_of_2(room + 1) // 2))


def is_whole(tiling: Tiling, size: int) -> bool:
    """Whether a block of `size` holds all that is reduced."""
    extent = tiling.r.extent
    return isinstance(extent, int) and extent <= size
