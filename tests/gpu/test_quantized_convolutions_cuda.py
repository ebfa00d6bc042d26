"""Quantized convolutions on a GPU: kernels of ours against exact sums, and a residual network in 8 bits."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from fxopt.ir.quantized_convolution import SCALED_CONVOLUTION
from fxopt.ir.quantized_ops import DEQUANTIZE, FLOAT8
from fxopt.journal import RECENT
from fxopt.lower.contractions import FUSED, IMPLICIT
from fxopt.quant.calibrate import calibrate
from fxopt.report.backends import resolve_backend
from fxopt.target import Target
from fxopt.tune import alternatives
from fxopt.tune.measure import Memory, Trial

pytestmark = [pytest.mark.gpu, pytest.mark.usefixtures("fresh_cache")]
F16, INT8 = torch.float16, torch.int8


@pytest.fixture(params=[0, -1], ids=["first", "last"])
def ours_wins(monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest) -> Iterator[list[str]]:
    """A kernel of ours is kept wherever it is a way, the first or the last one, whose threads store from where tensor cores
    have left a tile. Gives the labels of what was kept.
    """
    kept: list[str] = []

    def choose(each: Any, memory: Memory, trials: Sequence[Trial], *_: Any) -> str:
        own = [t.label for t in trials if t.label.split()[0] in (FUSED, IMPLICIT)]
        kept.append(own[request.param] if own else trials[0].label)
        return kept[-1]

    monkeypatch.setattr(alternatives, "_fastest", choose)
    return kept


LAYERS: dict[str, tuple[tuple[int, ...], tuple[int, ...], int]] = {
    "3x3": ((4, 28, 28, 64), (64, 3, 3, 64), 1),
    "3x3, many channels": ((8, 14, 14, 256), (256, 3, 3, 256), 1),
    "3x3, stride 2": ((4, 28, 27, 128), (128, 3, 3, 128), 2),
    "channels of no block": ((2, 15, 14, 48), (80, 3, 3, 48), 1),
    "1x1": ((4, 28, 28, 64), (256, 1, 1, 64), 1),
    "1x1, stride 2": ((4, 28, 28, 256), (512, 1, 1, 256), 2),
    "few places": ((1, 7, 7, 512), (512, 3, 3, 512), 1),
}


@pytest.mark.parametrize("dtype", [INT8, FLOAT8])
@pytest.mark.parametrize("name", LAYERS)
def test_values_of_layers(name: str, dtype: torch.dtype, ours_wins: list[str]) -> None:
    if dtype == FLOAT8 and not Target.current(torch.device("cuda")).has_float8:
        pytest.skip("no float8")
    x_shape, w_shape, stride = LAYERS[name]
    torch.manual_seed(0)
    x = torch.randint(-100, 101, x_shape, device="cuda").to(dtype).permute(0, 3, 1, 2)
    w = torch.randint(-100, 101, w_shape, device="cuda").to(dtype)
    depth = w[0].numel()
    scales = torch.rand(w_shape[0], device="cuda") / depth**0.5
    bias = torch.randn(w_shape[0], device="cuda")
    geometry = ([stride] * 2, [w_shape[1] // 2] * 2, [1, 1])

    def layer(x: Tensor, w: Tensor, scale: Tensor, scales: Tensor, bias: Tensor) -> Tensor:
        y = torch.relu(SCALED_CONVOLUTION(x, w, scale, scales, bias, *geometry, F16))
        return (y.float() * 2.0).round().clamp(-127.0, 127.0).to(INT8)

    args = (x, w, torch.tensor(0.01, device="cuda"), scales, bias)
    torch.compiler.reset()
    got = torch.compile(layer, backend="fxopt", options={"strict": True})(*args)
    assert len(ours_wins) == 1 and ours_wins[0].split()[0] == (FUSED if name == "1x1" else IMPLICIT)
    exact = torch.nn.functional.conv2d(x.double(), w.permute(0, 3, 1, 2).double(), None, *geometry) * 0.01
    exact = torch.relu(exact * scales[:, None, None] + bias[:, None, None]).to(F16)
    wanted = (exact.float() * 2.0).round().clamp(-127.0, 127.0).int()
    apart = (got.int() - wanted).abs()
    assert int(apart.max()) <= (1 if dtype == INT8 else 2) and float((apart > 0).float().mean()) < 0.02
    assert float((wanted > 0).float().mean()) > 0.2 > float((wanted == 127).float().mean())
    assert got.is_contiguous(memory_format=torch.channels_last)


def test_a_residual_in_8_bits_is_read_exactly(ours_wins: list[str]) -> None:
    """All 256 values, beside a product of zeros; what is beyond the bounds, and NaN, on its way out."""
    x = torch.zeros(4, 64, 28, 28, dtype=INT8, device="cuda").to(memory_format=torch.channels_last)
    w = torch.zeros(256, 1, 1, 64, dtype=INT8, device="cuda")
    residual = (torch.arange(x.shape[0] * 28 * 28 * 256, device="cuda") * 7 % 256 - 128).to(INT8)
    residual = residual.view(4, 28, 28, 256).permute(0, 3, 1, 2)
    one, bias = torch.ones((), device="cuda"), torch.zeros(256, device="cuda")
    bias[3], bias[5], bias[9] = float("nan"), float("inf"), -float("inf")

    def layer(x: Tensor, w: Tensor, one: Tensor, bias: Tensor, residual: Tensor) -> tuple[Tensor, Tensor]:
        y = SCALED_CONVOLUTION(x, w, one, one, bias, [1, 1], [0, 0], [1, 1], F16) + DEQUANTIZE(residual, one, F16)
        whole = (y.float() * 1.5).round()
        return whole.clamp(-127.0, 127.0).to(INT8), whole.clamp(0.0, 127.0).to(INT8)

    args = (x, w, one, bias, residual)
    torch.compiler.reset()
    both, above = torch.compile(layer, backend="fxopt", options={"strict": True})(*args)
    assert len(ours_wins) == 1 and ours_wins[0].split()[0] == FUSED
    wanted = (residual.double() * 1.5 + bias[:, None, None].double()).round().nan_to_num(0.0, 999.0, -999.0)
    assert torch.equal(both.double(), wanted.clamp(-127, 127)) and torch.equal(above.double(), wanted.clamp(0, 127))


def test_what_a_relu_made_is_cast_as_torch_does_it() -> None:
    """Ties to even, zeros of both signs, what is beyond the bounds, NaN; factors of any sign."""
    inf = float("inf")
    special = torch.tensor([0.0, -0.0, 1e-40, -1e-40, inf, -inf, float("nan"), 3e38, -3e38, 126.5, 127.5])
    x = torch.cat([torch.arange(-1024, 1025) / 4, special, torch.randn(100_000) * 90]).cuda()

    def casts(x: Tensor, factor: Tensor) -> Tensor:
        return (torch.relu(x) * factor).round().clamp(0.0, 127.0).to(INT8)

    compiled = torch.compile(casts, backend="fxopt", options={"strict": True})
    for factor in (1.0, 0.37, 20.0, 1e-3, 0.0, -0.0, -2.0):
        given = torch.tensor(factor, device="cuda")
        wanted = (torch.relu(x) * given).round().nan_to_num(0.0).clamp(0.0, 127.0).to(INT8)
        assert torch.equal(compiled(x, given), wanted), factor


class Bottleneck(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        sizes = ((width, width // 4, 1), (width // 4, width // 4, 3), (width // 4, width, 1))
        self.convolutions = nn.ModuleList(nn.Conv2d(a, b, n, padding=n // 2, bias=False) for a, b, n in sizes)
        self.norms = nn.ModuleList(nn.BatchNorm2d(b) for _, b, _ in sizes)

    def forward(self, x: Tensor) -> Tensor:
        y = x
        for k, (convolution, norm) in enumerate(zip(self.convolutions, self.norms, strict=True)):
            y = norm(convolution(y))
            y = torch.relu(y if k < 2 else y + x)
        return y


def network() -> nn.Module:
    torch.manual_seed(0)
    stem = (nn.Conv2d(3, 128, 7, 2, 3, bias=False), nn.BatchNorm2d(128), nn.ReLU(), nn.MaxPool2d(3, 2, 1))
    model = nn.Sequential(*stem, Bottleneck(128), Bottleneck(128), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(128, 64))
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.uniform_(module.weight, 0.5, 1.5)
            nn.init.normal_(module.running_mean, std=0.2)
    return model.cuda().half().to(memory_format=torch.channels_last).eval()


@pytest.mark.parametrize(("precision", "limit"), [("int8", 0.05), ("fp8", 0.1)])
def test_a_residual_network(precision: str, limit: float) -> None:
    if precision == "fp8" and not Target.current(torch.device("cuda")).has_float8:
        pytest.skip("no float8")
    model = network()
    x = torch.randn(8, 3, 64, 64, device="cuda").half().contiguous(memory_format=torch.channels_last)
    calibration = calibrate(model, [x], progress=False, backend=resolve_backend("fxopt"))
    options = {"precision": precision, "calibration": calibration, "strict": True}
    with torch.no_grad():
        torch.compiler.reset()
        got, wanted = torch.compile(model, backend="fxopt", options=options)(x), model(x)
    notes = next(
        found for journal in reversed(RECENT) if (found := [t for topic, t in journal.notes if topic == "precision"])
    )
    assert sum(f": {precision}" in note for note in notes) == 7  # six convolutions and the last layer
    assert sum("alone" in note for note in notes) == (2 if precision == "int8" else 0)
    assert float((got - wanted).norm() / wanted.norm()) < limit
