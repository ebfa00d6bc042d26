"""Decompositions that are fxopt's own: eager's accuracy, layouts and dtypes."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch._decomp import core_aten_decompositions

from fxopt.capture import private
from fxopt.capture.decompositions import decompositions
from fxopt.journal import RECENT
from tests.numerics import assert_closer, check_compiled, to_float64

GROUP_NORM = torch.ops.aten.native_group_norm.default


def test_the_table_of_core_aten_is_torchs() -> None:
    assert private.core_decompositions().keys() == dict(core_aten_decompositions()).keys()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
@pytest.mark.parametrize("affine", [(True, True), (True, False), (False, False)])
@pytest.mark.parametrize(
    "shape", [(2, 12, 5, 3), (3, 12), (2, 12, 7), (2, 12, 2, 3, 2), (0, 12, 4)], ids=lambda s: "x".join(map(str, s))
)
def test_group_norm(shape: tuple[int, ...], affine: tuple[bool, bool], dtype: torch.dtype) -> None:
    x = torch.randn(shape).to(dtype) * 3 + 1
    layouts = [torch.contiguous_format] + ([torch.channels_last] if len(shape) == 4 else [])
    weight, bias = (torch.randn(12).to(dtype) if given else None for given in affine)
    inner = x[0, 0].numel() if shape[0] else 4
    for layout in layouts:
        args = (x.contiguous(memory_format=layout), weight, bias, shape[0], 12, inner, 3, 1e-5)
        got, want = decompositions()[GROUP_NORM](*args), GROUP_NORM(*args)
        if shape[0]:
            assert_closer(got, want, GROUP_NORM(*to_float64(args)), k=16.0 if dtype == torch.float64 else 4.0)
        for ours, theirs in zip(got, want, strict=True):
            assert (ours.shape, ours.dtype) == (theirs.shape, theirs.dtype)
        assert got[0].stride() == want[0].stride()


def test_group_norm_is_one_kernel() -> None:
    RECENT.clear()
    check_compiled(lambda x, w, b: F.silu(F.group_norm(x, 4, w, b)), torch.randn(2, 8, 6, 6), torch.randn(8), torch.randn(8))
    assert sum(len(j.kernels) for j in RECENT) == 1


def test_batch_norm_under_autocast_keeps_its_statistics_in_float32() -> None:
    """The gradient of a bias in front of it is zero but for rounding: what a coarse mean makes of it is far from that."""
    torch.manual_seed(0)
    conv, norm = torch.nn.Conv2d(3, 4, 3), torch.nn.BatchNorm2d(4)
    x = torch.randn(2, 3, 18, 18)

    def gradient(fn: Any) -> torch.Tensor:
        with torch.autocast("cpu", dtype=torch.bfloat16):
            out = fn(x)
        weights = torch.linspace(0.5, 1.5, out.numel()).to(out.dtype).view(out.shape)
        return torch.autograd.grad(out, conv.bias, weights)[0]

    def network(x: torch.Tensor) -> torch.Tensor:
        return norm(conv(x) + 3).relu()

    torch.compiler.reset()
    eager = gradient(network).abs().max()
    assert gradient(torch.compile(network, backend="fxopt")).abs().max() <= 3 * eager
