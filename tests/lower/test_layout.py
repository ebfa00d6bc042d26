"""Which nodes need memory, in which layout, and what a plan may hold as an argument."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch.fx.experimental.proxy_tensor import make_fx

from fxopt.ir.region import Ref, Size
from fxopt.lower import layout

aten = torch.ops.aten


class Sizes:
    """The part of a lowering that `dense_strides` uses."""

    def sizes(self, given: Any) -> tuple[int, ...]:
        return tuple(int(s) for s in given)


@pytest.mark.parametrize(
    ("tensor", "kept"),
    [
        (torch.empty(4, 6), True),
        (torch.empty(4, 6).t(), True),
        (torch.empty(2, 3, 4, 5).to(memory_format=torch.channels_last), True),
        (torch.empty(4, 1, 6), True),
        (torch.empty(4, 6)[:, :3], False),
        (torch.empty(6).expand(4, 6), False),
        (torch.empty(20).as_strided((4, 4), (1, 2)), False),
        (torch.empty(0, 3), True),
        (torch.empty(()), True),
    ],
)
def test_dense_layouts_are_kept_and_others_become_row_major(tensor: torch.Tensor, kept: bool) -> None:
    strides = layout.dense_strides(Sizes(), tensor)  # type: ignore[arg-type]
    assert strides == (tensor.stride() if kept else torch.empty(tensor.shape).stride())


def test_memory_is_needed_behind_views_of_library_arguments_and_outputs() -> None:
    def fn(x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        a = torch.tanh(x)
        product = aten.mm.default(aten.permute.default(a, [1, 0]), y)
        return aten.view.default(torch.exp(product) + 1, [-1])

    gm = make_fx(fn, tracing_mode="fake")(torch.randn(4, 4), torch.randn(4, 4))
    needed = layout.nodes_needing_memory(gm, lambda n: n.target is aten.mm.default)
    assert {n.name for n in needed} == {"tanh", "y_1", "add"}


def test_readers_are_counted_through_views() -> None:
    def fn(x: torch.Tensor) -> tuple[torch.Tensor, ...]:
        a = torch.tanh(x)
        flat = aten.view.default(a, [-1])
        return flat + 1, flat * 2, a - 1

    gm = make_fx(fn, tracing_mode="fake")(torch.randn(4, 4))
    tanh = next(n for n in gm.graph.nodes if n.name == "tanh")
    assert layout.reader_count(tanh) == 3


def test_what_a_plan_can_hold() -> None:
    assert layout.is_plain_data(([Ref("a"), None, 1.5], {"dtype": torch.float16, "size": (Size(3), -1)}))
    assert not layout.is_plain_data([torch.ones(1)])
    assert not layout.is_plain_data({"graph": object()})
