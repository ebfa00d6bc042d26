"""The attention ops that train: eager's gradients, a backward of the backend that computed the forward, and what happens
when a backend refuses. On CPUs the backend is "math"; tests/gpu has the others."""

from __future__ import annotations

import logging
import math
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from fxopt.errors import GradientError
from fxopt.ir import attention_backends
from fxopt.ir.attention_backends import BACKENDS, CUDNN, EFFICIENT, FLASH, MATH, NUMBERS, Inputs, Settings
from fxopt.ir.attention_op import attention, attention_backward, attention_forward

aten = torch.ops.aten


def operands(rows: int = 7, keys: int = 9, groups: int = 4, dtype: torch.dtype = torch.float64) -> tuple[Tensor, ...]:
    shapes = ((2, 4, rows, 8), (2, groups, keys, 8), (2, groups, keys, 6))
    return tuple(torch.randn(shape, dtype=dtype, requires_grad=True) for shape in shapes)


def hiding(rows: int = 7, keys: int = 9) -> Tensor:
    """A boolean mask of which one row is hidden throughout."""
    mask = torch.rand(2, 1, rows, keys) > 0.4
    mask[..., 0], mask[0, 0, 1] = True, False
    return mask


CASES: dict[str, tuple[tuple[Tensor, ...], Tensor | None, dict[str, Any]]] = {
    "plain": (operands(), None, {}),
    "scaled": (operands(), None, {"scale": 0.3}),
    "causal, more keys": (operands(), None, {"is_causal": True}),
    "causal, fewer keys": (operands(9, 5), None, {"is_causal": True}),
    "grouped": (operands(groups=2), None, {"enable_gqa": True}),
    "boolean mask": (operands(), hiding(), {}),
    "additive mask": (operands(), torch.zeros(2, 1, 7, 9).double().masked_fill(~hiding(), -torch.inf), {}),
    "padding mask": (operands(), hiding()[:, :, 3:4], {}),
    "mask of two dimensions": (operands(), torch.randn(7, 9, dtype=torch.float64), {}),
    "expanded keys": ((operands()[0], *(x[:, :1].expand(2, 4, 9, -1) for x in operands()[1:])), None, {}),
    "heads last": (tuple(x.transpose(1, 2).contiguous().transpose(1, 2) for x in operands()), None, {}),
}


@pytest.mark.parametrize("name", CASES)
def test_result_and_gradients_are_eagers(name: str) -> None:
    qkv, mask, options = CASES[name]
    leaves = [x.detach().clone().requires_grad_() for x in qkv]
    got = attention_forward(*leaves, mask, **options)[0]
    want = F.scaled_dot_product_attention(*leaves, attn_mask=mask, **options)
    grad = torch.randn_like(want)
    torch.testing.assert_close(got, want)
    pairs = zip(torch.autograd.grad(got, leaves, grad), torch.autograd.grad(want, leaves, grad), strict=True)
    for own, eagers in pairs:
        torch.testing.assert_close(own, eagers)


def test_statistics_are_sums_of_exponentials_and_infinite_for_hidden_rows() -> None:
    (q, k, v), mask = operands(), hiding()
    found = attention_forward(q, k, v, mask, scale=0.5)[1]
    scores = (q @ k.transpose(-1, -2) * 0.5).masked_fill(~mask, -torch.inf)
    want = scores.exp().sum(-1).log()
    assert found.isposinf().any()
    torch.testing.assert_close(found, want.masked_fill(want == -torch.inf, torch.inf))


def test_half_types_have_statistics_in_float32_and_gradients_of_their_own() -> None:
    q, k, v = operands(dtype=torch.bfloat16)
    out, statistics, _ = attention_forward(q, k, v)
    assert statistics.dtype == torch.float32
    for own in torch.autograd.grad(out.sum(), (q, k, v)):
        assert own.dtype == torch.bfloat16


@pytest.mark.parametrize("options", [{}, {"is_causal": True}, {"scale": 0.3, "enable_gqa": True}])
def test_torch_finds_no_fault_with_the_registrations(options: dict[str, Any]) -> None:
    q, k, v = (torch.randn(2, 3, 7, 8, requires_grad=True) for _ in range(3))
    torch.library.opcheck(attention_forward, (q, k, v), options)
    left = [x.detach() for x in attention_forward(q, k, v, **options)]
    plain = [x.detach() for x in (q, k, v)]
    torch.library.opcheck(attention_backward, (torch.randn_like(left[0]), *plain, None, *left), options)


def test_only_wanted_gradients_are_handed_on() -> None:
    q, k, v = operands()
    out = attention_forward(q, k.detach(), v)[0]
    assert torch.autograd.grad(out.sum(), (q, v))[0].shape == q.shape


def test_there_is_no_second_derivative_and_none_of_the_mask() -> None:
    q, k, v = operands()
    (first,) = torch.autograd.grad(attention_forward(q, k, v)[0].sum(), q, create_graph=True)
    with pytest.raises(GradientError, match="differentiable once"):
        torch.autograd.grad(first.sum(), q)
    learned = torch.randn(7, 9, dtype=torch.float64, requires_grad=True)
    with pytest.raises(GradientError, match="mask"):
        attention_forward(q, k, v, learned)[0].sum().backward()


def test_autocast_casts_what_it_casts_for_eager() -> None:
    q, k, v = operands(dtype=torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        out = attention_forward(q, k, v)[0]
    assert out.dtype == torch.bfloat16
    assert torch.autograd.grad(out.sum(), q)[0].dtype == torch.float32


@pytest.mark.parametrize("width", [64, 36])
@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("backend", BACKENDS)
def test_every_backend_is_called_as_torch_declares_it(backend: str, masked: bool, width: int) -> None:
    """Shapes alone: on meta tensors, for CPUs have none of the kernels. The rows are no multiple of what is padded."""
    if backend == FLASH and masked:
        pytest.skip("takes no masks")
    q, k, v = (torch.empty(2, 4, rows, width, dtype=torch.bfloat16, device="meta") for rows in (97, 33, 33))
    mask = torch.empty(2, 1, 1, 33, dtype=torch.bool, device="meta") if masked else None
    x = Inputs(q, k, v, mask, Settings())
    assert attention_backends.forward_by(backend, x, statistics=False)[0].shape == q.shape
    out, statistics = attention_backends.forward_by(backend, x, statistics=True)
    assert statistics is not None
    assert (out.shape, statistics.shape, statistics.dtype) == (q.shape, (2, 4, 97), torch.float32)
    gradients = attention_backends.backward_by(backend, x, torch.empty_like(out), out, statistics)
    assert [g.shape for g in gradients] == [t.shape for t in (q, k, v)]


class ArgumentsOf(TorchDispatchMode):
    """Keeps what ops whose name contains `name` are called with: tensors, and numbers by themselves."""

    def __init__(self, name: str) -> None:
        super().__init__()
        self.name = name
        self.seen: list[Tensor] = []
        self.floats: list[float] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if self.name in func.name():
            self.seen = [x for x in args if isinstance(x, Tensor)]
            self.floats = [x for x in args if isinstance(x, float)]
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("backend", [EFFICIENT, CUDNN])
@pytest.mark.parametrize("heads_last", [False, True])
def test_a_backward_meets_the_layout_of_its_forward(backend: str, heads_last: bool) -> None:
    """The memory-efficient kernel takes [B, S, H, E] for granted; cuDNN's plans are remembered without these strides."""

    def make(shape: tuple[int, ...], heads_last: bool) -> Tensor:
        x = torch.empty(shape, dtype=torch.bfloat16, device="meta")
        return x.transpose(1, 2).contiguous().transpose(1, 2) if heads_last else x

    q, k, v = (make((2, 4, rows, 64), heads_last) for rows in (96, 32, 32))
    out, grad = make((2, 4, 96, 64), not heads_last), make((2, 4, 96, 64), not heads_last)
    statistics = torch.empty(96, 4, 2, device="meta").permute(2, 1, 0)
    with ArgumentsOf(f"{backend}_attention_backward") as mode:
        attention_backends.backward_by(backend, Inputs(q, k, v, None, Settings()), grad, out, statistics)
    given_out, sums = mode.seen[4:6]
    want = make((2, 4, 96, 64), heads_last or backend == EFFICIENT).stride()
    assert given_out.stride() == want
    assert sums.is_contiguous()
    if backend == CUDNN:
        assert mode.seen[0].stride() == want
        assert [math.copysign(1, p) for p in mode.floats] == [-1]  # no dropout, and no plan that eager has left


@pytest.mark.parametrize("order", [(0, 1, 2, 3), (0, 2, 1, 3), (2, 0, 1, 3), (0, 1, 3, 2)])
def test_dense_strides_are_those_of_empty_like(order: tuple[int, ...]) -> None:
    packed = torch.empty(2, 3, 5, 14)[..., :7].permute(order)
    found = attention_backends.dense_strides(tuple(packed.shape), packed.stride())
    assert found == torch.empty_like(packed).stride()


# ---------------------------------------------------------------------- one backend for forward and backward


def test_a_forward_tells_who_ran() -> None:
    number = attention_forward(*operands(), backend=MATH)[2]
    assert (number.dtype, number.shape, number.device.type) == (torch.int64, (), "cpu")
    assert int(number) == NUMBERS[MATH]


def test_a_backward_obeys_its_forward(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever eager's rule says meanwhile."""
    q, k, v = operands()
    zeros = tuple(torch.zeros_like(x) for x in (q, k, v))
    monkeypatch.setitem(attention_backends._BACKWARD, CUDNN, lambda *_: zeros)
    out, statistics, _ = (x.detach() for x in attention_forward(q, k, v))
    plain = [x.detach() for x in (q, k, v)]
    found = attention_backward(torch.ones_like(out), *plain, None, out, statistics, torch.tensor(NUMBERS[CUDNN]))
    assert not any(x.any() for x in found)
    with pytest.raises(KeyError):
        attention_backward(torch.ones_like(out), *plain, None, out, statistics, torch.tensor(99))


# ---------------------------------------------------------------------- refusals


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """What flash was asked for, which it refuses here: there is no such kernel for CPUs."""
    seen: list[str] = []

    def refuse(name: str) -> Any:
        def run(*_: Any) -> Any:
            seen.append(name)
            raise RuntimeError("no kernel for this\nand more")

        return run

    monkeypatch.setitem(attention_backends._FORWARD, FLASH, refuse("forward"))
    monkeypatch.setitem(attention_backends._BACKWARD, FLASH, refuse("backward"))
    monkeypatch.setattr(attention_backends, "_refusals", set())
    return seen


def test_a_backend_that_refuses_gives_way_to_eagers_rule_for_good(
    asked: list[str], caplog: pytest.LogCaptureFixture
) -> None:
    q, k, v = operands()
    want = F.scaled_dot_product_attention(q, k, v)
    with caplog.at_level(logging.WARNING, "fxopt"), torch.no_grad():
        for _ in range(2):
            torch.testing.assert_close(attention(q, k, v, backend=FLASH), want)
    assert asked == ["forward"]
    assert [r.message for r in caplog.records] == [
        "attention of (2, 4, 7, 8) over (2, 4, 9, 8): eager's rule chooses, because flash refuses it: no kernel for this"
    ]
    attention(*operands(5, 5), backend=FLASH)
    assert asked == ["forward", "forward"]  # another problem


def test_a_forward_that_refuses_is_trained_by_another(asked: list[str]) -> None:
    q, k, v = operands()
    out, _, number = attention_forward(q, k, v, backend=FLASH)
    assert asked == ["forward"]
    assert int(number) == NUMBERS[MATH]
    want = F.scaled_dot_product_attention(q, k, v)
    torch.testing.assert_close(torch.autograd.grad(out.sum(), (q, k, v)), torch.autograd.grad(want.sum(), (q, k, v)))
    assert asked == ["forward"]


def test_a_backward_that_refuses_begins_again(asked: list[str]) -> None:
    """What the other backend has left is not looked at, and it is not asked again, nor for the forward."""
    q, k, v = operands()
    want_out = F.scaled_dot_product_attention(q, k, v)
    grad = torch.randn_like(want_out)
    want = torch.autograd.grad(want_out, (q, k, v), grad)
    plain = [x.detach() for x in (q, k, v)]
    left = (torch.full_like(grad, torch.nan), torch.full(grad.shape[:3], torch.nan), torch.tensor(NUMBERS[FLASH]))
    for _ in range(2):
        torch.testing.assert_close(attention_backward(grad, *plain, None, *left), want)
    assert int(attention_forward(q, k, v, backend=FLASH)[2]) == NUMBERS[MATH]
    assert asked == ["backward"]


def test_running_out_of_memory_is_no_refusal(monkeypatch: pytest.MonkeyPatch) -> None:
    def run(*_: Any) -> Any:
        raise torch.OutOfMemoryError("full")

    monkeypatch.setitem(attention_backends._FORWARD, FLASH, run)
    monkeypatch.setattr(attention_backends, "_refusals", set())
    with pytest.raises(torch.OutOfMemoryError):
        attention(*operands(), backend=FLASH)
    assert not attention_backends._refusals


def test_a_backend_that_the_user_switches_off_later_is_not_asked(asked: list[str]) -> None:
    with torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH):
        assert attention_backends.enabled_backends() == [MATH]
        attention(*operands(), backend=FLASH)
    assert asked == []
    assert set(attention_backends.enabled_backends()) == set(attention_backends.BACKENDS)


@pytest.mark.parametrize("mask", [torch.randn(7, 9), torch.randn(2, 1, 1, 9), torch.rand(2, 4, 7, 16) > 0.5])
def test_masks_are_aligned_and_expanded_for_the_memory_efficient_kernels(mask: Tensor) -> None:
    q, k, v = operands(keys=mask.shape[-1], dtype=torch.float32)
    bias = attention_backends._aligned_bias(Inputs(q, k, v, mask, Settings()))
    assert bias is not None
    assert bias.shape == (2, 4, 7, mask.shape[-1])
    assert bias.stride(-1) == 1
    assert all(stride % 8 == 0 for stride in bias.stride()[:-1])
    torch.testing.assert_close(bias, attention_backends.additive(mask, torch.float32).expand_as(bias))
