"""Which of several ways to compute the same values is kept: each is run on made-up data, the library's first.

A way is library calls and kernels in order; a contraction in it stands for every configuration that was built for it. Equal
alternatives (the layers of a model) are one contest, whose result is remembered.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from fxopt.codegen.templates.attention_config import BOUNDED
from fxopt.ir.attention_backends import enabled_backends
from fxopt.ir.precision import convolutions_use_tf32, products_use_tf32
from fxopt.ir.region import Alternatives, Call, Contraction, Ref, ScoredAttention, Way
from fxopt.journal import Journal
from fxopt.lower import norm_scales
from fxopt.runtime.artifacts import ArtifactStore
from fxopt.target import Target
from fxopt.tune.candidate import Choice, sizes_of
from fxopt.tune.contest import NOISE, NOISE_OF_ONE_KERNEL, decide
from fxopt.tune.measure import CLOSE, METHOD, BoundCall, Measurements, Memory, Trial, assumed_sizes, with_cold
from fxopt.tune.records import RecordKey
from fxopt.tune.values import unlike_the_first


@dataclass(frozen=True)
class Settled:
    """The way that is kept, and what runs its regions and contractions by name."""

    way: Way
    choices: dict[str, Choice]


class Settler:
    """Decides between the ways of alternatives; equal ones are one contest."""

    def __init__(
        self,
        store: ArtifactStore,
        measurements: Measurements,
        journal: Journal,
        lasting: frozenset[str] = frozenset(),
        lasting_bytes: int = 0,
        single: bool = False,
    ) -> None:
        """`lasting`, `lasting_bytes` and `single` are what `measure.with_cold` asks of the plan."""
        self.store, self.measurements, self.journal = store, measurements, journal
        self.lasting, self.lasting_bytes, self.single = lasting, lasting_bytes, single
        self._known: dict[str, str] = {}

    def settle(self, each: Alternatives, chosen: Mapping[str, Choice], built: Mapping[str, Sequence[Choice]]) -> Settled:
        """What is kept of `each`.

        `chosen` has what runs each region of the first way by name, `built` every choice for the regions and contractions of
        the others: a way of which something was not built is none.
        """
        contenders = _settled(each.ways[0], {name: [choice] for name, choice in chosen.items()})
        contenders += [s for way in each.ways[1:] for s in _settled(way, built)]
        trials = [_trial(each, contender) for contender in contenders]
        memory = with_cold(memory_of(each), self.lasting, self.lasting_bytes, each.device, self.single)
        facts = _facts(each, memory, trials)
        label = self._known.get(key := repr(facts))
        if label is None:
            label = _fastest(each, memory, trials, facts, self.store, self.measurements, self.journal)
            self._known[key] = label
        return contenders[[t.label for t in trials].index(label)]


def _settled(way: Way, choices: Mapping[str, Sequence[Choice]]) -> list[Settled]:
    """`way` with every combination of choices for its steps."""
    out = [Settled(way, {})]
    for step in way.steps:
        if not isinstance(step, Call):
            out = [Settled(way, {**s.choices, step.name: choice}) for s in out for choice in choices.get(step.name, ())]
    return out


def _trial(alternatives: Alternatives, settled: Settled) -> Trial:
    parts: list[Any] = []
    scratch: list[Any] = []
    labels = [settled.way.label]
    for step in settled.way.steps:
        if isinstance(step, Call):
            parts.append(BoundCall(step, alternatives.buffers, alternatives.views))
            continue
        choice = settled.choices[step.name]
        parts += choice.kernels
        scratch += choice.scratch
        labels += [choice.label] if settled.way is not alternatives.ways[0] else []
    return Trial(" ".join(labels), tuple(parts), tuple(scratch))


def _fastest(
    alternatives: Alternatives,
    memory: Memory,
    trials: Sequence[Trial],
    facts: dict[str, object],
    store: ArtifactStore,
    measurements: Measurements,
    journal: Journal,
) -> str:
    """The label of the fastest trial: from the records, or measured now."""
    first = trials[0].label
    if len(trials) == 1 or alternatives.device.type != "cuda":
        return first
    unmeasured = trials[1].label if isinstance(alternatives.ways[-1].steps[0], ScoredAttention) else first
    key = RecordKey("alternatives", facts)
    # Ways of a norm differ by what moving its rows takes, beside products that are the same or as fast in all of them.
    noise = NOISE_OF_ONE_KERNEL if alternatives.kind == norm_scales.NAME else NOISE
    found = decide(key, alternatives.name, memory, alternatives.device, trials, store, measurements, unlike_the_first, noise)
    if found is None:
        return unmeasured  # the eager forms of attention in training store scores, which costs more than any kernel
    winner, figures = _reading_less(*found), found[1]
    beside = first if winner != first else min(figures.keys() - {winner}, key=figures.__getitem__, default=first)
    compared = [label for label in dict.fromkeys((winner, beside)) if label in figures]
    said = ", ".join(f"{label}: {figures[label] * 1e6:.1f} us" for label in compared)
    journal.note(alternatives.kind, f"{alternatives.name}: {winner} ({said})")
    return winner


def _reading_less(winner: str, figures: Mapping[str, float]) -> str:
    """`winner`, or what is as fast where all keys are shown, as made-up masks do, and reads fewer where not."""
    bounded = [label for label in figures if label.endswith(f" {BOUNDED}")]
    best = min(bounded, key=figures.__getitem__, default=winner)
    return best if best in figures and figures[best] <= CLOSE * figures.get(winner, math.inf) else winner


def memory_of(alternatives: Alternatives) -> Memory:
    """What the trials of `alternatives` share."""
    steps = (step for way in alternatives.ways for step in way.steps)
    grouped = (c for c in steps if isinstance(c, Contraction) and c.ends)
    rows = {c.ends: m for c in grouped if isinstance(m := c.sizes[1], int)}
    return Memory(alternatives.buffers, ends=rows, uniform=alternatives.uniform)


def _facts(alternatives: Alternatives, memory: Memory, trials: Sequence[Trial]) -> dict[str, object]:
    """Everything that a contest's result depends on."""
    target = Target.current(alternatives.device)
    uniform = [alternatives.buffers[name] for name in alternatives.uniform]
    return {
        "trials": [[t.label, *(_part_facts(p) for p in t.parts)] for t in trials],
        "assumed": assumed_sizes(memory, trials),
        "uniform": sorted(repr((spec.dtype, spec.shape)) for spec in uniform),
        "device": target.name,
        "torch": torch.__version__,
        "method": METHOD,
        "cold": bool(memory.cold),
        "single": memory.single,
    }


def _part_facts(part: Any) -> list[object]:
    if not isinstance(part, BoundCall):
        source, artifact = part
        return [artifact.key, sizes_of(source)]
    views = {v.name: v for v in part.views}

    def tensor(name: str) -> str:
        view = views.get(name)
        spec = part.buffers[name if view is None else view.of]
        layout = (spec.shape, spec.strides, 0) if view is None else (view.shape, view.strides, view.offset)
        return repr((spec.dtype, *layout))

    def argument(value: Any) -> Any:
        match value:
            case Ref(name):
                return tensor(name)
            case list() | tuple():
                return [argument(x) for x in value]
            case dict():
                return {k: argument(x) for k, x in value.items()}
        return repr(value)

    return [part.call.op, argument(part.call.args), argument(part.call.kwargs), repr(_switches(part.call.op))]


def _switches(op: str) -> list[object]:
    """What decides, beside its arguments, how the library computes `op`."""
    if "convolution" in op:
        return [torch.backends.cudnn.version(), torch.backends.cudnn.benchmark, convolutions_use_tf32()]
    if "attention" in op:
        return [torch.backends.cudnn.version(), *enabled_backends()]
    flags = torch.backends.cuda.matmul
    reductions = [flags.allow_bf16_reduced_precision_reduction, flags.allow_fp16_reduced_precision_reduction]
    return [*reductions, products_use_tf32()]
