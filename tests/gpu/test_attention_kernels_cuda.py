"""Attention by kernels of ours on a GPU: every configuration's values, and a compiled model that uses them."""

from __future__ import annotations

import importlib
from collections.abc import Sequence
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

pytest.importorskip("triton")

from benchmarks.attention_kernels import contenders, step_of
from benchmarks.written_attention import Case, capped, precise_bias
from fxopt.codegen.templates.attention_config import plausible
from fxopt.ir.attention_backends import MATH, Inputs, Settings, forward, forward_by
from fxopt.journal import RECENT
from fxopt.lower.attention_kernels import KERNEL
from fxopt.runtime.artifacts import ArtifactStore
from fxopt.target import Target
from fxopt.tune.measure import Trial
from tests.numerics import assert_closer

tuner = importlib.import_module("fxopt.tune.choose")  # the package has the function under that name
pytestmark = [pytest.mark.gpu, pytest.mark.usefixtures("fresh_cache")]

CONFIGURATIONS = 40
EAGERS_ERROR = 1.5


def inputs(
    heads: int,
    groups: int,
    rows: int,
    keys: int,
    width: int,
    mask: Sequence[int] = (),
    causal: bool = False,
    dtype: torch.dtype = torch.bfloat16,
) -> Inputs:
    """Random operands; a mask of this shape hides some keys, one row throughout, and adds something to the others."""
    generator = torch.Generator("cuda").manual_seed(0)

    def made(length: int, count: int) -> Tensor:
        x = torch.empty(2, length, count, width, device="cuda", dtype=dtype).normal_(generator=generator)
        return x.transpose(1, 2)

    addend = None
    if mask:
        addend = torch.empty(mask, device="cuda", dtype=dtype).normal_(generator=generator)
        addend[torch.rand(mask, device="cuda", generator=generator) < 0.3] = -torch.inf
        addend[..., : keys // 3] = -torch.inf
        if mask[-2] > 1:
            addend[..., -1, :] = -torch.inf
    return Inputs(made(rows, heads), made(keys, groups), made(keys, groups), addend, Settings(causal, None, heads != groups))


CASES = {
    "decode": lambda: inputs(32, 8, 1, 1000, 128),
    "decode, masked": lambda: inputs(32, 8, 1, 2048, 128, (2, 1, 1, 2048)),
    "decode, wide": lambda: inputs(8, 4, 1, 1024, 256, (1, 1, 1, 1024)),
    "decode, float32": lambda: inputs(32, 8, 1, 1000, 128, (2, 1, 1, 1000), dtype=torch.float32),
    "few rows": lambda: inputs(16, 4, 7, 777, 80, (2, 1, 7, 777)),
    "causal": lambda: inputs(8, 2, 500, 500, 128, causal=True),
    "causal, wide": lambda: inputs(2, 2, 300, 300, 256, causal=True),
    "bias": lambda: inputs(12, 12, 197, 197, 64, (1, 12, 197, 197), dtype=torch.float16),
    "cross": lambda: inputs(10, 10, 1024, 77, 64),
    "groups, masked": lambda: inputs(8, 2, 384, 384, 96, (1, 1, 384, 384)),
}


@pytest.mark.parametrize("case", CASES)
def test_every_configuration_is_as_exact_as_eager(case: str) -> None:
    x = CASES[case]()
    target = Target.current("cuda")
    mask = None if x.mask is None else x.mask.double()
    exact = forward_by(MATH, Inputs(x.query.double(), x.key.double(), x.value.double(), mask, x.settings), False)[0]
    allowed = EAGERS_ERROR * (forward(x, "auto").double() - exact).abs().max()
    count = min(CONFIGURATIONS, len(plausible(step_of(x, x.query), target)))
    found = contenders(x, target, ArtifactStore(), count)
    assert len(found) >= min(count, 8)
    for each in found:
        each.out.fill_(float("nan"))
        each.run()
        error = (each.out.double() - exact).abs().max()
        assert error <= allowed, f"{each.config}: {error} of {allowed} allowed"


def _preferring_kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    def compare(own: Any, name: str, memory: Any, device: torch.device, trials: Sequence[Trial], check: Any) -> list[float]:
        return [0.5 if t.label.startswith(KERNEL) else 1.0 for t in trials]

    monkeypatch.setattr(tuner.Measurements, "compare", compare)


def test_a_static_cache_is_read_by_kernels_of_ours(monkeypatch: pytest.MonkeyPatch) -> None:
    """From the plan of the first compilation and, after a reset, from the one on disk."""
    _preferring_kernels(monkeypatch)

    def fn(q: Tensor, k: Tensor, v: Tensor, position: Tensor) -> Tensor:
        seen = (torch.arange(k.shape[2], device=k.device) <= position)[None, None, None]
        out = F.scaled_dot_product_attention(q * 2, k, v, seen, enable_gqa=True)
        return out.transpose(1, 2).flatten(2) + 1

    x = inputs(32, 8, 1, 2048, 128)
    for _ in range(2):
        torch.compiler.reset()
        compiled = torch.compile(fn, backend="fxopt", dynamic=False)
        for position in (0, 700, 2047):
            at = torch.tensor(position, device="cuda")
            with torch.no_grad():
                got, eager = compiled(*x[:3], at), fn(*x[:3], at)
                exact = fn(*(t.double() for t in x[:3]), at)
            error, eagers = ((t.double() - exact).abs().max() for t in (got, eager))
            assert error <= EAGERS_ERROR * eagers
        entries = [e.name for journal in RECENT for e in journal.kernels]
        assert any(e.startswith("fx_attention") for e in entries)


@pytest.mark.parametrize("rows", [1, 300])
@pytest.mark.parametrize("attend", [capped, precise_bias])
def test_attention_written_out_is_one_kernel(monkeypatch: pytest.MonkeyPatch, attend: Any, rows: int) -> None:
    _preferring_kernels(monkeypatch)
    torch.compiler.reset()
    RECENT.clear()
    q, k, v, mask = Case("small", attend, 2, 8, 4, rows, 300, 128).inputs(torch.device("cuda"))
    compiled = torch.compile(attend, backend="fxopt", dynamic=False)
    with torch.no_grad():
        got, eager = compiled(q, k, v, mask), attend(q, k, v, mask)
        exact = attend(q.double(), k.double(), v.double(), mask.double())
    assert_closer([got], [eager], [exact])
    entries = [e.name for journal in RECENT for e in journal.kernels]
    assert any(e.startswith("fx_attention") for e in entries) and not [op for j in RECENT for op, _ in j.library]
