"""Attention masks: dropped when they hide nothing, else additive, aligned and shared."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch.fx.experimental.proxy_tensor import make_fx

from fxopt import passes
from fxopt.ir.attention_op import attention
from fxopt.ir.graph import Graph, Input, Phase, Role
from fxopt.journal import Journal
from fxopt.options import Options
from fxopt.passes.facts import arguments

Tensor = torch.Tensor


def optimized(fn: Callable[..., Tensor], *args: Tensor) -> Graph:
    gm = make_fx(lambda *a: (fn(*a),), tracing_mode="fake")(*args)
    inputs = [Input(n.name, Role.USER) for n in gm.graph.nodes if n.op == "placeholder"]
    graph = Graph(gm, inputs, Phase.INFERENCE, "test")
    passes.run(graph, Options(check=True), Journal("test"))
    return graph


def masks(graph: Graph) -> list[torch.fx.Node | None]:
    return [arguments(n).get("attn_mask") for n in graph.gm.graph.nodes if n.target is attention]


def operands(length: int = 6) -> list[Tensor]:
    return [torch.randn(2, 3, length, 8) for _ in range(3)]


def test_a_mask_that_hides_nothing_disappears() -> None:
    def fn(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        seen = (torch.arange(q.shape[2])[None, :, None] >= 0).expand(2, q.shape[2], q.shape[2])
        return attention(q, k, v, seen[:, None])

    assert masks(optimized(fn, *operands())) == [None]


@pytest.mark.parametrize("length", [6, 8])
def test_a_boolean_mask_becomes_an_aligned_addend(length: int) -> None:
    def fn(q: Tensor, k: Tensor, v: Tensor, keep: Tensor) -> Tensor:
        return attention(q, k, v, keep[:, None, None, :].expand(2, 1, length, length))

    q, k, v = operands(length)
    keep = torch.rand(2, length) > 0.3
    keep[:, 0] = True
    graph = optimized(fn, q, k, v, keep)
    (mask,) = masks(graph)
    assert mask is not None
    value = mask.meta["val"]
    assert value.dtype == q.dtype
    assert value.stride(-1) == 1
    assert value.stride(-2) % 8 == 0
    torch.testing.assert_close(graph.gm(q, k, v, keep)[0], fn(q, k, v, keep))


def test_layers_share_the_addend_and_broadcast_dimensions_are_not_materialized() -> None:
    def fn(q: Tensor, k: Tensor, v: Tensor, keep: Tensor) -> Tensor:
        mask = keep[None, None].expand(2, 1, 6, 6)
        return attention(attention(q, k, v, mask), k, v, mask)

    keep = torch.ones(6, 6).tril().bool()
    graph = optimized(fn, *operands(), keep)
    first, second = masks(graph)
    assert first is second
    assert first is not None
    assert first.meta["val"].shape[0] == 1
    args = (*operands(), keep)
    torch.testing.assert_close(graph.gm(*args)[0], fn(*args))


def test_an_additive_mask_stays() -> None:
    def fn(q: Tensor, k: Tensor, v: Tensor, bias: Tensor) -> Tensor:
        return attention(q, k, v, bias)

    graph = optimized(fn, *operands(), torch.randn(6, 6))
    (mask,) = masks(graph)
    assert mask is not None
    assert mask.op == "placeholder"
