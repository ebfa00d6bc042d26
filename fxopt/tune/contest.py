"""One contest: trials are measured, once for all processes with one cache, and the winner is remembered."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from fxopt.runtime.artifacts import ArtifactStore
from fxopt.target import Target
from fxopt.tune.measure import Check, Measurements, Memory, Trial
from fxopt.tune.records import RecordKey, Records

NOISE = 0.03
"""A later trial must beat the first by more than this: ties go to the first, choices are stable."""

NOISE_OF_ONE_KERNEL = 0.015
"""The same among configurations of one kernel, which differ in nothing else: medians of two runs lie closer than this."""

Outcome = tuple[str, dict[str, float]]
"""The winner's label, and the seconds of each trial by label."""


def decide(
    key: RecordKey,
    name: str,
    memory: Memory,
    device: torch.device,
    trials: Sequence[Trial],
    store: ArtifactStore,
    measurements: Measurements,
    check: Check | None = None,
    noise: float = NOISE,
) -> Outcome | None:
    """The winner among `trials`: from the records under `key`, or measured now, as `Measurements.compare` does.

    None when nothing can be measured.
    """
    labels = [t.label for t in trials]
    records = Records(store.cache, Target.current(device).key)
    if (found := _recorded(records, key, labels)) is not None:
        return found
    with measurements.turn(device, store.directory):
        # Another process may have measured this very contest while this one waited.
        if (found := _recorded(records, key, labels)) is not None:
            return found
        seconds = measurements.compare(name, memory, device, trials, check)
        if seconds is None:
            return None
        figures = {label: s for label, s in zip(labels, seconds, strict=True) if s < float("inf")}
        winner = pick_winner(labels, seconds, noise)
        records.put(key, {"winner": winner, "seconds": figures})
    return winner, figures


def _recorded(records: Records, key: RecordKey, labels: Sequence[str]) -> Outcome | None:
    found: dict[str, Any] = records.get(key) or {}
    winner = str(found.get("winner"))
    return (winner, dict(found.get("seconds", {}))) if winner in labels else None


def pick_winner(labels: Sequence[str], seconds: Sequence[float], noise: float = NOISE) -> str:
    """The label of the fastest, or the first if that is as fast within `noise`."""
    best = min(range(len(labels)), key=lambda k: seconds[k])
    return labels[best] if seconds[best] < seconds[0] * (1 - noise) else labels[0]
