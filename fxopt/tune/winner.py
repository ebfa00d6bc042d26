"""Which of several measured candidates wins."""

from __future__ import annotations

from collections.abc import Sequence

NOISE = 0.03
"""A later candidate must beat the first by more than this: ties go to the first, choices are stable."""


def pick_winner(labels: Sequence[str], seconds: Sequence[float]) -> str:
    """The label of the fastest, or the first if that is about as fast."""
    best = min(range(len(labels)), key=lambda k: seconds[k])
    return labels[best] if seconds[best] < seconds[0] * (1 - NOISE) else labels[0]
