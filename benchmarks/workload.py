"""What a workload is, and how its sizes are chosen."""

from __future__ import annotations

import random
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor

from fxopt.report.cases import Case

ANY_LENGTH = 1 << 62
Sizes = dict[str, int]
Build = Callable[[Sizes, torch.device, torch.dtype], Case]


class Values:
    """Tensors for a case: reproducible normal values made on the device, in the dtype; `grad` makes them leaves."""

    def __init__(self, device: torch.device, dtype: torch.dtype, grad: bool = False) -> None:
        self.device, self.dtype, self.grad = device, dtype, grad
        self.generator = torch.Generator(device).manual_seed(0)

    def __call__(self, *shape: int, dtype: torch.dtype | None = None) -> Tensor:
        return self.constant(*shape, dtype=dtype).requires_grad_(self.grad)

    def constant(self, *shape: int, dtype: torch.dtype | None = None) -> Tensor:
        """Values that need no gradient."""
        return torch.randn(shape, generator=self.generator, device=self.device, dtype=dtype or self.dtype)

    def like(self, tensor: Tensor) -> Tensor:
        """Values in the shape, strides and dtype of `tensor` that need no gradient."""
        return torch.empty_like(tensor, requires_grad=False).normal_(generator=self.generator)

    def classes(self, count: int, upper: int) -> Tensor:
        return torch.randint(upper, (count,), generator=self.generator, device=self.device)


@dataclass(frozen=True)
class Workload:
    """`build(sizes, device, dtype)` makes the case. `ranges` are inclusive bounds that random sizes are drawn from.

    `one_pass`: the longest rows for which forward and backward can read every element once. `dtype` is that of runs on a GPU
    which name none, "" for the usual one.
    """

    name: str
    kind: str  # "kernel", "optimizer" or "model"
    build: Build
    full: Mapping[str, int]
    tiny: Mapping[str, int]
    ranges: Mapping[str, tuple[int, int]] = field(default_factory=dict)
    training: bool = False
    one_pass: tuple[int, int] = (ANY_LENGTH, ANY_LENGTH)
    dtype: str = ""

    def sizes(self, tiny: bool) -> Sizes:
        return dict(self.tiny if tiny else self.full)

    def draw(self, rng: random.Random, tiny: bool) -> Sizes:
        """Random sizes: log-uniform within `ranges` (below four times the tiny size when `tiny`), the rest as given."""
        sizes = self.sizes(tiny)
        for name, (low, high) in self.ranges.items():
            top = max(low, min(high, 4 * self.tiny[name])) if tiny else high
            sizes[name] = round(low * (top / low) ** rng.random())
        return sizes


Job = tuple[Workload, Sizes, str]
"""A workload, its sizes and the name of its dtype."""
