"""Attention as kernels: what a printed entry calls for softmax(query @ key.T * scale + mask) @ value.

- `attend`: one program for each tile of BM query rows and each of SPLIT parts of the keys, over which it goes once with an
  online softmax (FlashAttention-2, Dao 2023). With SPLIT 1 it stores the result, else what its part gives.
- `join`: the result from those of the parts, in a fixed order (split-KV decoding).

A tile's rows are PACK query heads by some query positions: the heads of a group share their keys and values, and so one
position of a whole group still fills the tensor cores. Row m of all is position m // PACK of head m % PACK.

Shapes: query [B, H, S, E], key [B, G, T, E], value [B, G, T, EV], H = G * GROUP; the mask is broadcast to [B, H, S, T] by
strides of 0. Sizes and strides are literals in elements; offsets within a head, and within a batch's mask, are below 2**31.
Features are contiguous in the query, features or rows in key and value. Products and probabilities are summed in float32.

Query, key and value are of half types, or have fewer bits and `FACTORS` by which they are to be multiplied: keys and values
in 8 bits are widened to the query's type in registers, and with 8-bit floats throughout products are of these. Then the
probabilities, between 0 and 1, are multiplied by PROBABILITY before they are rounded; the sums that divide them are, too.

Scores that are not hidden but by the mask's minus infinity are as in eager: NaN in a row makes all of it NaN. A row hidden
throughout is zero, as from torch's own fused kernels.

`SCORES(product, y, x, head, extra)` makes scores of a float32 block of query @ key.T with row numbers y [BM, 1] and key
numbers x [1, BN], where `head` counts the heads of all batches (a number or, if tiles have several, [BM, 1]) and `extra` is
the entry's tuple of whatever it needs. It masks what it loads for rows from S and keys from T on. A row of such scores that
are all minus infinity is NaN, as in eager.
"""

# mypy: disable-error-code="no-untyped-def,no-untyped-call,misc,untyped-decorator"

from __future__ import annotations

import triton
import triton.language as tl

from fxopt.codegen.triton_helpers.memory import bring, elements_of_line

LOG2_E = tl.constexpr(1.4426950408889634)
PROBABILITY = tl.constexpr(8.0)
"""The power of two by which probabilities of 8-bit floats are multiplied: 256 is the largest that cannot overflow e4m3."""

NO_MASK, ONE_ROW, ROWS, FUNCTION = tl.constexpr(""), tl.constexpr("row"), tl.constexpr("rows"), tl.constexpr("function")
"""What else there is to scores: nothing; a mask of one row for all, or of one for each; `SCORES`, which makes them."""


@triton.jit
def block_of(
    rows, features, row, SIZE: tl.constexpr, BLOCK: tl.constexpr, visible, MASKED: tl.constexpr, STRIDE: tl.constexpr = 1
):  # fmt: skip
    """Rows [R, BLOCK] of SIZE features, zero beyond these and, if MASKED, where `visible` [R] says no."""
    pointers = rows + (row[:, None] + (features * STRIDE)[None, :])
    if MASKED and BLOCK != SIZE:
        return tl.load(pointers, mask=visible[:, None] & (features < SIZE)[None, :], other=0.0)
    elif MASKED:
        return tl.load(pointers, mask=visible[:, None], other=0.0)
    elif BLOCK != SIZE:
        return tl.load(pointers, mask=(features < SIZE)[None, :], other=0.0)
    else:
        return tl.load(pointers)


@triton.jit
def turned_block_of(rows, feature, row, held, RAGGED: tl.constexpr, visible, MASKED: tl.constexpr):
    """The same with rows as columns, [BLOCK, R], for memory in which rows are contiguous: `feature` are offsets, too, of
    which RAGGED says that not all are `held`.
    """
    pointers = rows + (feature[:, None] + row[None, :])
    if MASKED and RAGGED:
        return tl.load(pointers, mask=held[:, None] & visible[None, :], other=0.0)
    elif MASKED:
        return tl.load(pointers, mask=visible[None, :], other=0.0)
    elif RAGGED:
        return tl.load(pointers, mask=held[:, None], other=0.0)
    else:
        return tl.load(pointers)


@triton.jit
def addend_of(mask, at, inside, BOOLEAN: tl.constexpr, MASKED: tl.constexpr):
    """Mask elements at offsets `at` as float32 addends; 0 where MASKED and not `inside`."""
    if BOOLEAN:
        if MASKED:
            seen = tl.load(mask + at, mask=inside, other=1)
        else:
            seen = tl.load(mask + at)
        return tl.where(seen != 0, 0.0, float("-inf"))
    elif MASKED:
        return tl.load(mask + at, mask=inside, other=0.0).to(tl.float32)
    else:
        return tl.load(mask + at).to(tl.float32)


@triton.jit
def divisor_of(total, MASK: tl.constexpr):
    """What sums over values are divided by: not 0 for a row that a mask hides throughout."""
    if MASK == FUNCTION:
        return total
    else:
        return tl.where(total == 0.0, 1.0, total)


@triton.jit
def over_keys(
    acc, most, total, q, keys, values, mask, position, mask_row, head, extra, factor, key_factors, value_factors,
    first, end,
    S: tl.constexpr, T: tl.constexpr, key_row: tl.constexpr, key_feature: tl.constexpr, value_row: tl.constexpr,
    value_feature: tl.constexpr, key_factor_row: tl.constexpr, value_factor_row: tl.constexpr, mask_column: tl.constexpr,
    SCALE: tl.constexpr, CAUSAL: tl.constexpr, MASK: tl.constexpr, BOOLEAN: tl.constexpr, HIDDEN: tl.constexpr,
    EDGE: tl.constexpr, BN: tl.constexpr, E: tl.constexpr, EB: tl.constexpr, EV: tl.constexpr, EVB: tl.constexpr,
    PRECISION: tl.constexpr, SCORES: tl.constexpr, SCALED: tl.constexpr, KEY_FACTORS: tl.constexpr,
    VALUE_FACTORS: tl.constexpr,
):  # fmt: skip
    """(acc, most, total) after the keys from `first` to `end`: sums of exp(score - most) * value and of exp(score - most).

    `most` [BM], the greatest score so far, is in powers of two without a MASK (then SCALE > 0). EDGE: keys may lie past T
    or, if CAUSAL, past a row's `position`. HIDDEN: all keys so far may be hidden from a row.
    """
    features, values_features, n = tl.arange(0, EB), tl.arange(0, EVB), tl.arange(0, BN)
    for block in range(first, end, BN):
        column = tl.full([], 0, tl.int32) + block + n  # a tensor in the interpreter too
        inside = column < T
        if key_feature == 1:
            k = tl.trans(block_of(keys, features, column * key_row, E, EB, inside, EDGE))
        else:
            k = turned_block_of(keys, features * key_feature, column * key_row, features < E, EB != E, inside, EDGE)
        scores = tl.dot(q, k.to(q.dtype), input_precision=PRECISION)
        if KEY_FACTORS == "row":
            own = tl.load(key_factors + column * key_factor_row, mask=inside, other=0.0).to(tl.float32)
            scores = scores * (own * factor)[None, :]
        elif SCALED:
            scores = scores * factor
        if MASK == ROWS:
            at = mask_row[:, None] + (column * mask_column)[None, :]
            readable = inside[None, :] & (position < S)[:, None]
            scores = scores * SCALE + addend_of(mask, at, readable, BOOLEAN, True)
        elif MASK == ONE_ROW:
            scores = scores * SCALE + addend_of(mask, column * mask_column, inside, BOOLEAN, EDGE)[None, :]
        elif MASK == FUNCTION:
            scores = SCORES(scores, position[:, None], column[None, :], head, extra)
        if EDGE and CAUSAL:
            scores = tl.where(inside[None, :] & (column[None, :] <= position[:, None]), scores, float("-inf"))
        elif EDGE:
            scores = tl.where(inside[None, :], scores, float("-inf"))
        # A mask may be as low as the least float: then only differences may be multiplied.
        unit: tl.constexpr = SCALE * LOG2_E if MASK == NO_MASK else 1.0
        power: tl.constexpr = 1.0 if MASK == NO_MASK else LOG2_E
        higher = tl.maximum(most, tl.max(scores, 1) * unit)
        if HIDDEN:
            base = tl.where(higher == float("-inf"), 0.0, higher)
        else:
            base = higher
        narrow: tl.constexpr = q.dtype.is_fp8()
        if narrow:
            p = tl.exp2((scores * unit - base[:, None]) * power + PROBABILITY)
        else:
            p = tl.exp2((scores * unit - base[:, None]) * power)
        shrink = tl.exp2((most - base) * power)
        v = block_of(values, values_features, column * value_row, EV, EVB, inside, EDGE, value_feature)
        weights = p
        if VALUE_FACTORS == "row":
            of_values = tl.load(value_factors + column * value_factor_row, mask=inside, other=0.0).to(tl.float32)
            weights = p * of_values[None, :]
        acc = tl.dot(weights.to(q.dtype), v.to(q.dtype), acc * shrink[:, None], input_precision=PRECISION)
        total = total * shrink + tl.sum(p, 1)
        most = higher
    return acc, most, total


HIDDEN = tl.constexpr(-1e37)
"""Addends up to this one leave nothing of a score beside any that is above it: minus infinity, and what stands for it."""


@triton.jit
def end_of_shown(mask, STRIDE: tl.constexpr, T: tl.constexpr, BOOLEAN: tl.constexpr, BLOCK: tl.constexpr):
    """How many of the T keys there are up to the last one that a mask of one row shows; T if it shows none."""
    n = tl.arange(0, BLOCK)
    ends = tl.zeros([BLOCK], tl.int32)
    for first in range(0, T, BLOCK):
        column = tl.full([], 0, tl.int32) + first + n
        addend = addend_of(mask, column * STRIDE, column < T, BOOLEAN, True)
        ends = tl.where((column < T) & ~(addend <= HIDDEN), column + 1, ends)  # NaN is shown
    last = tl.max(ends, 0)
    return tl.where(last == 0, T, last)


MOST_BROUGHT = tl.constexpr(1024)
"""Rows of a part that are brought before it begins: the rest comes while these are computed with."""


@triton.jit
def bring_rows(rows, row, T: tl.constexpr, SIZE: tl.constexpr, first, EACH: tl.constexpr):
    """Bring the EACH rows of SIZE features from `first` on, those before T."""
    length: tl.constexpr = elements_of_line(rows.dtype.element_ty)
    lines: tl.constexpr = triton.next_power_of_2((SIZE + length - 1) // length)
    own = tl.minimum(first + tl.arange(0, triton.next_power_of_2(EACH)), T - 1)
    bring(rows + (own[:, None] * row + tl.minimum(tl.arange(0, lines) * length, SIZE - 1)[None, :]))


@triton.jit
def bring_part(
    key, value, H: tl.constexpr, S: tl.constexpr, T: tl.constexpr, E: tl.constexpr, EV: tl.constexpr,
    GROUP: tl.constexpr, KEY: tl.constexpr, VALUE: tl.constexpr,
    BM: tl.constexpr, BN: tl.constexpr, PACK: tl.constexpr, SPLIT: tl.constexpr,
):  # fmt: skip
    """Bring the keys and values of this program's part, as `attend` has them, while it waits for who writes some of them."""
    tiles: tl.constexpr = (S * PACK + BM - 1) // BM
    part, heads = tl.program_id(0) % SPLIT, tl.program_id(0) // (SPLIT * tiles)
    wide, group = (heads // (H // PACK)).to(tl.int64), (heads % (H // PACK) * PACK // GROUP).to(tl.int64)
    each: tl.constexpr = ((T + BN - 1) // BN + SPLIT - 1) // SPLIT * BN
    brought: tl.constexpr = MOST_BROUGHT if each > MOST_BROUGHT else each
    bring_rows(key + (wide * KEY[0] + group * KEY[1]), KEY[2], T, E, part * each, brought)
    bring_rows(value + (wide * VALUE[0] + group * VALUE[1]), VALUE[2], T, EV, part * each, brought)


@triton.jit
def attend(
    query, key, value, mask, out, statistics, extra, query_factor, key_factors, value_factors,
    H: tl.constexpr, S: tl.constexpr, T: tl.constexpr, E: tl.constexpr, EV: tl.constexpr, GROUP: tl.constexpr,
    QUERY: tl.constexpr, KEY: tl.constexpr, VALUE: tl.constexpr, MASK_STRIDES: tl.constexpr, OUT: tl.constexpr,
    SCALE: tl.constexpr, CAUSAL: tl.constexpr, MASK: tl.constexpr, BOOLEAN: tl.constexpr,
    BM: tl.constexpr, BN: tl.constexpr, EB: tl.constexpr, EVB: tl.constexpr, PACK: tl.constexpr, SPLIT: tl.constexpr,
    PRECISION: tl.constexpr, SCORES: tl.constexpr, FACTORS: tl.constexpr, BOUNDED: tl.constexpr,
):  # fmt: skip
    """The grid is B * (H / PACK) * cdiv(S * PACK, BM) * SPLIT programs.

    QUERY has strides of batch, head and row, the others of all four dimensions. A causal mask shows row i the keys
    up to i. MASK: see `NO_MASK`; BOOLEAN if it is true where a key is seen, else it is added. With SPLIT > 1,
    `out` is float32 [SPLIT, B * H * S, EV], the sums of the parts, and `statistics` float32 [2, SPLIT, B * H * S], their
    greatest scores and sums of exponentials.

    BOUNDED, of a mask of one row: keys past the last one that it shows are not read, and the parts are those of the others.

    FACTORS says of the query whether `query_factor` [] is what it is to be multiplied by, of key and value whether they have
    none (""), one for a head ("head") or one for each row of a head ("row"), and the strides (batch, head, row) of these.
    """
    tiles: tl.constexpr = (S * PACK + BM - 1) // BM
    part, tile = tl.program_id(0) % SPLIT, tiles - 1 - tl.program_id(0) // SPLIT % tiles  # the longest causal rows first
    heads = tl.program_id(0) // (SPLIT * tiles)
    batch, head = heads // (H // PACK), heads % (H // PACK) * PACK
    wide, group = batch.to(tl.int64), (head // GROUP).to(tl.int64)
    keys, values = key + (wide * KEY[0] + group * KEY[1]), value + (wide * VALUE[0] + group * VALUE[1])

    row = tile * BM + tl.arange(0, BM)
    position, own_head = row // PACK, head + row % PACK
    q_row = own_head.to(tl.int64) * QUERY[1] + position * QUERY[2]
    q = block_of(query + wide * QUERY[0], tl.arange(0, EB), q_row, E, EB, position < S, S * PACK % BM != 0)
    scaled: tl.constexpr = FACTORS[0] or FACTORS[1] != ""
    key_factors += wide * FACTORS[3][0] + group * FACTORS[3][1]
    value_factors += wide * FACTORS[4][0] + group * FACTORS[4][1]
    factor = tl.full([], 1.0, tl.float32)
    if FACTORS[0]:
        factor = tl.load(query_factor).to(tl.float32)
    if FACTORS[1] == "head":
        factor = factor * tl.load(key_factors).to(tl.float32)
    masks, mask_row = mask + wide * MASK_STRIDES[0], own_head * MASK_STRIDES[1] + position * MASK_STRIDES[2]

    if PACK == 1:
        number = heads
    else:
        number = (batch * H + own_head)[:, None]

    if BOUNDED:
        shown = end_of_shown(masks, MASK_STRIDES[3], T, BOOLEAN, 1024)
        last = tl.minimum((shown + BN - 1) // BN * BN, T)
    else:
        last = T
    each = ((last + BN - 1) // BN + SPLIT - 1) // SPLIT * BN
    first, end, whole = part * each, tl.minimum(part * each + each, last), tl.minimum(part * each + each, last // BN * BN)
    if CAUSAL:
        end = tl.minimum(end, (tile * BM + BM - 1) // PACK + 1)
        whole = tl.minimum(whole, (tile * BM // PACK + 1) // BN * BN)
    whole = tl.maximum(whole, first)

    most, total = tl.full([BM], float("-inf"), tl.float32), tl.zeros([BM], tl.float32)
    acc = tl.zeros([BM, EVB], tl.float32)
    hidden: tl.constexpr = MASK != NO_MASK or (CAUSAL and SPLIT > 1)
    acc, most, total = over_keys(
        acc, most, total, q, keys, values, masks, position, mask_row, number, extra, factor, key_factors, value_factors,
        first, whole,
        S, T, KEY[2], KEY[3], VALUE[2], VALUE[3], FACTORS[3][2], FACTORS[4][2], MASK_STRIDES[3],
        SCALE, CAUSAL, MASK, BOOLEAN, hidden, False, BN, E, EB, EV, EVB,
        PRECISION, SCORES, scaled, FACTORS[1], FACTORS[2],
    )  # fmt: skip
    if CAUSAL or T % BN != 0:
        acc, most, total = over_keys(
            acc, most, total, q, keys, values, masks, position, mask_row, number, extra, factor, key_factors,
            value_factors, whole, end,
            S, T, KEY[2], KEY[3], VALUE[2], VALUE[3], FACTORS[3][2], FACTORS[4][2], MASK_STRIDES[3],
            SCALE, CAUSAL, MASK, BOOLEAN, hidden, True, BN, E, EB, EV, EVB,
            PRECISION, SCORES, scaled, FACTORS[1], FACTORS[2],
        )  # fmt: skip

    if FACTORS[2] == "head":
        acc = acc * tl.load(value_factors).to(tl.float32)
    features = tl.arange(0, EVB)
    inside = (position < S)[:, None] & (features < EV)[None, :]
    if SPLIT == 1:
        acc = acc / divisor_of(total, MASK)[:, None]
        at = own_head.to(tl.int64) * OUT[1] + position * OUT[2]
        place = out + wide * OUT[0] + (at[:, None] + (features * OUT[3])[None, :])
        tl.store(place, acc.to(out.dtype.element_ty), mask=inside)
    else:
        count = tl.num_programs(0) // (SPLIT * tiles) * PACK * S
        at = (part * count + (batch * H + own_head) * S + position).to(tl.int64)
        tl.store(out + (at[:, None] * EV + features[None, :]), acc, mask=inside)
        tl.store(statistics + at, most, mask=position < S)
        tl.store(statistics + (SPLIT * count + at), total, mask=position < S)


@triton.jit
def join(
    parts, statistics, out, H: tl.constexpr, S: tl.constexpr, EV: tl.constexpr, OUT: tl.constexpr, MASK: tl.constexpr,
    SPLIT: tl.constexpr, PARTS: tl.constexpr, EVB: tl.constexpr,
):  # fmt: skip
    """The result from the SPLIT parts that `attend` has stored; one program for each of B * H * S rows. PARTS and EVB are
    powers of two that hold SPLIT and EV.
    """
    row, count = tl.program_id(0), tl.num_programs(0)
    features, part = tl.arange(0, EVB), tl.arange(0, PARTS)
    at = part * count.to(tl.int64) + row
    highest = tl.load(statistics + at, mask=part < SPLIT, other=float("-inf"))
    totals = tl.load(statistics + (SPLIT * count + at), mask=part < SPLIT, other=0.0)
    most = tl.max(highest, 0)
    power: tl.constexpr = 1.0 if MASK == NO_MASK else LOG2_E
    weights = tl.exp2((highest - tl.where(most == float("-inf"), 0.0, most)) * power)
    inside = (part < SPLIT)[:, None] & (features < EV)[None, :]
    sums = tl.load(parts + (at[:, None] * EV + features[None, :]), mask=inside, other=0.0)
    total = tl.sum(totals * weights, 0)
    value = tl.sum(sums * weights[:, None], 0) / divisor_of(total, MASK)
    batch, head, position = row // (H * S), row // S % H, row % S
    place = out + (batch.to(tl.int64) * OUT[0] + head.to(tl.int64) * OUT[1] + position.to(tl.int64) * OUT[2])
    tl.store(place + features * OUT[3], value.to(out.dtype.element_ty), mask=features < EV)
