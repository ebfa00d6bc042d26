"""Launch configurations of a nest, ordered by a cost model: bytes in flight, wasted lanes, registers, GPU filled."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from fxopt.codegen.triton_apart import apart, statistics_first
from fxopt.codegen.triton_groups import group_size, with_group_sums
from fxopt.codegen.triton_index import same_within
from fxopt.codegen.triton_tiling import Access, Axis, Tiling, tile
from fxopt.ir.exprs import Int, coefficient, floordiv, free_symbols, mul
from fxopt.ir.loops import IndexValue, Op, Reduce, Scan, loads_below, postorder
from fxopt.ir.region import Region
from fxopt.target import Target

PERSISTENT_LIMIT = 32768
"""Longest row held in registers, in elements."""

BYTE_RUN = 4
"""Neighbouring bytes that a thread takes beside values of four bytes or more, of which it then takes 16 bytes."""

_CHEAP = ("cast", "where", "add", "mul", "sub")
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
_SECTOR_BYTES = 32  # the smallest piece that is read from memory
_SPLIT_ROW = 16384  # a row shorter than this is not worth a second kernel
_LINE = 128  # bytes of a cache line
_LONG_BLOCK = 8192  # elements of a row that take many warps to hold, all waiting for each other; half where looping is cheap
_LIGHT_WARPS = 8  # of a loop along a row with one access each thread and step: few registers, so that an SM holds many
_ROW_OF_ONE_WARP = 512  # elements of a row from which on one warp has enough of them to load at once
_FEW_WARPS = 4096  # elements of a row from which on a program has warps enough with 32 elements each thread
_SMALL = 1 << 18  # elements that the L2 cache serves, whatever the access pattern
_PROGRAMS_PER_SM = 6  # of four warps, each with one 16-byte load per thread in flight or more
_PART_SHARE = 4  # what is loaded, over what parts may store and load again for their sums
_ROW_WORTH_FETCHING = 512  # elements of a row from which on loading the next ahead pays: shorter ones go several at a time
_MOST_PROGRAMS_PER_SM = 24  # where parts stay long: so many that the last wave, which is not full, does not count
_LOOPED_GROUP = 4096  # elements of a group of rows from which on reading them again, out of the cache, is worth a trial
_FEW_PARTS = 1024  # of one column of programs, which the kernel that joins them reads in a few steps
_LONG_PART = 1 << 15  # elements of a part beside which starting it and joining its result cost nothing
_WAVES_OF_ROWS = 64  # programs for each SM, of which some run at a time, from which on the last ones do not count
_KEPT_IN_CACHE = 40 << 20  # bytes of rows, one for each SM, that a second loop over them finds in the L2 cache
_PROGRAM_BYTES = 8 << 10  # read and written, in whose time a GPU starts a program: an H200 one in 1.28 ns, which moves 5 KB
_LONG_ROW = 256  # elements of a row that are worth a program
_SHORT_ROWS_POINTS = 2048  # of shorter rows, in one program
_MANY_PROGRAMS = 16  # for each SM, from which on the rate at which they start may decide
_TURNING_WARPS = 32  # of an SM, for programs that load their next rows while they reduce one
_VALUES_PER_THREAD = 64  # live block values of one expression that stay clear of spilling


@dataclass(frozen=True)
class TritonConfig:
    """How a nest is laid out on the GPU.

    `x_block` points (times `y_block` for two-dimensional tiles) per program; `r_block` reduced elements per step, the whole
    row when `persistent`; `split` > 1 cuts the reduced axis into that many parts in a kernel of their own, or, for a region
    with sums over its rows, the rows into parts for one program each. `stages` > 1 loads that many steps of a loop ahead, or
    the next rows, for such a region whose nests are kernels apart. With `rows` the points of a program all lie in one row.
    With `statistics` a region with sums over its rows first has what the rows reduce to in a kernel of its own; the rest
    of the configuration is that of all else. `aligned` assumes that every pointer is 16-byte aligned.
    """

    x_block: int
    y_block: int = 1
    r_block: int = 1
    persistent: bool = True
    num_warps: int = 4
    split: int = 1
    stages: int = 1
    aligned: bool = True
    rows: bool = False
    statistics: bool = False
    programs: int = 0

    def __str__(self) -> str:
        shape = f"{'statistics ' if self.statistics else ''}x{self.x_block}"
        shape += f" y{self.y_block}" if self.y_block > 1 else ""
        shape += " rows" if self.rows else ""
        shape += f" r{self.r_block}{'' if self.persistent else ' looped'}" if self.r_block > 1 else ""
        ahead = f" stages{self.stages}" if self.stages > 1 else ""
        ahead += f" programs{self.programs}" if self.programs else ""
        return f"{shape} w{self.num_warps}{ahead}" + (f" split{self.split}" if self.split > 1 else "")


def next_power_of_2(n: int) -> int:
    return 1 << max(n - 1, 0).bit_length()


def _power_of_2_within(n: int) -> int:
    return 1 << max(n.bit_length() - 1, 0)


def configs(region: Region, target: Target, limit: int = 8) -> list[TritonConfig]:
    """Up to `limit` distinct configurations of `region` for `target`, best first by the cost model. Never empty."""
    region = with_group_sums(region)
    two_dimensional = tile(region)
    if region.across is not None:
        found = _across_configs(region, two_dimensional, target)
    elif two_dimensional.y.symbols:
        found = _tile_configs(two_dimensional, target)
    elif (size := group_size(region.nest)) > 1:
        found = _group_configs(two_dimensional, size, target)
    elif two_dimensional.reduces:
        found = _reduction_configs(two_dimensional, target)
    else:
        rows, points = tile(region, "rows"), _pointwise_configs(two_dimensional, target)
        own = [*_row_point_configs(rows, target), *points]
        found = [*own[:1], *_sharing_row_points(rows), *_short_row_points(rows), *own[1:]]
    return list(dict.fromkeys(found))[:limit]


def _narrowest(tiling: Tiling) -> int:
    return min((a.itemsize for a in tiling.accesses), default=4)


def one_access(tiling: Tiling) -> int:
    """Elements of one 16-byte access of the widest type."""
    return max(1, 16 // max((a.itemsize for a in _streams(tiling)), default=4))


def byte_run(tiling: Tiling) -> int:
    """Most neighbouring elements of one byte that a thread takes in one access; 0 for any number.

    Triton gives each thread as many neighbours as make 16 bytes of the narrowest type, in all accesses: 16 bytes of a mask
    are 64 of the float32 values beside it, of which one instruction then reads a quarter of every second line.
    """
    return BYTE_RUN if max((a.itemsize for a in _streams(tiling)), default=1) >= 4 else 0


def _even(tiling: Tiling) -> int:
    """Most elements per thread and step with which the widest accesses stay coalesced: a sector (32 bytes) for each thread
    is still whole. See `byte_run`, which takes care of bytes."""
    sizes = [a.itemsize for a in _streams(tiling)] or [1]
    most = max(1, _SECTOR_BYTES // max(sizes))
    narrowest = BYTE_RUN if min(sizes) == 1 and byte_run(tiling) else min(sizes)
    return most if 16 // narrowest > most else _VALUES_PER_THREAD


def _streams(tiling: Tiling) -> list[Access]:
    """The accesses that touch an element of their own at every iteration, or nearly so."""
    axes = (*tiling.x.symbols, *tiling.y.symbols, *tiling.r.symbols)

    def touched(access: Access) -> int:
        used = free_symbols(access.index)
        return Axis(tuple(s for s in axes if s in used)).hint

    return [a for a in tiling.accesses if 2 * touched(a) > Axis(axes).hint]


def _pressure(tiling: Tiling) -> int:
    """Roughly how many block values are live at once: one per stream and a share of the heavy operators."""
    heavy = sum(isinstance(n, Op) and n.name not in _CHEAP for n in postorder(tiling.nest.roots))
    wide = 2 if any(a.itemsize == 8 for a in tiling.accesses) else 1
    return max(1, (len(tiling.accesses) + heavy // 4) * wide)


def _block_values(tiling: Tiling) -> int:
    """Elements for each thread that stay clear of spilling, where what is one value for a row counts for nothing."""
    along = frozenset(tiling.r.symbols)
    blocks = [a for a in tiling.accesses if along & free_symbols(a.index)] if along else _streams(tiling)
    heavy = sum(isinstance(n, Op) and n.name not in _CHEAP for n in postorder(tiling.nest.roots))
    return 2 * _VALUES_PER_THREAD // max(1, len(blocks) + heavy // 4)


def _fill(points: int, block: int, target: Target) -> float:
    """Share of the GPU's SMs that a grid of `points / block` programs keeps busy (several programs fit on one SM)."""
    programs = -(-points // block)
    waves = -(-programs // target.sm_count)
    return programs / (waves * target.sm_count)


def _bytes_each(tiling: Tiling, writes: bool = True) -> int:
    """Bytes that an iteration reads (and `writes`) in memory, about: what is read twice comes out of a cache."""
    streams = {*_streams(tiling), *(a for a in tiling.accesses if _is_gathered(tiling, a))}
    names = [*(load.buffer for load in tiling.merged.loads()), *(store.buffer for store in tiling.merged.stores)]
    own = (t for t in zip(names, tiling.accesses, strict=True) if t[1] in streams and (writes or not t[1].writes))
    return sum({n: a.itemsize for n, a in own}.values()) or 1


def _is_gathered(tiling: Tiling, access: Access) -> bool:
    """Whether it is a row at an index that was loaded, which lies in memory as rows one after the other do."""
    axes = (*tiling.x.symbols, *tiling.y.symbols, *tiling.r.symbols)
    used = free_symbols(access.index)
    return bool(tiling.r.symbols) and used >= set(tiling.r.symbols) and any(s.size is not None for s in used - set(axes))


def _enough(rows: int, row: int, each: int, target: Target, least: int = 1) -> int:
    """How many of `rows` rows of `row` elements, `each` bytes in memory, a program needs at `least` and lest its start take
    longer than its bytes, a power of two times `least`."""
    count = least
    while count * row * each < _PROGRAM_BYTES and rows >= 2 * count * _MANY_PROGRAMS * target.sm_count:
        count *= 2
    return count


def _pointwise_configs(tiling: Tiling, target: Target) -> list[TritonConfig]:
    """One 16-byte access per thread of the narrowest type first, so that wider ones take several."""
    points = max(1, tiling.x.hint)
    even = _even(tiling)
    vector = min(8, even, max(1, 16 // _narrowest(tiling)))
    room = max(vector, _power_of_2_within(_VALUES_PER_THREAD // _pressure(tiling)))
    first, each = min(room, even, 8), _bytes_each(tiling)
    scored = []
    for warps in (4, 8, 2):
        for per_thread in dict.fromkeys((vector, min(even, 8), min(even, 16), max(1, vector // 2))):
            block = min(32 * warps * per_thread, max(32, next_power_of_2(points)))
            odd = (0.2 if per_thread > first else 0.5) if per_thread != first else 0.0
            crowd = points >= block * _MANY_PROGRAMS * target.sm_count
            odd += max(0.0, 1 - block * each / _PROGRAM_BYTES) if crowd else 0.0
            cost = odd + (1 - _fill(points, block, target)) + (0.0 if warps == 4 else 0.25)
            crowded = 0.0 if per_thread <= room else 0.3 if per_thread <= 2 * room else 1.0
            scored.append((cost + crowded, TritonConfig(block, num_warps=warps)))
    return [c for _, c in sorted(scored, key=lambda t: t[0])]


def batch_configs(tiling: Tiling, elements: Sequence[int], target: Target) -> list[TritonConfig]:
    """Configurations of a batched kernel over members of these sizes: what a program looks up is spread over several
    accesses per thread."""
    vector = min(8, max(1, 16 // _narrowest(tiling)))
    room = max(vector, _VALUES_PER_THREAD // _pressure(tiling))
    most = max(32, next_power_of_2(max(elements)))
    found = []
    for warps, per_thread in ((4, max(8, vector)), (4, vector), (8, max(8, vector)), (4, 16), (8, vector), (2, vector)):
        block = min(32 * warps * per_thread, most)
        config = TritonConfig(block, num_warps=max(1, min(warps, block // (32 * vector))))
        found.append((per_thread > 2 * room, config))
    return list(dict.fromkeys(c for _, c in sorted(found, key=lambda t: t[0])))


def _row_point_configs(tiling: Tiling, target: Target) -> list[TritonConfig]:
    """One program in one row: the block that leaves fewest lanes idle at the row's end, the larger of nearly equal ones. Of
    several short rows too, where there are so many that their programs could not start as fast as memory is."""
    row = tiling.x.hint
    if row < _LONG_ROW or not _same_along(tiling.x, tiling):
        return []

    def idle(block: int) -> float:
        return block * -(-row // block) / row + 64 / block

    block = min((1024, 2048, 512, 256), key=idle)
    pieces = tiling.y.hint * -(-row // block)
    together = min(_enough(pieces, block, _bytes_each(tiling), target), 1 << (tiling.y.hint.bit_length() - 1))
    several, one = (_row_points(tiling, block, count) for count in (together, 1))
    fits = block * together // (32 * several.num_warps) <= _block_values(tiling)  # a pool's windows are many values
    found = [several, one] if fits and together > 1 else [one]
    if block > 1024:
        found.append(_row_points(tiling, block // 2, 1))
    crowded = block // (32 * one.num_warps) * _pressure(tiling) > 2 * _VALUES_PER_THREAD  # a pool's windows, loaded at once
    return [*found, replace(one, num_warps=2 * one.num_warps)] if crowded and one.num_warps < 16 else found


def _short_row_points(tiling: Tiling) -> list[TritonConfig]:
    """Whole short rows: what is the same along one has one index for all its points, and its quotients one divisor."""
    row = tiling.x.hint
    several = _SHORT_ROWS_POINTS // row
    fits = tiling.y.hint >= several and row < _LONG_ROW and row == next_power_of_2(row)
    return [_row_points(tiling, row, several)] if fits and _same_along(tiling.x, tiling) else []


def _sharing_row_points(tiling: Tiling) -> list[TritonConfig]:
    """As many neighbours as one access a thread takes, of several rows: what is the same for all of these, such as a
    channel's scale or what is repeated, is loaded and computed once."""
    block = 4 * 32 * one_access(tiling)
    together = max(2, min(8, _block_values(tiling) // one_access(tiling)))
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
    warps = max(1, min(4, points // 256), points // (32 * min(16, _even(tiling))))
    return TritonConfig(block, y_block=rows, num_warps=min(16, warps), rows=True)


def _tile_configs(tiling: Tiling, target: Target) -> list[TritonConfig]:
    """Two-dimensional tiles: whole cache lines along both axes, while enough tiles remain to fill the GPU."""
    x, y = tiling.x.hint, tiling.y.hint
    line = max(16, _LINE // _narrowest(tiling))
    scored = []
    for bx, by, warps in _TILES:
        bx, by = min(bx, next_power_of_2(x)), min(by, next_power_of_2(y))
        waste = bx * -(-x // bx) * by * -(-y // by) / (x * y) - 1
        short = max(0.0, 1 - bx / line) + max(0.0, 1 - by / line)
        spill = 1.0 if bx * by * _pressure(tiling) > 32 * warps * 2 * _VALUES_PER_THREAD else 0.0
        idle = max(0.0, 1 - x * y / (bx * by) / (2 * target.sm_count))
        scored.append((round(waste + short + spill + idle, 2), TritonConfig(bx, y_block=by, num_warps=warps)))
    return [c for _, c in sorted(scored, key=lambda t: t[0])]


def _reduction_configs(tiling: Tiling, target: Target) -> list[TritonConfig]:
    rows, row = max(1, tiling.x.hint), max(1, tiling.r.hint)
    static = isinstance(tiling.r.extent, int)
    if tiling.inner_reduction:
        found = _row_configs(tiling, rows, row, static, target)
    else:
        found = _column_configs(tiling, rows, row, target)
    parts = _split_parts(tiling, rows, row, found[0], target)
    if parts:
        others = [c for c in found[1:] if not c.persistent][: 2 if found[0].x_block < tiling.x.hint else 1]
        cut = [replace(c, split=parts[0]) for c in (found[0], *others)]
        fewer = [replace(found[0], split=p) for p in reversed(parts[1:])]
        ahead = [config for first in (cut[0], *fewer[:1]) for config in _fetching(tiling, first)]
        return [cut[0], *ahead[:1], *fewer[:1], *cut[1:2], *ahead[1:], *cut[2:], *fewer[1:], *found]
    if not static:
        return found
    at = 1 if tiling.inner_reduction and not _reads_once(tiling) else 2
    cut = [replace(found[0], split=p) for p in _more_parts(tiling, rows, row, found[0], target)]
    return [*found[:at], *cut, *found[at:]]


def _fetching(tiling: Tiling, config: TritonConfig) -> list[TritonConfig]:
    """`config` of a loop that loads its next blocks while it adds up one of them, where it is the only one."""
    return [] if config.persistent or (not _reads_once(tiling) and tiling.inner_reduction) else [replace(config, stages=3)]


def _warps_for(elements: int, per_thread: int) -> int:
    return min(16, max(1, next_power_of_2(elements // (32 * per_thread) or 1)))


def _row_configs(tiling: Tiling, rows: int, row: int, static: bool, target: Target) -> list[TritonConfig]:
    """The reduced axis is contiguous: rows in registers when they fit, several short rows per program; else looped over."""
    block = next_power_of_2(row)
    once = _reads_once(tiling)
    shapes = ((2048, 4), (4096, 8), (1024, 4), (8192, 16)) if once else ((4096, 8), (2048, 4), (8192, 16), (1024, 4))
    even = _even(tiling)
    looped = [
        TritonConfig(1, r_block=size, persistent=False, num_warps=max(warps, min(16, size // (32 * even))))
        for size, warps in shapes
        if size < block or not static
    ]
    if even < 16 and looped:  # one access of the wider type for each thread, not two that each touch every sector
        looped.insert(1, replace(looped[0], num_warps=min(16, 2 * looped[0].num_warps)))
        looped = list(dict.fromkeys(looped))
    step = _LIGHT_WARPS * 32 * one_access(tiling)
    light = [TritonConfig(1, r_block=step, persistent=False, num_warps=_LIGHT_WARPS)] if step < block or not static else []
    if once or block > PERSISTENT_LIMIT:
        looped[1:1] = light
        looped, light = list(dict.fromkeys(looped)), []
    if not static or block > PERSISTENT_LIMIT:
        read = row * sum(a.itemsize for a in _streams(tiling) if not a.writes)
        if not once and rows >= target.sm_count and read * target.sm_count < 2 * _KEPT_IN_CACHE:
            each = min(even, 8 if _has_pairs(tiling) else 16)
            alone = TritonConfig(1, r_block=32 * 32 * each, persistent=False, num_warps=32)
            at = 0 if read * target.sm_count < _KEPT_IN_CACHE else 1  # of twice as much, a loop backwards finds half
            looped[at:at] = [c for c in (alone, replace(alone, stages=3)) if _fits_shared(tiling, c, target)]
        return looped
    together = max(1, 512 // block)
    while together > 1 and -(-rows // together) < target.sm_count:
        together //= 2
    values = min(even, max(8, _VALUES_PER_THREAD * 2 // _pressure(tiling)))
    found = []
    wide, twice = (32, together), (min(16, values), 2 * together)
    others = [wide] if block >= _FEW_WARPS else [wide, twice] if block >= _ROW_OF_ONE_WARP and together == 1 else [twice]
    sharing = [(min(16, values), together), (min(8, values), together), *others]
    if (enough := _enough(rows, row, _bytes_each(tiling), target, together)) > together:
        room = min(even, max(8, _block_values(tiling)))
        sharing = [(min(16, room), enough), (min(32, room), enough), (min(16, room), 2 * enough), *sharing]
    for per_thread, count in sharing:
        found.append(TritonConfig(count, r_block=block, num_warps=_warps_for(block * count, per_thread)))
    if once and together == 1 and rows >= 4 * target.sm_count and _shares_rows(tiling):
        found.insert(2, replace(found[0], x_block=2))  # twice the bytes in flight, and half the reads of what is shared
    if block >= 16 * 32 * 32:
        found.insert(0, replace(found[0], num_warps=32))
    turning = _turning(tiling, rows, found[0], target)
    roomy = [c for c in found if _fits_registers(tiling, c, target)]
    if not roomy and not looped:
        looped = [TritonConfig(1, r_block=block, persistent=False, num_warps=4)]
    crowded = rows >= target.sm_count  # else no program is kept out, and all loads at once are the fastest
    if once and crowded and block > (_LONG_BLOCK if _has_welford(tiling) else _LONG_BLOCK // 2):
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
    read = config.x_block * config.r_block * _bytes_each(tiling, writes=False)
    most = max(1, min(8, _TURNING_WARPS // config.num_warps))
    long = config.r_block >= _ROW_WORTH_FETCHING and rows >= 8 * most * target.sm_count * config.x_block
    for each, stages in ((most, 3), (1, 3), (1, 2)) if plain and long else ():
        if each * (stages - 1) * read <= target.shared_per_block:
            return [replace(config, stages=stages, programs=each * target.sm_count)]
    return []


def _group_configs(tiling: Tiling, size: int, target: Target) -> list[TritonConfig]:
    """Rows in registers, whole groups of `size` of them in a program: those of large groups on as many warps as that takes,
    several small ones on a few."""
    block = next_power_of_2(tiling.r.hint)
    streams = max(1, sum(not a.writes for a in _streams(tiling)))
    found = []
    for per_thread, least in ((16, 4), (8, 4), (32, 4), (16, 8)):
        warps = min(32, max(least, size * block // (32 * per_thread)))
        together = max(1, 32 * warps * per_thread // (size * block))
        while together > 1 and -(-tiling.x.hint // (size * together)) < 2 * target.sm_count:
            together //= 2
        enough = _enough(tiling.x.hint // size, size * block, _bytes_each(tiling), target, together)
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


def _reads_once(tiling: Tiling) -> bool:
    """Whether one loop over the row makes everything: reductions do not wait for each other, nor what varies along the row
    for any of them. Holding the row in registers then only keeps other programs out."""
    reductions = [n for n in postorder(tiling.nest.roots) if isinstance(n, Reduce | Scan)]
    if any(isinstance(n, Scan) or any(isinstance(a, Reduce | Scan) for a in postorder(n.args)) for n in reductions):
        return False
    along = [s for s in tiling.nest.stores if frozenset(tiling.nest.reduced) & s.symbols()]
    return not any(isinstance(n, Reduce) for s in along for n in postorder(s.roots))


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


def _column_configs(tiling: Tiling, rows: int, row: int, target: Target) -> list[TritonConfig]:
    """Points are contiguous and the reduced axis is strided: whole cache lines along x, and as much r as registers allow.

    Where too few points remain to fill the GPU, `_split_parts` cuts the reduced axis; what is too small for that (joining
    the parts above all) is bound by latency, so it reads half lines in more programs, all loads at once.
    """
    line = max(8, _LINE // _narrowest(tiling))
    width = min(next_power_of_2(rows), line)
    if rows * row <= _SMALL:
        while width > line // 2 and -(-rows // width) < target.sm_count:
            width //= 2
    values = min(_column_values(tiling), _even(tiling))
    found = []
    light = min(values, one_access(tiling))
    shapes = [(width, values, 4), (width, light, 4), (width, values, 8), (2 * width, values, 4), (4 * width, values, 8)]
    if not _aligned_rows(tiling):  # element by element: more threads, each with fewer
        shapes = [(width, min(16, values), 8), (width // 2, min(16, values), 8), *shapes]
    for bx, per_thread, warps in shapes:
        bx = min(bx, next_power_of_2(rows))
        size = max(1, min(next_power_of_2(row), per_thread * 32 * warps // bx))
        found.append(TritonConfig(bx, r_block=size, persistent=_whole(tiling, size), num_warps=warps))
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


def _column_values(tiling: Tiling) -> int:
    """Elements per thread and step: every stream's block and every reduction's accumulators stay in registers."""
    kinds = {n.operands: n.kind for n in postorder(tiling.nest.roots) if isinstance(n, Reduce)}.values()
    carried = sum(2 if kind in ("welford", "softmax_stats") else 1 for kind in kinds)
    room = 2 * _VALUES_PER_THREAD // (_pressure(tiling) + 2 * carried)
    return max(8, min(32, next_power_of_2(room + 1) // 2))


def _whole(tiling: Tiling, size: int) -> bool:
    extent = tiling.r.extent
    return isinstance(extent, int) and extent <= size


def _split_parts(tiling: Tiling, rows: int, row: int, config: TritonConfig, target: Target) -> list[int]:
    """Numbers of parts to cut the rows into so that every SM has several programs, best first.

    Empty when the rows alone fill the GPU, are short, or hold what cannot be cut.
    """
    nodes = list(postorder(tiling.nest.roots))
    if any(isinstance(n, Scan) for n in nodes) or not any(isinstance(n, Reduce) for n in nodes):
        return []
    programs = -(-rows // config.x_block)
    if programs >= 2 * target.sm_count or row * config.x_block < _SPLIT_ROW:
        return []
    least = 512 if tiling.inner_reduction else 64
    few, many = (-(-n * target.sm_count // programs) for n in (_PROGRAMS_PER_SM, _MOST_PROGRAMS_PER_SM))
    most = min(max(few, min(many, row * config.x_block // _LONG_PART)), row // least)
    wanted = min(most, _FEW_PARTS)
    more = [min(most, 2 * _FEW_PARTS)] if most > wanted else []  # as many as run at once leave nobody to take another's turn
    parts = (_even_parts(tiling, row, p) for p in (wanted, *more, wanted // 2))
    return list(dict.fromkeys(p for p in parts if p > 1))


def _more_parts(tiling: Tiling, rows: int, row: int, config: TritonConfig, target: Target) -> list[int]:
    """At most one number of parts for long rows that fill the GPU by themselves: with a few waves of programs, the last,
    which is not full, takes as long as any."""
    nodes = list(postorder(tiling.nest.roots))
    if any(isinstance(n, Scan) for n in nodes) or not any(isinstance(n, Reduce) for n in nodes):
        return []
    programs = -(-rows // config.x_block)
    if row * config.x_block < 2 * _LONG_PART or programs > _WAVES_OF_ROWS * target.sm_count:
        return []
    parts = _even_parts(tiling, row, max(2, row * config.x_block // _LONG_PART))
    return [parts] if parts > 1 else []


def _has_pairs(tiling: Tiling) -> bool:
    """Whether a reduction carries two values for each element of a block."""
    kinds = {n.kind for n in postorder(tiling.nest.roots) if isinstance(n, Reduce)}
    return bool(kinds & {"welford", "softmax_stats", "argmax", "argmin"})


def _has_welford(tiling: Tiling) -> bool:
    return any(isinstance(n, Reduce) and n.kind == "welford" for n in postorder(tiling.nest.roots))


def _even_parts(tiling: Tiling, row: int, wanted: int) -> int:
    """A number of parts near `wanted`: a power of two, which cuts most rows exactly. Where equal parts matter, a divisor of
    the row: a store along the row has no mask for the last part, and Welford's sums need one more pass."""
    power = next_power_of_2(wanted)
    if power * power > 2 * wanted * wanted:
        power //= 2
    streams = any(frozenset(tiling.nest.reduced) & s.symbols() for s in tiling.nest.stores)
    if row % power == 0 or not (streams or _has_welford(tiling)):
        return power
    divisor = next((p for p in range(wanted, max(1, wanted // 4), -1) if row % p == 0), 1)
    return divisor if streams or divisor > 1 else power


def join_config(region: Region, target: Target) -> TritonConfig:
    """For the kernel that joins parts, which lie in the L2 cache: narrow reads that fill the GPU, as many at once as
    registers allow, are the fastest."""
    tiling = tile(region, "flat")
    if tiling.inner_reduction:
        return next(c for c in _reduction_configs(tiling, target) if c.split == 1)
    points, parts = tiling.x.hint, next_power_of_2(tiling.r.hint)
    width = 4 * _SECTOR_BYTES // 4
    while width > _SECTOR_BYTES // 4 and -(-points // width) < target.sm_count:
        width //= 2
    width = min(width, next_power_of_2(points))
    values = max(16, _column_values(tiling))
    warps = 8 if width * parts > 4 * 32 * values else 4
    block = max(1, min(parts, values * 32 * warps // width))
    return TritonConfig(width, r_block=block, persistent=_whole(tiling, block), num_warps=warps)


def part_count(rows: Int, config: TritonConfig) -> Int:
    """How many programs, about `config.programs` or `config.split`, take `rows` points in turns of `config.x_block` so that
    all take equally many turns, or one less."""
    turn, wanted = config.x_block, config.programs or config.split
    each = mul(floordiv(rows + (wanted * turn - 1), wanted * turn), turn)
    return floordiv(rows + each - 1, each)


def _across_configs(region: Region, tiling: Tiling, target: Target) -> list[TritonConfig]:
    """A row reduction with sums over the rows: together, where a row and the sums fit into registers; else what the rows
    reduce to first, or apart.

    As many programs as the GPU holds at once, unless their sums would then be much of what is written.
    """
    alone = TritonConfig(1)
    if not (tiling.inner_reduction and tiling.x.symbols and isinstance(tiling.r.extent, int)):
        return [alone]
    found = _together_configs(region, tiling, target)
    if not found:
        pieces = statistics_first(region)
        down = [] if pieces is None else [replace(c, statistics=True) for c in _down_long_rows(pieces[1], target)]
        return [*down[:2], alone, *down[2:]] if tiling.r.hint > PERSISTENT_LIMIT else [alone, *down]
    ahead = replace(found[0], stages=3)
    first = [ahead, found[0]] if found[0].r_block >= _ROW_WORTH_FETCHING else [found[0], ahead]
    if _is_crowded(found[0]):
        first.insert(1, replace(found[0], num_warps=2 * found[0].num_warps, stages=2))
        found[1:1] = [replace(alone, stages=2)] * any(c.programs for c in configs(apart(region)[0], target))
    return [*first, *found[1:2], alone, *found[2:]]


def _is_crowded(config: TritonConfig) -> bool:
    """Whether a program holds so much in each thread that its few warps, alone on their multiprocessor, wait for each other.
    Twice as many, with half the registers, may spill a few words, which cost less."""
    return config.x_block * config.r_block >= 32 * 32 * config.num_warps


def _down_long_rows(columns: Region, target: Target) -> list[TritonConfig]:
    """Configurations of what goes down the columns of long rows: with many operands, wide pieces of few rows, while their
    programs are as many as run at once, are 2 to 6 % faster (an H100, 2048 rows of 131072)."""
    proposed = configs(columns, target, 3)
    points, width = tile(columns).x.hint, 4 * _LINE // 4
    wide = replace(proposed[0], x_block=width, r_block=max(1, proposed[0].x_block * proposed[0].r_block // width), split=1)
    fits = points >= _PROGRAMS_PER_SM * target.sm_count * width and width > proposed[0].x_block
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
        light = rows * streams * _narrowest(tiling) // (_PART_SHARE * 4 * sums)
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
