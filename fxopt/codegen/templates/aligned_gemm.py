"""Matrix products whose result has rows that begin anywhere (a vocabulary's logits), stored by whole vectors of 16 bytes.

A tile of such a result has no place that all of its rows could store vectors to: each row begins at another remainder of a
vector's RUN elements, and single elements take eight times the stores and address computations. But every CLASSES-th row
has the same remainder. So a tile here has such rows, which a descriptor reads as rows CLASSES times as long, and its columns
begin where the vectors of these rows do, up to RUN - 1 before a multiple; what of the right operand lies before its first or
after its last column is read as zero. Only narrow tiles at both ends of a row store single elements: they come last, and
wide ones would take many times longer than there are columns in them.
"""

# mypy: disable-error-code="no-untyped-def,no-untyped-call,misc,untyped-decorator"

from __future__ import annotations

import triton
import triton.language as tl

from fxopt.codegen.templates import gemm


@triton.jit
def aligned_tile(
    a, b, row, x, K, a_row,
    BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, B_K_LAST: tl.constexpr, PRECISION: tl.constexpr,
    CLASSES: tl.constexpr, RUN: tl.constexpr, PITCH: tl.constexpr,
):  # fmt: skip
    """(the product's tile, its row numbers [BM, 1], its first column) of a tile that begins at column x or before."""
    own, line = row % CLASSES, row // CLASSES * BM
    x = x - own * (PITCH % RUN) % RUN
    acc = tl.zeros([BM, BN], gemm.accumulator(a.dtype))
    for k in range(0, K, BK):
        a_tile = a.load([line, own * a_row + k])
        if B_K_LAST:
            b_tile = b.load([x, k]).T
        else:
            b_tile = b.load([k, x])
        acc = gemm.multiplied(a_tile, b_tile, acc, PRECISION)
    return acc, (line + tl.arange(0, BM)[:, None]) * CLASSES + own, x


@triton.jit
def tma_aligned_gemm(
    a, b, narrow, extra, M, N, K, a_row,
    EPILOGUE: tl.constexpr, EDGE: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, NARROW: tl.constexpr,
    ENDS: tl.constexpr, GROUP: tl.constexpr, SUBTILE: tl.constexpr, PROGRAMS: tl.constexpr, FLATTEN: tl.constexpr,
    B_K_LAST: tl.constexpr, PRECISION: tl.constexpr, CLASSES: tl.constexpr, RUN: tl.constexpr, PITCH: tl.constexpr,
    VECTORS: tl.constexpr = None, LOADED: tl.constexpr = 1, RESIDENT: tl.constexpr = 1, APART: tl.constexpr = 0,
):  # fmt: skip
    """`EPILOGUE(a @ b)` where row y of the result begins y * PITCH elements after a multiple of RUN, as CLASSES * PITCH is.

    a: descriptor of [M / CLASSES, (CLASSES - 1) * a_row + K] with blocks [BM, BK], where a_row is the stride of its rows.
    CLASSES must divide M, and BK must divide K. b is as in `gemm.tma_gemm`, narrow the same with blocks of NARROW columns,
    which divides BN and is a multiple of RUN; a row has ENDS such tiles, one before its whole ones. GROUP, SUBTILE, PROGRAMS
    (not 0), FLATTEN, RESIDENT and APART are as there. N must be at least NARROW + BN.

    EPILOGUE may store RUN elements at a time and need not mask columns; EDGE, for the narrow tiles, masks those below 0 and
    from N on, and VECTORS is not for it. A branch within one loop would do, but Triton 3.6 cannot flatten that.
    """
    if APART > 0:
        gemm.begin_apart(PROGRAMS // RESIDENT, APART)
    rows, middle = CLASSES * tl.cdiv(M // CLASSES, BM), (N - NARROW) // BN
    for program in tl.range(tl.program_id(0), rows * middle, PROGRAMS, flatten=FLATTEN):
        _, row, column = gemm.tile_of(program, rows, middle, GROUP)
        start = NARROW + column * BN
        acc, y, x = aligned_tile(a, b, row, start, K, a_row, BM, BN, BK, B_K_LAST, PRECISION, CLASSES, RUN, PITCH)
        gemm.finish(acc, y, x, 0, extra, EPILOGUE, BN, SUBTILE, VECTORS, LOADED)
    own_next = (tl.program_id(0) + PROGRAMS - rows * middle % PROGRAMS) % PROGRAMS  # who had the fewest goes on first
    for program in tl.range(own_next, rows * ENDS, PROGRAMS):
        row, column = program % rows, program // rows
        start = tl.where(column == 0, 0, middle * BN + column * NARROW)
        acc, y, x = aligned_tile(a, narrow, row, start, K, a_row, BM, NARROW, BK, B_K_LAST, PRECISION, CLASSES, RUN, PITCH)
        gemm.finish(acc, y, x, 0, extra, EDGE, NARROW, 1)
