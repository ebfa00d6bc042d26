"""How a nest is laid out on the GPU, as a value: what the cost model proposes (`configs/`) and a printer prints."""

from __future__ import annotations

from dataclasses import dataclass

from fxopt.ir.exprs import Int, floordiv, mul


@dataclass(frozen=True)
class TritonConfig:
    """How a nest is laid out on the GPU.

    `x_block` points (times `y_block` for two-dimensional tiles) per program; `r_block` reduced elements per step, the whole
    row when `persistent`; `split` > 1 cuts the reduced axis into that many parts in a kernel of their own, or, for a region
    with sums over its rows, the rows into parts for one program each. `stages` > 1 loads that many steps of a loop ahead, or
    the next rows, for such a region whose nests are kernels apart; so do `programs` programs, about, that take turns at the
    rows of a reduction. With `rows` the points of a program all lie in one row. With `statistics` a region with sums over
    its rows first has what the rows reduce to in a kernel of its own; the rest of the configuration is that of all else.
    `aligned` assumes that every pointer is 16-byte aligned.
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
    """The least power of two that is no less than `n`."""
    return 1 << max(n - 1, 0).bit_length()


def part_count(rows: Int, config: TritonConfig) -> Int:
    """How many programs, about `config.programs` or `config.split`, take `rows` points in turns of `config.x_block` so that
    all take equally many turns, or one less."""
    turn, wanted = config.x_block, config.programs or config.split
    each = mul(floordiv(rows + (wanted * turn - 1), wanted * turn), turn)
    return floordiv(rows + each - 1, each)
