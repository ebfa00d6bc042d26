"""Products of floating rows with a weight in few bits, which is widened in registers on its way to the tensor cores.

`weight_gemm` has the epilogue of `gemm.py`; `weight_split_gemm` stores partial sums of parts of the inner dimension;
`weight_vector` and `dual_weight_vector` multiply a single row, without tensor cores, also by a weight of 16 bits.

Shapes: x is [M, K]; the weight is [N, K], int8 or float8, or [N, K / 2] bytes with value k in the low half and value
k + K / 2 in the high half of byte k (uint8, 8 added; `ir/quantized_ops.py`), whose scales are [N, K / GROUP]. The tile is
computed transposed, [BN, BM]: the left operand of tensor cores may come from registers, and few rows leave it full.
"""

# mypy: disable-error-code="no-untyped-def,no-untyped-call,misc,untyped-decorator"

from __future__ import annotations

import triton
import triton.language as tl

from fxopt.codegen.templates import gemm
from fxopt.codegen.triton_helpers.interpreter import INTERPRETED
from fxopt.codegen.triton_helpers.memory import bring, elements_of_line


def _unpacking(kind: str, exponent: str, one: str, least: str) -> str:
    """PTX: the halves of four bytes, low ones first, under the bytes of `exponent`, times `one` plus `least`, in pairs."""
    return f"""{{ .reg .b32 low, high, one, zero;
    and.b32 low, $4, 0x0F0F0F0F;
    shr.u32 high, $4, 4;
    and.b32 high, high, 0x0F0F0F0F;
    mov.b32 one, {one};
    mov.b32 zero, {least};
    prmt.b32 $0, low, {exponent}, 0x4140;
    prmt.b32 $1, low, {exponent}, 0x4342;
    prmt.b32 $2, high, {exponent}, 0x4140;
    prmt.b32 $3, high, {exponent}, 0x4342;
    fma.rn.{kind} $0, $0, one, zero;
    fma.rn.{kind} $1, $1, one, zero;
    fma.rn.{kind} $2, $2, one, zero;
    fma.rn.{kind} $3, $3, one, zero; }}"""


UNPACK_BFLOAT16 = tl.constexpr(_unpacking("bf16x2", "0x43434343", "0x3F803F80", "0xC308C308"))
"""Four bytes to four and four bfloat16: the bits of 128 with a value q below are 128 + q, from which 136 is taken."""

UNPACK_FLOAT16 = tl.constexpr(_unpacking("f16x2", "0x64646464", "0x3C003C00", "0xE408E408"))
"""The same to float16, by way of 1024 + q."""


WITH_128 = tl.constexpr("""{ .reg .b32 low, high;
    and.b32 low, $8, 0x0F0F0F0F;
    shr.u32 high, $8, 4;
    and.b32 high, high, 0x0F0F0F0F;
    prmt.b32 $0, low, 0x43, 0x4055;
    prmt.b32 $1, low, 0x43, 0x4155;
    prmt.b32 $2, low, 0x43, 0x4255;
    prmt.b32 $3, low, 0x43, 0x4355;
    prmt.b32 $4, high, 0x43, 0x4055;
    prmt.b32 $5, high, 0x43, 0x4155;
    prmt.b32 $6, high, 0x43, 0x4255;
    prmt.b32 $7, high, 0x43, 0x4355; }""")
"""Four bytes to four and four float32: the bits of 128 with q below are 128 + q, an instruction a value."""

ZERO_WITH_128 = tl.constexpr(136.0)
"""What stands for zero, 8 as it is stored, in these."""

FROM_INT8 = tl.constexpr("""{ .reg .b32 bytes;
    xor.b32 bytes, $4, 0x80808080;
    prmt.b32 $0, bytes, 0x4B, 0x4550;
    prmt.b32 $1, bytes, 0x4B, 0x4551;
    prmt.b32 $2, bytes, 0x4B, 0x4552;
    prmt.b32 $3, bytes, 0x4B, 0x4553;
    add.f32 $0, $0, 0fCB000080;
    add.f32 $1, $1, 0fCB000080;
    add.f32 $2, $2, 0fCB000080;
    add.f32 $3, $3, 0fCB000080; }""")
"""Four int8 to four float32, by way of 2**23 + 128 + q: a conversion instruction has a quarter of the rate of these."""


@triton.constexpr_function
def part_of(bits):
    """Elements of a weight's row that one thread loads at a time: 16 bytes."""
    return 8 if bits == 16 else 16


@triton.constexpr_function
def elements_of(k, bits):
    """Of a weight's row of `k` values, as they lie in memory: bytes, or values of 16 bits."""
    return k if bits == 16 else k * bits // 8


@triton.jit
def with_128(w):
    """128 more than what is stored in the low and in the high halves of bytes `w`, float32."""
    if INTERPRETED:
        return (w & 15).to(tl.float32) + 128.0, (w >> 4).to(tl.float32) + 128.0
    else:
        return tl.inline_asm_elementwise(
            WITH_128, "=f,=f,=f,=f,=f,=f,=f,=f,r", [w], dtype=(tl.float32, tl.float32), is_pure=True, pack=4
        )


@triton.jit
def widened(values, DTYPE: tl.constexpr):
    """`values` of 8 bits as DTYPE, by way of float32 where the interpreter knows no other."""
    if INTERPRETED:
        return values.to(tl.float32).to(DTYPE)
    else:
        return values.to(DTYPE)


@triton.jit
def as_float32(values):
    """`values` of 8 or 16 bits as float32."""
    if INTERPRETED or values.dtype != tl.int8:
        return values.to(tl.float32)
    else:
        return tl.inline_asm_elementwise(FROM_INT8, "=f,=f,=f,=f,r", [values], dtype=tl.float32, is_pure=True, pack=4)


@triton.jit
def unpacked(w, DTYPE: tl.constexpr):
    """The values in the low and in the high halves of bytes `w`, both in DTYPE, float16 or bfloat16."""
    if INTERPRETED:
        low, high = (w & 15).to(tl.int32) - 8, (w >> 4).to(tl.int32) - 8
        return widened(low, DTYPE), widened(high, DTYPE)
    elif DTYPE.is_bf16():
        return tl.inline_asm_elementwise(
            UNPACK_BFLOAT16, "=r,=r,=r,=r,r", [w], dtype=(tl.bfloat16, tl.bfloat16), is_pure=True, pack=4
        )
    else:
        return tl.inline_asm_elementwise(
            UNPACK_FLOAT16, "=r,=r,=r,=r,r", [w], dtype=(tl.float16, tl.float16), is_pure=True, pack=4
        )


@triton.jit
def finished(acc):
    """`acc`, float32, which something reads that does nothing: so the products that it is made of end here.

    Triton 3.6 lets them run on into the next step of a loop otherwise, which widens the next weights into the registers that
    they still read (`triton_in_flight.py`).
    """
    if INTERPRETED:
        return acc
    else:
        return tl.inline_asm_elementwise("// products have ended", "=f,0", [acc], dtype=tl.float32, is_pure=True, pack=1)


@triton.jit
def rows_of(x, y, k, M, K, x_row, BK: tl.constexpr, SIZE: tl.constexpr):
    """x.T at rows y and columns k of K, [BK, BM]: rows past the last repeat that, columns past the last are zero."""
    at = tl.minimum(y, M - 1)[None, :].to(tl.int64) * x_row + k[:, None]
    if gemm.divides(BK, SIZE):
        return tl.load(x + at)
    else:
        return tl.load(x + at, mask=(k < K)[:, None], other=0.0)


@triton.jit
def weight_tile(
    x, w, scale, y, n, first, end, M, N, K, x_row, w_row, scale_row,
    BITS: tl.constexpr, GROUP: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr,
):  # fmt: skip
    """The float32 tile [BN, BM] of w @ x.T at rows n of w and y of x (vectors), over bytes of a row from first to end."""
    DTYPE: tl.constexpr = x.dtype.element_ty
    acc = tl.zeros([BN, BM], tl.float32)
    rows = tl.minimum(n, N - 1).to(tl.int64)
    k = tl.arange(0, BK)
    weights = w + (rows[:, None] * w_row + k[None, :])
    for start in range(first, end, BK):
        at = tl.full([], 0, tl.int32) + start  # a tensor in the interpreter too
        if BITS == 4:
            low, high = unpacked(tl.load(weights + at), DTYPE)
            scales = scale + rows * scale_row
            part = tl.dot(low, rows_of(x, y, at + k, M, K, x_row, BK, K // 2))
            acc += part * tl.load(scales + at // GROUP)[:, None]
            part = tl.dot(high, rows_of(x, y, at + K // 2 + k, M, K, x_row, BK, K // 2))
            acc += part * tl.load(scales + (at + K // 2) // GROUP)[:, None]
        else:
            if gemm.divides(BK, K):
                wide = widened(tl.load(weights + at), DTYPE)
            else:
                wide = widened(tl.load(weights + at, mask=(at + k < K)[None, :], other=0.0), DTYPE)
            acc = finished(tl.dot(wide, rows_of(x, y, at + k, M, K, x_row, BK, K), acc))
    return acc


@triton.jit
def weight_gemm(
    x, w, scale, extra, M, N, K, x_row, w_row, scale_row,
    EPILOGUE: tl.constexpr, BITS: tl.constexpr, GROUP: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr,
    ROWS_FIRST: tl.constexpr,
):  # fmt: skip
    """`EPILOGUE(x @ w.T)`; the grid is cdiv(M, BM) * cdiv(N, BN) programs, of which ROWS_FIRST share columns.

    x, w and scale are pointers to the first elements, of which scale is used with 4 BITS only. Strides in elements, of rows;
    elements of a row are neighbours. K is a literal; with 4 BITS, BK divides GROUP and K / 2.
    """
    row, column = tl.program_id(0) % ROWS_FIRST, tl.program_id(0) // ROWS_FIRST
    y, n = row * BM + tl.arange(0, BM), column * BN + tl.arange(0, BN)
    bytes_of_row: tl.constexpr = K * BITS // 8
    acc = weight_tile(x, w, scale, y, n, 0, bytes_of_row, M, N, K, x_row, w_row, scale_row, BITS, GROUP, BM, BN, BK)
    EPILOGUE(tl.trans(acc), y[:, None], n[None, :], 0, extra)


@triton.jit
def weight_split_gemm(
    x, w, scale, partial, M, N, K, x_row, w_row, scale_row,
    BITS: tl.constexpr, GROUP: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr,
    ROWS_FIRST: tl.constexpr, SPLIT: tl.constexpr,
):  # fmt: skip
    """Partial sums of x @ w.T, float32 [SPLIT, 1, M, N], contiguous; SPLIT times the programs of `weight_gemm`."""
    part, tile = tl.program_id(0) % SPLIT, tl.program_id(0) // SPLIT
    row, column = tile % ROWS_FIRST, tile // ROWS_FIRST
    y, n = row * BM + tl.arange(0, BM), column * BN + tl.arange(0, BN)
    first, end = gemm.part_of_inner(part, K * BITS // 8, BK, SPLIT)
    acc = weight_tile(x, w, scale, y, n, first, end, M, N, K, x_row, w_row, scale_row, BITS, GROUP, BM, BN, BK)
    gemm.store_partial(tl.trans(acc), partial, part, row * BM, column * BN, M, N, BM, BN)


@triton.jit
def places_of(first, BITS: tl.constexpr, PARTS: tl.constexpr, STEPS: tl.constexpr):
    """Where in a row each of PARTS threads begins to load in each of STEPS steps, from element `first` on."""
    part, step = tl.arange(0, PARTS), tl.arange(0, STEPS)
    return tl.full([], 0, tl.int32) + first + (step[None, :] * PARTS + part[:, None]) * part_of(BITS)


@triton.jit
def vector_block(
    w, scale, first, n, N, K, w_row, scale_row,
    BITS: tl.constexpr, GROUP: tl.constexpr, PARTS: tl.constexpr, STEPS: tl.constexpr,
):  # fmt: skip
    """What PARTS threads multiply at a time: elements [PARTS, BN, STEPS, 16 (bytes; of 16 bits 8)] of rows n (a vector) of
    w, from element `first` of each on. Of 4 bits also the scales [PARTS, BN, STEPS] of what is in their low and in their
    high halves.
    """
    part: tl.constexpr = part_of(BITS)
    row: tl.constexpr = elements_of(K, BITS)
    rows = tl.minimum(n, N - 1).to(tl.int64)
    at = places_of(first, BITS, PARTS, STEPS)
    k = at[:, None, :, None] + tl.arange(0, part)[None, None, None, :]
    inside = k < row
    whole: tl.constexpr = gemm.divides(PARTS * STEPS * part, row)
    # Parts are the first dimension: so Triton gives neighbours to neighbouring threads, and x the same layout.
    weights = gemm.fetch(w + (k + rows[None, :, None, None] * w_row), inside, inside, not whole, False)
    if BITS == 4:
        scales = scale + rows[None, :, None] * scale_row
        group = tl.minimum(at, row - 1)[:, None, :]
        return weights, tl.load(scales + group // GROUP), tl.load(scales + (row + group) // GROUP)
    else:
        return weights, 0.0, 0.0


@triton.jit
def first_block(
    w, scale, n, N, K, w_row, scale_row,
    BITS: tl.constexpr, GROUP: tl.constexpr, PARTS: tl.constexpr, STEPS: tl.constexpr,
):  # fmt: skip
    """`vector_block` at the beginning of rows n of w."""
    return vector_block(w, scale, 0, n, N, K, w_row, scale_row, BITS, GROUP, PARTS, STEPS)


@triton.jit
def bring_later(w, w_row, SIZE: tl.constexpr, N, BN: tl.constexpr, AHEAD: tl.constexpr):
    """Bring SIZE elements of each row of w that the program after AHEAD others will load into the L2 cache: it begins when
    this one, or one like it, has ended, and the memory rests meanwhile otherwise.
    """
    length: tl.constexpr = elements_of_line(w.dtype.element_ty)
    lines: tl.constexpr = triton.next_power_of_2((SIZE + length - 1) // length)
    if tl.program_id(0) + AHEAD < tl.num_programs(0):
        rows = tl.minimum(rows_of_program(BN) + AHEAD * BN, N - 1).to(tl.int64)
        bring(w + (rows[:, None] * w_row + tl.minimum(tl.arange(0, lines) * length, SIZE - 1)[None, :]))


@triton.jit
def vector_values(x, first, K, BITS: tl.constexpr, PARTS: tl.constexpr, STEPS: tl.constexpr):
    """Elements of the row x, float32 [PARTS, STEPS, 16 or 8], for what `vector_block` has at element `first`: by 4 bits
    those of the low halves and those of the high ones.
    """
    part: tl.constexpr = part_of(BITS)
    row: tl.constexpr = elements_of(K, BITS)
    k = places_of(first, BITS, PARTS, STEPS)[:, :, None] + tl.arange(0, part)[None, None, :]
    inside = k < row
    whole: tl.constexpr = gemm.divides(PARTS * STEPS * part, row)
    values = gemm.fetch(x + k, inside, inside, not whole, False).to(tl.float32)
    if BITS == 4:
        return values, gemm.fetch(x + row + k, inside, inside, not whole, False).to(tl.float32)
    else:
        return values, values


@triton.jit
def values_of_row(row, BITS: tl.constexpr, PARTS: tl.constexpr, STEPS: tl.constexpr):
    """As `vector_values`, of a whole row that is in registers, [1, K], and as long as the block."""
    part: tl.constexpr = part_of(BITS)
    if BITS == 4:
        return tl.split(tl.permute(tl.reshape(row.to(tl.float32), [2, STEPS, PARTS, part]), (2, 1, 3, 0)))
    else:
        values = tl.permute(tl.reshape(row.to(tl.float32), [STEPS, PARTS, part]), (1, 0, 2))
        return values, values


@triton.jit
def vector_products(values, more, weights, low_scale, high_scale, BITS: tl.constexpr):
    """Sums [PARTS, BN] of what each thread has of a block of `vector_block` times the row's `vector_values`.

    A product with 128 + q is one with q once 136 times the sum of x's elements is taken off, whose rounding is that of
    float32 times about 30: nothing beside the weight's own.
    """
    if BITS == 4:
        low, high = with_128(weights)
        sums = tl.sum(low * values[:, None, :, :], 3) - ZERO_WITH_128 * tl.sum(values, 2)[:, None, :]
        others = tl.sum(high * more[:, None, :, :], 3) - ZERO_WITH_128 * tl.sum(more, 2)[:, None, :]
        return tl.sum(sums * low_scale + others * high_scale, 2)
    else:
        return tl.sum(tl.sum(as_float32(weights) * values[:, None, :, :], 3), 2)


@triton.jit
def vector_sums(
    x, w, scale, block, n, N, K, w_row, scale_row,
    BITS: tl.constexpr, GROUP: tl.constexpr, BN: tl.constexpr, PARTS: tl.constexpr, STEPS: tl.constexpr,
):  # fmt: skip
    """w @ x at rows n (a vector) of w, float32 [BN], of which `block` is the first block: threads keep sums of their own
    over all of the inner dimension. The next block is loaded before the one before it is multiplied.
    """
    weights, low, high = block
    size: tl.constexpr = PARTS * STEPS * part_of(BITS)
    row: tl.constexpr = elements_of(K, BITS)
    acc = tl.zeros([PARTS, BN], tl.float32)
    for first in range(size, row, size):
        later, later_low, later_high = vector_block(w, scale, first, n, N, K, w_row, scale_row, BITS, GROUP, PARTS, STEPS)
        values, more = vector_values(x, first - size, K, BITS, PARTS, STEPS)
        acc += vector_products(values, more, weights, low, high, BITS)
        weights, low, high = later, later_low, later_high
    values, more = vector_values(x, (row - 1) // size * size, K, BITS, PARTS, STEPS)
    acc += vector_products(values, more, weights, low, high, BITS)
    return tl.sum(acc, 0)


@triton.jit
def rows_of_program(BN: tl.constexpr):
    """The rows of the weight, and columns of the product, that this program computes."""
    return tl.program_id(0) * BN + tl.arange(0, BN)


@triton.jit
def weight_vector(
    x, w, scale, block, extra, N, K, w_row, scale_row,
    EPILOGUE: tl.constexpr, BITS: tl.constexpr, GROUP: tl.constexpr, BN: tl.constexpr, PARTS: tl.constexpr,
    STEPS: tl.constexpr,
):  # fmt: skip
    """`EPILOGUE(x @ w.T)` of one row x [K], BN rows of w a program, PARTS * STEPS * 16 bytes of each at a time.

    `block` is the `first_block` of `rows_of_program`: entries load it before they wait for x. Multiples of
    16 are the bytes and the strides of rows, and GROUP; `scale` is used with 4 BITS only. Strides in elements; K is a
    literal.
    """
    n = rows_of_program(BN)
    acc = vector_sums(x, w, scale, block, n, N, K, w_row, scale_row, BITS, GROUP, BN, PARTS, STEPS)
    EPILOGUE(acc[None, :], tl.zeros([1, 1], tl.int32), n[None, :], 0, extra)


@triton.jit
def dual_weight_vector(
    x, w, v, scale, scale_v, block, block_v, extra, N, K, w_row, scale_row,
    EPILOGUE: tl.constexpr, BITS: tl.constexpr, GROUP: tl.constexpr, BN: tl.constexpr, PARTS: tl.constexpr,
    STEPS: tl.constexpr,
):  # fmt: skip
    """`EPILOGUE(x @ w.T, x @ v.T)`, else as `weight_vector`; v and its scales have the strides of w and its."""
    n = rows_of_program(BN)
    acc = vector_sums(x, w, scale, block, n, N, K, w_row, scale_row, BITS, GROUP, BN, PARTS, STEPS)
    acc2 = vector_sums(x, v, scale_v, block_v, n, N, K, w_row, scale_row, BITS, GROUP, BN, PARTS, STEPS)
    EPILOGUE(acc[None, :], acc2[None, :], tl.zeros([1, 1], tl.int32), n[None, :], 0, extra)


@triton.jit
def weight_vector_of_row(
    row, block, extra,
    EPILOGUE: tl.constexpr, BITS: tl.constexpr, BN: tl.constexpr, PARTS: tl.constexpr, STEPS: tl.constexpr,
):  # fmt: skip
    """As `weight_vector`, of a row in registers, [1, K], for all of which `block` has the weights."""
    values, more = values_of_row(row, BITS, PARTS, STEPS)
    weights, low, high = block
    acc = tl.sum(vector_products(values, more, weights, low, high, BITS), 0)
    EPILOGUE(acc[None, :], tl.zeros([1, 1], tl.int32), rows_of_program(BN)[None, :], 0, extra)


@triton.jit
def dual_weight_vector_of_row(
    row, block, block_v, extra,
    EPILOGUE: tl.constexpr, BITS: tl.constexpr, BN: tl.constexpr, PARTS: tl.constexpr, STEPS: tl.constexpr,
):  # fmt: skip
    """As `dual_weight_vector`, of a row in registers."""
    values, more = values_of_row(row, BITS, PARTS, STEPS)
    weights, low, high = block
    acc = tl.sum(vector_products(values, more, weights, low, high, BITS), 0)
    weights, low, high = block_v
    acc2 = tl.sum(vector_products(values, more, weights, low, high, BITS), 0)
    EPILOGUE(acc[None, :], acc2[None, :], tl.zeros([1, 1], tl.int32), rows_of_program(BN)[None, :], 0, extra)
