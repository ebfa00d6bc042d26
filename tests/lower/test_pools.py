"""A pooling whose windows lie side by side is the epilogue of the convolution before it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from fxopt.ir.region import Call, Contraction, Patches
from fxopt.lower import padded_images
from fxopt.lower.contractions import FUSED, IMPLICIT, LIBRARY, PADDED, PADDED_POOLED, POOLED
from fxopt.lower.convolutions import CUDNN
from tests.lower.contracting import alternatives, check_ways, kept, searched
from tests.lower.interpreter import run_lowered

BF16 = torch.bfloat16


@pytest.fixture(autouse=True)
def copies_pay(monkeypatch: pytest.MonkeyPatch) -> None:
    """However small images and windows are."""
    monkeypatch.setattr(padded_images, "LEAST_BYTES", 0)
    monkeypatch.setattr(padded_images, "FEWEST_GATHERED", 0)


def image(*shape: int) -> Tensor:
    return torch.randn(*shape).to(BF16).contiguous(memory_format=torch.channels_last)


def normal(y: Tensor, r: Tensor, *statistics: Tensor) -> Tensor:
    return F.relu(F.batch_norm(y, *statistics) + r)


MORE = (image(2, 24, 9, 8), *(f(24) for f in (torch.randn, torch.rand, torch.randn, torch.randn)))
FOLLOWING: dict[str, tuple[Callable[..., Any], tuple[int, int]]] = {
    "largest": (lambda y, *_: F.max_pool2d(F.relu(y), 2), (2, 2)),
    "a module": (lambda y, *_: torch.nn.MaxPool2d(2, 2)(F.silu(y)), (2, 2)),
    "nothing before": (lambda y, *_: F.max_pool2d(y, 2), (2, 2)),
    "mean": (lambda y, *_: F.avg_pool2d(F.relu(y), 2), (2, 2)),
    "of rows": (lambda y, *_: F.avg_pool2d(F.gelu(y), (2, 1)), (2, 1)),
    "of columns": (lambda y, *_: F.max_pool2d(F.relu(y), (1, 4)), (1, 4)),
    "adaptive": (lambda y, *_: F.adaptive_avg_pool2d(F.relu(y[:, :, :8]), (4, 4)), (2, 2)),
    "adaptive, largest": (lambda y, *_: F.adaptive_max_pool2d(F.relu(y[:, :, :8]), (4, 4)), (2, 2)),
    "and after it": (lambda y, *_: F.gelu(F.max_pool2d(F.relu(y), 2) * 2), (2, 2)),
    "laid out anew": (lambda y, *_: F.max_pool2d(F.relu(y), 2).flatten(1), (2, 2)),
    "norm and residual": (lambda y, *more: F.max_pool2d(normal(y, *more), 2), (2, 2)),
    "two poolings": (lambda y, *_: F.max_pool2d(F.relu(y), 2) + F.avg_pool2d(y, 2), (2, 2)),
    "differences": (lambda y, *_: (y[..., ::2] - y[..., 1::2], y[..., ::2] + y[..., 1::2]), (1, 2)),
}


@pytest.mark.parametrize("name", FOLLOWING)
@pytest.mark.parametrize("inside", [3, 16])
def test_every_way_has_eagers_values(name: str, inside: int) -> None:
    following, pool = FOLLOWING[name]

    def fn(x: Tensor, w: Tensor, b: Tensor, *more: Tensor) -> Any:
        return following(F.conv2d(x, w, b, 1, 1), *more)

    low = check_ways(fn, image(2, inside, 9, 8), image(24, inside, 3, 3), torch.randn(24).to(BF16), *MORE)
    (found,) = alternatives(low)
    labels = [LIBRARY, POOLED, IMPLICIT] if inside == 16 else [LIBRARY, POOLED, PADDED_POOLED, IMPLICIT, PADDED]
    assert [w.label for w in found.ways] == labels
    for label in (label for label in labels if "pooled" in label):
        (product,) = (s for s in kept(low, label).steps if isinstance(s, Contraction))
        assert isinstance(product.a, Patches) and product.a.pool == pool
        assert "convolution" not in (*product.reads(), *product.writes())


OTHERS: dict[str, tuple[Callable[..., Any], tuple[Tensor, ...]]] = {
    "1x1, as in DenseNet": (
        lambda x, w: F.avg_pool2d(F.conv2d(F.relu(x), w), 2, 2), (image(2, 16, 6, 8), image(24, 16, 1, 1)),
    ),
    "one image": (lambda x, w: F.max_pool2d(F.conv2d(x, w), 2), (image(1, 16, 7, 7), image(24, 16, 3, 3))),
    "one pool": (lambda x, w: F.max_pool2d(F.conv2d(x, w), 2), (image(2, 16, 4, 4), image(24, 16, 3, 3))),
    "stride and dilation": (
        lambda x, w: F.max_pool2d(F.conv2d(x, w, None, 2, 2, 2), 2), (image(2, 16, 17, 16), image(24, 16, 3, 3)),
    ),
    "a part of the images, a weight by rows": (
        lambda x, w: F.max_pool2d(F.conv2d(x[1:, 8:], w.contiguous()), 2), (image(3, 24, 9, 9), image(24, 16, 3, 3)),
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", OTHERS)
def test_other_convolutions(name: str) -> None:
    fn, args = OTHERS[name]
    (found,) = alternatives(check_ways(fn, *args))
    assert [w.label for w in found.ways] == [LIBRARY, POOLED, FUSED if name.startswith("1x1") else IMPLICIT]
    works = [step for way in found.ways[1:] for step in way.steps if not isinstance(step, Call)]
    assert len({work.name for work in works}) == len(set(map(id, works))), "each has candidates of its own"


def skip(y: Tensor, activation: Callable[[Tensor], Tensor] = F.silu) -> tuple[Tensor, ...]:
    """As where a UNet goes down."""
    z = activation(y)
    return z, F.max_pool2d(z, 2)


KEPT: dict[str, tuple[Callable[..., Any], int]] = {
    "a skip connection": (skip, 2),
    "the result itself": (lambda y: (F.max_pool2d(F.silu(y), 2), y), 2),
    "both": (lambda y: (*skip(y), y), 3),
    "twice in the pooling": (lambda y: F.max_pool2d((z := F.gelu(y)), 2) + F.avg_pool2d(z, 2), 1),
}


@pytest.mark.parametrize("name", KEPT)
def test_what_others_read_is_stored_as_well(name: str) -> None:
    following, results = KEPT[name]

    def fn(x: Tensor, w: Tensor, b: Tensor) -> Any:
        return following(F.conv2d(x, w, b, 1, 1))

    args = image(2, 16, 8, 8), image(24, 16, 3, 3), torch.randn(24).to(BF16)
    low = check_ways(fn, *args)
    (found,) = (each for each in alternatives(low) if len(each.ways) > 1)
    (product,) = next(way.steps for way in found.ways if way.label == POOLED)
    assert isinstance(product, Contraction) and len(product.pooled) == 4 and len(product.writes()) == results
    for way in found.ways:
        assert set(product.writes()) <= {n for step in way.steps for n in _made(step)}
    odd = check_ways(fn, image(2, 16, 8, 9), *args[1:])
    left = [way.label for each in alternatives(odd) for way in each.ways]
    assert (POOLED in left) == (name == "twice in the pooling"), "no place is left out"


def _made(step: Any) -> tuple[str | None, ...]:
    return step.outputs if isinstance(step, Call) else step.writes()


def test_cudnn_may_have_what_precedes_the_pooling() -> None:
    with torch.backends.cudnn.flags(enabled=True):
        low = searched(lambda x, w: skip(F.conv2d(x, w, None, 1, 1), F.relu), image(2, 16, 8, 8), image(24, 16, 3, 3))
    (found,) = alternatives(low)
    assert [w.label for w in found.ways] == [LIBRARY, POOLED, CUDNN]
    assert [type(s).__name__ for s in found.ways[2].steps] == ["Call", "Region"]


LEFT: dict[str, Callable[[Tensor], Any]] = {
    "windows that overlap": lambda y: F.max_pool2d(F.silu(y), 3, 2),
    "another reader": lambda y: (F.max_pool2d(F.silu(y), 2), F.layer_norm(y, y.shape[2:])),
    "the result itself": lambda y: (F.max_pool2d(F.silu(y), 2), y),
    "nine places": lambda y: F.max_pool2d(F.silu(y), 3),
    "a last pool of its own": lambda y: F.max_pool2d(F.silu(y), 2, ceil_mode=True),
    "padded": lambda y: F.max_pool2d(F.silu(y), 2, padding=1),
    "dilated": lambda y: F.max_pool2d(F.silu(y), 2, dilation=2),
    "gaps": lambda y: F.max_pool2d(F.silu(y), 2, 3),
    "from the second row on": lambda y: F.max_pool2d(F.silu(y[:, :, 1:]), 2),
    "a part of the channels": lambda y: F.max_pool2d(F.silu(y[:, :8]), 2),
}


@pytest.mark.parametrize("name", LEFT)
def test_left_to_a_kernel_of_its_own(name: str) -> None:
    fn, args = (lambda x, w: LEFT[name](F.conv2d(x, w, None, 1, 1))), (image(2, 16, 9, 8), image(24, 16, 3, 3))
    low = check_ways(fn, *args)
    assert not any(way.label == POOLED for each in alternatives(low) for way in each.ways)


def test_depthwise_convolutions_are_left_alone() -> None:
    low = check_ways(
        lambda x, w: F.max_pool2d(F.conv2d(x, w, None, 1, 1, groups=16), 2), image(2, 16, 8, 8), image(16, 1, 3, 3)
    )
    assert not any(way.label == POOLED for each in alternatives(low) for way in each.ways)


@pytest.mark.parametrize("pad", [(0, 0, 0, 1), (0, 1, 0, 0)], ids=["rows", "columns"])
def test_pools_larger_than_the_convolutions_result_are_left_alone(pad: tuple[int, ...]) -> None:
    """All of a pool but one row or column is what the result is padded with."""
    size = (1, 8) if pad[3] else (8, 1)
    low = check_ways(lambda x, w: F.max_pool2d(F.pad(F.conv2d(x, w), pad), 2), image(2, 16, *size), image(24, 16, 1, 1))
    assert not any(way.label == POOLED for each in alternatives(low) for way in each.ways)


def test_what_is_compared_is_rounded_as_in_memory() -> None:
    """Of equal ones the first is the largest, and one place of each pool is equal to its largest."""

    def fn(x: Tensor, w: Tensor) -> tuple[Tensor, Tensor]:
        y = F.relu(F.conv2d(x, w, None, 1, 1) * 0.37 + 0.1)
        pooled = F.max_pool2d(y, 2)
        return pooled, sum(y[..., k // 2 :: 2, k % 2 :: 2] == pooled for k in range(4)) > 0

    args = image(2, 16, 8, 8), image(24, 16, 3, 3)
    low = searched(fn, *args)
    assert POOLED in {way.label for each in alternatives(low) for way in each.ways}
    for label in (LIBRARY, POOLED, IMPLICIT):
        assert run_lowered(kept(low, label), dict(zip(low.inputs, args, strict=True)))[1].all(), label
