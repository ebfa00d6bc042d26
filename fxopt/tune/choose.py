"""Every region's kernels: candidates are printed, compiled together in workers, and the fastest is kept and remembered.

Regions whose candidates are equal (the layers of a model) are one contest: printed texts are canonical, so they are compiled
once and measured once, and all take the same choice.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch

from fxopt.codegen import triton_batch
from fxopt.codegen.compile import compile_kernels
from fxopt.errors import UnsupportedError
from fxopt.ir.kernel import Artifact, CompileFailure, KernelSource
from fxopt.ir.region import Alternatives, Batch, Call, Contraction, Region
from fxopt.journal import Journal
from fxopt.lower import Lowered
from fxopt.lower.contractions import replaced
from fxopt.options import Options
from fxopt.runtime.artifacts import ArtifactStore
from fxopt.target import Target
from fxopt.tune.alternatives import settle
from fxopt.tune.candidate import Candidate, Choice, Work, candidates, sizes_of
from fxopt.tune.contest import decide
from fxopt.tune.made_up import index_bounds
from fxopt.tune.measure import METHOD, Measurements, Memory, Trial, assumed_sizes
from fxopt.tune.records import RecordKey
from fxopt.tune.suspects import Suspects
from fxopt.tune.twins import Printer

BUDGET_SECONDS = {"default": 5.0, "reduce-overhead": 5.0, "max-autotune": 30.0}
"""Time for measuring in one graph, by mode; contests past it take the cost model's first candidate."""

SAMPLE_BYTES = 256 << 20
"""As much of a batch is measured."""

PRODUCT_EFFORT = 20000
"""Characters of a text that takes as long to compile as the few lines that call a product's template."""

log = logging.getLogger(__name__)


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
) -> tuple[Lowered, dict[str, Choice], list[tuple[Region | Batch, str]]]:
    """(`lowered` without alternatives, the choice for each of its regions, batches and contractions by name, the regions and
    batches that nothing could be built for with the reason).
    """
    alternatives = [s for s in lowered.steps if isinstance(s, Alternatives)]
    first = [s for each in alternatives for s in each.ways[0].steps]
    others = [s for each in alternatives for way in each.ways[1:] for s in way.steps if not isinstance(s, Call)]
    with journal.timed("kernels: printing"):
        printed, failed = _print([s for s in (*lowered.steps, *first) if isinstance(s, Region | Batch)], options)
        also, _ = _print(others, options)
        contests, optional = _grouped(printed), _grouped(also)
    with journal.timed("kernels: compiling"):
        for device in dict.fromkeys(c.region.device for c in (*contests, *optional)):
            here = [c for c in (*contests, *optional) if c.region.device == device]
            _build(here, Target.current(device), store, journal)
    with journal.timed("kernels: measuring"):
        budget = BUDGET_SECONDS[options.mode] if options.tuning_seconds is None else options.tuning_seconds
        measurements = Measurements(journal, budget, Suspects(store.cache))
        winners = {id(c): _fastest(c, store, measurements) for c in contests if c.built}
        chosen: dict[str, Choice] = {}
        for contest, region, own in _places(contests, printed):
            if contest.built:
                chosen[region.name] = _adopted(winners[id(contest)], own)
            else:
                failed.append((region, "; ".join(dict.fromkeys(contest.reasons)) or "no candidate"))
        if failed:
            return lowered, {}, failed
        built = {region.name: [_adopted(c, own) for c in contest.built] for contest, region, own in _places(optional, also)}
        settled = settle(alternatives, chosen, built, store, measurements, journal)
    for name, kept in settled.items():
        chosen.pop(name, None)
        chosen |= kept.choices
    return replaced(lowered, {name: kept.way for name, kept in settled.items()}), chosen, []


def _places(
    contests: Sequence[_Contest], printed: Sequence[tuple[Work, list[Candidate]]]
) -> Iterator[tuple[_Contest, Work, list[Candidate]]]:
    """Each region with its contest and its own candidates."""
    of = {region.name: contest for contest in contests for region in contest.regions}
    return ((of[region.name], region, own) for region, own in printed)


def _print(regions: Sequence[Work], options: Options) -> tuple[list[tuple[Any, list[Candidate]]], list[tuple[Any, str]]]:
    printed: list[tuple[Work, list[Candidate]]] = []
    failed: list[tuple[Work, str]] = []
    printer = Printer(lambda region: candidates(region, options))
    for region in regions:
        try:
            own = printer(region) if isinstance(region, Region) else candidates(region, options)
            printed.append((region, own))
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


def _build(contests: Sequence[_Contest], target: Target, store: ArtifactStore, journal: Journal) -> None:
    """Compile every candidate of every contest in one go, those that take longest first, lest all wait for the last one."""
    effort = {id(s): -_effort(c.region, s) for c in contests for candidate in c.candidates for s in candidate.sources}
    sources = [s for c in contests for candidate in c.candidates for s in candidate.sources]
    sources.sort(key=lambda s: effort[id(s)])
    texts = len({s.text for s in sources})
    log.info("%s: compiling %d kernels (%d texts) for %d regions", journal.graph, len(sources), texts, len(contests))
    suspects = Suspects(store.cache)
    compiled = [_unsuspected(made, suspects, journal) for made in compile_kernels(sources, target, store)]
    results = dict(zip(map(id, sources), compiled, strict=True))
    for contest in contests:
        for candidate in contest.candidates:
            built = [(s, results[id(s)]) for s in candidate.sources]
            reasons = [r.reason for _, r in built if isinstance(r, CompileFailure)]
            contest.reasons += reasons
            if not reasons:
                kernels = tuple((s, a) for s, a in built if isinstance(a, Artifact))
                contest.built.append(Choice(candidate.label, kernels, candidate.scratch))


def _unsuspected(made: Artifact | CompileFailure, suspects: Suspects, journal: Journal) -> Artifact | CompileFailure:
    """`made`, or why it must not run: it has hung or ended a process before."""
    if isinstance(made, CompileFailure) or made.language != "triton" or (reason := suspects.reason(made.key)) is None:
        return made
    journal.note("tuning", f"{made.entry}: no candidate, {reason}")
    return CompileFailure(made.key, reason)


def _effort(work: Work, source: KernelSource) -> int:
    """An order of how long `source` takes to compile: products take several times as long as others, which go by length."""
    return len(source.text) + (PRODUCT_EFFORT if isinstance(work, Contraction) else 0)


def _fastest(contest: _Contest, store: ArtifactStore, measurements: Measurements) -> Choice:
    """The fastest built choice: from the records, or measured now. One choice alone needs no measuring."""
    usable = [c for c in contest.built if not _spills(c)] or contest.built
    if len(usable) == 1 or contest.region.device.type != "cuda":
        return usable[0]
    region = contest.region
    key = RecordKey("region", _facts(region, usable, Target.current(region.device)))
    found = decide(key, region.name, *_measurable(region, usable), store, measurements)
    return usable[0] if found is None else next(c for c in usable if c.label == found[0])


def _measurable(region: Work, usable: Sequence[Choice]) -> tuple[Memory, torch.device, list[Trial]]:
    """The memory that trials of `usable` need, where, and the trials: of a batch, whose members may fill the memory, on a
    part."""
    if not isinstance(region, Batch):
        return _memory(region), region.device, [c.trial for c in usable]
    sample = region.sample(SAMPLE_BYTES)
    sources = [tuple((triton_batch.for_members(s, sample), a) for s, a in choice.kernels) for choice in usable]
    trials = [Trial(c.label, kernels, c.scratch) for c, kernels in zip(usable, sources, strict=True)]
    return Memory(sample.buffers), region.device, trials


def _memory(region: Work) -> Memory:
    bounds = index_bounds(region) if isinstance(region, Region) else None
    return Memory(region.buffers, bounds or {})


def _facts(region: Work, usable: Sequence[Choice], target: Target) -> dict[str, object]:
    """Everything that a contest's result depends on; the kernels' keys hold texts, configurations and compiler versions."""
    return {
        "kernels": [[artifact.key for _, artifact in c.kernels] for c in usable],
        "sizes": [[sizes_of(source) for source, _ in c.kernels] for c in usable],
        "assumed": assumed_sizes(_memory(region), [c.trial for c in usable]),
        "device": target.name,
        "torch": torch.__version__,
        "method": METHOD,
    }


def _spills(choice: Choice) -> bool:
    return any(int(artifact.meta.get("n_spills", 0)) > 0 for _, artifact in choice.kernels)
