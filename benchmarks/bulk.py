"""Device functions that bring memory into the L2 cache in bulk: for `bringing.py` and `persistent_layers.py`."""

# mypy: disable-error-code="no-untyped-def,no-untyped-call,misc,untyped-decorator"

from __future__ import annotations

import triton
import triton.language as tl

from fxopt.codegen.triton_helpers.interpreter import INTERPRETED

INTO_CACHE = tl.constexpr("""{ .reg .pred asks; .reg .b32 thread;
    mov.u32 $0, 0;
    mov.u32 thread, %tid.x;
    setp.eq.u32 asks, thread, 0;
    setp.ne.and.u32 asks, $2, 0, asks;
    @asks cp.async.bulk.prefetch.L2.global [$1], $2; }""")
"""One thread asks: the instruction takes one place at a time, and threads with other places would do so in turn, which takes
a microsecond for a warp of them."""


@triton.jit
def bring_bytes(place, nbytes):
    """Begin to bring `nbytes`, a multiple of 16 below 2**20, from address `place` (int64) on into the L2 cache. From Hopper
    on.
    """
    if not INTERPRETED:
        tl.inline_asm_elementwise(INTO_CACHE, "=r,l,r", [place, nbytes], dtype=tl.int32, is_pure=False, pack=1)


@triton.jit
def bring_share(w, first, size, each):
    """Begin to bring this program's share of `size` bytes, from byte `first` of w on, into the L2 cache: all programs take
    turns at portions of `each` bytes, a multiple of 128.
    """
    if not INTERPRETED:
        lines = (w.to(tl.int64) + first) // 128 * 128
        for start in range(tl.program_id(0) * each, size, tl.num_programs(0) * each):
            bring_bytes(lines + start, tl.minimum(each, size - start) // 16 * 16)
