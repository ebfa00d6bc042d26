"""Scatters: stores and additions at loaded places, and selections into views."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import pytest
import torch

from tests.lower.capturing import check_exact, library_calls, lower_function
from tests.lower.interpreter import run_lowered
from tests.numerics import assert_closer, to_float64

aten = torch.ops.aten


def _check_close(fn: Callable[..., torch.Tensor], *args: torch.Tensor, dynamic: bool = False) -> None:
    lowered = lower_function(fn, args, dynamic=dynamic)
    assert not library_calls(lowered)
    actual = run_lowered(lowered, dict(zip(lowered.inputs, args, strict=True)))
    assert_closer(actual, [fn(*args)], [fn(*to_float64(args))])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.int8, torch.int64, torch.bool])
def test_index_put(dtype: torch.dtype) -> None:
    x, values = (torch.randint(-5, 5, shape).to(dtype) for shape in ((4, 6), (3, 6)))
    places = torch.tensor([1, -1, 1])
    check_exact(lambda x, i, v: x.index_put((i,), v), x, torch.tensor([1, -1, 0]), values)
    _check_close(lambda x, i, v: x.index_put((i,), v, accumulate=True), x, places, values)


def test_index_put_layouts() -> None:
    i, j = torch.tensor([0, 2]), torch.tensor([[1], [-1]])
    x = torch.randn(3, 4, 5).transpose(0, 2)
    check_exact(lambda x, i, v: aten.index_put.default(x, [None, i], v), x, i, torch.randn(5, 2, 3))
    check_exact(lambda x, i, j, v: aten.index_put.default(x, [i, None, j], v), x, i, j, torch.randn(2, 2, 1))
    check_exact(lambda x, i, j, v: x.index_put((i, j), v) * 2, x, i, j, torch.tensor(7.0))


def test_index_put_with_a_mask() -> None:
    x, value = torch.randn(3, 4), torch.tensor(9.0)
    check_exact(lambda x, v: x.index_put((x > 0,), v), x, value)
    check_exact(lambda x, v: aten.index_put.default(x, [None, x[0] > 0], v, True), x, value)
    values = torch.randn(12)
    assert library_calls(lower_function(lambda x, v: x.index_put((x == x,), v), (x, values))) == ["aten::index_put.default"]


@pytest.mark.parametrize("dim", [0, -1])
def test_scatter(dim: int) -> None:
    x, src = torch.randn(4, 5), torch.randn(4, 6)
    distinct = torch.stack([torch.randperm(4) for _ in range(4)])
    check_exact(lambda x, i, s: x.scatter(dim, i, s), x, distinct, src)
    check_exact(lambda x, i: x.scatter(dim, i, 3.5), x, distinct)
    repeated = torch.randint(0, 4, (3, 5))
    _check_close(lambda x, i, s: x.scatter_add(dim, i, s), x, repeated, src)
    _check_close(lambda x, i, s: x.scatter_add(dim, i, s).exp(), x, repeated, src, dynamic=True)
    _check_close(lambda x, i, s: aten.scatter.reduce(x, dim, i, s, reduce="add"), x, repeated, src)
    for include_self in (True, False):
        _check_close(
            lambda x, i, s, own=include_self: x.scatter_reduce(dim, i, s, "sum", include_self=own), x, repeated, src
        )


def test_halves_are_added_up_in_float32() -> None:
    x, i = torch.zeros(1, dtype=torch.bfloat16), torch.zeros(1000, dtype=torch.int64)
    lowered = lower_function(lambda x, i, s: x.index_add(0, i, s), (x, i, torch.ones(1000, dtype=torch.bfloat16)))
    (out,) = run_lowered(lowered, dict(zip(lowered.inputs, (x, i, torch.ones(1000, dtype=torch.bfloat16)), strict=True)))
    assert out.item() == 1000  # bfloat16 additions would stop at 256


def test_along_a_dimension() -> None:
    x, i, s = torch.randn(3, 4), torch.tensor([2, 0]), torch.randn(3, 2)
    _check_close(lambda x, i, s: aten.index_add.default(x, 1, i, s, alpha=2.5), x, i, s)
    check_exact(lambda x, i, s: aten.index_copy.default(x, 1, i, s), x, i, s)
    check_exact(lambda x, i, s: aten.index_copy.default(x, 1, i, s) + x, x, i, s, dynamic=True)
    check_exact(lambda x, i: aten.index_fill.int_Scalar(x, -1, i, 4.0), x, torch.tensor([-1, 0]))
    check_exact(lambda x, i, v: aten.index_fill.int_Tensor(x, 0, i, v), x, i, torch.tensor(4.0))
    check_exact(lambda x, i, s: aten.put.default(x, i, s), x, torch.tensor([[-1], [0]]), torch.randn(2))


def test_embedding_backward() -> None:
    grad, tokens = torch.randn(2, 5, 3), torch.randint(0, 4, (2, 5))
    for padding in (-1, 2):
        _check_close(lambda g, t, p=padding: aten.embedding_dense_backward.default(g, t, 6, p, False), grad, tokens)
    frequency = lower_function(lambda g, t: aten.embedding_dense_backward.default(g, t, 6, -1, True), (grad, tokens))
    assert library_calls(frequency) == ["aten::embedding_dense_backward.default"]


@pytest.mark.parametrize("kind", ["reflection", "replication"])
def test_pad_backward(kind: str) -> None:
    x, grad = torch.randn(2, 4, 5), torch.randn(2, 6, 8)
    backward = getattr(aten, f"{kind}_pad2d_backward").default
    _check_close(lambda g, x: backward(g, x, [2, 1, 0, 2]), grad, x)
    _check_close(lambda g, x: backward(g, x, [2, 1, 0, 2]), grad, x, dynamic=True)


def test_gather_backward() -> None:
    i = torch.randint(0, 4, (5, 3))
    _check_close(lambda g, i: g.new_zeros(4, 3).scatter_add(0, i, g), torch.randn(5, 3), i)


@pytest.mark.parametrize("dynamic", [False, True])
def test_into_views(dynamic: bool) -> None:
    x = torch.randn(4, 6)
    check_exact(lambda x, s: aten.slice_scatter.default(x, s, 1, 1, 6, 2), x, torch.randn(4, 3), dynamic=dynamic)
    check_exact(lambda x, s: aten.slice_scatter.default(x, s + 1, 0, -2) * 2, x, torch.randn(2, 6), dynamic=dynamic)
    check_exact(lambda x, s: aten.select_scatter.default(x, s, 1, -2), x, torch.randn(4), dynamic=dynamic)
    for offset in (-2, 0, 3):
        s = x.diagonal(offset) * 2
        check_exact(lambda x, s, k=offset: aten.diagonal_scatter.default(x, s, k), x, s, dynamic=dynamic)


def test_into_memory_by_strides() -> None:
    x, s = torch.randn(4, 6), torch.randn(2, 3)
    check_exact(lambda x, s: aten.as_strided_scatter.default(x, s, [2, 3], [12, 2], 1), x, s)
    check_exact(lambda x, s: aten.as_strided_scatter.default(x.exp(), s + 1, [2, 3], [1, 6]) * 2, x, s)
    check_exact(lambda x, s: aten.as_strided_scatter.default(x.t().exp(), s, [2, 3], [6, 2], 1), x, s)
    gaps = lower_function(lambda x, s: aten.as_strided_scatter.default(x, s, [2, 3], [6, 1], 0), (x[:, :3], s))
    assert library_calls(gaps) == ["aten::as_strided_scatter.default"]


def test_empty() -> None:
    none = torch.empty(0, dtype=torch.int64)
    x = torch.randn(3, 4)
    check_exact(lambda x, i: x.index_put((i,), x[:0]), x, none)
    check_exact(lambda x, i: x.scatter_add(0, i.reshape(0, 4), x), x, none)
    check_exact(lambda x: aten.slice_scatter.default(x, x[:0], 0, 1, 1), x)


@pytest.fixture
def deterministic() -> Iterator[None]:
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


@pytest.mark.usefixtures("deterministic")
def test_deterministic_algorithms_are_obeyed() -> None:
    args = (torch.randn(3), torch.tensor([0, 0]), torch.randn(2))
    assert library_calls(lower_function(lambda x, i, s: x.scatter_add(0, i, s), args)) == ["aten::scatter_add.default"]
