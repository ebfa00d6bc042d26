"""Configurations of the attention templates (`attention.py`), and what each should take: decides what is compiled at all.

The model is a roofline of one GPU: tensor cores, the exponentials and what goes with them, device memory, and what has to be
in flight to hide its latency. It has to order configurations and say where a library kernel may be beaten; what is close is
measured.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from math import ceil, prod

from fxopt.ir.region import Attention
from fxopt.target import Target

FEW_ROWS = 16
"""Rows of scores (positions times heads of a group) that are packed into one tile at most `_LARGEST_PACKED` high."""

SHORT_SEQUENCE = 512
"""Keys that a program goes over in a few microseconds."""

_LARGEST_PACKED = 64
_LEAST_BLOCK = 16
_MOST_PARTS = 64

BOUNDED = "bounded"

FEWEST_BOUNDED = 1024
"""With fewer keys there is hardly anything that need not be read."""

LAUNCH_SECONDS = 2.5e-6
"""From a launch to the first block of keys, and from the last one to the end."""

JOIN_SECONDS = 2.5e-6
"""What the second kernel of a split adds."""

BLOCK_SECONDS = 0.5e-6
"""What a block of keys takes a program at least: two products and a row maximum that wait for each other."""

LATENCY_SECONDS = 0.9e-6
"""From a load to its data: a block cannot follow another one sooner than this over the loads in flight."""

ELEMENT_SECONDS = 8e-11
"""What one multiprocessor takes for each score: its exponential, scale, maximum and sum."""

MASK_SECONDS = 8e-11
"""What it takes for each element of a mask with rows."""

RATE_OF_ONE = 1.6
"""What one multiprocessor can load, over its share of the memory's rate."""

FLIGHT_OF_MEMORY = 1.75e-6
"""Bytes in flight with which memory reaches 70 % of its rate, over that rate."""

EXACT_SHARE = 1 / 20
"""The rate of float32 products, over that of half types."""

_MOST_EXACT_PRODUCTS = 1 << 16
"""Of float32 in one step of a program: they are instructions, all unrolled."""

_REGISTERS_BESIDE_TILES = 72
_MOST_REGISTERS = 255
_RESERVED_SHARED = 1024
_THREADS_PER_SM = 2048


@dataclass(frozen=True)
class AttentionConfig:
    """How attention is done: tiles of `block_m` rows (`pack` heads by positions) go over `split` parts of the keys in blocks
    of `block_n`, of those up to the last one that the mask shows if it is `bounded`. `str()` is its name in records and
    reports.
    """

    block_m: int
    block_n: int
    warps: int
    stages: int
    pack: int = 1
    split: int = 1
    bounded: bool = False

    def __str__(self) -> str:
        words = [f"{self.block_m}x{self.block_n} w{self.warps} s{self.stages}"]
        words += [f"pack{self.pack}"] * (self.pack > 1) + [f"split{self.split}"] * (self.split > 1)
        return " ".join(words + [BOUNDED] * self.bounded)

    @property
    def kind(self) -> tuple[int, ...]:
        """What makes a difference that a model can hardly predict."""
        return self.block_m, self.block_n, self.warps, self.split.bit_length()

    def programs(self, attention: Attention) -> int:
        """The grid."""
        return _tiles(attention, self) * self.split

    def shared_bytes(self, attention: Attention) -> int:
        """Shared memory of a program: blocks of keys and values in flight, and the tile of queries."""
        width, value_width, itemsize = _widths(attention)
        buffers = self.stages if self.block_m >= 64 else self.stages - 1  # what a warp group multiplies stays in its buffer
        blocks = buffers * self.block_n * (width + value_width)
        return (blocks + self.block_m * width) * itemsize + _RESERVED_SHARED

    def per_sm(self, attention: Attention, target: Target) -> int:
        """Programs that one multiprocessor holds at a time; 0 when the configuration does not fit."""
        threads, shared = self.warps * target.warp_size, self.shared_bytes(attention)
        width, value_width, itemsize = _widths(attention)
        registers = self.block_m * (value_width + self.block_n + self.block_n * itemsize // 4) // threads
        if not target.has_warpgroup_products:  # operands go through registers
            registers += self.block_m * width * itemsize // 4 // threads
        registers += _REGISTERS_BESIDE_TILES
        if itemsize == 4 and self.block_m * self.block_n * max(width, value_width) > _MOST_EXACT_PRODUCTS:
            return 0
        if registers > _MOST_REGISTERS or shared > target.shared_per_block:
            return 0
        return min(
            target.shared_per_block // shared, target.registers_per_sm // (registers * threads), _THREADS_PER_SM // threads
        )


def block_of(size: int, least: int = _LEAST_BLOCK) -> int:
    """The power of two that holds `size`."""
    return max(least, 1 << (size - 1).bit_length())


def configs(attention: Attention, target: Target, limit: int = 4) -> list[AttentionConfig]:
    """The best configuration of each of the most promising kinds, best first; at most `limit`."""
    kinds: dict[object, AttentionConfig] = {}
    for config in ranked(attention, target):
        kinds.setdefault(config.kind, config)
    return list(kinds.values())[:limit]


def bounded(attention: Attention, found: Sequence[AttentionConfig]) -> list[AttentionConfig]:
    """The first of `found` as one that reads only as far as the mask shows, for few rows that share a mask, such as a cache
    has that is not full. What that saves is not known before it runs."""
    mask, shape = attention.mask, attention.query.shape
    if mask is None or mask.strides[1] or mask.strides[2] or attention.key.shape[2] < FEWEST_BOUNDED:
        return []
    return [replace(config, bounded=True) for config in found[:1] if shape[2] <= FEW_ROWS]


def may_win(attention: Attention, target: Target) -> bool:
    """Whether a kernel of ours may be faster than the best one of a library.

    Those go over all keys at the rate of large products, but they pack no heads, split the keys less, and masks slow them
    down. cuDNN's, for Hopper and later, are out of reach where arithmetic is all that counts: not where a sequence is so
    short that every tile has a multiprocessor of its own, and latency decides. What else is done to scores no library
    computes, nor does it read 8 bits.
    """
    special = attention.mask is not None or attention.scores is not None or attention.factors is not None
    if special or attention.query.shape[2] <= FEW_ROWS or not target.has_warpgroup_products:
        return True
    least = AttentionConfig(_LARGEST_PACKED, _LARGEST_PACKED, 4, 2)
    return attention.key.shape[2] <= SHORT_SEQUENCE and _tiles(attention, least) <= target.sm_count


def ranked(attention: Attention, target: Target) -> list[AttentionConfig]:
    """All `plausible` ones, best first; of equals, that with fewer parts."""
    key = {c: (estimate(attention, c, target), c.split, -c.stages) for c in plausible(attention, target)}
    return sorted(key, key=lambda c: key[c])


def plausible(attention: Attention, target: Target) -> list[AttentionConfig]:
    """Everything that fits `target` and could be right for such a problem: what a benchmark tries."""
    return [c for c in dict.fromkeys(_forms(attention, target)) if c.per_sm(attention, target) > 0]


def _forms(attention: Attention, target: Target) -> Iterator[AttentionConfig]:
    _, heads, rows, _ = attention.query.shape
    group, keys = heads // attention.key.shape[1], attention.key.shape[2]
    pack = group if rows * group <= _LARGEST_PACKED or rows < FEW_ROWS else 1
    if rows * pack <= _LARGEST_PACKED:
        tiles = [(block_of(rows * pack), 4)]
    else:
        tiles = [(64, 4), (128, 4), (128, 8)]
    for block_m, warps in tiles:
        for block_n in (32, 64, 128):
            if block_n > block_of(keys):
                continue
            for stages in (2, 3, 4):
                for split in _splits(ceil(keys / block_n)):
                    yield AttentionConfig(block_m, block_n, warps, stages, pack, split)


def _splits(blocks: int) -> list[int]:
    """Numbers of parts of which none is empty."""
    return sorted({ceil(blocks / ceil(blocks / parts)) for parts in (1, 2, 3, 4, 6, 8, 12, 16, 24, 32, 48, _MOST_PARTS)})


def estimate(attention: Attention, config: AttentionConfig, target: Target) -> float:
    """Seconds that `attention` should take; infinity for what does not fit."""
    per_sm = config.per_sm(attention, target)
    if per_sm == 0:
        return float("inf")
    width, value_width, itemsize = _widths(attention)
    keys = attention.key.shape[2]
    blocks = ceil(ceil(keys / config.block_n) / config.split)
    shown = _share_of_keys(attention)
    programs = config.programs(attention)
    resident = min(per_sm, ceil(programs / target.sm_count))
    rounds = max(1.0, programs / (target.sm_count * per_sm)) if shown < 1 else ceil(programs / (target.sm_count * per_sm))
    elements = config.block_m * config.block_n
    share = EXACT_SHARE if itemsize == 4 else 2 / itemsize
    products = 2.0 * elements * (width + value_width) * target.sm_count / (target.half_flops * share)
    if target.has_warpgroup_products and config.block_m < 64:
        products *= 2
    rest = elements * ELEMENT_SECONDS * (_least_warps(config, resident))
    if attention.mask is not None and (attention.mask.strides[1] or attention.mask.strides[2]):
        rest += elements * MASK_SECONDS
    work = resident * (max(products, rest) + min(products, rest) / (1 + resident))
    waiting = max(BLOCK_SECONDS, LATENCY_SECONDS / max(config.stages - 1, 1))
    computed = rounds * max(1.0, blocks * shown) * max(work, waiting)
    seen = min(programs, target.sm_count * per_sm)
    stored = attention.buffers[attention.key.buffer].dtype.itemsize
    flight = seen * config.block_n * (width + value_width) * stored * max(config.stages - 1, 1)
    enough = flight / (flight + 0.43 * FLIGHT_OF_MEMORY * target.memory_rate)
    rate = target.memory_rate * min(enough, RATE_OF_ONE * min(programs / target.sm_count, 1.0))
    moved = sum(_bytes(attention, x.buffer, x.shape, x.strides) for x in (*attention.operands, attention.out))
    seconds = LAUNCH_SECONDS + max(computed, moved / rate)
    if config.split > 1:
        partial = 2.0 * 4 * config.split * prod(attention.out.shape)
        seconds += JOIN_SECONDS + partial / target.memory_rate
    return seconds


def _least_warps(config: AttentionConfig, resident: int) -> float:
    """By how much a multiprocessor is slower than with enough warps to keep its units busy."""
    return max(1.0, 8 / (config.warps * resident))


def _share_of_keys(attention: Attention) -> float:
    """The share of the blocks that a causal mask leaves."""
    rows, keys = attention.query.shape[2], attention.key.shape[2]
    if not attention.causal:
        return 1.0
    return (rows + 1) / 2 / keys if rows <= keys else 1 - (keys - 1) / 2 / rows


def _bytes(attention: Attention, buffer: str, shape: tuple[int, ...], strides: tuple[int, ...]) -> int:
    distinct = prod(size for size, stride in zip(shape, strides, strict=True) if stride)
    return distinct * attention.buffers[buffer].dtype.itemsize


def _tiles(attention: Attention, config: AttentionConfig) -> int:
    batch, heads, rows, _ = attention.query.shape
    return batch * (heads // config.pack) * ceil(rows * config.pack / config.block_m)


def _widths(attention: Attention) -> tuple[int, int, int]:
    """Padded features of keys and values, and bytes of an element in products."""
    itemsize = attention.buffers[attention.query.buffer].dtype.itemsize
    return block_of(attention.key.shape[3]), block_of(attention.value.shape[3]), itemsize
