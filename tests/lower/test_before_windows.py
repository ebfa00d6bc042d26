"""What follows a convolution and precedes a pooling is the convolution's epilogue, not computed under every window."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from fxopt.ir.loops import Op, postorder
from fxopt.ir.region import Contraction, Region
from fxopt.lower import padded_images
from fxopt.lower.contractions import IMPLICIT, LIBRARY, PADDED
from fxopt.lower.convolutions import CUDNN
from tests.lower.contracting import alternatives, check_ways, kept, searched

BF16 = torch.bfloat16


@pytest.fixture(autouse=True)
def copies_pay(monkeypatch: pytest.MonkeyPatch) -> None:
    """However small images and windows are."""
    monkeypatch.setattr(padded_images, "LEAST_BYTES", 0)
    monkeypatch.setattr(padded_images, "FEWEST_GATHERED", 0)


def image(*shape: int) -> Tensor:
    return torch.randn(*shape).to(BF16).contiguous(memory_format=torch.channels_last)


def normal(y: Tensor, mean: Tensor, variance: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    return F.batch_norm(y, mean, variance, weight, bias)


STATISTICS = tuple(f(24) for f in (torch.randn, torch.rand, torch.randn, torch.randn))
FOLLOWING: dict[str, Callable[..., Any]] = {
    "norm, relu, largest": lambda y, *s: F.max_pool2d(F.relu(normal(y, *s)), 3, 2, 1),
    "mean": lambda y, *s: F.avg_pool2d(F.silu(y), 3, 2),
    "side by side": lambda y, *s: F.max_pool2d(F.pad(F.gelu(y), (0, 1)), 2, 1),
}


@pytest.mark.parametrize("name", FOLLOWING)
@pytest.mark.parametrize("inside", [3, 16])
def test_every_way_has_eagers_values(name: str, inside: int) -> None:
    def fn(x: Tensor, w: Tensor, *statistics: Tensor) -> Tensor:
        return FOLLOWING[name](F.conv2d(x, w, None, 1, 1), *statistics)

    low = check_ways(fn, image(2, inside, 9, 7), image(24, inside, 3, 3), *STATISTICS)
    (found,) = alternatives(low)
    assert [w.label for w in found.ways] == [LIBRARY, IMPLICIT, *([PADDED] if inside == 3 else [])]
    *_, product, windows = kept(low, IMPLICIT).steps
    assert isinstance(product, Contraction) and isinstance(windows, Region)
    names = {n.name for n in postorder(windows.nest.roots) if isinstance(n, Op)}
    assert not names & {"exp", "erf", "sub"}, "only the pooling is left"
    assert windows.reads() == product.writes()


def test_cudnn_may_have_what_precedes_the_pooling() -> None:
    def fn(x: Tensor, w: Tensor) -> Tensor:
        return F.max_pool2d(F.relu(F.conv2d(x, w, None, 1, 1)), 3, 2)

    with torch.backends.cudnn.flags(enabled=True):
        (found,) = alternatives(searched(fn, image(2, 16, 9, 7), image(24, 16, 3, 3)))
    assert [w.label for w in found.ways] == [LIBRARY, CUDNN]
    assert [type(s).__name__ for s in found.ways[1].steps] == ["Call", "Region"]


LEFT: dict[str, Callable[[Tensor], Any]] = {
    "windows that do not overlap": lambda y: F.max_pool2d(F.silu(y), 2),
    "nothing before": lambda y: F.max_pool2d(y, 3, 2),
    "another reader": lambda y: (F.max_pool2d(F.silu(y), 3, 2), F.layer_norm(y, y.shape[2:])),
    "two functions": lambda y: F.silu(y[..., 1:]) + F.gelu(y[..., :-1]),
    "of the place": lambda y: F.max_pool2d(y * torch.arange(7, dtype=BF16), 3, 2),
}


@pytest.mark.parametrize("name", LEFT)
def test_left_in_one_region(name: str) -> None:
    low = searched(lambda x, w: LEFT[name](F.conv2d(x, w, None, 1, 1)), image(2, 16, 9, 7), image(24, 16, 3, 3))
    steps = [step for each in alternatives(low) for way in each.ways for step in way.steps]
    assert not any(step.name.endswith(".windows") for step in steps if isinstance(step, Region))
