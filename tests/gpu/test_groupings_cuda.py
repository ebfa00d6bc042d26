"""Values stored or computed again: both groupings are as close to float64 as eager, and the tuner keeps one."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

import fxopt
from fxopt.lower import Lowered, groupings
from fxopt.lower.groupings import AGAIN, BOTH, IN_TWO, STORED
from tests.lower.test_groupings import squeezed
from tests.numerics import assert_closer, to_float64

pytestmark = [pytest.mark.gpu, pytest.mark.usefixtures("fresh_cache")]
BF16 = torch.bfloat16
Program = Callable[..., Tensor | tuple[Tensor, ...]]


def softmax(x: Tensor, y: Tensor, z: Tensor) -> Tensor:
    return F.softmax(x * y + z, -1)


def total_and_norm(x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
    total = x * 2 + y
    return total, F.layer_norm(total, total.shape[-1:])


def norm_and_mask(x: Tensor, mean: Tensor, y: Tensor, grad: Tensor) -> tuple[Tensor, Tensor]:
    """A batch norm's gradient, channels last, of a masked gradient that is returned as well."""
    masked = torch.where(y > 0, grad, 0)
    centred = x - mean
    share = (masked * centred).mean((0, 1), keepdim=True)
    return masked, (masked - masked.mean((0, 1), keepdim=True) - centred * share)


CASES = {
    "squeezed": (squeezed, [(16, 64, 4096), (64,), (64, 64)], BF16, AGAIN),
    "softmax": (softmax, [(300, 65536)] * 3, BF16, IN_TWO),
    "softmax in parts": (softmax, [(7, 400000)] * 3, torch.float32, AGAIN),
    "a sum that is returned": (total_and_norm, [(300, 65536)] * 2, BF16, IN_TWO),
    "few rows": (softmax, [(64, 65536)] * 3, BF16, STORED),
    "columns": (norm_and_mask, [(32, 784, 256), (256,), (32, 784, 256), (32, 784, 256)], BF16, IN_TWO),
}


@pytest.mark.parametrize("name", list(CASES))
def test_the_other_grouping_has_the_same_values(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    fn, shapes, dtype, label = CASES[name]
    found, seen = groupings.with_groupings, []

    def other(lowered: Lowered, mode: str = "default") -> Lowered:
        low = found(lowered, mode)
        seen.extend(each.ways[1].label for each in low.groupings)
        return groupings.regrouped(low, {each.name: each.ways[1] for each in low.groupings})

    monkeypatch.setattr(groupings, "with_groupings", other)
    torch.compiler.reset()
    args = [torch.randn(shape, device="cuda", dtype=dtype) / 2 for shape in shapes]
    actual = tensors(torch.compile(fn, backend="fxopt")(*args))
    assert seen == [label]
    assert_closer(actual, tensors(fn(*args)), tensors(fn(*to_float64(tuple(args)))))


def tensors(out: Tensor | tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    return out if isinstance(out, tuple) else (out,)


def test_the_tuner_says_what_it_kept() -> None:
    fn, shapes, dtype, label = CASES["squeezed"]
    said = str(fxopt.explain(fn, *(torch.randn(shape, device="cuda", dtype=dtype) for shape in shapes)))
    assert "groupings: r0.grouping: " in said and (label in said or STORED in said) and BOTH not in said
