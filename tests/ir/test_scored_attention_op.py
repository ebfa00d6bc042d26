"""The eager forms of attention in training: gradients are those of finite differences, in pieces or as a whole."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from fxopt.errors import GradientError
from fxopt.ir import scored_attention_op
from fxopt.ir.scored_attention_op import keeps, scored_attention

B, H, G, S, T, E = 4, 4, 2, 2, 3, 2


def rand(*shape: int) -> Tensor:
    return torch.randn(shape, dtype=torch.float64, generator=torch.Generator().manual_seed(sum(shape))).requires_grad_()


SEEN = torch.rand(2, H, 1, T, generator=torch.Generator().manual_seed(0)) > 0.4
OPERANDS = rand(B, H, S, E), rand(B, G, T, E), rand(B, G, T, E)
RULE = {"scale": 0.3, "cap": 2.0, "fill": -1e9, "band": [-1, 2]}


@pytest.mark.parametrize("most", [1 << 26, 1])
@pytest.mark.parametrize("sizes", [(2, 1), (1, H)])
def test_gradients(sizes: tuple[int, int], most: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(scored_attention_op, "MOST_SCORES", most)
    bias = rand(*sizes, S, T)
    assert torch.autograd.gradcheck(lambda *x: scored_attention(*x, SEEN, **RULE)[0], (*OPERANDS, bias), fast_mode=True)


def test_gradients_with_dropout(monkeypatch: pytest.MonkeyPatch) -> None:
    """The same is dropped in each call, in pieces too."""
    bias, seed = rand(1, H, S, T), torch.tensor(2**40 + 3)
    whole = scored_attention(*OPERANDS, bias, SEEN, seed, **RULE, drop=0.4)[0]
    monkeypatch.setattr(scored_attention_op, "MOST_SCORES", 1)
    assert torch.equal(whole, scored_attention(*OPERANDS, bias, SEEN, seed, **RULE, drop=0.4)[0])
    fn = lambda *x: scored_attention(*x, SEEN, seed, **RULE, drop=0.4)[0]  # noqa: E731
    assert torch.autograd.gradcheck(fn, (*OPERANDS, bias), fast_mode=True)


@pytest.mark.parametrize("most", [1 << 26, 1])
def test_more_parts_than_are_filled(most: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Four batches in three parts: two each, and none in the last one."""
    monkeypatch.setattr(scored_attention_op, "MOST_SCORES", most)
    given = (OPERANDS[0], *OPERANDS, rand(1, H, S, T), None, *(rand(B, H, S) for _ in range(3)))
    found, whole = (scored_attention_op.bias_gradient(*given, parts, **RULE) for parts in (3, 1))
    assert found.shape == (3, 1, H, S, T) and not found[2].any()
    torch.testing.assert_close(found.sum(0), whole[0])


@pytest.mark.parametrize("drop", [0.1, 0.5])
def test_dropout_is_independent_of_place(drop: float) -> None:
    """Shares, and those of pairs: of neighbours, of heads, of the corners of a rectangle."""
    count, size = 8, 512
    kept = keeps(torch.tensor(-7), drop, torch.arange(count), size, size).double()
    along = [kept.roll(1, d) for d in range(3)]
    corners = along[1] * along[2] * kept.roll((1, 1), (1, 2))
    error = 5 / (count * size * size) ** 0.5
    for product, share in ((1.0, 1 - drop), *((x, (1 - drop) ** 2) for x in along), (corners, (1 - drop) ** 4)):
        assert abs(float((kept * product).mean()) - share) < error
    assert float(kept.mean((0, 1)).std()) < 2 * (drop / (count * size)) ** 0.5, "columns"


def test_a_mask_has_no_gradient() -> None:
    with pytest.raises(GradientError, match="no gradient for its mask"):
        scored_attention(*OPERANDS, None, rand(1, 1, S, T), **RULE)[0].sum().backward()


def test_there_is_no_second_derivative() -> None:
    (slope,) = torch.autograd.grad(scored_attention(*OPERANDS, None, None, **RULE)[0].sum(), OPERANDS[:1], create_graph=True)
    with pytest.raises(GradientError, match="differentiable once"):
        slope.sum().backward()


def test_a_row_hidden_by_a_large_addend_is_uniform() -> None:
    """In float32, too, where the addend absorbs scores and the logarithm of their sum."""
    query, key, value = (x.detach().float().requires_grad_() for x in OPERANDS)
    mask = torch.full((1, 1, S, T), torch.finfo(torch.float32).min)
    out = scored_attention(query, key, value, None, mask, scale=1.0, cap=0.0, fill=0.0, band=None)[0]
    out.sum().backward()
    assert value.grad is not None and torch.allclose(value.grad, torch.full_like(value, S * H / G / T))
