"""Maximum pools that save one byte for each maximum: which are rewritten, and that values stay."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx

from fxopt.capture.pool_offsets import save_pool_offsets
from fxopt.ir import pool_ops

aten = torch.ops.aten


def step(g: torch.Tensor, x: torch.Tensor, *window: Any) -> tuple[torch.Tensor, ...]:
    """What a joint graph holds of a pool, whose forward may leave out what has a default."""
    kernel, stride, padding, dilation, ceil = (*window, *([], [0, 0], [1, 1], False)[len(window) - 1 :])
    values, places = aten.max_pool2d_with_indices.default(x, *window)
    backward = aten.max_pool2d_with_indices_backward.default
    return values, backward(g, x, kernel, stride or kernel, padding, dilation, ceil, places)


def traced(device: str, fn: Any, *window: Any) -> torch.fx.GraphModule:
    with FakeTensorMode():
        x = torch.empty(2, 3, 9, 8, device=device)
        g = torch.empty_like(aten.max_pool2d_with_indices.default(x, *window)[0])
        return make_fx(lambda g, x: fn(g, x, *window), tracing_mode="fake")(g, x)


WINDOWS: list[tuple[Any, ...]] = [
    ([3, 3], [2, 2], [1, 1]),
    ([2, 2],),
    ([3, 2], [1, 2], [1, 0], [1, 1], True),
]


@pytest.mark.parametrize("window", WINDOWS)
def test_a_pool_and_its_backward_pass_offsets(window: tuple[Any, ...]) -> None:
    gm = traced("cuda", step, *window)
    assert save_pool_offsets(gm) == 1
    gm.graph.lint()
    (pool,) = gm.graph.find_nodes(op="call_function", target=pool_ops.max_pool_offsets)
    assert pool.meta["val"][1].dtype == torch.int8
    assert pool.meta["val"][1].shape == pool.meta["val"][0].shape
    x = torch.randn(2, 3, 9, 8)
    x[0, 0, 4:7, 3:6] = float("nan")
    g = torch.randn(pool.meta["val"][0].shape)
    torch.testing.assert_close(gm(g, x), step(g, x, *window), rtol=0, atol=0, equal_nan=True)


def test_others_keep_their_positions() -> None:
    def places(g: torch.Tensor, x: torch.Tensor, *window: Any) -> tuple[torch.Tensor, ...]:
        return (*step(g, x, *window), aten.max_pool2d_with_indices.default(x, *window)[1])

    assert save_pool_offsets(traced("cpu", step, [3, 3])) == 0, "not on a GPU"
    assert save_pool_offsets(traced("cuda", step, [2, 2], [1, 1], [0, 0], [2, 2])) == 0, "dilation"
    assert save_pool_offsets(traced("cuda", places, [3, 3])) == 1, "the one whose positions are returned stays"


def test_layout_follows_the_input() -> None:
    x = torch.randn(2, 3, 9, 8).contiguous(memory_format=torch.channels_last)
    values, offsets = pool_ops.max_pool_offsets(x, [3, 3], [2, 2], [1, 1], False)
    with FakeTensorMode(allow_non_fake_inputs=True):
        fake = pool_ops.max_pool_offsets(torch.empty_like(x), [3, 3], [2, 2], [1, 1], False)
    assert [t.stride() for t in fake] == [values.stride(), offsets.stride()]
