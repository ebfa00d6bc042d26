"""Attention written out by hand: which spellings become one fused call, which stay, and that results are eager's."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fxopt.journal import RECENT
from fxopt.passes.hand_attention import written
from tests.numerics import assert_closer, to_float64

B, H, S, T, E = 2, 3, 20, 24, 16
FUSED = "aten::_scaled_dot_product_flash_attention_for_cpu"


@pytest.fixture(autouse=True)
def _however_small(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(written, "MIN_CPU_SCORES", 0)


def operands(*shape: int, dtype: torch.dtype = torch.float32) -> tuple[Tensor, ...]:
    generator = torch.Generator().manual_seed(0)
    sizes = shape or (B, H, S, E)
    return tuple(torch.randn(*sizes[:-2], n, sizes[-1], generator=generator).to(dtype) for n in (sizes[-2], T, T))


def compiled(fn: Callable[..., Any], *args: Any, dynamic: bool | None = None) -> tuple[Any, int, list[str]]:
    """The result of `fn` as compiled (strictly), how many attentions were rewritten, and why others were not."""
    torch.compiler.reset()
    RECENT.clear()
    result = torch.compile(fn, backend="fxopt", options={"strict": True}, dynamic=dynamic)(*args)
    notes = [note for journal in RECENT for note in journal.notes]
    rewritten = sum(int(text.rpartition("x")[2]) for _, text in notes if text.startswith("hand_attention.written_out x"))
    return result, rewritten, [text for topic, text in notes if topic == "rejected" and text.startswith("hand_attention: ")]


def fused_calls() -> int:
    """Library calls of fused forwards in what was compiled last."""
    return sum(op.partition(".")[0] == FUSED for journal in RECENT for op, _ in journal.library)


def judged(fn: Callable[..., Any], *args: Any, expected: int, dynamic: bool | None = None, k: float = 4.0) -> list[str]:
    """Compile, compare with float64 next to eager's error; the reasons why attentions were left alone."""
    result, count, reasons = compiled(fn, *args, dynamic=dynamic)
    assert (count, fused_calls()) == (expected, expected), reasons
    wide = to_float64(fn) if isinstance(fn, nn.Module) else fn
    assert_closer(result, fn(*args), wide(*to_float64(args)), k=k)
    return reasons


def trained(fn: Callable[..., Tensor], *args: Tensor, expected: int, k: float = 8.0) -> list[str]:
    """As `judged`, with the gradients of the first three arguments."""

    def results(call: Callable[..., Tensor], given: tuple[Tensor, ...]) -> list[Tensor]:
        leaves = [x.detach().clone().requires_grad_() for x in given[:3]]
        out = call(*leaves, *given[3:])
        seed = torch.linspace(-1, 1, out.numel(), dtype=torch.float64).reshape(out.shape).to(out.dtype)
        return [out.detach(), *torch.autograd.grad(out, leaves, seed)]

    torch.compiler.reset()
    RECENT.clear()
    got = results(torch.compile(fn, backend="fxopt", options={"strict": True}), args)
    assert fused_calls() == expected
    assert_closer(got, results(fn, args), results(fn, to_float64(args)), k=k)
    return [text for journal in RECENT for topic, text in journal.notes if topic == "rejected"]


def plain(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return torch.matmul(F.softmax(torch.matmul(q, k.transpose(-1, -2)) / math.sqrt(q.size(-1)), dim=-1), v)


def operators(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return (q @ k.mT * q.shape[-1] ** -0.5).softmax(-1) @ v


def query_scaled(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return torch.softmax((q * 0.25) @ k.permute(0, 1, 3, 2), dim=3).matmul(v)


def both_scaled(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return torch.matmul(nn.functional.softmax(torch.matmul(q * 0.5, (k * 0.5).transpose(2, 3)), -1), v)


def literal_first(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return torch.matmul(torch.softmax(0.25 * torch.matmul(q, k.transpose(-2, -1)), -1), v)


def unscaled(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return torch.softmax(q @ k.transpose(-1, -2), -1) @ v


def einsum(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    scores = torch.einsum("bhqd,bhkd->bhqk", q, k) / 4
    return torch.einsum("bhij,bhjd->bhid", scores.softmax(dim=-1), v)


def einsum_heads_last(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    scores = torch.einsum("b q h d, b k h d -> b h q k", q * 0.25, k)
    return torch.einsum("bhqk,bkhd->bqhd", scores.softmax(dim=-1), v).reshape(q.shape[0], q.shape[1], -1)


def einsum_values_first(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    scores = torch.einsum("bhkd,bhqd->bhqk", k, q) / 4
    return torch.einsum("bhjd,bhij->bhid", v, scores.softmax(dim=-1))


def merged_heads(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    q, k, v = (x.flatten(0, 1) for x in (q, k, v))
    out = torch.bmm(F.softmax(torch.bmm(q * 0.25, k.transpose(1, 2)), dim=-1), v)
    return out.view(B, H, S, E).transpose(1, 2).reshape(B, S, H * E)


def one_head(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return F.softmax(q[0, 0] @ k[0, 0].t() / 4, dim=-1) @ v[0, 0]


def windows(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    q, k, v = (x[None].expand(2, -1, -1, -1, -1) + 0 for x in (q, k, v))
    return (q @ k.transpose(-2, -1) / 4).softmax(-1) @ v


def viewed_afterwards(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """A view, which the strides of a fused result would refuse."""
    return plain(q, k, v).view(B * H, S, E) + 1


def baddbmm(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    q, k, v = (x.flatten(0, 1) for x in (q, k, v))
    empty = torch.empty(B * H, S, T, dtype=q.dtype)
    scores = torch.baddbmm(empty, q, k.transpose(1, 2), beta=0, alpha=0.25)
    return torch.bmm(scores.view(B, H, S, T).softmax(-1).view(B * H, S, T), v)


def idle_dropout(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    probabilities = F.dropout(torch.softmax(q @ k.mT / 4, -1), 0.3, training=False)
    return F.dropout(probabilities, p=0.0) @ v


def upcast(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    scores = torch.matmul(q, k.transpose(-1, -2)) * 0.25
    return torch.matmul(F.softmax(scores, dim=-1, dtype=torch.float32).to(q.dtype), v)


def upcast_before(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    scores = torch.matmul(q, k.transpose(-1, -2)) * 0.25
    return torch.matmul(F.softmax(scores.float(), dim=-1).type_as(scores), v)


def causal_built(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    mask = torch.tril(torch.ones(S, S)).view(1, 1, S, S)
    return (q @ k[:, :, :S].mT / 4).masked_fill(mask == 0, float("-inf")).softmax(-1) @ v[:, :, :S]


def causal_added(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    mask = torch.triu(torch.full((S, S), float("-inf")), diagonal=1)
    return F.softmax(q @ k[:, :, :S].mT / 4 + mask, dim=-1) @ v[:, :, :S]


def causal_least(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    scores = torch.matmul(q, k.transpose(-1, -2)) / 4
    causal = torch.ones(T, T, dtype=torch.bool).tril()[T - S :, :]
    return torch.where(causal, scores, torch.tensor(torch.finfo(scores.dtype).min)).softmax(-1) @ v


def in_place(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    scores = q @ k[:, :, :S].mT
    scores *= 0.25
    scores = scores.masked_fill_(torch.ones(S, S, dtype=torch.bool).triu(1), -math.inf)
    return scores.softmax(-1) @ v[:, :, :S]


def mask_built_in_place(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    scores = q @ k.mT / 4
    hidden = torch.zeros(S, T, dtype=torch.bool)
    hidden[:, 7:] = True
    return scores.masked_fill(hidden, -math.inf).softmax(-1) @ v


def constant_bias(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    distance = torch.arange(T)[None, :] - torch.arange(S)[:, None]
    slopes = torch.tensor([0.5, 0.25, 0.125]).view(H, 1, 1)
    return (q @ k.mT / 4 + slopes * distance.abs().neg()).softmax(-1) @ v


def grouped(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return operators(q, k[:, :1].repeat_interleave(H, 1), v[:, :1, None].expand(B, 1, H, T, E).reshape(B, H, T, E))


def keys_of_one_head(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Multi-query attention by broadcasting."""
    return plain(q, k[:, :1], v[:, :1])


UNMASKED = (
    *(plain, operators, query_scaled, both_scaled, literal_first, unscaled, einsum, einsum_heads_last, einsum_values_first),
    *(
        merged_heads,
        one_head,
        windows,
        viewed_afterwards,
        baddbmm,
        idle_dropout,
        upcast,
        upcast_before,
        grouped,
        keys_of_one_head,
    ),
)
MASKED_BY_SIZES = (causal_built, causal_added, causal_least, in_place, mask_built_in_place, constant_bias)


@pytest.mark.parametrize("fn", [*UNMASKED, *MASKED_BY_SIZES], ids=lambda fn: fn.__name__)
def test_a_spelling_is_fused_in_training_and_inference(fn: Callable[..., Tensor]) -> None:
    trained(fn, *operands(), expected=1)
    judged(fn, *operands(), expected=1)


@pytest.mark.parametrize("fn", UNMASKED, ids=lambda fn: fn.__name__)
def test_results_have_the_strides_of_eager(fn: Callable[..., Tensor]) -> None:
    for swapped in (False, True):
        args = [x.transpose(1, 2).contiguous().transpose(1, 2) if swapped else x for x in operands()]
        result, count, _ = compiled(fn, *args)
        assert count == 1
        assert result.stride() == fn(*args).stride()


def hidden_padding(*lengths: int) -> Tensor:
    """True at the padding of sequences of these lengths, [B, 1, 1, T]."""
    return (torch.arange(T) >= torch.tensor(lengths)[:, None])[:, None, None, :]


def filled(q: Tensor, k: Tensor, v: Tensor, hidden: Tensor, value: float = -math.inf) -> Tensor:
    return (q @ k.mT / 4).masked_fill(hidden, value).softmax(-1) @ v


def selected(q: Tensor, k: Tensor, v: Tensor, hidden: Tensor, value: float = -math.inf) -> Tensor:
    return torch.where(~hidden, q @ k.mT / 4, value).softmax(-1) @ v


def filled_twice(q: Tensor, k: Tensor, v: Tensor, hidden: Tensor, value: float = -math.inf) -> Tensor:
    scores = (q @ k.mT).masked_fill(hidden, value) * 0.25
    return scores.masked_fill(torch.ones(S, T, dtype=torch.bool).triu(1), value * 0.25).softmax(-1) @ v


PADDINGS = {"none": (T, T), "some": (T, 7), "whole rows": (T, 0)}


@pytest.mark.parametrize("value", [-math.inf, -1e9, torch.finfo(torch.float32).min], ids=["inf", "1e9", "least"])
@pytest.mark.parametrize("fn", [filled, selected, filled_twice], ids=lambda fn: fn.__name__)
@pytest.mark.parametrize("padding", PADDINGS)
def test_fills_hide_as_in_eager(fn: Callable[..., Tensor], padding: str, value: float) -> None:
    """Rows hidden throughout are NaN, or the mean of all values, and their gradients follow."""
    hidden = hidden_padding(*PADDINGS[padding])
    if padding == "whole rows" and fn is not filled_twice:
        hidden = hidden | (torch.arange(S) == 3)[:, None]
    trained(lambda q, k, v, h: fn(q, k, v, h, value), *operands(), hidden, expected=1)
    judged(lambda q, k, v, h: fn(q, k, v, h, value), *operands(), hidden, expected=1)


def added(q: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> Tensor:
    return (q @ k.mT / 4 + mask).softmax(-1) @ v


def added_before_scale(q: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> Tensor:
    return ((q @ k.mT + mask) / 4).softmax(-1) @ v


def added_in_views(q: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> Tensor:
    """As windows are masked: the batch is viewed as images times windows, one mask a window."""
    scores = q.repeat(2, 1, 1, 1) @ k.repeat(2, 1, 1, 1).mT / 4
    scores = scores.view(2, B, H, S, T) + mask.expand(B, H, S, T)[:, :1][None]
    return scores.view(-1, H, S, T).softmax(-1) @ v.repeat(2, 1, 1, 1)


def subtracted(q: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> Tensor:
    return (q @ k.mT / 4 - -mask).softmax(-1) @ v


def baddbmm_bias(q: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> Tensor:
    """As ALiBi is added: one row for each head of each sequence."""
    q, k, v = (x.flatten(0, 1) for x in (q, k, v))
    bias = mask[..., :1, :].expand(B, H, 1, T).reshape(B * H, 1, T)
    scores = bias.baddbmm(batch1=q, batch2=k.transpose(1, 2), beta=1.0, alpha=0.25)
    return torch.bmm(scores.view(B, H, S, T).softmax(-1).view(B * H, S, T), v)


ADDED: dict[str, Tensor] = {
    "bias": torch.linspace(-3, 3, H * S * T).view(1, H, S, T),
    "padding": torch.zeros(B, 1, 1, T).masked_fill(hidden_padding(T, 5), torch.finfo(torch.float32).min),
    "hidden rows": torch.zeros(S, T).masked_fill((torch.arange(S) == 3)[:, None], torch.finfo(torch.float32).min),
    "nan rows": torch.zeros(B, 1, 1, T).masked_fill(hidden_padding(T, 0), -math.inf),
    "mixed row": torch.full((S, T), -math.inf).masked_fill(torch.arange(T) > 4, torch.finfo(torch.float32).min),
}


@pytest.mark.parametrize("mask", ADDED)
@pytest.mark.parametrize(
    "fn", [added, added_before_scale, added_in_views, subtracted, baddbmm_bias], ids=lambda fn: fn.__name__
)
def test_added_masks_are_taken_in_inference(fn: Callable[..., Tensor], mask: str) -> None:
    judged(fn, *operands(), ADDED[mask], expected=1)


@pytest.mark.parametrize("mask", ADDED)
def test_added_masks_stay_where_gradients_are_wanted(mask: str) -> None:
    """The backward of torch's fused kernel is wrong by the row's length where a finite mask absorbs a whole row."""
    reasons = trained(added, *operands(), ADDED[mask], expected=0)
    assert "hand_attention: a gradient is wanted, and an added mask may hide whole rows x1" in reasons


def test_a_mask_changed_between_calls_is_read_again() -> None:
    mask = ADDED["bias"].clone()
    q, k, v = operands()
    torch.compiler.reset()
    call = torch.compile(added, backend="fxopt", options={"strict": True})
    call(q, k, v, mask)
    mask[..., 3:].fill_(-math.inf)
    torch.testing.assert_close(call(q, k, v, mask), added(q, k, v, mask))


@pytest.mark.parametrize("fn", [unscaled, merged_heads, added, filled], ids=lambda fn: fn.__name__)
def test_symbolic_sizes(fn: Callable[..., Tensor]) -> None:
    masks: dict[Any, tuple[Tensor, ...]] = {added: (ADDED["nan rows"],), filled: (hidden_padding(T, 0),)}
    if fn is merged_heads:
        judged(
            lambda q, k, v: torch.bmm((torch.bmm(q, k.mT) / 4).softmax(-1), v),
            *(x[0] for x in operands()),
            expected=1,
            dynamic=True,
        )
    else:
        judged(fn, *operands(), *masks.get(fn, ()), expected=1, dynamic=True)


def test_a_known_mask_of_one_element_where_sizes_are_symbols() -> None:
    def call(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return (q @ k.mT / 4 + torch.zeros(1, 1, 1, 1)).softmax(-1) @ v

    judged(call, *operands(), expected=1, dynamic=True)


def test_a_scale_from_symbolic_sizes_stays() -> None:
    reasons = judged(plain, *operands(), expected=0, dynamic=True)
    assert reasons == ["hand_attention: a scale that is not a finite literal x1"]


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize(
    "fn", [plain, upcast, upcast_before, causal_built, causal_least, merged_heads], ids=lambda fn: fn.__name__
)
def test_half_types(fn: Callable[..., Tensor], dtype: torch.dtype) -> None:
    judged(fn, *operands(dtype=dtype), expected=1)


def least_selected(q: Tensor, k: Tensor, v: Tensor, hidden: Tensor) -> Tensor:
    """An additive mask as models make it for eager attention, from padding that is not known."""
    return added(
        q, k, v, torch.where(hidden.logical_not(), torch.tensor(0.0), torch.finfo(torch.float32).min).expand(B, 1, S, T)
    )


AUTOCAST: dict[str, tuple[Callable[..., Tensor], tuple[Tensor, ...], int]] = {
    "plain": (plain, (), 1),
    "causal": (causal_built, (), 1),
    "filled": (filled, (hidden_padding(T, 7),), 1),
    "least, selected": (least_selected, (hidden_padding(T, 0),), 1),
    "a float32 bias": (added, (ADDED["bias"],), 0),
}


@pytest.mark.parametrize("inside", [False, True])
@pytest.mark.parametrize("name", AUTOCAST)
def test_autocast(name: str, inside: bool) -> None:
    fn, masks, expected = AUTOCAST[name]

    def entered(*args: Tensor) -> Tensor:
        with torch.autocast("cpu", torch.bfloat16):
            return fn(*args)

    args = (*operands(), *masks)
    with torch.autocast("cpu", torch.bfloat16, enabled=not inside):
        result, count, _ = compiled(entered if inside else fn, *args)
    assert (count, fused_calls()) == (expected, expected)
    assert_closer(result, entered(*args), fn(*to_float64(args)))


def returned_probabilities(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    probabilities = torch.softmax(q @ k.mT / 4, -1)
    return probabilities @ v, probabilities


def returned_scores(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    scores = q @ k.mT / 4
    return scores.softmax(-1) @ v, scores


def wrong_dimension(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return torch.softmax(q @ k.mT / 4, -2) @ v


def own_mask(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    scores = q @ k.mT / 4
    return (scores + scores).softmax(-1) @ v


def own_fill(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    scores = q @ k.mT / 4
    return scores.masked_fill(scores < 0, -math.inf).softmax(-1) @ v


def own_values(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    probabilities = torch.softmax(q @ q.mT / 4, -1)
    return probabilities @ probabilities


def small_fill(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return filled(q, k, v, hidden_padding(T, 7), -10.0)


def fill_and_bias(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    bias = (q[:, :1, :1, :1] * 0).detach()
    return ((q @ k.mT / 4).masked_fill(hidden_padding(T, 0), -1e9) + bias.expand(B, 1, S, T)).softmax(-1) @ v


def values_of_another_size(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return plain(q, k, v[..., :8])


def broadcast_batches(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return plain(q, k[:1], v[:1])


def written_between(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    keys = k * 1
    scores = q @ keys.mT / 4
    keys.mul_(2)
    return scores.softmax(-1) @ v + keys.sum()


def broadcast_by_its_mask(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return ((q[:1] @ k[:1].mT / 4).masked_fill(hidden_padding(T, 7), -math.inf)).softmax(-1) @ v[:1]


def times_a_vector(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return (q @ k.mT / 4).softmax(-1) @ v[0, 0, :, 0]


def mask_written_after_its_use(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    hidden = torch.zeros(S, T, dtype=torch.bool)
    scores = (q @ k.mT / 4).masked_fill(hidden, -math.inf)
    hidden[:, 7:] = True
    return scores.softmax(-1) @ v


def scaled_by_data(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return torch.softmax(q @ k.mT * q.mean(), -1) @ v


def later_scaled(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return (torch.softmax(q @ k.mT / 4, -1) * 2) @ v


LEFT: dict[Callable[..., Any], str | None] = {
    returned_probabilities: "the scores or the probabilities have another use",
    returned_scores: "the scores or the probabilities have another use",
    own_mask: "the scores or the probabilities have another use",
    own_fill: "the scores or the probabilities have another use",
    own_values: "the scores or the probabilities have another use",
    wrong_dimension: "the softmax is not over the last dimension",
    small_fill: "a fill that may not hide",
    fill_and_bias: "a finite fill beside another mask",
    values_of_another_size: "values of another size than keys",
    broadcast_batches: "batch or heads that broadcast",
    written_between: "an operand is written in place between the products",
    broadcast_by_its_mask: "scores that are broadcast",
    times_a_vector: None,
    mask_written_after_its_use: "an operand is written in place between the products",
    scaled_by_data: None,
    later_scaled: None,
}


@pytest.mark.parametrize("fn", LEFT, ids=lambda fn: fn.__name__)
def test_near_misses_stay(fn: Callable[..., Any]) -> None:
    reasons = judged(fn, *operands(), expected=0)
    assert reasons == ([] if LEFT[fn] is None else [f"hand_attention: {LEFT[fn]} x1"])


def test_float64_stays() -> None:
    assert judged(plain, *to_float64(operands()), expected=0) == ["hand_attention: element types without a fused kernel x1"]


def test_few_scores_stay_on_cpus(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(written, "MIN_CPU_SCORES", S * T + 1)
    assert judged(plain, *operands(), expected=0) == ["hand_attention: too few scores for the fused kernel to be faster x1"]


def test_it_can_be_switched_off() -> None:
    torch.compiler.reset()
    RECENT.clear()
    torch.compile(plain, backend="fxopt", options={"strict": True, "disable": ["hand_attention"]})(*operands())
    assert fused_calls() == 0


def test_a_mask_with_a_gradient_stays() -> None:
    bias = ADDED["bias"].clone().requires_grad_()
    q, k, v = operands()
    _, count, reasons = compiled(added, q, k, v, bias)
    assert count == 0
    assert reasons == ["hand_attention: a gradient is wanted for the mask x1"]
    with torch.no_grad():
        judged(added, q, k, v, bias, expected=1)


def test_dropout_that_drops_stays() -> None:
    def call(q: Tensor, k: Tensor, v: Tensor, training: bool) -> Tensor:
        return F.dropout(torch.softmax(q @ k.mT / 4, -1), 0.5, training) @ v

    assert compiled(call, *operands(), True)[1:] == (
        0,
        ["hand_attention: dropout, on a device without a fused kernel for it x1"],
    )
    assert compiled(call, *operands(), False)[1] == 1


def test_the_grad_mode_between_the_products_counts() -> None:
    def call(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        with torch.no_grad():
            probabilities = torch.softmax(q @ k.mT / 4, -1)
        return probabilities @ v

    q, k, v = operands()
    _, count, reasons = compiled(call, q.requires_grad_(), k, v.requires_grad_())
    assert count == 0
    assert reasons == ["hand_attention: the grad mode changes between the products x1"]


@pytest.mark.filterwarnings("ignore:There is a performance drop")
def test_transformed_tensors_stay() -> None:
    stacked = [torch.stack([x, x + 1]) for x in operands()]
    _, count, reasons = compiled(lambda *args: torch.func.vmap(plain)(*args), *stacked)
    assert count == 0
    assert reasons in ([], ["hand_attention: a tensor subclass, a transformed or a nested tensor x1"])
