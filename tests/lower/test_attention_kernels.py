"""Which attention calls kernels of ours stand beside, and what they are told of them."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from fxopt.capture.decompositions import decompositions
from fxopt.ir.attention_op import attention, attention_forward
from fxopt.ir.region import Alternatives, Attention, Call, Region
from fxopt.lower import Lowered
from fxopt.lower.attention_kernels import KERNEL, LIBRARY, with_attention_kernels
from fxopt.lower.schedule import schedule
from fxopt.lower.ways import replaced
from tests.lower.capturing import moved
from tests.lower.harness import lower

BF16 = torch.bfloat16


def rand(*shape: int, dtype: torch.dtype = BF16) -> Tensor:
    """[batch, heads, rows, width] with heads next to features."""
    batch, heads, rows, width = shape
    return torch.randn(batch, rows, heads, width).to(dtype).transpose(1, 2)


def searched(fn: Callable[..., Any], *args: Any, device: str = "cuda", dynamic: bool = False) -> Lowered:
    low = lower(fn, args, decompose=decompositions(), dynamic=dynamic)
    return with_attention_kernels(schedule(moved(low, device)))


def kernels(low: Lowered) -> Iterator[Attention]:
    for step in low.steps:
        if isinstance(step, Alternatives):
            (call,), (own,) = (way.steps for way in step.ways)
            assert [way.label for way in step.ways] == [LIBRARY, KERNEL] and isinstance(call, Call)
            assert isinstance(own, Attention) and {*own.reads(), *own.writes()} == set(step.buffers)
            yield own


def decode(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None) -> Tensor:
    return attention(q + 1, k, v, mask, enable_gqa=True).transpose(1, 2).flatten(2) * 2


def test_operands_are_views_of_buffers() -> None:
    whole, mask = torch.randn(2, 40, 3, 2, 64).to(BF16), torch.zeros(2, 1, 1, 48, dtype=torch.bool)

    def fn(q: Tensor, x: Tensor, mask: Tensor) -> Tensor:
        k, v = x[:, :, 1].transpose(1, 2), x[:, :, 2].transpose(1, 2)
        return decode(q, k, v, mask[..., 3:43])

    low = searched(fn, rand(2, 8, 1, 64), whole, mask)
    (own,) = kernels(low)
    kept = (own.query, own.key, own.value, own.mask)
    assert [None if x is None else (x.strides, x.offset) for x in kept] == [
        ((512, 64, 64, 1), 0),
        ((15360, 64, 384, 1), 128),
        ((15360, 64, 384, 1), 256),
        ((48, 0, 0, 1), 3),
    ]
    assert own.mask is not None and own.mask.shape == (2, 8, 1, 40)
    assert (own.out.buffer, own.scale, own.causal) == (own.name.partition(".")[0], 0.125, False)
    (alternatives,) = (s for s in low.steps if isinstance(s, Alternatives))
    assert len(alternatives.views) == 3, "what the library's call names"
    first, second, third = replaced(low, {own.name: alternatives.ways[1]}).steps
    assert isinstance(first, Region) and isinstance(third, Region) and second is own, "without views"
    assert own.out.buffer in third.reads()


def test_settings_are_those_of_the_call() -> None:
    q = rand(1, 4, 16, 64)
    (own,) = kernels(searched(lambda q, k, v: attention(q, k, v, None, 0.0, True, scale=0.5), q, q, q))
    assert own.causal and own.scale == 0.5 and own.mask is None
    assert own.out.strides == q.stride()


@pytest.mark.parametrize("heads", [4, 16])
def test_few_rows_of_float32(heads: int) -> None:
    q, k = rand(2, heads, 4, 64, dtype=torch.float32), rand(2, 4, 48, 64, dtype=torch.float32)
    (own,) = kernels(searched(lambda q, k: attention(q, k, k, enable_gqa=True), q, k))
    assert own.dtype == torch.float32


@pytest.mark.parametrize("shape", [(1, 48), (48,), (4, 1, 48), (2, 4, 1, 48)], ids=str)
def test_masks_are_broadcast(shape: tuple[int, ...]) -> None:
    q, k = rand(2, 4, 1, 64), rand(2, 4, 48, 64)
    (own,) = kernels(searched(attention, q, k, k, torch.zeros(shape, dtype=BF16)))
    assert own.mask is not None
    strides = torch.zeros(shape).expand(2, 4, 1, 48).stride()
    assert [s for s, n in zip(own.mask.strides, own.mask.shape, strict=True) if n > 1] == [
        s for s, n in zip(strides, own.mask.shape, strict=True) if n > 1
    ]


Q, K = rand(2, 4, 5, 64), rand(2, 4, 48, 64)


@pytest.mark.parametrize(
    ("fn", "args"),
    [
        (lambda q, k: attention_forward(q, k, k)[0], (Q, K)),  # whose backward is a library's
        (lambda q, k: attention(q, k, k), (rand(2, 4, 17, 64).float(), K.float())),
        (lambda q, k: attention(q, k, k, enable_gqa=True), (rand(2, 8, 5, 64).float(), rand(2, 2, 48, 64).float())),
        (lambda q, k: attention(q, k, k, scale=0.0), (Q, K)),
        (lambda q, k: attention(q, k, k), (rand(2, 4, 5, 264), rand(2, 4, 48, 264))),
        (lambda q, k: attention(q, k, k), (rand(2, 4, 5, 36), rand(2, 4, 48, 36))),
        (lambda q, k: attention(q, k, k), (Q, K.mT.contiguous().mT)),
        (lambda q, k: attention(q, k[:, :, :0], k[:, :, :0]), (Q, K)),
        (lambda q, k, m: attention(q, k, k, m), (Q, K, torch.zeros(5, 48, dtype=torch.float64))),
    ],
    ids=["training", "float32", "float32 groups", "scale", "wide", "odd", "strided", "empty", "mask"],
)
def test_the_rest_is_the_librarys(fn: Callable[..., Any], args: tuple[Tensor, ...]) -> None:
    low = searched(fn, *args)
    assert not list(kernels(low)) and any(isinstance(s, Call) for s in low.steps)


def test_sizes_known_at_run_time_and_cpus_are_the_librarys() -> None:
    assert not list(kernels(searched(decode, Q, K, K, dynamic=True)))
    assert not list(kernels(searched(decode, Q, K, K, device="cpu")))


def test_offsets_have_to_fit_32_bits() -> None:
    low = lower(decode, (Q, K, K), decompose=decompositions(), dynamic=False)
    assert list(kernels(with_attention_kernels(schedule(moved(low, "cuda")))))
    for name, spec in low.buffers.items():
        if spec.shape[2:3] == (48,):
            low.buffers[name] = replace(spec, strides=(spec.strides[0], spec.strides[1], 2**25, 1))
    assert not list(kernels(with_attention_kernels(schedule(moved(low, "cuda")))))


def test_a_user_who_asks_for_one_backend_or_determinism_gets_torchs_kernels() -> None:
    with sdpa_kernel(SDPBackend.MATH):
        assert not list(kernels(searched(decode, Q, K, K)))
    torch.use_deterministic_algorithms(True)
    try:
        assert not list(kernels(searched(decode, Q, K, K)))
    finally:
        torch.use_deterministic_algorithms(False)
    assert list(kernels(searched(decode, Q, K, K)))


# ---------------------------------------------------------------------- keys and values that are copied first


def repeat_kv(x: Tensor, count: int = 4) -> Tensor:
    """As transformers repeats heads [B, G, T, E]."""
    batch, heads, rows, width = x.shape
    return x[:, :, None].expand(batch, heads, count, rows, width).reshape(batch, heads * count, rows, width)


REPEATS: dict[str, Callable[[Tensor], Tensor]] = {
    "expand": repeat_kv,
    "interleave": lambda x: x.repeat_interleave(4, dim=1),
    "flatten": lambda x: x.unsqueeze(2).expand(-1, -1, 4, -1, -1).flatten(1, 2),
    "alone": lambda x: x.contiguous(),
}
CACHE, QUERY = torch.randn(2, 3, 40, 64).to(BF16), rand(2, 12, 1, 64)


def repeating(repeat: Callable[[Tensor], Tensor]) -> Callable[..., Tensor]:
    return lambda q, k, v, mask: attention(q, repeat(k), repeat(v), mask, enable_gqa=True)


def alternatives(low: Lowered) -> Alternatives:
    (found,) = (step for step in low.steps if isinstance(step, Alternatives))
    return found


def kernel_of(low: Lowered) -> Attention:
    (own,) = alternatives(low).ways[1].steps
    assert isinstance(own, Attention)
    return own


@pytest.mark.parametrize("mask", [None, torch.zeros(2, 1, 1, 40, dtype=BF16)], ids=["open", "masked"])
@pytest.mark.parametrize("apart", [False, True], ids=["rows of heads", "heads of rows"])
@pytest.mark.parametrize("name", REPEATS)
def test_heads_are_read_where_they_are_copied_from(name: str, apart: bool, mask: Tensor | None) -> None:
    cache = rand(2, 3, 40, 64) if apart else CACHE
    args = (QUERY, cache, cache + 1, mask)
    low = searched(repeating(REPEATS[name]), *args)
    own, found = kernel_of(low), alternatives(low)
    if name == "alone" and not apart:
        assert own.key.buffer == low.inputs[1], "a copy that is none"
        return
    assert [type(step) for step in found.ways[0].steps] == [Region, Call]
    assert {*own.reads(), *own.writes()} < set(found.buffers)
    for x, name_of, given in ((own.key, low.inputs[1], cache), (own.value, low.inputs[2], cache + 1)):
        assert x.buffer == name_of and x.shape == given.shape
        assert torch.equal(given.as_strided(x.shape, x.strides, x.offset), given)
    kept = replaced(low, {found.name: found.ways[1]}).steps
    assert kept == [own], "no copy is left"


@pytest.mark.parametrize(
    "repeat",
    [
        lambda x: x.repeat(1, 4, 1, 1),
        lambda x: x[:, None].expand(-1, 4, -1, -1, -1).flatten(1, 2),
        lambda x: repeat_kv(x * 2),
        lambda x: repeat_kv(x.flip(1)),
        lambda x: repeat_kv(x[:, :, :20].repeat(1, 1, 2, 1)),
    ],
    ids=["tiled", "outside", "scaled", "reversed", "rows"],
)
def test_other_orders_are_read_where_they_are_copied_to(repeat: Callable[[Tensor], Tensor]) -> None:
    low = searched(repeating(repeat), QUERY, CACHE, CACHE + 1, None)
    own = kernel_of(low)
    assert [type(step) for step in alternatives(low).ways[0].steps] == [Call]
    assert not {own.key.buffer, own.value.buffer} & set(low.inputs) and own.key.shape == (2, 12, 40, 64)


def test_keys_and_values_are_seen_through_together() -> None:
    def fn(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return attention(q, repeat_kv(k), v)

    own = kernel_of(searched(fn, QUERY, CACHE, rand(2, 12, 40, 64)))
    assert own.key.shape == own.value.shape == (2, 12, 40, 64)


def test_copies_that_others_read_stay() -> None:
    def fn(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        key = repeat_kv(k)
        return attention(q, key, repeat_kv(v)), key

    low = searched(fn, QUERY, CACHE, CACHE + 1)
    own, found = kernel_of(low), alternatives(low)
    assert (own.key.buffer, own.value.buffer) == tuple(low.inputs[1:])
    kept = replaced(low, {found.name: found.ways[1]})
    made = {name for step in kept.steps if isinstance(step, Region) for name in step.writes()}
    copied = next(s for s in low.steps if isinstance(s, Region))
    assert len(kept.steps) > 1 and made and set(copied.writes()) & made


def test_a_cache_that_changes_after_the_copy_is_not_read() -> None:
    def fn(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        out = attention(q, repeat_kv(k), repeat_kv(v))
        k.copy_(k * 2)
        return out

    low = schedule(moved(lower(fn, (QUERY, CACHE, CACHE + 1), decompose=decompositions()), "cuda"))
    assert kernel_of(with_attention_kernels(low)).key.buffer == low.inputs[1]
    (call,) = (step for step in low.steps if isinstance(step, Call))
    before = [step for step in low.steps if step is not call]
    own = kernel_of(with_attention_kernels(replace(low, steps=[*before, call])))
    assert low.inputs[1] in before[-1].writes() and own.key.buffer not in low.inputs  # type: ignore[union-attr, operator]


def test_a_kernel_that_fills_a_cache_and_copies_it_stays() -> None:
    def fn(q: Tensor, k: Tensor, v: Tensor, cache: Tensor) -> Tensor:
        cache.copy_(k)
        return attention(q, repeat_kv(cache), repeat_kv(v))

    low = searched(fn, QUERY, CACHE, CACHE + 1, CACHE + 2)
    found = alternatives(low)
    for way in found.ways:
        written = {n for s in replaced(low, {found.name: way}).steps if isinstance(s, Region) for n in s.writes()}
        assert low.inputs[3] in written
