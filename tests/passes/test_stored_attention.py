"""Attention over keys and values in 8 bits: which spellings are found, their values, and which calls stay."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from fxopt.ir.attention_op import attention
from tests.passes.graphs import CHECKED, calls, execute, optimize

BF16, FP8 = torch.bfloat16, torch.float8_e4m3fn
OP = "fxopt::scaled_attention"
Q, K, V = torch.randn(2, 4, 1, 32).to(BF16), *(torch.randint(-127, 128, (2, 2, 24, 32), dtype=torch.int8) for _ in "kv")
ONE, ROWS = torch.tensor(0.01), torch.rand(2, 2, 24, 1) * 0.01


def attend(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None) -> Tensor:
    return attention(q, k, v, mask, enable_gqa=True)


def repeat(x: Tensor) -> Tensor:
    return x[:, :, None].expand(2, 2, 2, *x.shape[2:]).reshape(2, 4, *x.shape[2:])


SPELLINGS: dict[str, Callable[..., Tensor]] = {
    "cast, then scale": lambda q, k, v, s: attend(q, k.to(BF16) * s.to(BF16), s.to(BF16) * v.to(BF16)),
    "scale in float32": lambda q, k, v, s: attend(q, (k.float() * s).to(BF16), (v.float() * s).to(BF16)),
    "a number": lambda q, k, v, s: attend(q, k.to(BF16) * 0.25, v.to(BF16) * 3),
    "no scale": lambda q, k, v, s: attend(q, k.to(BF16), v.to(BF16)),
    "part of a cache": lambda q, k, v, s: attend(q, k[:, :, :17].to(BF16) * 0.1, v[:, :, :17].to(BF16)),
}


def rewritten(fn: Callable[..., Tensor], *args: Tensor) -> list[str]:
    graph, _ = optimize(fn, args)
    (got,) = execute(graph, args)
    torch.testing.assert_close(got, fn(*args), rtol=2e-2, atol=2e-2 * float(fn(*args).float().std()))
    return calls(graph)


@pytest.mark.parametrize("name", SPELLINGS)
@pytest.mark.parametrize("scale", [ONE, ROWS], ids=["one", "rows"])
def test_spellings(name: str, scale: Tensor) -> None:
    if name == "part of a cache":
        scale = ONE
    assert OP in rewritten(SPELLINGS[name], Q, K, V, scale)


def test_scales_are_taken_as_they_are_stored() -> None:
    found = rewritten(lambda q, k, v, s: attend(q, k.to(BF16) * s.to(BF16), v.to(BF16) * s.to(BF16)), Q, K, V, ROWS)
    assert found == [OP], "no cast is left"


def test_floats_and_heads_that_are_repeated() -> None:
    k, v = K.float().to(FP8), V.float().to(FP8)
    found = rewritten(lambda q, k, v, s: attend(q, repeat(k.to(BF16) * s), repeat(v.to(BF16) * s)), Q, k, v, ONE.to(BF16))
    assert OP in found


@pytest.mark.parametrize(
    ("fn", "args"),
    [
        (lambda q, k, v, s: attend(q, k.to(BF16) * s, v), (Q, K, V.to(BF16), ONE)),
        (lambda q, k, v, s: attend(q, k.to(BF16) + s, v.to(BF16)), (Q, K, V, ONE)),
        (lambda q, k, v, s: attend(q, k.to(BF16) * s, v.to(BF16)), (Q, K, V, torch.rand(32))),
        (lambda q, k, v, s: attend(q, repeat(k.to(BF16) * s), repeat(v.to(BF16))), (Q, K, V, ROWS.to(BF16))),
        (lambda q, k, v, s: attend(q, k.to(BF16), v.to(BF16)), (Q.expand(2, 4, 40, 32).contiguous(), K, V, ONE)),
        (lambda q, k, v, s: attend(q, k.float(), v.float()), (Q.float(), K, V, ONE)),
        (lambda q, k, v, s: attend(q, k.to(BF16), v.to(BF16)), (Q, K.short(), V.short(), ONE)),
        (lambda q, k, v, s: attend(q[..., :12], k[..., :12].to(BF16), v.to(BF16)), (Q, K, V, ONE)),
        (lambda q, k, v, s: attend(q, k.to(BF16), v.to(BF16), s.double().expand(1, 24)), (Q, K, V, ONE)),
    ],
    ids=["value wide", "sum", "columns", "repeated with rows", "many rows", "float32", "int16", "narrow", "precise mask"],
)
def test_others_stay(fn: Callable[..., Tensor], args: tuple[Any, ...]) -> None:
    assert OP not in calls(optimize(fn, args)[0])


def test_without_kernels_widening_apart_is_as_good() -> None:
    fn, args = SPELLINGS["a number"], (Q, K, V, ONE)
    assert OP not in calls(optimize(fn, args, options=replace(CHECKED, tuning_seconds=0))[0])
    with sdpa_kernel(SDPBackend.MATH):
        assert OP not in calls(optimize(fn, args)[0])
    assert OP in calls(optimize(fn, args)[0])


def test_sizes_known_at_run_time_stay() -> None:
    assert OP not in calls(optimize(SPELLINGS["a number"], (Q, K, V, ONE), dynamic=True)[0])
