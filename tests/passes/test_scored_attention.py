"""Attention written out and trained, with scores that no library takes: what becomes an op of ours, with eager's values."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from fxopt.journal import RECENT
from fxopt.passes.hand_attention import scored, written
from tests.numerics import assert_closer, to_float64

B, H, S, T, E = 2, 4, 24, 24, 16
BF16 = torch.bfloat16


@pytest.fixture(autouse=True)
def _as_on_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(written, "MIN_CPU_SCORES", 0)
    monkeypatch.setattr(scored, "chooses_late", lambda device: True)


def rand(*shape: int, seed: int = 0, learns: bool = True) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=generator).to(BF16).requires_grad_(learns)


Q, K, V = rand(B, H, S, E), rand(B, H, T, E, seed=1), rand(B, H, T, E, seed=2)


def capped(q: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> Tensor:
    """Gemma 2's, with transformers' spelling."""
    weights = torch.matmul(q, k.transpose(2, 3)) * 0.25
    weights = weights / 5.0
    weights = torch.tanh(weights)
    weights = weights * 5.0
    weights = weights + mask
    weights = F.softmax(weights, dim=-1, dtype=torch.float32).to(q.dtype)
    return torch.matmul(F.dropout(weights, p=0.0, training=True), v).transpose(1, 2).contiguous()


def capped_in_place(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Grok's, and a window made of positions."""
    scores = 3.0 * (torch.einsum("bhid,bhjd->bhij", q, k) * (0.25 / 3.0)).tanh()
    away = torch.arange(T)[None, :] - torch.arange(S)[:, None]
    return scores.masked_fill((away > 0) | (away < -7), float("-inf")).softmax(-1) @ v


def capped_by_a_module(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """As capped_in_place, with a least float and is_causal's triangle (JAX ports)."""
    scores = torch.nn.functional.tanh(q @ k.mT / 20.0) * 4.0
    seen = torch.ones(S, T, dtype=torch.bool).tril()
    return torch.softmax(torch.where(seen, scores, torch.finfo(BF16).min).float(), -1).type_as(q) @ v


def relative(q: Tensor, k: Tensor, v: Tensor, bias: Tensor) -> Tensor:
    """T5's: no scale, a bias for all batches."""
    scores = torch.matmul(q, k.transpose(3, 2))
    scores += bias
    return torch.matmul(F.softmax(scores.float(), dim=-1).type_as(scores), v)


def windows(q: Tensor, k: Tensor, v: Tensor, bias: Tensor, mask: Tensor) -> Tensor:
    """Swin's: a bias, and a mask for each window of an image."""
    count = mask.shape[0]
    scores = (q * 0.25) @ k.transpose(-2, -1) + bias.unsqueeze(0)
    scores = scores.view(B // count, count, H, S, T) + mask.unsqueeze(1).unsqueeze(0)
    return F.softmax(scores.view(-1, H, S, T), dim=-1) @ v


def distances(q: Tensor, k: Tensor, v: Tensor, alibi: Tensor, mask: Tensor) -> Tensor:
    """BLOOM's: slopes by baddbmm, over batches and heads as one, then a mask that may hide rows."""
    q, k, v = (x.reshape(B * H, -1, E) for x in (q, k, v))
    scores = alibi.baddbmm(batch1=q, batch2=k.transpose(-1, -2), beta=1.0, alpha=0.25).view(B, H, S, T)
    weights = F.softmax(scores + mask, dim=-1, dtype=torch.float32).to(q.dtype)
    return torch.bmm(weights.view(B * H, S, T), v).view(B, H, S, E)


def filled_bias(q: Tensor, k: Tensor, v: Tensor, bias: Tensor, seen: Tensor) -> Tensor:
    """BEiT's bias with padding that is filled."""
    scores = torch.add(q @ k.transpose(2, 3) * 0.25, bias)
    return torch.softmax(torch.masked_fill(scores, ~seen, torch.finfo(BF16).min), -1) @ v


def padding(*shape: int) -> Tensor:
    """True where a key is seen; of one row, nothing."""
    seen = torch.rand(shape, generator=torch.Generator().manual_seed(7)) < 0.7
    seen[..., 0] = True
    return seen


LEAST = torch.finfo(BF16).min
ADDED = torch.zeros(B, 1, S, T, dtype=BF16).masked_fill(~padding(B, 1, S, T), LEAST)
ADDED[0, :, 3] = LEAST
CASES: dict[str, tuple[Callable[..., Tensor], tuple[Tensor, ...]]] = {
    "capped": (capped, (ADDED,)),
    "capped in place": (capped_in_place, ()),
    "capped by a module": (capped_by_a_module, ()),
    "relative": (relative, (rand(1, H, S, T, seed=3),)),
    "relative, a row of one": (relative, (rand(1, H, 1, T, seed=3),)),
    "windows": (windows, (rand(H, S, T, seed=3), ADDED[:, 0])),
    "distances": (distances, (rand(B * H, 1, T, seed=3, learns=False), ADDED)),
    "filled bias": (filled_bias, (rand(1, H, S, T, seed=3), padding(B, 1, 1, T))),
}


def outcome(fn: Callable[..., Tensor], given: tuple[Tensor, ...]) -> list[Tensor]:
    """The result, and the gradients of what learns."""
    given = tuple(x.detach().clone().requires_grad_(x.requires_grad) for x in given)
    out = fn(*given)
    weight = torch.randn(out.shape, generator=torch.Generator().manual_seed(9)).to(out.dtype)
    (out * weight).sum().backward()
    return [out.detach(), *(x.grad for x in given if x.grad is not None)]


def compiled(fn: Callable[..., Tensor], given: tuple[Tensor, ...]) -> tuple[list[Tensor], int, list[str]]:
    """`outcome` as compiled, how many attentions became our op, and why others did not."""
    torch.compiler.reset()
    RECENT.clear()
    results = outcome(torch.compile(fn, backend="fxopt", options={"strict": True}, dynamic=False), given)
    notes = [note for journal in RECENT for note in journal.notes]
    count = sum(int(text.rpartition("x")[2]) for _, text in notes if text.startswith("hand_attention.scored x"))
    return results, count, [text for topic, text in notes if topic == "rejected" and text.startswith("hand_attention: ")]


@pytest.mark.parametrize("name", CASES)
def test_spellings(name: str) -> None:
    fn, more = CASES[name]
    given = (Q, K, V, *more)
    results, count, reasons = compiled(fn, given)
    assert count == 1, reasons
    assert_closer(results, outcome(fn, given), outcome(fn, to_float64(given)))
