"""cuDNN's fused convolutions on a GPU, in compiled models: values, and what becomes of NaN."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Sequence
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fxopt.journal import RECENT
from fxopt.lower.convolutions import ADD_RELU, RELU
from fxopt.tune import alternatives
from fxopt.tune.measure import Memory, Trial
from tests.numerics import assert_closer

pytestmark = [pytest.mark.gpu, pytest.mark.usefixtures("fresh_cache")]
BF16, FP16, TF32 = torch.bfloat16, torch.float16, torch.float32


class Layer(nn.Module):
    """relu of a convolution with a bias or a batch norm, and of a shortcut where there is one."""

    def __init__(self, inside: int, outside: int, window: int, norm: bool, **geometry: Any) -> None:
        super().__init__()
        self.conv = nn.Conv2d(inside, outside, window, bias=not norm, **geometry)
        self.norm = nn.BatchNorm2d(outside) if norm else nn.Identity()
        if isinstance(self.norm, nn.BatchNorm2d):
            nn.init.normal_(self.norm.running_mean, std=0.3)  # type: ignore[arg-type]
            nn.init.uniform_(self.norm.running_var, 0.3, 1.3)  # type: ignore[arg-type]
            nn.init.uniform_(self.norm.weight, 0.5, 1.5)
            nn.init.normal_(self.norm.bias)

    def forward(self, x: Tensor, shortcut: Tensor | None = None) -> Tensor:
        y = self.norm(self.conv(x))
        return F.relu(y if shortcut is None else y + shortcut)


class Bottleneck(nn.Module):
    """The end of a block whose shortcut has a convolution and a norm of its own."""

    def __init__(self, window: int) -> None:
        super().__init__()
        self.main = Layer(64, 256, window, True, padding=window // 2)
        self.shortcut = Layer(128, 256, 1, True, stride=2)

    def forward(self, x: Tensor, before: Tensor) -> Tensor:
        y = self.main.norm(self.main.conv(x))
        return F.relu(y + self.shortcut.norm(self.shortcut.conv(before)))


LAYERS: dict[str, tuple[tuple[int, int, int], dict[str, Any]]] = {
    "window of one": ((64, 256, 1), {}),
    "window of three": ((64, 64, 3), {"padding": 1}),
    "stride": ((64, 128, 3), {"padding": 1, "stride": 2}),
    "dilation": ((64, 64, 3), {"padding": 2, "dilation": 2}),
    "groups": ((64, 128, 3), {"padding": 1, "groups": 2}),
    "odd channels": ((35, 77, 3), {"padding": 1}),
    "three colours": ((3, 64, 7), {"padding": 3, "stride": 2}),
}


@pytest.fixture
def fused_wins(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[str]]:
    """cuDNN's fused call is kept wherever it is a way. Gives the labels of what was kept."""
    kept: list[str] = []

    def choose(each: Any, memory: Memory, trials: Sequence[Trial], *_: Any) -> str:
        kept.append(next((t.label for t in trials if t.label.startswith("cudnn")), trials[0].label))
        return kept[-1]

    monkeypatch.setattr(alternatives, "_fastest", choose)
    with torch.backends.cudnn.flags(enabled=True, allow_tf32=True):
        yield kept


def image(*shape: int, dtype: torch.dtype) -> Tensor:
    x = torch.randn(*shape, device="cuda").to(dtype)
    return x.contiguous(memory_format=torch.channels_last)


def compiled(model: nn.Module, freeze: bool) -> Any:
    torch.compiler.reset()
    RECENT.clear()
    return torch.compile(model, backend="fxopt", options={"freeze": freeze, "strict": True})


def ops_called() -> set[str]:
    return {op for journal in RECENT for op, _ in journal.library}


@pytest.mark.parametrize("shortcut", [False, True])
@pytest.mark.parametrize("norm", [False, True])
@pytest.mark.parametrize(("name", "dtype"), [*((n, BF16) for n in LAYERS), ("stride", FP16), ("stride", TF32)])
def test_values(name: str, norm: bool, shortcut: bool, dtype: torch.dtype, fused_wins: list[str]) -> None:
    (inside, outside, window), geometry = LAYERS[name]
    torch.manual_seed(0)
    model = Layer(inside, outside, window, norm, **geometry).cuda().to(dtype).eval()
    x = image(4, inside, 28, 27, dtype=dtype)
    with torch.no_grad():
        args = (x, image(*model(x).shape, dtype=dtype)) if shortcut else (x,)
        run = compiled(model, freeze=norm)
        torch.full_like(model(*args), float("nan"))  # freed at once, and given to the next tensor of this size
        try:
            got, want = run(*args), model(*args)
        except RuntimeError as error:  # when candidates are measured, that excludes the call
            pytest.skip(f"cuDNN has no such call: {error}")
        exact = copy.deepcopy(model).double()(*(a.double() for a in args))
    assert fused_wins == ["cudnn-folded" if norm else "cudnn"]
    assert ops_called() == {ADD_RELU if shortcut else RELU}
    assert_closer(got, want, exact, k=0.5 if dtype != TF32 else 2.0**11)  # eps of TF32 is 2**13 times that of float32
    assert got.stride() == want.stride()


@pytest.mark.parametrize("window", [1, 3])
def test_a_shortcut_with_a_norm_of_its_own(window: int, fused_wins: list[str]) -> None:
    torch.manual_seed(0)
    model = Bottleneck(window).cuda().to(BF16).eval()
    args = (image(4, 64, 14, 14, dtype=BF16), image(4, 128, 28, 28, dtype=BF16))
    with torch.no_grad():
        got, want = compiled(model, freeze=True)(*args), model(*args)
        exact = copy.deepcopy(model).double()(*(a.double() for a in args))
    assert fused_wins == ["cudnn-folded"]
    assert ops_called() == {"aten::convolution.default", ADD_RELU}
    assert_closer(got, want, exact, k=0.5)


def test_a_call_on_other_operands_of_the_same_shapes(fused_wins: list[str]) -> None:
    """torch remembers cuDNN's plans: they must hold nothing of the operands that made them."""
    model = Layer(64, 64, 3, norm=False, padding=1).cuda().to(BF16).eval()
    with torch.no_grad():
        run = compiled(model, freeze=False)
        for _ in range(3):
            x, shortcut = image(4, 64, 28, 28, dtype=BF16), image(4, 64, 28, 28, dtype=BF16)
            model.conv.weight.normal_(std=0.05)
            assert model.conv.bias is not None
            model.conv.bias.normal_()
            exact = copy.deepcopy(model).double()(x.double(), shortcut.double())
            assert_closer(run(x, shortcut), model(x, shortcut), exact, k=0.5)
    assert fused_wins == ["cudnn"]


@pytest.mark.parametrize("shortcut", [False, True])
@pytest.mark.parametrize("norm", [False, True])
def test_nan_stays(norm: bool, shortcut: bool) -> None:
    """Whichever way has won."""
    model = Layer(64, 64, 3, norm=norm, padding=1).cuda().to(BF16).eval()
    x, z = image(16, 64, 56, 56, dtype=BF16), image(16, 64, 56, 56, dtype=BF16)
    x[3, 5, 7, 9] = z[1, 2, 3, 4] = float("nan")
    args = (x, z) if shortcut else (x,)
    with torch.no_grad():
        assert torch.equal(compiled(model, freeze=norm)(*args).isnan(), model(*args).isnan())


@pytest.mark.parametrize("freeze", [False, True])
@pytest.mark.parametrize("dtype", [BF16, FP16])
def test_over_time(dtype: torch.dtype, freeze: bool) -> None:
    """Two convolutions of one dimension with GELUs, then tokens, as at the entry of speech models."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv1d(32, 64, 3, padding=1), nn.GELU(), nn.Conv1d(64, 64, 3, 2, 1), nn.GELU())
    model = model.cuda().to(dtype).eval()
    x = torch.randn(2, 32, 100, device="cuda").to(dtype)
    with torch.no_grad():
        run = compiled(model, freeze)
        got, want = run(x), model(x)
        assert_closer(got, want, copy.deepcopy(model).double()(x.double()))
    assert got.stride() == want.stride()
    rewrites = {reason.split()[0] for journal in RECENT for topic, reason in journal.notes if topic == "rewrite"}
    assert {"flat_convolution.with_one_row", "channels_last.convolution"} <= rewrites


@pytest.mark.parametrize("dtype", [BF16, FP16])
def test_few_channels_after_a_norm(dtype: torch.dtype) -> None:
    """On GPUs a group norm asks for rows; cuDNN computes channels-last as soon as the weight is."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.GroupNorm(8, 64), nn.SiLU(), nn.Conv2d(64, 4, 3, padding=1))
    model = model.cuda().to(dtype, memory_format=torch.channels_last).eval()  # type: ignore[call-overload]
    x = image(2, 64, 28, 27, dtype=dtype)
    with torch.no_grad():
        got, want = compiled(model, freeze=False)(x), model(x)
        assert_closer(got, want, copy.deepcopy(model).double()(x.double()))
    assert got.stride() == want.stride()
    assert ("rewrite", "channels_last.convolution x1") in [note for journal in RECENT for note in journal.notes]
