"""Convolutions that a call of cuDNN's computes together with what follows: which, with which operands, and their values."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from fxopt.capture.decompositions import decompositions
from fxopt.ir.region import Alternatives, Call
from fxopt.lower import Lowered
from fxopt.lower import convolutions as module
from fxopt.lower.contractions import DIRECT, FUSED, IMPLICIT, LIBRARY, STENCIL, with_contractions
from fxopt.lower.convolutions import ADD_RELU, CUDNN, FOLDED, RELU
from fxopt.lower.schedule import schedule
from tests.lower.capturing import moved
from tests.lower.contracting import kept
from tests.lower.harness import lower
from tests.lower.interpreter import run_lowered
from tests.numerics import assert_closer, to_float64

BF16, FP16 = torch.bfloat16, torch.float16
Function = Callable[..., Any]


def image(*shape: int, dtype: torch.dtype = BF16) -> Tensor:
    return torch.randn(*shape).to(dtype).contiguous(memory_format=torch.channels_last)


def weight(out: int, inside: int, window: int = 3, dtype: torch.dtype = BF16) -> Tensor:
    return (torch.randn(out, inside, window, window) / (inside * window**2) ** 0.5).to(dtype)


def column(x: Tensor) -> Tensor:
    return x[:, None, None]


def searched(fn: Function, args: tuple[Tensor, ...], frozen: tuple[int, ...] = ()) -> Lowered:
    """`fn` scheduled for CUDA, with ways; arguments number `frozen` are constants."""
    low = lower(fn, args, decompose=decompositions())
    constants = {low.inputs[k]: args[k] for k in frozen}
    inputs = tuple(n for n in low.inputs if n not in constants)
    return with_contractions(schedule(moved(replace(low, inputs=inputs, constants=constants), "cuda")))


def ways(low: Lowered) -> list[list[str]]:
    """Where there are ways beside the first, without those in which a kernel gathers the patches."""
    gathering = (STENCIL, DIRECT, IMPLICIT)
    found = [s for s in low.steps if isinstance(s, Alternatives)]
    labels = [[w.label for w in s.ways if w.label not in gathering] for s in found]
    return [each for each in labels if each != [LIBRARY]]


def fused_call(low: Lowered, label: str) -> Call:
    (call,) = (s for s in kept(low, label).steps if isinstance(s, Call))
    return call


@pytest.fixture
def cudnn_on_cpu() -> Iterator[None]:
    """cuDNN's calls as they are documented, on the CPU: summed wider than the operands, rounded once."""

    def add_relu(x: Tensor, w: Tensor, z: Tensor | None, alpha: float, bias: Tensor | None, *geometry: Any) -> Tensor:
        assert bias is None or bias.dtype == x.dtype
        wide = F.conv2d(x.double(), w.double(), None if bias is None else bias.double(), *geometry)
        y = wide if z is None else wide + alpha * z.double()
        return y.relu().to(x.dtype).contiguous(memory_format=torch.channels_last)

    library = torch.library.Library("aten", "IMPL")
    library.impl("cudnn_convolution_relu", lambda x, w, bias, *rest: add_relu(x, w, None, 1, bias, *rest), "CPU")
    library.impl("cudnn_convolution_add_relu", add_relu, "CPU")
    yield
    library._destroy()


def check(fn: Function, args: tuple[Tensor, ...], low: Lowered, label: str) -> None:
    """Assert that the way `label` is as close to float64 as eager, and gives the result in eager's layout."""
    alone = moved(kept(low, label), "cpu")
    given = {n: a for n, a in zip(lower(fn, args, decompose=decompositions()).inputs, args, strict=True) if n in low.inputs}
    (got,), want = run_lowered(alone, given), fn(*args)
    assert_closer(got, want, fn(*to_float64(args)), k=0)
    assert got.stride() == want.stride()


def bias_relu(x: Tensor, w: Tensor, b: Tensor) -> Tensor:
    return F.relu(F.conv2d(x, w, None, padding=1) + column(b))


def wide_bias_relu(x: Tensor, w: Tensor, b: Tensor) -> Tensor:
    return F.relu(F.conv2d(x, w, None, padding=1) + column(b.to(BF16)))


def residual_relu(x: Tensor, w: Tensor, b: Tensor, r: Tensor) -> Tensor:
    return F.relu(r + (F.conv2d(x, w, None, 2, 1) + column(b)))


GIVEN: dict[str, tuple[Function, tuple[Tensor, ...], str]] = {
    "relu": (lambda x, w: F.conv2d(x, w).relu(), (image(2, 16, 7, 5), weight(24, 16)), RELU),
    "the convolution's own bias": (
        lambda x, w, b: F.conv2d(x, w, b, 1, 1, 2).relu(),
        (image(2, 16, 9, 7), weight(24, 16), torch.randn(24).to(BF16)),
        RELU,
    ),
    "bias": (bias_relu, (image(2, 16, 7, 5), weight(24, 16), torch.randn(24).to(BF16)), RELU),
    "half": (
        bias_relu, (image(2, 16, 7, 5, dtype=FP16), weight(24, 16, dtype=FP16), torch.randn(24).to(FP16)), RELU,
    ),
    "clamped at zero": (
        lambda x, w, b: (column(b) + F.conv2d(x, w)).clamp(min=0),
        (image(2, 16, 7, 5), weight(24, 16), torch.randn(24).to(BF16)),
        RELU,
    ),
    "bias and residual": (
        residual_relu, (image(2, 16, 8, 6), weight(24, 16), torch.randn(24).to(BF16), image(2, 24, 4, 3)), ADD_RELU,
    ),
    "residual": (
        lambda x, w, r: torch.relu_(F.conv2d(x, w) + r), (image(2, 16, 7, 5), weight(24, 16), image(2, 24, 5, 3)), ADD_RELU,
    ),
    "groups": (
        lambda x, w: F.conv2d(x, w, groups=2).relu(), (image(2, 32, 7, 5), weight(24, 16)), RELU,
    ),
    "a part of the images": (
        lambda x, w: F.conv2d(x[1:3], w).relu(), (image(4, 16, 7, 5), weight(24, 16)), RELU,
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", GIVEN)
@pytest.mark.usefixtures("cudnn_on_cpu")
def test_one_call(name: str) -> None:
    fn, args, op = GIVEN[name]
    low = searched(fn, args)
    assert ways(low) == [[LIBRARY, CUDNN]]
    assert fused_call(low, CUDNN).op == op
    check(fn, args, low, CUDNN)


@pytest.mark.usefixtures("cudnn_on_cpu")
def test_a_window_of_one_element_is_a_product_as_well() -> None:
    fn, args = lambda x, w, b: F.conv2d(x, w, b).relu(), (image(3, 32, 7, 5), weight(48, 32, 1), torch.randn(48).to(BF16))
    low = searched(fn, args)
    assert ways(low) == [[LIBRARY, FUSED, CUDNN]]
    check(fn, args, low, CUDNN)


def tf32() -> tuple[Function, tuple[Tensor, ...]]:
    x, w, b = image(2, 16, 7, 5, dtype=torch.float32), weight(24, 16, dtype=torch.float32), torch.randn(24)
    return bias_relu, (x, w, b)


def test_float32_where_tf32_is_allowed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "convolutions_use_tf32", lambda: True)
    assert ways(searched(*tf32())) == [[LIBRARY, CUDNN]]
    monkeypatch.setattr(module, "convolutions_use_tf32", lambda: False)
    assert ways(searched(*tf32())) == []


def test_no_algorithm_that_the_user_forbids(monkeypatch: pytest.MonkeyPatch) -> None:
    fn, args, _ = GIVEN["bias"]
    for switches in ({"enabled": True, "deterministic": True}, {"enabled": False}):
        with torch.backends.cudnn.flags(**switches):
            assert ways(searched(fn, args)) == []
    with torch.backends.cudnn.flags(enabled=True):
        assert ways(searched(fn, args)) == [[LIBRARY, CUDNN]]
    monkeypatch.setattr(torch, "are_deterministic_algorithms_enabled", lambda: True)
    assert ways(searched(fn, args)) == []


X, W, B, R = image(2, 16, 7, 5), weight(24, 16), torch.randn(24).to(BF16), image(2, 24, 7, 5)


def conv(x: Tensor, w: Tensor) -> Tensor:
    return F.conv2d(x, w, padding=1)


def overwritten(x: Tensor, w: Tensor, r: Tensor) -> Tensor:
    return r.copy_(conv(x, w).relu())


def both(x: Tensor, w: Tensor) -> tuple[Tensor, Tensor]:
    y = conv(x, w)
    return y.relu(), y


def twice(x: Tensor, w: Tensor) -> tuple[Tensor, Tensor]:
    y = conv(x, w)
    return y.relu(), F.avg_pool2d(y, 3)


LEFT: dict[str, tuple[Function, tuple[Tensor, ...]]] = {
    "another activation": (lambda x, w: F.gelu(conv(x, w)), (X, W)),
    "relu with an upper end": (lambda x, w: F.relu6(conv(x, w)), (X, W)),
    "relu from one": (lambda x, w: conv(x, w).clamp(min=1), (X, W)),
    "no activation": (lambda x, w, r: conv(x, w) + r, (X, W, R)),
    "something after it": (lambda x, w: conv(x, w).relu() * 2, (X, W)),
    "a wide bias": (wide_bias_relu, (X, W, B.float())),
    "a wide result": (bias_relu, (X, W, B.float())),
    "a bias for each place": (lambda x, w, b: (conv(x, w) + b).relu(), (X, W, torch.randn(5).to(BF16))),
    "every second bias": (lambda x, w, b: (conv(x, w) + column(b[::2])).relu(), (X, W, torch.randn(48).to(BF16))),
    "two biases": (lambda x, w, b, c: (conv(x, w) + column(b) + column(c)).relu(), (X, W, B, B + 1)),
    "a factor": (lambda x, w, b: (conv(x, w) * column(b)).relu(), (X, W, B)),
    "a scaled residual": (lambda x, w, r: (conv(x, w) + 0.5 * r).relu(), (X, W, R)),
    "two residuals": (lambda x, w, r, s: (conv(x, w) + r + s).relu(), (X, W, R, R + 1)),
    "itself as residual": (lambda x, w: ((y := conv(x, w)) + y).relu(), (X, W)),
    "a residual of another layout": (lambda x, w, r: (conv(x, w) + r).relu(), (X, W, R.contiguous())),
    "a residual for all images": (lambda x, w, r: (conv(x, w) + r).relu(), (X, W, image(1, 24, 7, 5))),
    "a wide residual": (lambda x, w, r: (conv(x, w) + r.to(BF16)).relu(), (X, W, R.float())),
    "the residual's negative": (lambda x, w, r: (conv(x, w) - r).relu(), (X, W, R)),
    "a result of another layout": (lambda x, w: conv(x, w).relu().contiguous(), (X, W)),
    "row-major images": (lambda x, w: conv(x, w).relu(), (X.contiguous(), W)),
    "images with gaps": (lambda x, w: F.conv2d(x[:, :16], w).relu(), (image(2, 32, 7, 5), W)),
    "several readers": (twice, (X, W)),
    "an output": (both, (X, W)),
    "a result in an input": (overwritten, (X, W, image(2, 24, 7, 5))),
    "transposed": (lambda x, w: F.conv_transpose2d(x, w).relu(), (X, weight(16, 24))),
    "depthwise": (lambda x, w: F.conv2d(x, w, groups=16).relu(), (X, weight(16, 1))),
    "few channels in a group": (lambda x, w: F.conv2d(x, w, groups=2).relu(), (X, weight(24, 8))),
    "three dimensions": (lambda x, w: F.conv3d(x, w).relu(), (X[:, :, None], W[:, :, None])),
    "float64": (lambda x, w: conv(x, w).relu(), (X.double(), W.double())),
}


@pytest.mark.parametrize("name", LEFT)
def test_left_to_the_library(name: str) -> None:
    fn, args = LEFT[name]
    low = searched(fn, args)
    assert any(isinstance(s, Call) and s.op == "aten::convolution.default" for s in kept(low, LIBRARY).steps)
    assert ways(low) == []


# ---------------------------------------------------------------------- factors that go into the weight


def normalized(x: Tensor, w: Tensor, mean: Tensor, var: Tensor, gamma: Tensor, beta: Tensor, *residual: Tensor) -> Tensor:
    y = F.batch_norm(F.conv2d(x, w, padding=w.shape[-1] // 2), mean, var, gamma, beta, eps=1e-3)
    return F.relu(y + residual[0] if residual else y)


def statistics(channels: int, dtype: torch.dtype) -> tuple[Tensor, ...]:
    """Mean, variance, gamma and beta."""
    drawn = (torch.randn(channels) / 2, torch.rand(channels) + 0.3, torch.rand(channels) + 0.5, torch.randn(channels))
    return tuple(x.to(dtype) for x in drawn)


FROZEN: dict[str, tuple[Function, tuple[Tensor, ...], str]] = {
    "batch norm": (normalized, (X, W, *statistics(24, torch.float32)), RELU),
    "batch norm in half precision": (normalized, (X, W, *statistics(24, BF16)), RELU),
    "batch norm and residual": (normalized, (X, W, *statistics(24, torch.float32), R), ADD_RELU),
    "float16": (
        normalized, (X.half(), W.half(), *(s.half() for s in statistics(24, torch.float32)), R.half()), ADD_RELU,
    ),
    "a wide bias": (wide_bias_relu, (X, W, torch.randn(24)), RELU),
    "a divisor and a number": (lambda x, w, b: (conv(x, w) / column(b) + 1).relu(), (X, W, B.abs() + 0.5), RELU),
}  # fmt: skip


def norm(x: Tensor, mean: Tensor, var: Tensor, gamma: Tensor, beta: Tensor) -> Tensor:
    return F.batch_norm(x, mean, var, gamma, beta)


def bottleneck(x: Tensor, w: Tensor, a: Tensor, v: Tensor, *statistics: Tensor) -> Tensor:
    """Of `a`, with a shortcut from `x` that has a convolution and a norm of its own."""
    y = norm(F.conv2d(a, w, padding=w.shape[-1] // 2), *statistics[:4])
    return F.relu(y + norm(F.conv2d(x, v, stride=2), *statistics[4:]))


def shortcut(window: int) -> tuple[Tensor, ...]:
    both = (*statistics(24, torch.float32), *statistics(24, torch.float32))
    return (image(2, 32, 8, 6), weight(24, 16, window), image(2, 16, 4, 3), weight(24, 32, 1), *both)


@pytest.mark.parametrize(("window", "expected"), [(3, [LIBRARY, FOLDED]), (1, [LIBRARY, FUSED, FOLDED])])
@pytest.mark.usefixtures("cudnn_on_cpu")
def test_a_shortcut_with_a_norm_of_its_own(window: int, expected: list[str]) -> None:
    args = shortcut(window)
    low = searched(bottleneck, args, (1, *range(3, 12)))
    assert ways(low) == [expected]
    assert [s.op for s in kept(low, FOLDED).steps if isinstance(s, Call)] == ["aten::convolution.default", ADD_RELU]
    for label in (LIBRARY, FOLDED):
        check(bottleneck, args, low, label)


@pytest.mark.parametrize("known", [(1, *range(4, 12)), tuple(range(3, 12)), (1, 3, *range(4, 8))])
def test_only_constants_are_folded_into_a_shortcut(known: tuple[int, ...]) -> None:
    assert ways(searched(bottleneck, shortcut(3), known)) == []


def test_a_shortcut_that_is_read_elsewhere_is_not_scaled() -> None:
    def more(*args: Tensor) -> tuple[Tensor, Tensor]:
        return bottleneck(*args), F.conv2d(args[0], args[3], stride=2)

    def shared(x: Tensor, w: Tensor, a: Tensor, v: Tensor, *statistics: Tensor) -> tuple[Tensor, Tensor]:
        y, z = norm(F.conv2d(a, w, padding=1), *statistics[:4]), F.conv2d(x, v, stride=2)
        return F.relu(y + norm(z, *statistics[4:])), z

    args, frozen = shortcut(3), (1, *range(3, 12))
    assert ways(searched(more, args, frozen)) == [[LIBRARY, FOLDED]]
    assert ways(searched(shared, args, frozen)) == []


def constants_of(args: tuple[Tensor, ...]) -> tuple[int, ...]:
    return tuple(k for k, a in enumerate(args) if k == 1 or a.dim() == 1)


@pytest.mark.parametrize("name", FROZEN)
@pytest.mark.usefixtures("cudnn_on_cpu")
def test_folded(name: str) -> None:
    fn, args, op = FROZEN[name]
    low = searched(fn, args, constants_of(args))
    assert ways(low) == [[LIBRARY, FOLDED]]
    call = fused_call(low, FOLDED)
    assert call.op == op
    check(fn, args, low, FOLDED)
    check(fn, args, low, LIBRARY)


def test_a_weight_that_is_not_scaled_stays_the_same() -> None:
    fn, args, _ = FROZEN["a wide bias"]
    low = searched(fn, args, constants_of(args))
    call = fused_call(low, FOLDED)
    name = call.args[1].name
    assert low.constants[name] is args[1]
    assert torch.equal(low.constants[call.args[2].name], args[2].to(BF16))


@pytest.mark.usefixtures("cudnn_on_cpu")
def test_a_product_can_be_folded_too() -> None:
    args = (X, weight(24, 16, 1), *statistics(24, torch.float32), R)
    low = searched(normalized, args, constants_of(args))
    assert ways(low) == [[LIBRARY, FUSED, FOLDED]]
    check(normalized, args, low, FOLDED)


@pytest.mark.parametrize("known", [(), (1,), (2, 3, 4, 5), (1, 3, 4, 5)])
def test_only_constants_are_folded(known: tuple[int, ...]) -> None:
    args = (X, W, *statistics(24, torch.float32))
    assert ways(searched(normalized, args, known)) == []


@pytest.mark.parametrize("factor", [1e7, 1e-6, float("inf")])
def test_a_scaled_weight_must_fit_its_dtype(factor: float) -> None:
    mean, var, gamma, beta = statistics(24, torch.float32)
    gamma[5] *= factor
    args = (X.half(), W.half(), mean, var, gamma, beta)
    assert ways(searched(normalized, args, constants_of(args))) == []
