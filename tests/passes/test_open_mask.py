"""Attention masks that hide nothing are dropped before a backend is chosen, and only those."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F

from fxopt import passes
from fxopt.journal import Journal
from fxopt.options import Options

Tensor = torch.Tensor


def masks(fn: Callable[..., Tensor], *args: Tensor) -> list[Any]:
    """What stands as attn_mask after the early passes, for each attention call that Dynamo captured."""
    found: list[Any] = []

    def backend(gm: torch.fx.GraphModule, inputs: Any) -> Any:
        passes.run_early(gm, Options(), Journal("test"))
        gm.recompile()
        for node in gm.graph.nodes:
            if "attention" in str(node.target):
                found.append(node.kwargs.get("attn_mask", node.args[3] if len(node.args) > 3 else None))
        return gm

    torch.compiler.reset()
    torch.testing.assert_close(torch.compile(fn, backend=backend, dynamic=False)(*args), fn(*args))
    return found


def operands() -> list[Tensor]:
    return [torch.randn(2, 3, 6, 8) for _ in range(3)]


def every_position(q: Tensor) -> Tensor:
    positions = torch.arange(q.shape[2], device=q.device) + 0
    return (positions[None, None, :, None] >= 0).expand(q.shape[0], -1, q.shape[2], q.shape[2])


def test_a_mask_of_all_positions_is_dropped() -> None:
    assert masks(lambda q, k, v: F.scaled_dot_product_attention(q, k, v, attn_mask=every_position(q)), *operands()) == [None]


def test_a_positional_argument_is_dropped_too() -> None:
    assert masks(lambda q, k, v: F.scaled_dot_product_attention(q, k, v, every_position(q)), *operands()) == [None]


def written_directly(q: Tensor) -> Tensor:
    mask = torch.ones(6, 6, dtype=torch.bool)
    mask[:, 3:] = False
    return mask


def written_through_a_view(q: Tensor) -> Tensor:
    mask = torch.ones(6, 6, dtype=torch.bool)
    mask.view(-1)[7:12].fill_(False)
    return mask.expand(2, 1, 6, 6)


@pytest.mark.parametrize(
    "mask",
    [
        written_directly,
        written_through_a_view,
        lambda q: torch.arange(6)[:, None] >= torch.arange(6),  # causal
        lambda q: (torch.arange(6)[:, None] >= 0).expand(6, 6) & (q[0, 0, :, :1] < 1e9),  # depends on data
        lambda q: torch.zeros(6, 6),  # additive: adds nothing, but is not boolean
    ],
    ids=["written directly", "written through a view", "causal", "data", "additive"],
)
def test_other_masks_stay(mask: Callable[[Tensor], Tensor]) -> None:
    found = masks(lambda q, k, v: F.scaled_dot_product_attention(q, k, v, attn_mask=mask(q)), *operands())
    assert len(found) == 1
    assert found[0] is not None
