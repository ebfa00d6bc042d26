"""Products of groups of rows, each with a matrix of its own, with an epilogue: mixtures of experts.

The rows of a [M, K] lie group after group; the int32 vector `ends` [GROUPS] says before which row each ends, and is known
only on the device. So the grid is as large as any sizes of the groups can ask for, each program finds its tile in `ends`,
and those beyond the last tile have none. Programs of one group follow each other, rows first: what they read of its matrix
b[g] [K, N] is then in the L2 cache.

`grouped_gemm` and `grouped_dual_gemm` load through pointers, `tma_grouped_gemm` and `tma_grouped_dual_gemm` through tensor
descriptors of a [M, K] and of b with all groups' matrices one below the other. The EPILOGUE is as in `gemm.py`, but its
argument z is the row at which the group ends: from there on rows belong to others.
"""

# mypy: disable-error-code="no-untyped-def,no-untyped-call,misc,untyped-decorator"

from __future__ import annotations

import triton
import triton.language as tl

from fxopt.codegen.templates import gemm


@triton.jit
def find_tile(program, ends, M, columns, GROUPS: tl.constexpr, POWER: tl.constexpr, BM: tl.constexpr):
    """(group, its end, first row and column tile of the program); the group is GROUPS for a program without a tile.

    POWER is the next power of two of GROUPS. Ends beyond M count as M.
    """
    numbers = tl.arange(0, POWER)
    end = tl.minimum(tl.load(ends + numbers, mask=numbers < GROUPS, other=0), M)
    start = tl.minimum(tl.load(ends + numbers - 1, mask=(numbers > 0) & (numbers < GROUPS), other=0), M)
    rows = tl.cdiv(tl.maximum(end - start, 0), BM)
    tiles = rows * columns
    done = tl.cumsum(tiles, 0)
    group = tl.sum((done <= program).to(tl.int32), 0)
    own = numbers == group
    local = program - tl.sum(tl.where(own, done - tiles, 0), 0)
    height = tl.maximum(tl.sum(tl.where(own, rows, 0), 0), 1)
    y = tl.sum(tl.where(own, start, 0), 0) + local % height * BM
    return tl.minimum(group, GROUPS), tl.sum(tl.where(own, end, 0), 0), y, local // height


@triton.jit
def grouped_gemm(
    a, b, ends, extra, M, N, K, a_row, a_column, b_row, b_column, b_group,
    EPILOGUE: tl.constexpr, GROUPS: tl.constexpr, POWER: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr,
    SUBTILE: tl.constexpr, PRECISION: tl.constexpr, WIDE: tl.constexpr, SWAP: tl.constexpr,
):  # fmt: skip
    """`EPILOGUE(a[rows of g] @ b[g])`; b_group is the stride from one group's matrix to the next, in elements."""
    group, end, y, column = find_tile(tl.program_id(0), ends, M, tl.cdiv(N, BN), GROUPS, POWER, BM)
    if group < GROUPS:
        x, own = column * BN, b + group.to(tl.int64) * b_group
        rows, columns = y + tl.arange(0, BM), x + tl.arange(0, BN)
        if SWAP:
            acc = gemm.pointer_product(
                own, a, columns, rows, 0, K, N, M, K, b_column, b_row, a_column, a_row, BN, BM, BK, PRECISION, WIDE
            )
            acc = tl.trans(acc)
        else:
            acc = gemm.pointer_product(
                a, own, rows, columns, 0, K, M, N, K, a_row, a_column, b_row, b_column, BM, BN, BK, PRECISION, WIDE
            )
        gemm.finish(acc, y + tl.arange(0, BM)[:, None], x, end, extra, EPILOGUE, BN, SUBTILE)


@triton.jit
def tma_grouped_gemm(
    a, b, ends, extra, M, N, K, b_group,
    EPILOGUE: tl.constexpr, GROUPS: tl.constexpr, POWER: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr,
    SUBTILE: tl.constexpr, A_K_LAST: tl.constexpr, B_K_LAST: tl.constexpr, PRECISION: tl.constexpr, SWAP: tl.constexpr,
):  # fmt: skip
    """`grouped_gemm` with descriptors; b_group is the number of the descriptor's rows from one group to the next."""
    group, end, y, column = find_tile(tl.program_id(0), ends, M, tl.cdiv(N, BN), GROUPS, POWER, BM)
    if group < GROUPS:
        x, first = column * BN, group * b_group
        if SWAP:
            acc = tl.trans(gemm.descriptor_product(b, a, x, y, first, 0, 0, K, BN, BM, BK, B_K_LAST, A_K_LAST, PRECISION))
        else:
            acc = gemm.descriptor_product(a, b, y, x, 0, first, 0, K, BM, BN, BK, A_K_LAST, B_K_LAST, PRECISION)
        gemm.finish(acc, y + tl.arange(0, BM)[:, None], x, end, extra, EPILOGUE, BN, SUBTILE)


@triton.jit
def grouped_dual_gemm(
    a, b, c, ends, extra, M, N, K, a_row, a_column, b_row, b_column, b_group,
    EPILOGUE: tl.constexpr, GROUPS: tl.constexpr, POWER: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr,
    SUBTILE: tl.constexpr, PRECISION: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    """`EPILOGUE(a[rows of g] @ b[g], a[rows of g] @ c[g])`; c has the strides of b."""
    group, end, y, column = find_tile(tl.program_id(0), ends, M, tl.cdiv(N, BN), GROUPS, POWER, BM)
    if group < GROUPS:
        x, own = column * BN, group.to(tl.int64) * b_group
        one, two = gemm.dual_pointer_product(
            a, b + own, c + own, y + tl.arange(0, BM), x + tl.arange(0, BN), M, N, K, a_row, a_column, b_row, b_column,
            BM, BN, BK, PRECISION, WIDE,
        )  # fmt: skip
        gemm.dual_finish(one, two, y + tl.arange(0, BM)[:, None], x, end, extra, EPILOGUE, BN, SUBTILE)


@triton.jit
def tma_grouped_dual_gemm(
    a, b, c, ends, extra, M, N, K, b_group,
    EPILOGUE: tl.constexpr, GROUPS: tl.constexpr, POWER: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr,
    SUBTILE: tl.constexpr, A_K_LAST: tl.constexpr, B_K_LAST: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """`grouped_dual_gemm` with descriptors; that of c is like that of b."""
    group, end, y, column = find_tile(tl.program_id(0), ends, M, tl.cdiv(N, BN), GROUPS, POWER, BM)
    if group < GROUPS:
        x = column * BN
        one, two = gemm.dual_descriptor_product(
            a, b, c, y, x, 0, group * b_group, K, BM, BN, BK, A_K_LAST, B_K_LAST, PRECISION
        )
        gemm.dual_finish(one, two, y + tl.arange(0, BM)[:, None], x, end, extra, EPILOGUE, BN, SUBTILE)
