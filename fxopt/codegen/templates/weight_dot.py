"""One row times a weight of few bits on tensor cores: nothing but the widening of a value takes instructions.

A program has BN rows of the weight, all of which it loads at once. A row is cut into CHUNKS of SLICES of WIDTH bytes:
slices are the batch of a product [SLICES, BN, WIDTH] x [SLICES, WIDTH, COLUMNS], so that
warps share the inner dimension of few rows, and chunks are multiplied one after the other as they arrive. The right operand
has the row x in each of its COLUMNS, which are as few as tensor cores take; the first one counts. Of 4 bits (the format is
that of `weight_gemm.py`) a slice lies within one group of values that have a scale, by which its sums are multiplied in
float32.
"""

# mypy: disable-error-code="no-untyped-def,no-untyped-call,misc,untyped-decorator,assignment"

from __future__ import annotations

import triton
import triton.language as tl

from fxopt.codegen.templates.weight_gemm import rows_of_program, unpacked, widened
from fxopt.codegen.triton_helpers.interpreter import INTERPRETED

COLUMNS = tl.constexpr(8)

TO_FLOAT16 = tl.constexpr("""{ .reg .b32 bytes, zero;
    xor.b32 bytes, $2, 0x80808080;
    mov.b32 zero, 0xE480E480;
    prmt.b32 $0, bytes, 0x64646464, 0x4140;
    prmt.b32 $1, bytes, 0x64646464, 0x4342;
    add.rn.f16x2 $0, $0, zero;
    add.rn.f16x2 $1, $1, zero; }""")
"""Four int8 to four float16, by way of 1024 + 128 + q: the conversion instruction has a quarter of the rate of these."""


@triton.jit
def places(CHUNK: tl.constexpr, SLICES: tl.constexpr, WIDTH: tl.constexpr):
    """Bytes of a row that are chunk CHUNK, [SLICES, WIDTH]."""
    return (CHUNK * SLICES + tl.arange(0, SLICES))[:, None] * WIDTH + tl.arange(0, WIDTH)[None, :]


@triton.jit
def chunk_of(
    w, scale, n, N, K, w_row, scale_row,
    CHUNK: tl.constexpr, BITS: tl.constexpr, GROUP: tl.constexpr, SLICES: tl.constexpr, WIDTH: tl.constexpr,
):  # fmt: skip
    """Chunk CHUNK of rows n (a vector) of w, [SLICES, BN, WIDTH]; of 4 bits also the scales [SLICES, BN] of its low and of
    its high halves."""
    rows = tl.minimum(n, N - 1).to(tl.int64)
    weights = tl.load(w + (rows[None, :, None] * w_row + places(CHUNK, SLICES, WIDTH)[:, None, :]))
    if BITS == 4:
        first = (CHUNK * SLICES + tl.arange(0, SLICES)) * WIDTH
        scales = scale + rows[None, :] * scale_row
        low, high = first // GROUP, (first + K // 2) // GROUP
        return weights, tl.load(scales + low[:, None]), tl.load(scales + high[:, None])
    else:
        return weights, 0.0, 0.0


@triton.jit
def chunks_of(
    w, scale, n, N, K, w_row, scale_row,
    BITS: tl.constexpr, GROUP: tl.constexpr, SLICES: tl.constexpr, WIDTH: tl.constexpr, CHUNKS: tl.constexpr,
):  # fmt: skip
    """All chunks of rows n of w, each as `chunk_of` has it. K is a literal, CHUNKS * SLICES * WIDTH its bytes."""
    chunks = (chunk_of(w, scale, n, N, K, w_row, scale_row, 0, BITS, GROUP, SLICES, WIDTH),)
    for k in tl.static_range(1, CHUNKS):
        chunks += (chunk_of(w, scale, n, N, K, w_row, scale_row, k, BITS, GROUP, SLICES, WIDTH),)
    return chunks


@triton.jit
def in_half(values, DTYPE: tl.constexpr):
    """`values` of 8 bits as DTYPE, float16 or bfloat16."""
    if INTERPRETED or values.dtype != tl.int8 or DTYPE.is_bf16():
        return widened(values, DTYPE)
    else:
        return tl.inline_asm_elementwise(TO_FLOAT16, "=r,=r,r", [values], dtype=tl.float16, is_pure=True, pack=4)


@triton.jit
def in_columns(values):
    """`values` [SLICES, WIDTH] as each of COLUMNS columns."""
    return tl.broadcast_to(values[:, :, None], [values.shape[0], values.shape[1], COLUMNS])


@triton.jit
def added(acc, chunk, values, more, BITS: tl.constexpr):
    """`acc` and what a chunk gives with `values` of x [SLICES, WIDTH]: of 4 bits, those of its low halves, and `more`."""
    weights, low_scale, high_scale = chunk
    if BITS == 4:
        low, high = unpacked(weights, values.dtype)
        acc += tl.dot(low, in_columns(values)) * low_scale[:, :, None]
        acc += tl.dot(high, in_columns(more)) * high_scale[:, :, None]
    else:
        acc = tl.dot(in_half(weights, values.dtype), in_columns(values), acc)
    return acc


@triton.jit
def total(acc):
    """The sums [BN] of `acc` [SLICES, BN, COLUMNS]."""
    first = tl.arange(0, COLUMNS)[None, None, :] == 0
    return tl.sum(tl.sum(tl.where(first, acc, 0.0), 2), 0)


@triton.jit
def sums(
    x, chunks, K, BN: tl.constexpr,
    BITS: tl.constexpr, SLICES: tl.constexpr, WIDTH: tl.constexpr, CHUNKS: tl.constexpr,
):  # fmt: skip
    """w @ x, float32 [BN], of what `chunks_of` loads of w and a pointer x."""
    acc = tl.zeros([SLICES, BN, COLUMNS], tl.float32)
    for k in tl.static_range(CHUNKS):
        at = x + places(k, SLICES, WIDTH)
        values = tl.load(at)
        more = tl.load(at + K // 2) if BITS == 4 else values
        acc = added(acc, chunks[k], values, more, BITS)
    return total(acc)


@triton.jit
def sums_of_row(values, more, chunks, BN: tl.constexpr, BITS: tl.constexpr):
    """As `sums`, of one chunk, whose values of x are in registers."""
    acc = tl.zeros([values.shape[0], BN, COLUMNS], tl.float32)
    return total(added(acc, chunks[0], values, more, BITS))


@triton.jit
def halves_of(row, BITS: tl.constexpr, SLICES: tl.constexpr, WIDTH: tl.constexpr):
    """A row in registers, [1, K], as the values [SLICES, WIDTH] of one chunk: low halves' and high ones'."""
    if BITS == 4:
        return tl.split(tl.permute(tl.reshape(row, [2, SLICES, WIDTH]), (1, 2, 0)))
    else:
        values = tl.reshape(row, [SLICES, WIDTH])
        return values, values


@triton.jit
def weight_dot(
    x, chunks, extra, K,
    EPILOGUE: tl.constexpr, BITS: tl.constexpr, BN: tl.constexpr, SLICES: tl.constexpr, WIDTH: tl.constexpr,
    CHUNKS: tl.constexpr,
):  # fmt: skip
    """`EPILOGUE(x @ w.T)` of one row x [K]: `chunks` are those of `rows_of_program`."""
    acc = sums(x, chunks, K, BN, BITS, SLICES, WIDTH, CHUNKS)
    EPILOGUE(acc[None, :], tl.zeros([1, 1], tl.int32), rows_of_program(BN)[None, :], 0, extra)


@triton.jit
def dual_weight_dot(
    x, chunks, chunks_v, extra, K,
    EPILOGUE: tl.constexpr, BITS: tl.constexpr, BN: tl.constexpr, SLICES: tl.constexpr, WIDTH: tl.constexpr,
    CHUNKS: tl.constexpr,
):  # fmt: skip
    """`EPILOGUE(x @ w.T, x @ v.T)`, else as `weight_dot`."""
    acc = sums(x, chunks, K, BN, BITS, SLICES, WIDTH, CHUNKS)
    acc2 = sums(x, chunks_v, K, BN, BITS, SLICES, WIDTH, CHUNKS)
    EPILOGUE(acc[None, :], acc2[None, :], tl.zeros([1, 1], tl.int32), rows_of_program(BN)[None, :], 0, extra)


@triton.jit
def weight_dot_of_row(
    row, chunks, extra,
    EPILOGUE: tl.constexpr, BITS: tl.constexpr, BN: tl.constexpr, SLICES: tl.constexpr, WIDTH: tl.constexpr,
    CHUNKS: tl.constexpr,
):  # fmt: skip
    """As `weight_dot`, of a row in registers, [1, K], that is one chunk: CHUNKS is 1."""
    values, more = halves_of(row, BITS, SLICES, WIDTH)
    acc = sums_of_row(values, more, chunks, BN, BITS)
    EPILOGUE(acc[None, :], tl.zeros([1, 1], tl.int32), rows_of_program(BN)[None, :], 0, extra)


@triton.jit
def dual_weight_dot_of_row(
    row, chunks, chunks_v, extra,
    EPILOGUE: tl.constexpr, BITS: tl.constexpr, BN: tl.constexpr, SLICES: tl.constexpr, WIDTH: tl.constexpr,
    CHUNKS: tl.constexpr,
):  # fmt: skip
    """As `dual_weight_dot`, of a row in registers."""
    values, more = halves_of(row, BITS, SLICES, WIDTH)
    acc = sums_of_row(values, more, chunks, BN, BITS)
    acc2 = sums_of_row(values, more, chunks_v, BN, BITS)
    EPILOGUE(acc[None, :], acc2[None, :], tl.zeros([1, 1], tl.int32), rows_of_program(BN)[None, :], 0, extra)
