"""Every region's kernels: candidates are printed, compiled together in workers, and the fastest is kept and remembered."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch

from fxopt.codegen import cpp, triton
from fxopt.codegen.compile import compile_kernels
from fxopt.errors import UnsupportedError
from fxopt.ir.kernel import Artifact, CompileFailure, KernelSource
from fxopt.ir.region import BufferSpec, Region
from fxopt.journal import Journal
from fxopt.lower import Lowered
from fxopt.options import Options
from fxopt.runtime.artifacts import ArtifactStore
from fxopt.target import Target
from fxopt.tune.measure import Measurements
from fxopt.tune.records import RecordKey, Records

CANDIDATES = {"default": 3, "reduce-overhead": 3, "max-autotune": 8}
"""How many of the cost model's best configurations are compiled and measured, by mode."""


@dataclass(frozen=True)
class Candidate:
    """One way to run a region: kernels in order, with scratch buffers that they share. `label` names the configuration."""

    label: str
    sources: tuple[KernelSource, ...]
    scratch: tuple[BufferSpec, ...] = ()


@dataclass(frozen=True)
class Choice:
    """What runs a region."""

    label: str
    kernels: tuple[tuple[KernelSource, Artifact], ...]
    scratch: tuple[BufferSpec, ...] = ()


@dataclass
class _Contest:
    """A region's candidates; `others` are regions with equal kernels, which take the same choice."""

    region: Region
    candidates: list[Candidate]
    built: list[Choice] = field(default_factory=list)
    reasons: list[str] = field(default_factory=list)


def choose(
    lowered: Lowered, options: Options, store: ArtifactStore, journal: Journal
) -> tuple[dict[str, Choice], list[tuple[Region, str]]]:
    """(the choice for each region by name, the regions that nothing could be built for with the reason)."""
    contests: list[_Contest] = []
    failed: list[tuple[Region, str]] = []
    for region in (s for s in lowered.steps if isinstance(s, Region)):
        try:
            contests.append(_Contest(region, candidates(region, options)))
        except UnsupportedError as error:
            failed.append((region, error.reason))
    for device in dict.fromkeys(c.region.device for c in contests):
        _build([c for c in contests if c.region.device == device], Target.current(device), store)
    chosen: dict[str, Choice] = {}
    measurements = Measurements(journal)
    for contest in contests:
        if contest.built:
            chosen[contest.region.name] = _fastest(contest, options, store, measurements)
        else:
            failed.append((contest.region, "; ".join(dict.fromkeys(contest.reasons)) or "no candidate"))
    return chosen, failed


def candidates(region: Region, options: Options) -> list[Candidate]:
    """The printed candidates of `region`, best first by the cost model. Raises UnsupportedError when no printer takes it."""
    target = Target.current(region.device)
    if region.device.type == "cpu":
        return [Candidate("C++", (cpp.print_nest(region, target),))]
    if region.device.type != "cuda":
        raise UnsupportedError(f"no printer for {region.device.type} kernels")
    out: list[Candidate] = []
    reason = "no configuration"
    for config in triton.configs(region, target)[: CANDIDATES[options.mode]]:
        try:
            printed = triton.print_region(region, config, target)
        except UnsupportedError as error:
            reason = error.reason
            continue
        out.append(Candidate(str(config), printed.kernels, printed.scratch))
    if not out:
        raise UnsupportedError(reason)
    return out


def _build(contests: Sequence[_Contest], target: Target, store: ArtifactStore) -> None:
    """Compile every candidate of every contest in one go; equal kernels once."""
    sources = [s for c in contests for candidate in c.candidates for s in candidate.sources]
    results = dict(zip(map(id, sources), compile_kernels(sources, target, store), strict=True))
    for contest in contests:
        for candidate in contest.candidates:
            built = [(s, results[id(s)]) for s in candidate.sources]
            reasons = [r.reason for _, r in built if isinstance(r, CompileFailure)]
            contest.reasons += reasons
            if not reasons:
                kernels = tuple((s, a) for s, a in built if isinstance(a, Artifact))
                contest.built.append(Choice(candidate.label, kernels, candidate.scratch))


def _fastest(contest: _Contest, options: Options, store: ArtifactStore, measurements: Measurements) -> Choice:
    """The fastest built choice: from the records, or measured now. One choice alone needs no measuring."""
    usable = [c for c in contest.built if not _spills(c)] or contest.built
    if len(usable) == 1 or contest.region.device.type != "cuda":
        return usable[0]
    target = Target.current(contest.region.device)
    records = Records(store.cache, target.key)
    facts = {
        "kernels": [[artifact.key for _, artifact in c.kernels] for c in usable],
        "sizes": [[repr(x) for source, _ in c.kernels for x in (*source.sizes, *source.grid)] for c in usable],
        "device": target.name,
        "torch": torch.__version__,
    }
    key = RecordKey("region", facts)
    found = records.get(key)
    labels = [c.label for c in usable]
    if found is None or found.get("winner") not in labels:
        seconds = measurements.compare(contest.region, usable)
        if seconds is None:
            return usable[0]
        found = {"winner": _winner(labels, seconds), "seconds": dict(zip(labels, seconds, strict=True))}
        records.put(key, found)
    return usable[labels.index(str(found["winner"]))]


NOISE = 0.03
"""A later candidate must be faster than the cost model's first by more than this; ties go to the first, so choices are stable."""


def _winner(labels: Sequence[str], seconds: Sequence[float]) -> str:
    best = min(range(len(labels)), key=lambda k: seconds[k])
    return labels[best] if seconds[best] < seconds[0] * (1 - NOISE) else labels[0]


def _spills(choice: Choice) -> bool:
    return any(int(artifact.meta.get("n_spills", 0)) > 0 for _, artifact in choice.kernels)
