"""Which operands of a region nothing in its plan writes (weights, as a rule), and which were there before the plan began.

A kernel that is launched before the one before it has ended (`codegen/triton_chain.py`) need not wait for that to load them.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator
from dataclasses import replace
from typing import TypeVar

from fxopt.ir.region import Alias, Alternatives, Call, Contraction, Region, Step, Way, base_of, refs
from fxopt.lower.cost import nbytes
from fxopt.lower.lowering import Lowered

S = TypeVar("S")


def with_steady_reads(lowered: Lowered, parameters: Collection[str], states: Collection[str] = ()) -> Lowered:
    """`lowered` with `Region.steady` set on the regions for GPUs, and with `lasting`, unless it has that already.

    `parameters` names inputs that are weights: they share no memory with what another input's name writes. `states` are
    those that are written where they lie (caches).
    """
    views = views_of(lowered)
    steady = {*parameters, *lowered.constants} - written(lowered)
    names = steady | {name for name in views if base_of(name, views) in steady}
    steps = [_marked(step, names) for step in lowered.steps]
    read = {base_of(name, views) for step in lowered.steps for name in reads(step)}
    groupings = tuple(_marked(each, names) for each in lowered.groupings)
    lasting = lowered.lasting or frozenset((*parameters, *states, *lowered.constants)) & read
    total = lowered.lasting_bytes or sum(nbytes(lowered.buffers[name]) for name in lasting)
    return replace(lowered, steps=steps, groupings=groupings, lasting=lasting, lasting_bytes=total)


def views_of(lowered: Lowered) -> dict[str, Alias]:
    """The views among the steps, by name."""
    return {s.name: s for s in lowered.steps if isinstance(s, Alias)}


def written(lowered: Lowered) -> set[str]:
    """The memory that steps write: of views, what they are of."""
    views = views_of(lowered)
    return {base_of(name, views) for step in lowered.steps for name in _writes(step)}


def _marked(step: S, steady: Collection[str]) -> S:
    if isinstance(step, Alternatives):
        ways = (Way(way.label, tuple(_marked(s, steady) for s in way.steps)) for way in step.ways)
        return replace(step, ways=tuple(ways))
    if isinstance(step, Region) and step.device.type == "cuda":
        return replace(step, steady=frozenset(n for n in step.reads() if n in steady))
    if isinstance(step, Contraction) and step.device.type == "cuda":
        return replace(step, region=replace(step.region, steady=frozenset(n for n in step.reads() if n in steady)))
    return step


def _writes(step: Step) -> Iterator[str]:
    match step:
        case Alternatives():
            yield from _all_writes(s for way in step.ways for s in way.steps)
        case Alias():
            pass
        case _:
            yield from step.writes if isinstance(step.writes, tuple) else step.writes()


def reads(step: Step) -> Iterator[str]:
    """Every name that `step` reads; a view reads nothing."""
    match step:
        case Alternatives():
            for way in step.ways:
                for each in way.steps:
                    yield from reads(each)
        case Alias():
            pass
        case Call():
            yield from refs((step.args, step.kwargs))
        case _:
            yield from step.reads()


def _all_writes(steps: Iterable[Step]) -> Iterator[str]:
    for step in steps:
        yield from _writes(step)
