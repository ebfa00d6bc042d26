"""Which layers to quantize first: plain policy over measured errors and times."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Offer:
    """A layer in a precision: `error` is the model's relative error with this layer alone quantized, `saved` the seconds
    that a call of the model gets shorter by."""

    layer: str
    precision: str
    error: float
    saved: float


def in_order(offers: Iterable[Offer]) -> list[Offer]:
    """The offers to take one after the other, most time for its error first, until no layer gets faster.

    Errors of several layers are taken as independent, so that squares add up. A layer may come again in a faster precision,
    which then takes the place of the one before. Offers of equal worth keep their order.
    """
    left = [offer for offer in offers if offer.saved > 0.0 and math.isfinite(offer.error)]
    taken: list[Offer] = []
    current: dict[str, Offer] = {}
    while left:
        best = max(left, key=lambda offer: _worth(offer, current.get(offer.layer)))
        taken.append(best)
        current[best.layer] = best
        left = [offer for offer in left if offer.layer != best.layer or offer.saved > best.saved]
    return taken


def _worth(offer: Offer, before: Offer | None) -> float:
    """Time for each square of error that changing from `before` to `offer` costs."""
    saved = offer.saved - (before.saved if before else 0.0)
    cost = offer.error**2 - (before.error**2 if before else 0.0)
    return saved / cost if cost > 0.0 else math.inf


def decisions(taken: Sequence[Offer]) -> dict[str, str]:
    """Precisions of layers when all of `taken` are, the later ones of a layer in place of the earlier."""
    return {offer.layer: offer.precision for offer in taken}
