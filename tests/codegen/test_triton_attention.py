"""Attention written out, as one kernel with what is done to the scores as a function: values in Triton's interpreter."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

pytest.importorskip("triton")

from fxopt.codegen.templates.attention_config import AttentionConfig, configs
from fxopt.codegen.triton_attention import print_attention
from fxopt.codegen.triton_build import compile_triton
from fxopt.ir.region import Alternatives, Attention, Call
from fxopt.lower import Lowered
from fxopt.lower.ways import replaced
from fxopt.target import Target
from tests.codegen.triton_interpreter import Interpreter
from tests.lower.test_attention_kernels import rand, searched
from tests.numerics import assert_closer, to_float64

H100 = Target.cuda(90)
F16 = torch.float16
Q, K, V = (torch.randn(2, 3, n, 16, generator=torch.Generator().manual_seed(n)).to(F16) for n in (7, 41, 41))


def capped(q: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> Tensor:
    """Gemma 2's."""
    scores = torch.matmul(q, k.transpose(2, 3)) * 0.5
    scores = torch.tanh(scores / 5.0) * 5.0 + mask
    return torch.matmul(F.softmax(scores, dim=-1, dtype=torch.promote_types(q.dtype, torch.float32)).to(q.dtype), v)


def distances(q: Tensor, k: Tensor, v: Tensor, slopes: Tensor) -> Tensor:
    """ALiBi, and a window."""
    away = torch.arange(k.shape[2])[None, :] - torch.arange(q.shape[2])[:, None]
    scores = q @ k.mT * 0.25 + away * slopes[:, None, None]
    return scores.masked_fill((away > 20) | (away < -3), -1e4).softmax(-1) @ v


def hidden(q: Tensor, k: Tensor, v: Tensor, seen: Tensor) -> Tensor:
    """Rows of which nothing is seen are NaN."""
    return torch.where(seen, q @ k.mT, -torch.inf).softmax(-1) @ v


def grouped(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Two groups of three heads, repeated, and heads between rows: all are read where they lie."""
    k, v = (x[:, :, None].expand(2, 2, 3, *x.shape[2:]).reshape(2, 6, *x.shape[2:]) for x in (k, v))
    slopes = torch.arange(6, dtype=q.dtype)[:, None, None]
    weights = torch.softmax(torch.tanh(q @ k.transpose(2, 3)) * slopes, -1)
    return (weights @ v).transpose(1, 2).contiguous()


def one_head(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return torch.exp(torch.sin(q[0, 0] @ k[0, 0].mT)).softmax(-1) @ v[0, 0]


SEEN = torch.rand(2, 1, 7, 41, generator=torch.Generator().manual_seed(0)) < 0.3
SEEN[0, 0, 2], SEEN[1, 0, :, :33] = False, False
CASES: dict[str, tuple[Callable[..., Tensor], tuple[Tensor, ...]]] = {
    "capped": (capped, (Q, K, V, torch.zeros(2, 1, 7, 41, dtype=F16).masked_fill(~SEEN, torch.finfo(F16).min))),
    "distances": (distances, (Q, K, V, torch.tensor([0.5, 0.25, 0.125], dtype=F16))),
    "hidden": (hidden, (Q, K, V, SEEN)),
    "grouped": (grouped, (rand(2, 6, 7, 16, dtype=F16), *(rand(2, 2, 41, 16, dtype=F16) for _ in "kv"))),
    "one head": (one_head, (Q, K, V)),
    "float32": (capped, (Q.float(), K.float(), V.float(), torch.randn(2, 1, 7, 41))),
}


def kernel(fn: Callable[..., Any], args: tuple[Tensor, ...]) -> tuple[Lowered, Attention]:
    low = searched(fn, *args)
    (each,) = (s for s in low.steps if isinstance(s, Alternatives))
    assert sum(isinstance(s, Call) for s in each.ways[0].steps) == 2
    (own,) = each.ways[1].steps
    assert isinstance(own, Attention) and own.scores is not None
    assert not any(isinstance(s, Call) for s in replaced(low, {each.name: each.ways[1]}).steps)
    return low, own


@pytest.mark.parametrize(
    ("case", "split"),
    [("capped", 1), ("distances", 2), ("hidden", 1), ("hidden", 2), ("one head", 1), ("float32", 2)],
)
def test_values(interpreter: Interpreter, case: str, split: int) -> None:
    fn, args = CASES[case]
    low, own = kernel(fn, args)
    check(interpreter, fn, args, low, own, AttentionConfig(16, 16, 4, 2, split=split))


def test_heads_of_a_group_share_tiles(interpreter: Interpreter) -> None:
    """Then the function gets a head for each row; the tile has rows past the end."""
    fn, args = CASES["grouped"]
    low, own = kernel(fn, args)
    assert (own.query.shape[:2], own.key.shape[:2], {*own.reads()}) == ((2, 6), (2, 2), set(low.inputs))
    for pack in (1, 3):
        check(interpreter, fn, args, low, own, AttentionConfig(16, 16, 4, 2, pack=pack, split=2))


def check(
    interpreter: Interpreter,
    fn: Callable[..., Any],
    args: tuple[Tensor, ...],
    low: Lowered,
    own: Attention,
    config: AttentionConfig,
) -> None:
    memory = {n: torch.full((math.prod(low.buffers[n].shape),), float("nan"), dtype=own.dtype) for n in own.writes()}  # type: ignore[arg-type]
    memory |= {n: a.as_strided((a.numel(),), (1,)) for n, a in zip(low.inputs, args, strict=True)}
    memory |= {n: t.reshape(-1) for n, t in low.constants.items()}
    printed = print_attention(own, config, H100)
    memory |= {s.name: torch.full((math.prod(s.shape),), float("nan")) for s in printed.scratch}  # type: ignore[arg-type]
    for source in printed.kernels:
        interpreter.run(source, memory)
    eager, exact = fn(*args), fn(*to_float64(args))
    got = memory[own.out.buffer].as_strided(own.out.shape, own.out.strides, own.out.offset)
    assert_closer([got.transpose(1, 2) if fn is grouped else got.reshape(eager.shape)], [eager], [exact])


def test_it_compiles_without_spills() -> None:
    args = tuple(torch.empty(2, 8, 1024, 256, dtype=torch.bfloat16) for _ in range(3))
    _, own = kernel(capped, (*args, torch.empty(1, 1, 1024, 1024, dtype=torch.bfloat16)))
    (source,) = print_attention(own, configs(own, H100)[0], H100).kernels
    assert source.entry.startswith("fx_attention_") and "tanh" in source.entry
    assert compile_triton(source, H100)[1]["n_spills"] == 0
