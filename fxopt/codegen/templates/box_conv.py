"""Convolutions of channels-last images whose patches arrive through tensor descriptors: a box of pixels for each element of
the window and block of channels, with zeros where it reaches beyond the image.

Nothing is computed for addresses or conditions, and operands do not pass through registers. Shapes as in `conv.py`, the
epilogue as in `gemm.py`.
"""

# mypy: disable-error-code="no-untyped-def,no-untyped-call,misc,untyped-decorator"

from __future__ import annotations

import triton
import triton.language as tl

from fxopt.codegen.templates.conv import finish_pools, places_of, side_of
from fxopt.codegen.templates.gemm import accumulator, finish, multiplied, tile_of


@triton.jit
def row_of_taps(w, more, channels, BN: tl.constexpr, BK: tl.constexpr, W_COLUMN: tl.constexpr):
    """A block [BN, BK] of the weight from address `w` on, zero after `channels` rows and `more` elements of each."""
    n, c = tl.arange(0, BN)[:, None], tl.arange(0, BK)[None, :]
    return tl.load(w + (n * W_COLUMN + c), mask=(n < channels) & (c < more), other=0.0)


@triton.jit
def box_gemm(
    x, w, extra, N, SHAPE: tl.constexpr, PLACES: tl.constexpr,
    WINDOW: tl.constexpr, STRIDE: tl.constexpr, PADDING: tl.constexpr, DILATION: tl.constexpr,
    BOX: tl.constexpr, EPILOGUE: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, GROUP: tl.constexpr,
    SUBTILE: tl.constexpr, PROMOTE: tl.constexpr = False, W_COLUMN: tl.constexpr = 0,
    POOL: tl.constexpr = None,
):  # fmt: skip
    """A convolution into N channels, of images [images, rows, columns, channels] whose descriptor `x` has blocks [*BOX, BK]
    of every STRIDE-th pixel, by a weight [N, (row of the window, column, channel)] whose descriptor `w` has blocks [BN, BK].
    BK divides the channels. Or `w` is a pointer, to N rows that are W_COLUMN elements apart; then the last block of channels
    may go beyond them.

    A tile is a box of BM places, BOX = (images, rows, columns), which may reach beyond the last ones. The grid is as many
    boxes as cover all places times cdiv(N, BN). POOL, as in `conv.py`, divides BOX.

    What is computed is the transposed tile: what is reshaped reaches the tensor cores from shared memory only as their right
    operand. As the left one it passes through registers, and Triton 3.6 loads the next block into these while products still
    read them (on an H200 some elements of large tiles were wrong).
    """
    C: tl.constexpr = SHAPE[3]
    M: tl.constexpr = SHAPE[0] * PLACES[0] * PLACES[1]
    wide, high = tl.cdiv(PLACES[1], BOX[2]), tl.cdiv(PLACES[0], BOX[1])
    _, tile, column = tile_of(tl.program_id(0), tl.cdiv(SHAPE[0], BOX[0]) * high * wide, tl.cdiv(N, BN), GROUP)
    image, row, place = tile // (high * wide) * BOX[0], tile // wide % high * BOX[1], tile % wide * BOX[2]
    top, left = row * STRIDE[0] - PADDING[0], place * STRIDE[1] - PADDING[1]
    acc = tl.zeros([BN, BM], accumulator(x.dtype))
    blocks: tl.constexpr = (C + BK - 1) // BK
    for number in range(WINDOW[0] * WINDOW[1] * blocks):
        block = tl.full([], 0, tl.int32) + number  # a tensor in the interpreter too
        r, s, c = block // (WINDOW[1] * blocks), block // blocks % WINDOW[1], block % blocks * BK
        pixels = tl.reshape(x.load([image, top + r * DILATION[0], left + s * DILATION[1], c]), [BM, BK])
        k = (r * WINDOW[1] + s) * C + c
        if W_COLUMN == 0:
            taps = w.load([column * BN, k])
        else:
            taps = row_of_taps(w + (column * BN * W_COLUMN + k), C - c, N - column * BN, BN, BK, W_COLUMN)
        acc = multiplied(taps, pixels.T, acc, "promoted" if PROMOTE else "tf32")
    down: tl.constexpr = side_of(POOL, 0)
    right: tl.constexpr = side_of(POOL, 1)
    rows: tl.constexpr = BOX[1] // down
    columns: tl.constexpr = BOX[2] // right
    m = tl.arange(0, BM // places_of(POOL))
    n, h, v = image + m // (rows * columns), row // down + m // columns % rows, place // right + m % columns
    exists = (n < SHAPE[0]) & (h < PLACES[0] // down) & (v < PLACES[1] // right)
    y = tl.where(exists, (n * (PLACES[0] // down) + h) * (PLACES[1] // right) + v, M // places_of(POOL))
    acc = tl.trans(acc)
    if places_of(POOL) == 1:
        finish(acc, y[:, None], column * BN, 0, extra, EPILOGUE, BN, SUBTILE)
    else:
        pools = tl.permute(tl.reshape(acc, [BOX[0] * rows, down, columns, right, BN]), [0, 2, 4, 1, 3])
        finish_pools(pools, y, column * BN, extra, EPILOGUE, POOL)
