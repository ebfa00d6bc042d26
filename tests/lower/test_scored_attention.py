"""Attention in training found among the calls of a schedule, and what its kernels are told of it."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from fxopt.codegen.templates.scored_config import configs
from fxopt.codegen.triton_scored import print_scored
from fxopt.ir.exprs import evaluate, free_symbols
from fxopt.ir.region import Alternatives, Call, ScoredAttention
from fxopt.ir.scored_attention_op import (
    scored_attention,
    scored_attention_bias,
    scored_attention_key_value,
    scored_attention_query,
)
from fxopt.lower import Lowered
from fxopt.target import Target
from tests.lower.test_attention_kernels import rand, searched

H100 = Target.cuda(90)
RULE = {"scale": 0.25, "cap": 2.0, "fill": -math.inf, "band": [-40, 0]}
Q, K, V = rand(4, 6, 40, 64), rand(4, 2, 40, 64), rand(4, 2, 40, 64)
BIAS = torch.randn(1, 6, 40, 40)
MASK = torch.ones(2, 1, 1, 48, dtype=torch.bool)
STATISTICS = [torch.randn(4, 6, 40) for _ in range(3)]


def steps(low: Lowered) -> list[ScoredAttention]:
    found = [each.ways for each in low.steps if isinstance(each, Alternatives)]
    for (call,), (own,) in ((library.steps, kernel.steps) for library, kernel in found):
        assert isinstance(call, Call) and isinstance(own, ScoredAttention)
    return [kernel.steps[0] for _, kernel in found]  # type: ignore[misc]


def forward(q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None, mask: Tensor | None) -> Any:
    return scored_attention(q, k, v, bias, mask, **RULE)


def backward(q: Tensor, k: Tensor, v: Tensor, bias: Tensor, grad: Tensor, *statistics: Tensor) -> Any:
    given = (grad.transpose(1, 2), q, k, v, bias, None, *statistics)
    return (
        scored_attention_query(*given, **RULE),
        *scored_attention_key_value(*given, **RULE),
        scored_attention_bias(*given, 2, **RULE),
    )


def test_operands_are_views_of_buffers() -> None:
    (own,) = steps(searched(lambda q, k, v, b, m: forward(q * 2, k, v, b, m[..., 3:43]), Q, K, V, BIAS, MASK))
    assert own.operands["key"].strides == K.stride() and own.operands["query"].strides == Q.stride()
    assert (own.operands["mask"].strides, own.operands["mask"].offset) == ((48, 0, 0, 1), 3)
    assert own.operands["bias"].strides == (0, 1600, 40, 1)
    assert (own.scale, own.cap, own.fill, own.band) == (0.25, 2.0, -math.inf, (-40, 0))
    assert [x.shape for x in own.results] == [(4, 6, 40, 64)] * 2 + [(4, 6, 40)] * 2


def test_each_gradient_is_a_kernel() -> None:
    own = steps(searched(backward, Q, K, V, BIAS, Q.transpose(1, 2).contiguous(), *STATISTICS))
    assert [x.op.removeprefix("scored_attention") for x in own] == ["_query", "_key_value", "_bias"]
    assert all(x.operands["grad"].strides[3] == 1 and "mask" not in x.operands for x in own)
    grids = [print_scored(x, configs(x, H100)[0], H100).grid[0] for x in own]
    assert grids == [4 * 6, 4 * 2, 2 * 6], "tiles of 64 by heads, groups, and parts of the bias"


@pytest.mark.parametrize(
    ("change", "args"),
    [
        (lambda q, k, v: (q.float(), k.float(), v.float()), (Q, K, V)),
        (lambda q, k, v: (q[..., :12], k[..., :12], v), (Q, K, V)),
    ],
    ids=["float32", "odd features"],
)
def test_the_rest_is_the_ops(change: Callable[..., Any], args: tuple[Tensor, ...]) -> None:
    low = searched(lambda *given: forward(*change(*given), None, None), *args)
    assert steps(low) == [] and any(isinstance(s, Call) for s in low.steps)


def test_sizes_known_only_at_run_time() -> None:
    """Batches, rows and keys are: a kernel is told of size symbols, and its grid follows them."""

    def fn(q: Tensor, k: Tensor, v: Tensor, bias: Tensor, mask: Tensor, grad: Tensor, *statistics: Tensor) -> Any:
        q, k, v, grad = (x.unflatten(2, (heads, 64)) for x, heads in ((q, 6), (k, 2), (v, 2), (grad, 6)))
        q, k, v = (x.transpose(1, 2) for x in (q, k, v))
        bias, mask = bias.expand(1, 6, -1, -1), mask[:, None, None]
        rest = (x.unsqueeze(1).expand(-1, 6, -1) for x in statistics)
        return (*forward(q, k, v, bias, mask)[:2], *backward(q, k, v, bias, grad, *rest))

    shapes = ((4, 40, 384), (4, 48, 128), (4, 48, 128), (40, 48), (4, 48), (4, 40, 384), (4, 40), (4, 40), (4, 40))
    given = [torch.randn(shape).to(torch.float32 if len(shape) == 2 else torch.bfloat16) for shape in shapes]
    given[4] = given[4] > 0
    own = steps(searched(fn, *given, dynamic=True))
    assert [x.op.removeprefix("scored_attention") for x in own] == ["", "_query", "_key_value", "_bias"]
    lengths = tuple(own[0].operands[n].shape[2] for n in ("query", "key"))
    stored = [result.shape[:-2] for x in own for result in x.results if result.shape[-2:] == lengths]
    assert stored == [(2, 1, 6)], "no scores but those that a bias's gradient is summed from"
    for x in own:
        source = print_scored(x, configs(x, H100)[0], H100)
        symbols = {sym.name for size in (*source.sizes, source.grid[0]) for sym in free_symbols(size)}
        grids = [evaluate(source.grid[0], dict.fromkeys(symbols, size)) for size in (40, 400)]
        assert source.sizes and grids[1] > 10 * grids[0]


def test_a_symbolic_number_of_heads_is_the_ops() -> None:
    low = searched(lambda q, k, v: forward(q, k, v, None, None), Q, K, V, dynamic=True)
    assert steps(low) == []
