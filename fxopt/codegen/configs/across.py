"""Configurations of row reductions with sums over their rows: together, one after the other, or apart."""

from __future__ import annotations

from dataclasses import replace

from fxopt.codegen.configs.demands import LINE_BYTES, PERSISTENT_LIMIT, PROGRAMS_PER_SM, ROW_WORTH_FETCHING, narrowest_bytes
from fxopt.codegen.configs.nests import nest_configs
from fxopt.codegen.triton_apart import apart, statistics_first
from fxopt.codegen.triton_config import TritonConfig, next_power_of_2
from fxopt.codegen.triton_tiling import Tiling, tile
from fxopt.ir.loops import Reduce, loads_below, postorder
from fxopt.ir.region import Region
from fxopt.target import Target

_PART_SHARE = 4  # what is loaded, over what parts may store and load again for their sums


def across_configs(region: Region, target: Target) -> list[TritonConfig]:
    """A row reduction with sums over the rows: together, where a row and the sums fit into registers; else what the rows
    reduce to first, or apart.

    As many programs as the GPU holds at once, unless their sums would then be much of what is written.
    """
    alone, tiling = TritonConfig(1), tile(region)
    if not (tiling.inner_reduction and tiling.x.symbols and isinstance(tiling.r.extent, int)):
        return [alone]
    found = _together_configs(region, tiling, target)
    if not found:
        pieces = statistics_first(region)
        down = [] if pieces is None else [replace(c, statistics=True) for c in _down_long_rows(pieces[1], target)]
        return [*down[:2], alone, *down[2:]] if tiling.r.hint > PERSISTENT_LIMIT else [alone, *down]
    ahead = replace(found[0], stages=3)
    first = [ahead, found[0]] if found[0].r_block >= ROW_WORTH_FETCHING else [found[0], ahead]
    if _is_crowded(found[0]):
        first.insert(1, replace(found[0], num_warps=2 * found[0].num_warps, stages=2))
        found[1:1] = [replace(alone, stages=2)] * any(c.programs for c in nest_configs(apart(region)[0], target))
    return list(dict.fromkeys([*first, *found[1:2], alone, *found[2:]]))


def _is_crowded(config: TritonConfig) -> bool:
    """Whether a program holds so much in each thread that its few warps, alone on their multiprocessor, wait for each other.
    Twice as many, with half the registers, may spill a few words, which cost less."""
    return config.x_block * config.r_block >= 32 * 32 * config.num_warps


def _down_long_rows(columns: Region, target: Target) -> list[TritonConfig]:
    """Configurations of what goes down the columns of long rows: with many operands, wide pieces of few rows, while their
    programs are as many as run at once, are 2 to 6 % faster (an H100, 2048 rows of 131072)."""
    proposed = nest_configs(columns, target, 3)
    points, width = tile(columns).x.hint, 4 * LINE_BYTES // 4
    wide = replace(proposed[0], x_block=width, r_block=max(1, proposed[0].x_block * proposed[0].r_block // width), split=1)
    fits = points >= PROGRAMS_PER_SM * target.sm_count * width and width > proposed[0].x_block
    return list(dict.fromkeys([wide, *proposed] if fits else proposed))[:3]


def _together_configs(region: Region, tiling: Tiling, target: Target) -> list[TritonConfig]:
    rows, block = tiling.x.hint, next_power_of_2(tiling.r.hint)
    streams, sums = _streams_and_sums(region)
    found = []
    for wanted in (8, 16, 32, 4):
        warps = min(16, max(4, block // (32 * wanted)))
        together = max(1, 32 * warps * wanted // block)
        per_thread = together * block / (32 * warps)
        registers = per_thread * (streams + sums + 1.5) + 28
        if registers > min(255, target.registers_per_sm // (32 * warps)):
            continue
        resident = max(1, min(8, int(target.registers_per_sm / (registers * 32 * warps)), 64 // warps))
        light = rows * streams * narrowest_bytes(tiling) // (_PART_SHARE * 4 * sums)
        parts = min(resident * target.sm_count, max(light, target.sm_count), -(-rows // together))
        found.append(TritonConfig(together, r_block=block, num_warps=warps, split=parts))
    return list(dict.fromkeys(c for c in found if c.split > 1))


def _streams_and_sums(region: Region) -> tuple[int, int]:
    """How many elements a region with sums over its rows loads for each element of a row, and how many sums it keeps."""
    assert region.across is not None
    points, reduced = frozenset(region.nest.points), frozenset(region.nest.reduced)
    made = region.nest.writes()  # passed in registers
    loads = [n for n in loads_below(region.nest.roots + region.across.roots) if n.buffer not in made]
    full = sum(bool(points & load.symbols()) and bool(reduced & load.symbols()) for load in loads)
    sums = {n for n in postorder(region.across.roots) if isinstance(n, Reduce) and points >= frozenset(n.axes)}
    return max(1, full), max(1, len(sums))
