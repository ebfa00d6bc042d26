"""Every region's kernels: candidates are printed, compiled together in workers, and the fastest is kept and remembered.

Regions whose candidates are equal (the layers of a model) are one contest: printed texts are canonical, so they are compiled
once and measured once, and all take the same choice.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch

from fxopt.codegen import triton_batch
from fxopt.codegen.compile import compile_kernels
from fxopt.errors import UnsupportedError
from fxopt.ir.kernel import Artifact, CompileFailure, KernelSource
from fxopt.ir.region import Alternatives, Batch, Call, Contraction, Region, ScoredAttention, Work
from fxopt.journal import Journal
from fxopt.lower import Lowered, norm_scales
from fxopt.lower.groupings import regrouped
from fxopt.lower.ways import replaced
from fxopt.options import Options
from fxopt.runtime.artifacts import ArtifactStore
from fxopt.target import Target
from fxopt.tune.alternatives import Settled, Settler
from fxopt.tune.candidate import Candidate, Choice, candidates, sizes_of
from fxopt.tune.contest import NOISE, NOISE_OF_ONE_KERNEL, decide
from fxopt.tune.made_up import index_bounds
from fxopt.tune.measure import METHOD, Measurements, Memory, Trial, assumed_sizes, with_cold
from fxopt.tune.records import RecordKey
from fxopt.tune.suspects import Suspects
from fxopt.tune.twins import Printer
from fxopt.tune.values import unlike_the_first

BUDGET_SECONDS = {"default": 5.0, "reduce-overhead": 5.0, "max-autotune": 30.0}
"""Time for measuring in one graph, by mode; contests past it take the cost model's first candidate."""

FEW_SPILLED = 32
"""Bytes of a thread's stack frame that may cost less than what another layout reads again or waits for."""

GROUPING_CANDIDATES = 2
"""How many configurations of each region of another grouping are compiled."""

SAMPLE_BYTES = 256 << 20
"""As much of a batch is measured."""

PRINTING, COMPILING, MEASURING = "kernels: printing", "kernels: compiling", "kernels: measuring"
CALLS = "kernels: library calls"

log = logging.getLogger(__name__)


@dataclass
class _Contest:
    """Candidates, and the regions that have just these. `made` is what became of their kernels, by the source's identity.

    Only the first `wanted` candidates are compiled.
    """

    regions: list[Work]
    candidates: list[Candidate]
    wanted: int
    made: dict[int, Artifact | CompileFailure] = field(default_factory=dict)
    built: list[Choice] = field(default_factory=list)
    reasons: list[str] = field(default_factory=list)

    @property
    def region(self) -> Work:
        return self.regions[0]

    @property
    def sources(self) -> list[KernelSource]:
        return [s for candidate in self.candidates[: self.wanted] for s in candidate.sources]

    @property
    def is_complete(self) -> bool:
        """Whether it is known of every kernel what became of it."""
        return all(id(s) in self.made for s in self.sources)

    def widen(self) -> list[KernelSource]:
        """Want all candidates: the kernels of those that were not wanted before."""
        more = [s for candidate in self.candidates[self.wanted :] for s in candidate.sources]
        self.wanted = len(self.candidates)
        return more

    def finish(self, journal: Journal) -> None:
        """Note which wanted candidates were built, and why others were not."""
        self.built, self.reasons = [], []
        for candidate in self.candidates[: self.wanted]:
            made = [(s, self.made[id(s)]) for s in candidate.sources]
            reasons = [r.reason for _, r in made if isinstance(r, CompileFailure)]
            self.reasons += reasons
            for reason in reasons:
                journal.note("tuning", f"{self.region.name}: {candidate.label} is no candidate: {reason}")
            if not reasons:
                kernels = tuple((s, a) for s, a in made if isinstance(a, Artifact))
                self.built.append(Choice(candidate.label, kernels, candidate.scratch))


def choose(
    lowered: Lowered,
    options: Options,
    store: ArtifactStore,
    journal: Journal,
    meanwhile: Callable[[Lowered], Lowered] | None = None,
) -> tuple[Lowered, dict[str, Choice], list[tuple[Region | Batch, str]]]:
    """(`lowered` without alternatives, the choice for each of its regions, batches and contractions by name, the regions and
    batches that nothing could be built for with the reason).

    `meanwhile` decides about the library calls of `lowered`; that is done while kernels are compiled.
    """
    return _Tuning(lowered, options, store, journal, meanwhile).run()


class _Tuning:
    """The contests of one graph: candidates are printed, compiled while the next ones are printed, and measured while others
    are compiled.
    """

    def __init__(
        self,
        lowered: Lowered,
        options: Options,
        store: ArtifactStore,
        journal: Journal,
        meanwhile: Callable[[Lowered], Lowered] | None,
    ) -> None:
        self.lowered, self.options, self.store, self.journal, self.meanwhile = lowered, options, store, journal, meanwhile
        self.suspects = Suspects(store.cache)
        budget = BUDGET_SECONDS[options.mode] if options.tuning_seconds is None else options.tuning_seconds
        measurements = Measurements(journal, budget, self.suspects)
        self.measurements = measurements
        cold = lowered.lasting, lowered.lasting_bytes, lowered.is_single
        self.settler = Settler(store, measurements, journal, *cold)
        self.tentative = _tentative(lowered) if options.mode != "max-autotune" else frozenset[str]()
        self.needed = _Contests(lambda work: candidates(work, options), journal, self.tentative)
        self.optional = _Contests(lambda work: candidates(work, options), journal)
        self.regions = _Contests(lambda work: candidates(work, options)[:GROUPING_CANDIDATES], journal)
        self.printed: set[torch.device] = set()
        self.winners: dict[int, Choice] = {}
        self.settled: dict[str, Settled] = {}

    def run(self) -> tuple[Lowered, dict[str, Choice], list[tuple[Region | Batch, str]]]:
        """As `choose`."""
        among_steps = [s for s in self.lowered.steps if isinstance(s, Alternatives)]
        first = [s for each in among_steps for s in each.ways[0].steps]
        others = [s for s in _other_steps(among_steps) if not isinstance(s, Call)]
        regions = [s for s in _other_steps(self.lowered.groupings) if isinstance(s, Region)]
        needed: list[Work] = [s for s in (*self.lowered.steps, *first) if isinstance(s, Region | Batch)]
        needed += [s for s in first if isinstance(s, Contraction)]
        for device in dict.fromkeys(work.device for work in (*others, *needed)):
            self._build(device, *(_on(device, works) for works in (others, needed, regions)))
        self._decide_calls()
        self._advance()
        failed = [(work, reason) for work, reason in self.needed.failed() if isinstance(work, Region | Batch)]
        if failed:
            return self.lowered, {}, failed
        chosen = {name: self._winner(name) for name in self.needed.of}
        for each in self.lowered.groupings:
            for name in each.ways[0].names:
                chosen.pop(name)
        first_ways = {each.name: each.ways[0] for each in self._alternatives()}
        for name, kept in self.settled.items():
            chosen.pop(name, None)
            chosen |= kept.choices
            if kept.way is first_ways[name]:  # other candidates for its steps may have been measured since
                chosen |= {n: self._winner(n) for n in kept.way.names}
        ways = {name: kept.way for name, kept in self.settled.items()}
        return regrouped(replaced(self.lowered, ways), ways), chosen, []

    def _alternatives(self) -> list[Alternatives]:
        return [*(s for s in self.lowered.steps if isinstance(s, Alternatives)), *self.lowered.groupings]

    def _build(self, device: torch.device, others: Sequence[Work], needed: Sequence[Work], regions: Sequence[Work]) -> None:
        """Build the steps of other ways than the first (`others`), those that are `needed`, and the `regions` of other
        groupings, on one device."""
        sources: list[KernelSource] = []

        def ready(place: int, made: Artifact | CompileFailure) -> list[KernelSource]:
            result, before = _unsuspected(made, self.suspects), len(sources)
            if any(contests.take(sources[place], result) for contests in (self.optional, self.needed, self.regions)):
                sources.extend(self._advance())
            return sources[before:]

        with self.journal.timed(COMPILING):
            compile_kernels(self._sources(others, needed, regions, sources), Target.current(device), self.store, ready)
        log.info("%s: %d kernels (%d texts) on %s", self.journal.graph, len(sources), len({s.text for s in sources}), device)

    def _sources(
        self, others: Sequence[Work], needed: Sequence[Work], regions: Sequence[Work], given: list[KernelSource]
    ) -> Iterator[KernelSource]:
        """Every candidate's kernels, also noted in `given`. Those that take longest come first, lest all wait for the last:
        products, which are among `others`, take several times as long as the rest, which goes by length."""
        for contest in self.optional.printed(others):
            given += contest.sources
            yield from contest.sources
        contests = [*self.needed.printed(needed), *self.regions.printed(regions)]
        sources = sorted((s for c in contests for s in c.sources), key=lambda s: -len(s.text))
        given += sources
        yield from sources
        self.printed |= {work.device for work in (*others, *needed)}
        self._decide_calls()

    def _decide_calls(self) -> None:
        if self.meanwhile is not None:
            with self.journal.timed(CALLS):
                self.lowered, self.meanwhile = self.meanwhile(self.lowered), None

    def _advance(self) -> list[KernelSource]:
        """Measure what is built and has not been measured. Returns what else to compile: candidates for steps of a first way
        that is kept after all, or whose first candidate is no good."""
        with self.journal.timed(MEASURING):
            more = [s for contest in self.needed.take_failed() for s in self.needed.widened(contest)]
            for contest in (*self.needed.take_open(), *self.regions.take_open()):
                self.winners[id(contest)] = _fastest(contest, self.store, self.measurements, self.lowered)
            for each in self._alternatives():
                if each.name not in self.settled and each.device in self.printed and self._is_built(each):
                    chosen = {name: self._winner(name) for name in each.ways[0].names}
                    kept = self.settled[each.name] = self.settler.settle(each, chosen, self._built(each))
                    of_first = self.tentative.intersection(each.ways[0].names) if kept.way is each.ways[0] else ()
                    more += [s for name in of_first for s in self.needed.widened(self.needed.of[name])]
        return more

    def _is_built(self, each: Alternatives) -> bool:
        """Whether all that is known of the steps of `each` is what will be known."""
        first = all(id(self.needed.of.get(name)) in self.winners for name in each.ways[0].names)
        contests, others = self._others(each), (name for way in each.ways[1:] for name in way.names)
        return first and all(name not in contests.of or contests.of[name].is_complete for name in others)

    def _others(self, each: Alternatives) -> _Contests:
        """Where the steps of other ways than the first of `each` have their contests."""
        return self.regions if each in self.lowered.groupings else self.optional

    def _built(self, each: Alternatives) -> dict[str, list[Choice]]:
        """Every choice for the steps of other ways than the first, by name."""
        names = [name for way in each.ways[1:] for name in way.names]
        contests = self._others(each)
        known = {name: contests.of[name] for name in names if name in contests.of}
        single = [way for way in each.ways[1:] if len(way.steps) == 1 and contests is self.optional]
        alone = {name for way in single for name in way.names}
        only_best = each.kind == norm_scales.NAME
        tried = {name: self._contenders(contest, name in alone, only_best) for name, contest in known.items()}
        return {name: [_adopted(c, contests.own[name]) for c in choices] for name, choices in tried.items()}

    def _contenders(self, contest: _Contest, alone: bool, only_best: bool) -> list[Choice]:
        """What is tried for a step of a way: of a region that is not `alone` in it, its own winner, and so `only_best` of a
        contraction: every configuration of each step with every one of the others would be many.
        """
        usable = _usable(contest)
        if not usable or not (only_best or (not alone and isinstance(contest.region, Region | Batch))):
            return usable
        if id(contest) not in self.winners:
            self.winners[id(contest)] = _fastest(contest, self.store, self.measurements, self.lowered)
        return [self.winners[id(contest)]]

    def _winner(self, name: str) -> Choice:
        return _adopted(self.winners[id(self.needed.of[name])], self.needed.own[name])


def _tentative(lowered: Lowered) -> frozenset[str]:
    """Regions on a GPU that a product's kernel may compute, too: one candidate is enough to tell which way is faster. Norms
    that may be factors differ in less than candidates do.
    """
    either = [s for s in lowered.steps if isinstance(s, Alternatives) and s.device.type == "cuda"]
    either = [each for each in either if each.kind != norm_scales.NAME]
    with_kernel = [each for each in either if any(isinstance(s, Contraction) for s in _other_steps([each]))]
    return frozenset(s.name for each in with_kernel for s in each.ways[0].steps if isinstance(s, Region))


def _other_steps(each: Iterable[Alternatives]) -> Iterator[Work | Call]:
    """The steps of other ways than the first."""
    return (step for alternatives in each for way in alternatives.ways[1:] for step in way.steps)


def _on(device: torch.device, works: Iterable[Work]) -> list[Work]:
    return [work for work in works if work.device == device]


class _Contests:
    """Contests of regions, batches and contractions; those that print the same kernels for the same sizes have one."""

    def __init__(
        self, candidates: Callable[[Any], list[Candidate]], journal: Journal, tentative: frozenset[str] = frozenset()
    ) -> None:
        self.candidates, self.journal, self.tentative = candidates, journal, tentative
        self.of: dict[str, _Contest] = {}
        self.own: dict[str, list[Candidate]] = {}
        self._unprinted: list[tuple[Work, str]] = []
        self._known: dict[object, _Contest] = {}
        self._awaiting: dict[int, _Contest] = {}
        self._open: list[_Contest] = []

    def printed(self, works: Sequence[Work]) -> Iterator[_Contest]:
        """The contests of `works` that are new; what cannot be printed has failed."""
        printer = Printer(self.candidates)
        for work in works:
            try:
                with self.journal.timed(PRINTING):
                    own = printer(work)
            except UnsupportedError as error:
                self._unprinted.append((work, error.reason))
                continue
            self.own[work.name] = own
            wanted = 1 if work.name in self.tentative else len(own)
            key = (work.device, wanted, tuple(c.identity for c in own))
            if key in self._known:
                self.of[work.name] = self._known[key]
                self._known[key].regions.append(work)
                continue
            self.of[work.name] = self._known[key] = contest = _Contest([work], own, wanted)
            self._awaiting |= {id(s): contest for s in contest.sources}
            yield contest

    def take(self, source: KernelSource, made: Artifact | CompileFailure) -> bool:
        """Note what became of `source`, if it is of one of these contests: whether that completes a contest."""
        contest = self._awaiting.pop(id(source), None)
        if contest is None:
            return False
        contest.made[id(source)] = made
        if contest.is_complete:
            contest.finish(self.journal)
            self._open += [contest] * bool(contest.built)
        return contest.is_complete

    def widened(self, contest: _Contest) -> list[KernelSource]:
        """The kernels of candidates that were not wanted so far, which the contest is complete without."""
        more = contest.widen()
        self._awaiting |= {id(s): contest for s in more}
        return more

    def take_failed(self) -> list[_Contest]:
        """The contests of which nothing usable was built, but more candidates are known."""
        known = [c for c in self._known.values() if c.is_complete and c.wanted < len(c.candidates)]
        return [c for c in known if not any(_spilled(choice) <= FEW_SPILLED for choice in c.built)]

    def take_open(self) -> list[_Contest]:
        """The contests with something built that have become complete since this was last asked."""
        found, self._open = [c for c in self._open if c.is_complete], []
        return found

    def failed(self) -> list[tuple[Work, str]]:
        """What nothing was built for, and why."""
        none = [c for c in self._known.values() if not c.built]
        unbuilt = [(work, "; ".join(dict.fromkeys(c.reasons)) or "no candidate") for c in none for work in c.regions]
        return [*self._unprinted, *unbuilt]


def _adopted(winner: Choice, own: Sequence[Candidate]) -> Choice:
    """`winner`, found for an equal region, with this region's buffers."""
    candidate = next(c for c in own if c.label == winner.label)
    artifacts = (artifact for _, artifact in winner.kernels)
    return replace(winner, kernels=tuple(zip(candidate.sources, artifacts, strict=True)), scratch=candidate.scratch)


def _unsuspected(made: Artifact | CompileFailure, suspects: Suspects) -> Artifact | CompileFailure:
    """`made`, or why it must not run: it has hung or ended a process before."""
    reason = suspects.reason(made.key) if isinstance(made, Artifact) and made.language == "triton" else None
    return made if reason is None else CompileFailure(made.key, reason)


def _fastest(contest: _Contest, store: ArtifactStore, measurements: Measurements, lowered: Lowered) -> Choice:
    """The fastest built choice: from the records, or measured now. One choice alone needs no measuring."""
    usable = _usable(contest)
    if len(usable) == 1 or contest.region.device.type != "cuda":
        return usable[0]
    region = contest.region
    memory, device, trials = _measurable(region, usable)
    if not isinstance(region, Batch):  # of which a sample is measured
        memory = with_cold(memory, lowered.lasting, lowered.lasting_bytes, device, lowered.is_single)
    facts = _facts(region, usable, Target.current(region.device)) | {"cold": bool(memory.cold), "single": memory.single}
    key = RecordKey("region", facts)
    noise = NOISE_OF_ONE_KERNEL if isinstance(region, Region | Batch | Contraction) else NOISE
    found = decide(key, region.name, memory, device, trials, store, measurements, unlike_the_first, noise)
    if found is not None:
        measurements.journal.contests[region.name] = found[1]
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
    """The built choices whose kernels keep their values in registers, then, of loop nests, those that spill a few words; if
    there are none, unless a library has some, all."""
    by_size = sorted(contest.built, key=_spilled)
    kept = [c for c in by_size if _spilled(c) <= (FEW_SPILLED if isinstance(contest.region, Region) else 0)]
    return kept if kept or not isinstance(contest.region, Region | Batch | ScoredAttention) else contest.built


def _spilled(choice: Choice) -> int:
    """Bytes of a thread's stack frame."""
    return max((int(artifact.meta.get("n_spills", 0)) for _, artifact in choice.kernels), default=0)
