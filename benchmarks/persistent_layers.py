"""All layers of a Llama's decoding step as one kernel whose programs stay, for `benchmarks.persistent_decode`.

Five phases a layer, with a barrier before each: norm and queries, keys and values; attention (rotary embedding, the cache's
new place, and the join of its parts by the last program of each head); its output with the residual; norm, gate and up;
down with the residual. A program has the same rows of each weight whatever comes, so it loads the first block of them before
it waits at the barrier, and has those of the next phase brought into the L2 cache meanwhile.

Weights lie as fxopt has them: bfloat16 or int8 [L, N, K], or two 4-bit values a byte [L, N, K / 2] (`ir/quantized_ops.py`),
scales float32 [L, N] or [L, N, K / GROUP]. All programs have to run at once: one for each multiprocessor, or few.
"""

# mypy: disable-error-code="no-untyped-def,no-untyped-call,misc,untyped-decorator"

from __future__ import annotations

import triton
import triton.language as tl

from benchmarks.bulk import bring_bytes
from fxopt.codegen.templates.weight_gemm import ZERO_WITH_128, widened, with_128
from fxopt.codegen.triton_helpers.interpreter import INTERPRETED

PHASES = 5
PLAIN, RESIDUAL, GATED = tl.constexpr(0), tl.constexpr(1), tl.constexpr(2)
"""What is done to a product: nothing, another row is added, or its first rows gate its last."""

ALL_HAVE_COME = tl.constexpr("""{ .reg .pred waits; .reg .b32 thread, seen;
    mov.u32 thread, %tid.x;
    mov.u32 $0, 0;
    setp.ne.u32 waits, thread, 0;
    @waits bra PASSED;
    atom.add.release.gpu.global.u32 seen, [$1], 1;
    AGAIN: ld.acquire.gpu.global.u32 seen, [$1];
    setp.lt.u32 waits, seen, $2;
    @waits bra AGAIN;
    PASSED: }""")
"""One thread counts its program in the word at $1, and waits until that is $2."""


@triton.jit
def barrier(arrivals, wanted):
    """Wait until `arrivals` (an int32) has counted `wanted` programs; what they stored before can then be seen.

    In the interpreter, whose programs run in turn, each phase is a launch of its own.
    """
    if not INTERPRETED:
        tl.debug_barrier()
        tl.inline_asm_elementwise(
            ALL_HAVE_COME, "=r,l,r", [arrivals.to(tl.int64), wanted], dtype=tl.int32, is_pure=False, pack=1
        )
        tl.debug_barrier()


@triton.jit
def bring(w, nbytes):
    """Begin to load `nbytes`, a multiple of 16 below 2**20, from pointer w on into the L2 cache."""
    bring_bytes(w.to(tl.int64), nbytes)


@triton.constexpr_function
def row_bytes(k, bits):
    """Of a weight."""
    return k * bits // 8


@triton.constexpr_function
def loads_of(k, bits):
    """(elements or bytes of a row that a thread loads at a time: 16 bytes; threads that share a row; loads of each)."""
    loads = k * bits // 8 // 16
    threads = max(1, min(256, loads // 2))
    return 8 if bits == 16 else 16, threads, loads // threads


@triton.jit
def share(N, BN: tl.constexpr):
    """(first, end) of the blocks of BN rows, of N, that this program has; it has one at least."""
    blocks, program, programs = N // BN, tl.program_id(0), tl.num_programs(0)
    return blocks * program // programs, blocks * (program + 1) // programs


@triton.jit
def rows_at(block, N, BN: tl.constexpr, KIND: tl.constexpr):
    """Rows of the weight in a block; of a gated one BN / 2 of each half."""
    k = tl.arange(0, BN)
    half: tl.constexpr = BN // 2
    if KIND == GATED:
        return block * half + k % half + (k // half) * N
    else:
        return block * BN + k


@triton.jit
def places(K: tl.constexpr, BITS: tl.constexpr):
    """Where each thread begins to load in each of its steps [PARTS, STEPS], and what it loads [PARTS, STEPS, PART]."""
    PART: tl.constexpr = loads_of(K, BITS)[0]
    PARTS: tl.constexpr = loads_of(K, BITS)[1]
    STEPS: tl.constexpr = loads_of(K, BITS)[2]
    at = (tl.arange(0, STEPS)[None, :] * PARTS + tl.arange(0, PARTS)[:, None]) * PART
    return at, at[:, :, None] + tl.arange(0, PART)[None, None, :]


@triton.jit
def block_of(w, scale, n, K: tl.constexpr, BITS: tl.constexpr, GROUP: tl.constexpr):
    """Rows n of the weight [PARTS, BN, STEPS, PART], and their scales: of 8 bits [BN], of 4 bits [PARTS, BN, STEPS] of each
    half."""
    row: tl.constexpr = K // 2 if BITS == 4 else K
    at, k = places(K, BITS)
    weights = tl.load(w + (n[None, :, None, None].to(tl.int64) * row + k[:, None, :, :]))
    if BITS == 4:
        scales = scale + n[None, :, None] * (K // GROUP)
        return weights, tl.load(scales + at[:, None, :] // GROUP), tl.load(scales + (row + at[:, None, :]) // GROUP)
    elif BITS == 8:
        return weights, tl.load(scale + n), 0.0
    else:
        return weights, 0.0, 0.0


@triton.jit
def sums_of(low, high, block, BITS: tl.constexpr):
    """The row times a block, float32 [BN]. Of 4 bits low and high [PARTS, STEPS, PART] are its halves, else low is all."""
    weights, scale, other_scale = block
    if BITS == 4:
        w_low, w_high = with_128(weights)
        one = tl.sum(w_low * low[:, None, :, :], 3) - ZERO_WITH_128 * tl.sum(low, 2)[:, None, :]
        other = tl.sum(w_high * high[:, None, :, :], 3) - ZERO_WITH_128 * tl.sum(high, 2)[:, None, :]
        return tl.sum(tl.sum(one * scale + other * other_scale, 2), 0)
    else:
        sums = tl.sum(tl.sum(tl.sum(widened(weights, tl.float32) * low[:, None, :, :], 3), 2), 0)
        return sums * scale if BITS == 8 else sums


@triton.jit
def finish(sums, block, out, residual, N, BN: tl.constexpr, KIND: tl.constexpr):
    """Store what is made of a block's sums, bfloat16."""
    if KIND == GATED:
        half: tl.constexpr = BN // 2
        gate, up = tl.split(tl.permute(tl.reshape(sums, [2, half]), (1, 0)))
        gate = gate.to(tl.bfloat16).to(tl.float32)
        gate = (gate / (1 + tl.exp(-gate))).to(tl.bfloat16).to(tl.float32)
        value = gate * up.to(tl.bfloat16).to(tl.float32)
        tl.store(out + block * half + tl.arange(0, half), value.to(tl.bfloat16))
    else:
        n = block * BN + tl.arange(0, BN)
        value = sums.to(tl.bfloat16)
        if KIND == RESIDUAL:
            value = (value.to(tl.float32) + tl.load(residual + n).to(tl.float32)).to(tl.bfloat16)
        tl.store(out + n, value)


@triton.jit
def row_of(x, K: tl.constexpr, BITS: tl.constexpr):
    """The row x as `sums_of` wants it, float32."""
    _, k = places(K, BITS)
    low = tl.load(x + k).to(tl.float32)
    if BITS == 4:
        return low, tl.load(x + K // 2 + k).to(tl.float32)
    else:
        return low, low


@triton.jit
def total_of(values):
    return tl.sum(tl.sum(tl.sum(values, 2), 1), 0)


@triton.jit
def normed(x, weight, eps, K: tl.constexpr, BITS: tl.constexpr):
    """As `row_of`, of the row's RMS norm, rounded as eager rounds it."""
    low, high = row_of(x, K, BITS)
    w_low, w_high = row_of(weight, K, BITS)
    total = total_of(low * low)
    if BITS == 4:
        total += total_of(high * high)
    factor = 1 / tl.sqrt(total / K + eps)
    low = ((low * factor).to(tl.bfloat16).to(tl.float32) * w_low).to(tl.bfloat16).to(tl.float32)
    high = ((high * factor).to(tl.bfloat16).to(tl.float32) * w_high).to(tl.bfloat16).to(tl.float32)
    return low, high


@triton.jit
def bring_share(w, N, K: tl.constexpr, BITS: tl.constexpr, BN: tl.constexpr, KIND: tl.constexpr, AHEAD: tl.constexpr):
    """Begin to load up to AHEAD bytes of this program's rows of w, of each half if it is gated, into the L2 cache."""
    if AHEAD > 0:
        wide: tl.constexpr = 2 if KIND == GATED else 1
        first, end = share(N * wide, BN)
        rows: tl.constexpr = BN // wide
        row: tl.constexpr = K // 2 if BITS == 4 else K
        nbytes = tl.minimum((end - first) * (rows * row_bytes(K, BITS)), AHEAD) // 512 * 512
        bring(w + (first * rows).to(tl.int64) * row, nbytes)
        if KIND == GATED:
            bring(w + (N + first * rows).to(tl.int64) * row, nbytes)


@triton.jit
def first_block(w, scale, N, K: tl.constexpr, BITS: tl.constexpr, GROUP: tl.constexpr, BN: tl.constexpr, KIND: tl.constexpr):
    """The first block of this program's rows."""
    first, _ = share(N * 2 if KIND == GATED else N, BN)
    return block_of(w, scale, rows_at(first, N, BN, KIND), K, BITS, GROUP)


@triton.jit
def product(
    low, high, block, w, scale, out, residual, N,
    K: tl.constexpr, BITS: tl.constexpr, GROUP: tl.constexpr, BN: tl.constexpr, KIND: tl.constexpr,
):  # fmt: skip
    """Multiply the row by this program's rows of w, of which `block` is the first; the next one is loaded meanwhile."""
    first, end = share(N * 2 if KIND == GATED else N, BN)
    weights, one, other = block
    for at in range(first + 1, end):
        w_later, one_later, other_later = block_of(w, scale, rows_at(at, N, BN, KIND), K, BITS, GROUP)
        finish(sums_of(low, high, (weights, one, other), BITS), at - 1, out, residual, N, BN, KIND)
        weights, one, other = w_later, one_later, other_later
    finish(sums_of(low, high, (weights, one, other), BITS), end - 1, out, residual, N, BN, KIND)


@triton.jit
def rotated(x, cos, sin, D: tl.constexpr):
    """The head x [D] with its rotary embedding, float32 rounded to bfloat16."""
    d = tl.arange(0, D)
    turned = tl.load(x + (d + D // 2) % D).to(tl.float32) * tl.where(d < D // 2, -1.0, 1.0)
    value = tl.load(x + d).to(tl.float32) * tl.load(cos + d).to(tl.float32) + turned * tl.load(sin + d).to(tl.float32)
    return value.to(tl.bfloat16).to(tl.float32)


@triton.jit
def join_parts(parts, stats, out, head, GROUP: tl.constexpr, D: tl.constexpr, SPLITS: tl.constexpr):
    """The attention of the queries of one head from that of parts of its keys."""
    d, s = tl.arange(0, D), tl.arange(0, SPLITS)
    for g in tl.static_range(GROUP):
        row = (head * GROUP + g) * SPLITS
        most, total = tl.load(stats + (row + s) * 2), tl.load(stats + (row + s) * 2 + 1)
        factor = tl.exp(most - tl.max(most, 0))
        part = tl.load(parts + (row + s)[:, None] * D + d[None, :])
        joined = tl.sum(part * factor[:, None], 0) / tl.sum(total * factor, 0)
        tl.store(out + (head * GROUP + g) * D + d, joined.to(tl.bfloat16))


@triton.jit
def attention(
    qkv, keys, values, cos, sin, place, parts, stats, heads_done, out, layer, arrivals, wanted,
    HEADS: tl.constexpr, GROUP: tl.constexpr, D: tl.constexpr, CACHED: tl.constexpr, SPLITS: tl.constexpr,
):  # fmt: skip
    """Attention of one token: program p has the part p % SPLITS of the keys of head p // SPLITS, others nothing. The head's
    last program joins its parts. keys and values: [HEADS, CACHED, D]; parts float32 [HEADS * GROUP, SPLITS, D].
    """
    program = tl.program_id(0)
    head, split = tl.minimum(program // SPLITS, HEADS - 1), program % SPLITS
    d = tl.arange(0, D)
    count: tl.constexpr = CACHED // SPLITS
    k = split * count + tl.arange(0, count)
    at = (head * CACHED + k)[:, None] * D + d[None, :]
    key, value = tl.load(keys + at).to(tl.float32), tl.load(values + at).to(tl.float32)
    barrier(arrivals, wanted)
    if program < HEADS * SPLITS:
        new_key = rotated(qkv + (HEADS * GROUP + head) * D, cos, sin, D)
        new_value = tl.load(qkv + (HEADS * (GROUP + 1) + head) * D + d)
        own = (d < D) & (place // count == split)
        tl.store(keys + (head * CACHED + place) * D + d, new_key.to(tl.bfloat16), mask=own)
        tl.store(values + (head * CACHED + place) * D + d, new_value, mask=own)
        key = tl.where((k == place)[:, None], new_key[None, :], key)
        value = tl.where((k == place)[:, None], new_value.to(tl.float32)[None, :], value)
        for g in tl.static_range(GROUP):
            query = rotated(qkv + (head * GROUP + g) * D, cos, sin, D)
            score = tl.sum(key * query[None, :], 1) * (D**-0.5)
            score = tl.where(k <= place, score, float("-inf"))
            most = tl.maximum(tl.max(score, 0), -1e30)
            weight = tl.exp(score - most)
            row = (head * GROUP + g) * SPLITS + split
            tl.store(parts + row * D + d, tl.sum(weight[:, None] * value, 0))
            tl.store(stats + row * 2, most)
            tl.store(stats + row * 2 + 1, tl.sum(weight, 0))
        tl.debug_barrier()
        done = tl.atomic_add(heads_done + head, 1, sem="acq_rel", scope="gpu")
        if done == (layer + 1) * SPLITS - 1:
            join_parts(parts, stats, out, head, GROUP, D, SPLITS)


@triton.jit
def layers(
    hidden, between, qkv, attended, act, parts, stats, heads_done, arrivals,
    norm1, w_qkv, s_qkv, w_out, s_out, norm2, w_up, s_up, w_down, s_down, keys, values, cos, sin, place, eps, first_layer,
    LAYERS: tl.constexpr, FIRST: tl.constexpr, LAST: tl.constexpr, H: tl.constexpr, F: tl.constexpr,
    HEADS: tl.constexpr, GROUP: tl.constexpr, D: tl.constexpr, CACHED: tl.constexpr, SPLITS: tl.constexpr,
    BITS: tl.constexpr, SCALED: tl.constexpr, BN: tl.constexpr, BN_UP: tl.constexpr, BN_DOWN: tl.constexpr,
    AHEAD: tl.constexpr,
):  # fmt: skip
    """The residual row `hidden` [H] through LAYERS layers from `first_layer` on, in place; of each phases FIRST to LAST.

    A scale stands for SCALED elements of a row of 4 bits. `arrivals` and `heads_done` [HEADS] are zero at the beginning.
    Scratch: bfloat16 between [H], qkv, attended [H], act [F]; float32 parts and stats. `place` is the new token's.
    """
    rows_qkv: tl.constexpr = (GROUP + 2) * HEADS * D
    row: tl.constexpr = H // 2 if BITS == 4 else H
    wide: tl.constexpr = F // 2 if BITS == 4 else F
    per_row: tl.constexpr = H // SCALED if BITS == 4 else 1
    per_wide: tl.constexpr = F // SCALED if BITS == 4 else 1
    programs = tl.num_programs(0)
    wanted = programs * 0
    for step in range(LAYERS):
        layer = tl.full([], 0, tl.int64) + first_layer + step
        later = tl.minimum(step + 1, LAYERS - 1) - step
        v_qkv, v_out, v_up, v_down = (
            w_qkv + layer * rows_qkv * row,
            w_out + layer * H * row,
            w_up + layer * 2 * F * row,
            w_down + layer * H * wide,
        )
        if FIRST <= 0 and LAST >= 0:
            s = s_qkv + layer * rows_qkv * per_row
            block = first_block(v_qkv, s, rows_qkv, H, BITS, SCALED, BN, PLAIN)
            bring_share(v_out, H, H, BITS, BN, RESIDUAL, AHEAD)
            wanted += programs
            barrier(arrivals, wanted)
            low, high = normed(hidden, norm1 + layer * H, eps, H, BITS)
            product(low, high, block, v_qkv, s, qkv, qkv, rows_qkv, H, BITS, SCALED, BN, PLAIN)
        if FIRST <= 1 and LAST >= 1:
            wanted += programs
            cache = layer * HEADS * CACHED * D
            bring_share(v_up, F, H, BITS, BN_UP, GATED, AHEAD)
            attention(
                qkv, keys + cache, values + cache, cos, sin, place, parts, stats, heads_done, attended, layer, arrivals,
                wanted, HEADS, GROUP, D, CACHED, SPLITS,
            )  # fmt: skip
        if FIRST <= 2 and LAST >= 2:
            s = s_out + layer * H * per_row
            block = first_block(v_out, s, H, H, BITS, SCALED, BN, RESIDUAL)
            wanted += programs
            barrier(arrivals, wanted)
            low, high = row_of(attended, H, BITS)
            product(low, high, block, v_out, s, between, hidden, H, H, BITS, SCALED, BN, RESIDUAL)
        if FIRST <= 3 and LAST >= 3:
            s = s_up + layer * 2 * F * per_row
            block = first_block(v_up, s, F, H, BITS, SCALED, BN_UP, GATED)
            bring_share(v_down, H, F, BITS, BN_DOWN, RESIDUAL, AHEAD)
            wanted += programs
            barrier(arrivals, wanted)
            low, high = normed(between, norm2 + layer * H, eps, H, BITS)
            product(low, high, block, v_up, s, act, act, F, H, BITS, SCALED, BN_UP, GATED)
        if FIRST <= 4 and LAST >= 4:
            s = s_down + layer * H * per_wide
            block = first_block(v_down, s, H, F, BITS, SCALED, BN_DOWN, RESIDUAL)
            bring_share(v_qkv + later * rows_qkv * row, rows_qkv, H, BITS, BN, PLAIN, AHEAD)
            wanted += programs
            barrier(arrivals, wanted)
            low, high = row_of(act, F, BITS)
            product(low, high, block, v_down, s, hidden, between, H, F, BITS, SCALED, BN_DOWN, RESIDUAL)


@triton.jit
def barriers(arrivals, COUNT: tl.constexpr):
    """Nothing but COUNT barriers; `arrivals` is zero at the beginning."""
    wanted = tl.num_programs(0) * 0
    for _ in range(COUNT):
        wanted += tl.num_programs(0)
        barrier(arrivals, wanted)
