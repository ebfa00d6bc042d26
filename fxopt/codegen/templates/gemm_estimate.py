"""What a configuration of the matrix product templates should take: a roofline of one GPU.

Tensor cores by whole tiles on whole multiprocessors, device memory, the L2 cache, and what is in flight to hide the latency
of memory. It has to order configurations and to say whether the library can be beaten.
"""

from __future__ import annotations

from dataclasses import replace
from math import ceil

import torch

from fxopt.codegen.templates.gemm_problem import GemmConfig, GemmProblem
from fxopt.target import Target

# What follows was fitted to `benchmarks/results/gemm_configs_h100.json` and rounded by hand;
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

POINTER_SHARE = 0.85
"""Of the rate of tiles that arrive through tensor maps."""

LIBRARY_COLUMNS = 192
"""Columns of a tile that the library has beside powers of two: rows of 768 are four, not three of 256 or six of 128."""

_SHARE_OF_COLUMNS = {256: 1.0, LIBRARY_COLUMNS: 0.95, 128: 0.89, 64: 0.58, 32: 0.29, 16: 0.22}


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
    block = _block_seconds(problem, config, target)
    waiting = BLOCK_SECONDS + (0.0 if config.tma else _pointer_seconds(problem, config))
    alone = max(block + waiting, LATENCY_SECONDS / (config.stages - 1))
    compute = blocks * max(rounds * block, ceil(rounds / resident) * alone)
    cold, warm = (max(compute, moving) for moving in _moving(problem, config, target, tiles, resident))
    seconds = (cold + warm) / 2 if problem.operand_bytes <= CACHE_BYTES else cold
    seconds += LAUNCH_SECONDS + _not_hidden(problem, config, rounds, resident)
    seconds += _ops(problem, config, rounds, resident, target)
    seconds += _narrow_round(problem, config, target, blocks) if config.tail > 1 else 0.0
    return seconds + (_joining(problem, config, target) if config.split > 1 else 0.0)


def _block_seconds(problem: GemmProblem, config: GemmConfig, target: Target) -> float:
    """What a block of the inner dimension takes the tensor cores of a multiprocessor."""
    flops = 2.0 * problem.products * config.block_m * config.block_n * config.block_k
    return flops / (product_rate(problem, target) / target.sm_count * _efficiency(problem, config, target))


def tile_seconds(problem: GemmProblem, config: GemmConfig, target: Target) -> float:
    """What the products of a tile take a multiprocessor that computes nothing else."""
    return ceil(ceil(problem.k / config.split) / config.block_k) * _block_seconds(problem, config, target)


def _narrow_round(problem: GemmProblem, config: GemmConfig, target: Target, blocks: int) -> float:
    """A last round of narrow tiles, one on a multiprocessor, with so many blocks of the inner dimension."""
    narrow = replace(config, block_n=config.narrow, subtile=1)
    block = _block_seconds(problem, narrow, target)
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
