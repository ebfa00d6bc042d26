"""Convolutions whose windows lie side by side as products, with CPUs counted among the devices that want it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from fxopt.passes import disjoint_windows
from tests.numerics import assert_closer, to_float64
from tests.passes.graphs import aliasing, calls, execute, optimize


@pytest.fixture(autouse=True)
def _on_cpus_too(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(disjoint_windows, "prefers_channels_last", lambda device: True)


def half(*shape: int) -> Tensor:
    return torch.randn(shape).to(torch.bfloat16)


X, W, B = half(2, 3, 32, 48), half(24, 3, 16, 16) / 16, half(24)


def tokens(x: Tensor, w: Tensor, b: Tensor) -> Tensor:
    return F.conv2d(x, w, b, stride=16).flatten(2).transpose(1, 2) * 2


LAST = torch.channels_last
CASES: dict[str, tuple[Callable[..., Any], tuple[Tensor, ...]]] = {
    "its layout is seen": (lambda x, w: F.conv2d(x, w, stride=16).exp(), (X, W)),
    "one image": (lambda x, w, b: F.conv2d(x, w, b, stride=16).relu(), (X[:1], W, B)),
    "tokens": (tokens, (X, W, B)),
    "one window": (lambda *given: tokens(*given).sum(1), (X[:, :, :16, :16], W, B)),
    "no square": (lambda x, w: F.conv2d(x, w, stride=(16, 12)).relu(), (X, half(8, 3, 16, 12))),
    "channels-last image": (tokens, (X.to(memory_format=LAST), W, B)),
    "channels-last weight": (tokens, (X, W.to(memory_format=LAST), B)),
    "both channels-last": (tokens, (X.to(memory_format=LAST), W.to(memory_format=LAST), B)),
    "video": (lambda x, w: F.conv3d(x, w, stride=(2, 16, 16)).sum(2), (half(1, 3, 4, 32, 16), half(8, 3, 2, 16, 16))),
    "sound": (lambda x, w: F.conv1d(x, w, stride=320).mT.cumsum(1), (half(2, 1, 960), half(8, 1, 320))),
}


@pytest.mark.parametrize("name", CASES)
def test_is_a_product(name: str) -> None:
    fn, args = CASES[name]
    graph, context = optimize(fn, args, only="disjoint_windows")
    got, want = execute(graph, args), (fn(*args),)
    assert_closer(got, want, (fn(*to_float64(args)),))
    assert got[0].shape == want[0].shape and got[0].stride() == want[0].stride()
    assert aliasing(args, got) == aliasing(args, want)
    assert [r.rule for r in context.log if not r.rule.startswith("dead_code")] == ["disjoint_windows.convolution"]
    assert "convolution" not in calls(graph) and sum("mm" in name for name in calls(graph)) == 1


def test_the_image_is_copied_once_and_the_weight_never() -> None:
    for args in ((X, W, B), (X, W.to(memory_format=LAST), B)):
        graph, _ = optimize(lambda *given: tokens(*given).sum(1), args, only="disjoint_windows")
        assert calls(graph).count("clone") == 1


OTHERS: dict[str, tuple[Callable[..., Any], tuple[Tensor, ...]]] = {
    "returned": (lambda x, w: F.conv2d(x, w, stride=16), (X, W)),
    "windows overlap": (lambda x, w: F.conv2d(x, w, stride=8), (X, W)),
    "windows leave something out": (lambda x, w: F.conv2d(x, w, stride=16), (half(2, 3, 33, 48), W)),
    "padding": (lambda x, w: F.conv2d(x, w, stride=16, padding=8), (X, W)),
    "dilation": (lambda x, w: F.conv2d(x, w, stride=12, dilation=2), (half(1, 3, 24, 24), half(8, 3, 12, 12))),
    "many channels": (lambda x, w: F.conv2d(x, w, stride=16), (half(1, 8, 32, 32), half(8, 8, 16, 16))),
    "a short window": (lambda x, w: F.conv2d(x, w, stride=4), (X, half(24, 3, 4, 4))),
    "groups": (lambda x, w: F.conv2d(x, w, stride=16, groups=3), (X, half(24, 1, 16, 16))),
    "transposed": (lambda x, w: F.conv_transpose2d(x, w, stride=16), (half(1, 24, 2, 2), W)),
    "float32": (lambda x, w: F.conv2d(x, w, stride=16), (X.float(), W.float())),
}


@pytest.mark.parametrize("name", OTHERS)
def test_others_stay(name: str) -> None:
    fn, args = OTHERS[name]
    graph, context = optimize(fn, args, only="disjoint_windows")
    assert calls(graph) == ["convolution"] and context.log == []


def test_sizes_known_at_run_time_only_stay() -> None:
    graph, _ = optimize(lambda x, w: F.conv2d(x, w, stride=16).relu(), (X, W), only="disjoint_windows", dynamic=True)
    assert "convolution" in calls(graph)
