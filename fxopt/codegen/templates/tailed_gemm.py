"""Matrix products whose last round of tiles is done in narrow ones.

Tiles that do not fill the multiprocessors a last time leave most of them idle while a few work on whole tiles: a result of
4096 x 2304 has 288 tiles of 128 x 256, two for each of 132 multiprocessors and 24 more. Those 24 are 96 tiles of 64 columns
here, which take a fraction of the time. Each element is summed by one program, in the same order as in a whole tile.
"""

# mypy: disable-error-code="no-untyped-def,no-untyped-call,misc,untyped-decorator"

from __future__ import annotations

import triton
import triton.language as tl

from fxopt.codegen.templates import gemm


@triton.jit
def tma_tailed_gemm(
    a, b, narrow, extra, BATCH, M, N, K, a_batch, b_batch,
    EPILOGUE: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, NARROW: tl.constexpr,
    WHOLE: tl.constexpr, GROUP: tl.constexpr, SUBTILE: tl.constexpr, PROGRAMS: tl.constexpr, FLATTEN: tl.constexpr,
    A_K_LAST: tl.constexpr, B_K_LAST: tl.constexpr, PRECISION: tl.constexpr,
    VECTORS: tl.constexpr = None, LOADED: tl.constexpr = 1,
):  # fmt: skip
    """`EPILOGUE(a @ b)` as `gemm.tma_gemm` with PROGRAMS (not 0) programs, the first WHOLE tiles in whole and the others in
    tiles of NARROW columns, which divides BN; narrow is a descriptor of b with blocks of so many.
    """
    rows, columns = tl.cdiv(M, BM), tl.cdiv(N, BN)
    for program in tl.range(tl.program_id(0), WHOLE, PROGRAMS, flatten=FLATTEN):
        z, row, column = gemm.tile_of(program, rows, columns, GROUP)
        y, x = row * BM, column * BN
        acc = gemm.descriptor_tile(a, b, y, x, z, 0, K, a_batch, b_batch, BM, BN, BK, A_K_LAST, B_K_LAST, PRECISION, False)
        gemm.finish(acc, y + tl.arange(0, BM)[:, None], x, z, extra, EPILOGUE, BN, SUBTILE, VECTORS, LOADED)
    parts: tl.constexpr = BN // NARROW
    own_next = (tl.program_id(0) + PROGRAMS - WHOLE % PROGRAMS) % PROGRAMS  # who had the fewest goes on first
    for part in tl.range(own_next, (BATCH * rows * columns - WHOLE) * parts, PROGRAMS):
        z, row, column = gemm.tile_of(WHOLE + part // parts, rows, columns, GROUP)
        y, x = row * BM, column * BN + part % parts * NARROW
        acc = gemm.descriptor_tile(
            a, narrow, y, x, z, 0, K, a_batch, b_batch, BM, NARROW, BK, A_K_LAST, B_K_LAST, PRECISION, False
        )
        gemm.finish(acc, y + tl.arange(0, BM)[:, None], x, z, extra, EPILOGUE, NARROW, 1, VECTORS, LOADED)
