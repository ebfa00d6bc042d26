"""Matrix products with an epilogue: what a printed kernel calls for `epilogue(a @ b)`.

A printed entry has flat parameters and calls one of

- `pointer_gemm`: any strides, loads through pointers (cp.async); one tile a program
- `tma_gemm`: operands as tensor descriptors, loads by Hopper's tensor memory accelerator; persistent or one tile a program
- `split_gemm`, `tma_split_gemm`: the inner dimension in SPLIT parts, whose float32 sums are stored apart (few rows)
- `dual_gemm`, `tma_dual_gemm`: `epilogue(a @ b, a @ c)`, which reads a once (gated layers)

Shapes: a is [batch, M, K], b is [batch, K, N], a result tile [BM, BN]. Sizes and strides are literals where they are known,
else int32 values; what has to be masked is decided from the literals.

`EPILOGUE(acc, y, x, z, extra)` gets a float32 block of the product (of int8 operands, summed in int32), its row numbers
y [R, 1] and column numbers x [1, C] (both int32), the number z of the product in the batch (int32 scalar), and the entry's
tuple `extra` of whatever it needs. It masks rows from M on and columns from N on in all that it loads and stores, and takes
R and C as they come. That of a dual product gets both blocks first.

`VECTORS(y, x, z, extra)`, where it is given, loads what the epilogue wants of operands that vary along one dimension of the
tile at most (a bias), once for a whole tile: a tuple that the epilogue finds at the end of `extra`, cut to its columns. Each
part of a tile would load its own, and wait for it, while the loads for a whole tile are under way before its last products
are done; and of less than one element a thread each thread would load all those that it adds itself, one by one.

SWAP computes the transposed tile, `b.T @ a.T`: the tensor cores of Hopper take no fewer than 64 rows, which few rows of a
leave empty and the columns of b fill. The epilogue does not notice.

DIRECT, where it is not 0, lets threads store so many neighbours of a row from where tensor cores have left them. These give
a thread two columns of each eight, and a warp 16 rows; stores and loads of whole vectors want others, for which a tile
would pass through shared memory, in float32. Which column of b is where in a tile is free, though, and which row of a tile
has which number: `column_places` and `row_places` are such that `in_order` moves nothing. The epilogue is to take 4 * DIRECT
columns at a time (SUBTILE), by WARPS warps of a tile of 16 * WARPS rows or more.
"""

# mypy: disable-error-code="no-untyped-def,no-untyped-call,misc,untyped-decorator"

from __future__ import annotations

import triton
import triton.language as tl

from fxopt.codegen.triton_helpers.interpreter import INTERPRETED


@triton.constexpr_function
def divides(block, size):
    """Whether `size` is a literal that `block` divides: then nothing is masked."""
    return isinstance(size, int) and size % block == 0


@triton.constexpr_function
def is_literal(value, wanted):
    return isinstance(value, int) and value == wanted


@triton.constexpr_function
def accumulator(dtype):
    """What products of `dtype` are summed in."""
    return tl.int32 if dtype == tl.int8 else tl.float32


@triton.jit
def multiplied(a, b, acc, PRECISION: tl.constexpr):
    """acc + a @ b of two blocks. Tensor cores sum 8-bit floats with fewer bits than float32 has; "promoted" adds what they
    have summed up over a block to the accumulator outside of them.
    """
    if PRECISION == "promoted":
        return acc + tl.dot(a, b)
    else:
        return tl.dot(a, b, acc, input_precision=PRECISION, out_dtype=acc.dtype)


@triton.jit
def tile_of(program, rows, columns, GROUP: tl.constexpr):
    """(batch, row tile, column tile) of a program: GROUP row tiles go through all columns together.

    Programs that run at the same time then read few different tiles of a and b, which the L2 cache holds.
    """
    z = program // (rows * columns)
    tile = program % (rows * columns)
    group = tile // (GROUP * columns)
    first = group * GROUP
    height = tl.minimum(rows - first, GROUP)
    inside = tile % (GROUP * columns)
    return z, first + inside % height, inside // height


@triton.jit
def row_places(BLOCK: tl.constexpr, WARPS: tl.constexpr, DIRECT: tl.constexpr):
    """The numbers of a tile's rows, as `in_order` has them: eight of each warp, then the next eight of each."""
    row = tl.arange(0, BLOCK)
    if DIRECT == 0:
        return row
    else:
        pair: tl.constexpr = 16 * WARPS
        return row // pair * pair + row // 8 % WARPS * 16 + row // (8 * WARPS) % 2 * 8 + row % 8


@triton.jit
def column_places(BLOCK: tl.constexpr, DIRECT: tl.constexpr):
    """Which column of b is to be where in a tile: the one of four threads that has two of eight has the next ones, too."""
    column = tl.arange(0, BLOCK)
    if DIRECT == 0:
        return column
    else:
        four: tl.constexpr = 4 * DIRECT
        return column // four * four + column % 8 // 2 * DIRECT + column % four // 8 * 2 + column % 2


@triton.jit
def in_order(acc, WARPS: tl.constexpr, DIRECT: tl.constexpr):
    """A tile with columns at `column_places`, in the order of columns and that of `row_places`."""
    if DIRECT == 0:
        return acc
    else:
        rows: tl.constexpr = acc.shape[0]
        columns: tl.constexpr = acc.shape[1]
        apart = tl.reshape(acc, [rows // (16 * WARPS), WARPS, 2, 8, columns // (4 * DIRECT), DIRECT // 2, 4, 2])
        return tl.reshape(tl.permute(apart, [0, 2, 1, 3, 4, 6, 5, 7]), [rows, columns])


@triton.jit
def finish(
    acc, y, x, z, extra,
    EPILOGUE: tl.constexpr, COLUMNS: tl.constexpr, SUBTILE: tl.constexpr,
    VECTORS: tl.constexpr = None, LOADED: tl.constexpr = 1,
):  # fmt: skip
    """The epilogue in SUBTILE parts of the columns, which begin at x: a part needs less shared memory for its layout."""
    if VECTORS is None:
        finish_parts(acc, (), y, x, z, extra, EPILOGUE, COLUMNS, SUBTILE)
    else:
        vectors = first_of_all(VECTORS(y, x + tl.arange(0, LOADED)[None, :], z, extra), LOADED // COLUMNS)
        finish_parts(acc, vectors, y, x, z, extra, EPILOGUE, COLUMNS, SUBTILE)


@triton.jit
def finish_parts(acc, vectors, y, x, z, extra, EPILOGUE: tl.constexpr, COLUMNS: tl.constexpr, SUBTILE: tl.constexpr):
    """`finish` with what VECTORS has loaded for these columns."""
    if SUBTILE == 1:
        EPILOGUE(acc.to(tl.float32), y, x + tl.arange(0, COLUMNS)[None, :], z, extra + vectors)
    else:
        left, right = halves(acc)
        left_vectors, right_vectors = halves_of_all(vectors)
        finish_parts(left, left_vectors, y, x, z, extra, EPILOGUE, COLUMNS // 2, SUBTILE // 2)
        finish_parts(right, right_vectors, y, x + COLUMNS // 2, z, extra, EPILOGUE, COLUMNS // 2, SUBTILE // 2)


@triton.jit
def halves(block):
    """The left and the right columns of a block."""
    return tl.split(tl.permute(tl.reshape(block, [block.shape[0], 2, block.shape[1] // 2]), [0, 2, 1]))


@triton.constexpr_function
def spans_columns(shape):
    return len(shape) == 2 and shape[1] > 1


@triton.jit
def halves_of_all(vectors):
    """(those for the left columns, those for the right ones); what is the same for all columns is in both."""
    if len(vectors) == 0:
        return (), ()
    else:
        first = vectors[0]
        left, right = halves_of_all(vectors[1:])
        if spans_columns(first.shape):
            one, two = halves(first)
            return (one,) + left, (two,) + right  # noqa: RUF005  # Triton unpacks nothing
        else:
            return (first,) + left, (first,) + right  # noqa: RUF005


@triton.jit
def first_of_all(vectors, PARTS: tl.constexpr):
    """The first of PARTS parts of what `vectors` have for columns."""
    if PARTS == 1:
        return vectors
    else:
        left, _ = halves_of_all(vectors)
        return first_of_all(left, PARTS // 2)


@triton.jit
def part_of_inner(part, K, BK: tl.constexpr, SPLIT: tl.constexpr):
    """(first, end) of one of SPLIT parts of the inner dimension, in whole blocks; the last ones may be empty."""
    if SPLIT == 1:
        return 0, K
    else:
        length = tl.cdiv(tl.cdiv(K, SPLIT), BK) * BK
        first = part * length
        if divides(BK * SPLIT, K):
            return first, first + length
        else:
            return first, tl.minimum(first + length, K)


# --- loads through pointers


@triton.jit
def fetch(pointers, outer, inner, OUTER: tl.constexpr, INNER: tl.constexpr):
    """A block with zeros where a mask that is in use says no."""
    if OUTER and INNER:
        return tl.load(pointers, mask=outer & inner, other=0.0)
    elif OUTER:
        return tl.load(pointers, mask=outer, other=0.0)
    elif INNER:
        return tl.load(pointers, mask=inner, other=0.0)
    else:
        return tl.load(pointers)


@triton.jit
def inside(index, SIZE, stride, BLOCK: tl.constexpr):
    """Row numbers that may be read. Past the end they repeat the last row, but not along contiguous memory: there the
    accesses would be single elements, and the caller masks (`masked`).
    """
    if divides(BLOCK, SIZE) or is_literal(stride, 1):
        return index
    else:
        return tl.minimum(index, SIZE - 1)


@triton.constexpr_function
def masked(block, size, stride):
    """Whether the rows of an operand need a mask (see `inside`)."""
    return is_literal(stride, 1) and not divides(block, size)


@triton.jit
def widened(index, WIDE: tl.constexpr):
    """int64 where offsets may not fit 32 bits."""
    if WIDE:
        return index.to(tl.int64)
    else:
        return index


@triton.jit
def pointer_product(
    a, b, y, x, first, end, M, N, K, a_row, a_column, b_row, b_column,
    BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, PRECISION: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    """The float32 tile [BM, BN] at rows y and columns x (vectors), summed over the inner indices from first to end."""
    k = tl.arange(0, BK)
    ya, xb = widened(inside(y, M, a_row, BM), WIDE), widened(inside(x, N, b_column, BN), WIDE)
    kw = widened(k, WIDE)
    a_block = a + (ya[:, None] * a_row + kw[None, :] * a_column)
    b_block = b + (kw[:, None] * b_row + xb[None, :] * b_column)
    acc = tl.zeros([BM, BN], accumulator(a.dtype.element_ty))
    for k0 in range(first, end, BK):
        at = widened(tl.full([], 0, tl.int32) + k0, WIDE)  # a tensor in the interpreter too
        a_tile = fetch(
            a_block + at * a_column, (y < M)[:, None], (k < K - k0)[None, :], masked(BM, M, a_row), not divides(BK, K)
        )
        b_tile = fetch(
            b_block + at * b_row, (x < N)[None, :], (k < K - k0)[:, None], masked(BN, N, b_column), not divides(BK, K)
        )
        acc = multiplied(a_tile, b_tile, acc, PRECISION)
    return acc


@triton.jit
def pointer_tile(
    a, b, y, x, z, first, end, M, N, K, a_row, a_column, b_row, b_column, a_batch, b_batch,
    BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, PRECISION: tl.constexpr, WIDE: tl.constexpr, SWAP: tl.constexpr,
    DIRECT: tl.constexpr = 0,
):  # fmt: skip
    """`pointer_product` of the batch's z-th matrices at the tile that begins at (y, x)."""
    rows, columns = y + tl.arange(0, BM), x + column_places(BN, DIRECT)
    az, bz = a + z.to(tl.int64) * a_batch, b + z.to(tl.int64) * b_batch
    if SWAP:
        acc = pointer_product(
            bz, az, columns, rows, first, end, N, M, K, b_column, b_row, a_column, a_row, BN, BM, BK, PRECISION, WIDE
        )
        return tl.trans(acc)
    else:
        return pointer_product(
            az, bz, rows, columns, first, end, M, N, K, a_row, a_column, b_row, b_column, BM, BN, BK, PRECISION, WIDE
        )


@triton.jit
def pointer_gemm(
    a, b, extra, M, N, K, a_row, a_column, b_row, b_column, a_batch, b_batch,
    EPILOGUE: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, GROUP: tl.constexpr,
    SUBTILE: tl.constexpr, PRECISION: tl.constexpr, WIDE: tl.constexpr, SWAP: tl.constexpr,
    VECTORS: tl.constexpr = None, LOADED: tl.constexpr = 1, WARPS: tl.constexpr = 1, DIRECT: tl.constexpr = 0,
):  # fmt: skip
    """`EPILOGUE(a @ b)`; the grid is batch * cdiv(M, BM) * cdiv(N, BN) programs.

    a, b: pointers to the first elements. Strides in elements. PRECISION ("tf32" or "ieee") is that of float32 operands, or
    "promoted" (`multiplied`).
    WIDE: an offset within one matrix may reach 2**31 elements.
    """
    z, row, column = tile_of(tl.program_id(0), tl.cdiv(M, BM), tl.cdiv(N, BN), GROUP)
    y, x = row * BM, column * BN
    acc = pointer_tile(
        a, b, y, x, z, 0, K, M, N, K, a_row, a_column, b_row, b_column, a_batch, b_batch,
        BM, BN, BK, PRECISION, WIDE, SWAP, DIRECT,
    )  # fmt: skip
    rows = y + row_places(BM, WARPS, DIRECT)[:, None]
    finish(in_order(acc, WARPS, DIRECT), rows, x, z, extra, EPILOGUE, BN, SUBTILE, VECTORS, LOADED)


@triton.jit
def split_gemm(
    a, b, partial, BATCH, M, N, K, a_row, a_column, b_row, b_column, a_batch, b_batch,
    BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, GROUP: tl.constexpr, SPLIT: tl.constexpr,
    PRECISION: tl.constexpr, WIDE: tl.constexpr, SWAP: tl.constexpr,
):  # fmt: skip
    """Partial sums of a @ b, float32 [SPLIT, BATCH, M, N], contiguous; SPLIT times the programs of `pointer_gemm`."""
    at, row, column = tile_of(tl.program_id(0), tl.cdiv(M, BM), tl.cdiv(N, BN), GROUP)
    part, z, y, x = at // BATCH, at % BATCH, row * BM, column * BN
    first, end = part_of_inner(part, K, BK, SPLIT)
    acc = pointer_tile(
        a, b, y, x, z, first, end, M, N, K, a_row, a_column, b_row, b_column, a_batch, b_batch,
        BM, BN, BK, PRECISION, WIDE, SWAP,
    )  # fmt: skip
    store_partial(acc, partial, at, y, x, M, N, BM, BN)


@triton.jit
def store_partial(acc, partial, at, y, x, M, N, BM: tl.constexpr, BN: tl.constexpr):
    """`acc` as a tile of the at-th matrix of partial sums."""
    rows, columns = y + tl.arange(0, BM)[:, None], x + tl.arange(0, BN)[None, :]
    matrix = partial + at.to(tl.int64) * M * N
    tl.store(matrix + (rows * N + columns), acc.to(tl.float32), mask=(rows < M) & (columns < N))


# --- loads through tensor descriptors


@triton.jit
def descriptor_product(
    a, b, y, x, a_first, b_first, first, end, BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr,
    A_K_LAST: tl.constexpr, B_K_LAST: tl.constexpr, PRECISION: tl.constexpr, DIRECT: tl.constexpr = 0,
    UNROLLED: tl.constexpr = False,
):  # fmt: skip
    """The float32 tile [BM, BN] at row y of a and column x of b. Matrices begin at the descriptors' rows a_first and
    b_first. UNROLLED has no loop, so that a loop over tiles may stage all that a tile loads; then `first` and `end` are
    literals.
    """
    acc = tl.zeros([BM, BN], accumulator(a.dtype))
    if UNROLLED:
        for k in tl.static_range(first, end, BK):
            acc = with_block(acc, a, b, y, x, a_first, b_first, k, BN, BK, A_K_LAST, B_K_LAST, PRECISION, DIRECT)
    else:
        for k in range(first, end, BK):
            acc = with_block(acc, a, b, y, x, a_first, b_first, k, BN, BK, A_K_LAST, B_K_LAST, PRECISION, DIRECT)
    return acc


@triton.jit
def with_block(
    acc, a, b, y, x, a_first, b_first, k, BN: tl.constexpr, BK: tl.constexpr,
    A_K_LAST: tl.constexpr, B_K_LAST: tl.constexpr, PRECISION: tl.constexpr, DIRECT: tl.constexpr,
):  # fmt: skip
    """`acc` and the products of the block at k of the inner dimension."""
    if A_K_LAST:
        a_tile = a.load([a_first + y, k])
    else:
        a_tile = a.load([a_first + k, y]).T
    if DIRECT > 0:
        b_tile = tl.reshape(b.load([x // (4 * DIRECT), 0, 0, 0, k]), [BN, BK]).T
    elif B_K_LAST:
        b_tile = b.load([b_first + x, k]).T
    else:
        b_tile = b.load([b_first + k, x])
    return multiplied(a_tile, b_tile, acc, PRECISION)


@triton.jit
def descriptor_tile(
    a, b, y, x, z, first, end, a_batch, b_batch, BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr,
    A_K_LAST: tl.constexpr, B_K_LAST: tl.constexpr, PRECISION: tl.constexpr, SWAP: tl.constexpr, DIRECT: tl.constexpr = 0,
    UNROLLED: tl.constexpr = False,
):  # fmt: skip
    """`descriptor_product` of the batch's z-th matrices."""
    if SWAP:
        acc = descriptor_product(b, a, x, y, z * b_batch, z * a_batch, first, end, BN, BM, BK, B_K_LAST, A_K_LAST, PRECISION)
        return tl.trans(acc)
    else:
        return descriptor_product(
            a, b, y, x, z * a_batch, z * b_batch, first, end, BM, BN, BK, A_K_LAST, B_K_LAST, PRECISION, DIRECT, UNROLLED
        )


@triton.jit
def begin_apart(MULTIPROCESSORS: tl.constexpr, NANOSECONDS: tl.constexpr):
    """Let the programs of a multiprocessor, each of which holds one of so many in a row, begin one after another.

    Programs that begin at once share the tensor cores until all have a tile, and then all have epilogues while the tensor
    cores rest; each keeps its distance from the others. Apart by the products of a tile, one's epilogue lies beside
    another's products.
    """
    if not INTERPRETED:
        before = tl.program_id(0) // MULTIPROCESSORS
        if before > 0:
            tl.inline_asm_elementwise(
                "nanosleep.u32 $1; mov.u32 $0, $1;", "=r,r", [before * NANOSECONDS], dtype=tl.int32, is_pure=False, pack=1
            )


@triton.jit
def tma_gemm(
    a, b, extra, BATCH, M, N, K, a_batch, b_batch,
    EPILOGUE: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, GROUP: tl.constexpr,
    SUBTILE: tl.constexpr, PROGRAMS: tl.constexpr, FLATTEN: tl.constexpr,
    A_K_LAST: tl.constexpr, B_K_LAST: tl.constexpr, PRECISION: tl.constexpr, SWAP: tl.constexpr,
    VECTORS: tl.constexpr = None, LOADED: tl.constexpr = 1,
    RESIDENT: tl.constexpr = 1, APART: tl.constexpr = 0, WARPS: tl.constexpr = 1, DIRECT: tl.constexpr = 0,
    AHEAD: tl.constexpr = None,
):  # fmt: skip
    """`EPILOGUE(a @ b)` with descriptors of a and b.

    a: descriptor of [rows, K] with blocks [BM, BK] when A_K_LAST, else of [rows, M] with blocks [BK, BM]; b likewise [rows,
    K] with [BN, BK] or [rows, N] with [BK, BN]. The z-th matrix of a batch begins at row z * a_batch (b_batch); where K is
    not last and there is a batch, BK must divide K. What lies past the descriptor's end is read as zero.

    With DIRECT, the descriptor of b is that of [groups of 4 * DIRECT columns, DIRECT // 2, 4, 2, K], whose dimensions 1 to 3
    are the pairs of a thread, threads, and a pair's columns, with blocks [BN // (4 * DIRECT), DIRECT // 2, 4, 2, BK].

    The grid is PROGRAMS programs, each with every PROGRAMS-th tile, or one program for each tile if PROGRAMS is 0. FLATTEN
    loads the next tile's operands during an epilogue. AHEAD is a number of stages for all that the loop over tiles loads,
    what the epilogue does too; then K is a literal. With APART, persistent programs `begin_apart`.
    """
    rows, columns = tl.cdiv(M, BM), tl.cdiv(N, BN)
    if APART > 0:
        begin_apart(PROGRAMS // RESIDENT, APART)
    if PROGRAMS == 0:
        z, row, column = tile_of(tl.program_id(0), rows, columns, GROUP)
        y, x = row * BM, column * BN
        acc = descriptor_tile(a, b, y, x, z, 0, K, a_batch, b_batch, BM, BN, BK, A_K_LAST, B_K_LAST, PRECISION, SWAP, DIRECT)
        rows_of_tile = y + row_places(BM, WARPS, DIRECT)[:, None]
        finish(in_order(acc, WARPS, DIRECT), rows_of_tile, x, z, extra, EPILOGUE, BN, SUBTILE, VECTORS, LOADED)
    else:
        for program in tl.range(tl.program_id(0), BATCH * rows * columns, PROGRAMS, flatten=FLATTEN, num_stages=AHEAD):
            z, row, column = tile_of(program, rows, columns, GROUP)
            y, x = row * BM, column * BN
            acc = descriptor_tile(
                a, b, y, x, z, 0, K, a_batch, b_batch, BM, BN, BK, A_K_LAST, B_K_LAST, PRECISION, SWAP, DIRECT,
                AHEAD is not None,
            )  # fmt: skip
            rows_of_tile = y + row_places(BM, WARPS, DIRECT)[:, None]
            finish(in_order(acc, WARPS, DIRECT), rows_of_tile, x, z, extra, EPILOGUE, BN, SUBTILE, VECTORS, LOADED)


@triton.jit
def tma_split_gemm(
    a, b, partial, BATCH, M, N, K, a_batch, b_batch,
    BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, GROUP: tl.constexpr, SPLIT: tl.constexpr,
    A_K_LAST: tl.constexpr, B_K_LAST: tl.constexpr, PRECISION: tl.constexpr, SWAP: tl.constexpr,
):  # fmt: skip
    """`split_gemm` with the descriptors of `tma_gemm`."""
    at, row, column = tile_of(tl.program_id(0), tl.cdiv(M, BM), tl.cdiv(N, BN), GROUP)
    part, z, y, x = at // BATCH, at % BATCH, row * BM, column * BN
    first, end = part_of_inner(part, K, BK, SPLIT)
    acc = descriptor_tile(a, b, y, x, z, first, end, a_batch, b_batch, BM, BN, BK, A_K_LAST, B_K_LAST, PRECISION, SWAP)
    store_partial(acc, partial, at, y, x, M, N, BM, BN)


# --- two products with the same left operand


@triton.jit
def dual_finish(one, two, y, x, z, extra, EPILOGUE: tl.constexpr, COLUMNS: tl.constexpr, SUBTILE: tl.constexpr):
    """`finish` for two blocks."""
    if SUBTILE == 1:
        EPILOGUE(one.to(tl.float32), two.to(tl.float32), y, x + tl.arange(0, COLUMNS)[None, :], z, extra)
    else:
        one_left, one_right = halves(one)
        two_left, two_right = halves(two)
        dual_finish(one_left, two_left, y, x, z, extra, EPILOGUE, COLUMNS // 2, SUBTILE // 2)
        dual_finish(one_right, two_right, y, x + COLUMNS // 2, z, extra, EPILOGUE, COLUMNS // 2, SUBTILE // 2)


@triton.jit
def dual_pointer_product(
    a, b, c, y, x, M, N, K, a_row, a_column, b_row, b_column,
    BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, PRECISION: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    """The float32 tiles [BM, BN] of a @ b and a @ c at rows y and columns x (vectors)."""
    k = tl.arange(0, BK)
    ya, xb = widened(inside(y, M, a_row, BM), WIDE), widened(inside(x, N, b_column, BN), WIDE)
    kw = widened(k, WIDE)
    a_block = a + (ya[:, None] * a_row + kw[None, :] * a_column)
    b_offset = kw[:, None] * b_row + xb[None, :] * b_column
    b_block, c_block = b + b_offset, c + b_offset
    one = tl.zeros([BM, BN], accumulator(a.dtype.element_ty))
    two = tl.zeros([BM, BN], accumulator(a.dtype.element_ty))
    for k0 in range(0, K, BK):
        at = widened(tl.full([], 0, tl.int32) + k0, WIDE)
        rows, columns, more = (y < M)[:, None], (x < N)[None, :], k < K - k0
        a_tile = fetch(a_block + at * a_column, rows, more[None, :], masked(BM, M, a_row), not divides(BK, K))
        b_tile = fetch(b_block + at * b_row, columns, more[:, None], masked(BN, N, b_column), not divides(BK, K))
        c_tile = fetch(c_block + at * b_row, columns, more[:, None], masked(BN, N, b_column), not divides(BK, K))
        one = multiplied(a_tile, b_tile, one, PRECISION)
        two = multiplied(a_tile, c_tile, two, PRECISION)
    return one, two


@triton.jit
def dual_gemm(
    a, b, c, extra, M, N, K, a_row, a_column, b_row, b_column, a_batch, b_batch,
    EPILOGUE: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, GROUP: tl.constexpr,
    SUBTILE: tl.constexpr, PRECISION: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    """`EPILOGUE(a @ b, a @ c)`, otherwise as `pointer_gemm`; c has the strides of b."""
    z, row, column = tile_of(tl.program_id(0), tl.cdiv(M, BM), tl.cdiv(N, BN), GROUP)
    y, x = row * BM + tl.arange(0, BM), column * BN + tl.arange(0, BN)
    az, bz = a + z.to(tl.int64) * a_batch, z.to(tl.int64) * b_batch
    one, two = dual_pointer_product(
        az, b + bz, c + bz, y, x, M, N, K, a_row, a_column, b_row, b_column, BM, BN, BK, PRECISION, WIDE
    )
    dual_finish(one, two, y[:, None], column * BN, z, extra, EPILOGUE, BN, SUBTILE)


@triton.jit
def dual_descriptor_product(
    a, b, c, y, x, a_first, b_first, K,
    BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr,
    A_K_LAST: tl.constexpr, B_K_LAST: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """`descriptor_product` of a with b and with c, whose matrices begin at the same row."""
    one = tl.zeros([BM, BN], accumulator(a.dtype))
    two = tl.zeros([BM, BN], accumulator(a.dtype))
    for k in range(0, K, BK):
        if A_K_LAST:
            a_tile = a.load([a_first + y, k])
        else:
            a_tile = a.load([a_first + k, y]).T
        if B_K_LAST:
            b_tile, c_tile = b.load([b_first + x, k]).T, c.load([b_first + x, k]).T
        else:
            b_tile, c_tile = b.load([b_first + k, x]), c.load([b_first + k, x])
        one = multiplied(a_tile, b_tile, one, PRECISION)
        two = multiplied(a_tile, c_tile, two, PRECISION)
    return one, two


@triton.jit
def dual_descriptor_tile(
    a, b, c, extra, y, x, z, K, a_batch, b_batch,
    EPILOGUE: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, SUBTILE: tl.constexpr,
    A_K_LAST: tl.constexpr, B_K_LAST: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """One tile of `tma_dual_gemm`, epilogue included."""
    one, two = dual_descriptor_product(a, b, c, y, x, z * a_batch, z * b_batch, K, BM, BN, BK, A_K_LAST, B_K_LAST, PRECISION)
    dual_finish(one, two, y + tl.arange(0, BM)[:, None], x, z, extra, EPILOGUE, BN, SUBTILE)


@triton.jit
def tma_dual_gemm(
    a, b, c, extra, BATCH, M, N, K, a_batch, b_batch,
    EPILOGUE: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, GROUP: tl.constexpr,
    SUBTILE: tl.constexpr, PROGRAMS: tl.constexpr, FLATTEN: tl.constexpr,
    A_K_LAST: tl.constexpr, B_K_LAST: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """`EPILOGUE(a @ b, a @ c)`, otherwise as `tma_gemm`; the descriptor of c is like that of b."""
    rows, columns = tl.cdiv(M, BM), tl.cdiv(N, BN)
    if PROGRAMS == 0:
        z, row, column = tile_of(tl.program_id(0), rows, columns, GROUP)
        dual_descriptor_tile(
            a, b, c, extra, row * BM, column * BN, z, K, a_batch, b_batch,
            EPILOGUE, BM, BN, BK, SUBTILE, A_K_LAST, B_K_LAST, PRECISION,
        )  # fmt: skip
    else:
        for program in tl.range(tl.program_id(0), BATCH * rows * columns, PROGRAMS, flatten=FLATTEN):
            z, row, column = tile_of(program, rows, columns, GROUP)
            dual_descriptor_tile(
                a, b, c, extra, row * BM, column * BN, z, K, a_batch, b_batch,
                EPILOGUE, BM, BN, BK, SUBTILE, A_K_LAST, B_K_LAST, PRECISION,
            )  # fmt: skip
