"""Attention written out and trained, with scores that no library takes: what becomes an op of ours, with eager's values."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, fx

from fxopt.ir import random_ops
from fxopt.ir.scored_attention_op import SCORED, keeps, scored_attention
from fxopt.journal import RECENT, Journal
from fxopt.options import Options
from fxopt.passes import run_early
from fxopt.passes.hand_attention import scored, written
from tests.numerics import assert_closer, to_float64

B, H, S, T, E = 2, 4, 24, 24, 16
BF16 = torch.bfloat16


@pytest.fixture(autouse=True)
def _as_on_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(written, "MIN_CPU_SCORES", 0)
    for module in (scored, written):
        monkeypatch.setattr(module, "chooses_late", lambda device: True)


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


def grouped(q: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> Tensor:
    """Two heads to a group, by transformers' repeat_kv."""

    def repeated(x: Tensor) -> Tensor:
        batch, groups, length, width = x.shape
        return x[:, :, None, :, :].expand(batch, groups, 2, length, width).reshape(batch, groups * 2, length, width)

    return capped(q, repeated(k[:, :2]), repeated(v[:, :2]), mask)


def interleaved(q: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> Tensor:
    k, v = torch.repeat_interleave(k[:, :2], 2, dim=1), v[:, :2].repeat_interleave(2, 1)
    return capped(q, k, v, mask)


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


def two_biases(q: Tensor, k: Tensor, v: Tensor, bias: Tensor, row: Tensor, seen: Tensor) -> Tensor:
    """A relative bias and one of keys, both of which learn, and a fill."""
    scores = q @ k.mT * 0.25 + bias + row
    return torch.softmax(scores.masked_fill(~seen, float("-inf")), -1) @ v


def one_head(q: Tensor, k: Tensor, v: Tensor, alibi: Tensor, mask: Tensor) -> Tensor:
    """Falcon's: keys and values of one head, ALiBi scaled with the scores."""
    scores = (torch.matmul(q, k[:, :1].transpose(-1, -2)) + alibi) * 0.25
    return torch.matmul(F.softmax(scores + mask, dim=-1), v[:, :1])


def widened(q: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> Tensor:
    """GPT-J's: a product in float32 of half operands."""
    scores = torch.matmul(q.to(torch.float32), k.float().transpose(-1, -2)) / 4 + mask
    return torch.matmul(F.softmax(scores, dim=-1).to(v.dtype), v)


def tempered(q: Tensor, k: Tensor, v: Tensor, temperature: Tensor, bias: Tensor) -> Tensor:
    """Swin 2's: normalized operands, and a factor of heads that learns."""
    scores = F.normalize(q, dim=-1) @ F.normalize(k, dim=-1).transpose(-2, -1)
    scores = scores * torch.clamp(temperature, max=4.0).exp() + bias
    return F.softmax(scores, dim=-1) @ v


def narrow_values(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return torch.softmax(q @ k.mT * 0.25, -1) @ v[..., :8]


def padding(*shape: int) -> Tensor:
    """True where a key is seen; of one row, nothing."""
    seen = torch.rand(shape, generator=torch.Generator().manual_seed(7)) < 0.7
    seen[..., 0] = True
    return seen


LEAST = torch.finfo(BF16).min
ADDED = torch.zeros(B, 1, S, T, dtype=BF16).masked_fill(~padding(B, 1, S, T), LEAST)
ADDED[0, :, 3] = LEAST
CASES: dict[str, tuple[Callable[..., Tensor], tuple[Tensor, ...], list[int] | None]] = {
    "capped": (capped, (ADDED,), None),
    "capped, a window": (capped_in_place, (), [-7, 0]),
    "grouped": (grouped, (ADDED,), None),
    "grouped by repeat_interleave": (interleaved, (ADDED,), None),
    "capped, causal": (capped_by_a_module, (), [1 - S, 0]),
    "relative": (relative, (rand(1, H, S, T, seed=3),), None),
    "relative, a row of one": (relative, (rand(1, H, 1, T, seed=3),), None),
    "windows": (windows, (rand(H, S, T, seed=3), ADDED[:, 0]), None),
    "distances": (distances, (rand(B * H, 1, T, seed=3, learns=False), ADDED), None),
    "filled bias": (filled_bias, (rand(1, H, S, T, seed=3), padding(B, 1, 1, T)), None),
    "two biases": (two_biases, (rand(1, H, S, T, seed=3), rand(B, 1, 1, T, seed=4), padding(B, 1, 1, T)), None),
    "tempered": (tempered, (rand(H, 1, 1, seed=3), rand(H, S, T, seed=4)), None),
    "narrow values": (narrow_values, (), None),
    "one head": (one_head, (rand(B, H, 1, T, seed=3, learns=False), ADDED), None),
    "widened": (widened, (ADDED,), None),
}
"""Name -> the spelling, what it is given beside query, key and value, and the band that it leaves open."""


def outcome(fn: Callable[..., Tensor], given: tuple[Tensor, ...]) -> list[Tensor]:
    """The result, and the gradients of what learns."""
    given = tuple(x.detach().clone().requires_grad_(x.requires_grad) for x in given)
    out = fn(*given)
    weight = torch.randn(out.shape, generator=torch.Generator().manual_seed(9)).to(out.dtype)
    (out * weight).sum().backward()
    return [out.detach(), *(x.grad for x in given if x.grad is not None)]


def rewritten(
    fn: Callable[..., Tensor], given: tuple[Tensor, ...], options: Options | None = None
) -> tuple[list[Tensor], list[fx.Node], list[str]]:
    """`outcome` of the graph that early passes leave, run as it is; our calls in it, and why attentions were left."""
    graphs: list[fx.GraphModule] = []
    journal = Journal("test", strict=True)

    def early(gm: fx.GraphModule, inputs: list[Tensor]) -> Callable[..., Any]:
        run_early(gm, options or Options(), journal)
        graphs.append(gm)
        return gm.forward

    torch.compiler.reset()
    results = outcome(torch.compile(fn, backend=early, dynamic=False, fullgraph=True), given)
    calls = [n for gm in graphs for n in gm.graph.nodes if n.target is scored_attention]
    return results, calls, [text for topic, text in journal.notes if topic == "rejected"]


@pytest.mark.parametrize("name", CASES)
def test_spellings(name: str) -> None:
    fn, more, band = CASES[name]
    given = (Q, K, V, *more)
    results, calls, reasons = rewritten(fn, given)
    assert len(calls) == 1, reasons
    assert calls[0].kwargs["band"] == band
    assert {x.meta["example_value"].shape[1] for x in calls[0].args[1:3]} == {
        {"grouped": 2, "one": 1}.get(name.split()[0], H)
    }  # type: ignore[union-attr]
    assert_closer(results, outcome(fn, given), outcome(fn, to_float64(given)))


def seen_by(mask: Tensor) -> Tensor:
    """Addends that hide what a boolean mask hides."""
    return torch.zeros(mask.shape, dtype=BF16).masked_fill(~mask, LEAST)


def any_distances(q: Tensor, k: Tensor, v: Tensor, alibi: Tensor, mask: Tensor) -> Tensor:
    """As `distances`, of any size."""
    batch, heads, rows, width = q.shape
    q, k, v = (x.reshape(batch * heads, -1, width) for x in (q, k, v))
    scores = alibi.baddbmm(batch1=q, batch2=k.transpose(-1, -2), beta=1.0, alpha=0.25).view(batch, heads, rows, -1)
    weights = F.softmax(scores + mask, dim=-1, dtype=torch.float32).to(q.dtype)
    return torch.bmm(weights.view(batch * heads, rows, -1), v).view(batch, heads, rows, width)


def causal(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Capped, with a triangle made of positions, as JAX ports have it."""
    scores = torch.tanh(q @ k.mT / 20.0) * 4.0
    seen = torch.ones(q.shape[2], k.shape[2], dtype=torch.bool).tril()
    return torch.softmax(torch.where(seen, scores, torch.finfo(BF16).min).float(), -1).type_as(q) @ v


OF_ANY_SIZE: dict[str, tuple[Callable[..., Tensor], dict[str, Callable[..., Tensor]]]] = {
    "capped": (capped, {"B1ST": lambda *shape: seen_by(padding(*shape))}),
    "grouped": (grouped, {"B1ST": lambda *shape: seen_by(padding(*shape))}),
    "relative": (relative, {"1HST": rand}),
    "relative, a row of one": (relative, {"1H1T": rand}),
    "distances": (any_distances, {"N1T": rand, "B1ST": lambda *shape: seen_by(padding(*shape))}),
    "filled bias": (filled_bias, {"1HST": rand, "B11T": padding}),
    "two biases": (two_biases, {"1HST": rand, "1H1T": lambda *shape: rand(*shape, seed=4), "B11T": padding}),
    "one head": (one_head, {"BH1T": lambda *shape: rand(*shape, learns=False), "B1ST": lambda *s: seen_by(padding(*s))}),
    "causal": (causal, {}),
}
"""Name -> the spelling, and for each tensor beside query, key and value its sizes by their letters and what makes it."""

LENGTHS = ((2, 24, 31), (3, 17, 23), (2, 61, 61), (5, 2, 40))
"""Batches, rows and keys, some longer than the first ones."""


@pytest.mark.parametrize("name", OF_ANY_SIZE)
def test_sizes_known_only_at_run_time(name: str) -> None:
    """One graph for all of them."""
    fn, more = OF_ANY_SIZE[name]
    graphs: list[fx.GraphModule] = []
    journal = Journal("test", strict=True)

    def early(gm: fx.GraphModule, inputs: list[Tensor]) -> Callable[..., Any]:
        run_early(gm, Options(), journal)
        graphs.append(gm)
        return gm.forward

    torch.compiler.reset()
    compiled = torch.compile(fn, backend=early, fullgraph=True)
    for batch, rows, keys in LENGTHS:
        keys = rows if name == "causal" else keys
        size = {"B": batch, "H": H, "S": rows, "T": keys, "E": E, "N": batch * H, "1": 1}
        made = {"BHSE": rand, "BHTE": rand} | more
        layouts = ("BHSE", "BHTE", "BHTE", *more)
        given = tuple(
            (made[layout])(*(size[letter] for letter in layout), **({"seed": k} if k < 3 else {}))
            for k, layout in enumerate(layouts)
        )

        def dynamic(*given: Tensor) -> Tensor:
            for x, layout in zip(given, layouts, strict=True):  # noqa: B023
                for dim, letter in enumerate(layout):
                    if letter in "BSTN":
                        torch._dynamo.mark_dynamic(x, dim)
            return compiled(*given)

        assert_closer(outcome(dynamic, given), outcome(fn, given), outcome(fn, to_float64(given)))
    calls = [n for n in graphs[0].graph.nodes if n.target is scored_attention]
    assert len(graphs) == 1 and len(calls) == 1, [text for topic, text in journal.notes if topic == "rejected"]


def test_compiled() -> None:
    """All the way, with gradients as ops of their own, which no kernel computes here."""
    given = (Q, K, V, CASES["relative"][1][0])
    torch.compiler.reset()
    RECENT.clear()
    results = outcome(torch.compile(relative, backend="fxopt", options={"strict": True}, dynamic=False), given)
    assert_closer(results, outcome(relative, given), outcome(relative, to_float64(given)))
    told = [text for journal in RECENT for topic, text in journal.notes if topic == "attention"]
    names = [op._schema.name.removeprefix("fxopt::") for op in SCORED]
    assert sorted(told) == sorted(f"{name}: no kernel of ours, as products and a softmax" for name in names)


def dropped(q: Tensor, k: Tensor, v: Tensor, bias: Tensor) -> Tensor:
    return torch.dropout(torch.softmax(q @ k.mT * 0.25 + bias, -1), 0.3, True) @ v


def test_dropout_is_that_of_the_seed() -> None:
    given = (Q, K, V, rand(1, H, S, T, seed=3))
    torch.manual_seed(5)
    results, calls, reasons = rewritten(dropped, given)
    assert len(calls) == 1 and calls[0].kwargs["drop"] == 0.3, reasons
    torch.manual_seed(5)
    kept = keeps(random_ops.seed(torch.device("cpu")), 0.3, torch.arange(B * H).view(B, H), S, T)

    def as_written(q: Tensor, k: Tensor, v: Tensor, bias: Tensor) -> Tensor:
        return (torch.softmax(q @ k.mT * 0.25 + bias, -1) * kept / 0.7).to(q.dtype) @ v

    assert_closer(results, outcome(as_written, given), outcome(as_written, to_float64(given)))


def test_compiled_dropout_follows_the_generator() -> None:
    """The backward drops what the forward did: a result is linear in the values. Two attentions of a graph drop apart."""
    bias = rand(1, H, S, T, seed=3)
    q, k, v = (x.detach().clone().requires_grad_() for x in (Q, K, V))
    weight = rand(B, H, S, E, seed=8, learns=False)
    torch.compiler.reset()
    fn = torch.compile(lambda *x: (dropped(*x), dropped(*x)), backend="fxopt", options={"strict": True}, dynamic=False)
    drawn = []
    for seed in (1, 2, 1):
        torch.manual_seed(seed)
        one, two = fn(q, k, v, bias)
        (slope,) = torch.autograd.grad((one * weight).sum(), (v,))
        torch.testing.assert_close(
            (slope * v).sum(dtype=torch.float64), (one * weight).sum(dtype=torch.float64), rtol=2e-2, atol=0.5
        )
        drawn.append(one.detach())
        assert not torch.equal(one, two)
    assert torch.equal(drawn[0], drawn[2]) and not torch.equal(drawn[0], drawn[1])


def test_eagers_own_bits_are_left_to_eager() -> None:
    assert rewritten(dropped, (Q, K, V, rand(1, H, S, T, seed=3)), Options(fallback_random=True))[1] == []


def added_to_a_fill(q: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> Tensor:
    """Rows that both hide have other values than with the two exchanged."""
    seen = torch.ones(S, T, dtype=torch.bool).tril()
    return torch.softmax(torch.where(seen, q @ k.mT, LEAST) + mask, -1) @ v


def bias_before_the_cap(q: Tensor, k: Tensor, v: Tensor, bias: Tensor) -> Tensor:
    return torch.softmax(torch.tanh(q @ k.mT + bias), -1) @ v


def dropped_twice(q: Tensor, k: Tensor, v: Tensor, bias: Tensor) -> Tensor:
    return F.dropout(F.dropout(torch.softmax(q @ k.mT + bias, -1), 0.1), 0.1) @ v


@pytest.mark.parametrize("fn", [added_to_a_fill, bias_before_the_cap, dropped_twice])
def test_the_rest_stays(fn: Callable[..., Tensor]) -> None:
    assert rewritten(fn, (Q, K, V, ADDED if fn is added_to_a_fill else rand(1, H, S, T, seed=3)))[1] == []
