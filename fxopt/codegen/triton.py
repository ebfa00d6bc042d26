"""The Triton printer: regions of the loop IR as kernels for NVIDIA GPUs.

`configs` proposes launch configurations, `print_region` prints one. Most regions are one kernel; a reduction with `split`
above 1 is several, run in order, that share scratch buffers. Texts are canonical: identical layers give identical kernels.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import torch

from fxopt.codegen.configs.propose import configs
from fxopt.codegen.configs.reductions import join_config
from fxopt.codegen.triton_across import together
from fxopt.codegen.triton_apart import apart, statistics_first
from fxopt.codegen.triton_config import TritonConfig
from fxopt.codegen.triton_nest import print_kernel
from fxopt.codegen.triton_split import split_region, turning
from fxopt.codegen.triton_tiling import tile
from fxopt.errors import UnsupportedError
from fxopt.ir.kernel import KernelSource
from fxopt.ir.region import BufferSpec, Region
from fxopt.target import Target

__all__ = ["Printed", "TritonConfig", "configs", "print_nest", "print_region"]


_ALL = 32
"""More configurations than are proposed for any region."""

_LONG_LOOP = 4
"""Steps of a loop from which on it is worth one, rather than all loads at once."""


@dataclass(frozen=True)
class Printed:
    """Kernels to launch in order, and scratch buffers (contiguous, needed from the first kernel to the last)."""

    kernels: tuple[KernelSource, ...]
    scratch: tuple[BufferSpec, ...] = ()


def print_nest(region: Region, config: TritonConfig, target: Target, stage: str | None = None) -> KernelSource:
    """`region` as one kernel; `config.split` must be 1. `stage` replaces the shape in the name of a split reduction's part.

    Raises UnsupportedError when Triton has no form for the nest (dtypes, atomics, `target` too old) `config` does not fit.
    """
    if not target.compiles_triton:
        raise UnsupportedError(f"Triton does not generate code for {target.name}")
    refuse_unknown_types(region.buffers, target)
    if config.split != 1:
        raise UnsupportedError("a split reduction takes several kernels: use print_region")
    return print_kernel(region, config, stage)


def refuse_unknown_types(buffers: Mapping[str, BufferSpec], target: Target) -> None:
    """Raises UnsupportedError if one of `buffers` has elements that Triton does not have on `target`."""
    if not target.has_float8 and any(spec.dtype == torch.float8_e4m3fn for spec in buffers.values()):
        raise UnsupportedError(f"Triton has no float8_e4m3fn on {target.name}")


def print_region(region: Region, config: TritonConfig, target: Target) -> Printed:
    """`region` in configuration `config`.

    The parts of a split configuration are regions with configurations of their own; its shape says which proposal for them.
    Raises UnsupportedError as `print_nest` does, or when the reduction cannot be split.
    """
    if region.across is not None:
        return _print_across(region, config, target)
    if config.split == 1:
        return Printed((print_nest(region, config, target),))
    pieces = split_region(region, config.split)
    if pieces is None:
        raise UnsupportedError("this reduction cannot be split")
    kernels = []
    for piece in turning(region, pieces):
        stage = piece.name.rpartition(".")[2]
        best = join_config(piece, target) if stage == "join" else _piece_config(region, piece, config, target)
        kernels.append(print_nest(piece, replace(best, aligned=config.aligned), target, stage))
    scratch = {n: s for piece in pieces for n, s in piece.buffers.items() if n not in region.buffers}
    return Printed(tuple(kernels), tuple(scratch.values()))


def _piece_config(region: Region, piece: Region, config: TritonConfig, target: Target) -> TritonConfig:
    """The shape of `config`, a split of `region`, where `piece` is a long loop along rows as well. For others what the cost
    model proposes for them at the place that this shape has among its proposals for the whole."""
    shape, tiling = replace(config, split=1, aligned=True), tile(piece, "flat")
    loops = shape.x_block == 1 and not shape.persistent and tiling.inner_reduction
    if loops and tiling.r.hint >= _LONG_LOOP * shape.r_block:
        return shape
    whole, proposed = ([c for c in configs(r, target, _ALL) if c.split == 1 and not c.programs] for r in (region, piece))
    place = whole.index(shape) if shape in whole else 0
    best = proposed[min(place, len(proposed) - 1)]
    return best if shape in whole or best.persistent else replace(best, stages=config.stages)


def _print_across(region: Region, config: TritonConfig, target: Target) -> Printed:
    """Rows and sums over them in one kernel and one that joins its parts; or what the rows reduce to first; or apart."""
    if config.statistics:
        pieces = statistics_first(region)
        if pieces is None:
            raise UnsupportedError("the sums over the rows need nothing that the rows reduce to")
        return _in_turn(region, pieces, (None, replace(config, statistics=False)), config.aligned, target)
    if config.split == 1:
        pieces = apart(region)
        turning = (c for c in configs(pieces[0], target) if c.programs and config.stages > 1)
        return _in_turn(region, pieces, (next(turning, None), None), config.aligned, target)
    rows, join = together(region, config)
    refuse_unknown_types(rows.buffers, target)
    first = print_kernel(rows, config, "rows")
    second = print_nest(join, replace(join_config(join, target), aligned=config.aligned), target, "join")
    return Printed((first, second), tuple(s for n, s in rows.buffers.items() if n not in region.buffers))


def _in_turn(
    whole: Region, pieces: Sequence[Region], given: Sequence[TritonConfig | None], aligned: bool, target: Target
) -> Printed:
    """The kernels of `pieces`, each in the configuration `given` or the cost model's first."""
    each = [
        print_region(piece, replace(config or configs(piece, target)[0], aligned=aligned), target)
        for piece, config in zip(pieces, given, strict=True)
    ]
    scratch = {n: s for piece in pieces for n, s in piece.buffers.items() if n not in whole.buffers}
    own = [spec for printed in each for spec in printed.scratch]
    return Printed(tuple(k for printed in each for k in printed.kernels), (*scratch.values(), *own))
