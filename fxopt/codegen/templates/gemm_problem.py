"""A matrix product as the templates know it: its operands, and a configuration with what that takes of a multiprocessor."""

from __future__ import annotations

from dataclasses import dataclass
from math import ceil, gcd

import torch

from fxopt.ir import quantized_ops
from fxopt.ir.rounding import FLOAT8
from fxopt.target import Target

ALIGNMENT = 16
"""Bytes; the multiple that tensor descriptors ask of addresses and strides."""

RESERVED_SHARED = 1024
_REGISTERS_BESIDE_ACCUMULATOR = 56
_REGISTERS_OF_OPERANDS = 56
_MOST_REGISTERS = 255
_THREADS_PER_SM = 2048
_LARGEST_BOX = 256


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
    def read_each(self) -> int:
        """Bytes that the epilogue reads for each element of the result, beside what is shared by many."""
        return self.read // (self.products * self.batch * self.m * self.n)

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
    Persistent programs of which a multiprocessor holds `resident` begin `apart` nanoseconds after each other
    (`gemm.begin_apart`). With `direct`, each thread stores so many neighbours of a row from where tensor cores have left
    them (`gemm.py`: DIRECT). With `ahead`, a stage of persistent programs is all that a tile loads, what
    its epilogue reads included.
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
    resident: int = 1
    apart: int = 0
    direct: int = 0
    ahead: bool = False

    def __str__(self) -> str:
        words = [
            "tma" if self.tma else "pointer",
            f"{self.block_m}x{self.block_n}x{self.block_k} w{self.warps} s{self.stages} g{self.group}",
        ]
        words += [f"split{self.split}"] * (self.split > 1) + [f"sub{self.subtile}"] * (self.subtile > 1)
        words += [f"p{self.programs}"] * (self.programs > 0) + ["flat"] * self.flatten + ["swap"] * self.swap
        words += ["promote"] * self.promote + [f"aligned{self.classes}"] * (self.classes > 1) + ["vectors"] * self.vectors
        words += [f"tail{self.tail}"] * (self.tail > 1)
        words += [f"apart{self.apart}"] * (self.apart > 0) + ["direct"] * (self.direct > 0)
        words += ["ahead"] * self.ahead
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
        epilogue = 0 if self.direct else epilogue
        if self.ahead:
            pipeline *= ceil(problem.k / self.block_k)
            pipeline += self.stages * problem.read_each * self.block_m * self.block_n
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
