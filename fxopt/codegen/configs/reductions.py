"""Configurations of reductions, whole or in parts that another kernel joins."""

from __future__ import annotations

from dataclasses import replace

from fxopt.codegen.configs.columns import column_configs, column_values, is_whole
from fxopt.codegen.configs.demands import (
    PROGRAMS_PER_SM,
    SECTOR_BYTES,
    bytes_each,
    has_welford,
    reads_once,
    streaming_accesses,
)
from fxopt.codegen.configs.rows import row_configs
from fxopt.codegen.triton_config import TritonConfig, next_power_of_2
from fxopt.codegen.triton_tiling import Tiling, tile
from fxopt.ir.loops import Reduce, Scan, postorder
from fxopt.ir.region import Region
from fxopt.target import Target

_SPLIT_ROW = 16384  # a row shorter than this is not worth a second kernel
_MOST_PROGRAMS_PER_SM = 24  # where parts stay long: so many that the last wave, which is not full, does not count
_FEW_PARTS = 1024  # of one column of programs, which the kernel that joins them reads in a few steps
_LONG_PART = 1 << 15  # elements of a part beside which starting it and joining its result cost nothing
_WAVES_OF_ROWS = 64  # programs for each SM, of which some run at a time, from which on the last ones do not count


def reduction_configs(tiling: Tiling, target: Target) -> list[TritonConfig]:
    """Rows or columns, and those that few programs would have to themselves in parts, best first."""
    rows, row = max(1, tiling.x.hint), max(1, tiling.r.hint)
    static = isinstance(tiling.r.extent, int)
    if tiling.inner_reduction:
        found = row_configs(tiling, rows, row, static, target)
    else:
        found = column_configs(tiling, rows, row, target)
    parts = _split_parts(tiling, rows, row, found[0], target)
    if parts:
        others = [c for c in found[1:] if not c.persistent][: 2 if found[0].x_block < tiling.x.hint else 1]
        cut = [replace(c, split=parts[0]) for c in (found[0], *others)]
        fewer = [replace(found[0], split=p) for p in reversed(parts[1:])]
        ahead = [config for first in (cut[0], *fewer[:1]) for config in _fetching(tiling, first)]
        if _adds_up_memory(tiling, rows * row, target):
            return [*cut[1:2], *ahead[-1:], cut[0], *ahead[:-1], *fewer[:1], *cut[2:], *fewer[1:], *found]
        return [cut[0], *ahead[:1], *fewer[:1], *cut[1:2], *ahead[1:], *cut[2:], *fewer[1:], *found]
    if not static:
        return found
    at = 1 if tiling.inner_reduction and not reads_once(tiling) else 2
    cut = [replace(found[0], split=p) for p in _more_parts(tiling, rows, row, found[0], target)]
    return [*found[:at], *cut, *found[at:]]


def _adds_up_memory(tiling: Tiling, elements: int, target: Target) -> bool:
    """Whether parts go down the columns of one operand that the L2 cache does not hold. Few registers are the fastest then,
    if not out of the cache, where a contest's warm launches find half of it."""
    large = elements * bytes_each(tiling) > target.l2_bytes
    return large and not tiling.inner_reduction and len(streaming_accesses(tiling)) == 1


def _fetching(tiling: Tiling, config: TritonConfig) -> list[TritonConfig]:
    """`config` of a loop that loads its next blocks while it adds up one of them, where it is the only one."""
    return [] if config.persistent or (not reads_once(tiling) and tiling.inner_reduction) else [replace(config, stages=3)]


def _split_parts(tiling: Tiling, rows: int, row: int, config: TritonConfig, target: Target) -> list[int]:
    """Numbers of parts to cut the rows into so that every SM has several programs, best first.

    Empty when the rows alone fill the GPU, are short, or hold what cannot be cut.
    """
    programs = -(-rows // config.x_block)
    if not _can_be_cut(tiling) or programs >= 2 * target.sm_count or row * config.x_block < _SPLIT_ROW:
        return []
    least = 512 if tiling.inner_reduction else 64
    few, many = (-(-n * target.sm_count // programs) for n in (PROGRAMS_PER_SM, _MOST_PROGRAMS_PER_SM))
    most = min(max(few, min(many, row * config.x_block // _LONG_PART)), row // least)
    wanted = min(most, _FEW_PARTS)
    more = [min(most, 2 * _FEW_PARTS)] if most > wanted else []  # as many as run at once leave nobody to take another's turn
    parts = (_even_parts(tiling, row, p) for p in (wanted, *more, wanted // 2))
    return list(dict.fromkeys(p for p in parts if p > 1))


def _more_parts(tiling: Tiling, rows: int, row: int, config: TritonConfig, target: Target) -> list[int]:
    """At most one number of parts for long rows that fill the GPU by themselves: with a few waves of programs, the last,
    which is not full, takes as long as any."""
    programs = -(-rows // config.x_block)
    if not _can_be_cut(tiling) or row * config.x_block < 2 * _LONG_PART or programs > _WAVES_OF_ROWS * target.sm_count:
        return []
    parts = _even_parts(tiling, row, max(2, row * config.x_block // _LONG_PART))
    return [parts] if parts > 1 else []


def _can_be_cut(tiling: Tiling) -> bool:
    """Whether partial results of the rows can be joined: those of a scan need each other."""
    nodes = list(postorder(tiling.nest.roots))
    return any(isinstance(n, Reduce) for n in nodes) and not any(isinstance(n, Scan) for n in nodes)


def _even_parts(tiling: Tiling, row: int, wanted: int) -> int:
    """A number of parts near `wanted`: a power of two, which cuts most rows exactly. Where equal parts matter, a divisor of
    the row: a store along the row has no mask for the last part, and Welford's sums need one more pass."""
    power = next_power_of_2(wanted)
    if power * power > 2 * wanted * wanted:
        power //= 2
    streams = any(frozenset(tiling.nest.reduced) & s.symbols() for s in tiling.nest.stores)
    if row % power == 0 or not (streams or has_welford(tiling)):
        return power
    divisor = next((p for p in range(wanted, max(1, wanted // 4), -1) if row % p == 0), 1)
    return divisor if streams or divisor > 1 else power


def join_config(region: Region, target: Target) -> TritonConfig:
    """For the kernel that joins parts, which lie in the L2 cache: narrow reads that fill the GPU, as many at once as
    registers allow, are the fastest."""
    tiling = tile(region, "flat")
    if tiling.inner_reduction:
        return next(c for c in reduction_configs(tiling, target) if c.split == 1)
    points, parts = tiling.x.hint, next_power_of_2(tiling.r.hint)
    width = 4 * SECTOR_BYTES // 4
    while width > SECTOR_BYTES // 4 and -(-points // width) < target.sm_count:
        width //= 2
    width = min(width, next_power_of_2(points))
    values = max(16, column_values(tiling))
    warps = 8 if width * parts > 4 * 32 * values else 4
    block = max(1, min(parts, values * 32 * warps // width))
    return TritonConfig(width, r_block=block, persistent=is_whole(tiling, block), num_warps=warps)
