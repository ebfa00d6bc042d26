"""Memory of operands with junk around it, which shows what a kernel reads outside of them."""

from __future__ import annotations

import torch

PADDING = 64
"""Elements of NaN before and behind each buffer."""


def padded(values: torch.Tensor) -> torch.Tensor:
    """The memory of `values` between junk: what a kernel reads outside becomes NaN in what it computes."""
    extent = 1 + sum((n - 1) * s for n, s in zip(values.shape, values.stride(), strict=True))
    around = torch.full((extent + 2 * PADDING,), float("nan") if values.is_floating_point() else 1, dtype=values.dtype)
    around[PADDING : PADDING + extent] = values.as_strided((extent,), (1,), values.storage_offset())
    return around[PADDING : PADDING + extent]
