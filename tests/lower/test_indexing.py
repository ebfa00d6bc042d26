"""Gathers: eager's layout rules, wrap-around and bounds checks."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F

from fxopt.ir.loops import Load, postorder
from fxopt.ir.region import Region
from tests.lower.capturing import check_exact, lower_function
from tests.lower.interpreter import run_lowered

aten = torch.ops.aten
I1 = torch.tensor([1, 0, -1, 1])
I2 = torch.tensor([[2], [-3]])


INDEXED: list[tuple[str, Callable[[torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]]] = [
    ("first", lambda x, i, j: x[i]),
    ("middle", lambda x, i, j: x[:, i]),
    ("last", lambda x, i, j: x[..., i]),
    ("adjacent", lambda x, i, j: x[:, i, j]),
    ("apart", lambda x, i, j: x[i, :, j]),
    ("apart by two", lambda x, i, j: x.unsqueeze(1)[i, :, :, j]),
    ("all", lambda x, i, j: x[i, i, j]),
    ("zero-dim", lambda x, i, j: aten.index.Tensor(x, [i[0], None, j])),
    ("int32", lambda x, i, j: x[:, i.to(torch.int32)]),
]


@pytest.mark.parametrize(("name", "fn"), INDEXED)
@pytest.mark.parametrize("dynamic", [False, True])
def test_index(name: str, fn: Callable[..., torch.Tensor], dynamic: bool) -> None:
    for x in (torch.randn(3, 4, 5), torch.randn(5, 4, 3).permute(2, 1, 0)):
        check_exact(fn, x, I1, I2, dynamic=dynamic)
    check_exact(lambda x, i, j: fn(x * 2, i, j) + 1, torch.randn(3, 4, 5), I1, I2, dynamic=dynamic)


def test_index_by_arithmetic_needs_no_check() -> None:
    lowered = check_exact(lambda x: x[:, torch.arange(3) * 2 + 1], torch.randn(2, 7))
    (region,) = (s for s in lowered.steps if isinstance(s, Region))
    assert not [n for n in postorder(region.nest.roots) if isinstance(n, Load) and n.indirect]


@pytest.mark.parametrize("bad", [3, -4])
def test_index_out_of_bounds(bad: int) -> None:
    x, i = torch.randn(3, 2), torch.tensor([0, bad])
    lowered = lower_function(lambda x, i: x[i], (x, torch.tensor([0, 1])))
    with pytest.raises(IndexError):
        run_lowered(lowered, dict(zip(lowered.inputs, (x, i), strict=True)))


@pytest.mark.parametrize(
    "fn",
    [
        lambda x, i: torch.gather(x, 0, i),
        lambda x, i: x.index_select(0, i[:, 0]),
        lambda x, i: F.embedding(i, x),
        lambda x, i: x.scatter(0, i, 1.0),
        lambda x, i: x.index_add(0, i[:, 0], x),
    ],
)
def test_negative_indices_are_errors_where_eager_says_so(fn: Callable[..., torch.Tensor]) -> None:
    x, i = torch.randn(2, 2), torch.tensor([[0, 1], [1, -1]])
    i = torch.where(torch.tensor([[True, True], [False, False]]), i, -1)
    with pytest.raises((IndexError, RuntimeError)):
        fn(x, i)
    lowered = lower_function(fn, (x, i))
    with pytest.raises(IndexError):
        run_lowered(lowered, dict(zip(lowered.inputs, (x, i), strict=True)))


def test_mask_stays_with_eager() -> None:
    x = torch.randn(4)
    with pytest.raises(Exception, match=r"data-dependent|depends on data"):
        lower_function(lambda x: x[x > 0], (x,))


@pytest.mark.parametrize("dim", [0, 1, -1])
def test_gather_and_select(dim: int) -> None:
    x, i = torch.randn(3, 4, 3), torch.randint(0, 3, (2, 2, 3))
    check_exact(lambda x, i: torch.gather(x, dim, i), x, i)
    check_exact(lambda x, i: torch.gather(x.sin(), dim, i + 0) * 2, x, i, dynamic=True)
    check_exact(lambda x, i: x.index_select(dim, i), x, torch.tensor([2, 0, 0, 1]))
    check_exact(lambda x, i: x.take_along_dim(i, dim), x, torch.randint(0, 3, (3, 4, 3)))


def test_scalars() -> None:
    x, zero = torch.tensor(2.0), torch.tensor(0)
    check_exact(lambda x, i: (torch.gather(x, 0, i), x.index_select(0, i), aten.take.default(x, i)), x, zero)
    check_exact(lambda x, i: (torch.gather(x, 0, i), x.index_select(0, i), aten.index.Tensor(x, [i])), torch.randn(3), zero)


def test_take() -> None:
    check_exact(lambda x, i: aten.take.default(x, i), torch.randn(5, 4).t(), torch.tensor([[0, -1], [7, 19]]))


def test_embedding() -> None:
    weight, tokens = torch.randn(10, 6), torch.randint(0, 10, (2, 5))
    check_exact(lambda w, t: F.embedding(t, w, padding_idx=3), weight, tokens)
    check_exact(lambda w, t: F.embedding(t, w.t()) + 1, torch.randn(6, 10), tokens.to(torch.int32), dynamic=True)


def test_few_rows_of_a_cast_table_are_cast_after_the_gather() -> None:
    weight, tokens = torch.randn(50, 6), torch.randint(0, 50, (4,))
    lowered = check_exact(lambda w, t: F.embedding(t, w.to(torch.bfloat16)), weight, tokens)
    assert len([s for s in lowered.steps if isinstance(s, Region)]) == 1


@pytest.mark.parametrize("dynamic", [False, True])
def test_many_elements_of_a_widened_table_are_read_narrow(dynamic: bool) -> None:
    table, i = torch.randn(4, 3).to(torch.bfloat16), torch.tensor([1, 0, -1, 1, 2, 3, 3])
    lowered = check_exact(lambda x, i: x.float()[i] * 3, table, i, dynamic=dynamic)
    assert len([s for s in lowered.steps if isinstance(s, Region)]) == 1
    lowered = check_exact(lambda x, i: x.float().exp()[i] * 3, table, i, dynamic=dynamic)
    assert len([s for s in lowered.steps if isinstance(s, Region)]) == 2


def test_a_widened_row_of_a_row_that_was_gathered() -> None:
    table, i, j = torch.randn(4, 3).to(torch.bfloat16), torch.tensor([1, 0, -1]), torch.tensor([2, -1, 0, 1, 1])
    check_exact(lambda x, i, j: x[i].float()[j], table, i, j)


def test_empty() -> None:
    none = torch.empty(0, dtype=torch.int64)
    check_exact(lambda x, i: (x[i], x[:, i], x.index_select(1, i), x.take(i)), torch.randn(3, 4), none)
    check_exact(lambda x, i: F.embedding(i, x), torch.randn(3, 0), torch.tensor([1, 2]))
