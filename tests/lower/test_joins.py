"""Joins, pads and elements moved by a rule give eager's bits."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch._subclasses.fake_tensor import FakeTensorMode

from fxopt.ir.loops import Masked, postorder
from fxopt.ir.region import Region
from fxopt.lower.schedule import schedule
from tests.lower.capturing import check_exact, lower_function

aten = torch.ops.aten


def _regions(lowered: object) -> list[Region]:
    return [s for s in lowered.steps if isinstance(s, Region)]  # type: ignore[attr-defined]


@pytest.mark.parametrize("dim", [0, 1, -1])
def test_cat(dim: int) -> None:
    x, y, z = torch.randn(2, 3, 4), torch.randn(4, 3, 2).permute(2, 1, 0), torch.randn(4, 3, 8)[::2, :, ::2]
    check_exact(lambda x, y, z: torch.cat([x, y, z], dim), x, y, z)
    check_exact(lambda x, y, z: torch.cat([x + 1, y, z], dim).mul(2), x, y, z)


def test_cat_promotes_and_skips_empty() -> None:
    check_exact(lambda x, y: torch.cat([x, y]), torch.arange(3), torch.randn(2))
    check_exact(lambda x, y, z: torch.cat([x, y, z], 1) + 1, torch.randn(2, 3), torch.empty(0), torch.randn(2, 0))


def test_cat_of_symbolic_sizes() -> None:
    x, y = torch.randn(5, 3), torch.randn(5, 4)
    check_exact(lambda x, y: torch.cat([x, y], 1), x, y, dynamic=True)
    check_exact(lambda x, y: torch.cat([x, y, x * 2], 1) * 3, x, y, dynamic=True)


def test_cat_before_a_computation_is_one_kernel() -> None:
    lowered = check_exact(lambda x, y: torch.cat([-y, x], 1) * 2, torch.randn(3, 4), torch.randn(3, 4))
    (region,) = _regions(lowered)
    assert any(isinstance(n, Masked) for n in postorder(region.nest.roots))


def test_cat_of_many_writes_each_into_its_slice() -> None:
    parts = [torch.randn(2, k) for k in range(1, 11)]
    lowered = check_exact(lambda *parts: torch.cat([p + 1 for p in parts], 1), *parts)
    assert len(_regions(lowered)) == len(parts)
    assert {r.nest.writes() for r in _regions(lowered)} == {_regions(lowered)[0].nest.writes()}


def test_parts_that_share_their_inputs_are_one_kernel_without_a_selection_on_a_gpu() -> None:
    def gradients(g: torch.Tensor, x: torch.Tensor, dim: int) -> torch.Tensor:
        share = torch.sigmoid(x)
        return torch.cat([g * share, g * x * (1 - share)], dim)

    with FakeTensorMode():
        g, x = (torch.empty(8, 64, device="cuda") for _ in range(2))
        joined = schedule(lower_function(lambda g, x: gradients(g, x, 1), (g, x)))
        narrow = schedule(lower_function(lambda g, x: gradients(g.unsqueeze(-1), x.unsqueeze(-1), -1), (g, x)))
        apart = schedule(lower_function(lambda g, x: torch.cat([g, x], 1), (g, x)))
    (region,) = _regions(joined)
    assert (set(region.nest.reads()), len(region.nest.stores)) == (set(joined.inputs), 2)
    assert not any(isinstance(n, Masked) for n in postorder(region.nest.roots))
    for lowered in (narrow, apart):
        assert any(isinstance(n, Masked) for r in _regions(lowered) for n in postorder(r.nest.roots))


def test_stack() -> None:
    x, y = torch.randn(2, 3), torch.randn(2, 3)
    for dim in (0, 1, -1):
        check_exact(lambda x, y, dim=dim: torch.stack([x, y * 2], dim) + 1, x, y)


PADS: list[tuple[str, Callable[[torch.Tensor], torch.Tensor]]] = [
    ("constant", lambda x: F.pad(x, (1, 2, 0, 3), value=1.5)),
    ("negative", lambda x: F.pad(x, (-1, 2, 1, -2))),
    ("nothing left", lambda x: F.pad(x, (-2, -3))),
    ("reflect1d", lambda x: F.pad(x, (2, 1), mode="reflect")),
    ("reflect2d", lambda x: F.pad(x, (2, 1, 0, 3), mode="reflect")),
    ("replicate2d", lambda x: F.pad(x, (2, 1, 4, 3), mode="replicate")),
]
RULES: list[tuple[str, Callable[[torch.Tensor], torch.Tensor]]] = [
    ("flip", lambda x: x.flip(0, -1)),
    ("roll", lambda x: x.roll((1, -7), (0, 2))),
    ("roll flat", lambda x: x.roll(3)),
    ("repeat", lambda x: x.repeat(2, 1, 3, 1)),
    ("tile", lambda x: x.tile(2, 3)),
    ("repeat_interleave", lambda x: x.repeat_interleave(3, 1)),
    ("repeat_interleave flat", lambda x: x.repeat_interleave(2)),
    ("meshgrid", lambda x: torch.stack(torch.meshgrid(x[0, 0], x[0, :, 0], indexing="ij"))),
]


@pytest.mark.parametrize(("name", "fn"), PADS + RULES)
@pytest.mark.parametrize("dynamic", [False, True])
def test_elements_moved(name: str, fn: Callable[[torch.Tensor], torch.Tensor], dynamic: bool) -> None:
    check_exact(fn, torch.randn(2, 4, 5), dynamic=dynamic)
    check_exact(lambda x: fn(x.exp()), torch.randn(5, 4, 2).permute(2, 1, 0), dynamic=dynamic)


def test_three_dimensional_pads() -> None:
    x = torch.randn(1, 2, 3, 4, 5)
    check_exact(lambda x: F.pad(x, (1, 2, 2, 1, 0, 1), mode="reflect"), x)
    check_exact(lambda x: F.pad(x, (1, 2, 2, 1, 0, 1), mode="replicate"), x)


def test_shuffles() -> None:
    x = torch.randn(2, 8, 4, 6)
    check_exact(lambda x: aten.pixel_shuffle.default(x, 2), x)
    check_exact(lambda x: aten.pixel_unshuffle.default(x, 2), x)
    check_exact(lambda x: aten.channel_shuffle.default(x, 4), x)


def test_empty_tensors() -> None:
    x = torch.randn(2, 0, 3)
    check_exact(
        lambda x: (x.flip(0), x.roll(1, 1), x.repeat(2, 1, 1), torch.cat([x, x], 1), F.pad(x, (0, 0, 1, 0), value=2.0)), x
    )


@pytest.mark.parametrize("dtype", [torch.bool, torch.uint8, torch.int64, torch.float16, torch.bfloat16, torch.float64])
def test_dtypes(dtype: torch.dtype) -> None:
    x = torch.randint(0, 2, (3, 4)).to(dtype)
    check_exact(lambda x: (torch.cat([x, x.flip(1)], 1), F.pad(x, (1, 1), value=1), x.roll(1, 0)), x)


def test_gradients_of_views() -> None:
    g = torch.randn(2, 3)
    check_exact(lambda g: aten.slice_backward.default(g, [2, 9], 1, 1, 8, 3), torch.randn(2, 3))
    check_exact(lambda g: aten.slice_backward.default(g, [2, 9], 1, -4, 9223372036854775807, 2), torch.randn(2, 2))
    check_exact(lambda g: aten.select_backward.default(g, [2, 4, 3], 1, -1), g)
    check_exact(lambda g: aten.diagonal_backward.default(g, [4, 2, 3], 1, 0, 2), torch.randn(2, 2))
    check_exact(lambda g: aten.diagonal_backward.default(g, [4, 2, 3], -1, 0, 2), torch.randn(2, 3))
