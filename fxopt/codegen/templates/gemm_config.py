"""Configurations of the matrix product templates (`gemm.py`), and what each should take: decides what is compiled at all.

The model is a roofline of one GPU: tensor cores by whole tiles on whole multiprocessors, device memory, the L2 cache, and
what is in flight to hide the latency of memory. It has to order configurations and to say whether the library can be beaten;
what is close is measured.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Iterator
from dataclasses import dataclass, replace
from math import ceil, gcd

import torch

from fxopt.ir import quantized_ops
from fxopt.ir.rounding import FLOAT8
from fxopt.target import Target

ALIGNMENT = 16
"""Bytes; the multiple that tensor descriptors ask of addresses and strides."""

# What follows, but the first, was fitted to `benchmarks/results/gemm_configs_h100.json` and rounded by hand;
# `benchmarks/gemm_model.py` says how well it ranks those cases.

SECOND_LAUNCH_SECONDS = 3.5e-6
"""What a kernel that follows another one adds: its start is partly hidden by the end of the first."""

LAUNCH_SECONDS = 0.7e-6
TENSOR_MAP_SECONDS = 0.6e-6
"""Until a program has a descriptor and its first block: on top of what loads through pointers take."""

LATENCY_SECONDS = 0.93e-6
"""From a load to its data under load: a block cannot follow another one sooner than this over the loads in flight."""

BLOCK_SECONDS = 0.033e-6
"""What each block of the inner dimension costs a program beside its products: waiting at barriers."""

POINTER_BLOCK_SECONDS = 0.03e-6
RAGGED_BLOCK_SECONDS = 0.22e-6
"""What each block costs a program more if it loads through pointers, and if rows past the end repeat the last one."""

CACHE_BYTES = 48e6
"""Operands of no more bytes may be in the L2 cache: then an estimate is the mean of both, as what the tuner measures."""

FLIGHT_OF_MEMORY = 1.75e-6
"""Bytes in flight with which memory reaches 70 % of its rate, over that rate."""

SHORT_ROWS = 5.0
"""Memory is slower by this over the elements of a block's rows."""

SCATTERED = 1.06
"""By how much memory is slower for loads through pointers."""

L2_RATE_OF_MEMORY = 3.5
"""The L2 cache's rate to the multiprocessors, as a multiple of the device memory's."""

RATE_OF_LARGEST = 1.1
"""Rate of the tensor cores within a tile, as a multiple of what a whole large product reaches."""

TILE_START_SECONDS = 1.9e-6
"""From a program's start to its first product: nothing hides it but other programs of the multiprocessor."""

EPILOGUE_RATE = 16e9
"""Elements a second that the epilogue of one program does (layout through shared memory, stores)."""

EPILOGUE_SHOWN = 0.04
"""The share of such an epilogue that the loads of the next tile do not hide."""

OPS_RATE = 0.76e9
"""Elements a second for which one warp evaluates an error function, the unit of `GemmProblem.epilogue_ops`."""

OPS_WARPS = 12
"""Warps with which a multiprocessor reaches its own rate of that."""

SINGLE_STORE_SECONDS = 0.04e-9
"""What an element costs a program more where it is stored alone, because rows begin at no multiple of 16 bytes."""

CODE_SECONDS = 0.006e-6
"""What fetching the code of one such function costs, which is there for each element of a thread."""

RESERVED_SHARED = 1024
_REGISTERS_BESIDE_ACCUMULATOR = 56
_REGISTERS_OF_OPERANDS = 56
_MOST_REGISTERS = 255
_LARGE_ACCUMULATOR = 128
_THREADS_PER_SM = 2048
_LARGEST_BOX = 256
_NARROWEST = 64
POINTER_SHARE = 0.85
"""Of the rate of tiles that arrive through tensor maps."""

_LIBRARY_COLUMNS = 192
"""Columns of a tile that the library has beside powers of two: rows of 768 are four, not three of 256 or six of 128."""

_SHARE_OF_COLUMNS = {256: 1.0, _LIBRARY_COLUMNS: 0.95, 128: 0.89, 64: 0.58, 32: 0.29, 16: 0.22}


@dataclass(frozen=True)
class Matrix:
    """An operand in memory, [batch, rows, columns]: strides in elements, of which one of `row` and `column` is usually 1.

    `offset` is the first element's distance from the buffer's, in elements; `aligned` promises that the buffer begins at a
    multiple of 16 bytes.
    """

    rows: int
    columns: int
    row: int
    column: int
    batch: int = 0
    offset: int = 0
    aligned: bool = True

    @property
    def columns_last(self) -> bool:
        return self.column == 1

    @property
    def pitch(self) -> int:
        """The stride of the dimension that is not contiguous."""
        return self.row if self.columns_last else self.column

    def batch_rows(self, batch: int) -> int:
        """Rows of the descriptor (steps of `pitch`) from one matrix of the batch to the next."""
        return self.batch // max(self.pitch, 1) if batch > 1 else 0

    def describable(self, batch: int, itemsize: int) -> bool:
        """Whether one two-dimensional tensor descriptor can cover all matrices of the batch."""
        steps = (self.pitch * itemsize, self.offset * itemsize)
        folds = batch == 1 or self.batch % max(self.pitch, 1) == 0
        fits = max(self.rows, self.columns) + self.batch_rows(batch) * batch < 2**31
        contiguous = 1 in (self.row, self.column) and self.pitch > 0
        return self.aligned and contiguous and folds and fits and not any(s % ALIGNMENT for s in steps)

    @property
    def extent(self) -> int:
        """Elements from the first to the last of one matrix."""
        return (self.rows - 1) * self.row + (self.columns - 1) * self.column + 1


@dataclass(frozen=True)
class GemmProblem:
    """`epilogue(a @ b)`: a is [batch, m, k] and b [batch, k, n], both of `dtype`; with `c`, `epilogue(a @ b, a @ c)`.

    c has the strides of b (else ValueError).

    With `rows`, it is a grouped product: of so many rows of a [1, rows, k], each group is multiplied by its own matrix of b;
    then m is the mean of the groups' rows.
    `epilogue_ops` is what the epilogue computes for an element, in error functions; 0 if it only stores the product.
    `static`: all sizes are literals; where they are not, the numbers are those that a size has most likely. `read` and
    `written` are the bytes that the epilogue moves, the result included. `precision` ("tf32" or "ieee") is that of float32
    products. `pitch` elements lie from row to row of all that the epilogue stores (0: of no such layout), and `run` of them
    are a vector of 16 bytes.
    """

    batch: int
    m: int
    n: int
    k: int
    dtype: torch.dtype
    a: Matrix
    b: Matrix
    read: int = 0
    written: int = 0
    static: bool = True
    precision: str = "ieee"
    c: Matrix | None = None
    epilogue_ops: float = 0.0
    rows: int = 0
    pitch: int = 0
    run: int = 1

    def __post_init__(self) -> None:
        b, c = self.b, self.c
        if c is not None and (c.row, c.column, c.batch) != (b.row, b.column, b.batch):
            raise ValueError(f"the second product's operand has other strides than the first's: {c}, {b}")

    @property
    def matrices(self) -> tuple[Matrix, ...]:
        return (self.a, self.b) if self.c is None else (self.a, self.b, self.c)

    @property
    def products(self) -> int:
        return 1 if self.c is None else 2

    @property
    def itemsize(self) -> int:
        return self.dtype.itemsize

    @property
    def exact(self) -> bool:
        """float32 products that no tensor core does."""
        return self.dtype == torch.float32 and self.precision == "ieee"

    @property
    def is_tf32(self) -> bool:
        return self.dtype == torch.float32 and self.precision == "tf32"

    @property
    def sums_imprecisely(self) -> bool:
        """Sums of 8-bit floats so long that what Hopper's tensor cores lose of them would be seen."""
        return self.dtype in FLOAT8 and self.k > quantized_ops.LONGEST_IMPRECISE_SUM

    @property
    def classes(self) -> int:
        """After how many rows of what is stored one begins at a multiple of 16 bytes again; 1 if all do."""
        return self.run // gcd(self.pitch, self.run) if self.pitch else 1

    @property
    def flops(self) -> float:
        return 2.0 * self.products * self.batch * self.m * self.n * self.k

    @property
    def operand_bytes(self) -> int:
        """Bytes of all operands, each read once; a matrix that the whole batch shares counts once."""
        a, b = self.m * self.k, self.products * self.k * self.n
        return self.itemsize * (a * (self.batch if self.a.batch else 1) + b * (self.batch if self.b.batch else 1))

    @property
    def wide(self) -> bool:
        """Whether an offset within an operand may not fit int32 (a tile may reach beyond the matrix by its own size)."""
        return not self.static or max(m.extent + _LARGEST_BOX * max(m.row, m.column) for m in self.matrices) >= 2**31

    @property
    def describable(self) -> bool:
        """Whether tensor descriptors can be made of all operands."""
        return self.static and all(x.describable(self.batch, self.itemsize) for x in self.matrices)


@dataclass(frozen=True)
class GemmConfig:
    """How a product is done. `tma`: through tensor descriptors. `str()` is its name in records and reports.

    `programs` is how many persistent programs share the tiles (0: one program a tile); with `flatten` they load the next
    tile during an epilogue. `swap` computes the transposed tile. `split` > 1 stores so many partial sums; `subtile` is the
    number of parts in which the epilogue goes over a tile's columns. `promote` sums 8-bit floats in float32 from block to
    block, for which a tile has a second accumulator. Tiles of `classes` above 1 have every so-manieth row, those whose
    vectors begin at the same columns (`aligned_gemm.py`). `vectors` loads what the epilogue wants of a bias once for a tile
    (`gemm.py`: VECTORS). With `tail` above 1, so many narrow tiles stand for each of those that do not fill a round
    (`tailed_gemm.py`), and `whole` tiles do.
    """

    tma: bool
    block_m: int
    block_n: int
    block_k: int
    warps: int
    stages: int
    group: int = 8
    split: int = 1
    subtile: int = 1
    programs: int = 0
    flatten: bool = False
    swap: bool = False
    promote: bool = False
    classes: int = 1
    vectors: bool = False
    tail: int = 1
    whole: int = 0

    def __str__(self) -> str:
        words = [
            "tma" if self.tma else "pointer",
            f"{self.block_m}x{self.block_n}x{self.block_k} w{self.warps} s{self.stages} g{self.group}",
        ]
        words += [f"split{self.split}"] * (self.split > 1) + [f"sub{self.subtile}"] * (self.subtile > 1)
        words += [f"p{self.programs}"] * (self.programs > 0) + ["flat"] * self.flatten + ["swap"] * self.swap
        words += ["promote"] * self.promote + [f"aligned{self.classes}"] * (self.classes > 1) + ["vectors"] * self.vectors
        words += [f"tail{self.tail}"] * (self.tail > 1)
        return " ".join(words)

    @property
    def loaded(self) -> int:
        """The columns of which `vectors` loads: one for each thread at least, of which warps have 32 on every GPU."""
        return max(self.block_n, 32 * self.warps)

    @property
    def narrow(self) -> int:
        """Columns of the narrow tiles: of the last ones, or where `classes` is above 1 those at the ends of rows."""
        return self.block_n // self.tail if self.tail > 1 else max(self.block_n // 4, 16)

    @property
    def has_narrow_tiles(self) -> bool:
        return self.classes > 1 or self.tail > 1

    def narrow_tiles(self, problem: GemmProblem) -> int:
        """Such tiles of a row: one before its whole ones, and those for what is left after these, which begin up to
        a vector earlier.
        """
        left = (problem.n - self.narrow) % self.block_n + problem.run - gcd(problem.pitch, problem.run)
        return 1 + ceil(left / self.narrow)

    @property
    def kind(self) -> tuple[object, ...]:
        """What makes a difference that a model can hardly predict."""
        tile = (self.block_m, self.block_n, self.block_k, self.warps)
        return *tile, self.split > 1, self.programs > 0, self.swap, self.classes

    def tiles(self, problem: GemmProblem) -> int:
        """Tiles of all matrices and parts of the inner dimension."""
        rows = self.classes * ceil(problem.m / self.classes / self.block_m)
        columns = ceil((problem.n + (problem.run - 1) * (self.classes > 1)) / self.block_n)
        return problem.batch * rows * columns * self.split

    def most_tiles(self, problem: GemmProblem) -> int:
        """Tiles that the groups of a grouped product can have, whatever their sizes."""
        groups = min(problem.batch, problem.rows)
        return (problem.rows + groups * (self.block_m - 1)) // self.block_m * ceil(problem.n / self.block_n)

    def stage_bytes(self, problem: GemmProblem) -> int:
        return (self.block_m + problem.products * self.block_n) * self.block_k * problem.itemsize

    def shared_bytes(self, problem: GemmProblem) -> int:
        """Shared memory of a program: the pipeline's, or the epilogue's in its place if that is larger.

        A flattened loop needs both at once.
        """
        pipeline = self.stages * self.stage_bytes(problem)
        epilogue = problem.products * self.block_m * self.block_n * max(problem.itemsize, 2) // self.subtile
        return (pipeline + epilogue if self.flatten else max(pipeline, epilogue)) + RESERVED_SHARED

    def per_sm(self, problem: GemmProblem, target: Target) -> int:
        """Programs that one multiprocessor holds at a time; 0 when the configuration does not fit."""
        threads = self.warps * target.warp_size
        accumulator = problem.products * self.block_m * self.block_n // threads * (1 + self.promote)
        others = _REGISTERS_BESIDE_ACCUMULATOR
        if not target.has_warpgroup_products:  # operands go through registers
            others += _REGISTERS_OF_OPERANDS * problem.products
        if accumulator + others > _MOST_REGISTERS:
            return 0
        registers = (accumulator + others) * threads
        shared = self.shared_bytes(problem)
        if shared > target.shared_per_block:
            return 0
        return min(target.shared_per_block // shared, target.registers_per_sm // registers, _THREADS_PER_SM // threads)


def with_tail(problem: GemmProblem, config: GemmConfig, target: Target) -> GemmConfig:
    """`config` with narrow tiles for a last round that leaves at least half of the multiprocessors idle, if the template
    can: of so many for each tile that a multiprocessor has one narrow tile at most.
    """
    plain = config.flatten and config.classes == 1 and not config.swap and config.subtile <= 2
    if not plain or problem.c is not None or problem.rows or not problem.static:
        return config
    tiles, programs = config.tiles(problem), target.sm_count * config.per_sm(problem, target)
    left = tiles % target.sm_count
    parts = [p for p in (2, 4) if left * p <= target.sm_count and config.block_n // p >= _NARROWEST]
    if not left or not parts or tiles < target.sm_count:
        return config
    return replace(config, tail=parts[-1], whole=tiles - left, programs=programs)


def configs(problem: GemmProblem, target: Target, limit: int = 6) -> list[GemmConfig]:
    """The best configuration of each of the most promising kinds, best first; at most `limit`."""
    return list(_of_each_kind(problem, target)[:limit])


@functools.lru_cache(maxsize=256)  # the layers of a model ask again and again
def _of_each_kind(problem: GemmProblem, target: Target) -> tuple[GemmConfig, ...]:
    kinds: dict[object, GemmConfig] = {}
    for config in ranked(problem, target):
        kinds.setdefault(config.kind, config)
    return tuple(kinds.values())


def with_more_programs(problem: GemmProblem, config: GemmConfig, target: Target) -> GemmConfig | None:
    """`config` with fewer stages and so more persistent programs on a multiprocessor; None if that gives no more.

    Where one block is the whole inner dimension, tiles are mostly epilogues, whose loads wait for memory; what hides that is
    other programs, and not operands of many tiles ahead.
    """
    if not config.flatten or config.split > 1 or config.classes > 1 or problem.k > config.block_k:
        return None
    fewer = replace(config, stages=2)
    programs = target.sm_count * fewer.per_sm(problem, target)
    return replace(fewer, programs=programs) if config.programs < programs < config.tiles(problem) else None


def ranked(problem: GemmProblem, target: Target) -> list[GemmConfig]:
    """All `plausible` ones, best first; of equals, that with more in flight, but in few stages."""

    def order(config: GemmConfig) -> tuple[float, ...]:
        flight = config.per_sm(problem, target) * (config.stages - 1) * config.stage_bytes(problem)
        return estimate(problem, config, target), -flight, config.stages, -config.warps

    return sorted(plausible(problem, target), key=order)


def plausible(problem: GemmProblem, target: Target) -> list[GemmConfig]:
    """Everything that fits `target` and could be right for such a problem: what a benchmark tries.

    Nothing for exact float32 products of more than a few rows: without tensor cores, the library's kernels are better. Of
    those in TF32 what `_rounds_to_tf32`.
    """
    if problem.exact and problem.m > _FEWEST_ROWS:
        return []
    found = dict.fromkeys(c for c in _forms(problem, target) if not problem.is_tf32 or _rounds_to_tf32(problem, c))
    if problem.rows:
        found = dict.fromkeys(c for c in found if c.split == 1 and not c.programs)
    return [c for c in found if c.per_sm(problem, target) > 0 and _inner_blocks_fit(problem, c)]


def _rounds_to_tf32(problem: GemmProblem, config: GemmConfig) -> bool:
    """Whether operands reach the tensor cores rounded to TF32, as the library's do.

    A tensor map can round what it loads; what comes through pointers is truncated, with several times the error. Tensor
    cores of a warp group take 32-bit operands from shared memory only where the inner dimension is contiguous.
    """
    return config.tma and problem.a.columns_last and not any(b.columns_last for b in problem.matrices[1:])


def _inner_blocks_fit(problem: GemmProblem, config: GemmConfig) -> bool:
    """A descriptor that folds the batch into the inner dimension cannot stop in the middle of a block."""
    folded = problem.batch > 1 and not (problem.a.columns_last and problem.b.row == 1)
    return not (config.tma and folded and problem.k % config.block_k)


_BLOCKS = (
    # rows, columns, warps
    (128, 256, 8),
    (256, 128, 8),
    (128, 128, 8),
    (128, 128, 4),
    (64, 256, 4),
    (128, 64, 4),
    (64, 128, 4),
    (64, 64, 4),
)
FEW_ROWS, _FEWEST_ROWS = 64, 16
_SPLITS = (1, 2, 4, 8, 16)
_SHORTEST_BLOCK = 32
"""Of the inner dimension: what tensor cores take of 8-bit operands at a time."""


def _forms(problem: GemmProblem, target: Target) -> Iterator[GemmConfig]:
    """Everything to begin with, whether or not it fits."""
    promote = problem.sums_imprecisely and target.is_hopper
    return (replace(c, promote=promote) for c in _tiles(problem, target))


def _tiles(problem: GemmProblem, target: Target) -> Iterator[GemmConfig]:
    described = target.has_tensor_maps and problem.describable
    ways = (True, False) if described else (False,)
    if problem.m <= FEW_ROWS:
        for tma in ways:
            yield from _few_rows(problem, target, tma)
        return
    inner = 128 // problem.itemsize
    while inner > _SHORTEST_BLOCK and 2 * problem.k <= inner:  # nor zeros past the end of short rows
        inner //= 2
    for (rows, columns, warps), tma in itertools.product(_BLOCKS, ways):
        if rows >= 2 * problem.m or columns >= 2 * max(problem.n, 64):
            continue
        for stages in (3, 4, 5):
            # Halves of a tile with more than this of accumulator a thread leave registers to the epilogue; after a short
            # product, whose time that is, to the epilogue of another program.
            large = _LARGE_ACCUMULATOR if problem.k > inner else _LARGE_ACCUMULATOR // 2
            subtile = 2 if problem.products * rows * columns >= large * warps * target.warp_size else 1
            config = GemmConfig(tma, rows, columns, inner, warps, stages, subtile=subtile)
            yield from _persistent(problem, config, target) if tma else (config,)
            if tma:
                yield from _aligned(problem, config, target)
            yield from _split(problem, config, target)


def _persistent(problem: GemmProblem, config: GemmConfig, target: Target) -> Iterator[GemmConfig]:
    """One program a tile, and persistent programs where there are more tiles than fit at once."""
    yield config
    programs = target.sm_count * config.per_sm(problem, target)
    if 0 < programs < config.tiles(problem):
        yield replace(config, programs=programs)
        for subtile in dict.fromkeys((config.subtile, 2)):
            flat = replace(config, subtile=subtile, flatten=True)
            programs = target.sm_count * flat.per_sm(problem, target)
            yield replace(flat, programs=min(programs, config.tiles(problem)))


def _aligned(problem: GemmProblem, config: GemmConfig, target: Target) -> Iterator[GemmConfig]:
    """Rows of equal alignment in a tile, where rows of the result begin anywhere."""
    classes = problem.classes
    whole = problem.k % config.block_k == 0 and problem.m % classes == 0 and config.block_n + config.narrow <= problem.n
    one = problem.batch == 1 and problem.c is None and not problem.rows and problem.a.columns_last
    if classes == 1 or not whole or not one or 2 * config.block_m > problem.m // classes * 3:
        return
    found = replace(config, subtile=max(config.subtile, 2), flatten=True, classes=classes)
    programs = target.sm_count * found.per_sm(problem, target)
    if programs:
        yield replace(found, programs=min(programs, found.tiles(problem)))


def _split(problem: GemmProblem, config: GemmConfig, target: Target) -> Iterator[GemmConfig]:
    """Parts of the inner dimension while whole tiles leave multiprocessors idle."""
    for split in _SPLITS[1:] if problem.c is None else ():
        if config.tiles(problem) * split <= 2 * target.sm_count and problem.k >= 4 * split * config.block_k:
            yield replace(config, split=split, subtile=1)


def _few_rows(problem: GemmProblem, target: Target, tma: bool) -> Iterator[GemmConfig]:
    """At most 64 rows: memory decides, so many loads must be in flight on every multiprocessor."""
    rows = max(_FEWEST_ROWS, 1 << (problem.m - 1).bit_length())
    inners = (32, 64) if problem.exact else (64, 128, 256)
    for columns, inner, stages, split in itertools.product((32, 64, 128), inners, (3, 4, 6), _SPLITS):
        swap = target.has_warpgroup_products and columns >= 64 and not problem.exact and problem.c is None
        if split == 1 or (problem.c is None and problem.k >= 2 * split * inner):
            yield GemmConfig(tma, rows, columns, inner, 4, stages, group=1, split=split, swap=swap)


# --- the model


def estimate(problem: GemmProblem, config: GemmConfig, target: Target) -> float:
    """Seconds that `config` should take, the launches and a split product's second kernel included; infinity if it cannot
    run.
    """
    per_sm = config.per_sm(problem, target)
    if per_sm == 0:
        return float("inf")
    tiles = config.tiles(problem)
    rounds = ceil((config.whole or tiles) / target.sm_count)
    resident = min(per_sm, rounds)
    inner = ceil(problem.k / config.split)
    blocks = ceil(inner / config.block_k)
    flops = 2.0 * problem.products * config.block_m * config.block_n * config.block_k
    block = flops / (product_rate(problem, target) / target.sm_count * _efficiency(problem, config, target))
    waiting = BLOCK_SECONDS + (0.0 if config.tma else _pointer_seconds(problem, config))
    alone = max(block + waiting, LATENCY_SECONDS / (config.stages - 1))
    compute = blocks * max(rounds * block, ceil(rounds / resident) * alone)
    cold, warm = (max(compute, moving) for moving in _moving(problem, config, target, tiles, resident))
    seconds = (cold + warm) / 2 if problem.operand_bytes <= CACHE_BYTES else cold
    seconds += LAUNCH_SECONDS + _not_hidden(problem, config, rounds, resident)
    seconds += _ops(problem, config, rounds, resident, target)
    seconds += _narrow_round(problem, config, target, blocks) if config.tail > 1 else 0.0
    return seconds + (_joining(problem, config, target) if config.split > 1 else 0.0)


def _narrow_round(problem: GemmProblem, config: GemmConfig, target: Target, blocks: int) -> float:
    """A last round of narrow tiles, one on a multiprocessor, with so many blocks of the inner dimension."""
    narrow = replace(config, block_n=config.narrow, subtile=1)
    flops = 2.0 * narrow.block_m * narrow.block_n * narrow.block_k
    block = flops / (product_rate(problem, target) / target.sm_count * _efficiency(problem, narrow, target))
    seconds = blocks * max(block + BLOCK_SECONDS, LATENCY_SECONDS / (config.stages - 1))
    return seconds + _not_hidden(problem, replace(narrow, flatten=False), 1, 1) + _ops(problem, narrow, 1, 1, target)


def _pointer_seconds(problem: GemmProblem, config: GemmConfig) -> float:
    ragged = problem.m % config.block_m != 0 or problem.n % config.block_n != 0
    return POINTER_BLOCK_SECONDS + RAGGED_BLOCK_SECONDS * ragged


def _moving(problem: GemmProblem, config: GemmConfig, target: Target, tiles: int, resident: int) -> tuple[float, float]:
    """Seconds that operands take to arrive, from memory and from the L2 cache."""
    flight = min(tiles, resident * target.sm_count) * (config.stages - 1) * config.stage_bytes(problem)
    slower = (1 + (FLIGHT_OF_MEMORY * target.memory_rate / flight) ** 2) ** 0.5
    slower *= (1 + SHORT_ROWS / config.block_k) * (1.0 if config.tma else SCATTERED)
    reread = tiles * config.stage_bytes(problem) / config.block_k * ceil(problem.k / config.split)
    memory = (problem.operand_bytes + problem.read + problem.written) / target.memory_rate
    cached = reread / (L2_RATE_OF_MEMORY * target.memory_rate)
    return max(memory * slower, cached), cached


def _not_hidden(problem: GemmProblem, config: GemmConfig, rounds: int, resident: int) -> float:
    """Starts of pipelines and epilogues during which a multiprocessor has nothing to multiply."""
    start = TILE_START_SECONDS + (TENSOR_MAP_SECONDS / resident if config.tma else 0.0)
    end = config.block_m * config.block_n / EPILOGUE_RATE
    if config.flatten:
        return start + end + (rounds - 1) * end * EPILOGUE_SHOWN
    return (start + end) * max(1.0, rounds / resident)


def _ops(problem: GemmProblem, config: GemmConfig, rounds: int, resident: int, target: Target) -> float:
    """What the epilogue computes and stores one by one: the warps that multiply do it, and tensor cores rest meanwhile.
    Split products do it elsewhere.
    """
    if config.split > 1:
        return 0.0
    elements = config.block_m * config.block_n
    warps = min(resident * config.warps, OPS_WARPS)
    computed = rounds * elements / (OPS_RATE * warps)
    code = elements / (config.warps * target.warp_size) * CODE_SECONDS
    alone = rounds * elements * SINGLE_STORE_SECONDS if problem.classes > 1 == config.classes else 0.0
    return problem.epilogue_ops * (computed + code) + alone


def _joining(problem: GemmProblem, config: GemmConfig, target: Target) -> float:
    """Partial sums written and read again by a second kernel."""
    partial = 2.0 * 4 * config.split * problem.batch * problem.m * problem.n
    return SECOND_LAUNCH_SECONDS + partial / target.memory_rate


def _efficiency(problem: GemmProblem, config: GemmConfig, target: Target) -> float:
    """The share of the tensor cores' rate that such tiles reach while operands arrive in time."""
    rows, columns = config.block_m, config.block_n * problem.products  # which share the rows
    if config.swap:
        rows, columns = columns, rows
    if not target.has_warpgroup_products:
        return {256: 1.0, 128: 0.95, 64: 0.8, 32: 0.55}.get(min(rows, columns), 0.35)
    # The second operand of a warp group's product comes from shared memory for every 64 rows, so narrow ones are bound by
    # that.
    share = _SHARE_OF_COLUMNS.get(min(columns, 256), 0.22)
    return RATE_OF_LARGEST * share * (1.0 if rows >= 64 else 0.5) * (1.0 if config.tma else POINTER_SHARE)


def product_rate(problem: GemmProblem, target: Target) -> float:
    """Operations a second that large products of this dtype and precision reach."""
    if problem.dtype == torch.float32:
        return target.half_flops / (2 if problem.precision == "tf32" else 20)
    return target.half_flops * (2 / problem.itemsize)


@functools.lru_cache(maxsize=256)
def library_seconds(problem: GemmProblem, target: Target) -> float:
    """Seconds that cuBLAS should take for the product alone, its result written in `dtype`; no epilogue.

    It is taken to have every form that the templates have, some with narrower tiles too, and to choose the best.
    """
    written = problem.batch * problem.m * problem.n * problem.itemsize
    plain = replace(problem, read=0, written=written, epilogue_ops=0.0, c=None, pitch=0)
    forms = list(_forms(plain, target))
    forms += [replace(c, block_n=_LIBRARY_COLUMNS) for c in forms if (c.tma, c.block_m, c.block_n) == (True, 128, 256)]
    best = min((estimate(plain, c, target) for c in forms), default=float("inf"))
    return problem.products * best
