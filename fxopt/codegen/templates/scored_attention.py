"""Attention in training, as kernels: what printed entries call for the ops of `ir/scored_attention_op.py`.

That file says what is computed. As in FlashAttention-2 (Dao 2023), nothing of the size of the scores is stored.
Nothing is added up by atomics.

- `forward`: one program for each tile of BM rows of a head, over the keys with an online softmax.
- `query_gradient`: one for each tile of BM rows, over the keys.
- `key_value_gradients`: one for each tile of BN keys, over the rows of all heads of a group.
- `bias_gradient`: one for each tile of scores and part, over the part's batches (and heads, which a bias may share).

All make the scores anew, with `scores_of`. Blocks that lie outside of the band are not visited.

Shapes: query [B, H, S, E], key [B, H / GROUP, T, E], value [B, H / GROUP, T, EV]; statistics [B, H, S]. Sizes and strides
are in elements, literals or, where they are known only at run time, int64; with literal S and T offsets within a head are
below 2**31. Batch n reads batch n % BIASES of the bias, n % MASKS of the mask. EB and EVB are powers of two that hold E and
EV. RAGGED_ROWS and RAGGED_KEYS say that blocks of BM rows and BN keys may end past S and T. Of the band's ends LEAST hides
keys with LOW only, MOST with HIGH.
"""

# mypy: disable-error-code="no-untyped-def,no-untyped-call,misc,untyped-decorator"

from __future__ import annotations

import triton
import triton.language as tl

LOG2_E = tl.constexpr(1.4426950408889634)
NO_MASK, ADDED, BOOLEAN = tl.constexpr(""), tl.constexpr("added"), tl.constexpr("boolean")


@triton.jit
def rows_of(base, row, ROW, FEATURE, LIMIT, SIZE: tl.constexpr,
            RAGGED: tl.constexpr, BLOCK: tl.constexpr):  # fmt: skip
    """Rows [R, BLOCK] of SIZE features, zero beyond these and, if RAGGED, from row LIMIT on."""
    features = tl.arange(0, BLOCK)
    pointers = base + ((row * ROW)[:, None] + (features * FEATURE)[None, :])
    if RAGGED and BLOCK != SIZE:
        return tl.load(pointers, mask=(row < LIMIT)[:, None] & (features < SIZE)[None, :], other=0.0)
    elif RAGGED:
        return tl.load(pointers, mask=(row < LIMIT)[:, None], other=0.0)
    elif BLOCK != SIZE:
        return tl.load(pointers, mask=(features < SIZE)[None, :], other=0.0)
    else:
        return tl.load(pointers)


@triton.jit
def store_rows(base, value, row, ROW, FEATURE, LIMIT, SIZE: tl.constexpr,
               BLOCK: tl.constexpr):  # fmt: skip
    features = tl.arange(0, BLOCK)
    pointers = base + ((row * ROW)[:, None] + (features * FEATURE)[None, :])
    inside = (row < LIMIT)[:, None] & (features < SIZE)[None, :]
    tl.store(pointers, value.to(base.dtype.element_ty), mask=inside)


@triton.jit
def head_of(base, batch, head, STRIDES):
    """Where a head's elements begin."""
    return base + (batch.to(tl.int64) * STRIDES[0] + head.to(tl.int64) * STRIDES[1])


@triton.jit
def at_scores(base, y, x, S, T, STRIDES, ROWS: tl.constexpr, other):
    """Elements for rows `y` and keys `x`, which broadcast to a block; `other` where there are no such scores. Without ROWS
    all rows have the same."""
    if not ROWS:
        return tl.load(base + x * STRIDES[3], mask=x < T, other=other)
    else:
        return tl.load(base + (y * STRIDES[2] + x * STRIDES[3]), mask=(y < S) & (x < T), other=other)


@triton.jit
def tanh(x):
    """Off by 1e-7, for results that are rounded to half precision."""
    return 1.0 - 2.0 / (1.0 + tl.exp(x * 2.0))


@triton.jit
def scores_of(
    product, y, x, bias, mask, S, T, HAS_BIAS: tl.constexpr, BIAS,
    KIND: tl.constexpr, ROWS: tl.constexpr, MASK, SCALE: tl.constexpr, CAP: tl.constexpr, FILL: tl.constexpr,
    LOW: tl.constexpr, LEAST: tl.constexpr, HIGH: tl.constexpr, MOST: tl.constexpr, RAGGED: tl.constexpr,
):  # fmt: skip
    """For rows `y` and keys `x`: (scores, their derivative with respect to `product`, where a boolean mask kept them).

    The second is meant if CAP is not 0, else it is SCALE; the third if KIND is BOOLEAN. RAGGED: keys may lie past T, which
    are hidden.
    """
    scores = product * SCALE
    slope = scores
    if CAP != 0.0:
        bent = tanh(scores)
        scores = bent * CAP
        slope = (1.0 - bent * bent) * (CAP * SCALE)
    if HAS_BIAS:
        scores += at_scores(bias, y, x, S, T, BIAS, ROWS[0], 0.0).to(tl.float32)
    kept = x < T
    if KIND == BOOLEAN:
        kept = at_scores(mask, y, x, S, T, MASK, ROWS[1], 1) != 0
        scores = tl.where(kept, scores, FILL)
    elif KIND == ADDED:
        scores += at_scores(mask, y, x, S, T, MASK, ROWS[1], 0.0).to(tl.float32)
    away = x.to(tl.int32) - y.to(tl.int32)
    if LOW:
        scores = tl.where(away >= LEAST, scores, float("-inf"))
    if HIGH:
        scores = tl.where(away <= MOST, scores, float("-inf"))
    if RAGGED:
        scores = tl.where(x < T, scores, float("-inf"))
    return scores, slope, kept


@triton.jit
def mixed(x):
    """`_mixed` of scored_attention_op.py, of uint32."""
    x = (x ^ (x >> 16)) * 0x7FEB352D
    x = (x ^ (x >> 15)) * 0x846CA68B
    return x ^ (x >> 16)


@triton.jit
def words_of(seed, number, DROP: tl.constexpr):
    """Two words of Philox for head `number`, with the seed at `seed`; two zeros if nothing is dropped."""
    counter = number.to(tl.uint32)
    zero = counter * 0
    if DROP[0] == 0:
        return zero, zero
    else:
        first, second, _, _ = tl.philox(tl.load(seed), counter, zero, zero, zero)
        return first, second


@triton.jit
def dropped(value, y, x, words, DROP: tl.constexpr):
    """`value`, of rows `y` and keys `x`, after dropout, but for its factor 1 / (1 - p).

    DROP is (`dropped_below`, that factor); the first is 0 if nothing is dropped.
    """
    if DROP[0] == 0:
        return value
    else:
        bits = mixed(mixed(y.to(tl.uint32) ^ words[0]) ^ mixed(x.to(tl.uint32) ^ words[1]))
        return tl.where(bits >= DROP[0], value, 0.0)


@triton.jit
def slopes_of(p, of_p, total, kept, KIND: tl.constexpr):
    """The gradient of the scores before they are filled, from probabilities and their gradient."""
    of_scores = p * (of_p - total)
    if KIND == BOOLEAN:
        of_scores = tl.where(kept, of_scores, 0.0)
    return of_scores


@triton.jit
def of_product(of_scores, slope, SCALE: tl.constexpr, CAP: tl.constexpr):
    if CAP != 0.0:
        return of_scores * slope
    else:
        return of_scores * SCALE


@triton.jit
def forward(
    query, key, value, bias, mask, seed, out, unrounded, most_of, inverse_of,
    H: tl.constexpr, S, T, E: tl.constexpr, EV: tl.constexpr, GROUP: tl.constexpr,
    QUERY, KEY, VALUE, OUT, UNROUNDED,
    MOST_OF, INVERSE_OF,
    HAS_BIAS: tl.constexpr, BIAS, BIASES, KIND: tl.constexpr, ROWS: tl.constexpr,
    MASK, MASKS, SCALE: tl.constexpr, CAP: tl.constexpr, FILL: tl.constexpr,
    LOW: tl.constexpr, LEAST: tl.constexpr, HIGH: tl.constexpr, MOST: tl.constexpr, DROP: tl.constexpr,
    RAGGED_ROWS: tl.constexpr, RAGGED_KEYS: tl.constexpr,
    BM: tl.constexpr, BN: tl.constexpr, EB: tl.constexpr, EVB: tl.constexpr,
):  # fmt: skip
    """The result, the same in float32, and each row's greatest score and inverse sum.

    The sum is that of probabilities as they are multiplied, rounded: so a result is a mean of values.
    """
    tiles = (S + BM - 1) // BM
    tile, heads = tiles - 1 - tl.program_id(0) % tiles, tl.program_id(0) // tiles  # long ones of a causal mask first
    batch, head = heads // H, heads % H
    row = tile * BM + tl.arange(0, BM)
    keys, values = head_of(key, batch, head // GROUP, KEY), head_of(value, batch, head // GROUP, VALUE)
    biases, masks = head_of(bias, batch % BIASES, head, BIAS), head_of(mask, batch % MASKS, head, MASK)
    q = rows_of(head_of(query, batch, head, QUERY), row, QUERY[2], QUERY[3], S, E, RAGGED_ROWS, EB)

    first, end = 0, T
    if LOW:
        first = tl.minimum(tl.maximum(tile * BM + LEAST, 0) // BN * BN, T)
    if HIGH:
        end = tl.maximum(tl.minimum(tl.minimum(tile * BM + BM, S) + MOST, T), 0)
    words = words_of(seed, heads, DROP)
    most, sums = tl.full([BM], float("-inf"), tl.float32), tl.zeros([BM], tl.float32)
    acc = tl.zeros([BM, EVB], tl.float32)
    for block in range(first, end, BN):
        column = block + tl.arange(0, BN)
        k = rows_of(keys, column, KEY[2], KEY[3], T, E, RAGGED_KEYS, EB)
        scores, _, _ = scores_of(
            tl.dot(q, tl.trans(k), input_precision="ieee"), row[:, None], column[None, :], biases, masks, S, T, HAS_BIAS,
            BIAS, KIND, ROWS, MASK, SCALE, CAP, FILL, LOW, LEAST, HIGH, MOST, RAGGED_KEYS,
        )  # fmt: skip
        higher = tl.maximum(most, tl.max(scores, 1))
        base = tl.where(higher == float("-inf"), 0.0, higher)
        p, shrink = tl.exp2((scores - base[:, None]) * LOG2_E), tl.exp2((most - base) * LOG2_E)
        v = rows_of(values, column, VALUE[2], VALUE[3], T, EV, RAGGED_KEYS, EVB)
        weights = p.to(v.dtype)
        sums = sums * shrink + tl.sum(weights.to(tl.float32), 1)
        weights = dropped(weights, row[:, None], column[None, :], words, DROP)
        acc = tl.dot(weights, v, acc * shrink[:, None], input_precision="ieee")
        most = higher

    inverse = 1.0 / sums
    exact = acc * (inverse * DROP[1])[:, None]
    store_rows(head_of(out, batch, head, OUT), exact, row, OUT[2], OUT[3], S, EV, EVB)
    store_rows(head_of(unrounded, batch, head, UNROUNDED), exact, row, UNROUNDED[2], UNROUNDED[3], S, EV, EVB)
    tl.store(head_of(most_of, batch, head, MOST_OF) + row * MOST_OF[2], most, mask=row < S)
    tl.store(head_of(inverse_of, batch, head, INVERSE_OF) + row * INVERSE_OF[2], inverse, mask=row < S)


@triton.jit
def query_gradient(
    grad, query, key, value, bias, mask, most_of, inverse_of, total_of, seed, out,
    H: tl.constexpr, S, T, E: tl.constexpr, EV: tl.constexpr, GROUP: tl.constexpr,
    GRAD, QUERY, KEY, VALUE, MOST_OF,
    INVERSE_OF, TOTAL_OF, OUT,
    HAS_BIAS: tl.constexpr, BIAS, BIASES, KIND: tl.constexpr, ROWS: tl.constexpr,
    MASK, MASKS, SCALE: tl.constexpr, CAP: tl.constexpr, FILL: tl.constexpr,
    LOW: tl.constexpr, LEAST: tl.constexpr, HIGH: tl.constexpr, MOST: tl.constexpr, DROP: tl.constexpr,
    RAGGED_ROWS: tl.constexpr, RAGGED_KEYS: tl.constexpr,
    BM: tl.constexpr, BN: tl.constexpr, EB: tl.constexpr, EVB: tl.constexpr,
):  # fmt: skip
    """The gradient of the query [B, H, S, E]."""
    tiles = (S + BM - 1) // BM
    tile, heads = tiles - 1 - tl.program_id(0) % tiles, tl.program_id(0) // tiles
    batch, head = heads // H, heads % H
    row = tile * BM + tl.arange(0, BM)
    keys, values = head_of(key, batch, head // GROUP, KEY), head_of(value, batch, head // GROUP, VALUE)
    biases, masks = head_of(bias, batch % BIASES, head, BIAS), head_of(mask, batch % MASKS, head, MASK)
    q = rows_of(head_of(query, batch, head, QUERY), row, QUERY[2], QUERY[3], S, E, RAGGED_ROWS, EB)
    g = rows_of(head_of(grad, batch, head, GRAD), row, GRAD[2], GRAD[3], S, EV, RAGGED_ROWS, EVB)
    most = tl.load(head_of(most_of, batch, head, MOST_OF) + row * MOST_OF[2], mask=row < S, other=0.0)
    inverse = tl.load(head_of(inverse_of, batch, head, INVERSE_OF) + row * INVERSE_OF[2], mask=row < S, other=0.0)
    total = tl.load(head_of(total_of, batch, head, TOTAL_OF) + row * TOTAL_OF[2], mask=row < S, other=0.0)

    first, end = 0, T
    if LOW:
        first = tl.minimum(tl.maximum(tile * BM + LEAST, 0) // BN * BN, T)
    if HIGH:
        end = tl.maximum(tl.minimum(tl.minimum(tile * BM + BM, S) + MOST, T), 0)
    words = words_of(seed, heads, DROP)
    acc = tl.zeros([BM, EB], tl.float32)
    for block in range(first, end, BN):
        column = block + tl.arange(0, BN)
        k = rows_of(keys, column, KEY[2], KEY[3], T, E, RAGGED_KEYS, EB)
        v = rows_of(values, column, VALUE[2], VALUE[3], T, EV, RAGGED_KEYS, EVB)
        scores, slope, kept = scores_of(
            tl.dot(q, tl.trans(k), input_precision="ieee"), row[:, None], column[None, :], biases, masks, S, T, HAS_BIAS,
            BIAS, KIND, ROWS, MASK, SCALE, CAP, FILL, LOW, LEAST, HIGH, MOST, RAGGED_KEYS,
        )  # fmt: skip
        p = tl.exp2((scores - most[:, None]) * LOG2_E) * inverse[:, None]
        of_p = dropped(tl.dot(g, tl.trans(v), input_precision="ieee") * DROP[1], row[:, None], column[None, :], words, DROP)
        of_scores = slopes_of(p, of_p, total[:, None], kept, KIND)
        if RAGGED_KEYS:  # of a row hidden throughout they are NaN there, too
            of_scores = tl.where((column < T)[None, :], of_scores, 0.0)
        acc = tl.dot(of_product(of_scores, slope, SCALE, CAP).to(k.dtype), k, acc, input_precision="ieee")
    store_rows(head_of(out, batch, head, OUT), acc, row, OUT[2], OUT[3], S, E, EB)


@triton.jit
def over_rows(
    of_key, of_value, k, v, column, queries, grads, mosts, inverses, totals, biases, masks, words, first, end,
    S, T, E: tl.constexpr, EV: tl.constexpr,
    GRAD, QUERY, MOST_OF, INVERSE_OF, TOTAL_OF,
    HAS_BIAS: tl.constexpr, BIAS, KIND: tl.constexpr, ROWS: tl.constexpr, MASK,
    SCALE: tl.constexpr, CAP: tl.constexpr, FILL: tl.constexpr, LOW: tl.constexpr, LEAST: tl.constexpr,
    HIGH: tl.constexpr, MOST: tl.constexpr, DROP: tl.constexpr, RAGGED_ROWS: tl.constexpr, RAGGED_KEYS: tl.constexpr,
    BM: tl.constexpr, BN: tl.constexpr, EB: tl.constexpr, EVB: tl.constexpr,
):  # fmt: skip
    """(of_key, of_value) after the rows from `first` to `end` of one head."""
    for block in range(first, end, BM):
        row = block + tl.arange(0, BM)
        q = rows_of(queries, row, QUERY[2], QUERY[3], S, E, RAGGED_ROWS, EB)
        g = rows_of(grads, row, GRAD[2], GRAD[3], S, EV, RAGGED_ROWS, EVB)
        most = tl.load(mosts + row * MOST_OF[2], mask=row < S, other=0.0)
        inverse = tl.load(inverses + row * INVERSE_OF[2], mask=row < S, other=0.0)
        total = tl.load(totals + row * TOTAL_OF[2], mask=row < S, other=0.0)
        scores, slope, kept = scores_of(
            tl.dot(k, tl.trans(q), input_precision="ieee"), row[None, :], column[:, None], biases, masks, S, T, HAS_BIAS,
            BIAS, KIND, ROWS, MASK, SCALE, CAP, FILL, LOW, LEAST, HIGH, MOST, RAGGED_KEYS,
        )  # fmt: skip
        p = tl.exp2((scores - most[None, :]) * LOG2_E) * inverse[None, :]
        weights = dropped(p * DROP[1], row[None, :], column[:, None], words, DROP)
        of_value = tl.dot(weights.to(g.dtype), g, of_value, input_precision="ieee")
        of_p = dropped(tl.dot(v, tl.trans(g), input_precision="ieee") * DROP[1], row[None, :], column[:, None], words, DROP)
        of_scores = slopes_of(p, of_p, total[None, :], kept, KIND)
        of_key = tl.dot(of_product(of_scores, slope, SCALE, CAP).to(q.dtype), q, of_key, input_precision="ieee")
    return of_key, of_value


@triton.jit
def key_value_gradients(
    grad, query, key, value, bias, mask, most_of, inverse_of, total_of, seed, out_key, out_value,
    H: tl.constexpr, S, T, E: tl.constexpr, EV: tl.constexpr, GROUP: tl.constexpr,
    GRAD, QUERY, KEY, VALUE, MOST_OF,
    INVERSE_OF, TOTAL_OF, OUT_KEY, OUT_VALUE,
    HAS_BIAS: tl.constexpr, BIAS, BIASES, KIND: tl.constexpr, ROWS: tl.constexpr,
    MASK, MASKS, SCALE: tl.constexpr, CAP: tl.constexpr, FILL: tl.constexpr,
    LOW: tl.constexpr, LEAST: tl.constexpr, HIGH: tl.constexpr, MOST: tl.constexpr, DROP: tl.constexpr,
    RAGGED_ROWS: tl.constexpr, RAGGED_KEYS: tl.constexpr,
    BM: tl.constexpr, BN: tl.constexpr, EB: tl.constexpr, EVB: tl.constexpr,
):  # fmt: skip
    """The gradients of key [B, H / GROUP, T, E] and value [B, H / GROUP, T, EV]."""
    tiles = (T + BN - 1) // BN
    tile, groups = tl.program_id(0) % tiles, tl.program_id(0) // tiles
    batch, group = groups // (H // GROUP), groups % (H // GROUP)
    column = tile * BN + tl.arange(0, BN)
    k = rows_of(head_of(key, batch, group, KEY), column, KEY[2], KEY[3], T, E, RAGGED_KEYS, EB)
    v = rows_of(head_of(value, batch, group, VALUE), column, VALUE[2], VALUE[3], T, EV, RAGGED_KEYS, EVB)

    first, end = 0, S
    if HIGH:
        first = tl.minimum(tl.maximum(tile * BN - MOST, 0) // BM * BM, S)
    if LOW:
        end = tl.maximum(tl.minimum(tl.minimum(tile * BN + BN, T) - LEAST, S), 0)
    of_key, of_value = tl.zeros([BN, EB], tl.float32), tl.zeros([BN, EVB], tl.float32)
    for member in range(GROUP):
        head = group * GROUP + member
        of_key, of_value = over_rows(
            of_key, of_value, k, v, column, head_of(query, batch, head, QUERY), head_of(grad, batch, head, GRAD),
            head_of(most_of, batch, head, MOST_OF), head_of(inverse_of, batch, head, INVERSE_OF),
            head_of(total_of, batch, head, TOTAL_OF), head_of(bias, batch % BIASES, head, BIAS),
            head_of(mask, batch % MASKS, head, MASK), words_of(seed, batch * H + head, DROP), first, end,
            S, T, E, EV, GRAD, QUERY, MOST_OF, INVERSE_OF, TOTAL_OF, HAS_BIAS, BIAS, KIND, ROWS, MASK, SCALE, CAP, FILL, LOW,
            LEAST, HIGH, MOST, DROP, RAGGED_ROWS, RAGGED_KEYS, BM, BN, EB, EVB,
        )  # fmt: skip
    store_rows(head_of(out_key, batch, group, OUT_KEY), of_key, column, OUT_KEY[2], OUT_KEY[3], T, E, EB)
    store_rows(head_of(out_value, batch, group, OUT_VALUE), of_value, column, OUT_VALUE[2], OUT_VALUE[3], T, EV, EVB)


@triton.jit
def bias_gradient(
    grad, query, key, value, bias, mask, most_of, inverse_of, total_of, seed, out,
    H: tl.constexpr, S, T, E: tl.constexpr, EV: tl.constexpr, GROUP: tl.constexpr,
    GRAD, QUERY, KEY, VALUE, MOST_OF,
    INVERSE_OF, TOTAL_OF, OUT,
    HAS_BIAS: tl.constexpr, BIAS, BIASES, KIND: tl.constexpr, ROWS: tl.constexpr,
    MASK, MASKS, SCALE: tl.constexpr, CAP: tl.constexpr, FILL: tl.constexpr,
    LOW: tl.constexpr, LEAST: tl.constexpr, HIGH: tl.constexpr, MOST: tl.constexpr, DROP: tl.constexpr,
    RAGGED_ROWS: tl.constexpr, RAGGED_KEYS: tl.constexpr,
    BM: tl.constexpr, BN: tl.constexpr, EB: tl.constexpr, EVB: tl.constexpr,
    REPEATS, BIAS_HEADS: tl.constexpr, PARTS,
):  # fmt: skip
    """Summands [PARTS, BIASES, BIAS_HEADS, S, T] of the bias's gradient, dense; BIAS_HEADS is H, or 1 for a bias that heads
    share, and REPEATS how many batches share each."""
    tiles = (T + BN - 1) // BN
    lines = (S + BM - 1) // BM
    tile, rest = tl.program_id(0) % tiles, tl.program_id(0) // tiles
    line, rest = rest % lines, rest // lines
    bias_head, rest = rest % BIAS_HEADS, rest // BIAS_HEADS
    number, part = rest % BIASES, rest // BIASES
    row, column = line * BM + tl.arange(0, BM), tile * BN + tl.arange(0, BN)

    count = REPEATS * (H // BIAS_HEADS)
    each = (count + PARTS - 1) // PARTS
    first, end = part * each, tl.minimum(part * each + each, count)
    if LOW:
        end = tl.where(tile * BN + BN - 1 - line * BM < LEAST, first, end)
    if HIGH:
        end = tl.where(tile * BN - (line * BM + BM - 1) > MOST, first, end)
    acc = tl.zeros([BM, BN], tl.float32)
    for turn in range(first, end):
        batch, head = number + turn % REPEATS * BIASES, bias_head + turn // REPEATS
        q = rows_of(head_of(query, batch, head, QUERY), row, QUERY[2], QUERY[3], S, E, RAGGED_ROWS, EB)
        k = rows_of(head_of(key, batch, head // GROUP, KEY), column, KEY[2], KEY[3], T, E, RAGGED_KEYS, EB)
        g = rows_of(head_of(grad, batch, head, GRAD), row, GRAD[2], GRAD[3], S, EV, RAGGED_ROWS, EVB)
        v = rows_of(head_of(value, batch, head // GROUP, VALUE), column, VALUE[2], VALUE[3], T, EV, RAGGED_KEYS, EVB)
        most = tl.load(head_of(most_of, batch, head, MOST_OF) + row * MOST_OF[2], mask=row < S, other=0.0)
        inverse = tl.load(head_of(inverse_of, batch, head, INVERSE_OF) + row * INVERSE_OF[2], mask=row < S, other=0.0)
        total = tl.load(head_of(total_of, batch, head, TOTAL_OF) + row * TOTAL_OF[2], mask=row < S, other=0.0)
        scores, _, kept = scores_of(
            tl.dot(q, tl.trans(k), input_precision="ieee"), row[:, None], column[None, :], head_of(bias, number, head, BIAS),
            head_of(mask, batch % MASKS, head, MASK), S, T, HAS_BIAS, BIAS, KIND, ROWS, MASK, SCALE, CAP, FILL, LOW, LEAST,
            HIGH, MOST, RAGGED_KEYS,
        )  # fmt: skip
        p = tl.exp2((scores - most[:, None]) * LOG2_E) * inverse[:, None]
        words = words_of(seed, batch * H + head, DROP)
        of_p = dropped(tl.dot(g, tl.trans(v), input_precision="ieee") * DROP[1], row[:, None], column[None, :], words, DROP)
        acc += slopes_of(p, of_p, total[:, None], kept, KIND)
    place = ((part * BIASES + number) * BIAS_HEADS + bias_head).to(tl.int64) * (S * T)
    inside = (row < S)[:, None] & (column < T)[None, :]
    tl.store(out + place + ((row * T)[:, None] + column[None, :]), acc, mask=inside)
