"""What a workload is, and how its sizes are chosen."""

from __future__ import annotations

import random
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

import torch

from fxopt.report.cases import Case

Sizes = dict[str, int]
Build = Callable[[Sizes, torch.device, torch.dtype], Case]


@dataclass(frozen=True)
class Workload:
    """`build(sizes, device, dtype)` makes the case. `ranges` are inclusive bounds that random sizes are drawn from."""

    name: str
    kind: str  # "kernel" or "model"
    build: Build
    full: Mapping[str, int]
    tiny: Mapping[str, int]
    ranges: Mapping[str, tuple[int, int]] = field(default_factory=dict)
    training: bool = False

    def sizes(self, tiny: bool) -> Sizes:
        return dict(self.tiny if tiny else self.full)

    def draw(self, rng: random.Random, tiny: bool) -> Sizes:
        """Random sizes: log-uniform within `ranges` (below four times the tiny size when `tiny`), the rest as given."""
        sizes = self.sizes(tiny)
        for name, (low, high) in self.ranges.items():
            top = max(low, min(high, 4 * self.tiny[name])) if tiny else high
            sizes[name] = round(low * (top / low) ** rng.random())
        return sizes
