"""Every region's kernels: candidates are printed, compiled together in workers, and the fastest is kept and remembered.

Regions whose candidates are equal (the layers of a model) are one contest: printed texts are canonical, so they are compiled
once and measured once, and all take the same choice.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass, field, replace

import torch

from fxopt.codegen import cpp, triton, triton_batch
from fxopt.codegen.compile import compile_kernels
from fxopt.errors import UnsupportedError
from fxopt.ir.kernel import Artifact, CompileFailure, KernelSource
from fxopt.ir.region import Batch, BufferSpec, Region
from fxopt.journal import Journal
from fxopt.lower import Lowered
from fxopt.lower.cost import nbytes
from fxopt.options import Options
from fxopt.runtime.artifacts import ArtifactStore
from fxopt.target import Target
from fxopt.tune.measure import METHOD, Measurements, assumed_sizes
from fxopt.tune.records import RecordKey, Records

CANDIDATES_AT_MOST = 8
"""How many of the cost model's configurations max-autotune compiles and measures."""

WORTH_MEASURING = 1 << 20
"""Bytes: what moves less is bound by its launch, whatever the configuration."""

WORTH_MORE = 256 << 20
"""Bytes: a region that moves more is worth two more candidates."""

BUDGET_SECONDS = {"default": 5.0, "reduce-overhead": 5.0, "max-autotune": 30.0}
"""Time for measuring in one graph, by mode; contests past it take the cost model's first candidate."""

log = logging.getLogger(__name__)


SAMPLE_BYTES = 256 << 20
"""As much of a batch is measured."""

Work = Region | Batch
"""What becomes kernels."""


@dataclass(frozen=True)
class Candidate:
    """One way to run a region: kernels in order, with scratch buffers that they share. `label` names the configuration."""

    label: str
    sources: tuple[KernelSource, ...]
    scratch: tuple[BufferSpec, ...] = ()

    @property
    def identity(self) -> tuple[object, ...]:
        """Equal for candidates that run the same code on the same sizes, on whatever buffers."""
        return tuple((s.text, repr(s.compile_options), _sizes(s)) for s in self.sources)


@dataclass(frozen=True)
class Choice:
    """What runs a region."""

    label: str
    kernels: tuple[tuple[KernelSource, Artifact], ...]
    scratch: tuple[BufferSpec, ...] = ()


@dataclass
class _Contest:
    """Candidates, and the regions that have just these."""

    regions: list[Work]
    candidates: list[Candidate]
    built: list[Choice] = field(default_factory=list)
    reasons: list[str] = field(default_factory=list)

    @property
    def region(self) -> Work:
        return self.regions[0]


def choose(
    lowered: Lowered, options: Options, store: ArtifactStore, journal: Journal
) -> tuple[dict[str, Choice], list[tuple[Work, str]]]:
    """(the choice for each region by name, the regions that nothing could be built for with the reason)."""
    with journal.timed("kernels: printing"):
        printed, failed = _print([s for s in lowered.steps if isinstance(s, Region | Batch)], options)
        contests = _grouped(printed)
    with journal.timed("kernels: compiling"):
        for device in dict.fromkeys(c.region.device for c in contests):
            _build([c for c in contests if c.region.device == device], Target.current(device), store, journal)
    with journal.timed("kernels: measuring"):
        budget = BUDGET_SECONDS[options.mode] if options.tuning_seconds is None else options.tuning_seconds
        measurements = Measurements(journal, budget)
        winners = [_fastest(contest, store, measurements) if contest.built else None for contest in contests]
    places = {region.name: k for k, contest in enumerate(contests) for region in contest.regions}
    chosen: dict[str, Choice] = {}
    for region, own in printed:
        contest, winner = contests[places[region.name]], winners[places[region.name]]
        if winner is None:
            failed.append((region, "; ".join(dict.fromkeys(contest.reasons)) or "no candidate"))
        else:
            chosen[region.name] = _adopted(winner, own)
    return chosen, failed


def _print(regions: Sequence[Work], options: Options) -> tuple[list[tuple[Work, list[Candidate]]], list[tuple[Work, str]]]:
    printed: list[tuple[Work, list[Candidate]]] = []
    failed: list[tuple[Work, str]] = []
    for region in regions:
        try:
            printed.append((region, candidates(region, options)))
        except UnsupportedError as error:
            failed.append((region, error.reason))
    return printed, failed


def _grouped(printed: Sequence[tuple[Work, list[Candidate]]]) -> list[_Contest]:
    """One contest for all regions that print the same kernels for the same sizes."""
    contests: dict[object, _Contest] = {}
    for region, own in printed:
        key = (region.device, tuple(c.identity for c in own))
        contests.setdefault(key, _Contest([], own)).regions.append(region)
    return list(contests.values())


def _adopted(winner: Choice, own: Sequence[Candidate]) -> Choice:
    """`winner`, found for an equal region, with this region's buffers."""
    candidate = next(c for c in own if c.label == winner.label)
    artifacts = (artifact for _, artifact in winner.kernels)
    return replace(winner, kernels=tuple(zip(candidate.sources, artifacts, strict=True)), scratch=candidate.scratch)


def candidates(region: Work, options: Options) -> list[Candidate]:
    """The printed candidates of `region`, best first by the cost model. Raises UnsupportedError when no printer takes it."""
    target = Target.current(region.device)
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
    for config in triton.configs(region, target):
        try:
            printed = triton.print_region(region, config, target)
        except UnsupportedError as error:
            reason = error.reason
            continue
        out.append(Candidate(str(config), printed.kernels, printed.scratch))
        if len(out) == count or _depends_on_indices(region, printed.kernels):
            break
    if not out:
        raise UnsupportedError(reason)
    return out


def batch_candidates(batch: Batch, target: Target, mode: str) -> list[Candidate]:
    """As `triton_candidates`, of a batch."""
    configs = triton_batch.batch_candidates(batch, target)[: candidate_count(batch, mode)]
    return [Candidate(str(c), (triton_batch.print_batch(batch, c, target),)) for c in configs]


def _depends_on_indices(region: Region, kernels: Sequence[KernelSource]) -> bool:
    """Whether measuring on made-up data makes no sense, so that one candidate is enough: a check of indices may end the CUDA
    context, and additions all to one place take a time of their own."""
    if any(kernel.errors for kernel in kernels):
        return True
    return any(store.mode == "add" and store.indirect for nest in region.nests for store in nest.stores)


def candidate_count(region: Work, mode: str) -> int:
    """How many configurations to compile: the cost model is surer about element-wise nests than about reductions."""
    if mode == "max-autotune":
        return CANDIDATES_AT_MOST
    moved = sum(nbytes(spec) for spec in region.buffers.values())
    if 0 < moved < WORTH_MEASURING:
        return 1
    more = 0 if moved < WORTH_MORE else 2
    if isinstance(region, Region) and region.across is not None:
        return more + 4
    return more + (3 if isinstance(region, Region) and region.nest.reduced else 2)


def _build(contests: Sequence[_Contest], target: Target, store: ArtifactStore, journal: Journal) -> None:
    """Compile every candidate of every contest in one go, the longest texts first: they take longest."""
    sources = [s for c in contests for candidate in c.candidates for s in candidate.sources]
    sources.sort(key=lambda s: -len(s.text))
    texts = len({s.text for s in sources})
    log.info("%s: compiling %d kernels (%d texts) for %d regions", journal.graph, len(sources), texts, len(contests))
    results = dict(zip(map(id, sources), compile_kernels(sources, target, store), strict=True))
    for contest in contests:
        for candidate in contest.candidates:
            built = [(s, results[id(s)]) for s in candidate.sources]
            reasons = [r.reason for _, r in built if isinstance(r, CompileFailure)]
            contest.reasons += reasons
            if not reasons:
                kernels = tuple((s, a) for s, a in built if isinstance(a, Artifact))
                contest.built.append(Choice(candidate.label, kernels, candidate.scratch))


def _fastest(contest: _Contest, store: ArtifactStore, measurements: Measurements) -> Choice:
    """The fastest built choice: from the records, or measured now. One choice alone needs no measuring."""
    usable = [c for c in contest.built if not _spills(c)] or contest.built
    if len(usable) == 1 or contest.region.device.type != "cuda":
        return usable[0]
    target = Target.current(contest.region.device)
    records = Records(store.cache, target.key)
    key = RecordKey("region", _facts(contest.region, usable, target))
    found = records.get(key)
    labels = [c.label for c in usable]
    if found is None or found.get("winner") not in labels:
        seconds = measurements.compare(*_measurable(contest.region, usable))
        if seconds is None:
            return usable[0]
        figures = {label: s for label, s in zip(labels, seconds, strict=True) if s < float("inf")}
        found = {"winner": _winner(labels, seconds), "seconds": figures}
        records.put(key, found)
    return usable[labels.index(str(found["winner"]))]


def _measurable(region: Work, usable: Sequence[Choice]) -> tuple[Work, Sequence[Choice]]:
    """What stands for `region` and its choices in measuring: of a batch, whose members may fill the memory, a part."""
    if isinstance(region, Region):
        return region, usable
    sample = region.sample(SAMPLE_BYTES)
    sources = [[(triton_batch.for_members(s, sample), a) for s, a in choice.kernels] for choice in usable]
    return sample, [replace(c, kernels=tuple(kernels)) for c, kernels in zip(usable, sources, strict=True)]


def _facts(region: Work, usable: Sequence[Choice], target: Target) -> dict[str, object]:
    """Everything that a contest's result depends on; the kernels' keys hold texts, configurations and compiler versions."""
    return {
        "kernels": [[artifact.key for _, artifact in c.kernels] for c in usable],
        "sizes": [[_sizes(source) for source, _ in c.kernels] for c in usable],
        "assumed": assumed_sizes(region, usable),
        "device": target.name,
        "torch": torch.__version__,
        "method": METHOD,
    }


def _sizes(source: KernelSource) -> str:
    """Grid and sizes. A size that is a number is the key of a random op, which does not change what the kernel costs."""
    return repr([*source.grid, *(x for x in source.sizes if not isinstance(x, int))])


NOISE = 0.03
"""A later candidate must beat the cost model's first by more than this: ties go to the first, choices are stable."""


def _winner(labels: Sequence[str], seconds: Sequence[float]) -> str:
    best = min(range(len(labels)), key=lambda k: seconds[k])
    return labels[best] if seconds[best] < seconds[0] * (1 - NOISE) else labels[0]


def _spills(choice: Choice) -> bool:
    return any(int(artifact.meta.get("n_spills", 0)) > 0 for _, artifact in choice.kernels)
