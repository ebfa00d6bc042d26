"""Calibration and quantized models on a GPU: the CPU's statistics, and values close to the model's."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fxopt.ir.group_scaled_op import GROUP_SCALED_MM
from fxopt.ir.observer_ops import exponent_histogram
from fxopt.journal import RECENT
from fxopt.quant.calibrate import calibrate
from fxopt.report.backends import resolve_backend

pytestmark = pytest.mark.gpu


class Block(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm, self.up, self.down = nn.LayerNorm(width), nn.Linear(width, 4 * width), nn.Linear(4 * width, width)
        self.query, self.key, self.value = (nn.Linear(width, width) for _ in range(3))

    def forward(self, x: Tensor) -> Tensor:
        h = self.norm(x)
        q, k, v = (p(h).unflatten(-1, (-1, 64)).transpose(1, 2) for p in (self.query, self.key, self.value))
        x = x + F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)
        return x + self.down(F.gelu(self.up(self.norm(x))))


def network(width: int = 256) -> nn.Module:
    return nn.Sequential(Block(width), Block(width)).cuda().bfloat16().eval()


def test_histograms_are_the_cpus() -> None:
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        x = torch.randn(257, 1031, device="cuda").to(dtype)
        x[0, :3] = torch.tensor([0.0, float("inf"), float("nan")])
        assert torch.equal(exponent_histogram(x).cpu(), exponent_histogram(x.cpu()))
    assert int(exponent_histogram(torch.ones(1 << 25, device="cuda", dtype=torch.bfloat16)).sum()) == 1 << 25  # one row
    x = torch.randn(8192, 1031, device="cuda").bfloat16()
    assert torch.equal(exponent_histogram(x).cpu(), exponent_histogram(x.cpu()))


@pytest.mark.parametrize("shape", [(257, 1031), (12608, 768), (16, 24, 14, 14), (70_000,)])
def test_histograms_of_a_graph_are_those_of_the_op(shape: tuple[int, ...]) -> None:
    """Kernels of ours count there; of twelve thousand rows they count a sample, and both ends."""
    x = torch.randn(shape, device="cuda").mul(50).bfloat16()
    x.view(-1)[:4] = torch.tensor([0.0, float("inf"), float("nan"), -1e20])
    x.view(-1)[-1] = -float("inf")
    x = x.contiguous(memory_format=torch.channels_last) if x.dim() == 4 else x

    def counted(x: Tensor) -> Tensor:
        return exponent_histogram(x, x.amin(), x.amax())

    torch.compiler.reset()
    for options in ({"tuning_seconds": 0, "cuda_graphs": False}, {}):
        with torch.no_grad():
            got = torch.compile(counted, backend=resolve_backend("fxopt"), options=options)(x)
        assert torch.equal(got, counted(x)) and torch.equal(got, exponent_histogram(x))


@pytest.mark.parametrize("dtype", [torch.int8, torch.float8_e4m3fn])
@pytest.mark.parametrize(("rows", "groups"), [(64, 4), (64, 1), (48, 6), (7, 2)])
def test_scales_of_groups_are_the_cpus(dtype: torch.dtype, rows: int, groups: int) -> None:
    a, b = (torch.randn(n, groups * 128).mul(30).clamp(-100, 100).to(dtype) for n in (rows, 96))
    scale_a, scale_b, bias = torch.rand(rows, groups) + 0.1, torch.rand(96, groups) + 0.1, torch.randn(96)
    for scale in (scale_a, scale_a[:1]):
        want = GROUP_SCALED_MM(a, b, scale, scale_b, bias, torch.float32)
        got = GROUP_SCALED_MM(a.cuda(), b.cuda(), scale.cuda(), scale_b.cuda(), bias.cuda(), torch.float32)
        torch.testing.assert_close(got.cpu(), want, rtol=1e-3, atol=1e-3 * float(want.abs().max()))


def test_calibrating_twice_gives_the_same() -> None:
    model, data = network(), [torch.randn(2, 64, 256, device="cuda", dtype=torch.bfloat16) for _ in range(3)]
    first, second = (calibrate(model, data, progress=False, backend=resolve_backend("fxopt")) for _ in range(2))
    assert first.digest() == second.digest() and len(first.names()) == 10
    seen = first["0.query"].seen
    assert seen is not None
    with torch.no_grad():
        given = torch.cat([model[0].norm(x) for x in data]).float().cpu()  # type: ignore[index, union-attr, operator]
    torch.testing.assert_close(seen.maximum, given.reshape(-1, 256).amax(0), rtol=0.01, atol=0.01)


@pytest.mark.parametrize(
    ("precision", "limit"),
    [
        ("fp8", 0.06),
        ("fp8-dynamic", 0.06),
        ("int8", 0.03),
        ("int8-dynamic", 0.03),
        ("int8-weight", 0.02),
        ("int4-weight", 0.15),
        ("high", 0.02),
    ],
)
@pytest.mark.parametrize("calibrated", [True, False])
@pytest.mark.parametrize("rows", [1, 64])
def test_models_in_each_precision(precision: str, limit: float, calibrated: bool, rows: int) -> None:
    """Replays of CUDA graphs, too; nothing that should be a kernel falls back."""
    torch.compiler.reset()
    model, x = network(), torch.randn(1, rows, 256, device="cuda", dtype=torch.bfloat16)
    options: dict[str, Any] = {"precision": precision}
    if calibrated:
        options["calibration"] = calibrate(model, [x], progress=False, backend=resolve_backend("fxopt"))
    compiled = torch.compile(model, backend=resolve_backend("fxopt"), options=options)
    with torch.no_grad():
        want = model(x).float()
        results = [compiled(x).float() for _ in range(4)]
    journal = RECENT[-1]
    assert [text for topic, text in journal.notes if "stays high" in text] == [] and journal.retreats == []
    for got in results:
        assert (got - want).norm() < limit * want.norm()
