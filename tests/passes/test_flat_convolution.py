"""Convolutions over one dimension as images' of one row, with CPUs counted among the devices that prefer channels-last."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from fxopt.passes import channels_last, flat_convolution
from tests.numerics import assert_closer, to_float64
from tests.passes.graphs import aliasing, calls, execute, optimize

X, W, B = torch.randn(2, 16, 30), torch.randn(16, 16, 3) / 5, torch.randn(16)


@pytest.fixture(autouse=True)
def _cpus_prefer_channels_last(monkeypatch: pytest.MonkeyPatch) -> None:
    for module in (channels_last, flat_convolution):
        monkeypatch.setattr(module, "prefers_channels_last", lambda device: True)
    monkeypatch.setattr(channels_last, "convolutions_use_tf32", lambda: True)


CASES: dict[str, tuple[Callable[..., Any], tuple[Tensor, ...]]] = {
    "plain": (F.conv1d, (X, W)),
    "bias, stride, padding": (lambda x, w, b: F.conv1d(x, w, b, stride=2, padding=1), (X, W, B)),
    "dilation": (lambda x, w: F.conv1d(x, w, dilation=4, padding=2), (X, W)),
    "groups": (lambda x, w: F.conv1d(x, w, groups=4), (X, torch.randn(8, 4, 5))),
    "depthwise": (lambda x, w: F.conv1d(x, w, groups=16), (X, torch.randn(16, 1, 5))),
    "transposed": (
        lambda x, w, b: F.conv_transpose1d(x, w, b, stride=3, padding=1, output_padding=2), (X, torch.randn(16, 6, 4), B[:6])
    ),
    "a window of one": (F.conv1d, (X, torch.randn(8, 16, 1))),
    "of one image": (F.conv1d, (X[0], W)),
}  # fmt: skip


@pytest.mark.parametrize("name", CASES)
def test_has_one_row(name: str) -> None:
    fn, args = CASES[name]
    graph, context = optimize(fn, args, only="flat_convolution")
    got, want = execute(graph, args), (fn(*args),)
    assert_closer(got, want, (fn(*to_float64(args)),))
    assert got[0].shape == want[0].shape and got[0].stride() == want[0].stride()
    assert aliasing(args, got) == aliasing(args, want)
    assert [r.rule for r in context.log] == ["flat_convolution.with_one_row"]
    (node,) = [n for n in graph.gm.graph.nodes if n.op == "call_function" and "convolution" in str(n.target)]
    assert node.meta["val"].dim() == 4 and node.meta["val"].shape[2] == 1


def test_sizes_that_need_a_guard_are_left_alone() -> None:
    graph, context = optimize(F.conv1d, (X, W), only="flat_convolution", dynamic=True)
    assert calls(graph) == ["convolution"] and context.log == []
    assert_closer(execute(graph, (X, W)), (F.conv1d(X, W),), (F.conv1d(*to_float64((X, W))),))


def test_images_stay_as_they_are() -> None:
    graph, _ = optimize(F.conv2d, (torch.randn(2, 4, 9, 8), torch.randn(6, 4, 3, 3)), only="flat_convolution")
    assert calls(graph) == ["convolution"]


def test_the_layout_of_channels_spreads_over_time() -> None:
    """Whisper's stem: the second convolution reads the first one's result as it is, and tokens are rows of channels."""

    def stem(x: Tensor, a: Tensor, b: Tensor) -> Tensor:
        return F.gelu(F.conv1d(F.gelu(F.conv1d(x, a, padding=1)), b, stride=2, padding=1)).permute(0, 2, 1)

    args = (X, W, torch.randn(16, 16, 3) / 5)
    graph, context = optimize(stem, args)
    assert_closer(execute(graph, args), (stem(*args),), (stem(*to_float64(args)),))
    rules = [r.rule for r in context.log]
    assert rules.count("flat_convolution.with_one_row") == rules.count("channels_last.convolution") == 2
    first, second = (n for n in graph.gm.graph.nodes if n.op == "call_function" and "convolution" in str(n.target))
    for node in (first, second):
        assert channels_last._is_channels_last(node.meta["val"])
    (output,) = graph.gm.graph.output_node().args[0]
    assert output.meta["val"].stride() == stem(*args).stride()
