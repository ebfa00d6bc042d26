"""What the tuner chooses among for one step: the cost model's configurations, printed.

How many are compiled depends on what there is to gain.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from fxopt.codegen import cpp, triton, triton_batch
from fxopt.codegen.direct_stores import loading_ahead, with_direct_stores
from fxopt.codegen.templates import (
    attention_config,
    conv_config,
    gemm_config,
    gemm_estimate,
    gemm_problem,
    scored_config,
    weight_config,
)
from fxopt.codegen.templates.weight_config import DotConfig, VectorConfig
from fxopt.codegen.triton_attention import print_attention
from fxopt.codegen.triton_contraction import (
    print_contraction,
    print_side_by_side,
    problem_of,
    problem_of_all,
    takes_sums,
    with_room,
    with_vectors,
)
from fxopt.codegen.triton_convolution import ConvConfig, convolution_problem, print_convolution
from fxopt.codegen.triton_scored import print_scored
from fxopt.codegen.triton_weights import print_vector, print_weights, takes_vectors, weight_problem
from fxopt.errors import UnsupportedError
from fxopt.ir.exprs import bounds
from fxopt.ir.kernel import Artifact, KernelSource
from fxopt.ir.region import Attention, Batch, BufferSpec, Contraction, Patches, Region, ScoredAttention, SideBySide, Work
from fxopt.lower.cost import nbytes
from fxopt.lower.patches import is_common
from fxopt.options import Options
from fxopt.target import Target
from fxopt.tune.made_up import index_bounds, indexes_indirectly
from fxopt.tune.measure import Trial

CANDIDATES_AT_MOST = 8
"""How many of the cost model's configurations max-autotune compiles and measures."""

WORTH_MEASURING = 1 << 20
"""Bytes: what moves less is bound by its launch, whatever the configuration."""

WORTH_MORE = (32 << 20, 128 << 20)
"""Bytes: a region that moves more than each of these is worth one more candidate, and a second one."""

GEMM_CANDIDATES = {"default": 3, "max-autotune": 12}
"""How many configurations of a product are compiled at most, by mode: each takes half a second of a core. In the cases of
`benchmarks/gemm_model.py` a fourth brought nothing, nor any that the model has further behind than its error."""

ROW_CANDIDATES = {"default": 2, "max-autotune": 4}
"""The same of a product of one row: with and without tensor cores."""

CONVOLUTION_CANDIDATES = {"default": 3, "max-autotune": 8}
"""The same of a convolution."""

SUMS_CANDIDATES = {"default": 1, "max-autotune": 2}
"""The same of the gradient of a depthwise weight: those take two seconds of a core each."""

FEW_BYTES = 8 << 20
"""Of an image: larger ones are worth a launch that lays out the weight of their depthwise convolution."""

MOST_UNROLLED = 16
"""Partial sums that one thread adds up: each is a load in flight."""

ASSUMED_ROWS = (128, 1024, 8192)
"""Numbers of rows at which a product of any number has to be good."""

FAR_ENOUGH = 8
"""Among so many proposals is one that stores to rows as they come, beside those with tiles of rows of equal alignment."""

FAR_BEHIND = 1.3
"""How far behind the best the tiles that read the least again may be: the model takes the L2 cache to be faster than what
products in 8 bits were seen to get of it (6.2 TB/s, H200)."""

MODEL_ERROR = 1.1
"""By how much the cost model of products may be wrong."""

ATTENTION_CANDIDATES = {"default": 3, "max-autotune": 8}
"""How many configurations of attention are compiled, by mode."""


@dataclass(frozen=True)
class Candidate:
    """One way to run a region: kernels in order, with scratch buffers that they share. `label` names the configuration."""

    label: str
    sources: tuple[KernelSource, ...]
    scratch: tuple[BufferSpec, ...] = ()

    @property
    def identity(self) -> tuple[object, ...]:
        """Equal for candidates that run the same code on the same sizes, on whatever buffers."""
        return tuple((s.text, repr(s.compile_options), sizes_of(s)) for s in self.sources)


def sizes_of(source: KernelSource) -> str:
    """Grid and sizes. A size that is a number is the key of a random op, which does not change what the kernel costs."""
    return repr([*source.grid, *(x for x in source.sizes if not isinstance(x, int))])


@dataclass(frozen=True)
class Choice:
    """What runs a region."""

    label: str
    kernels: tuple[tuple[KernelSource, Artifact], ...]
    scratch: tuple[BufferSpec, ...] = ()

    @property
    def trial(self) -> Trial:
        """The choice as something to measure."""
        return Trial(self.label, self.kernels, self.scratch)


def candidates(region: Work, options: Options) -> list[Candidate]:
    """The printed candidates of `region`, best first by the cost model. Raises UnsupportedError when no printer takes it."""
    target = Target.current(region.device)
    if isinstance(region, Contraction):
        return contraction_candidates(region, target, options.mode)
    if isinstance(region, SideBySide):
        return side_by_side_candidates(region, target, options.mode)
    if isinstance(region, Attention):
        return attention_candidates(region, target, options.mode)
    if isinstance(region, ScoredAttention):
        return scored_candidates(region, target, options.mode)
    if isinstance(region, Batch):
        return batch_candidates(region, target, options.mode)
    if region.device.type == "cpu":
        return [Candidate("C++", (cpp.print_nest(region, target),))]
    if region.device.type != "cuda":
        raise UnsupportedError(f"no printer for {region.device.type} kernels")
    return triton_candidates(region, target, options.mode, 1 if options.tuning_seconds == 0 else CANDIDATES_AT_MOST)


def triton_candidates(region: Region, target: Target, mode: str, most: int = CANDIDATES_AT_MOST) -> list[Candidate]:
    """The Triton candidates of `region`, `most` of them at most; `target` need not be a GPU of this machine.

    Raises UnsupportedError without any.
    """
    out: list[Candidate] = []
    reason = "no configuration"
    count = min(candidate_count(region, mode), most)
    if indexes_indirectly(region) and index_bounds(region) is None:
        count = 1  # what cannot be measured on made-up values
    for config in triton.configs(region, target):
        try:
            printed = triton.print_region(region, config, target)
        except UnsupportedError as error:
            reason = error.reason
            continue
        out.append(Candidate(str(config), printed.kernels, printed.scratch))
        if len(out) == count:
            break
    if not out:
        raise UnsupportedError(reason)
    return out


def batch_candidates(batch: Batch, target: Target, mode: str) -> list[Candidate]:
    """As `triton_candidates`, of a batch."""
    configs = triton_batch.batch_candidates(batch, target)[: candidate_count(batch, mode)]
    return [Candidate(str(c), (triton_batch.print_batch(batch, c, target),)) for c in configs]


def contraction_candidates(contraction: Contraction, target: Target, mode: str) -> list[Candidate]:
    """The candidates of `contraction`; none where the library and a kernel for the rest are as good by the cost model, which
    also says which of the best are too close to choose between.

    Raises UnsupportedError when no template takes it.
    """
    if isinstance(contraction.a, Patches):
        return convolution_candidates(contraction, target, mode)
    if contraction.quantized:
        return weight_candidates(contraction, target, mode)
    own = row_candidates(contraction, target, mode) if takes_vectors(contraction) else []
    if contraction.row is not None:
        return own
    problem = problem_of(contraction)
    most = 1 if own else GEMM_CANDIDATES.get(mode, GEMM_CANDIDATES["default"])
    if problem.static:
        ranked = gemm_config.configs(problem, target, limit=most)
        wins = _may_win(problem, ranked[:1], target)
    else:
        ranked, wins = _for_any_rows(contraction, target, most)
    if mode != "max-autotune":
        ranked = _close(problem, ranked, target) if wins else []
    chosen = [with_vectors(contraction, with_room(contraction, config, target)) for config in ranked]
    tailed = [t for c in chosen if (t := gemm_config.with_tail(problem, c, target)) != c]
    chosen += tailed if mode == "max-autotune" else tailed[:1]
    chosen = [c for c in chosen if takes_sums(contraction, c)]
    if chosen and (problem.itemsize == 1 or mode == "max-autotune"):
        best = ranked[: GEMM_CANDIDATES["default"]]
        direct = [d for c in best if (d := with_direct_stores(contraction, problem, c, target)) is not None]
        if direct and mode != "max-autotune":
            chosen = _beside_direct(chosen)
        else:
            chosen += _where_products_are_short(contraction, problem, chosen, target)
        chosen += [*direct, *(loading_ahead(contraction, problem, direct, target) if direct else ())]
    return own + [
        _candidate(str(c), print_contraction(contraction, c, target, unrolled), unrolled)
        for c in dict.fromkeys(chosen)
        for unrolled in _joins(c.split)
    ]


def _beside_direct(chosen: list[gemm_problem.GemmConfig]) -> list[gemm_problem.GemmConfig]:
    """Those of `chosen`, of operands in 8 bits, that are measured beside tiles with direct stores. In persistent programs
    the latter were as fast or faster in all of ResNet-50's products (H200), so one is enough, lest a driver refuse their
    descriptors.
    """
    return chosen[:1] if chosen[0].programs else chosen


def _where_products_are_short(
    contraction: Contraction,
    problem: gemm_problem.GemmProblem,
    chosen: Sequence[gemm_problem.GemmConfig],
    target: Target,
) -> list[gemm_problem.GemmConfig]:
    """What is measured beside `chosen` of operands in 8 bits, with which tensor cores are done so soon that epilogues and
    the L2 cache decide: more programs after one block, the programs of a multiprocessor a tile apart, and the tiles that
    read the least again, the last of them narrow.
    """
    if not problem.static:
        return []
    far = [with_vectors(contraction, c) for c in gemm_config.configs(problem, target, limit=FAR_ENOUGH)]
    most = FAR_BEHIND * min((gemm_estimate.estimate(problem, c, target) for c in far), default=0.0)
    near = [c for c in far if c.split == 1 and gemm_estimate.estimate(problem, c, target) <= most]
    largest = min(near, key=lambda c: c.tiles(problem) * (c.block_m + c.block_n), default=None)
    if largest is not None and any(largest.block_m * largest.block_n <= c.block_m * c.block_n for c in chosen):
        largest = None
    found = [
        next((m for c in chosen if (m := gemm_config.with_more_programs(problem, c, target)) is not None), None),
        next((a for c in far if (a := gemm_config.begun_apart(problem, c, target)) is not None), None),
        largest,
        None if largest is None else gemm_config.with_tail(problem, largest, target),
    ]
    return [c for c in found if c is not None]


def _joins(split: int) -> tuple[bool, ...]:
    """How partial sums may be added up: by a reduction or, of few, unrolled."""
    return (False, True) if 1 < split <= MOST_UNROLLED else (False,)


def _candidate(label: str, printed: triton.Printed, unrolled: bool) -> Candidate:
    return Candidate(f"{label} unrolled" if unrolled else label, printed.kernels, printed.scratch)


def _close(
    problem: gemm_problem.GemmProblem, ranked: Sequence[gemm_problem.GemmConfig], target: Target
) -> list[gemm_problem.GemmConfig]:
    """The first two of `ranked`, best first, and those that the model may have behind the best by mistake. Few rows, whose
    loads it knows less well, keep all.
    """
    if problem.m <= gemm_config.FEW_ROWS or not problem.static:
        return list(ranked)
    if ranked and ranked[0].classes > 1:  # one of each way to store
        return [ranked[0], *(c for c in gemm_config.configs(problem, target, limit=FAR_ENOUGH) if c.classes == 1)][:2]
    most = MODEL_ERROR * min((gemm_estimate.estimate(problem, c, target) for c in ranked), default=0.0)
    return [c for k, c in enumerate(ranked) if k < 2 or gemm_estimate.estimate(problem, c, target) <= most]


def side_by_side_candidates(step: SideBySide, target: Target, mode: str) -> list[Candidate]:
    """As `contraction_candidates`, of products beside each other: none where as many library calls are as good, which they
    are where the tiles of one product already fill the GPU.
    """
    problem, together = problem_of(step.parts[0]), problem_of_all(step)
    most = GEMM_CANDIDATES.get(mode, GEMM_CANDIDATES["default"])
    if any(2 * c.tiles(problem) > target.sm_count for c in gemm_config.configs(problem, target, 1)):
        return []
    found = [c for c in gemm_config.configs(together, target, 4 * most) if c.split == 1 and not c.programs][:most]
    apart = len(step.parts) * gemm_config.library_seconds(problem, target)
    if mode != "max-autotune" and not any(gemm_estimate.estimate(together, c, target) < MODEL_ERROR * apart for c in found):
        return []
    return [Candidate(str(c), print_side_by_side(step, c, target).kernels) for c in found]


def weight_candidates(contraction: Contraction, target: Target, mode: str) -> list[Candidate]:
    """As `contraction_candidates`, of a product with a weight of few bits; none of many rows."""
    found = row_candidates(contraction, target, mode)
    if contraction.row is not None:
        return found
    most = GEMM_CANDIDATES.get(mode, GEMM_CANDIDATES["default"])
    count = most if mode == "max-autotune" else max(0, most - len(found))
    chosen = weight_config.configs(weight_problem(contraction), target, count)
    return found + [Candidate(str(c), (p := print_weights(contraction, c, target)).kernels, p.scratch) for c in chosen]


def row_candidates(contraction: Contraction, target: Target, mode: str) -> list[Candidate]:
    """The candidates of a product of a single row that share what they read of it among rows of the weight; none for more
    rows. A row that is computed has to be in one block, and is by each program: of different numbers of these. Such programs
    on tensor cores fill a multiprocessor's registers, so that each may bring the weights of one that has no room yet.
    """
    problem, most = weight_problem(contraction), ROW_CANDIDATES.get(mode, ROW_CANDIDATES["default"])
    vectors: list[VectorConfig | DotConfig] = [*weight_config.vector_configs(problem, target, 4 * most)]
    dots: list[VectorConfig | DotConfig] = [*weight_config.dot_configs(problem, target, 8 * most)]
    chosen = []
    for configs in (vectors, dots):
        if contraction.row is not None:
            best: dict[int, VectorConfig | DotConfig] = {}
            for config in configs:
                if config.holds_row(problem):
                    best.setdefault(config.rows, config)
            configs = list(best.values())
        chosen += configs[:most]
        ahead = [c for c in (weight_config.bringing(problem, c, target) for c in configs[:most]) if c is not None]
        full = contraction.row is not None and all(isinstance(c, DotConfig) for c in ahead)
        chosen += ahead if full else ahead[:1]
    return [Candidate(str(c), print_vector(contraction, c, target).kernels) for c in chosen]


def convolution_candidates(contraction: Contraction, target: Target, mode: str) -> list[Candidate]:
    """As `contraction_candidates`, of a product of patches."""
    problem = convolution_problem(contraction)
    alone = not problem.epilogue_ops and problem.dtype.itemsize > 1 and not contraction.pooled
    if mode != "max-autotune" and is_common(problem.patches) and alone:
        return []
    most = CONVOLUTION_CANDIDATES.get(mode, CONVOLUTION_CANDIDATES["default"])
    chosen: Sequence[ConvConfig]
    if problem.patches.transposed:
        chosen = conv_config.sums_configs(problem, target, SUMS_CANDIDATES.get(mode, SUMS_CANDIDATES["default"]))
    elif problem.patches.depthwise:
        if problem.is_strided and problem.image_bytes > FEW_BYTES and mode != "max-autotune":
            return []
        chosen = conv_config.stencil_configs(problem, target, most if not problem.is_strided else 2)
    else:
        if mode != "max-autotune" and not conv_config.implicit_may_win(problem, target):
            return []
        found = conv_config.implicit_configs(problem, target, most)
        ours = problem.dtype.itemsize == 1 or problem.pool_places > 1 or conv_config.is_by_rows(problem)
        if mode == "max-autotune" or ours:  # else cuDNN has what they could save
            found += conv_config.box_configs(problem, target)
        chosen = [with_room(contraction, c, target) for c in found]
    return [
        _candidate(str(c), print_convolution(contraction, c, target, unrolled), unrolled)
        for c in dict.fromkeys(chosen)
        for unrolled in _joins(c.split if isinstance(c, gemm_problem.GemmConfig) else 1)
    ]


def attention_candidates(attention: Attention, target: Target, mode: str) -> list[Candidate]:
    """The candidates of `attention`; none where a library kernel is sure to be faster.

    Raises UnsupportedError when Triton generates no code for `target`.
    """
    most = ATTENTION_CANDIDATES.get(mode, ATTENTION_CANDIDATES["default"])
    if mode != "max-autotune" and not attention_config.may_win(attention, target):
        return []
    chosen = attention_config.configs(attention, target, limit=most)
    chosen += attention_config.bounded(attention, chosen)
    return [Candidate(str(c), (p := print_attention(attention, c, target)).kernels, p.scratch) for c in chosen]


def scored_candidates(attention: ScoredAttention, target: Target, mode: str) -> list[Candidate]:
    """The candidates of an op of attention in training.

    Raises UnsupportedError when Triton generates no code for `target`.
    """
    chosen = scored_config.configs(attention, target, ATTENTION_CANDIDATES.get(mode, ATTENTION_CANDIDATES["default"]))
    return [Candidate(str(c), (print_scored(attention, c, target),)) for c in chosen]


def _for_any_rows(contraction: Contraction, target: Target, most: int) -> tuple[list[gemm_problem.GemmConfig], bool]:
    """(configurations for a number of rows that is known only at run time, whether the first may win whatever it is).

    One kernel serves all sizes and is measured at one, so those come first that are never much slower than the best one at
    a size; and each size has to be one at which the library may lose.
    """
    low, high = bounds(contraction.sizes[1])
    sizes = [r for r in ASSUMED_ROWS if (low or 0) <= r <= (r if high is None else high)] or [max(low or 1, 1)]
    problems = [problem_of(contraction, rows) for rows in sizes]
    found = [c for c in gemm_config.plausible(problems[-1], target) if c.split == 1]
    best = [min((gemm_estimate.estimate(p, c, target) for c in found), default=0.0) for p in problems]

    def worst(config: gemm_problem.GemmConfig) -> float:
        return max(gemm_estimate.estimate(p, config, target) / b for p, b in zip(problems, best, strict=True))

    ranked = sorted(found, key=worst)[:most]
    return ranked, all(_may_win(p, ranked[:1], target) for p in problems)


def _may_win(problem: gemm_problem.GemmProblem, proposed: Sequence[gemm_problem.GemmConfig], target: Target) -> bool:
    """Whether one of `proposed`, with what an estimate may be wrong by, beats the library and a kernel for the rest."""
    if problem.itemsize == 1:
        return True  # the model was fitted to 16-bit operands, and the library's call is not all that its way runs
    if not problem.epilogue_ops and problem.m > gemm_config.FEW_ROWS and problem.describable:
        return False  # nothing to save, and the library is at its best
    apart = gemm_config.library_seconds(problem, target)
    if problem.epilogue_ops:  # else the epilogue is a store, which the library does
        result = problem.products * problem.batch * problem.m * problem.n * problem.itemsize
        apart += gemm_estimate.SECOND_LAUNCH_SECONDS + (result + problem.read + problem.written) / target.memory_rate
    return any(gemm_estimate.estimate(problem, c, target) < MODEL_ERROR * apart for c in proposed)


def candidate_count(region: Work, mode: str) -> int:
    """How many configurations to compile: the cost model is surer about element-wise nests than about reductions."""
    if mode == "max-autotune":
        return CANDIDATES_AT_MOST
    moved = sum(nbytes(spec) for spec in region.buffers.values())
    if 0 < moved < WORTH_MEASURING:
        return 1
    more = sum(moved >= worth for worth in WORTH_MORE)
    if isinstance(region, Region) and region.across is not None:
        return more + 4
    return more + (3 if isinstance(region, Region) and region.nest.reduced else 2)
