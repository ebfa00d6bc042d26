"""What an iteration of a tiling asks of the GPU: widths of accesses, bytes in memory, registers."""

from __future__ import annotations

from collections.abc import Mapping
from itertools import pairwise

from fxopt.codegen.triton_tiling import Access, Axis, Tiling
from fxopt.ir.exprs import free_symbols
from fxopt.ir.loops import Op, Reduce, Scan, postorder
from fxopt.ir.region import BufferSpec
from fxopt.target import Target

PERSISTENT_LIMIT = 32768
"""Longest row held in registers, in elements."""

BYTE_RUN = 4
"""Neighbouring bytes that a thread takes beside values of four bytes or more, of which it then takes 16 bytes."""

_CHEAP = ("cast", "where", "add", "mul", "sub")
SECTOR_BYTES = 32  # the smallest piece that is read from memory
LINE_BYTES = 128  # bytes of a cache line
PROGRAMS_PER_SM = 6  # of four warps, each with one 16-byte load per thread in flight or more
ROW_WORTH_FETCHING = 512  # elements of a row from which on loading the next ahead pays: shorter ones go several at a time
PROGRAM_BYTES = 8 << 10  # read and written, in whose time a GPU starts a program: an H200 one in 1.28 ns, which moves 5 KB
MANY_PROGRAMS = 16  # for each SM, from which on the rate at which they start may decide
_DROPPED_AFTER = 16 << 20  # bytes read and written, after which a line may have left the L2 cache: each half has its own
_WORTH_KEEPING = 8 << 20  # bytes that may stay there while others come and go
VALUES_PER_THREAD = 64  # live block values of one expression that stay clear of spilling


def narrowest_bytes(tiling: Tiling) -> int:
    """Bytes of an element of the narrowest type that is touched."""
    return min((a.itemsize for a in tiling.accesses), default=4)


def one_access(tiling: Tiling) -> int:
    """Elements of one 16-byte access of the widest type."""
    return max(1, 16 // max((a.itemsize for a in streaming_accesses(tiling)), default=4))


def byte_run(tiling: Tiling) -> int:
    """Most neighbouring elements of one byte that a thread takes in one access; 0 for any number.

    Triton gives each thread as many neighbours as make 16 bytes of the narrowest type, in all accesses: 16 bytes of a mask
    are 64 of the float32 values beside it, of which one instruction then reads a quarter of every second line.
    """
    return BYTE_RUN if max((a.itemsize for a in streaming_accesses(tiling)), default=1) >= 4 else 0


def coalesced_per_thread(tiling: Tiling) -> int:
    """Most elements per thread and step with which the widest accesses stay coalesced: a sector (32 bytes) for each thread
    is still whole. See `byte_run`, which takes care of bytes."""
    sizes = [a.itemsize for a in streaming_accesses(tiling)] or [1]
    most = max(1, SECTOR_BYTES // max(sizes))
    narrowest = BYTE_RUN if min(sizes) == 1 and byte_run(tiling) else min(sizes)
    return most if 16 // narrowest > most else VALUES_PER_THREAD


def streaming_accesses(tiling: Tiling) -> list[Access]:
    """The accesses that touch an element of their own at every iteration, or nearly so."""
    axes = (*tiling.x.symbols, *tiling.y.symbols, *tiling.r.symbols)

    def touched(access: Access) -> int:
        used = free_symbols(access.index)
        return Axis(tuple(s for s in axes if s in used)).hint

    return [a for a in tiling.accesses if 2 * touched(a) > Axis(axes).hint]


def pressure(tiling: Tiling) -> int:
    """Roughly how many block values are live at once: one per stream and a share of the heavy operators."""
    wide = 2 if any(a.itemsize == 8 for a in tiling.accesses) else 1
    return max(1, (len(tiling.accesses) + _heavy(tiling) // 4) * wide)


def block_values(tiling: Tiling) -> int:
    """Elements for each thread that stay clear of spilling, where what is one value for a row counts for nothing."""
    along = frozenset(tiling.r.symbols)
    blocks = [a for a in tiling.accesses if along & free_symbols(a.index)] if along else streaming_accesses(tiling)
    return 2 * VALUES_PER_THREAD // max(1, len(blocks) + _heavy(tiling) // 4)


def _heavy(tiling: Tiling) -> int:
    """Operators that take registers of their own."""
    return sum(isinstance(n, Op) and n.name not in _CHEAP for n in postorder(tiling.nest.roots))


def bytes_each(tiling: Tiling, writes: bool = True) -> int:
    """Bytes that an iteration reads (and `writes`) in memory, about: what is read twice comes out of a cache."""
    streams = {*streaming_accesses(tiling), *(a for a in tiling.accesses if _is_gathered(tiling, a))}
    names = [*(load.buffer for load in tiling.merged.loads()), *(store.buffer for store in tiling.merged.stores)]
    own = (t for t in zip(names, tiling.accesses, strict=True) if t[1] in streams and (writes or not t[1].writes))
    return sum({n: a.itemsize for n, a in own}.values()) or 1


def read_again(tiling: Tiling, buffers: Mapping[str, BufferSpec]) -> frozenset[str]:
    """Small buffers that a kernel in order of memory reads again only after so much else that the L2 cache would drop
    them: the angles of a rotary embedding, for each sequence of a batch."""
    order = (*tiling.y.symbols, *tiling.x.symbols, *tiling.r.symbols)
    between = Axis(order).hint * bytes_each(tiling)
    found: set[str] = set()
    for sym, inner in pairwise(order):
        between //= Axis((sym,)).hint
        if between < _DROPPED_AFTER:
            break
        found |= {n.buffer for n in tiling.merged.loads() if sym not in n.symbols() and inner in n.symbols()}
    return _worth_keeping(found, tiling, buffers)


def shared_operands(tiling: Tiling, buffers: Mapping[str, BufferSpec]) -> frozenset[str]:
    """Small buffers of which programs that loop over rows or columns read the same: a norm's weight, statistics of rows."""
    loads = list(tiling.merged.loads())
    streams = set(streaming_accesses(tiling))
    own = [(n, access in streams) for n, access in zip(loads, tiling.accesses, strict=False)]
    found = {n.buffer for n, streamed in own if not streamed and not n.indirect}
    return _worth_keeping(found - {n.buffer for n, streamed in own if streamed}, tiling, buffers)


def _worth_keeping(names: set[str], tiling: Tiling, buffers: Mapping[str, BufferSpec]) -> frozenset[str]:
    extents = {name: buffers[name].extent for name in names - set(tiling.merged.writes())}
    return frozenset(n for n, e in extents.items() if isinstance(e, int) and e * buffers[n].dtype.itemsize <= _WORTH_KEEPING)


def _is_gathered(tiling: Tiling, access: Access) -> bool:
    """Whether it is a row at an index that was loaded, which lies in memory as rows one after the other do."""
    axes = (*tiling.x.symbols, *tiling.y.symbols, *tiling.r.symbols)
    used = free_symbols(access.index)
    return bool(tiling.r.symbols) and used >= set(tiling.r.symbols) and any(s.size is not None for s in used - set(axes))


def rows_per_program(rows: int, row: int, each: int, target: Target, least: int = 1) -> int:
    """How many of `rows` rows of `row` elements, `each` bytes in memory, a program needs at `least` and lest its start take
    longer than its bytes, a power of two times `least`."""
    count = least
    while count * row * each < PROGRAM_BYTES and rows >= 2 * count * MANY_PROGRAMS * target.sm_count:
        count *= 2
    return count


def reads_once(tiling: Tiling) -> bool:
    """Whether one loop over the row makes everything: reductions do not wait for each other, nor what varies along the row
    for any of them. Holding the row in registers then only keeps other programs out."""
    reductions = [n for n in postorder(tiling.nest.roots) if isinstance(n, Reduce | Scan)]
    if any(isinstance(n, Scan) or any(isinstance(a, Reduce | Scan) for a in postorder(n.args)) for n in reductions):
        return False
    along = [s for s in tiling.nest.stores if frozenset(tiling.nest.reduced) & s.symbols()]
    return not any(isinstance(n, Reduce) for s in along for n in postorder(s.roots))


def has_welford(tiling: Tiling) -> bool:
    """Whether a mean and its squared deviations are reduced together, of which parts are costly to join."""
    return any(isinstance(n, Reduce) and n.kind == "welford" for n in postorder(tiling.nest.roots))
