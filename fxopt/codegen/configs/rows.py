"""Configurations of reductions along rows: in registers, in loops, in turns, whole groups of rows."""

from __future__ import annotations

from dataclasses import replace

from fxopt.codegen.configs.demands import (
    PERSISTENT_LIMIT,
    ROW_WORTH_FETCHING,
    VALUES_PER_THREAD,
    block_values,
    bytes_each,
    coalesced_per_thread,
    has_welford,
    one_access,
    pressure,
    reads_once,
    rows_per_program,
    streaming_accesses,
)
from fxopt.codegen.triton_config import TritonConfig, next_power_of_2
from fxopt.codegen.triton_tiling import Tiling
from fxopt.ir.exprs import free_symbols
from fxopt.ir.loops import Reduce, Scan, postorder
from fxopt.target import Target

_LONG_BLOCK = 8192  # elements of a row that take many warps to hold, all waiting for each other; half where looping is cheap
_LIGHT_WARPS = 8  # of a loop along a row with one access each thread and step: few registers, so that an SM holds many
_ROW_OF_ONE_WARP = 512  # elements of a row from which on one warp has enough of them to load at once
_FEW_WARPS = 4096  # elements of a row from which on a program has warps enough with 32 elements each thread
_LOOPED_GROUP = 4096  # elements of a group of rows from which on reading them again, out of the cache, is worth a trial
_KEPT_IN_CACHE = 40 << 20  # bytes of rows, one for each SM, that a second loop over them finds in the L2 cache
_TURNING_WARPS = 32  # of an SM, for programs that load their next rows while they reduce one
_WARPS_ALONE = 16  # programs of one warp for each SM, which leaves each thread 128 registers
_MOST_OF_ROW = 32  # elements of a row in each thread of a warp that has it alone


def _warps_for(elements: int, per_thread: int) -> int:
    return min(16, max(1, next_power_of_2(elements // (32 * per_thread) or 1)))


def row_configs(tiling: Tiling, rows: int, row: int, static: bool, target: Target) -> list[TritonConfig]:
    """The reduced axis is contiguous: rows in registers when they fit, several short rows per program; else looped over."""
    block = next_power_of_2(row)
    once = reads_once(tiling)
    short = (1024, 4)
    shapes = ((2048, 4), (4096, 8), short, (8192, 16)) if once else ((4096, 8), (2048, 4), (8192, 16), short)
    even = coalesced_per_thread(tiling)
    shared = once and rows >= 4 * target.sm_count and _shares_rows(tiling)
    looped = [
        TritonConfig(1, r_block=size, persistent=False, num_warps=max(warps, min(16, size // (32 * even))))
        for size, warps in shapes
        if size < block or not static
    ]
    if even < 16 and looped:  # one access of the wider type for each thread, not two that each touch every sector
        looped.insert(1, replace(looped[0], num_warps=min(16, 2 * looped[0].num_warps)))
        looped = list(dict.fromkeys(looped))
    if shared:  # two rows in half as many steps each: as many bytes in flight, and half the reads of what is shared
        looped = [replace(c, x_block=2) if c.r_block == short[0] else c for c in looped]
    step = _LIGHT_WARPS * 32 * one_access(tiling)
    light = [
        TritonConfig(1, r_block=times * step, persistent=False, num_warps=times * _LIGHT_WARPS)
        for times in (1, 2)  # a loop of half as many steps, which LLVM unrolls, needs fewer registers
        if times * step < block or not static
    ]
    if once or block > PERSISTENT_LIMIT:
        looped[1:1] = light[:1]
        looped, light = list(dict.fromkeys(looped)), []
    if not static or block > PERSISTENT_LIMIT:
        read = row * sum(a.itemsize for a in streaming_accesses(tiling) if not a.writes)
        if not once and rows >= target.sm_count and read * target.sm_count < 2 * _KEPT_IN_CACHE:
            each = min(even, 8 if _has_pairs(tiling) else 16)
            alone = TritonConfig(1, r_block=32 * 32 * each, persistent=False, num_warps=32)
            at = 0 if read * target.sm_count < _KEPT_IN_CACHE else 1  # of twice as much, a loop backwards finds half
            looped[at:at] = [c for c in (alone, replace(alone, stages=3)) if _fits_shared(tiling, c, target)]
        return looped
    together = max(1, 512 // block)
    while together > 1 and -(-rows // together) < target.sm_count:
        together //= 2
    values = min(even, max(8, VALUES_PER_THREAD * 2 // pressure(tiling)))
    found = []
    wide, twice = (32, together), (min(16, values), 2 * together)
    others = [wide] if block >= _FEW_WARPS else [wide, twice] if block >= _ROW_OF_ONE_WARP and together == 1 else [twice]
    sharing = [(min(16, values), together), (min(8, values), together), *others]
    if (enough := rows_per_program(rows, row, bytes_each(tiling), target, together)) > together:
        room = min(even, max(8, block_values(tiling)))
        sharing = [(min(16, room), enough), (min(32, room), enough), (min(16, room), 2 * enough), *sharing]
    for per_thread, count in sharing:
        found.append(TritonConfig(count, r_block=block, num_warps=_warps_for(block * count, per_thread)))
    if shared and together == 1:
        found.insert(2, replace(found[0], x_block=2))  # twice the bytes in flight, and half the reads of what is shared
    if block >= 16 * 32 * 32:
        found.insert(0, replace(found[0], num_warps=32))
    turning = _turning(tiling, rows, found[0], target)
    roomy = [c for c in found if _fits_registers(tiling, c, target)]
    if not roomy and not looped:
        looped = [TritonConfig(1, r_block=block, persistent=False, num_warps=4)]
    crowded = rows >= target.sm_count  # else no program is kept out, and all loads at once are the fastest
    if once and crowded and block > (_LONG_BLOCK if has_welford(tiling) else _LONG_BLOCK // 2):
        ranked = [*looped[:2], *roomy, *looped[2:], *(c for c in found if c not in roomy)]
    else:
        ranked = [*roomy, *looped, *(c for c in found if c not in roomy)]
    return [*ranked[:1], *turning, *(light if block >= _FEW_WARPS else []), *ranked[1:]]


def _turning(tiling: Tiling, rows: int, config: TritonConfig, target: Target) -> list[TritonConfig]:
    """As many programs of `config` as run at once, each loading its next rows while it reduces one: else a program's loads
    all wait, and its sums then wait for each other while nothing is loaded."""
    nest = tiling.nest
    along = frozenset(tiling.r.symbols)
    gathers = any(n.indirect and along & n.symbols() for n in tiling.merged.loads())
    plain = not gathers and all(s.mode == "set" for s in nest.stores)
    read = config.x_block * config.r_block * bytes_each(tiling, writes=False)
    most = max(1, min(8, _TURNING_WARPS // config.num_warps))
    long = config.r_block >= ROW_WORTH_FETCHING and rows >= 8 * most * target.sm_count * config.x_block
    for each, stages in ((most, 3), (1, 3), (1, 2)) if plain and long else ():
        if each * (stages - 1) * read <= target.shared_per_block:
            own = replace(config, stages=stages, programs=each * target.sm_count)
            return [own, *_turning_warps(tiling, rows, config, target)]
    return []


def _turning_warps(tiling: Tiling, rows: int, config: TritonConfig, target: Target) -> list[TritonConfig]:
    """Programs of one warp that take turns at short rows: its reductions wait for no other warp, and what is one for a row
    is computed by 32 threads. Without turns so many programs would not start as fast as memory is."""
    alone = replace(config, x_block=1, num_warps=1, stages=3, programs=_WARPS_ALONE * target.sm_count)
    short = config.r_block <= 32 * _MOST_OF_ROW and rows >= 8 * alone.programs
    waits = not reads_once(tiling) or _has_pairs(tiling)  # held in registers, a row's maximum comes before its other sums
    each = [replace(alone, stages=stages) for stages in (3, 2)] if short and waits else []
    return [c for c in each if _fits_shared(tiling, replace(c, x_block=_WARPS_ALONE), target)][:1]


def group_configs(tiling: Tiling, size: int, target: Target) -> list[TritonConfig]:
    """Rows in registers, whole groups of `size` of them in a program: those of large groups on as many warps as that takes,
    several small ones on a few."""
    block = next_power_of_2(tiling.r.hint)
    streams = max(1, sum(not a.writes for a in streaming_accesses(tiling)))
    found = []
    for per_thread, least in ((16, 4), (8, 4), (32, 4), (16, 8)):
        warps = min(32, max(least, size * block // (32 * per_thread)))
        together = max(1, 32 * warps * per_thread // (size * block))
        while together > 1 and -(-tiling.x.hint // (size * together)) < 2 * target.sm_count:
            together //= 2
        enough = rows_per_program(tiling.x.hint // size, size * block, bytes_each(tiling), target, together)
        for count in dict.fromkeys((enough, together)):
            own = min(32, warps * count // together)
            held = size * count * block // (32 * own) * streams
            crowded = 1.5 * held + 32 > min(255, target.registers_per_sm // (32 * own))
            found.append((crowded, TritonConfig(size * count, r_block=block, num_warps=own)))
    whole = [c for _, c in sorted(found, key=lambda t: t[0])]
    if size * block <= _LOOPED_GROUP:
        return whole
    # a program that holds its group leaves no room for a second one, which would load while it computes
    looped = TritonConfig(size, r_block=max(1, _LOOPED_GROUP // size), persistent=False, num_warps=8)
    return [whole[0], looped, *whole[1:]]


def _shares_rows(tiling: Tiling) -> bool:
    """Whether what is reduced is a product of each row with one that all rows share: a matrix times a vector."""
    along, across = frozenset(tiling.r.symbols), frozenset(tiling.x.symbols)
    loads = [n for n in tiling.nest.loads() if along & n.symbols()]
    own = [n for n in loads if across & n.symbols()]
    return 0 < len(own) < len(loads)


def _fits_registers(tiling: Tiling, config: TritonConfig, target: Target) -> bool:
    """A persistent row's elements, with what its reductions carry beside each, leave room for addresses and temporaries."""
    per_thread = config.x_block * config.r_block / (target.warp_size * config.num_warps)
    budget = min(255, target.registers_per_sm // (target.warp_size * config.num_warps))
    return per_thread * _row_words(tiling) * 1.25 + 24 <= budget


def _fits_shared(tiling: Tiling, config: TritonConfig, target: Target) -> bool:
    """What a loop over the row loads ahead, a block of each operand for each step but the current one."""
    along = frozenset(tiling.r.symbols)
    each = sum(a.itemsize for a in set(tiling.accesses) if not a.writes and along & free_symbols(a.index))
    return (config.stages - 1) * config.x_block * config.r_block * each <= target.shared_per_block


def _row_words(tiling: Tiling) -> int:
    """32-bit registers per element of the row: the operands of its widest reduction."""
    reductions = [n for n in postorder(tiling.nest.roots) if isinstance(n, Reduce | Scan)]
    return max((sum(max(1, a.dtype.itemsize // 4) for a in n.args) for n in reductions), default=1)


def _has_pairs(tiling: Tiling) -> bool:
    """Whether a reduction carries two values for each element of a block."""
    kinds = {n.kind for n in postorder(tiling.nest.roots) if isinstance(n, Reduce)}
    return bool(kinds & {"welford", "softmax_stats", "weighted_softmax", "argmax", "argmin"})
