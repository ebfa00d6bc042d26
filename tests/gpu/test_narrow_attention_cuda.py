"""Attention in 8 bits on a GPU: the values of configurations, caches that are read as they lie, fp8 by calibration."""

from __future__ import annotations

import importlib
import math
from collections.abc import Sequence
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

pytest.importorskip("triton")

import fxopt
from benchmarks.narrow_attention import over_cache, stored
from fxopt.codegen.compile import compile_kernels
from fxopt.codegen.templates.attention_config import plausible
from fxopt.codegen.triton_attention import print_attention
from fxopt.ir.kernel import Artifact
from fxopt.ir.region import Attention
from fxopt.journal import RECENT
from fxopt.lower.attention_kernels import KERNEL
from fxopt.runtime.artifacts import ArtifactStore
from fxopt.target import Target
from fxopt.tune.candidate import Choice
from fxopt.tune.measure import Trial, runner
from tests.codegen.test_narrow_attention import exact
from tests.lower.test_attention_kernels import kernels, searched
from tests.lower.test_narrow_attention import FP8, SCALED

tuner = importlib.import_module("fxopt.tune.choose")  # the package has the function under that name
pytestmark = [pytest.mark.gpu, pytest.mark.usefixtures("fresh_cache")]

BF16 = torch.bfloat16
CONFIGURATIONS = 16


def made(*shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(sum(shape))).transpose(1, 2)


CACHES = {
    "int8 by row": (torch.int8, True, (2, 1, 32, 128), (2, 1000, 8, 128)),
    "int8": (torch.int8, False, (2, 3, 8, 64), (2, 333, 8, 64)),
    "fp8": (FP8, False, (2, 1, 32, 128), (2, 1000, 8, 128)),
}
THROUGHOUT = {"square": (512, False), "causal": (300, True)}


def run_all(own: Attention, inputs: dict[str, Tensor], expected: Tensor, limit: float) -> None:
    """Every one of some configurations that compiles has values within `limit` of `expected`, by norm."""
    target = Target.current("cuda")
    configs = plausible(own, target)
    configs = configs[:: max(1, len(configs) // CONFIGURATIONS)]
    printed = [(c, print_attention(own, c, target)) for c in configs]
    sources = [s for _, p in printed for s in p.kernels]
    built = dict(zip(map(id, sources), compile_kernels(sources, target, ArtifactStore()), strict=True))
    count = 0
    for config, p in printed:
        parts = [(s, a) for s in p.kernels if isinstance(a := built[id(s)], Artifact)]
        if len(parts) < len(p.kernels):
            continue
        out = torch.full((math.prod(own.out.shape),), float("nan"), device="cuda", dtype=own.dtype)
        run = runner(Choice(str(config), tuple(parts), p.scratch).trial, inputs | {own.out.buffer: out}, {})
        assert run is not None
        run()
        got = out.as_strided(own.out.shape, own.out.strides).double().cpu()
        error = float((got - expected).norm() / expected.norm())
        assert error <= limit, f"{config}: {error}"
        count += 1
    assert count >= 6


def flat(names: Sequence[str], args: Sequence[Tensor]) -> dict[str, Tensor]:
    return {
        n: a.cuda().as_strided((a.untyped_storage().nbytes() // a.itemsize,), (1,)) for n, a in zip(names, args, strict=True)
    }


@pytest.mark.parametrize("case", CACHES)
def test_configurations_of_caches(case: str) -> None:
    dtype, by_row, of_query, of_keys = CACHES[case]
    q = made(*of_query).to(BF16)
    (k, a), (v, b) = (stored(made(*of_keys) * size, dtype, by_row) for size in (1.0, 2.0))
    low = searched(lambda q, k, v, a, b: SCALED(q, k, v, None, a, b, None, False, None, True, BF16), q, k, v, a, b)
    (own,) = kernels(low)
    expected = exact(q.double(), k.double() * a.double(), v.double() * b.double(), q.shape[3] ** -0.5, None, False, False)
    run_all(own, flat(low.inputs, (q, k, v, a, b)), expected, 1e-2)


@pytest.mark.parametrize("case", THROUGHOUT)
@pytest.mark.parametrize("turned", [True, False], ids=["rows of values", "features of values"])
def test_configurations_of_fp8_throughout(case: str, turned: bool) -> None:
    rows, causal = THROUGHOUT[case]
    (q, a), (k, b), (v, c) = (stored(made(1, rows, 4, 64) * size, FP8, False) for size in (1.0, 1.5, 2.0))
    v = v.mT.contiguous().mT if turned else v
    args = (q, k, v, a, b, c)
    low = searched(lambda q, k, v, a, b, c: SCALED(q, k, v, a, b, c, None, causal, None, False, BF16), *args)
    (own,) = kernels(low)
    wide = [x.double() * s.double() for x, s in ((q, a), (k, b), (v, c))]
    run_all(own, flat(low.inputs, args), exact(*wide, 64**-0.5, None, causal, False), 4e-2)


def _preferring_kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    def compare(own: Any, name: str, memory: Any, device: torch.device, trials: Sequence[Trial], check: Any) -> list[float]:
        return [0.5 if t.label.startswith(KERNEL) else 1.0 for t in trials]

    monkeypatch.setattr(tuner.Measurements, "compare", compare)


def _ran_narrow() -> bool:
    return any("narrow" in e.name for journal in RECENT for e in journal.kernels)


@pytest.mark.parametrize("dtype", [torch.int8, FP8])
def test_a_cache_is_read_as_it_lies(monkeypatch: pytest.MonkeyPatch, dtype: torch.dtype) -> None:
    _preferring_kernels(monkeypatch)
    q = made(2, 1, 32, 128).to(BF16).cuda()
    (k, a), (v, b) = (stored(made(2, 700, 8, 128).cuda(), dtype, dtype == torch.int8) for _ in "kv")
    torch.compiler.reset()
    with torch.no_grad():
        got = torch.compile(over_cache, backend="fxopt", dynamic=False)(q, k, v, a, b)
        expected = over_cache(q.double(), k, v, a.double(), b.double())
    assert _ran_narrow() and float((got - expected).norm() / expected.norm()) < 1e-2


class Attending(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.qkv = nn.Linear(256, 768)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(x).unflatten(-1, (3, 4, 64)).permute(2, 0, 3, 1, 4)
        return F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)


def test_fp8_by_calibration(monkeypatch: pytest.MonkeyPatch, tmp_path: Any) -> None:
    """Rows that are no multiple of 16, so that values are padded."""
    _preferring_kernels(monkeypatch)
    model, x = nn.Sequential(Attending()).cuda().to(BF16).eval(), torch.randn(8, 197, 256, device="cuda", dtype=BF16)
    torch.compiler.reset()
    table = fxopt.calibrate(model, [x], observe=("attention",), progress=False)
    assert "0@attention" in table.names()
    table.save(tmp_path / "a.fxcal")
    options = {"precision": {"*@attention": "fp8"}, "calibration": str(tmp_path / "a.fxcal")}
    with torch.no_grad():
        got = torch.compile(model, backend="fxopt", dynamic=False, options=options)(x)
        expected = model(x)
    error = float((got - expected).float().norm() / expected.float().norm())
    assert _ran_narrow() and error < 6e-2
