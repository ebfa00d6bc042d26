"""Attention in training that no kernel computes: products and a softmax, compiled like any others."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

from fxopt.capture import scored_apart
from fxopt.ir import scored_attention_op
from fxopt.ir.scored_attention_op import scored_attention
from fxopt.journal import RECENT
from tests.numerics import assert_closer, to_float64

B, H, G, S, T, E = 2, 4, 2, 24, 20, 16
MASK = torch.rand(2, 1, 1, T, generator=torch.Generator().manual_seed(1)) > 0.3
SEED = torch.tensor(2**40 + 1)
RULES: dict[str, tuple[Tensor | None, Tensor | None, dict[str, Any]]] = {
    "dropout": (MASK, SEED, {"scale": 0.25, "cap": 2.0, "fill": -math.inf, "band": [-10, 10], "drop": 0.2}),
    "added": (MASK.float() * -3, None, {"scale": 0.25, "cap": 0.0, "fill": 0.0, "band": None}),
}


@pytest.fixture
def wide_sums(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Half products with results in float32 on the CPU, too, where torch has none."""
    library = torch.library.Library("aten", "IMPL")
    library.impl("bmm.dtype", lambda a, b, out_dtype: torch.bmm(a.to(out_dtype), b.to(out_dtype)), "CPU")
    monkeypatch.setattr(scored_attention_op, "_has_wide_sums", lambda x: x.dtype == torch.bfloat16)
    yield
    library._destroy()


def inputs(dtype: torch.dtype) -> tuple[Tensor, ...]:
    """Query, key, value and bias with gradients, heads next to features, and an incoming gradient."""
    generator = torch.Generator().manual_seed(0)

    def made(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator).to(dtype)

    q, k, v = (made(B, n, h, E).transpose(1, 2) for n, h in ((S, H), (T, G), (T, G)))
    return *(x.requires_grad_() for x in (q, k, v, made(1, H, S, T))), made(B, H, S, E)


def outcome(attend: Callable[..., Tensor], *given: Tensor) -> tuple[Tensor, ...]:
    *leaves, weight = given
    out = attend(*leaves)
    return out, *torch.autograd.grad(out, leaves, weight)


def compiled_and_eager(rule: str, dtype: torch.dtype, **options: Any) -> tuple[Any, Any, Any]:
    mask, seed, literals = RULES[rule]

    def attend(q: Tensor, k: Tensor, v: Tensor, bias: Tensor) -> Tensor:
        return scored_attention(q, k, v, bias, mask, seed, **literals)[0]

    torch.compiler.reset()
    RECENT.clear()
    given = inputs(dtype)
    compiled = torch.compile(attend, backend="fxopt", dynamic=False, options={"strict": True, "check": True, **options})
    exact = outcome(attend, *to_float64(given))
    return outcome(compiled, *given), outcome(attend, *given), exact


def calls() -> list[str]:
    """The library's ops in the graphs compiled."""
    return [op for journal in RECENT for op, _ in journal.library]


@pytest.mark.parametrize("rule", RULES)
def test_values_and_gradients(rule: str) -> None:
    assert_closer(*compiled_and_eager(rule, torch.float32))
    assert calls() == ["aten::bmm.default"] * 7, "two products, then five: the ops of the gradients share theirs"


@pytest.mark.parametrize("rule", RULES)
def test_half_operands_are_not_widened(rule: str, wide_sums: None) -> None:
    assert_closer(*compiled_and_eager(rule, torch.bfloat16))
    assert sorted(calls()) == ["aten::bmm.default"] * 3 + ["aten::bmm.dtype"] * 4


def test_what_would_take_too_much_memory_stays(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(scored_apart, "MOST_SCORES", B * H * S * T - 1)
    assert_closer(*compiled_and_eager("added", torch.float32))
    assert [op.partition("::")[0] for op in calls()] == ["fxopt"] * 4
