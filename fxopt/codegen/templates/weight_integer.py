"""One row times a weight of integers in few bits on the tensor cores for int8: no value of the weight is converted.

The row is what changes its form: a slice of it is its largest magnitude's power of two times integers of 23 bits, which are
three digits of 8 bits, each of which is multiplied by the weight. Sums of the products are exact in int32; half values down
to 2**-11 (bfloat16: 2**-14) of their slice's largest are, too, and others are off by less than 2**-21 of that. An int8
weight is an operand as it lies in memory. Of 4 bits one mask makes 16 times the value of each byte's half.

A program has BN rows of the weight in tiles of 16, all of which it loads at once. A row is cut into SLICES of WIDTH bytes,
the batch of a product [SLICES, 16, WIDTH] x [SLICES, WIDTH, COLUMNS]: warps have slices of their own. Tensor cores want a
few bytes here and there of each thread, and memory 16 in a row: since the order of what is summed over is free, a thread's
16 bytes are those of several steps, and nothing is exchanged between threads. Else the weight would have to arrive, be
stored and be read again before the kernel could wait for others.
"""

# mypy: disable-error-code="no-untyped-def,no-untyped-call,misc,untyped-decorator,assignment"

from __future__ import annotations

import triton
import triton.language as tl

from fxopt.codegen.templates.weight_dot import in_columns, total
from fxopt.codegen.triton_helpers import INTERPRETED

ROWS = tl.constexpr(16)
"""Of the weight that tensor cores take at a time."""

SEGMENT = tl.constexpr(64)
"""Bytes of a row that neighbouring threads load at a time, four of them 16 each."""

HALVES = tl.constexpr("""{ .reg .b32 low, high;
    shl.b32 low, $2, 4;
    lop3.b32 high, $2, 0xF0F0F0F0, 0x80808080, 0x6A;
    lop3.b32 $0, low, 0xF0F0F0F0, 0x80808080, 0x6A;
    mov.b32 $1, high; }""")
"""Four bytes to 16 times what is in their low halves, and in their high ones, less 8: int8."""

DIGITS = tl.constexpr("""{ .reg .b32 a, b, c, d;
    prmt.b32 a, $3, $4, 0x5140;
    prmt.b32 b, $5, $6, 0x5140;
    prmt.b32 c, $3, $4, 0x0062;
    prmt.b32 d, $5, $6, 0x0062;
    prmt.b32 $0, a, b, 0x5410;
    prmt.b32 $1, a, b, 0x7632;
    prmt.b32 $2, c, d, 0x5410; }""")
"""The lowest bytes of four integers, their next ones, and those after these."""


@triton.constexpr_function
def step_of(bits):
    """Bytes in a row that a thread has of a step of the tensor cores, as Triton divides operands: of 4 bits those of two."""
    return 8 if bits == 4 else 4


@triton.constexpr_function
def segments(width):
    """Of a slice."""
    return width // 64


@triton.jit
def scales_of(
    scale, first, N, K, scale_row, GROUP: tl.constexpr, SLICES: tl.constexpr, WIDTH: tl.constexpr
):  # fmt: skip
    """The scales of 8 rows from `first` on, [SLICES, 8, 2], of low and of high halves."""
    rows = scale + tl.minimum(first + tl.arange(0, 8), N - 1).to(tl.int64)[None, :] * scale_row
    part = (tl.arange(0, SLICES) * WIDTH)[:, None]
    return tl.join(tl.load(rows + part // GROUP), tl.load(rows + (part + K // 2) // GROUP))


@triton.jit
def tile_of(
    w, scale, first, N, K, w_row, scale_row,
    BITS: tl.constexpr, GROUP: tl.constexpr, SLICES: tl.constexpr, WIDTH: tl.constexpr,
):  # fmt: skip
    """ROWS rows of w from `first` on, [8, SLICES, 2, WIDTH / 64, 64]; of 4 bits also the scales [2 * SLICES, ROWS] of their
    low and then their high halves.

    In this order of dimensions Triton has neighbouring threads load 64 bytes of each of 8 rows, and warps other slices. It
    has fewer scales at a time than threads, and then each thread load its own ones.
    """
    rows = first + tl.arange(0, 2)[None, :] * 8 + tl.arange(0, 8)[:, None]
    rows = tl.minimum(rows, N - 1).to(tl.int64)[:, None, :, None, None] * w_row
    at = tl.arange(0, SLICES)[:, None] * WIDTH + tl.arange(0, segments(WIDTH))[None, :] * SEGMENT
    weights = tl.load(w + (rows + at[None, :, None, :, None] + tl.arange(0, SEGMENT)[None, None, None, None, :]))
    if BITS == 4:
        upper = scales_of(scale, first, N, K, scale_row, GROUP, SLICES, WIDTH)
        lower = scales_of(scale, first + 8, N, K, scale_row, GROUP, SLICES, WIDTH)
        return weights, tl.reshape(tl.permute(tl.join(upper, lower), (2, 0, 3, 1)), [2 * SLICES, ROWS])
    else:
        return weights, tl.zeros([1, 1], tl.float32)


@triton.jit
def tiles_of(
    w, scale, n, N, K, w_row, scale_row,
    BITS: tl.constexpr, GROUP: tl.constexpr, SLICES: tl.constexpr, WIDTH: tl.constexpr,
):  # fmt: skip
    """The rows n (`rows_of_program`) of w, as each `tile_of`. K is a literal, SLICES * WIDTH its bytes."""
    first = tl.program_id(0) * n.shape[0]
    tiles = (tile_of(w, scale, first, N, K, w_row, scale_row, BITS, GROUP, SLICES, WIDTH),)
    for k in tl.static_range(1, n.shape[0] // ROWS):
        tiles += (tile_of(w, scale, first + k * ROWS, N, K, w_row, scale_row, BITS, GROUP, SLICES, WIDTH),)
    return tiles


@triton.jit
def halves(w):
    """16 times the values of 4 bits in the low and in the high halves of bytes `w`, int8."""
    if INTERPRETED:
        wide = w.to(tl.int32)
        return ((wide & 15) * 16 - 128).to(tl.int8), ((wide >> 4) * 16 - 128).to(tl.int8)
    else:
        return tl.inline_asm_elementwise(HALVES, "=r,=r,r", [w], dtype=(tl.int8, tl.int8), is_pure=True, pack=4)


@triton.jit
def left_of(weights, BITS: tl.constexpr, SLICES: tl.constexpr, WIDTH: tl.constexpr):
    """The weights of a `tile_of` as the left operand, int8 [SLICES, ROWS, WIDTH]; of 4 bits [2 * SLICES, ROWS, WIDTH], 16
    times the values of low and then of high halves.
    """
    step: tl.constexpr = step_of(BITS)
    steps = tl.reshape(weights, [8, SLICES, 2, segments(WIDTH), 4, 16 // step, step])
    left = tl.reshape(tl.permute(steps, (1, 2, 0, 3, 5, 4, 6)), [SLICES, ROWS, WIDTH])
    if BITS == 4:
        low, high = halves(left)
        return tl.reshape(tl.permute(tl.join(low, high), (3, 0, 1, 2)), [2 * SLICES, ROWS, WIDTH])
    else:
        return left


@triton.jit
def digits(whole):
    """Three digits of the integers `whole`, int8, the lowest first."""
    biased = (whole + 0x808080) ^ 0x808080  # whose bytes are signed
    if INTERPRETED:
        return (biased << 24 >> 24).to(tl.int8), (biased << 16 >> 24).to(tl.int8), (biased << 8 >> 24).to(tl.int8)
    else:
        kinds: tl.constexpr = (tl.int8, tl.int8, tl.int8)
        return tl.inline_asm_elementwise(DIGITS, "=r,=r,=r,r,r,r,r", [biased], dtype=kinds, is_pure=True, pack=4)


@triton.jit
def in_order(values, BITS: tl.constexpr, WIDTH: tl.constexpr):
    """`values` [PARTS, WIDTH] in the order of `left_of`, as each of COLUMNS columns."""
    step: tl.constexpr = step_of(BITS)
    steps = tl.reshape(values, [values.shape[0], segments(WIDTH), 4, 16 // step, step])
    return in_columns(tl.reshape(tl.permute(steps, (0, 1, 3, 2, 4)), [values.shape[0], WIDTH]))


@triton.jit
def right_of(values, BITS: tl.constexpr, WIDTH: tl.constexpr):
    """Three digits of slices [PARTS, WIDTH] of the row as right operands, int8 [PARTS, WIDTH, COLUMNS], and what a unit of
    the first one stands for, [PARTS]: NaN for a slice that has an infinity or NaN.
    """
    wide = values.to(tl.float32)
    largest = tl.max(wide.to(tl.int32, bitcast=True) & 0x7FFFFFFF, 1) >> 23
    exponent = tl.maximum(largest, 22)  # of float32, in its bits; magnitudes below are less than 2**22, which digits hold
    factor = ((275 - exponent) << 23).to(tl.float32, bitcast=True)
    unit = tl.where(largest == 255, 0x7FC00000, (exponent - 21) << 23).to(tl.float32, bitcast=True)
    low, middle, high = digits(tl.where((largest == 255)[:, None], 0.0, wide * factor[:, None]).to(tl.int32))
    return in_order(low, BITS, WIDTH), in_order(middle, BITS, WIDTH), in_order(high, BITS, WIDTH), unit


@triton.jit
def row_at(x, K, BITS: tl.constexpr, WIDTH: tl.constexpr):
    """`right_of` the row at pointer x."""
    return right_of(tl.load(x + tl.arange(0, K // WIDTH)[:, None] * WIDTH + tl.arange(0, WIDTH)[None, :]), BITS, WIDTH)


@triton.jit
def row_given(row, BITS: tl.constexpr, WIDTH: tl.constexpr):
    """`right_of` a row in registers, [1, K]."""
    return right_of(tl.reshape(row, [row.shape[1] // WIDTH, WIDTH]), BITS, WIDTH)


@triton.jit
def sums(tile, operand, BITS: tl.constexpr, SLICES: tl.constexpr, WIDTH: tl.constexpr):
    """w @ x, float32 [ROWS], of a `tile_of` w and the `right_of` x."""
    weights, scales = tile
    low, middle, high, unit = operand
    left = left_of(weights, BITS, SLICES, WIDTH)
    lower = tl.dot(left, middle) * 256 + tl.dot(left, low)
    acc = tl.dot(left, high).to(tl.float32) * 65536.0 + lower.to(tl.float32)
    if BITS == 4:
        return total(acc * (scales * (unit * 0.0625)[:, None])[:, :, None])
    else:
        return total(acc * unit[:, None, None])


@triton.jit
def rows_of_tile(k, BN: tl.constexpr):
    """Those of the weight, and columns of the product, that this program's tile k is."""
    return (tl.program_id(0) * BN + k * ROWS + tl.arange(0, ROWS))[None, :]


@triton.jit
def products(
    operand, tiles, extra,
    EPILOGUE: tl.constexpr, BITS: tl.constexpr, BN: tl.constexpr, SLICES: tl.constexpr, WIDTH: tl.constexpr,
):  # fmt: skip
    """`EPILOGUE(x @ w.T)` of the `right_of` x and `tiles_of` w."""
    for k in tl.static_range(BN // ROWS):
        acc = sums(tiles[k], operand, BITS, SLICES, WIDTH)
        EPILOGUE(acc[None, :], tl.zeros([1, 1], tl.int32), rows_of_tile(k, BN), 0, extra)


@triton.jit
def dual_products(
    operand, tiles, tiles_v, extra,
    EPILOGUE: tl.constexpr, BITS: tl.constexpr, BN: tl.constexpr, SLICES: tl.constexpr, WIDTH: tl.constexpr,
):  # fmt: skip
    """`EPILOGUE(x @ w.T, x @ v.T)`, else as `products`."""
    for k in tl.static_range(BN // ROWS):
        acc = sums(tiles[k], operand, BITS, SLICES, WIDTH)
        acc2 = sums(tiles_v[k], operand, BITS, SLICES, WIDTH)
        EPILOGUE(acc[None, :], acc2[None, :], tl.zeros([1, 1], tl.int32), rows_of_tile(k, BN), 0, extra)


@triton.jit
def weight_integer(
    x, tiles, extra, K,
    EPILOGUE: tl.constexpr, BITS: tl.constexpr, BN: tl.constexpr, SLICES: tl.constexpr, WIDTH: tl.constexpr,
):  # fmt: skip
    """`EPILOGUE(x @ w.T)` of one row x [K]: `tiles` are those of `rows_of_program`."""
    products(row_at(x, K, BITS, WIDTH), tiles, extra, EPILOGUE, BITS, BN, SLICES, WIDTH)


@triton.jit
def dual_weight_integer(
    x, tiles, tiles_v, extra, K,
    EPILOGUE: tl.constexpr, BITS: tl.constexpr, BN: tl.constexpr, SLICES: tl.constexpr, WIDTH: tl.constexpr,
):  # fmt: skip
    """`EPILOGUE(x @ w.T, x @ v.T)`, else as `weight_integer`."""
    dual_products(row_at(x, K, BITS, WIDTH), tiles, tiles_v, extra, EPILOGUE, BITS, BN, SLICES, WIDTH)


@triton.jit
def weight_integer_of_row(
    row, tiles, extra,
    EPILOGUE: tl.constexpr, BITS: tl.constexpr, BN: tl.constexpr, SLICES: tl.constexpr, WIDTH: tl.constexpr,
):  # fmt: skip
    """As `weight_integer`, of a row in registers, [1, K]."""
    products(row_given(row, BITS, WIDTH), tiles, extra, EPILOGUE, BITS, BN, SLICES, WIDTH)


@triton.jit
def dual_weight_integer_of_row(
    row, tiles, tiles_v, extra,
    EPILOGUE: tl.constexpr, BITS: tl.constexpr, BN: tl.constexpr, SLICES: tl.constexpr, WIDTH: tl.constexpr,
):  # fmt: skip
    """As `dual_weight_integer`, of a row in registers."""
    dual_products(row_given(row, BITS, WIDTH), tiles, tiles_v, extra, EPILOGUE, BITS, BN, SLICES, WIDTH)
