"""The ways that were chosen, in the place of alternatives."""

from __future__ import annotations

from dataclasses import replace

from fxopt.ir.region import Alias, Alternatives, Call, Ref, Step, Way, refs
from fxopt.lower.lowering import Lowered


def replaced(lowered: Lowered, kept: dict[str, Way]) -> Lowered:
    """`lowered` with the steps of the way in `kept` (by name) in the place of each `Alternatives`, and without views that no
    step names any more."""
    steps: list[Step] = []
    for step in lowered.steps:
        steps += kept[step.name].steps if isinstance(step, Alternatives) else [step]
    named = {o.name for o in lowered.outputs if isinstance(o, Ref)}
    live: list[Step] = []
    for step in reversed(steps):
        if isinstance(step, Alias):
            if step.name not in named:
                continue
            named.add(step.of)
        elif isinstance(step, Call):
            named |= set(refs((step.args, step.kwargs)))
        else:
            named |= set(step.reads())  # type: ignore[union-attr]  # no Alternatives are left
        live.append(step)
    return replace(lowered, steps=live[::-1])
