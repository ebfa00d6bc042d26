"""Tiles of a product whose threads store from where tensor cores have left them (`templates/gemm.py`: DIRECT)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from fxopt.codegen.templates.gemm_problem import GemmConfig, GemmProblem
from fxopt.codegen.triton_memory import VECTOR_BYTES
from fxopt.ir.exprs import Int, add, coefficient, mul, symbol
from fxopt.ir.loops import Load, postorder
from fxopt.ir.region import Contraction
from fxopt.target import Target

_FEWEST_STAGES = 3
"""Of several blocks of the inner dimension."""

_MOST_BLOCKS = 2
"""Of the inner dimension, of which a tile's loads are one stage."""

_TALL = (128, 64, 4)
"""(rows, columns, warps)."""

_ROWS_OF_A_WARP = 16
_THREADS_OF_A_ROW = 4
"""Of the tile that a warp of a group has of a product."""


def run_of(contraction: Contraction) -> int:
    """How many neighbours of a row make 16 bytes of the narrowest elements that the epilogue reads or writes one by one; 0
    where it finds some of them elsewhere than row by row, or rows do not begin at multiples of 16 bytes.
    """
    nest, (batch, row, column) = contraction.region.nest, contraction.axes
    if (
        batch is not None
        or contraction.ends
        or contraction.pooled
        or any(s.mode != "set" or s.indirect for s in nest.stores)
    ):
        return 0
    places: list[tuple[str, Int]] = [(s.buffer, s.index) for s in nest.stores]
    for node in postorder(nest.roots):
        if isinstance(node, Load) and node.buffer not in contraction.registers and {row, column} <= node.symbols():
            if node.indirect:
                return 0
            places.append((node.buffer, node.index))
    itemsizes = [contraction.region.buffers[name].dtype.itemsize for name, _ in places]
    run = VECTOR_BYTES // min(itemsizes)
    for _, index in places:
        pitch = coefficient(index, row)
        if not isinstance(pitch, int) or pitch <= 0 or pitch % run:
            return 0
        if index != add(mul(symbol(row), pitch), symbol(column)):
            return 0
    return run


def with_direct_stores(
    contraction: Contraction, problem: GemmProblem, config: GemmConfig, target: Target
) -> GemmConfig | None:
    """`config` with such tiles, persistent ones in as many programs as have room; None where there are none: on other GPUs
    than Hopper, in parts, transposed, and where a tile has columns or rows for another layout.
    """
    plain = config.split == config.classes == config.tail == 1 and not config.swap and not config.apart
    if not target.is_hopper or not plain or not problem.static or problem.c is not None or problem.rows or problem.batch > 1:
        return None
    run, by_groups = run_of(contraction), not config.tma or not problem.b.columns_last
    four = _THREADS_OF_A_ROW * run
    if run < 2 or config.block_n % four or problem.n % four or not by_groups:
        return None
    if config.block_m < _ROWS_OF_A_WARP * config.warps:
        return None
    direct = replace(config, direct=run, subtile=config.block_n // four, vectors=False)
    return _with_programs(problem, direct, target) if direct.programs else direct


def loading_ahead(
    contraction: Contraction, problem: GemmProblem, direct: Sequence[GemmConfig], target: Target
) -> list[GemmConfig]:
    """Of `direct`, what `with_direct_stores` gave best first, two with what the epilogue reads on its way before the tile is
    multiplied, and such a one of tiles whose threads have the most rows for what they load of columns; none where tiles have
    many blocks of the inner dimension, or there is nothing to read but what all of them share.
    """
    first = direct[0]
    if not first.flatten or problem.k > _MOST_BLOCKS * first.block_k or not problem.read_each:
        return []
    tall = replace(first, block_m=_TALL[0], block_n=_TALL[1], warps=_TALL[2], direct=0)
    tiles = [*direct[:2], with_direct_stores(contraction, problem, tall, target)]
    ahead = [_with_programs(problem, replace(c, ahead=True), target) for c in tiles if c is not None]
    return [c for c in dict.fromkeys(ahead) if c.programs]


def _with_programs(problem: GemmProblem, config: GemmConfig, target: Target) -> GemmConfig:
    """`config` in no more stages than leave room for as many programs as registers do, and so many persistent ones."""
    fewest = 2 if config.ahead or problem.k <= config.block_k else _FEWEST_STAGES
    staged = (replace(config, stages=s) for s in range(min(fewest, config.stages), config.stages + 1))
    best = max(staged, key=lambda c: (c.per_sm(problem, target), c.stages))
    return replace(best, programs=min(target.sm_count * best.per_sm(problem, target), best.tiles(problem)))


def most_registers(problem: GemmProblem, config: GemmConfig, target: Target) -> int:
    """Registers of a thread with which as many programs fit as `config` counts on; 0 where the compiler need not know."""
    if not config.direct:
        return 0
    resident = max(1, config.per_sm(problem, target))
    return min(255, target.registers_per_sm // (target.warp_size * config.warps * resident) // 8 * 8)
