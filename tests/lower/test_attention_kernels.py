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
from fxopt.lower.contractions import replaced
from fxopt.lower.schedule import schedule
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
        (lambda q, k: attention(q, k, k), (Q.float(), K.float())),
        (lambda q, k: attention(q, k, k, scale=0.0), (Q, K)),
        (lambda q, k: attention(q, k, k), (rand(2, 4, 5, 264), rand(2, 4, 48, 264))),
        (lambda q, k: attention(q, k, k), (rand(2, 4, 5, 36), rand(2, 4, 48, 36))),
        (lambda q, k: attention(q, k, k), (Q, K.mT.contiguous().mT)),
        (lambda q, k: attention(q, k[:, :, :0], k[:, :, :0]), (Q, K)),
        (lambda q, k, m: attention(q, k, k, m), (Q, K, torch.zeros(5, 48, dtype=torch.float64))),
    ],
    ids=["training", "float32", "scale", "wide", "odd", "strided", "empty", "mask"],
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
