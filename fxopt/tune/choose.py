"""Every region's kernels: candidates are printed, compiled together in workers, and the fastest is kept and remembered.

Regions whose candidates are equal (the layers of a model) are one contest: printed texts are canonical, so they are compiled
once and measured once, and all take the same choice.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch

from fxopt.codegen import triton_batch
from fxopt.codegen.compile import compile_kernels
from fxopt.errors import UnsupportedError
from fxopt.ir.kernel import Artifact, CompileFailure, KernelSource
from fxopt.ir.region import Alternatives, Attention, Batch, Call, Contraction, Region
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

PRINTING, COMPILING = "kernels: printing", "kernels: compiling"

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

    @property
    def sources(self) -> list[KernelSource]:
        return [s for candidate in self.candidates for s in candidate.sources]

    def take(self, results: Mapping[int, Artifact | CompileFailure], journal: Journal) -> None:
        """Note which candidates were built, and why others were not. `results` are of sources, by identity."""
        for candidate in self.candidates:
            made = [(s, results[id(s)]) for s in candidate.sources]
            reasons = [r.reason for _, r in made if isinstance(r, CompileFailure)]
            self.reasons += reasons
            for reason in reasons:
                journal.note("tuning", f"{self.region.name}: {candidate.label} is no candidate: {reason}")
            if not reasons:
                kernels = tuple((s, a) for s, a in made if isinstance(a, Artifact))
                self.built.append(Choice(candidate.label, kernels, candidate.scratch))


def choose(
    lowered: Lowered, options: Options, store: ArtifactStore, journal: Journal
) -> tuple[Lowered, dict[str, Choice], list[tuple[Region | Batch, str]]]:
    """(`lowered` without alternatives, the choice for each of its regions, batches and contractions by name, the regions and
    batches that nothing could be built for with the reason).
    """
    alternatives = [s for s in lowered.steps if isinstance(s, Alternatives)]
    first = [s for each in alternatives for s in each.ways[0].steps]
    others = [s for each in alternatives for way in each.ways[1:] for s in way.steps if not isinstance(s, Call)]
    needed = [s for s in (*lowered.steps, *first) if isinstance(s, Region | Batch)]
    build = _Build(options, store, journal)
    for device in dict.fromkeys(work.device for work in (*others, *needed)):
        build.on(device, [w for w in others if w.device == device], [w for w in needed if w.device == device])
    printed, failed, also = build.printed, build.failed, build.also
    contests, optional = build.contests, build.optional
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
        built = {
            region.name: [_adopted(c, own) for c in _usable(contest)] for contest, region, own in _places(optional, also)
        }
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


class _Build:
    """Candidates of regions, batches and contractions: printed, and compiled while the next ones are printed."""

    def __init__(self, options: Options, store: ArtifactStore, journal: Journal) -> None:
        self.options, self.store, self.journal = options, store, journal
        self.printed: list[tuple[Work, list[Candidate]]] = []
        self.also: list[tuple[Work, list[Candidate]]] = []
        self.failed: list[tuple[Any, str]] = []
        self.contests: list[_Contest] = []
        self.optional: list[_Contest] = []

    def on(self, device: torch.device, others: Sequence[Work], needed: Sequence[Work]) -> None:
        """Build the steps of other ways than the first (`others`), and those that are `needed`, on one device."""
        sources: list[KernelSource] = []
        printing = self.journal.seconds.get(PRINTING, 0.0)
        with self.journal.timed(COMPILING):
            made = compile_kernels(self._sources(others, needed, sources), Target.current(device), self.store)
        self.journal.seconds[COMPILING] -= self.journal.seconds.get(PRINTING, 0.0) - printing
        suspects = Suspects(self.store.cache)
        compiled = [_unsuspected(result, suspects) for result in made]
        results = dict(zip(map(id, sources), compiled, strict=True))
        texts = len({s.text for s in sources})
        log.info("%s: %d kernels (%d texts) on %s", self.journal.graph, len(sources), texts, device)
        for contest in (*self.contests, *self.optional):
            if contest.region.device == device:
                contest.take(results, self.journal)

    def _sources(self, others: Sequence[Work], needed: Sequence[Work], given: list[KernelSource]) -> Iterator[KernelSource]:
        """Every candidate's kernels, also noted in `given`. Those that take longest come first, lest all wait for the last:
        products, which are among `others`, take several times as long as the rest, which goes by length."""
        known: dict[object, _Contest] = {}
        for region, own in self._printed(others, []):
            self.also.append((region, own))
            contest = _put(known, region, own)
            if contest is not None:
                self.optional.append(contest)
                given += contest.sources
                yield from contest.sources
        printed = list(self._printed(needed, self.failed))
        self.printed += printed
        known = {}
        contests = [contest for region, own in printed if (contest := _put(known, region, own)) is not None]
        self.contests += contests
        sources = sorted((s for c in contests for s in c.sources), key=lambda s: -len(s.text))
        given += sources
        yield from sources

    def _printed(self, works: Sequence[Work], failed: list[tuple[Any, str]]) -> Iterator[tuple[Work, list[Candidate]]]:
        """Each of `works` with its candidates; what cannot be printed goes to `failed`."""
        printer = Printer(lambda region: candidates(region, self.options))
        for work in works:
            try:
                with self.journal.timed(PRINTING):
                    own = printer(work) if isinstance(work, Region) else candidates(work, self.options)
            except UnsupportedError as error:
                failed.append((work, error.reason))
            else:
                yield work, own


def _put(contests: dict[object, _Contest], work: Work, own: list[Candidate]) -> _Contest | None:
    """Put `work` to the contest of all that print the same kernels for the same sizes; that contest if it is a new one."""
    key = (work.device, tuple(c.identity for c in own))
    if key in contests:
        contests[key].regions.append(work)
        return None
    contests[key] = _Contest([work], own)
    return contests[key]


def _adopted(winner: Choice, own: Sequence[Candidate]) -> Choice:
    """`winner`, found for an equal region, with this region's buffers."""
    candidate = next(c for c in own if c.label == winner.label)
    artifacts = (artifact for _, artifact in winner.kernels)
    return replace(winner, kernels=tuple(zip(candidate.sources, artifacts, strict=True)), scratch=candidate.scratch)


def _unsuspected(made: Artifact | CompileFailure, suspects: Suspects) -> Artifact | CompileFailure:
    """`made`, or why it must not run: it has hung or ended a process before."""
    reason = suspects.reason(made.key) if isinstance(made, Artifact) and made.language == "triton" else None
    return made if reason is None else CompileFailure(made.key, reason)


def _fastest(contest: _Contest, store: ArtifactStore, measurements: Measurements) -> Choice:
    """The fastest built choice: from the records, or measured now. One choice alone needs no measuring."""
    usable = _usable(contest)
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


def _usable(contest: _Contest) -> list[Choice]:
    """The built choices whose kernels keep their values in registers. If none does: all, unless they use tensor cores."""
    kept = [c for c in contest.built if not _spills(c)]
    return kept if kept or isinstance(contest.region, Contraction | Attention) else contest.built


def _spills(choice: Choice) -> bool:
    return any(int(artifact.meta.get("n_spills", 0)) > 0 for _, artifact in choice.kernels)
