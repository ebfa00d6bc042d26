"""Gradients of group norms: the ways to compute them, and that both have eager's values."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from fxopt.capture.decompositions import decompositions
from fxopt.ir.loops import Op, Store, postorder
from fxopt.ir.region import Call, Region
from fxopt.lower import Lowered, group_sums
from fxopt.lower.group_sums import TOGETHER, with_group_sums
from fxopt.lower.schedule import schedule
from tests.lower.capturing import moved
from tests.lower.contracting import alternatives, kept
from tests.lower.harness import lower
from tests.lower.interpreter import run_lowered
from tests.numerics import assert_closer, to_float64

Norm = Callable[..., tuple[Tensor, ...]]


def gradients(groups: int, channels: int, space: int) -> Norm:
    """Of a group norm's input, weight and bias."""

    def fn(grad: Tensor, x: Tensor, weight: Tensor, mean: Tensor, rstd: Tensor) -> tuple[Tensor, ...]:
        backward = torch.ops.aten.native_group_norm_backward
        return backward(grad, x, mean, rstd, weight, len(x), channels, space, groups, [True] * 3)  # type: ignore[no-any-return]

    return fn


def tensors(images: int, channels: int, space: int, groups: int, dtype: torch.dtype = torch.float32) -> tuple[Tensor, ...]:
    """Incoming gradient, input, weight, and the groups' means and reciprocal deviations."""
    grad, x = (torch.randn(images, channels, space, dtype=dtype) for _ in range(2))
    return (
        grad,
        x,
        torch.randn(channels, dtype=dtype),
        torch.randn(images, groups, dtype=dtype),
        torch.rand(images, groups, dtype=dtype),
    )


def both_ways(fn: Norm, args: tuple[Tensor, ...], device: str = "cuda") -> Lowered:
    """`fn` with its ways; the values of each are compared with eager's on the way."""
    low = with_group_sums(schedule(moved(lower(fn, args, decompose=decompositions()), device)))
    for way in (group_sums.APART, TOGETHER):
        steps = moved(kept(low, way), "cpu")
        got = tuple(run_lowered(steps, dict(zip(low.inputs, args, strict=True))))
        assert_closer(got, fn(*args), fn(*to_float64(args)))
    return low


@pytest.fixture(autouse=True)
def _small(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(group_sums, "LEAST_BYTES", 0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_gradients_are_one_kernel_beside_three(dtype: torch.dtype) -> None:
    low = both_ways(gradients(4, 8, 6), tensors(3, 8, 6, 4, dtype))
    (each,) = alternatives(low)
    apart, together = each.ways
    assert [len(way.steps) for way in (apart, together)] == [3, 1]
    (region,) = together.steps
    assert isinstance(region, Region)
    operands = [load.buffer for load in region.nest.loads() if len(region.buffers[load.buffer].shape) == 3]
    assert sorted(set(operands)) == sorted(low.inputs[:2])
    kinds = {_rank(region, store) for store in region.nest.stores}
    assert kinds == {1, 2}, "sums of each channel, which the gradients of weight and bias need, and the input's gradient"


def _rank(region: Region, store: Store) -> int:
    return 2 if frozenset(region.nest.reduced) & store.symbols() else 1


def test_what_is_computed_on_the_way_is_computed_once() -> None:
    def fn(grad: Tensor, x: Tensor, *rest: Tensor) -> tuple[Tensor, ...]:
        return gradients(2, 8, 1024)(grad * torch.sigmoid(x), x, *rest)

    low = lower(fn, tensors(64, 8, 1024, 2), decompose=decompositions())
    (each,) = alternatives(with_group_sums(schedule(moved(low, "cuda"))))
    (region,) = each.ways[1].steps
    assert isinstance(region, Region)
    assert sum(isinstance(n, Op) and n.name == "sigmoid" for n in postorder(region.nest.roots)) == 2, (
        "a row's own, and another's"
    )


@pytest.mark.parametrize(
    ("groups", "channels", "space"),
    [(2, 6, 4), (8, 8, 4), (1, 2, 64)],
    ids=["three channels", "a channel alone", "too large to hold"],
)
def test_groups_that_stay_apart(groups: int, channels: int, space: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(group_sums, "LARGEST_GROUP", 64)
    assert not alternatives(both_ways(gradients(groups, channels, space), tensors(2, channels, space, groups)))


def test_cpus_have_one_way() -> None:
    assert not alternatives(both_ways(gradients(4, 8, 6), tensors(3, 8, 6, 4), device="cpu"))


@pytest.mark.parametrize("channels_last", [False, True])
def test_channels_last_stays_apart(channels_last: bool) -> None:
    """A group is a few bytes of every place."""

    def fn(grad: Tensor, x: Tensor, weight: Tensor) -> Tensor:
        grad, x = (grad.mT, x.mT) if channels_last else (grad, x)
        total = ((grad * x).sum(-1).view(2, 4, 2) * weight.view(4, 2)).sum(-1).repeat_interleave(2, 1)
        return grad + x * total[:, :, None]

    shape = (2, 16, 8) if channels_last else (2, 8, 16)
    args = torch.randn(shape), torch.randn(shape), torch.randn(8)
    low = with_group_sums(schedule(moved(lower(fn, args, decompose=decompositions()), "cuda")))
    assert len(alternatives(low)) == (not channels_last)


def test_sums_of_groups_that_others_read_stay_apart() -> None:
    """The kernel for all does not store them."""

    def fn(grad: Tensor, x: Tensor, weight: Tensor) -> tuple[Tensor, ...]:
        rows = (grad * x).sum(-1)
        total = (rows.view(2, 4, 2) * weight.view(4, 2)).sum(-1)
        scale = total.repeat_interleave(2, 1)
        return grad + x * scale[:, :, None], rows, total

    assert not alternatives(both_ways(fn, tensors(2, 8, 16, 4)[:3]))


@pytest.mark.parametrize("changed", ["grad", "scratch", "sums"])
def test_what_must_run_between_keeps_its_place(changed: str) -> None:
    """Something that is read later is changed between the steps, or something that none of them touches."""
    low = schedule(moved(lower(gradients(4, 8, 6), tensors(3, 8, 6, 4), decompose=decompositions()), "cuda"))
    first, *_, last = (k for k, s in enumerate(low.steps) if isinstance(s, Region) and set(low.inputs[:2]) <= set(s.reads()))
    step = low.steps[first]
    assert isinstance(step, Region)
    names = {"grad": low.inputs[0], "scratch": "scratch", "sums": step.writes()[0]}
    between = Call("test::change", (), writes=(names[changed],))
    changed_low = replace(low, steps=[*low.steps[:last], between, *low.steps[last:]])
    assert bool(alternatives(with_group_sums(changed_low))) == (changed == "scratch")
