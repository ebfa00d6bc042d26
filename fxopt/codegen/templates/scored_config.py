"""Configurations of the kernels of attention in training (`scored_attention.py`), in the order in which they are proposed.

There is no cost model: where rows and keys are many, a configuration is good or bad by what fits into registers and shared
memory, which compiling for each architecture has shown, and the tuner measures the few that are left.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

from fxopt.codegen.templates.attention_config import block_of
from fxopt.ir.exprs import Int, add, floordiv, prod
from fxopt.ir.region import ScoredAttention
from fxopt.target import Target

FORWARD, QUERY, KEY_VALUE, BIAS = "forward", "query_gradient", "key_value_gradients", "bias_gradient"
TEMPLATES = {
    "scored_attention": FORWARD,
    "scored_attention_query": QUERY,
    "scored_attention_key_value": KEY_VALUE,
    "scored_attention_bias": BIAS,
}
"""Op -> the function of the template."""

_LEAST_BLOCK = 16
_RESERVED_SHARED = 2048

Blocks = tuple[tuple[int, int, int, int], ...]

_BLOCKS: dict[tuple[str, int], Blocks] = {
    (FORWARD, 64): ((128, 64, 8, 3), (64, 64, 4, 3), (64, 64, 4, 2)),
    (FORWARD, 128): ((128, 64, 8, 3), (64, 64, 4, 3), (64, 32, 4, 2)),
    (QUERY, 64): ((64, 64, 4, 3), (64, 64, 4, 2), (128, 64, 8, 2)),
    (QUERY, 128): ((64, 32, 4, 2), (128, 64, 8, 2), (64, 64, 8, 2)),
    (KEY_VALUE, 64): ((64, 64, 4, 2), (32, 64, 4, 2)),
    (KEY_VALUE, 128): ((32, 128, 8, 2), (64, 64, 8, 2), (32, 64, 8, 2)),
    (BIAS, 64): ((64, 64, 4, 2), (64, 64, 8, 2), (64, 64, 4, 3)),
    (BIAS, 128): ((64, 64, 8, 2), (64, 64, 4, 2), (64, 64, 4, 1)),
}
"""Rows, keys, warps and stages by the largest number of features."""

_BLOCKS_BEFORE_HOPPER = _BLOCKS | {
    (FORWARD, 64): ((128, 64, 8, 3), (64, 64, 4, 3)),
    (QUERY, 128): ((64, 64, 8, 2), (64, 32, 4, 2)),
    (KEY_VALUE, 64): ((64, 32, 4, 2), (32, 32, 4, 2)),
    (KEY_VALUE, 128): ((64, 64, 8, 2), (32, 64, 8, 2)),
    (BIAS, 128): ((64, 64, 8, 2), (64, 32, 8, 2)),
}
"""Where operands of products go through registers, larger blocks spill them."""

_BLOCKS_AFTER_HOPPER = _BLOCKS | {
    (FORWARD, 64): ((128, 64, 8, 2), (64, 64, 4, 3), (64, 64, 4, 2)),
    (KEY_VALUE, 64): ((32, 64, 4, 2), (64, 64, 4, 2)),
    (KEY_VALUE, 128): ((32, 64, 8, 2), (32, 128, 8, 2), (64, 64, 8, 2)),
}


@dataclass(frozen=True)
class ScoredConfig:
    """Blocks of `block_m` rows by `block_n` keys. `str()` is its name in records and reports."""

    block_m: int
    block_n: int
    warps: int
    stages: int

    def __str__(self) -> str:
        return f"{self.block_m}x{self.block_n} w{self.warps} s{self.stages}"

    def in_smaller_steps(self, op: str) -> ScoredConfig:
        """For the same grid, half of the block that a program walks in."""
        if TEMPLATES[op] == KEY_VALUE:
            return replace(self, block_m=max(_LEAST_BLOCK, self.block_m // 2))
        return self if TEMPLATES[op] == BIAS else replace(self, block_n=max(_LEAST_BLOCK, self.block_n // 2))

    def programs(self, attention: ScoredAttention) -> Int:
        """The grid."""
        batch, heads, rows, _ = attention.operands["query"].shape
        groups, keys = attention.operands["key"].shape[1:3]
        template = TEMPLATES[attention.op]
        if template == KEY_VALUE:
            return prod((batch, groups, blocks(keys, self.block_n)))
        if template == BIAS:
            bias = attention.operands["bias"].shape
            tiles = (blocks(rows, self.block_m), blocks(keys, self.block_n))
            return prod((attention.parts, bias[0], bias[1], *tiles))
        return prod((batch, heads, blocks(rows, self.block_m)))


def blocks(size: Int, block: int) -> Int:
    """How many blocks hold `size`."""
    return floordiv(add(size, block - 1), block)


def configs(attention: ScoredAttention, target: Target, limit: int = 3) -> list[ScoredConfig]:
    """The configurations to compile, at most `limit`."""
    fitting = (c for c in _forms(attention, target) if _shared_bytes(attention, c) <= target.shared_per_block)
    return list(dict.fromkeys(fitting))[:limit]


def _forms(attention: ScoredAttention, target: Target) -> Iterator[ScoredConfig]:
    """Blocks no larger than what they hold, as far as that is known."""
    rows, keys = (attention.operands[n].shape[2] for n in ("query", "key"))
    blocks = _BLOCKS_BEFORE_HOPPER if target.arch < 90 else _BLOCKS if target.arch < 100 else _BLOCKS_AFTER_HOPPER
    for m, n, warps, stages in blocks[TEMPLATES[attention.op], max(64, *_widths(attention))]:
        block_m, block_n = (_within(block, size) for block, size in ((m, rows), (n, keys)))
        yield ScoredConfig(block_m, block_n, warps if block_m * block_n >= m * n // 2 else 4, stages)


def _within(block: int, size: Int) -> int:
    return min(block, block_of(size, _LEAST_BLOCK)) if isinstance(size, int) else block


def _shared_bytes(attention: ScoredAttention, config: ScoredConfig) -> int:
    """About what a program needs: blocks in flight, and the tiles that it keeps."""
    width, value_width = _widths(attention)
    m, n, template = config.block_m, config.block_n, TEMPLATES[attention.op]
    moving, kept = {FORWARD: (n, m), QUERY: (n, 2 * m), KEY_VALUE: (m, n), BIAS: (m + n, 0)}[template]
    elements = config.stages * moving * (width + value_width) + kept * max(width, value_width) + m * n
    return elements * attention.dtype.itemsize + _RESERVED_SHARED


def _widths(attention: ScoredAttention) -> tuple[int, int]:
    """Padded features of keys and values."""
    key, value = (attention.operands[n].shape[3] for n in ("key", "value"))
    assert isinstance(key, int) and isinstance(value, int)
    return block_of(key), block_of(value)
