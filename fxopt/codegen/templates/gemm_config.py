"""Configurations of the matrix product templates (`gemm.py`): what could be right, and what is proposed to the tuner.

They are ordered by what each should take (`gemm_estimate.py`), which also says whether the library can be beaten; what is
close is measured.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Iterator
from dataclasses import replace

from fxopt.codegen.templates.gemm_estimate import LIBRARY_COLUMNS, estimate, tile_seconds
from fxopt.codegen.templates.gemm_problem import GemmConfig, GemmProblem
from fxopt.target import Target


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


def begun_apart(problem: GemmProblem, config: GemmConfig, target: Target) -> GemmConfig | None:
    """`config` with the programs of a multiprocessor a tile's products apart; None where it has one, or these have one."""
    resident, rest = divmod(config.programs, target.sm_count)
    plain = config.tma and config.tail == 1 and problem.c is None and not problem.rows
    if not plain or resident < 2 or rest or config.tiles(problem) < 2 * config.programs:
        return None
    seconds = tile_seconds(problem, config, target)
    return replace(config, resident=resident, apart=_APART_STEP * max(1, round(seconds * 1e9 / _APART_STEP)))


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


_LARGE_ACCUMULATOR = 128
_NARROWEST = 64
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
_APART_STEP = 100
"""Nanoseconds."""
_SHORTEST_BLOCK = 32
"""Of the inner dimension: what tensor cores take of 8-bit operands at a time."""


def _forms(problem: GemmProblem, target: Target) -> Iterator[GemmConfig]:
    """Everything to begin with, whether or not it fits."""
    found = _tiles(problem, target)
    return (replace(c, promote=True) for c in found) if problem.sums_imprecisely and target.is_hopper else found


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


@functools.lru_cache(maxsize=256)
def library_seconds(problem: GemmProblem, target: Target) -> float:
    """Seconds that cuBLAS should take for the product alone, its result written in `dtype`; no epilogue.

    It is taken to have every form that the templates have, some with narrower tiles too, and to choose the best.
    """
    written = problem.batch * problem.m * problem.n * problem.itemsize
    plain = replace(problem, read=0, written=written, epilogue_ops=0.0, c=None, pitch=0)
    forms = list(_forms(plain, target))
    forms += [replace(c, block_n=LIBRARY_COLUMNS) for c in forms if (c.tma, c.block_m, c.block_n) == (True, 128, 256)]
    best = min((estimate(plain, c, target) for c in forms), default=float("inf"))
    return problem.products * best
