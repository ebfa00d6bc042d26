"""Views keep eager's strides on stored tensors and become index arithmetic on expressions."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

from fxopt.ir.exprs import Sym, symbol
from fxopt.ir.region import Region
from fxopt.lower.ops.bounds import reshape_indices
from fxopt.lower.ops.views import view_strides
from tests.lower.capturing import check_exact, library_calls, lower_function

VIEWS: list[tuple[str, Callable[[torch.Tensor], object]]] = [
    ("reshape", lambda x: x.reshape(-1, x.shape[0])),
    ("permute", lambda x: x.permute(2, 0, -2)),
    ("transpose", lambda x: x.transpose(-1, 0)),
    ("expand", lambda x: x[:, :1].expand(-1, 5, -1)),
    ("slice_step", lambda x: x[:, 1::2, -3:-1]),
    ("slice_past_the_end", lambda x: x[:, 7:]),
    ("select_negative", lambda x: x.select(-1, -2)),
    ("squeeze", lambda x: x[:, :1].squeeze()),
    ("squeeze_dims", lambda x: x[:1, :, :1].squeeze((0, 2))),
    ("squeeze_other", lambda x: x.squeeze(1)),
    ("unsqueeze", lambda x: (x.unsqueeze(-1), x.unsqueeze(1))),
    ("diagonal", lambda x: (x.diagonal(1, 0, 2), x.diagonal(-1, 1, 2))),
    ("unfold", lambda x: x.unfold(2, 3, 2)),
    ("split", lambda x: x.split(3, dim=2)),
    ("split_sizes", lambda x: x.split([1, 0, 3], dim=1)),
    ("chunk", lambda x: x.chunk(2, dim=-1)),
    ("unbind", lambda x: x.unbind(1)),
    ("movedim", lambda x: x.movedim(0, -1)),
    ("flatten_then_view", lambda x: x.flatten(1).view(2, 10, 2)),
    ("dtype", lambda x: x.view(torch.int32)),
]


def _layouts() -> list[torch.Tensor]:
    return [torch.randn(2, 4, 5), torch.randn(5, 4, 2).permute(2, 1, 0), torch.randn(4, 8, 5)[1::2, ::2]]


@pytest.mark.parametrize(("name", "view"), VIEWS)
def test_of_stored_tensors(name: str, view: Callable[[torch.Tensor], object]) -> None:
    for x in _layouts():
        if name == "flatten_then_view" and not x.is_contiguous():
            continue
        check_exact(view, x)


@pytest.mark.parametrize(("name", "view"), VIEWS)
def test_of_expressions(name: str, view: Callable[[torch.Tensor], object]) -> None:
    for x in _layouts():
        if name == "flatten_then_view" and not x.is_contiguous():
            continue
        check_exact(lambda x: view(x * 2), x)


@pytest.mark.parametrize(("name", "view"), [v for v in VIEWS if v[0] not in ("split_sizes", "flatten_then_view")])
def test_of_symbolic_sizes(name: str, view: Callable[[torch.Tensor], object]) -> None:
    check_exact(view, torch.randn(6, 4, 5), dynamic=True)
    check_exact(lambda x: view(x + 1), torch.randn(6, 4, 5), dynamic=True)


def test_of_empty_tensors() -> None:
    check_exact(
        lambda x: (x.reshape(0, 8), x.permute(1, 0, 2), x[:, 1], x.unsqueeze(0), x.transpose(0, 1) * 2), torch.randn(2, 4, 0)
    )


def test_of_scalars() -> None:
    check_exact(lambda x: (x.reshape(1, 1), x.expand(3), x.unsqueeze(0), x.transpose(0, 0), x.squeeze()), torch.tensor(3.0))


def test_stored_views_need_no_kernel() -> None:
    lowered = lower_function(lambda x: x.permute(1, 0)[2:].unsqueeze(1), (torch.randn(3, 5),))
    assert not [s for s in lowered.steps if isinstance(s, Region)]


def test_a_chain_of_views_of_an_expression_is_one_kernel() -> None:
    lowered = check_exact(lambda x: (x + 1).reshape(4, 6).t()[1:].reshape(-1)[::2].flip(0), torch.randn(2, 3, 4))
    assert len([s for s in lowered.steps if isinstance(s, Region)]) == 1


def test_as_strided_counts_from_the_storage() -> None:
    def again(x: torch.Tensor) -> torch.Tensor:
        return (x * 2)[2:].as_strided((3, 2), (1, 4), 1)

    check_exact(again, torch.randn(10))
    check_exact(lambda x: x.as_strided((2, 2), (2, 1)), torch.randn(12)[3:])


def test_as_strided_before_the_tensor_stays_with_eager() -> None:
    lowered = lower_function(lambda x: x.as_strided((2,), (1,), 0), (torch.randn(12)[3:],))
    assert library_calls(lowered) == ["aten::as_strided.default"]


def test_view_of_another_width_stays_with_eager() -> None:
    assert library_calls(lower_function(lambda x: x.view(torch.int16), (torch.randn(4),))) == ["aten::view.dtype"]


def test_copies_are_new_memory() -> None:
    lowered = check_exact(lambda x: torch.permute_copy(x, (1, 0)), torch.randn(3, 5))
    assert len([s for s in lowered.steps if isinstance(s, Region)]) == 1


def test_view_strides_agree_with_torch() -> None:
    for x in (torch.empty(2, 3, 4), torch.empty(4, 3, 2).permute(2, 1, 0), torch.empty(2, 1, 3).expand(2, 5, 3)):
        for new in ((6, 4), (24,), (2, 12), (1, 2, 3, 4), (2, 3, 2, 2), (3, 8), (30,), (10, 3)):
            if torch.Size(new).numel() != x.numel():
                continue
            try:
                expected = x.view(new).stride()
            except RuntimeError:
                expected = None
            got = view_strides(tuple(x.shape), x.stride(), new)
            assert (got is None) == (expected is None)
            if got is not None and expected is not None:
                assert all(a == b for a, b, n in zip(got, expected, new, strict=True) if n != 1)


def test_reshape_keeps_unrelated_indices_plain() -> None:
    n, i, j, k = (symbol(Sym(name, lo=2)) for name in "nijk")
    row = symbol(Sym("row", size=n))
    column = symbol(Sym("column", size=12))
    assert reshape_indices((n, 3, 4), (n, 12), (row, column)) == (row, column // 4, column % 4)
    assert reshape_indices((i, j, k), (i, j * k), (row, j + k))[0] == row
