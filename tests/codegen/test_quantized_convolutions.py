"""Convolutions of 8-bit images as Triton kernels: values in Triton's interpreter, and machine code without spills."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from fxopt.ir.quantized_convolution import SCALED_CONVOLUTION
from fxopt.ir.quantized_ops import DEQUANTIZE, FLOAT8
from fxopt.ir.region import Contraction, Region
from fxopt.lower import Lowered
from fxopt.lower.contractions import FUSED, IMPLICIT, POOLED
from tests.codegen.padding import padded
from tests.codegen.triton_interpreter import Interpreter
from tests.lower.contracting import kept, searched

pytest.importorskip("triton")

from fxopt.codegen.templates.conv_config import box, box_configs, boxes
from fxopt.codegen.templates.gemm_problem import GemmConfig
from fxopt.codegen.triton import configs, print_region
from fxopt.codegen.triton_build import compile_to_text, compile_triton
from fxopt.codegen.triton_contraction import print_contraction
from fxopt.codegen.triton_convolution import convolution_problem, print_convolution
from fxopt.errors import UnsupportedError
from fxopt.target import Target
from fxopt.tune.candidate import contraction_candidates

F16, INT8 = torch.float16, torch.int8
TARGET = Target.cuda(90)
PLAIN, SPLIT, PROMOTED = (
    GemmConfig(False, 32, 32, 32, 4, 3),
    GemmConfig(False, 32, 16, 32, 4, 3, split=2),
    GemmConfig(False, 64, 32, 32, 4, 3, subtile=2, promote=True),
)
BOXES, NARROW = (
    GemmConfig(True, 32, 32, 32, 4, 3, swap=True),
    GemmConfig(True, 16, 32, 16, 4, 3, subtile=2, swap=True),
)
DIRECT, BY_ADDRESS = (GemmConfig(tma, 32, 64, 32, 2, 3, direct=8, subtile=2) for tma in (True, False))
WIDE = GemmConfig(True, 64, 128, 32, 2, 3, direct=16, subtile=2, programs=3, flatten=True)
AHEAD = replace(WIDE, block_k=64, ahead=True)
Geometry = tuple[Sequence[int], Sequence[int], Sequence[int]]
SAME: Geometry = ((1, 1), (1, 1), (1, 1))


def operands(dtype: torch.dtype, x: tuple[int, ...], w: tuple[int, ...]) -> tuple[Tensor, ...]:
    """x [N, H, W, C] as channels-last images, weight [C_out, R, S, C], their scales and a bias."""
    generator = torch.Generator().manual_seed(0)
    image, weight = (torch.randint(-100, 101, shape, generator=generator).to(dtype) for shape in (x, w))
    scales = torch.rand(w[0], generator=generator) * 0.01 - 0.002
    return image.permute(0, 3, 1, 2), weight, torch.tensor(0.01), scales, torch.randn(w[0], generator=generator)


def block(geometry: Geometry, narrow: torch.dtype = F16) -> Any:
    """A convolution, its residual, read in 8 bits, an activation, and the cast of what the next convolution reads."""

    def fn(x: Tensor, w: Tensor, scale_x: Tensor, scale_w: Tensor, bias: Tensor, residual: Tensor) -> Tensor:
        y = SCALED_CONVOLUTION(x, w, scale_x, scale_w, bias, *geometry, narrow)
        y = torch.relu(y + DEQUANTIZE(residual, scale_x, narrow))
        return (y.float() * 20.0).round().clamp(0.0, 127.0).to(INT8)

    return fn


def activated(geometry: Geometry) -> Any:
    def fn(x: Tensor, w: Tensor, scale_x: Tensor, scale_w: Tensor, bias: Tensor) -> Tensor:
        return torch.relu(SCALED_CONVOLUTION(x, w, scale_x, scale_w, bias, *geometry, F16))

    return fn


def contraction(fn: Any, *args: Tensor) -> tuple[Lowered, Contraction]:
    low = searched(fn, *args)
    for label in (POOLED, IMPLICIT, FUSED):
        steps = kept(low, label)
        found = [s for s in steps.steps if isinstance(s, Contraction)]
        if found:
            assert len(steps.steps) == 1
            return steps, found[0]
    raise AssertionError("no convolution that a kernel of ours computes")


def run(server: Interpreter, fn: Any, args: tuple[Tensor, ...], config: GemmConfig) -> Tensor:
    low, step = contraction(fn, *args)
    memory = {name: padded(value) for name, value in zip(low.inputs, args, strict=True)}
    spec = low.buffers[step.writes()[0]]
    memory[spec.name] = padded(torch.zeros(spec.extent, dtype=spec.dtype))  # type: ignore[arg-type]
    printing = print_contraction if step.a.__class__.__name__ == "Matrix" else print_convolution
    printed = printing(step, config, TARGET)
    memory |= {s.name: torch.full((s.extent,), float("nan"), dtype=s.dtype) for s in printed.scratch}  # type: ignore[arg-type]
    for kernel in printed.kernels:
        server.run(kernel, memory)
    return memory[spec.name].as_strided(spec.shape, spec.strides, memory[spec.name].storage_offset())  # type: ignore[arg-type]


CASES: dict[str, tuple[Geometry, tuple[int, ...], tuple[int, ...], GemmConfig]] = {
    "3x3": (SAME, (2, 5, 4, 32), (32, 3, 3, 32), PLAIN),
    "3x3 in parts": (SAME, (1, 5, 4, 32), (48, 3, 3, 32), SPLIT),
    "channels of no block": (SAME, (1, 4, 5, 48), (40, 3, 3, 48), PLAIN),
    "3x3, stride 2": (((2, 2), (1, 1), (1, 1)), (1, 7, 6, 32), (32, 3, 3, 32), PLAIN),
    "dilated, uneven": (((1, 2), (0, 2), (2, 1)), (1, 7, 6, 32), (32, 3, 2, 32), PLAIN),
    "1x1, stride 2": (((2, 2), (0, 0), (1, 1)), (2, 5, 6, 64), (32, 1, 1, 64), PLAIN),
    "1x1": (((1, 1), (0, 0), (1, 1)), (2, 5, 6, 64), (32, 1, 1, 64), PLAIN),
    "boxes": (SAME, (3, 5, 4, 64), (40, 3, 3, 64), BOXES),
    "boxes of few channels at a time": (SAME, (2, 6, 4, 32), (32, 3, 3, 32), NARROW),
    "boxes, stride 2": (((2, 2), (1, 1), (1, 1)), (1, 7, 6, 32), (32, 3, 3, 32), BOXES),
    "1x1, direct": (((1, 1), (0, 0), (1, 1)), (2, 5, 6, 64), (96, 1, 1, 64), DIRECT),
    "1x1, direct, persistent": (((1, 1), (0, 0), (1, 1)), (3, 5, 9, 64), (192, 1, 1, 64), WIDE),
    "1x1, direct, ahead": (((1, 1), (0, 0), (1, 1)), (3, 5, 9, 64), (192, 1, 1, 64), AHEAD),
    "1x1, direct, two blocks ahead": (((1, 1), (0, 0), (1, 1)), (3, 5, 9, 64), (192, 1, 1, 64), replace(WIDE, ahead=True)),
    "1x1, direct, by addresses": (((1, 1), (0, 0), (1, 1)), (2, 5, 6, 64), (64, 1, 1, 64), BY_ADDRESS),
    "boxes, dilated, uneven": (((1, 2), (0, 2), (2, 1)), (1, 7, 6, 32), (32, 3, 2, 32), NARROW),
}


@pytest.mark.parametrize("name", CASES)
def test_values_of_int8_are_exact(interpreter: Interpreter, name: str) -> None:
    """Sums are; what float32 scales make of them is rounded alike."""
    geometry, x, w, config = CASES[name]
    args = operands(INT8, x, w)
    fn = activated(geometry)
    torch.testing.assert_close(run(interpreter, fn, args, config), fn(*args), rtol=1e-3, atol=0.0)


def test_a_block_of_convolutions_stays_in_8_bits(interpreter: Interpreter) -> None:
    args = operands(INT8, (2, 5, 4, 32), (32, 3, 3, 32))
    residual = torch.randint(-127, 128, (2, 5, 4, 32)).to(INT8).permute(0, 3, 1, 2)
    fn = block(SAME)
    low, step = contraction(fn, *args, residual)
    touched = {step.buffers[n].dtype for n in (*step.reads(), *step.writes())}
    assert touched == {INT8, torch.float32}  # of float32: scales and bias
    got, wanted = run(interpreter, fn, (*args, residual), PLAIN), fn(*args, residual)
    assert low.buffers[step.writes()[0]].dtype == INT8
    apart = (got.int() - wanted.int()).abs()
    assert int(apart.max()) <= 1 and float(apart.float().mean()) < 0.01
    assert int(wanted.max()) > 0 and float((wanted == wanted.max()).float().mean()) < 0.9


@pytest.mark.parametrize("config", [PLAIN, BOXES, NARROW], ids=str)
def test_a_pooling_stays_in_8_bits(interpreter: Interpreter, config: GemmConfig) -> None:
    def fn(x: Tensor, w: Tensor, scale_x: Tensor, scale_w: Tensor, bias: Tensor) -> Tensor:
        y = torch.max_pool2d(torch.relu(SCALED_CONVOLUTION(x, w, scale_x, scale_w, bias, *SAME, F16)), 2)
        return (y.float() * 20.0).round().clamp(0.0, 127.0).to(INT8)

    args = operands(INT8, (2, 6, 8, 32), (32, 3, 3, 32))
    _, step = contraction(fn, *args)
    assert step.pooled and {step.buffers[n].dtype for n in (*step.reads(), *step.writes())} == {INT8, torch.float32}
    got, wanted = run(interpreter, fn, args, config), fn(*args)
    apart = (got.int() - wanted.int()).abs()
    assert int(apart.max()) <= 1 and float(apart.float().mean()) < 0.01 and 0 < int(wanted.float().median()) < 127


def test_casts_to_int8_are_torchs(interpreter: Interpreter) -> None:
    """Ties to even, bounds, infinities, zero for NaN; what is not rounded is cut off as before."""
    x = torch.cat([torch.arange(-800, 801) / 4, torch.tensor([float("inf"), float("-inf"), float("nan"), 3e38, -0.5])])

    def fn(x: Tensor) -> tuple[Tensor, ...]:
        rounded = (x.round().clamp(*bounds).to(INT8) for bounds in ((-127.0, 127.0), (-128.0, 100.0), (0.0, 127.0)))
        return (*rounded, x.clamp(-127.0, 127.0).to(INT8))

    low = searched(fn, x)
    memory = {name: x.clone() for name in low.inputs}
    for step in low.steps:
        assert isinstance(step, Region)
        memory |= {n: torch.zeros(len(x), dtype=INT8) for n in step.writes()}
        (kernel,) = print_region(step, configs(step, TARGET)[0], TARGET).kernels
        assert kernel.text.count("rounded_to_int8") == 2 and kernel.text.count("scaled_to_int8") == 1
        interpreter.run(kernel, memory)
    for output, wanted in zip(low.outputs, fn(x.nan_to_num(nan=0.0)), strict=True):
        assert torch.equal(memory[output.name], wanted)


@pytest.mark.parametrize("dtype", [torch.float32, F16])
@pytest.mark.parametrize("factor", [3.0, 200.0, 0.0, -3.0])
def test_scaled_casts_to_int8_are_torchs(interpreter: Interpreter, factor: float, dtype: torch.dtype) -> None:
    """Also of negative values and a negative factor, unless a relu was before that."""
    x, scale = (torch.arange(-800, 801) / 8).to(dtype), torch.tensor(factor)
    x = torch.cat([x, torch.tensor([float("inf"), float("-inf"), float("nan"), -0.0], dtype=dtype)])

    def scaled(x: Tensor, scale: Tensor) -> tuple[Tensor, ...]:
        y, z = x.float(), torch.relu(x).float()
        products = y * scale, y * factor, z * scale, z * factor
        return tuple(each.round().clamp(0.0, 127.0) for each in products)

    low = searched(lambda *args: tuple(each.to(INT8) for each in scaled(*args)), x, scale)
    memory = dict(zip(low.inputs, (x.clone(), scale), strict=True))
    for step in low.steps:
        assert isinstance(step, Region)
        memory |= {n: torch.zeros(len(x), dtype=INT8) for n in step.writes()}
        (kernel,) = print_region(step, configs(step, TARGET)[0], TARGET).kernels
        assert kernel.text.count("scaled_to_int8") == 4
        interpreter.run(kernel, memory)
    for output, wanted in zip(low.outputs, scaled(x, scale), strict=True):
        assert torch.equal(memory[output.name], wanted.nan_to_num(nan=0.0).to(INT8))


@pytest.mark.parametrize("config", [PLAIN, PROMOTED], ids=str)
def test_values_of_float8(interpreter: Interpreter, config: GemmConfig) -> None:
    args = operands(FLOAT8, (1, 5, 4, 32), (32, 3, 3, 32))
    fn = activated(SAME)
    torch.testing.assert_close(run(interpreter, fn, args, config), fn(*args), rtol=2e-3, atol=1e-3)


COMPILED: dict[str, tuple[Geometry, tuple[int, ...], tuple[int, ...], torch.dtype]] = {
    "3x3": (SAME, (64, 56, 56, 64), (64, 3, 3, 64), INT8),
    "3x3, many channels": (SAME, (64, 14, 14, 256), (256, 3, 3, 256), INT8),
    "1x1, stride 2": (((2, 2), (0, 0), (1, 1)), (64, 28, 28, 512), (1024, 1, 1, 512), INT8),
    "few places": (SAME, (1, 7, 7, 512), (512, 3, 3, 512), INT8),
    "float8": (SAME, (64, 14, 14, 256), (256, 3, 3, 256), FLOAT8),
}


@pytest.mark.parametrize(
    ("name", "arch"),
    [*((n, 90) for n in COMPILED), ("3x3", 80), ("3x3, many channels", 80), ("3x3", 100), ("float8", 100)],
)
def test_the_first_candidates_compile_without_spills(name: str, arch: int) -> None:
    geometry, x, w, dtype = COMPILED[name]
    target = Target.cuda(arch)
    args = operands(dtype, x, w)
    _, step = contraction(activated(geometry), *args)
    first = contraction_candidates(step, target, "default")[0]
    for kernel in first.sources:
        cubin, meta = compile_triton(kernel, target)
        assert cubin[:4] == b"\x7fELF" and meta["n_spills"] == 0, f"{first.label}: {meta}"
        assert meta["shared"] <= target.shared_per_block


@pytest.mark.parametrize(
    ("name", "geometry", "x", "w", "shape"),
    [
        ("56", SAME, (64, 56, 56, 64), (64, 3, 3, 64), (2, 8, 8)),
        ("28", ((2, 2), (1, 1), (1, 1)), (64, 56, 56, 128), (128, 3, 3, 128), (8, 4, 4)),
        ("7", SAME, (64, 7, 7, 512), (512, 3, 3, 512), (64, 1, 1)),
    ],
)
def test_boxes_go_from_memory_to_tensor_cores(
    name: str, geometry: Geometry, x: tuple[int, ...], w: tuple[int, ...], shape: tuple[int, int, int]
) -> None:
    """No box reaches beyond the places, so that no row is masked. Neither operand passes through registers: the compiler
    loads the next block's into those that products under way still read.
    """
    _, step = contraction(activated(geometry), *operands(INT8, x, w))
    problem = convolution_problem(step)
    configs = box_configs(problem, TARGET)
    assert box(problem, configs[0].block_m) == shape
    assert boxes(problem, shape) * configs[0].block_m == problem.product.m
    assert all(str(c).endswith(" swap") for c in configs)
    labels = [c.label for c in contraction_candidates(step, TARGET, "default")]
    assert {str(c) for c in configs} <= set(labels)
    for config in configs[:2]:
        (kernel,) = print_convolution(step, config, TARGET).kernels
        assert config is not configs[0] or "mask" not in kernel.text
        _, meta = compile_triton(kernel, TARGET)
        assert meta["n_spills"] == 0 and [len(m["shape"]) for m in meta["tensor_maps"]] == [4, 2]
        assert meta["tensor_maps"][0].get("steps", [1, 1, 1, 1])[1:3] == list(geometry[0])
        assert "local_load" not in compile_to_text(kernel, TARGET, "ttgir")
    with pytest.raises(UnsupportedError):
        print_convolution(step, replace(configs[0], swap=False), TARGET)


@pytest.mark.parametrize(
    ("stride", "x", "w"),
    [(2, (1, 512, 512, 64), (64, 3, 3, 64)), (8, (4, 8, 1024, 64), (64, 1, 1, 64)), (4, (1, 8, 2048, 8), (64, 4, 4, 8))],
)
def test_a_box_spans_no_more_than_a_descriptor_has(stride: int, x: tuple[int, ...], w: tuple[int, ...]) -> None:
    """256 pixels along each side, with those between the ones that it takes: the driver refuses longer ones."""
    _, step = contraction(activated(((stride, stride), (0, 0), (1, 1))), *operands(INT8, x, w))
    problem = convolution_problem(step)
    found = box_configs(problem, TARGET, limit=9)
    assert len({config.block_m for config in found}) == 3
    for config in found:
        spans = print_convolution(step, config, TARGET).kernels[0].compile_options["tensor_maps"]["b0"]
        sides = [size * step for size, step in zip(spans["block"], spans.get("steps", [1] * 4), strict=True)]
        assert max(sides) <= 256, f"{config}: {sides}"


def test_images_that_no_descriptor_has_arrive_by_addresses() -> None:
    """Pixels of 24 bytes begin at no multiple of 16, depthwise ones have a channel each, older GPUs no descriptors."""
    for x, w, target in (
        ((2, 8, 8, 24), (32, 3, 3, 24), TARGET),
        ((2, 8, 8, 32), (32, 3, 3, 32), Target.cuda(80)),
    ):
        _, step = contraction(activated(SAME), *operands(INT8, x, w))
        assert box_configs(convolution_problem(step), target) == []


def test_an_epilogue_in_8_bits_converts_one_number_an_element() -> None:
    """The sum, by an instruction of full rate. The residual, the result and its bounds take none of a quarter's rate."""
    args = operands(INT8, (64, 56, 56, 64), (256, 1, 1, 64))
    residual = torch.zeros(64, 56, 56, 256, dtype=INT8).permute(0, 3, 1, 2)
    _, step = contraction(block(((1, 1), (0, 0), (1, 1))), *args, residual)
    first, *others = contraction_candidates(step, TARGET, "default")
    text = compile_to_text(first.sources[0], TARGET, "ptx")
    conversions = set(re.findall(r"cvt\.\S+", text))
    assert {c for c in conversions if "f32" in c} == {"cvt.rn.f32.s32"}
    assert "setp.nan" not in text and "setp.num" not in text
    assert first.label.startswith("tma 128x128x64 "), "no zeros past 64 channels are multiplied"
    # Of two stages and so more programs, since epilogues wait for loads.
    more = next(c for c in others if " s2 " in c.label)
    _, meta = compile_triton(more.sources[0], TARGET)
    assert " p528 " in more.label and meta["n_spills"] == 0 and meta["n_regs"] <= 65536 // (4 * 128)


def test_patches_are_loaded_16_bytes_at_once() -> None:
    """Asynchronously: the images as well as the weight."""
    geometry, x, w, dtype = COMPILED["3x3"]
    _, step = contraction(activated(geometry), *operands(dtype, x, w))
    (kernel,) = print_convolution(step, GemmConfig(False, 64, 64, 64, 4, 4), TARGET).kernels
    text = compile_to_text(kernel, TARGET, "ttgir")
    copies = re.findall(r"async_copy_global_to_local .*contiguity = (\d+).*tensor<(\d+x\d+)x!tt.ptr<i8>, (#\w+)>", text)
    assert {bytes_ for bytes_, _, _ in copies} == {"16"} and len({layout for _, _, layout in copies}) == 2


def test_tiles_in_the_order_of_tensor_cores_pass_through_no_shared_memory() -> None:
    """Whole vectors are read and stored from the accumulators' own layout, within the registers of as many programs as the
    configuration counts on, and the residual may arrive ahead of the products.
    """
    args = operands(INT8, (64, 56, 56, 64), (256, 1, 1, 64))
    residual = torch.zeros(64, 56, 56, 256, dtype=INT8).permute(0, 3, 1, 2)
    _, step = contraction(block(((1, 1), (0, 0), (1, 1))), *args, residual)
    found = [c for c in contraction_candidates(step, TARGET, "default") if "direct" in c.label]
    plain, ahead = (next(c for c in found if ("ahead" in c.label) == wanted) for wanted in (False, True))
    text = compile_to_text(plain.sources[0], TARGET, "ptx")
    assert "st.shared" not in text and "stmatrix" not in text
    assert len(re.findall(r"ld\.global\S*\.v4\.b32", text)) >= 4 and len(re.findall(r"st\.global\S*\.v4\.b32", text)) == 4
    assert re.search(r"async_copy_global_to_local .*contiguity = 16", compile_to_text(ahead.sources[0], TARGET, "ttgir"))
    for candidate in (plain, ahead):
        _, meta = compile_triton(candidate.sources[0], TARGET)
        assert meta["n_spills"] == 0 and meta["n_regs"] <= 65536 // (2 * 256), candidate.label


def test_a_pooling_in_8_bits_compares_four_at_a_time(interpreter: Interpreter) -> None:
    """Without a byte apart from its neighbours: what is loaded outside of the image is the least one at once."""
    x = torch.randint(-128, 128, (1, 12, 12, 16)).to(INT8).permute(0, 3, 1, 2)

    def fn(x: Tensor) -> Tensor:
        return torch.nn.functional.max_pool2d(x, 3, 2, 1)

    low = searched(fn, x)
    (step,) = low.steps
    assert isinstance(step, Region)
    (kernel,) = print_region(step, configs(step, TARGET)[0], TARGET).kernels
    assert (kernel.text.count("h.larger_int8("), kernel.text.count("other=-128")) == (8, 5)
    assert "tl.where" not in kernel.text
    text = compile_to_text(kernel, TARGET, "ptx")
    assert "max.s16x2" in text and "max.s16 " not in text
    assert compile_triton(kernel, Target.cuda(80))[1]["n_spills"] == 0
    (name,) = low.inputs
    memory = {name: x.clone(), step.writes()[0]: torch.zeros(6 * 6 * 16, dtype=INT8)}
    interpreter.run(kernel, memory)
    spec = low.buffers[step.writes()[0]]
    assert torch.equal(memory[spec.name].as_strided(spec.shape, spec.strides), fn(x.float()).to(INT8))  # type: ignore[arg-type]
