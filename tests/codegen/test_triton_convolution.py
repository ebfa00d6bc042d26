"""Convolutions as Triton kernels: their values in Triton's interpreter, the text, and machine code without spills."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from fxopt.ir.region import Contraction
from fxopt.lower import Lowered, padded_images
from fxopt.lower.contractions import DIRECT, IMPLICIT, PADDED, STENCIL, STENCIL_SUMS, SUMS
from tests.codegen.padding import padded
from tests.codegen.triton_interpreter import Interpreter
from tests.lower.contracting import kept, searched
from tests.numerics import assert_closer, to_float64

pytest.importorskip("triton")

from fxopt.codegen.templates import conv_config
from fxopt.codegen.templates.conv_config import StencilConfig, SumsConfig, implicit_configs, stencil_configs
from fxopt.codegen.templates.gemm_problem import GemmConfig
from fxopt.codegen.triton import configs, print_region
from fxopt.codegen.triton_build import compile_to_text, compile_triton
from fxopt.codegen.triton_convolution import convolution_problem, print_convolution
from fxopt.errors import UnsupportedError
from fxopt.target import Target
from fxopt.tune.candidate import contraction_candidates

GOLDEN = Path(__file__).parents[1] / "golden"
TARGET = Target.cuda(90)
BF16, F16 = torch.bfloat16, torch.float16
Function = Callable[..., Any]
LABELS = (STENCIL_SUMS, SUMS, STENCIL, IMPLICIT)

SUMMED = SumsConfig(3, 8, 16, 4, 2)
STENCILS = [StencilConfig(1, 16, 8, 4), StencilConfig(4, 4, 16, 4), StencilConfig(7, 8, 32, 4)]
GEMMS = [
    GemmConfig(False, 32, 32, 16, 4, 3),
    GemmConfig(False, 64, 16, 32, 4, 3, group=1, subtile=2),
    GemmConfig(False, 32, 16, 16, 4, 3, split=3),
]


def image(*shape: int, dtype: torch.dtype = F16) -> Tensor:
    return torch.randn(*shape).to(dtype).contiguous(memory_format=torch.channels_last)


def weight(out: int, inside: int, *window: int, dtype: torch.dtype = F16) -> Tensor:
    rows, columns = window if len(window) == 2 else window * 2
    values = torch.randn(out, inside, rows, columns) / (inside * rows * columns) ** 0.5
    return values.to(dtype).contiguous(memory_format=torch.channels_last)


def column(n: int, dtype: torch.dtype = F16) -> Tensor:
    return torch.randn(n).to(dtype)


def convolution(fn: Function, *args: Tensor, labels: tuple[str, ...] = LABELS) -> tuple[Lowered, Contraction]:
    """The schedule of `fn` with the first way of `labels` that it has, and the contraction of that."""
    low = searched(fn, *args, every=True)
    for label in labels:
        steps = kept(low, label)
        found = [s for s in steps.steps if isinstance(s, Contraction)]
        if found:
            return steps, found[0]
    raise AssertionError("no convolution that a kernel of ours computes")


def run(
    server: Interpreter,
    fn: Function,
    args: tuple[Tensor, ...],
    config: StencilConfig | GemmConfig,
    *labels: str,
    unrolled: bool = False,
) -> list[Tensor]:
    """Results of `fn`, all of whose steps run as printed kernels."""
    low, _ = convolution(fn, *args, labels=labels or LABELS)
    memory = {name: padded(value) for name, value in zip(low.inputs, args, strict=True)}
    for step in low.steps:
        for name in step.writes():  # type: ignore[union-attr]
            spec = low.buffers[name]
            memory.setdefault(name, padded(torch.empty(spec.extent, dtype=spec.dtype).fill_(float("nan"))))  # type: ignore[arg-type]
        if isinstance(step, Contraction):
            own = SUMMED if step.a.transposed else config  # type: ignore[union-attr]
            printed = print_convolution(step, own, TARGET, unrolled)
        else:
            printed = print_region(step, configs(step, TARGET)[0], TARGET)  # type: ignore[arg-type]
        memory |= {s.name: torch.full((s.extent,), float("nan"), dtype=s.dtype) for s in printed.scratch}  # type: ignore[arg-type]
        for kernel in printed.kernels:
            server.run(kernel, memory)
    return [
        memory[o.name].as_strided(low.buffers[o.name].shape, low.buffers[o.name].strides, memory[o.name].storage_offset())  # type: ignore[arg-type]
        for o in low.outputs
    ]


def check(
    server: Interpreter, fn: Function, args: tuple[Tensor, ...], config: StencilConfig | GemmConfig, *labels: str
) -> None:
    """Assert that `fn` through printed kernels is as close to float64 as eager is, in eager's layout."""
    got, eager, exact = run(server, fn, args, config, *labels), _results(fn(*args)), _results(fn(*to_float64(args)))
    assert_closer(got, eager, exact)
    for g, e in zip(got, eager, strict=True):
        assert all(a == b for a, b, n in zip(g.stride(), e.stride(), g.shape, strict=True) if n > 1)


def _results(out: Any) -> list[Tensor]:
    return list(out) if isinstance(out, tuple) else [out]


def depthwise(*geometry: Any) -> Function:
    def fn(x: Tensor, w: Tensor, *bias: Tensor) -> Tensor:
        return F.silu(F.conv2d(x, w, bias[0] if bias else None, *geometry, groups=x.shape[1]))

    return fn


def dense(*geometry: Any) -> Function:
    def fn(x: Tensor, w: Tensor, *bias: Tensor) -> Tensor:
        return F.relu(F.conv2d(x, w, bias[0] if bias else None, *geometry))

    return fn


def with_residual(x: Tensor, w: Tensor, r: Tensor) -> tuple[Tensor, ...]:
    """As in ConvNeXt and MobileNet: what is computed is kept as well."""
    y = F.conv2d(x, w, None, 1, 1, groups=x.shape[1])
    return y, F.hardswish(y) + r


# In float16: Triton's interpreter multiplies the bits of bfloat16.
DEPTHWISE: dict[str, tuple[Function, tuple[Tensor, ...]]] = {
    "3x3": (depthwise(1, 1), (image(2, 19, 5, 4), weight(19, 1, 3), column(19))),
    "3x3, stride 2": (depthwise(2, 1), (image(2, 16, 7, 5), weight(16, 1, 3))),
    "5x5, stride 2": (depthwise(2, 2), (image(1, 16, 7, 6), weight(16, 1, 5), column(16))),
    "7x7": (depthwise(1, 3), (image(1, 16, 6, 4), weight(16, 1, 7), column(16))),
    "dilated": (depthwise(1, 2, 2), (image(1, 16, 7, 6), weight(16, 1, 3))),
    "of one row, uneven": (depthwise((2, 1), (0, 2), (1, 3)), (image(1, 16, 5, 12), weight(16, 1, 1, 5))),
    "no padding": (depthwise(), (image(1, 19, 6, 5), weight(19, 1, 3, 2))),
    "residual": (with_residual, (image(1, 16, 5, 4), weight(16, 1, 3), image(1, 16, 5, 4))),
    "float32": (depthwise(1, 1), (image(1, 12, 6, 5, dtype=torch.float32), weight(12, 1, 3, dtype=torch.float32))),
}
DENSE: dict[str, tuple[Function, tuple[Tensor, ...]]] = {
    "3x3": (dense(1, 1), (image(2, 32, 6, 5), weight(24, 32, 3), column(24))),
    "first layer": (dense(2, 3), (image(1, 3, 13, 11), weight(16, 3, 7), column(16))),
    "patches": (dense(4), (image(2, 3, 12, 8), weight(40, 3, 4))),
    "downsampling": (dense(2), (image(1, 16, 9, 8), weight(24, 16, 2), column(24))),
    "1x1, stride 2": (dense(2), (image(2, 48, 7, 6), weight(32, 48, 1))),
    "dilated, uneven": (dense((2, 1), (3, 1), (2, 1)), (image(1, 20, 9, 7), weight(17, 20, 3, 2))),
    "residual and result": (
        lambda x, w, r: (y := F.conv2d(x, w, None, 1, 1), F.gelu(y) + r),
        (image(1, 16, 6, 5), weight(32, 16, 3), image(1, 32, 6, 5)),
    ),
    "a part of the images, a weight by rows": (
        lambda x, w: F.relu(F.conv2d(x[1:, 16:], w.contiguous(), None, 1, 1)), (image(3, 32, 5, 6), weight(16, 16, 3)),
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", DEPTHWISE)
def test_values_of_stencils(interpreter: Interpreter, name: str) -> None:
    check(interpreter, *DEPTHWISE[name], STENCILS[1])


@pytest.fixture
def copies_pay(monkeypatch: pytest.MonkeyPatch) -> None:
    """However small images and windows are."""
    monkeypatch.setattr(padded_images, "LEAST_BYTES", 0)
    monkeypatch.setattr(padded_images, "FEWEST_GATHERED", 0)


FEW_CHANNELS: dict[str, tuple[Function, tuple[Tensor, ...]]] = {
    "first layer": (dense(2, 3), (image(2, 3, 13, 11), weight(16, 3, 7), column(16))),
    "in pairs": (dense(4), (image(2, 3, 12, 8), weight(40, 3, 4))),
    "a weight and images by rows": (
        lambda x, w: F.relu(F.conv2d(x[1:], w.contiguous(), None, (1, 2), (0, 2), (2, 1))),
        (image(2, 7, 9, 8), weight(24, 7, 3)),
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", FEW_CHANNELS)
def test_values_of_padded_images(interpreter: Interpreter, name: str, copies_pay: None) -> None:
    check(interpreter, *FEW_CHANNELS[name], GEMMS[1], PADDED)


def test_values_of_padded_images_in_boxes(interpreter: Interpreter, copies_pay: None) -> None:
    """What a row of the window sees is one pixel of a box, and zero beyond its last element: NaN right of it stays there."""
    config = GemmConfig(True, 32, 16, 32, 4, 3, subtile=2, swap=True)
    fn, (x, w, bias) = FEW_CHANNELS["first layer"]
    check(interpreter, fn, (x, w[:13], bias[:13]), config, PADDED)
    x = x.clone()
    x[:, 1, 5, 6] = float("nan")
    check(interpreter, fn, (x, w, bias), config, PADDED)


def test_boxes_of_a_padded_image_for_the_tensor_cores() -> None:
    found = searched(dense(2, 3), *shapes((64, 3, 224, 224), (64, 3, 7))[:2])
    (step,) = (s for s in kept(found, PADDED).steps if isinstance(s, Contraction))
    problem = convolution_problem(step)
    configs = conv_config.box_configs(problem, TARGET)
    assert {c.block_k for c in configs} == {32} and all(c.swap for c in configs)
    assert conv_config.is_by_rows(problem)
    for config in configs:
        (kernel,) = print_convolution(step, config, TARGET).kernels
        _, meta = compile_triton(kernel, TARGET)
        (image_map,) = meta["tensor_maps"]
        assert meta["n_spills"] == 0 and image_map["shape"] == [64, 229, 112, 28] and image_map["steps"] == [1, 2, 1, 1]
        assert image_map["strides"] == [229 * 230 * 4, 230 * 4, 8, 1]


def test_boxes_of_many_channels_in_half_precision_are_for_max_autotune() -> None:
    _, step = convolution(dense(1, 1), *shapes((1, 64, 14, 14), (64, 64, 3)))
    labels = {mode: [c.label for c in contraction_candidates(step, TARGET, mode)] for mode in ("default", "max-autotune")}
    assert any(label.startswith("tma") for label in labels["max-autotune"])
    assert labels["default"] and not any(label.startswith("tma") for label in labels["default"])


def test_pixels_of_a_padded_image_are_loaded_at_once() -> None:
    """Asynchronously, where single elements would be loaded into registers."""
    low = searched(dense(2, 3), *shapes((16, 3, 112, 112), (64, 3, 7))[:2])
    (step,) = (s for s in kept(low, PADDED).steps if isinstance(s, Contraction))
    for arch in (80, 90, 100):
        target = Target.cuda(arch)
        first = contraction_candidates(step, target, "default")[0]
        _, meta = compile_triton(first.sources[0], target)
        assert meta["n_spills"] == 0, f"{first.label}: {meta}"
    text = compile_to_text(contraction_candidates(step, TARGET, "default")[0].sources[0], TARGET, "ptx")
    assert "cp.async.ca" in text and "ld.global" not in text
    low = searched(dense(16), *shapes((16, 3, 224, 224), (768, 3, 16))[:2])
    (step,) = (s for s in kept(low, PADDED).steps if isinstance(s, Contraction))
    text = compile_to_text(contraction_candidates(step, TARGET, "default")[0].sources[0], TARGET, "ptx")
    assert "cp.async.cg" in text and "cp.async.ca" not in text, "two pixels are 16 bytes"


@pytest.mark.parametrize(("name", "config"), [*((n, GEMMS[0]) for n in DENSE), ("first layer", GEMMS[1]), ("3x3", GEMMS[1])])
def test_values_of_implicit_products(interpreter: Interpreter, name: str, config: GemmConfig) -> None:
    check(interpreter, *DENSE[name], config)


def gradients(stride: int, padding: int, dilation: int, first: bool = True, second: bool = True) -> Function:
    """Of a depthwise convolution's input (if `first`) and weight (if `second`)."""

    def fn(grad: Tensor, x: Tensor, w: Tensor) -> tuple[Tensor, ...]:
        geometry = ([stride] * 2, [padding] * 2, [dilation] * 2, False, [0, 0], x.shape[1])
        found = torch.ops.aten.convolution_backward(grad, x, w, None, *geometry, [first, second, False])
        return tuple(g for g in found if g is not None)

    return fn


GRADIENTS: dict[str, tuple[Function, tuple[Tensor, ...]]] = {
    "3x3": (gradients(1, 1, 1), (image(2, 16, 5, 4), image(2, 16, 5, 4), weight(16, 1, 3))),
    "5x3, stride 2": (gradients(2, 1, 1, False), (image(1, 16, 4, 4), image(1, 16, 9, 7), weight(16, 1, 5, 3))),
    "dilated": (gradients(1, 2, 2), (image(1, 19, 6, 5), image(1, 19, 6, 5), weight(19, 1, 3))),
}


@pytest.mark.parametrize("name", GRADIENTS)
def test_values_of_gradients(interpreter: Interpreter, name: str) -> None:
    check(interpreter, *GRADIENTS[name], STENCILS[1])


def test_values_with_weights_as_they_lie(interpreter: Interpreter) -> None:
    """Those of a gradient from the last to the first."""
    check(interpreter, *DEPTHWISE["no padding"], STENCILS[1], DIRECT)
    grad, x, w = (image(1, 16, 5, 4), image(1, 16, 5, 4), weight(16, 1, 3))
    check(interpreter, gradients(1, 1, 1, True, False), (grad, x, w), STENCILS[1], DIRECT)


@pytest.mark.parametrize("config", [STENCILS[0], STENCILS[2]], ids=str)
def test_values_of_other_stencils(interpreter: Interpreter, config: StencilConfig) -> None:
    check(interpreter, *DEPTHWISE["3x3, stride 2"], config)


def test_nan_is_kept(interpreter: Interpreter, copies_pay: None) -> None:
    """In the places that see it, and nowhere else."""
    x, w = torch.ones(1, 16, 6, 6).to(F16).contiguous(memory_format=torch.channels_last), weight(16, 1, 3)
    x[0, 3, 2, 2] = float("nan")
    fn = depthwise(1, 1)
    (got,) = run(interpreter, fn, (x, w), STENCILS[1])
    assert torch.equal(got.isnan(), fn(x, w).isnan())
    w = weight(32, 16, 3)
    (got,) = run(interpreter, dense(1, 1), (x, w), GEMMS[0])
    assert torch.equal(got.isnan(), dense(1, 1)(x, w).isnan())
    x, w = x[:, 2:5].contiguous(memory_format=torch.channels_last), weight(16, 3, 3)
    (got,) = run(interpreter, dense(2, 1), (x, w), GEMMS[0], PADDED)
    assert torch.equal(got.isnan(), dense(2, 1)(x, w).isnan()) and got.isnan().any()


def shapes(x: tuple[int, ...], w: tuple[int, ...]) -> tuple[Tensor, ...]:
    return image(*x, dtype=BF16), weight(*w, dtype=BF16), column(w[0], BF16)


def convnext(x: Tensor, w: Tensor, b: Tensor) -> Tensor:
    return F.conv2d(x, w, b, 1, 3, groups=x.shape[1])


def residual_block(x: Tensor, w: Tensor, b: Tensor) -> Tensor:
    return F.gelu(F.conv2d(x, w, b, 1, 1)) + x


def test_golden_text() -> None:
    """EXPECTTEST_ACCEPT=1 accepts a change."""
    found = [
        (convolution(depthwise(2, 1), *shapes((8, 144, 28, 28), (144, 1, 3)))[1], StencilConfig(4, 8, 64, 4)),
        (convolution(residual_block, *shapes((4, 64, 28, 28), (64, 64, 3)))[1], GemmConfig(False, 128, 64, 64, 4, 3)),
    ]
    texts = []
    for contraction, config in found:
        (kernel,) = print_convolution(contraction, config, TARGET).kernels  # type: ignore[arg-type]
        head = f"# {config}: grid {kernel.grid}, {kernel.compile_options['num_warps']} warps, buffers {kernel.buffers}"
        texts.append(f"{head}\n{kernel.text}")
    text, path = "\n\n".join(texts), GOLDEN / "triton_convolution.txt"
    if os.environ.get("EXPECTTEST_ACCEPT"):
        path.write_text(text)
    assert path.exists(), f"no golden text {path.name}: run with EXPECTTEST_ACCEPT=1"
    assert text == path.read_text()


COMPILED: dict[str, tuple[Function, tuple[Tensor, ...]]] = {
    "ConvNeXt": (convnext, shapes((4, 96, 56, 56), (96, 1, 7))),
    "EfficientNet": (depthwise(2, 2), shapes((4, 240, 28, 28), (240, 1, 5))),
    "residual block": (residual_block, shapes((16, 128, 28, 28), (128, 128, 3))),
    "first layer": (dense(2, 3), shapes((4, 3, 112, 112), (64, 3, 7))),
    "few places": (residual_block, shapes((1, 512, 7, 7), (512, 512, 3))),
}


@pytest.mark.parametrize(
    ("name", "arch"),
    [*((n, 90) for n in COMPILED), ("ConvNeXt", 80), ("residual block", 80), ("ConvNeXt", 100), ("residual block", 100)],
)
def test_the_first_candidates_compile_without_spills(name: str, arch: int) -> None:
    target = Target.cuda(arch)
    _, contraction = convolution(COMPILED[name][0], *COMPILED[name][1])
    first = contraction_candidates(contraction, target, "max-autotune")[0]  # of which none is left to the library
    for kernel in first.sources:
        cubin, meta = compile_triton(kernel, target)
        assert cubin[:4] == b"\x7fELF" and meta["n_spills"] == 0, f"{first.label}: {meta}"
        assert meta["shared"] <= target.shared_per_block


def test_values_of_parts_that_one_thread_adds_up(interpreter: Interpreter) -> None:
    args = image(2, 32, 7, 7), weight(24, 32, 3), image(2, 24, 7, 7)

    def residual(x: Tensor, w: Tensor, y: Tensor) -> Tensor:
        return F.relu(F.conv2d(x, w, None, 1, 1) + y)

    (got,) = run(interpreter, residual, args, GEMMS[2], unrolled=True)
    assert_closer(got, residual(*args), residual(*to_float64(args)))


def test_a_stencil_has_enough_programs() -> None:
    """A small image is cut into more, smaller ones, a large one into few with much in registers."""
    small, large = (convolution_problem(convolution(convnext, *shapes((n, 384, 14, 14), (384, 1, 7)))[1]) for n in (1, 64))
    few, many = (stencil_configs(p, TARGET)[0] for p in (small, large))
    assert few.rows < many.rows
    assert few.programs(small) >= TARGET.sm_count // 2


def test_blocks_lie_under_one_element_of_the_window_where_channels_are_many() -> None:
    problem = convolution_problem(convolution(dense(1, 1), *shapes((4, 96, 28, 28), (64, 96, 3)))[1])
    assert {c.block_k for c in implicit_configs(problem, TARGET)} == {32}


def test_few_places_share_the_inner_dimension() -> None:
    """Where tiles alone leave most multiprocessors idle; and not where they do not."""
    few, many = (
        contraction_candidates(convolution(residual_block, *shapes((n, 512, 7, 7), (512, 512, 3)))[1], TARGET, "default")
        for n in (1, 256)
    )
    assert "split" in few[0].label and len(few[0].sources) == 2
    assert few[1].label == f"{few[0].label} unrolled" and few[1].sources[0].text == few[0].sources[0].text
    assert not any("split" in candidate.label for candidate in many)


def test_a_common_convolution_with_nothing_after_it_has_no_candidate() -> None:
    common = convolution(lambda x, w, b: F.conv2d(x, w, b, 1, 1), *shapes((4, 96, 28, 28), (64, 96, 3)))[1]
    assert common.region.nest.stores and contraction_candidates(common, TARGET, "max-autotune")
    alone = convolution(lambda x, w: F.conv2d(x, w, None, 1, 1), *shapes((4, 96, 28, 28), (64, 96, 3))[:2])[1]
    assert not contraction_candidates(alone, TARGET, "default")
    for shape, window, stride in (((4, 3, 64, 64), (64, 3, 7), 2), ((4, 96, 28, 28), (64, 96, 2), 2)):
        other = convolution(lambda x, w, s=stride: F.conv2d(x, w, None, s), *shapes(shape, window)[:2])[1]
        assert contraction_candidates(other, TARGET, "default")


def test_what_triton_does_not_take_is_refused() -> None:
    _, contraction = convolution(dense(1, 1), *DENSE["3x3"][1])
    with pytest.raises(UnsupportedError):
        print_convolution(contraction, GEMMS[0], Target.cpu())
    with pytest.raises(UnsupportedError):
        print_convolution(replace(contraction, a=contraction.b), GEMMS[0], TARGET)
