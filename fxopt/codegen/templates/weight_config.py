"""Configurations of products with weights of few bits, and of single rows with any weight (`weight_gemm.py`,
`weight_dot.py`), best first.

Memory decides: what is wanted is that all multiprocessors have loads in flight from the first microsecond on. The order is
by the bytes in flight and the rounds that programs need.
"""

from __future__ import annotations

import itertools
import math
from dataclasses import dataclass, replace
from math import ceil
from typing import TypeVar

import torch

from fxopt.target import Target

MOST_ROWS = 256
"""Rows beyond which a kernel that widens the weight once, and the library's product, are faster."""

_LEAST_ROWS = 16
_LARGEST_TILE = 64
_SPLITS = (1, 2, 4, 8)
_REGISTERS = 128
"""Of a thread."""

PART = 16
"""Bytes of a weight's row that a thread loads at a time for a single row."""

_WIDTH = 128
"""Bytes of a slice: loads of neighbouring threads are those of whole lines."""

_LEAST_WIDTH = 32
"""Elements that tensor cores sum over at a time, twice."""

_MOST_CHUNKS = 8
_MOST_IN_FLIGHT = 64
"""Registers of a thread for what it loads at once."""

_OTHER_REGISTERS = 72

_MOST_PARTS = 512
_ROWS_AND_STEPS = tuple(itertools.product((8, 4, 2, 1), (1, 2)))
"""Rows of the weight that a thread has, and loads of each: more rows share what is done to x."""

_VECTOR_WARPS = 4
_THREADS = 768
"""Of a multiprocessor: with fewer, each has more values than the others' loads hide."""

_VALUES = (64, 256)
"""Fewest of a thread, beside which sums over threads cost little, and most, which fit into registers."""

_IN_FLIGHT = 32 << 10
"""Bytes of the weight that a multiprocessor should have in flight."""

_LAUNCH_BYTES = 10 << 20
"""What a second kernel costs, in bytes moved meanwhile."""


@dataclass(frozen=True)
class WeightProblem:
    """x [m, k] of `dtype` (float16 or bfloat16) by a weight [n, k] of so many `bits`, with a scale for each `group` of 4-bit
    values; by as many such weights as `products` says. Of 16 bits the weight has x's dtype.
    """

    m: int
    n: int
    k: int
    dtype: torch.dtype
    bits: int
    group: int
    products: int = 1

    @property
    def row_bytes(self) -> int:
        """Of the weight."""
        return self.k * self.bits // 8

    @property
    def row_elements(self) -> int:
        """Of the weight, as they lie in memory: bytes, or values of 16 bits."""
        return self.k if self.bits == 16 else self.row_bytes


@dataclass(frozen=True)
class WeightConfig:
    """`split` > 1 stores so many partial sums. `block_k` counts bytes of a weight's row. `str()` is its name in records."""

    block_m: int
    block_n: int
    block_k: int
    warps: int
    stages: int
    split: int = 1

    def __str__(self) -> str:
        parts = f" split{self.split}" * (self.split > 1)
        return f"weight {self.block_m}x{self.block_n}x{self.block_k} w{self.warps} s{self.stages}{parts}"

    def programs(self, problem: WeightProblem) -> int:
        return ceil(problem.m / self.block_m) * ceil(problem.n / self.block_n) * self.split

    def shared_bytes(self, problem: WeightProblem) -> int:
        rows = self.block_m * problem.dtype.itemsize * (2 if problem.bits == 4 else 1)
        return self.stages * self.block_k * (self.block_n + rows) + 1024


@dataclass(frozen=True)
class VectorConfig:
    """Of the product of a single row: `rows` of the weight a program, in `steps` of `parts` times 16 bytes of each, which
    are as many threads' if there are so many; other threads have other rows. Each program brings into the L2 cache what the
    one after `ahead` others loads, if that is not 0.
    """

    rows: int
    parts: int
    steps: int
    warps: int
    ahead: int = 0

    def __str__(self) -> str:
        return f"vector {self.rows}x{self.parts}x{self.steps} w{self.warps}{' ahead' * (self.ahead > 0)}"

    @property
    def literals(self) -> str:
        """As its template takes them."""
        return f"PARTS={self.parts}, STEPS={self.steps}"

    @property
    def block_bytes(self) -> int:
        """Of each row."""
        return self.parts * self.steps * PART

    def holds_row(self, problem: WeightProblem) -> bool:
        """Whether a block is as long as a row: then this may be in registers."""
        return self.block_bytes == problem.row_bytes

    def programs(self, problem: WeightProblem) -> int:
        return ceil(problem.n / self.rows)


@dataclass(frozen=True)
class DotConfig:
    """Of the product of a single row on tensor cores (`weight_dot.py`): `rows` of the weight a program, each in `chunks` of
    `slices` of `width` elements; `ahead` as in `VectorConfig`.
    """

    rows: int
    slices: int
    chunks: int
    width: int
    warps: int
    ahead: int = 0

    def __str__(self) -> str:
        return f"dot {self.rows}x{self.chunks}x{self.slices}x{self.width} w{self.warps}{' ahead' * (self.ahead > 0)}"

    @property
    def literals(self) -> str:
        """As its template takes them."""
        return f"SLICES={self.slices}, WIDTH={self.width}, CHUNKS={self.chunks}"

    def holds_row(self, problem: WeightProblem) -> bool:
        """Whether the row may be in registers: as one chunk."""
        return self.chunks == 1 and problem.k & (problem.k - 1) == 0

    def programs(self, problem: WeightProblem) -> int:
        return ceil(problem.n / self.rows)


def dot_configs(problem: WeightProblem, target: Target, limit: int) -> list[DotConfig]:
    """At most `limit`, those first whose programs, each with all it reads in flight, fill the GPU without a second round;
    none for more rows than one, rows of the weight that are not whole slices, or 16 bits: there is nothing to widen, and
    threads wait less for each other without (`fx_weight_vector` took all contests of a Llama's on an H200).

    Warps share the slices of a chunk, so that none has fewer of them than warps. Of a row in one chunk the operand may be
    in registers; in several, what has arrived is multiplied while the rest is on its way.
    """
    if problem.m != 1 or problem.bits == 16:
        return []
    width = math.gcd(problem.group, _WIDTH) if problem.bits == 4 else _WIDTH
    slices, rest = divmod(problem.row_elements, width)
    if rest or width < _LEAST_WIDTH:
        return []
    found = []
    for rows, warps, chunks in itertools.product((16, 32), (4, 8, 16), range(1, _MOST_CHUNKS + 1)):
        each, left = divmod(slices, chunks)
        config = DotConfig(rows, each, chunks, width, warps)
        if left or each & (each - 1) or each < warps or _registers_in_flight(problem, config, target) > _MOST_IN_FLIGHT:
            continue
        found.append(config)
    return sorted(found, key=lambda c: _dot_cost(problem, c, target))[:limit]


Config = TypeVar("Config", bound=VectorConfig | DotConfig)


def bringing(problem: WeightProblem, config: Config, target: Target) -> Config | None:
    """`config` with programs that bring what later ones load, if there are later ones: more than run at a time."""
    resident = _resident(problem, config, target) * target.sm_count
    return replace(config, ahead=resident) if config.programs(problem) > resident else None


def _resident(problem: WeightProblem, config: VectorConfig | DotConfig, target: Target) -> int:
    """Programs that a multiprocessor has registers for."""
    registers = _OTHER_REGISTERS + _registers_in_flight(problem, config, target)
    return max(1, target.registers_per_sm // (config.warps * target.warp_size * registers))


def _registers_in_flight(problem: WeightProblem, config: VectorConfig | DotConfig, target: Target) -> int:
    """Of a thread, for what is in flight to it if it loads whole rows."""
    return problem.products * config.rows * problem.row_bytes // (4 * config.warps * target.warp_size)


def _dot_cost(problem: WeightProblem, config: DotConfig, target: Target) -> float:
    """What the busiest multiprocessor takes, in times of an even share: few warps hide little of each other's latency, and
    one program alone on a multiprocessor loads, then computes, unless it has several chunks.
    """
    programs = ceil(config.programs(problem) / target.sm_count)
    busiest = programs * config.rows * target.sm_count / problem.n
    resident = min(programs, _resident(problem, config, target))
    alone = 1.15 if resident == 1 and config.chunks == 1 else 1.0
    return busiest * (1 + 6 / (resident * config.warps)) * alone * (1 + 0.02 * config.chunks)


def vector_configs(problem: WeightProblem, target: Target, limit: int) -> list[VectorConfig]:
    """At most `limit`, those first whose threads have as many values as fill the GPU once; none for more rows than one, or
    rows of the weight that are not whole loads.

    A multiprocessor computes when its loads are there: of a small weight few warps with many values each take longer for
    that than the weight's bytes.
    """
    if problem.m != 1 or problem.row_bytes % PART or problem.group % PART:
        return []
    fewest, most = _VALUES[0], min(_VALUES[1], 32 * _MOST_IN_FLIGHT // problem.bits)
    values = problem.products * problem.n * problem.k / (target.sm_count * _THREADS)
    wanted = math.log2(min(max(values, fewest), most))
    per_load = PART * 8 // problem.bits * problem.products
    found: dict[VectorConfig, float] = {}
    for rows, steps in _ROWS_AND_STEPS:
        config = _vector(problem, rows, steps, target)
        own = rows * config.steps * per_load
        if own <= most:
            found.setdefault(config, abs(math.log2(own) - wanted))
    return sorted(found, key=lambda c: found[c])[:limit]


def _vector(problem: WeightProblem, rows: int, steps: int, target: Target) -> VectorConfig:
    """With so many rows, and at least so many steps, of a thread: of a long row a thread needs more."""
    loads = problem.row_bytes // PART
    parts = min(_MOST_PARTS, max(target.warp_size, _power_of_2(ceil(loads / steps))))
    steps = min(2, _power_of_2(ceil(loads / parts)))
    warps = max(_VECTOR_WARPS, parts // target.warp_size)
    return VectorConfig(rows * (warps * target.warp_size // parts), parts, steps, warps)


def _power_of_2(least: int) -> int:
    return 1 << (least - 1).bit_length()


def configs(problem: WeightProblem, target: Target, limit: int) -> list[WeightConfig]:
    """At most `limit`, of different tiles; none for rows beyond MOST_ROWS, groups that no block divides, or two products."""
    if problem.m > MOST_ROWS or problem.products > 1:
        return []
    rows = min(max(_LEAST_ROWS, 1 << (problem.m - 1).bit_length()), _LARGEST_TILE)
    found = [  # a warp for each 16 rows of the weight: more would unpack the same values
        WeightConfig(rows, columns, inner, columns // 16, stages, split)
        for columns, inner, stages, split in itertools.product((32, 64, 128), (32, 64, 128, 256), (3, 4, 5), _SPLITS)
        if _fits(problem, inner) and problem.row_bytes >= 2 * split * inner
    ]
    found = [c for c in found if c.shared_bytes(problem) <= target.shared_per_block]
    best: dict[tuple[int, ...], WeightConfig] = {}
    for config in sorted(found, key=lambda c: _cost(problem, c, target)):
        best.setdefault((config.block_n, config.block_k), config)
    return list(best.values())[:limit]


def _fits(problem: WeightProblem, inner: int) -> bool:
    return problem.bits == 8 or (problem.group % inner == 0 and problem.row_bytes % inner == 0)


def _cost(problem: WeightProblem, config: WeightConfig, target: Target) -> float:
    """Bytes moved, and what could have been moved in the time that is lost otherwise."""
    weight = problem.n * problem.row_bytes
    shared, programs = config.shared_bytes(problem), config.programs(problem)
    registers = config.warps * target.warp_size * _REGISTERS
    per_sm = max(1, min(target.shared_per_block // shared, target.registers_per_sm // registers))
    places = per_sm * target.sm_count
    rounds = ceil(programs / places)
    idle = rounds * places / programs if programs > places else target.sm_count / min(programs, target.sm_count)
    resident = min(per_sm, ceil(programs / target.sm_count))
    flight = resident * (config.stages - 1) * config.block_k * config.block_n
    slower = (1 + (_IN_FLIGHT / flight) ** 2) ** 0.5
    partial = 0.0 if config.split == 1 else _LAUNCH_BYTES + 8.0 * config.split * problem.m * problem.n
    again = ceil(problem.m / config.block_m) - 1
    return weight * max(idle, 1.0) * slower * (1 + 0.3 * again) + partial
