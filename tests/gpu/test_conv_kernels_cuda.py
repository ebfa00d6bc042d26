"""Convolutions by kernels of ours on a GPU, in compiled models: values, gradients, and what becomes of NaN."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fxopt.lower import padded_images
from fxopt.lower.contractions import DIRECT, IMPLICIT, PADDED, STENCIL, STENCIL_SUMS, SUMS
from fxopt.tune import alternatives
from fxopt.tune.measure import Memory, Trial
from tests.numerics import assert_closer

pytestmark = [pytest.mark.gpu, pytest.mark.usefixtures("fresh_cache")]
BF16, FP16 = torch.bfloat16, torch.float16
Activation = Callable[[Tensor], Tensor]


class Layer(nn.Module):
    """A convolution with a bias or a norm, an activation and, where shapes allow, a residual."""

    def __init__(self, *given: int, activation: Activation = F.silu, norm: bool = False, **geometry: Any) -> None:
        super().__init__()
        self.conv = nn.Conv2d(*given, bias=not norm, **geometry)
        self.norm = nn.BatchNorm2d(given[1]) if norm else nn.Identity()
        self.activation = activation

    def forward(self, x: Tensor) -> Tensor:
        y = self.activation(self.norm(self.conv(x)))
        return y + x if y.shape == x.shape else y


OURS = (STENCIL, DIRECT, IMPLICIT, PADDED, SUMS, STENCIL_SUMS)

LAYERS: dict[str, tuple[tuple[int, int, int], dict[str, Any]]] = {
    "MobileNet": ((96, 96, 3), {"padding": 1, "stride": 2, "groups": 96, "activation": F.hardswish}),
    "EfficientNet": ((240, 240, 5), {"padding": 2, "groups": 240, "norm": True}),
    "ConvNeXt": ((192, 192, 7), {"padding": 3, "groups": 192, "activation": F.gelu}),
    "odd channels": ((35, 35, 3), {"padding": 1, "groups": 35}),
    "first layer": ((3, 64, 7), {"padding": 3, "stride": 2, "activation": F.relu}),
    "patches": ((3, 96, 4), {"stride": 4}),
    "large patches": ((3, 768, 16), {"stride": 16}),
    "downsampling": ((96, 192, 2), {"stride": 2}),
    "window of three": ((64, 64, 3), {"padding": 1, "norm": True}),
    "strided product": ((64, 128, 1), {"stride": 2}),
    "dilation": ((72, 40, 3), {"padding": 2, "dilation": 2}),
}


@pytest.fixture
def ours_wins(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[str]]:
    """A kernel of ours is kept wherever it is a way, the last one. Gives the labels of what was kept."""
    kept: list[str] = []

    def choose(each: Any, memory: Memory, trials: Sequence[Trial], *_: Any) -> str:
        own = [t.label for t in trials if t.label.split()[0] in OURS]
        kept.append(own[-1] if own else trials[0].label)
        return kept[-1]

    monkeypatch.setattr(alternatives, "_fastest", choose)
    for threshold in ("LEAST_BYTES", "FEWEST_GATHERED"):
        monkeypatch.setattr(padded_images, threshold, 0)
    return kept


def image(*shape: int, dtype: torch.dtype) -> Tensor:
    return torch.randn(*shape, device="cuda").to(dtype).contiguous(memory_format=torch.channels_last)


def compiled(model: nn.Module, freeze: bool = False) -> Any:
    torch.compiler.reset()
    return torch.compile(model, backend="fxopt", options={"freeze": freeze, "strict": True})


@pytest.mark.parametrize("freeze", [False, True])
@pytest.mark.parametrize(("name", "dtype"), [*((n, BF16) for n in LAYERS), ("ConvNeXt", FP16)])
def test_values(name: str, freeze: bool, dtype: torch.dtype, ours_wins: list[str]) -> None:
    given, options = LAYERS[name]
    torch.manual_seed(0)
    model = Layer(*given, **options).cuda().to(dtype).eval()
    side = max(28, 4 * given[2])
    x = image(4, given[0], side, side - 1, dtype=dtype)
    with torch.no_grad():
        got, want = compiled(model, freeze)(x), model(x)
        exact = copy.deepcopy(model).double()(x.double())
    dense = PADDED if given[0] == 3 else IMPLICIT
    assert [label.split()[0] for label in ours_wins] == [dense if "groups" not in options else STENCIL if freeze else DIRECT]
    assert_closer(got, want, exact, k=0.5)
    assert got.stride() == want.stride()


@pytest.mark.parametrize("name", ["MobileNet", "EfficientNet", "ConvNeXt", "first layer"])
def test_gradients(name: str, ours_wins: list[str]) -> None:
    given, options = LAYERS[name]
    torch.manual_seed(0)
    model = Layer(*given, **options).cuda().to(BF16)
    x = image(4, given[0], 28, 27, dtype=BF16).requires_grad_()

    def results(step: Any, own: nn.Module, x: Tensor, weight: Tensor | None = None) -> tuple[Tensor, list[Tensor]]:
        y = step(x)
        weight = torch.randn_like(y) if weight is None else weight
        return weight, [y.detach(), *torch.autograd.grad((y * weight).sum(), [x, *own.parameters()])]

    double = copy.deepcopy(model).double()
    weight, want = results(model, model, x)
    _, got = results(compiled(model), model, x, weight)
    _, exact = results(double, double, x.detach().double().requires_grad_(), weight.double())
    assert any(label.split()[0] in OURS for label in ours_wins)
    assert_closer(got, want, exact, k=1)


@pytest.mark.parametrize("name", ["ConvNeXt", "window of three", "first layer"])
def test_nan_stays(name: str, ours_wins: list[str]) -> None:
    given, options = LAYERS[name]
    model = Layer(*given, **options).cuda().to(BF16).eval()
    x = image(4, given[0], 28, 27, dtype=BF16)
    x[1, 2, 7, 9] = float("nan")
    with torch.no_grad():
        assert torch.equal(compiled(model)(x).isnan(), model(x).isnan())
    assert len(ours_wins) == 1
