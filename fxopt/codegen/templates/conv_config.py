"""Configurations of the convolution templates (`conv.py`), and what each should take: decides what is compiled at all."""

from __future__ import annotations

import functools
import itertools
import math
from collections.abc import Iterator
from dataclasses import dataclass, replace
from math import ceil

import torch

from fxopt.codegen.templates import gemm_config, gemm_estimate
from fxopt.codegen.templates.gemm_problem import ALIGNMENT, GemmConfig, GemmProblem, Matrix
from fxopt.ir.region import Patches
from fxopt.target import Target

WARP_OPS = 1.6e9
"""Instructions a second that one scheduler of a multiprocessor issues."""

SCHEDULERS = 4

WARPS_TO_HIDE = 3
"""Warps of one scheduler that hide each other's waiting for data."""

LANE_ELEMENTS = 4
"""Channels that one thread of a stencil has: eight bytes of half precision a load."""

_REGISTERS_BESIDE = 40
_MOST_REGISTERS = 200
_SUMS_AT_MOST = 108
"""Registers of a thread for the sums of a weight's gradient."""

_OPS_PER_ELEMENT = 0.6
"""What widening an element costs in instructions of the full rate, beside the share of its load."""

_OPS_PER_LOAD = 4.0
_OPS_PER_LINE = 2.0
"""What a load and its condition cost, in instructions, and each cache line that a warp's load touches."""

_OPS_PER_PLACE = 12.0
"""What the epilogue's addresses cost for each place of a thread."""

_FUNCTION_OPS = 20.0
"""Instructions of an error function, the unit of `epilogue_ops`."""

GATHERING = 1.5
"""What a product of patches takes at least, as a multiple of what the model of products says (H100: 1.5 to 4)."""

GATHERED_SHARE = 0.3
"""Of the tensor cores' rate, what products of patches reach at most (H100: 230 of 770 TFLOP/s)."""

LIBRARY_GATHERING = 1.4
"""The first of these for cuDNN, where `FULL_CHANNELS` divides the channels (H100: 1.2 to 1.7); elsewhere it takes longer."""

FULL_CHANNELS = 64

_BOX_BYTES, _NARROWEST_BOX = 128, 32
"""Of a pixel's channels that one box has: no more than what shared memory swizzles, and what a tensor core takes at once."""

_BOX_TILES = ((128, 128, 8), (256, 64, 8), (128, 64, 4), (64, 128, 4), (64, 64, 4), (256, 128, 8), (128, 256, 8))
"""(places, channels, warps)."""

_POOLS = 8
"""In a tile, at least: so many rows lie between what one thread has of a pool."""

_LONGEST_STEP = 8
"""From one pixel of a box to the next."""

_LONGEST_SIDE = 256
"""Pixels that a side of a box spans, those that it leaves out included."""

LIBRARY_TILE = 64
"""Rows and columns of the smallest tiles that cuDNN takes for common convolutions of few places."""


@dataclass(frozen=True)
class ConvProblem:
    """`epilogue(convolution)` of `patches`, of `dtype`, into `channels`.

    `weight` is the right operand: (row, column) strides in elements and the offset of the first. `read`, `written` and
    `epilogue_ops` are those of `GemmProblem`.
    """

    patches: Patches
    channels: int
    dtype: torch.dtype
    weight: tuple[int, int, int]
    read: int = 0
    written: int = 0
    epilogue_ops: float = 0.0

    @property
    def is_strided(self) -> bool:
        """Whether the weights of neighbouring channels are apart, those of one side by side."""
        return self.weight[1] != 1

    @property
    def pool_places(self) -> int:
        """How many rows of the product are one of the epilogue's."""
        return math.prod(self.patches.pool)

    @property
    def image_bytes(self) -> int:
        n, h, w, c = self.patches.shape
        return n * h * w * c * self.dtype.itemsize

    @functools.cached_property  # cost models ask for each configuration
    def product(self) -> GemmProblem:
        """The product that it is, as if the patches lay in memory."""
        m, k = self.patches.rows, self.patches.columns
        row, column, offset = self.weight
        a, b = Matrix(m, k, k, 1), Matrix(k, self.channels, row, column, offset=offset)
        return GemmProblem(
            1, m, self.channels, k, self.dtype, a, b, self.read, self.written,
            epilogue_ops=self.epilogue_ops,
        )  # fmt: skip


@dataclass(frozen=True)
class StencilConfig:
    """How a depthwise convolution is done: `rows` places in a column by thread, `columns` of those and `channels` by
    program. `str()` is its name in records and reports.
    """

    rows: int
    columns: int
    channels: int
    warps: int

    def __str__(self) -> str:
        return f"stencil {self.rows}x{self.columns}x{self.channels} w{self.warps}"

    def programs(self, problem: ConvProblem) -> int:
        height, width = problem.patches.places
        strips = problem.patches.shape[0] * ceil(height / self.rows) * width
        return ceil(strips / self.columns) * ceil(problem.channels / self.channels)


def stencil_configs(problem: ConvProblem, target: Target, limit: int = 3) -> list[StencilConfig]:
    """The best configurations of different `rows` (seven and eight count as equal), best first; at most `limit`."""
    kinds: dict[int, StencilConfig] = {}
    for config in ranked_stencils(problem, target):
        kinds.setdefault(min(config.rows, 7), config)
    return list(kinds.values())[:limit]


def ranked_stencils(problem: ConvProblem, target: Target) -> list[StencilConfig]:
    """All that could be right for such a problem, best first."""
    return sorted(_stencils(problem), key=lambda c: (stencil_seconds(problem, c, target), -c.channels, c.rows))


def _stencils(problem: ConvProblem) -> Iterator[StencilConfig]:
    height, width = problem.patches.places
    strips = problem.patches.shape[0] * width
    for rows, channels, warps in itertools.product((1, 2, 4, 7, 8), (8, 16, 32, 64, 128), (4, 8)):
        columns = warps * 32 * LANE_ELEMENTS // channels
        if rows >= 2 * height or columns >= 2 * strips * ceil(height / rows):
            continue
        if channels >= 2 * max(problem.channels, 8) or _registers(problem, rows) > _MOST_REGISTERS:
            continue
        yield StencilConfig(rows, columns, channels, warps)


@dataclass(frozen=True)
class SumsConfig:
    """How the gradient of a depthwise weight is summed up: `rows` x `columns` places at a time, and `channels`, by each
    program of one of `parts`.
    """

    rows: int
    columns: int
    channels: int
    warps: int
    parts: int

    def __str__(self) -> str:
        return f"sums {self.rows}x{self.columns}x{self.channels} w{self.warps} parts{self.parts}"

    def programs(self, problem: ConvProblem) -> int:
        return self.parts * ceil(problem.channels / self.channels)


def sums_configs(problem: ConvProblem, target: Target, limit: int = 1) -> list[SumsConfig]:
    """As many programs as the GPU holds, with as many channels a thread as leave room for a sum for each of the window's
    elements; few rows at a time, which take less time to compile, and more. `limit` at most.
    """
    patches = problem.patches
    taps = patches.window[0] * patches.window[1]
    lanes = max(lane for lane in (1, 2, 4) if lane == 1 or lane * taps <= _SUMS_AT_MOST)
    widths = (16, 32, 64, 128)
    channels = min(widths, key=lambda b: (ceil(problem.channels / b) * b * (1 + _OPS_PER_LINE / b), -b))
    height, width = patches.places
    out = []
    for most in (4, 8):
        rows = min(range(1, most + 1), key=lambda t: (ceil(height / t) * _rows_read(patches, t), t))
        registers = lanes * (taps + 2 * rows) + _REGISTERS_BESIDE
        warps = 4
        columns = max(1, warps * target.warp_size * lanes // channels)
        tiles = ceil(patches.shape[0] * ceil(height / rows) * width / columns)
        resident = max(1, target.registers_per_sm // (registers * target.warp_size * warps))
        parts = max(1, min(tiles, target.sm_count * resident // ceil(problem.channels / channels)))
        out.append(SumsConfig(rows, columns, channels, warps, parts))
    return list(dict.fromkeys(out))[:limit]


def _registers(problem: ConvProblem, rows: int) -> int:
    """Of a thread: sums, a column of the window's weights, a column of the input."""
    window, loads = problem.patches.window[0], _rows_read(problem.patches, rows)
    packed = problem.dtype.itemsize / 4
    return ceil(LANE_ELEMENTS * (rows + window + packed * loads)) + _REGISTERS_BESIDE


def _rows_read(patches: Patches, rows: int) -> int:
    """Rows of the input that `rows` places in a column see."""
    seen = {t * patches.stride[0] + r * patches.dilation[0] for t in range(rows) for r in range(patches.window[0])}
    return len(seen)


def stencil_seconds(problem: ConvProblem, config: StencilConfig, target: Target) -> float:
    """Seconds that `config` should take: memory, or instructions with whole programs on whole multiprocessors."""
    patches = problem.patches
    loads = _rows_read(patches, config.rows)
    lines = ceil(target.warp_size * LANE_ELEMENTS / config.channels)
    load = _OPS_PER_LOAD + _OPS_PER_LINE * lines + _OPS_PER_ELEMENT * LANE_ELEMENTS
    each = LANE_ELEMENTS * config.rows * patches.window[0] + loads * load
    each = patches.window[1] * (each + patches.window[0])
    each += config.rows * (_OPS_PER_PLACE + LANE_ELEMENTS * _FUNCTION_OPS * problem.epilogue_ops)
    resident = max(1, target.registers_per_sm // (_registers(problem, config.rows) * target.warp_size * config.warps))
    programs = config.programs(problem)
    rounds = ceil(programs / target.sm_count)
    warps = min(rounds, resident) * config.warps
    hidden = min(1.0, warps / (WARPS_TO_HIDE * SCHEDULERS))
    compute = rounds * config.warps * each / (SCHEDULERS * WARP_OPS * hidden)
    # Neighbouring columns of places see the same pixels, which the L2 cache holds; what is short of a sector is lost.
    width = config.columns * patches.stride[1]
    overlap = (width + (patches.window[1] - 1) * patches.dilation[1]) / width
    overlap *= loads / (config.rows * min(patches.stride[0], patches.window[0]))
    overlap *= max(1.0, 32 / (config.channels * problem.dtype.itemsize))
    cached = problem.image_bytes * overlap / (gemm_estimate.L2_RATE_OF_MEMORY * target.memory_rate)
    memory = (problem.image_bytes + problem.read + problem.written) / target.memory_rate
    return gemm_estimate.LAUNCH_SECONDS + max(memory, cached, compute)


def implicit_configs(problem: ConvProblem, target: Target, limit: int = 3) -> list[GemmConfig]:
    """The best configuration of each of the most promising kinds, best first; at most `limit`."""
    return list(_implicit(problem, target)[:limit])


def box_configs(problem: ConvProblem, target: Target, limit: int = 3) -> list[GemmConfig]:
    """Configurations whose patches arrive as boxes (`box_conv.py`), the best of each of the `limit` best tiles; none where
    descriptors cannot have such images or weights.
    """
    return [replace(c, swap=True) for c in _boxes(problem, target)[:limit]]


@functools.lru_cache(maxsize=256)
def _boxes(problem: ConvProblem, target: Target) -> tuple[GemmConfig, ...]:
    product, seen = problem.product, boxed(problem)
    if seen is None or not target.is_hopper:
        return ()
    tiles: dict[object, GemmConfig] = {}
    forms = [
        GemmConfig(
            True,
            rows,
            columns,
            _block_of_channels(problem, seen),
            warps,
            stages,
            subtile=1 + (rows * columns >= 128 * 32 * warps and problem.pool_places == 1),
            promote=product.sums_imprecisely,
        )
        for (rows, columns, warps), stages in itertools.product(_BOX_TILES, (3, 4, 5))
        if columns < 2 * problem.channels
    ]
    for config in sorted(forms, key=lambda c: (box_seconds(problem, c, target), -c.stages)):
        if config.per_sm(product, target) > 0:
            tiles.setdefault((config.block_m, config.block_n), config)
    return tuple(tiles.values())


def _block_of_channels(problem: ConvProblem, seen: Patches) -> int:
    if is_by_rows(problem):
        return 1 << (seen.shape[3] - 1).bit_length()
    return math.gcd(seen.shape[3], _BOX_BYTES // problem.dtype.itemsize)


def boxed(problem: ConvProblem) -> Patches | None:
    """The images of `problem` as boxes come from them; None where tensor descriptors cannot have them or the weight."""
    patches, (row, column, offset), itemsize = problem.patches, problem.weight, problem.dtype.itemsize
    if patches.depthwise or patches.transposed or patches.strides[3] != 1 or row != 1:
        return None
    seen, by_rows = patches, is_by_rows(problem)
    if by_rows:
        (n, h, _, c), (image, line, pixel, _) = patches.shape, patches.strides
        seen = replace(
            patches,
            shape=(n, h, patches.places[1], patches.window[1] * c),
            strides=(image, line, patches.stride[1] * pixel, 1),
            window=(patches.window[0], 1),
            stride=(patches.stride[0], 1),
        )
    narrow = _block_of_channels(problem, seen) * itemsize < _NARROWEST_BOX
    steps = (*seen.strides[:3], seen.offset, *(() if by_rows else (column, offset)))
    aligned = not any(step * itemsize % ALIGNMENT for step in steps)
    return seen if aligned and not narrow and max(seen.stride) <= _LONGEST_STEP else None


def is_by_rows(problem: ConvProblem) -> bool:
    """Whether a row of the window is one "pixel" of a box, since pixels are smaller than descriptors tell apart, but what it
    sees is side by side and within the image. What the next place sees may overlap it. The weight comes by addresses.
    """
    patches, itemsize = problem.patches, problem.dtype.itemsize
    pixel = patches.shape[3] * itemsize
    beside = patches.strides[2] == patches.shape[3] and (patches.padding[1], patches.dilation[1]) == (0, 1)
    small = pixel % ALIGNMENT > 0 or pixel < _NARROWEST_BOX
    return beside and small and patches.window[1] * pixel <= _BOX_BYTES


def box(problem: ConvProblem, places: int) -> tuple[int, int, int]:
    """(images, rows, columns) of so many places, a power of two, that cover all of them with the fewest boxes that a
    descriptor has; of equals, the one with the longest rows.
    """
    down, across = problem.patches.stride[0], 1 if is_by_rows(problem) else problem.patches.stride[1]
    powers = [1 << n for n in range(places.bit_length())]
    rows, columns = problem.patches.pool
    sides = [(h, w) for h in powers for w in powers if h * w <= places and max(h * down, w * across) <= _LONGEST_SIDE]
    sides = [(h, w) for h, w in sides if h % rows == 0 and w % columns == 0]
    shapes = [(places // (h * w), h, w) for h, w in sides]
    return min(shapes, key=lambda shape: (boxes(problem, shape), -shape[2], -shape[1]))


def boxes(problem: ConvProblem, shape: tuple[int, int, int]) -> int:
    """How many boxes of `shape` cover all places."""
    sizes = (problem.patches.shape[0], *problem.patches.places)
    return math.prod(ceil(size / each) for size, each in zip(sizes, shape, strict=True))


def box_seconds(problem: ConvProblem, config: GemmConfig, target: Target) -> float:
    """`implicit_seconds`, with what boxes compute beyond the places."""
    covered = boxes(problem, box(problem, config.block_m)) * config.block_m
    return implicit_seconds(problem, config, target) * covered / problem.product.m


MOST_REGISTERS = 160
"""Of 255: addresses take as many as what is gathered. At 192 one such kernel spills, and one has wrong values on an H100."""

_MOST_OF_8_BITS_IN_REGISTERS = 100
"""The same where tensor cores take both operands from registers: at 128, 8-bit kernels for sm_80 spill."""


@functools.lru_cache(maxsize=256)
def _implicit(problem: ConvProblem, target: Target) -> tuple[GemmConfig, ...]:
    product = problem.product
    found = [_with_block(problem, c) for c in gemm_config.plausible(product, target) if _is_a_form(problem, c)]
    if problem.pool_places > 1:  # what is left of a tile needs no parts
        found = [replace(c, subtile=1) for c in found]
    ranked = sorted(dict.fromkeys(found), key=lambda c: (implicit_seconds(problem, c, target), c.stages, -c.warps))
    kinds: dict[object, GemmConfig] = {}
    narrow = problem.dtype.itemsize == 1 and not target.has_warpgroup_products
    most = _MOST_OF_8_BITS_IN_REGISTERS if narrow else MOST_REGISTERS
    for config in ranked:
        if config.per_sm(product, target) > 0 and _implicit_registers(problem, config) <= most:
            kinds.setdefault(config.kind, config)
    return tuple(kinds.values())


def _implicit_registers(problem: ConvProblem, config: GemmConfig) -> float:
    """Of a thread, for sums and for patches that are gathered element by element."""
    gathered = config.block_m * config.block_k if problem.patches.shape[3] % config.block_k else 0
    sums = config.block_m * config.block_n * (1 + config.promote)
    return (sums + gathered) / (32 * config.warps)


def _is_a_form(problem: ConvProblem, config: GemmConfig) -> bool:
    pools = problem.pool_places
    return not config.tma and not config.swap and (pools == 1 or (config.split == 1 and config.block_m >= _POOLS * pools))


def _with_block(problem: ConvProblem, config: GemmConfig) -> GemmConfig:
    """`config` with blocks of the inner dimension that lie under one element of the window, if channels are many."""
    channels, block = problem.patches.shape[3], config.block_k
    while channels % block and block > 32 // problem.dtype.itemsize:
        block //= 2
    if channels % block:  # through several elements, whose number should not leave much of the last block empty
        block = min((32, 64), key=lambda b: (ceil(problem.patches.columns / b) * b, -b))
    return replace(config, block_k=min(block, config.block_k))


def implicit_seconds(problem: ConvProblem, config: GemmConfig, target: Target) -> float:
    """Seconds that `config` should take: those of the product, whose patches come from memory once."""
    return _with_patches(problem, gemm_estimate.estimate(problem.product, config, target), target)


def implicit_may_win(problem: ConvProblem, target: Target) -> bool:
    """Whether products of patches may beat the library and a kernel for the epilogue. Where nothing was measured (channels
    that do not fill cuDNN's tiles, GPUs before Hopper) they may; so they may where these leave multiprocessors idle, since
    cuDNN does not split the inner dimension; and they may where a pooling follows, before which libraries store everything.
    """
    product, channels = problem.product, (problem.patches.shape[3], problem.channels)
    if problem.dtype.itemsize == 1 or problem.pool_places > 1:  # no library has convolutions of 8 bits
        return True
    if any(n % FULL_CHANNELS for n in channels) or not target.has_warpgroup_products:
        return True
    if ceil(product.m / LIBRARY_TILE) * ceil(product.n / LIBRARY_TILE) < target.sm_count:
        return True
    library = LIBRARY_GATHERING * _with_patches(problem, gemm_config.library_seconds(product, target), target)
    if problem.epilogue_ops:
        result = product.m * product.n * product.itemsize
        library += gemm_estimate.SECOND_LAUNCH_SECONDS + (result + problem.read + problem.written) / target.memory_rate
    least = product.flops / (GATHERED_SHARE * gemm_estimate.product_rate(product, target))
    best = (implicit_seconds(problem, config, target) for config in implicit_configs(problem, target, 1))
    return any(max(GATHERING * seconds, least) < library for seconds in best)


def _with_patches(problem: ConvProblem, seconds: float, target: Target) -> float:
    """`seconds` of the product, less what its patches take from memory more than the images do."""
    product = problem.product
    repeated = product.m * product.k * product.itemsize - problem.image_bytes
    return max(seconds - max(0, repeated) / target.memory_rate, product.flops / gemm_estimate.product_rate(product, target))
