"""Configurations of nests that do not reduce: runs of points, pieces of rows, whole short rows, tiles."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from fxopt.codegen.configs.demands import (
    LINE_BYTES,
    MANY_PROGRAMS,
    PROGRAM_BYTES,
    VALUES_PER_THREAD,
    block_values,
    bytes_each,
    coalesced_per_thread,
    narrowest_bytes,
    one_access,
    pressure,
    rows_per_program,
)
from fxopt.codegen.triton_config import TritonConfig, next_power_of_2
from fxopt.codegen.triton_index import same_within
from fxopt.codegen.triton_tiling import Axis, Tiling
from fxopt.ir.exprs import free_symbols
from fxopt.ir.loops import IndexValue, postorder
from fxopt.target import Target

_TILES = (
    (64, 64, 8),
    (32, 64, 4),
    (64, 32, 4),
    (32, 32, 4),
    (128, 32, 8),
    (32, 128, 8),
    (16, 64, 4),
    (64, 16, 4),
    (16, 32, 2),
)
_LONG_ROW = 256  # elements of a row that are worth a program
_SHORT_ROWS_POINTS = 2048  # of shorter rows, in one program


def _power_of_2_within(n: int) -> int:
    return 1 << max(n.bit_length() - 1, 0)


def _fill(points: int, block: int, target: Target) -> float:
    """Share of the GPU's SMs that a grid of `points / block` programs keeps busy (several programs fit on one SM)."""
    programs = -(-points // block)
    waves = -(-programs // target.sm_count)
    return programs / (waves * target.sm_count)


def pointwise_configs(tiling: Tiling, target: Target) -> list[TritonConfig]:
    """One 16-byte access per thread of the narrowest type first, so that wider ones take several."""
    points = max(1, tiling.x.hint)
    even = coalesced_per_thread(tiling)
    vector = min(8, even, max(1, 16 // narrowest_bytes(tiling)))
    room = max(vector, _power_of_2_within(VALUES_PER_THREAD // pressure(tiling)))
    first, each = min(room, even, 8), bytes_each(tiling)
    scored = []
    for warps in (4, 8, 2):
        for per_thread in dict.fromkeys((vector, min(even, 8), min(even, 16), max(1, vector // 2))):
            block = min(32 * warps * per_thread, max(32, next_power_of_2(points)))
            odd = (0.2 if per_thread > first else 0.5) if per_thread != first else 0.0
            crowd = points >= block * MANY_PROGRAMS * target.sm_count
            odd += max(0.0, 1 - block * each / PROGRAM_BYTES) if crowd else 0.0
            cost = odd + (1 - _fill(points, block, target)) + (0.0 if warps == 4 else 0.25)
            crowded = 0.0 if per_thread <= room else 0.3 if per_thread <= 2 * room else 1.0
            scored.append((cost + crowded, TritonConfig(block, num_warps=warps)))
    return [c for _, c in sorted(scored, key=lambda t: t[0])]


def batch_configs(tiling: Tiling, elements: Sequence[int], target: Target) -> list[TritonConfig]:
    """Configurations of a batched kernel over members of these sizes: what a program looks up is spread over several
    accesses per thread."""
    vector = min(8, max(1, 16 // narrowest_bytes(tiling)))
    room = max(vector, VALUES_PER_THREAD // pressure(tiling))
    most = max(32, next_power_of_2(max(elements)))
    found = []
    for warps, per_thread in ((4, max(8, vector)), (4, vector), (8, max(8, vector)), (4, 16), (8, vector), (2, vector)):
        block = min(32 * warps * per_thread, most)
        config = TritonConfig(block, num_warps=max(1, min(warps, block // (32 * vector))))
        found.append((per_thread > 2 * room, config))
    return list(dict.fromkeys(c for _, c in sorted(found, key=lambda t: t[0])))


def row_point_configs(tiling: Tiling, target: Target) -> list[TritonConfig]:
    """One program in one row: the block that leaves fewest lanes idle at the row's end, the larger of nearly equal ones. Of
    several short rows too, where there are so many that their programs could not start as fast as memory is."""
    row = tiling.x.hint
    if row < _LONG_ROW or not _same_along(tiling.x, tiling):
        return []

    def idle(block: int) -> float:
        return block * -(-row // block) / row + 64 / block

    block = min((1024, 2048, 512, 256), key=idle)
    pieces = tiling.y.hint * -(-row // block)
    together = min(rows_per_program(pieces, block, bytes_each(tiling), target), 1 << (tiling.y.hint.bit_length() - 1))
    several, one = (_row_points(tiling, block, count) for count in (together, 1))
    fits = block * together // (32 * several.num_warps) <= block_values(tiling)  # a pool's windows are many values
    found = [several, one] if fits and together > 1 else [one]
    if block > 1024:
        found.append(_row_points(tiling, block // 2, 1))
    crowded = block // (32 * one.num_warps) * pressure(tiling) > 2 * VALUES_PER_THREAD  # a pool's windows, loaded at once
    return [*found, replace(one, num_warps=2 * one.num_warps)] if crowded and one.num_warps < 16 else found


def short_row_points(tiling: Tiling) -> list[TritonConfig]:
    """Whole short rows: what is the same along one has one index for all its points, and its quotients one divisor."""
    row = tiling.x.hint
    several = _SHORT_ROWS_POINTS // row
    fits = tiling.y.hint >= several and row < _LONG_ROW and row == next_power_of_2(row)
    return [_row_points(tiling, row, several)] if fits and _same_along(tiling.x, tiling) else []


def sharing_row_points(tiling: Tiling) -> list[TritonConfig]:
    """As many neighbours as one access a thread takes, of several rows: what is the same for all of these, such as a
    channel's scale or what is repeated, is loaded and computed once."""
    block = 4 * 32 * one_access(tiling)
    together = max(2, min(8, block_values(tiling) // one_access(tiling)))
    together = 1 << (together.bit_length() - 1)
    fits = tiling.x.hint % block == 0 and tiling.y.symbols and tiling.y.hint % together == 0
    shared = fits and any(
        tiling.x.symbols[-1] in free_symbols(a.index) and same_within(a.index, tiling.y.symbols[-1], together)
        for a in tiling.accesses
    )
    return [TritonConfig(block, y_block=together, num_warps=4, rows=True)] if shared else []


def _same_along(axis: Axis, tiling: Tiling) -> bool:
    """Whether something else than what is the same everywhere is the same along `axis`."""
    own, other = frozenset(axis.symbols), frozenset((*tiling.x.symbols, *tiling.y.symbols)) - frozenset(axis.symbols)
    integers = (n.expr for n in postorder(tiling.merged.roots) if isinstance(n, IndexValue))
    used = [free_symbols(e) for e in (*(a.index for a in tiling.accesses), *integers)]
    return any(not own & symbols and other & symbols for symbols in used)


def _row_points(tiling: Tiling, block: int, rows: int) -> TritonConfig:
    """`block` points of `rows` rows each."""
    points = block * rows
    warps = max(1, min(4, points // 256), points // (32 * min(16, coalesced_per_thread(tiling))))
    return TritonConfig(block, y_block=rows, num_warps=min(16, warps), rows=True)


def tile_configs(tiling: Tiling, target: Target) -> list[TritonConfig]:
    """Two-dimensional tiles: whole cache lines along both axes, while enough tiles remain to fill the GPU."""
    x, y = tiling.x.hint, tiling.y.hint
    line = max(16, LINE_BYTES // narrowest_bytes(tiling))
    scored = []
    for bx, by, warps in _TILES:
        bx, by = min(bx, next_power_of_2(x)), min(by, next_power_of_2(y))
        waste = bx * -(-x // bx) * by * -(-y // by) / (x * y) - 1
        short = max(0.0, 1 - bx / line) + max(0.0, 1 - by / line)
        spill = 1.0 if bx * by * pressure(tiling) > 32 * warps * 2 * VALUES_PER_THREAD else 0.0
        idle = max(0.0, 1 - x * y / (bx * by) / (2 * target.sm_count))
        scored.append((round(waste + short + spill + idle, 2), TritonConfig(bx, y_block=by, num_warps=warps)))
    return [c for _, c in sorted(scored, key=lambda t: t[0])]
