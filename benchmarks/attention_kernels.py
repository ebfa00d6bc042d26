"""fxopt's own attention kernels as contenders of `benchmarks.attention_micro`, each configuration by itself."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from fxopt.codegen.compile import compile_kernels
from fxopt.codegen.templates.attention_config import AttentionConfig, bounded, estimate, ranked
from fxopt.codegen.triton_attention import print_attention
from fxopt.ir.attention_backends import Inputs
from fxopt.ir.kernel import Artifact
from fxopt.ir.region import Attention, BufferSpec, Strided
from fxopt.runtime.artifacts import ArtifactStore
from fxopt.target import Target
from fxopt.tune.candidate import Choice
from fxopt.tune.measure import Run, runner

NAMES = ("query", "key", "value", "mask", "out")


@dataclass(frozen=True)
class Contender:
    """A configuration that was built; `run` stores into `out` [B, H, S, E]. `estimate` is the cost model's, in seconds."""

    config: AttentionConfig
    run: Run
    out: Tensor
    estimate: float
    registers: int
    spills: int


def step_of(x: Inputs, out: Tensor, device: torch.device | None = None) -> Attention:
    """`x` as a step of kernels that store into `out`; buffers are called by `NAMES`. On `device`, if not where `x` is."""
    mask = None if x.mask is None else x.mask.expand(*x.query.shape[:3], x.key.shape[2])
    given = dict(zip(NAMES, (x.query, x.key, x.value, mask, out), strict=True))
    tensors = {n: t for n, t in given.items() if t is not None}
    where = device or out.device
    views = {n: Strided(n, tuple(t.shape), _strides(t), int(t.storage_offset())) for n, t in tensors.items()}
    specs = {n: BufferSpec(n, t.dtype, where, (1,), (1,)) for n, t in tensors.items()}
    operands = (views["query"], views["key"], views["value"], views.get("mask"), views["out"])
    return Attention("attention", *operands, x.settings.is_causal, x.scaling, specs)


def _strides(x: Tensor) -> tuple[int, ...]:
    """Those of `x`, 0 where there is one element only, as lowering has a mask's."""
    return tuple(0 if size == 1 else stride for size, stride in zip(x.shape, x.stride(), strict=True))


def memory_of(x: Inputs, out: Tensor) -> dict[str, Tensor]:
    """The memory of the buffers of `step_of`, each flat."""
    tensors = dict(zip(NAMES, (x.query, x.key, x.value, x.mask, out), strict=True))
    return {
        n: t.as_strided((t.untyped_storage().nbytes() // t.itemsize,), (1,), 0) for n, t in tensors.items() if t is not None
    }


def choose_configs(attention: Attention, target: Target, count: int) -> list[AttentionConfig]:
    """The cost model's order, cut to the best three of each tile and number of parts, and for caches the first one bounded:
    at most `count`.
    """
    taken: dict[object, int] = {}
    chosen: list[AttentionConfig] = []
    for config in ranked(attention, target):
        kind = (config.block_m, config.block_n, config.warps, config.stages)
        taken[kind] = taken.get(kind, 0) + 1
        if taken[kind] <= 3 and len(chosen) < count:
            chosen.append(config)
    more = bounded(attention, chosen)
    return chosen[: count - len(more)] + more


def contenders(x: Inputs, target: Target, store: ArtifactStore, count: int) -> list[Contender]:
    """Up to `count` configurations, compiled together. What does not compile or load is left out."""
    out = torch.empty_like(x.query)
    attention = step_of(x, out)
    printed = [(c, print_attention(attention, c, target)) for c in choose_configs(attention, target, count)]
    sources = [s for _, p in printed for s in p.kernels]
    built = dict(zip(map(id, sources), compile_kernels(sources, target, store), strict=True))
    found = []
    for config, p in printed:
        kernels = [(s, a) for s in p.kernels if isinstance(a := built[id(s)], Artifact)]
        if len(kernels) < len(p.kernels):
            continue
        run = runner(Choice(str(config), tuple(kernels), p.scratch).trial, memory_of(x, out), {})
        meta = kernels[0][1].meta
        if run is not None:
            spent = (int(meta["n_regs"]), int(meta["n_spills"]))
            found.append(Contender(config, run, out, estimate(attention, config, target), *spent))
    return found
