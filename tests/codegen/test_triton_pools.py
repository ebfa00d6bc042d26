"""Convolutions with a pooling in their epilogue as Triton kernels: values in Triton's interpreter, and machine code."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from fxopt.lower import padded_images
from fxopt.lower.contractions import PADDED_POOLED, POOLED
from tests.codegen.triton_interpreter import Interpreter

pytest.importorskip("triton")

from fxopt.codegen.templates.gemm_problem import GemmConfig
from fxopt.codegen.triton_build import compile_to_text, compile_triton
from fxopt.codegen.triton_convolution import print_convolution
from fxopt.errors import UnsupportedError
from fxopt.target import Target
from fxopt.tune.candidate import contraction_candidates
from tests.codegen.test_triton_convolution import F16, check, column, convolution, image, run, shapes, weight

TARGET = Target.cuda(90)
CONFIGS = [GemmConfig(False, 32, 32, 16, 4, 3), GemmConfig(False, 64, 16, 32, 4, 3, group=1)]
BOXES = [GemmConfig(True, 32, 16, 16, 4, 3, swap=True), GemmConfig(True, 64, 32, 32, 4, 3, swap=True)]


def pooled(pool: Callable[[Tensor], Tensor], *geometry: Any) -> Callable[..., Tensor]:
    def fn(x: Tensor, w: Tensor, b: Tensor) -> Tensor:
        return pool(F.relu(F.conv2d(x, w, b, *geometry)))

    return fn


OPERANDS = (image(2, 32, 11, 6), weight(24, 32, 3), column(24))
POOLS: dict[str, Callable[..., Tensor]] = {
    "largest": pooled(lambda y: F.max_pool2d(y, 2), 1, 1),
    "mean": pooled(lambda y: F.avg_pool2d(y, 2), 1, 1),
    "rows": pooled(lambda y: F.avg_pool2d(y, (2, 1)), 1, 1),
    "columns": pooled(lambda y: F.max_pool2d(y, (1, 2)), 1, 1),
    "four": pooled(lambda y: F.max_pool2d(y, (4, 1)), 1, (1, 2)),
    "laid out anew": pooled(lambda y: F.max_pool2d(y, 2).contiguous(), 1, 1),
    "stride and dilation": pooled(lambda y: F.avg_pool2d(y, (1, 2)), (2, 1), (3, 1), (2, 1)),
}


@pytest.mark.parametrize("name", POOLS)
@pytest.mark.parametrize("config", [*CONFIGS, *BOXES], ids=str)
def test_values(interpreter: Interpreter, name: str, config: GemmConfig) -> None:
    check(interpreter, POOLS[name], OPERANDS, config, POOLED)


def test_values_of_padded_images(interpreter: Interpreter, monkeypatch: pytest.MonkeyPatch) -> None:
    """As before the first pooling of VGG, and of blocks and columns that go beyond the last."""
    monkeypatch.setattr(padded_images, "LEAST_BYTES", 0)
    monkeypatch.setattr(padded_images, "FEWEST_GATHERED", 0)
    args = image(2, 3, 7, 14), weight(20, 3, 3), column(20)
    check(interpreter, POOLS["largest"], args, CONFIGS[1], PADDED_POOLED)


def test_values_of_residuals_and_two_results(interpreter: Interpreter) -> None:
    def fn(x: Tensor, w: Tensor, r: Tensor) -> tuple[Tensor, ...]:
        y = F.max_pool2d(F.relu(F.conv2d(x, w) + r), 2)
        return y, y.sigmoid() - 1

    check(interpreter, fn, (image(2, 16, 6, 8), weight(24, 16, 1), image(2, 24, 6, 8)), CONFIGS[0], POOLED)


@pytest.mark.parametrize("config", [CONFIGS[0], BOXES[1]], ids=str)
def test_values_of_what_is_stored_as_well(interpreter: Interpreter, config: GemmConfig) -> None:
    def fn(x: Tensor, w: Tensor, b: Tensor) -> tuple[Tensor, ...]:
        y = F.relu(F.conv2d(x, w, b, 1, 1))
        return y, F.max_pool2d(y, 2)

    check(interpreter, fn, (image(2, 32, 10, 6), *OPERANDS[1:]), config, POOLED)


@pytest.mark.parametrize("config", [CONFIGS[0], BOXES[1]], ids=str)
def test_nan_and_infinity_are_eagers(interpreter: Interpreter, config: GemmConfig) -> None:
    x, w, b = torch.ones(1, 32, 8, 8).to(F16).contiguous(memory_format=torch.channels_last), weight(24, 32, 1), column(24)
    x[0, :, 0, 1], x[0, 3, 5, 4] = -65504.0, float("nan")
    w[3], w[4, 3] = 1.0, 0.0  # everything under a window, whose sum overflows; zero times NaN
    x[0, :, 6:, 6:] = -65504.0
    for pool in (F.max_pool2d, F.avg_pool2d):

        def fn(x: Tensor, w: Tensor, b: Tensor, pool: Callable[..., Tensor] = pool) -> Tensor:
            return pool(F.conv2d(x, w, b), 2)

        (got,), eager = run(interpreter, fn, (x, w, b), config, POOLED), fn(x, w, b)
        assert eager.isnan().any() and eager.isneginf().any()
        assert torch.equal(got.isnan(), eager.isnan()) and torch.equal(got[:, 3].isneginf(), eager[:, 3].isneginf())


def vgg(x: Tensor, w: Tensor, b: Tensor) -> Tensor:
    return F.max_pool2d(F.relu(F.conv2d(x, w, b, 1, 1)), 2)


def transition(x: Tensor, w: Tensor, b: Tensor) -> Tensor:
    """Between DenseNet's blocks."""
    return F.avg_pool2d(F.conv2d(x, w, b), 2, 2)


COMPILED: dict[str, tuple[Callable[..., Tensor], tuple[Tensor, ...]]] = {
    "few channels": (vgg, shapes((4, 64, 56, 56), (64, 64, 3))),
    "many channels": (vgg, shapes((4, 256, 28, 28), (256, 256, 3))),
    "transition": (transition, shapes((4, 256, 28, 28), (128, 256, 1))),
}


@pytest.mark.parametrize("arch", [80, 90, 100])
@pytest.mark.parametrize("name", COMPILED)
def test_candidates_compile_without_spills(name: str, arch: int) -> None:
    target = Target.cuda(arch)
    _, contraction = convolution(COMPILED[name][0], *COMPILED[name][1], labels=(POOLED,))
    found = contraction_candidates(contraction, target, "default")
    assert found and any(c.label.startswith("tma") for c in found) == target.is_hopper
    for candidate in found[:1] + [c for c in found if c.label.startswith("tma")][:2]:
        for kernel in candidate.sources:
            cubin, meta = compile_triton(kernel, target)
            assert cubin[:4] == b"\x7fELF" and meta["n_spills"] == 0, f"{candidate.label}: {meta}"
            assert meta["shared"] <= target.shared_per_block


def test_one_thread_has_all_places_of_a_pool() -> None:
    """Nothing is exchanged before the pooling; after it the result is, rounded, as it is stored."""
    _, contraction = convolution(vgg, *shapes((4, 64, 56, 56), (64, 64, 3)), labels=(POOLED,))
    for config in (GemmConfig(False, 128, 64, 64, 4, 3), GemmConfig(True, 128, 64, 64, 4, 3, swap=True)):
        (kernel,) = print_convolution(contraction, config, TARGET).kernels
        after = compile_to_text(kernel, TARGET, "ttgir").rpartition("scf.yield")[2]
        moved = [line for line in after.splitlines() if "ttg.convert_layout" in line and "x64xf32" in line]
        assert "tt.split" in after and not moved


def test_parts_of_the_inner_dimension_are_refused() -> None:
    _, contraction = convolution(vgg, *shapes((1, 64, 8, 8), (64, 64, 3)), labels=(POOLED,))
    assert not any("split" in c.label for c in contraction_candidates(contraction, TARGET, "max-autotune"))
    with pytest.raises(UnsupportedError):
        print_convolution(contraction, GemmConfig(False, 32, 32, 16, 4, 3, split=2), TARGET)
