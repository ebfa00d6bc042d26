"""Pooling forward and backward: padding, ceil_mode, dilation, NaN, positions."""

from __future__ import annotations

from collections import Counter
from typing import Any

import pytest
import torch

from fxopt.ir.loops import Op, postorder
from fxopt.ir.pool_ops import max_pool_offsets, max_pool_offsets_backward
from fxopt.ir.region import Region
from fxopt.lower.schedule import schedule
from tests.lower.capturing import check_exact, library_calls, lower_function
from tests.lower.harness import check, lower

aten = torch.ops.aten

WINDOWS: list[dict[str, Any]] = [
    {"kernel_size": [2]},
    {"kernel_size": [3, 2], "stride": [2, 1], "padding": [1, 0]},
    {"kernel_size": [3], "stride": [2], "padding": [1], "ceil_mode": True},
    {"kernel_size": [2], "stride": [3], "ceil_mode": True},
]


@pytest.mark.parametrize("window", [*WINDOWS, {"kernel_size": [3, 2], "dilation": [2, 3], "padding": [1]}])
@pytest.mark.parametrize("dynamic", [False, True])
def test_max(window: dict[str, Any], dynamic: bool) -> None:
    for x in (torch.randn(2, 3, 8, 7), torch.randn(8, 7, 3).permute(2, 0, 1), torch.randint(-9, 9, (1, 2, 9, 8))):
        check_exact(lambda x: aten.max_pool2d_with_indices.default(x, **window), x, dynamic=dynamic)


def test_positions_take_four_operators_a_tap() -> None:
    """Two comparisons, their union and a selection: on a GPU these decide how long a pool of half precision takes."""
    low = lower(lambda x: max_pool_offsets(x, [3, 3], [2, 2], [1, 1], False), (torch.randn(2, 3, 8, 8),))
    (region,) = (step for step in schedule(low).steps if isinstance(step, Region))
    (positions,) = (s.value for s in region.nest.stores if region.buffers[s.buffer].dtype == torch.int8)
    found = Counter(node.name for node in postorder((positions,)) if isinstance(node, Op))
    assert (found["gt"], found["isnan"], found["bitwise_or"], found["where"]) == (8, 8, 8, 8)


def test_max_of_nan_and_infinities() -> None:
    x = torch.randn(1, 1, 6, 6)
    x[0, 0, 1, 1:3], x[0, 0, 3:, :3] = float("nan"), -float("inf")
    check_exact(lambda x: aten.max_pool2d_with_indices.default(x, [3], [1], [1]), x)


@pytest.mark.parametrize("window", WINDOWS)
@pytest.mark.parametrize("include", [True, False])
def test_average(window: dict[str, Any], include: bool) -> None:
    for dtype in (torch.float64, torch.float32, torch.bfloat16):
        x = torch.randn(2, 3, 8, 7).to(dtype)
        check(lambda x: aten.avg_pool2d.default(x, **window, count_include_pad=include), x)
    check(lambda x: aten.avg_pool2d.default(x, **window, divisor_override=3), torch.randn(3, 8, 7))


@pytest.mark.parametrize("window", WINDOWS)
def test_gradients(window: dict[str, Any]) -> None:
    x = torch.randn(2, 3, 8, 7)
    kernel, stride = window["kernel_size"], window.get("stride", window["kernel_size"])
    padding, ceil_mode = window.get("padding", [0]), window.get("ceil_mode", False)
    values, places = aten.max_pool2d_with_indices.default(x, **window)
    grad = torch.randn_like(values)

    def of_max(g: torch.Tensor, x: torch.Tensor, i: torch.Tensor) -> torch.Tensor:
        return aten.max_pool2d_with_indices_backward.default(g, x, kernel, stride, padding, [1], ceil_mode, i)

    check(of_max, grad, x, places)
    _check_average_gradient(grad, x, (kernel, stride, padding, ceil_mode, True, None))
    _check_average_gradient(grad, x, (kernel, stride, padding, ceil_mode, False, None))


@pytest.mark.parametrize("window", WINDOWS)
@pytest.mark.parametrize("dynamic", [False, True])
def test_offsets(window: dict[str, Any], dynamic: bool) -> None:
    kernel = window["kernel_size"] * (3 - len(window["kernel_size"]))
    stride, padding, ceil_mode = window.get("stride", kernel), window.get("padding", [0]), window.get("ceil_mode", False)
    arguments = (kernel, stride * (3 - len(stride)), padding * (3 - len(padding)), ceil_mode)
    for x in (torch.randn(2, 3, 8, 7), torch.randn(2, 8, 7, 3).permute(0, 3, 1, 2)):
        x[0, 0, 2:4, 2:4] = float("nan")
        check_exact(lambda x: max_pool_offsets(x, *arguments), x, dynamic=dynamic)
        values, offsets = max_pool_offsets(x, *arguments)
        grad = values.round()
        check_exact(lambda g, x, o: max_pool_offsets_backward(g, x, *arguments, o), grad, x, offsets, dynamic=dynamic)


def _check_average_gradient(grad: torch.Tensor, x: torch.Tensor, arguments: tuple[Any, ...]) -> None:
    check(lambda g, x: aten.avg_pool2d_backward.default(g, x, *arguments), grad, x)


def test_gradient_of_dilated_max() -> None:
    x = torch.randn(1, 2, 9, 9)
    values, places = aten.max_pool2d_with_indices.default(x, [3], [2], [1], [2])
    grad = torch.randn_like(values)
    check(lambda g, x, i: aten.max_pool2d_with_indices_backward.default(g, x, [3], [2], [1], [2], False, i), grad, x, places)


VOLUMES: list[dict[str, Any]] = [
    {"kernel_size": [2]},
    {"kernel_size": [3, 2, 1], "stride": [2, 1, 2], "padding": [1, 0, 0]},
    {"kernel_size": [2], "stride": [3], "padding": [1], "ceil_mode": True},
]


@pytest.mark.parametrize("window", VOLUMES)
def test_volumes(window: dict[str, Any]) -> None:
    x = torch.randn(2, 3, 5, 6, 7)
    x[0, 0, 1, 2, 3] = float("nan")
    check_exact(lambda x: aten.max_pool3d_with_indices.default(x, **window), x)
    for include in (True, False):
        arguments = {**window, "count_include_pad": include}
        check(lambda x, arguments=arguments: aten.avg_pool3d.default(x, **arguments), torch.randn(3, 5, 6, 7))


@pytest.mark.parametrize("window", VOLUMES)
def test_gradients_of_volumes(window: dict[str, Any]) -> None:
    x = torch.randn(2, 3, 5, 6, 7)
    kernel, stride = window["kernel_size"], window.get("stride", window["kernel_size"])
    padding, ceil_mode = window.get("padding", [0]), window.get("ceil_mode", False)
    values, places = aten.max_pool3d_with_indices.default(x, **window)
    grad = torch.randn_like(values)

    def of_max(g: torch.Tensor, x: torch.Tensor, i: torch.Tensor) -> torch.Tensor:
        return aten.max_pool3d_with_indices_backward.default(g, x, kernel, stride, padding, [1], ceil_mode, i)

    check(of_max, grad, x, places)
    arguments = (kernel, stride, padding, ceil_mode, False, None)
    check(lambda g, x: aten.avg_pool3d_backward.default(g, x, *arguments), grad, x)


@pytest.mark.parametrize("size", [(1, 1), (2, 3), (3, 4), (8, 6), (10, 2)])
def test_adaptive(size: tuple[int, int]) -> None:
    x = torch.randn(2, 3, 8, 6)
    grad = torch.randn(2, 3, *size)
    check(lambda x: aten._adaptive_avg_pool2d.default(x, list(size)), x)
    check(lambda g, x: aten._adaptive_avg_pool2d_backward.default(g, x), grad, x)
    if size == (1, 1):  # one window as large as the plane
        return
    check_exact(lambda x: aten.adaptive_max_pool2d.default(x, list(size)), x)
    places = aten.adaptive_max_pool2d.default(x, list(size))[1]
    check(lambda g, x, i: aten.adaptive_max_pool2d_backward.default(g, x, i), grad, x, places)


@pytest.mark.parametrize("size", [(1, 1, 1), (2, 3, 4), (5, 2, 3), (7, 6, 7)])
def test_adaptive_volumes(size: tuple[int, int, int]) -> None:
    x = torch.randn(2, 5, 6, 7)
    grad = torch.randn(2, *size)
    check(lambda x: aten._adaptive_avg_pool3d.default(x, list(size)), x)
    check(lambda g, x: aten._adaptive_avg_pool3d_backward.default(g, x), grad, x)
    if size == (1, 1, 1):
        return
    check_exact(lambda x: aten.adaptive_max_pool3d.default(x, list(size)), x)
    places = aten.adaptive_max_pool3d.default(x, list(size))[1]
    check(lambda g, x, i: aten.adaptive_max_pool3d_backward.default(g, x, i), grad, x, places)


def test_large_windows_stay_with_eager() -> None:
    lowered = lower_function(lambda x: aten.avg_pool2d.default(x, [7], [1]), (torch.randn(1, 1, 9, 9),))
    assert library_calls(lowered) == ["aten::avg_pool2d.default"]


def test_channels_last_is_kept() -> None:
    x = torch.randn(2, 3, 8, 6).to(memory_format=torch.channels_last)
    check_exact(lambda x: aten.max_pool2d_with_indices.default(x, [3], [2], [1]), x)
