"""`torch.compile(fn, backend="fxopt")` on functions that real models are made of: values and gradients, on every device."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F

from tests.numerics import assert_closer, to_float64

DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]
Fn = Callable[..., Any]


def layer_norm(x: torch.Tensor, w: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    return F.layer_norm(x + 1, (x.shape[-1],), w, b)


def rms_norm(x: torch.Tensor, w: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    return x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-6) * w + b


def attention(x: torch.Tensor, w: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    scores = (x @ x.transpose(-1, -2)) / x.shape[-1] ** 0.5
    return torch.softmax(scores.masked_fill(torch.ones_like(scores).triu(1).bool(), float("-inf")), -1) @ (x * w + b)


def gelu_mlp(x: torch.Tensor, w: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    return F.gelu(x * w + b) * F.silu(x) + F.gelu(x, approximate="tanh")


def column_sums(x: torch.Tensor, w: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    return (x * w).sum(0) + x.mean(1).sum() + b.mean()


def transposed(x: torch.Tensor, w: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    return (x.transpose(0, 1) * 2).contiguous() + x.sum(1) + w.exp()


def cat_and_slice(x: torch.Tensor, w: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    y = torch.cat([x[:, 1:], x[:, :1] * 2, w.expand(x.shape[0], 1, -1)], 1)
    return F.pad(y, (1, 2))[..., ::2] + torch.stack([b, b * 2]).sum()


def gather_and_scatter(x: torch.Tensor, w: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    index = torch.arange(x.shape[1], device=x.device).flip(0)
    picked = x[:, index] * w
    return torch.zeros_like(x).index_add(1, index, picked) + x.gather(1, index.view(1, -1, 1).expand_as(x)) * b


def log_softmax_loss(x: torch.Tensor, w: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    target = torch.arange(x.shape[0] * x.shape[1], device=x.device) % x.shape[-1]
    return F.cross_entropy((x * w + b).flatten(0, 1), target, label_smoothing=0.1)


def variance(x: torch.Tensor, w: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    return x.var(-1, unbiased=True, keepdim=True) + x.std((0, 1)) * w + b + torch.linalg.vector_norm(x, dim=1, keepdim=True)


def extremes(x: torch.Tensor, w: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    return x.amax(-1, keepdim=True) - x.amin(0) + x.max(1, keepdim=True).values * w + b + x.logsumexp(-1, keepdim=True)


def cumulative(x: torch.Tensor, w: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    return x.cumsum(1) * w + b


def matmuls(x: torch.Tensor, w: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    return F.linear(F.relu(F.linear(x, torch.outer(w, b), b)), torch.outer(b, w)) + x


FUNCTIONS: list[Fn] = [
    layer_norm, rms_norm, attention, gelu_mlp, column_sums, transposed, cat_and_slice, gather_and_scatter, log_softmax_loss,
    variance, extremes, cumulative, matmuls,
]  # fmt: skip


def inputs(device: str, dtype: torch.dtype, width: int = 40) -> list[torch.Tensor]:
    shapes = [(3, 17, width), (width,), (width,)]
    return [torch.randn(s, device=device).to(dtype).requires_grad_() for s in shapes]


def run(fn: Fn, args: list[torch.Tensor]) -> tuple[Any, ...]:
    """The result and the gradient of a weighted sum of it for each argument."""
    out = fn(*args)
    weight = torch.linspace(0.5, 1.5, out.numel(), dtype=out.dtype, device=out.device).view(out.shape)
    return out.detach(), *torch.autograd.grad((out * weight).sum(), args, allow_unused=True, materialize_grads=True)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("fn", FUNCTIONS, ids=lambda f: f.__name__)
def test_values_and_gradients(fn: Fn, dtype: torch.dtype, device: str) -> None:
    torch.compiler.reset()
    args = inputs(device, dtype)
    compiled = torch.compile(fn, backend="fxopt")
    assert_closer(run(compiled, args), run(fn, args), run(fn, to_float64(args)), k=16.0)


@pytest.mark.parametrize("device", DEVICES)
def test_dynamic_shapes_compile_once(device: str) -> None:
    torch.compiler.reset()
    compiled = torch.compile(layer_norm, backend="fxopt", dynamic=True)
    for rows, width in ((3, 16), (5, 24), (9, 33), (2, 7)):
        shapes = [(2, rows, width), (width,), (width,)]
        args = [torch.randn(shape, device=device) for shape in shapes]
        assert_closer(compiled(*args), layer_norm(*args), layer_norm(*to_float64(args)), k=16.0)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_what_is_compared_is_rounded(dtype: torch.dtype, device: str) -> None:
    """As a gradient of a maximum asks: each row has a largest element, whatever is computed in registers."""

    def fn(x: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
        y = x * 0.37 + b
        return y == y.amax(1, keepdim=True)

    x, b = (torch.randn(shape, device=device).to(dtype) for shape in ((64, 96), (96,)))
    assert torch.compile(fn, backend="fxopt")(x, b).any(1).all()


@pytest.mark.parametrize("device", DEVICES)
def test_dropout_is_reproducible_fresh_and_unbiased(device: str) -> None:
    torch.compiler.reset()
    compiled = torch.compile(lambda x: F.dropout(x, 0.25, training=True), backend="fxopt")
    x = torch.ones(400, 500, device=device)
    torch.manual_seed(5)
    first, second = compiled(x), compiled(x)
    torch.manual_seed(5)
    assert torch.equal(first, compiled(x))
    assert not torch.equal(first, second)
    kept = (first != 0).float().mean().item()
    assert abs(kept - 0.75) < 0.01
    assert torch.allclose(first[first != 0], torch.tensor(1 / 0.75, device=device))


@pytest.mark.parametrize("device", DEVICES)
def test_dropout_gradient_uses_the_same_mask(device: str) -> None:
    torch.compiler.reset()
    x = torch.randn(64, 64, device=device, requires_grad=True)
    out = torch.compile(lambda x: F.dropout(x * 2, 0.5, training=True), backend="fxopt")(x)
    (grad,) = torch.autograd.grad(out.sum(), x)
    assert torch.equal(grad != 0, out != 0)


class Block(torch.nn.Module):
    """Convolution, batch norm with its running statistics, pooling and a classifier."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = torch.nn.Conv2d(3, 8, 3, padding=1)
        self.norm = torch.nn.BatchNorm2d(8)
        self.head = torch.nn.Linear(8, 5)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = F.max_pool2d(F.relu(self.norm(self.conv(x))), 2)
        return self.head(y.mean((2, 3)))


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("training", [True, False])
def test_convolution_block_and_its_statistics(device: str, training: bool) -> None:
    torch.compiler.reset()
    module = Block().to(device).train(training)
    x = torch.randn(4, 3, 12, 12, device=device)
    mine, eager, exact = copy.deepcopy(module), copy.deepcopy(module), to_float64(module)

    def step(model: Fn, owner: torch.nn.Module, x: torch.Tensor) -> Any:
        model(x).square().mean().backward()
        # One tensor: the convolution's bias, before a batch norm, has a gradient of zero, with noise as large as the rest's.
        gradients = torch.cat([p.grad.flatten() for p in owner.parameters() if p.grad is not None])
        return [gradients, *(p.grad is None for p in owner.parameters())], [b.clone() for b in owner.buffers()]

    with torch.backends.cudnn.flags(allow_tf32=False):
        got = step(torch.compile(mine, backend="fxopt"), mine, x)
        assert_closer(got, step(eager, eager, x), step(exact, exact, x.double()), k=32.0)


@pytest.mark.parametrize("device", DEVICES)
def test_inputs_are_mutated_as_eager_does(device: str) -> None:
    torch.compiler.reset()

    def fn(x: torch.Tensor, cache: torch.Tensor) -> torch.Tensor:
        cache[2:4] = x[:2] * 3
        x.add_(1)
        return x.sum(0) + cache.flip(0).sum(0)

    mine = [torch.randn(6, 5, device=device), torch.zeros(6, 5, device=device)]
    eager = [t.clone() for t in mine]
    with torch.no_grad():
        out, want = torch.compile(fn, backend="fxopt")(*mine), fn(*eager)
    torch.testing.assert_close([out, *mine], [want, *eager])


@pytest.mark.parametrize("device", DEVICES)
def test_index_out_of_bounds_is_an_error_on_cpu(device: str) -> None:
    if device == "cuda":
        pytest.skip("a device-side assertion ends the CUDA context; tests/gpu checks it in a process of its own")
    torch.compiler.reset()
    compiled = torch.compile(lambda x, i: x[i] * 2, backend="fxopt")
    with pytest.raises(IndexError):
        compiled(torch.randn(4), torch.tensor([0, 7]))


@pytest.mark.parametrize("device", DEVICES)
def test_frozen_module_notices_new_weights(device: str) -> None:
    torch.compiler.reset()
    module = torch.nn.Sequential(torch.nn.Linear(16, 32), torch.nn.GELU(), torch.nn.Linear(32, 4)).to(device).eval()
    compiled = torch.compile(module, backend="fxopt", options={"freeze": True})
    x = torch.randn(8, 16, device=device)
    with torch.no_grad():
        torch.testing.assert_close(compiled(x), module(x), rtol=1e-4, atol=1e-5)
        module[0].weight.mul_(2)
        torch.testing.assert_close(compiled(x), module(x), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("device", DEVICES)
def test_weights_that_moved_are_seen(device: str) -> None:
    """Views of parameters are remembered between calls; the memory under them may be updated, moved or replaced."""
    torch.compiler.reset()
    module = torch.nn.Sequential(torch.nn.Linear(16, 32), torch.nn.GELU(), torch.nn.Linear(32, 4)).to(device).eval()
    compiled = torch.compile(module, backend="fxopt")
    x = torch.randn(8, 16, device=device)
    weight = module[0].weight
    with torch.no_grad():
        for change in ("none", "in place", "replaced", "none"):
            if change == "in place":
                weight.mul_(2)
            elif change == "replaced":
                weight.data = torch.randn_like(weight)
            torch.testing.assert_close(compiled(x), module(x), rtol=1e-4, atol=1e-5)


def test_results_of_data_dependent_size_in_a_backward() -> None:
    """The gradient of the filling value sums over the distinct indices, whose number FakeTensor may not know."""
    grad = torch.arange(25.0).view(5, 5)
    indices = torch.tensor([2, 1, 4, 2, 2])
    found = []

    def fill(x: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        return x.index_fill(-1, indices, v)

    for run in (fill, torch.compile(fill, backend="fxopt")):
        x, v = torch.randn(5, 5, requires_grad=True), torch.tensor(-1.7, requires_grad=True)
        found.append(torch.autograd.grad(run(x, v), [x, v], grad))
    assert torch.equal(found[0][0], found[1][0])
    assert torch.equal(found[0][1], found[1][1])
