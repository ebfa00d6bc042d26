"""Device functions written in PTX, which Triton's interpreter does not run."""

from __future__ import annotations

import pytest
import torch

pytestmark = pytest.mark.gpu


def test_a_normal_distribution() -> None:
    """1 + erf(x) to one unit in the last place of its largest value, 2: half a unit more than in the interpreter
    (`test_triton_values.py`), since the GPU's 2^x is not rounded correctly."""
    x = torch.linspace(-7, 7, 4096, device="cuda")
    actual = torch.compile(lambda x: 1 + torch.erf(x), backend="fxopt")(x)
    error = (actual.double() - 1 - torch.special.erf(x.double())).abs()
    assert error[:2048].max() < 1.2e-7 and error[2048:].max() < 2.4e-7


def test_a_normal_distribution_at_its_ends() -> None:
    x = torch.tensor([0.0, -0.0, float("inf"), -float("inf"), float("nan"), 100.0, -100.0], device="cuda").repeat(300)
    actual = torch.compile(lambda x: 1 + torch.erf(x), backend="fxopt")(x)
    torch.testing.assert_close(actual, 1 + torch.erf(x), equal_nan=True)


@pytest.mark.parametrize("row", [64, 1024, 40000])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_softmax_and_its_logarithm(row: int, dtype: torch.dtype) -> None:
    """Rows of infinities, of NaN and far apart. A difference of 100 has an error of 4e-6, which exp makes relative."""
    x = torch.randn(512, row, device="cuda", generator=torch.Generator("cuda").manual_seed(0)) * 20
    x[0], x[1, 3:], x[2, 1], x[3, 2], x[4, :40] = -torch.inf, -torch.inf, torch.inf, torch.nan, -torch.inf
    x = x.to(dtype)
    for function, least in ((torch.softmax, 1e-37), (torch.log_softmax, 2e-5)):
        actual = torch.compile(lambda x, f=function: f(x, -1), backend="fxopt")(x)
        expected = function(x.double(), -1)
        tolerance = 2e-5 if dtype == torch.float32 else 8e-3
        torch.testing.assert_close(actual.double(), expected, rtol=tolerance, atol=least, equal_nan=True)


def test_a_sigmoid_before_rounding() -> None:
    x = torch.linspace(-90, 90, 4096, device="cuda").to(torch.bfloat16)
    x[:3] = torch.tensor([float("inf"), -float("inf"), float("nan")])
    actual = torch.compile(torch.sigmoid, backend="fxopt")(x)
    torch.testing.assert_close(actual, torch.sigmoid(x), rtol=8e-3, atol=1.2e-38, equal_nan=True)


def test_a_sigmoid() -> None:
    """To a unit in the last place of the exponential and of the inverse; small where exp overflows, zero beyond."""
    x = torch.linspace(-90, 90, 1 << 16, device="cuda")
    x[:6] = torch.tensor([float("inf"), -float("inf"), float("nan"), -88.0, -88.7, -89.0])
    actual = torch.compile(torch.sigmoid, backend="fxopt")(x)
    torch.testing.assert_close(actual, torch.sigmoid(x), rtol=4e-7, atol=5e-45, equal_nan=True)


def test_gradients_of_a_normal_distribution() -> None:
    """A bias before GELU: the gradient's exp(-x * x / 2) is small where its relative error is large."""
    x = torch.linspace(-14, 14, 1 << 14, device="cuda").view(256, 64).to(torch.bfloat16).requires_grad_()
    bias = torch.zeros(64, device="cuda", dtype=torch.bfloat16, requires_grad=True)
    torch.compile(lambda x, b: torch.nn.functional.gelu(x + b), backend="fxopt")(x, bias).sum().backward()
    wide = x.detach().double().requires_grad_()
    torch.nn.functional.gelu(wide).sum().backward()
    assert x.grad is not None and wide.grad is not None
    torch.testing.assert_close(x.grad.double(), wide.grad, rtol=8e-3, atol=1e-9)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_rounding_in_the_midst(dtype: torch.dtype) -> None:
    """Bit for bit as eager, in blocks and rows; a product that is half way between two values, infinities and NaN."""
    x = torch.randn(513, 1000, device="cuda", generator=torch.Generator("cuda").manual_seed(0)).to(dtype) * 3
    x[0, :4] = torch.tensor([torch.inf, -torch.inf, torch.nan, -0.0])

    def twice_rounded(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        wide = x.float()
        return (wide * 1.2345).to(dtype).float() - wide, (wide.amax(1) * 0.3).to(dtype).float() + 1.0

    for got, expected in zip(torch.compile(twice_rounded, backend="fxopt")(x), twice_rounded(x), strict=True):
        torch.testing.assert_close(got, expected, rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("channels_last", [True, False])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_positions_of_maxima(dtype: torch.dtype, channels_last: bool) -> None:
    """Ties go to the first, NaN to the last, zeros of both signs are equal; windows of infinities at the edge.

    Of a window of nothing but -inf the first place has the gradient. In channels-last images eager takes that of the whole
    image, which is in no other window, and the gradient is lost.
    """
    x = torch.randint(-2, 3, (5, 64, 9, 11), device="cuda", generator=torch.Generator("cuda").manual_seed(0)).to(dtype)
    x[0, ::3, 2:4], x[1, :, :2, ::5], x[2], x[3, :, 1::3], x[4, 5, 3] = -0.0, torch.nan, -torch.inf, torch.inf, torch.nan
    if channels_last:
        x[2, :, 1::2, 1::2] = -1.0  # in every window
        x = x.contiguous(memory_format=torch.channels_last)
    results = []
    for backend in ("fxopt", "eager"):
        own = x.clone(memory_format=torch.preserve_format).requires_grad_()
        out = torch.compile(lambda x: torch.nn.functional.max_pool2d(x, 3, 2, 1), backend=backend)(own)
        out.backward(torch.arange(out.numel(), device="cuda").view(out.shape).remainder(64).to(dtype))
        results.append((out.detach(), own.grad))
    for got, expected in zip(*results, strict=True):
        torch.testing.assert_close(got, expected, rtol=0, atol=0, equal_nan=True)
