"""Softmax and its relatives in pieces: eager's accuracy and special values, and what is saved for the backward."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F

from fxopt.capture.softmax import SOFTMAX
from tests.capture.recording import Recorder
from tests.numerics import assert_closer, to_float64

aten = torch.ops.aten
INF, NAN = math.inf, math.nan
X = torch.randn(3, 4, 50) * 5
DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16]
SPECIAL = torch.tensor([[-INF, -INF, -INF], [INF, 0.0, 1.0], [NAN, 0.0, 1.0], [-INF, 0.0, 1.0], [1e4, -1e4, 9999.0]])


def check(op: Any, *args: Any) -> None:
    """The decomposition of `op` is as close to float64 as `op` itself, with its dtype, shape and strides.

    For float64 itself the reference is eager's own result, whose rounding differs between processors: what cancels in a
    gradient is of the size of the operands then, not of the result.
    """
    got, want = SOFTMAX[op](*args), op(*args)
    exact_args = [torch.float64 if isinstance(a, torch.dtype) else a for a in to_float64(list(args))]
    assert_closer(got, want, op(*exact_args), k=16.0 if want.dtype == torch.float64 else 4.0)
    assert got.stride() == want.stride()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("dim", [0, -1])
def test_forward_and_gradients(dtype: torch.dtype, dim: int) -> None:
    x, grad = X.to(dtype), X.cos().to(dtype)
    check(aten._softmax.default, x, dim, False)
    check(aten._log_softmax.default, x, dim, False)
    check(aten._softmax_backward_data.default, grad, x.softmax(dim), dim, dtype)
    check(aten._log_softmax_backward_data.default, grad, x.log_softmax(dim), dim, dtype)
    check(aten.logsumexp.default, x, [dim])
    check(aten.logsumexp.default, x, [0, 1, 2], True)


@pytest.mark.parametrize("x", [SPECIAL, X.permute(2, 0, 1), torch.randn(2, 0, 3), torch.randn(0, 2), torch.tensor([[2.5]])])
def test_special_rows_layouts_and_emptiness(x: torch.Tensor) -> None:
    for op in (aten._softmax.default, aten._log_softmax.default):
        check(op, x, 1, False)
    check(aten.logsumexp.default, x, [-1])


@pytest.mark.parametrize("fn", [torch.softmax, torch.log_softmax, torch.logsumexp])
def test_a_computed_size_may_be_zero(fn: Callable[..., torch.Tensor]) -> None:
    def half(x: torch.Tensor) -> torch.Tensor:
        return fn(x[:, : x.shape[1] // 5], -1)

    record = Recorder()
    compiled = record.compile(half, dynamic=True)
    for length in (3, 11, 12):
        x = torch.randn(2, length)
        torch.testing.assert_close(compiled(x), half(x))
    assert len(record.graphs) == 2, "no size but zero is special"


@pytest.mark.parametrize("fn", [torch.softmax, torch.log_softmax])
def test_a_size_that_depends_on_data_may_be_zero(fn: Callable[..., torch.Tensor]) -> None:
    def of_positive(x: torch.Tensor) -> torch.Tensor:
        return fn(x[x > 0], 0)

    torch.compiler.reset()
    with torch._dynamo.config.patch(capture_dynamic_output_shape_ops=True):
        compiled = torch.compile(of_positive, backend="fxopt", fullgraph=True)
        for x in (torch.randn(6), -torch.rand(6)):
            torch.testing.assert_close(compiled(x), of_positive(x))


def test_a_scalar_and_integers() -> None:
    check(aten._softmax.default, torch.tensor(3.0), 0, False)
    check(aten.logsumexp.default, torch.tensor(3.0), [0])
    check(aten.logsumexp.default, torch.tensor([[1, 2], [3, 400]]), [1])


def test_complex_numbers_are_left_to_torch() -> None:
    assert SOFTMAX[aten.logsumexp.default](torch.randn(3, dtype=torch.complex64), [0]) is NotImplemented


LOSSES = [
    (shape, reduction, weighted, dtype)
    for (shape, reduction, weighted), dtype in itertools.product(
        itertools.product([(6, 9), (9,), (2, 9, 3, 4)], ["mean", "sum", "none"], [False, True]),
        [torch.float32, torch.bfloat16],
    )
]


@pytest.mark.parametrize(("shape", "reduction", "weighted", "dtype"), LOSSES)
def test_gradient_of_the_loss(shape: tuple[int, ...], reduction: str, weighted: bool, dtype: torch.dtype) -> None:
    """Against autograd through eager's loss, with a target that is ignored."""
    torch._dynamo.reset()
    classes = shape[0] if len(shape) == 1 else shape[1]
    target = torch.arange(math.prod(shape) // classes).remainder(classes).reshape(shape[:1] + shape[2:] if shape[1:] else ())
    weight = torch.rand(classes).to(dtype) if weighted else None

    def step(x: torch.Tensor, weight: torch.Tensor | None) -> torch.Tensor:
        loss = F.cross_entropy(x, target, weight, reduction=reduction, ignore_index=2)
        return loss.sum() if reduction == "none" else loss

    def gradient(fn: Callable[..., torch.Tensor], x: torch.Tensor, weight: torch.Tensor | None) -> torch.Tensor:
        x = x.clone().requires_grad_()
        return torch.autograd.grad(fn(x, weight), x)[0]

    x = torch.randn(shape).to(dtype)
    compiled = Recorder().compile(step)
    assert_closer(gradient(compiled, x, weight), gradient(step, x, weight), gradient(step, *to_float64([x, weight])))


def saved(fn: Callable[..., torch.Tensor], *args: torch.Tensor) -> list[torch.Tensor]:
    """The values that the forward graph computes and keeps for the backward."""
    recorder = Recorder()
    recorder.compile(fn)(*args)
    (forward,) = (g for g in recorder.graphs if g.phase.value == "forward")
    results = forward.gm.graph.output_node().args[0]
    return [n.meta["val"] for n in results[len(results) - forward.saved :] if n.op != "placeholder"]


def test_a_loss_saves_rows_statistics_and_no_row_in_float32() -> None:
    x, w = torch.randn(8, 16, requires_grad=True), torch.randn(100, 16, requires_grad=True)
    target = torch.arange(8)

    def loss(x: torch.Tensor, w: torch.Tensor) -> torch.Tensor:
        return F.cross_entropy((x @ w.t()).float(), target)

    kept = saved(loss, *(t.detach().bfloat16().requires_grad_() for t in (x, w)))
    large = [v for v in kept if v.numel() >= 800]
    assert all(v.dtype == torch.bfloat16 for v in large)
    assert sum(v.numel() == 800 for v in large) == 1
