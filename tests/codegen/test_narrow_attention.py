"""Kernels of attention in 8 bits: values in Triton's interpreter against the documented arithmetic, and code for Hopper."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

pytest.importorskip("triton")

from fxopt.codegen.templates.attention_config import AttentionConfig, configs
from fxopt.codegen.triton_attention import print_attention
from fxopt.codegen.triton_build import compile_triton
from fxopt.ir.region import Attention
from fxopt.lower import Lowered
from fxopt.target import Target
from tests.codegen.triton_interpreter import Interpreter
from tests.lower.test_attention_kernels import kernels, rand, searched
from tests.lower.test_narrow_attention import FP8, SCALED, stored

H100 = Target.cuda(90)
F16 = torch.float16


def run(interpreter: Interpreter, low: Lowered, args: tuple[Tensor, ...], config: AttentionConfig) -> Tensor:
    (own,) = kernels(low)
    memory = {n: torch.full((math.prod(low.buffers[n].shape),), float("nan"), dtype=own.dtype) for n in own.writes()}  # type: ignore[arg-type]
    flat = [a.as_strided((a.untyped_storage().nbytes() // a.itemsize,), (1,)) for a in args]
    memory |= dict(zip(low.inputs, flat, strict=True))
    printed = print_attention(own, config, H100)
    memory |= {s.name: torch.full((math.prod(s.shape),), float("nan")) for s in printed.scratch}  # type: ignore[arg-type]
    for source in printed.kernels:
        interpreter.run(source, memory)
    return memory[own.out.buffer].as_strided(own.out.shape, own.out.strides, own.out.offset)


def exact(q: Tensor, k: Tensor, v: Tensor, scale: float, mask: Tensor | None, causal: bool, narrow: bool) -> Tensor:
    """In float64, of operands that are widened and scaled; `narrow`: probabilities are rounded to float8."""
    group = q.shape[1] // k.shape[1]
    k, v = k.repeat_interleave(group, 1), v.repeat_interleave(group, 1)
    scores = q @ k.mT * scale
    if mask is not None:
        scores = scores + mask.double()
    if causal:
        scores = scores.masked_fill(~torch.ones(scores.shape[-2:]).tril().bool(), -torch.inf)
    p = (scores - scores.amax(-1, keepdim=True)).exp()
    rounded = (p * 256).float().to(FP8).double() / 256 if narrow else p
    return rounded @ v / p.sum(-1, keepdim=True)


KINDS = {"one": (), "heads": (1, 2, 1, 1), "rows": (2, 2, 41, 1)}


@pytest.mark.parametrize(("dtype", "kind"), [(torch.int8, "rows"), (FP8, "one"), (FP8, "heads")])
def test_stored_keys_and_values(interpreter: Interpreter, dtype: torch.dtype, kind: str) -> None:
    """A group's heads share a tile, keys end in the midst of a block, and parts are joined."""
    q, k, v = rand(2, 6, 1, 32, dtype=F16), stored(2, 2, 41, 32, dtype=dtype), stored(2, 2, 41, 32, dtype=dtype)
    scales = [torch.rand(KINDS[kind]) * 0.05 + 0.01 for _ in "kv"]
    mask = torch.randn(2, 1, 1, 41).to(F16)
    low = searched(lambda q, k, v, a, b, m: SCALED(q, k, v, None, a, b, m, False, 0.2, True, F16), q, k, v, *scales, mask)
    wide = [x.double() * s.double() for x, s in zip((k, v), scales, strict=True)]
    expected = exact(q.double(), *wide, 0.2, mask, False, False)
    for config in (AttentionConfig(16, 32, 4, 2, pack=3, split=2), AttentionConfig(16, 32, 4, 2)):
        got = run(interpreter, low, (q, k, v, *scales, mask), config)
        torch.testing.assert_close(got.double(), expected, rtol=4e-3, atol=4e-3)


@pytest.mark.parametrize(("causal", "masked", "turned"), [(False, False, True), (True, False, False), (False, True, True)])
def test_floats_of_8_bits_throughout(interpreter: Interpreter, causal: bool, masked: bool, turned: bool) -> None:
    q, k, v = (stored(1, 2, n, 32, dtype=FP8) for n in (20, 45, 45))
    scales = [torch.tensor(s) for s in (0.03, 0.02, 0.05)]
    mask = torch.randn(1, 1, 20, 45).to(F16) if masked else None
    v = v.mT.contiguous().mT if turned else v
    args = (q, k, v, *scales, *((mask,) if mask is not None else ()))
    low = searched(lambda q, k, v, a, b, c, m=None: SCALED(q, k, v, a, b, c, m, causal, None, False, F16), *args)
    wide = [x.double() * s.double() for x, s in zip((q, k, v), scales, strict=True)]
    expected = exact(*wide, 32**-0.5, mask, causal, True)
    got = run(interpreter, low, args, AttentionConfig(32, 64, 4, 2))
    torch.testing.assert_close(got.double(), expected, rtol=4e-3, atol=4e-3)
    # Blocks before the greatest score is known round other multiples of the same probabilities.
    for config in (AttentionConfig(16, 32, 4, 2), AttentionConfig(16, 32, 4, 2, split=2)):
        got = run(interpreter, low, args, config)
        assert float((got.double() - expected).norm() / expected.norm()) < 0.08


@pytest.mark.parametrize(
    ("query", "rows", "dtype", "kind"),
    [(F16, 1, torch.int8, "rows"), (FP8, 512, FP8, "one")],
    ids=["int8 cache", "fp8 throughout"],
)
def test_it_compiles_without_spills(query: torch.dtype, rows: int, dtype: torch.dtype, kind: str) -> None:
    q = stored(1, 32, rows, 128, dtype=FP8) if query == FP8 else rand(1, 32, rows, 128, dtype=query)
    k, v = stored(1, 8, 2048, 128, dtype=dtype), stored(1, 8, 2048, 128, dtype=dtype)
    v = v.mT.contiguous().mT if query == FP8 else v
    scale = torch.ones(()) if kind == "one" else torch.ones(1, 8, 2048, 1)
    own: Attention
    (own,) = kernels(searched(lambda q, k, v, s: SCALED(q, k, v, None, s, s, None, False, None, True, F16), q, k, v, scale))
    config = configs(own, H100, 1)[0]
    for source in print_attention(own, config, H100).kernels:
        assert compile_triton(source, H100)[1]["n_spills"] == 0
