"""Outputs of a model on batches, and how far they are from what they should be."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor

from benchmarks.real_models import Batch, Run


def relative_error(outputs: Iterable[Tensor], exact: Iterable[Tensor]) -> float:
    """The norm of all differences over that of all exact values."""
    pairs = [(a.double(), b.double()) for a, b in zip(outputs, exact, strict=True)]
    off = sum(float((a - b).square().sum()) for a, b in pairs)
    return (off / sum(float(b.square().sum()) for _, b in pairs)) ** 0.5


def cosines(outputs: Iterable[Tensor], exact: Iterable[Tensor]) -> Tensor:
    """Of each row along the last dimension with what it should be."""
    pairs = zip(outputs, exact, strict=True)
    return torch.cat([torch.cosine_similarity(a.double(), b.double(), dim=-1).flatten() for a, b in pairs])


def outputs_of(run: Run, batches: Iterable[Batch]) -> list[Tensor]:
    with torch.no_grad():
        return [run(batch).float().cpu() for batch in batches]
