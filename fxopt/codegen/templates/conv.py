"""Convolutions of channels-last images with an epilogue: what a printed kernel calls for `epilogue(convolution)`.

- `stencil`: depthwise ones, in float32 without tensor cores; each thread has several places in a column of the result, so
  that what it loads and widens serves several of them
- `stencil_gradient`: the gradient of a depthwise convolution's weight, in partial sums
- `implicit_gemm`: others, as a product of patches, which are gathered block by block, and the weight
- `split_implicit_gemm`: the same in partial sums, for few places

Geometry is given as tuples of literals: SHAPE are the images' sizes (images, height, width, channels) and STRIDES their
strides in elements; PLACES, WINDOW, STRIDE, PADDING and DILATION are pairs for height and width. A place of the window is a
row of the product, a channel of the result its column. `EPILOGUE(acc, y, x, z, extra)` is that of `gemm.py`; rows that are
none have the number of the first row past the end.

With a POOL, a pair that divides PLACES, rows of the product come pool by pool, as those of `Patches`. The epilogue gets, for
each place of a pool in order, a block with a row for each pool, and their numbers: `EPILOGUE(*blocks, y, x, z, extra)`.
"""

# mypy: disable-error-code="no-untyped-def,no-untyped-call,misc,untyped-decorator,assignment"
# ruff: noqa: B007, RUF005  # Triton has neither unused names nor unpacking

from __future__ import annotations

import math

import triton
import triton.language as tl

from fxopt.codegen.templates.gemm import accumulator, divides, finish, multiplied, part_of_inner, store_partial, tile_of


@triton.constexpr_function
def tap(j, t, window, stride, dilation):
    """Which row of the t-th place's window is row j of the input, counted from the first under place 0; -1: none."""
    distance = j - t * stride
    reaches = distance >= 0 and distance % dilation == 0 and distance // dilation < window
    return distance // dilation if reaches else -1


@triton.constexpr_function
def rows_under(places, window, stride, dilation):
    """Rows of the input from the first to the last that so many places in a column see."""
    return (places - 1) * stride + (window - 1) * dilation + 1


@triton.constexpr_function
def is_seen(j, places, window, stride, dilation):
    """Whether any of the places sees row j of the input."""
    for t in range(places):
        distance = j - t * stride
        if distance >= 0 and distance % dilation == 0 and distance // dilation < window:
            return True
    return False


@triton.jit
def added_row(
    acc, row, taps, j: tl.constexpr, T: tl.constexpr, WINDOW: tl.constexpr, STRIDE: tl.constexpr, DILATION: tl.constexpr
):
    """The T sums `acc` with row j of the input added to those of the places that see it."""
    sums = ()
    for t in tl.static_range(T):
        if tap(j, t, WINDOW, STRIDE, DILATION) >= 0:
            sums = sums + (acc[t] + row * taps[tap(j, t, WINDOW, STRIDE, DILATION)],)
        else:
            sums = sums + (acc[t],)
    return sums


@triton.jit
def stencil(
    x, w, extra, w_tap, w_channel, SHAPE: tl.constexpr, STRIDES: tl.constexpr, PLACES: tl.constexpr,
    WINDOW: tl.constexpr, STRIDE: tl.constexpr, PADDING: tl.constexpr, DILATION: tl.constexpr,
    EPILOGUE: tl.constexpr, T: tl.constexpr, P: tl.constexpr, BC: tl.constexpr,
):  # fmt: skip
    """A depthwise convolution. The weight of channel c at element (r, s) of the window is at (r * WINDOW[1] + s) * w_tap +
    c * w_channel.

    A program has T places in each of P columns of places, and BC channels; the grid is
    cdiv(images * cdiv(PLACES[0], T) * PLACES[1], P) * cdiv(channels, BC).
    """
    strips, blocks = tl.cdiv(PLACES[0], T), tl.cdiv(SHAPE[3], BC)
    program = tl.program_id(0)
    c = (program % blocks) * BC + tl.arange(0, BC)[None, :]
    p = (program // blocks) * P + tl.arange(0, P)[:, None]
    image, first, column = p // (strips * PLACES[1]), p // PLACES[1] % strips * T, p % PLACES[1]
    exists = p < SHAPE[0] * strips * PLACES[1]
    top, left = first * STRIDE[0] - PADDING[0], column * STRIDE[1] - PADDING[1]
    corner = x + (image * STRIDES[0] + top * STRIDES[1] + left * STRIDES[2] + c * STRIDES[3])
    acc = ()
    for t in tl.static_range(T):
        acc = acc + (tl.zeros([P, BC], tl.float32),)
    for s in range(WINDOW[1]):
        taps = ()
        for r in tl.static_range(WINDOW[0]):
            at = w + ((r * WINDOW[1] + s) * w_tap + c * w_channel)
            value = tl.load(at) if divides(BC, SHAPE[3]) else tl.load(at, mask=c < SHAPE[3], other=0.0)
            taps = taps + (value.to(tl.float32),)
        inside = exists & (left + s * DILATION[1] >= 0) & (left + s * DILATION[1] < SHAPE[2])
        if not divides(BC, SHAPE[3]):
            inside = inside & (c < SHAPE[3])
        for j in tl.static_range(rows_under(T, WINDOW[0], STRIDE[0], DILATION[0])):
            if is_seen(j, T, WINDOW[0], STRIDE[0], DILATION[0]):
                seen = inside & (top + j >= 0) & (top + j < SHAPE[1])
                row = tl.load(corner + (s * (DILATION[1] * STRIDES[2]) + j * STRIDES[1]), mask=seen, other=0.0)
                acc = added_row(acc, row.to(tl.float32), taps, j, T, WINDOW[0], STRIDE[0], DILATION[0])
    for t in tl.static_range(T):
        y = (image * PLACES[0] + first + t) * PLACES[1] + column
        y = tl.where(exists & (first + t < PLACES[0]), y, SHAPE[0] * PLACES[0] * PLACES[1])
        EPILOGUE(acc[t], y, c, 0, extra)


@triton.jit
def added_taps(
    acc, row, above, j: tl.constexpr, T: tl.constexpr, WINDOW: tl.constexpr, STRIDE: tl.constexpr, DILATION: tl.constexpr
):
    """`acc`, a sum for each row of the window, with the products of row j of the input and the gradients `above` of those of
    the T places that see it.
    """
    sums = ()
    for r in tl.static_range(WINDOW):
        total = acc[r]
        for t in tl.static_range(T):
            if tap(j, t, WINDOW, STRIDE, DILATION) == r:
                total = total + row * above[t]
        sums = sums + (total,)
    return sums


@triton.jit
def stencil_gradient(
    x, grad, partial, ROW: tl.constexpr, SHAPE: tl.constexpr, STRIDES: tl.constexpr, PLACES: tl.constexpr,
    WINDOW: tl.constexpr, STRIDE: tl.constexpr, PADDING: tl.constexpr, DILATION: tl.constexpr,
    T: tl.constexpr, P: tl.constexpr, BC: tl.constexpr, PARTS: tl.constexpr,
):  # fmt: skip
    """The gradient of a depthwise convolution's weight, in PARTS sums over the places: float32 [PARTS, WINDOW[0] *
    WINDOW[1], channels], contiguous.

    grad: the gradient of the result, whose places are ROW elements apart and channels side by side. A program has BC
    channels and a part of the places, T x P of them at a time; the grid is PARTS * cdiv(channels, BC).
    """
    strips, blocks = tl.cdiv(PLACES[0], T), tl.cdiv(SHAPE[3], BC)
    count: tl.constexpr = WINDOW[0] * WINDOW[1]
    part = tl.program_id(0) // blocks
    c = (tl.program_id(0) % blocks) * BC + tl.arange(0, BC)[None, :]
    tiles = tl.cdiv(SHAPE[0] * strips * PLACES[1], P)
    each = tl.cdiv(tiles, PARTS)
    acc = ()
    for k in tl.static_range(count):
        acc = acc + (tl.zeros([P, BC], tl.float32),)
    for tile in range(part * each, tl.minimum(part * each + each, tiles)):
        p = tile * P + tl.arange(0, P)[:, None]
        image, first, column = p // (strips * PLACES[1]), p // PLACES[1] % strips * T, p % PLACES[1]
        exists = (p < SHAPE[0] * strips * PLACES[1]) & (c < SHAPE[3])
        above = ()
        for t in tl.static_range(T):
            place = (image * PLACES[0] + first + t) * PLACES[1] + column
            value = tl.load(grad + (place * ROW + c), mask=exists & (first + t < PLACES[0]), other=0.0)
            above = above + (value.to(tl.float32),)
        top, left = first * STRIDE[0] - PADDING[0], column * STRIDE[1] - PADDING[1]
        corner = x + (image * STRIDES[0] + top * STRIDES[1] + left * STRIDES[2] + c * STRIDES[3])
        sums = ()
        for s in tl.static_range(WINDOW[1]):
            inside = exists & (left + s * DILATION[1] >= 0) & (left + s * DILATION[1] < SHAPE[2])
            own = acc[s * WINDOW[0] : (s + 1) * WINDOW[0]]
            for j in tl.static_range(rows_under(T, WINDOW[0], STRIDE[0], DILATION[0])):
                if is_seen(j, T, WINDOW[0], STRIDE[0], DILATION[0]):
                    seen = inside & (top + j >= 0) & (top + j < SHAPE[1])
                    row = tl.load(corner + (s * DILATION[1] * STRIDES[2] + j * STRIDES[1]), mask=seen, other=0.0)
                    own = added_taps(own, row.to(tl.float32), above, j, T, WINDOW[0], STRIDE[0], DILATION[0])
            sums = sums + own
        acc = sums
    for s in tl.static_range(WINDOW[1]):
        for r in tl.static_range(WINDOW[0]):
            at = partial + ((part * count + r * WINDOW[1] + s) * SHAPE[3] + c)
            tl.store(at, tl.sum(acc[s * WINDOW[0] + r], 0)[None, :], mask=c < SHAPE[3])


@triton.constexpr_function
def side_of(pool, dim):
    return 1 if pool is None else pool[dim]


@triton.constexpr_function
def places_of(pool):
    return side_of(pool, 0) * side_of(pool, 1)


NEAR = tl.constexpr(8)
"""Rows of a tile from one to the next that tensor cores leave with the same thread."""


@triton.jit
def rows_of_tile(block, BM: tl.constexpr, POOL: tl.constexpr):
    """The rows of the product that the block-th tile of BM has, in its order.

    That of pools: the two rows of a pair of places are NEAR rows apart, two pairs of one pool half a tile. Where that has 16
    rows for each warp, or some times as many, tensor cores leave all of these with one thread, so that it takes no exchange
    to compute something of a pool.
    """
    m = tl.arange(0, BM)
    if places_of(POOL) == 1:
        return block * BM + m
    else:
        pairs: tl.constexpr = places_of(POOL) // 2
        own = BM // pairs
        pool = m % own // (2 * NEAR) * NEAR + m % NEAR
        return (block * (own // 2) + pool) * (2 * pairs) + m // own * 2 + m // NEAR % 2


@triton.jit
def place_of(y, PLACES: tl.constexpr, POOL: tl.constexpr):
    """(image, row, column) of row y of the product."""
    if places_of(POOL) == 1:
        return y // (PLACES[0] * PLACES[1]), y // PLACES[1] % PLACES[0], y % PLACES[1]
    else:
        down, across = PLACES[0] // POOL[0], PLACES[1] // POOL[1]
        pool, place = y // places_of(POOL), y % places_of(POOL)
        row = pool // across % down * POOL[0] + place // POOL[1]
        return pool // (across * down), row, pool % across * POOL[1] + place % POOL[1]


@triton.jit
def in_pools(acc, POOL: tl.constexpr):
    """A tile in the order of `rows_of_tile` as [pools, NEAR, columns, *places of a pool]."""
    pairs: tl.constexpr = places_of(POOL) // 2
    rows = tl.reshape(acc, [pairs, acc.shape[0] // (2 * NEAR * pairs), 2, NEAR, acc.shape[1]])
    return tl.permute(rows, [1, 3, 4, 0, 2])


@triton.jit
def finish_pools(pools, y, x, extra, EPILOGUE: tl.constexpr, POOL: tl.constexpr):
    """The epilogue of `pools` [any, any, columns, *places of a pool], which have the numbers y and begin at column x."""
    rows: tl.constexpr = pools.shape[0] * pools.shape[1]
    columns: tl.constexpr = pools.shape[2]
    places = apart(pools.to(tl.float32), rows, columns, places_of(POOL))
    EPILOGUE(*places, y[:, None], x + tl.arange(0, columns)[None, :], 0, extra)


@triton.jit
def apart(pools, ROWS: tl.constexpr, COLUMNS: tl.constexpr, COUNT: tl.constexpr):
    """A block [ROWS, COLUMNS] for each of the COUNT places (two or four) that the last dimensions of `pools` number."""
    shape: tl.constexpr = [pools.shape[0], pools.shape[1], COLUMNS]
    if COUNT == 2:
        first, second = tl.split(tl.reshape(pools, shape + [2]))
        return tl.reshape(first, [ROWS, COLUMNS]), tl.reshape(second, [ROWS, COLUMNS])
    else:
        even, odd = tl.split(tl.reshape(pools, shape + [2, 2]))
        first, third = apart(even, ROWS, COLUMNS, 2)
        second, fourth = apart(odd, ROWS, COLUMNS, 2)
        return first, second, third, fourth


@triton.jit
def implicit_gemm(
    x, w, extra, N, w_row, w_column, SHAPE: tl.constexpr, STRIDES: tl.constexpr, PLACES: tl.constexpr,
    WINDOW: tl.constexpr, STRIDE: tl.constexpr, PADDING: tl.constexpr, DILATION: tl.constexpr,
    EPILOGUE: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, GROUP: tl.constexpr,
    SUBTILE: tl.constexpr, PROMOTE: tl.constexpr = False, POOL: tl.constexpr = None,
):  # fmt: skip
    """A convolution into N channels; element (k, n) of the weight is at k * w_row + n * w_column, k counting (row of the
    window, column, channel).

    The grid is cdiv(places, BM) * cdiv(N, BN). Where BK divides the channels a block has one element of the window;
    else it counts through several. PROMOTE adds up what tensor cores have summed over a block outside of them
    (`gemm.multiplied`).
    """
    M: tl.constexpr = SHAPE[0] * PLACES[0] * PLACES[1]
    _, block, column = tile_of(tl.program_id(0), tl.cdiv(M, BM), tl.cdiv(N, BN), GROUP)
    acc = gathered_tile(
        x, w, block, column, 0, N, w_row, w_column, SHAPE, STRIDES, PLACES, WINDOW, STRIDE, PADDING, DILATION,
        BM, BN, BK, 1, PROMOTE, POOL,
    )  # fmt: skip
    if places_of(POOL) == 1:
        finish(acc, (block * BM + tl.arange(0, BM))[:, None], column * BN, 0, extra, EPILOGUE, BN, SUBTILE)
    else:
        pools: tl.constexpr = BM // places_of(POOL)
        finish_pools(in_pools(acc, POOL), block * pools + tl.arange(0, pools), column * BN, extra, EPILOGUE, POOL)


@triton.jit
def split_implicit_gemm(
    x, w, partial, N, w_row, w_column, SHAPE: tl.constexpr, STRIDES: tl.constexpr, PLACES: tl.constexpr,
    WINDOW: tl.constexpr, STRIDE: tl.constexpr, PADDING: tl.constexpr, DILATION: tl.constexpr,
    BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, GROUP: tl.constexpr, SPLIT: tl.constexpr,
    PROMOTE: tl.constexpr = False,
):  # fmt: skip
    """Partial sums, float32 [SPLIT, 1, places, N], contiguous; SPLIT times the programs of `implicit_gemm`."""
    M: tl.constexpr = SHAPE[0] * PLACES[0] * PLACES[1]
    part, block, column = tile_of(tl.program_id(0), tl.cdiv(M, BM), tl.cdiv(N, BN), GROUP)
    acc = gathered_tile(
        x, w, block, column, part, N, w_row, w_column, SHAPE, STRIDES, PLACES, WINDOW, STRIDE, PADDING, DILATION,
        BM, BN, BK, SPLIT, PROMOTE, None,
    )  # fmt: skip
    store_partial(acc, partial, part, block * BM, column * BN, M, N, BM, BN)


@triton.constexpr_function
def aligned(block, strides):
    """A power of two that divides what moves a block's addresses from one element of the window, or block of channels, to
    the next: the compiler does not see it through remainders, and would load element by element.
    """
    step = math.gcd(block * strides[3], strides[1], strides[2])
    return step & -step


@triton.jit
def gathered_tile(
    x, w, block, column, part, N, w_row, w_column, SHAPE: tl.constexpr, STRIDES: tl.constexpr, PLACES: tl.constexpr,
    WINDOW: tl.constexpr, STRIDE: tl.constexpr, PADDING: tl.constexpr, DILATION: tl.constexpr,
    BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, SPLIT: tl.constexpr, PROMOTE: tl.constexpr, POOL: tl.constexpr,
):  # fmt: skip
    """One of SPLIT parts of the tile [BM, BN] of a convolution, float32 (int32 of int8 operands): of row `block` and column
    `column` of tiles.
    """
    M: tl.constexpr = SHAPE[0] * PLACES[0] * PLACES[1]
    C: tl.constexpr = SHAPE[3]
    K: tl.constexpr = WINDOW[0] * WINDOW[1] * C
    first, end = part_of_inner(part, K, BK, SPLIT)
    y, n, k = rows_of_tile(block, BM, POOL), column * BN + tl.arange(0, BN), tl.arange(0, BK)
    image, down, across = place_of(y if divides(BM, M) else tl.minimum(y, M - 1), PLACES, POOL)
    top, left = down * STRIDE[0] - PADDING[0], across * STRIDE[1] - PADDING[1]
    corner = x + (image * STRIDES[0] + top * STRIDES[1] + left * STRIDES[2])[:, None]
    channels = corner + (k * STRIDES[3])[None, :]
    weights = w + (k * w_row)[:, None] + (n * w_column)[None, :]
    acc = tl.zeros([BM, BN], accumulator(x.dtype.element_ty))
    for k0 in range(first, end, BK):
        start = tl.full([], 0, tl.int32) + k0  # a tensor in the interpreter too
        if divides(BK, C):
            r, s, c = start // (WINDOW[1] * C), start // C % WINDOW[1], start % C
            moved = r * (DILATION[0] * STRIDES[1]) + s * (DILATION[1] * STRIDES[2]) + c * STRIDES[3]
            a_tile = patch(
                channels + tl.multiple_of(moved, aligned(BK, STRIDES)),
                (top + r * DILATION[0])[:, None], (left + s * DILATION[1])[:, None], None, SHAPE, PADDING,
            )  # fmt: skip
        else:
            each = start + k
            r, s, c = each // (WINDOW[1] * C), each // C % WINDOW[1], each % C
            a_tile = patch(
                corner + (r * (DILATION[0] * STRIDES[1]) + s * (DILATION[1] * STRIDES[2]) + c * STRIDES[3])[None, :],
                top[:, None] + (r * DILATION[0])[None, :], left[:, None] + (s * DILATION[1])[None, :],
                None if divides(BK, K) else (each < K)[None, :], SHAPE, PADDING,
            )  # fmt: skip
        b_at = weights + start * w_row
        if divides(BK, K) and divides(BN, N):
            b_tile = tl.load(b_at)
        else:
            b_tile = tl.load(b_at, mask=(start + k < K)[:, None] & (n < N)[None, :], other=0.0)
        acc = multiplied(a_tile, b_tile, acc, "promoted" if PROMOTE else "tf32")
    return acc


@triton.jit
def patch(at, h, v, more, SHAPE: tl.constexpr, PADDING: tl.constexpr):
    """The pixels (h, v) at addresses `at`, zero outside of the image and, if that is not None, where `more` is false."""
    if PADDING[0] == 0 and PADDING[1] == 0:
        if more is None:
            return tl.load(at)
        else:
            return tl.load(at, mask=more, other=0.0)
    else:
        inside = (h >= 0) & (h < SHAPE[1]) & (v >= 0) & (v < SHAPE[2])
        if more is None:
            return tl.load(at, mask=inside, other=0.0)
        else:
            return tl.load(at, mask=inside & more, other=0.0)
