"""Matrix product templates: values in Triton's interpreter, code for several architectures."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

pytest.importorskip("triton")

from fxopt.codegen.templates.gemm_config import configs, with_tail
from fxopt.codegen.templates.gemm_estimate import estimate
from fxopt.codegen.templates.gemm_problem import GemmConfig, GemmProblem, Matrix
from fxopt.codegen.triton_build import compile_to_text, compile_triton
from fxopt.ir.kernel import KernelSource
from fxopt.target import Target
from tests.codegen.gemm_entries import entry, problem, result_shape
from tests.codegen.triton_interpreter import Interpreter

BF16 = torch.bfloat16
POINTER, TMA = GemmConfig(False, 32, 32, 16, 4, 3), GemmConfig(True, 32, 32, 16, 4, 3)
LAYOUTS = ("nn", "nt", "tn", "tt")


def check(interpreter: Interpreter, p: GemmProblem, config: GemmConfig, source: KernelSource | None = None) -> None:
    """Run `entry` (or `source`) and compare with float64; all of the result has to be written."""
    generator = torch.Generator().manual_seed(0)

    def operand(m: Matrix) -> tuple[torch.Tensor, torch.Tensor]:
        memory = torch.randn(m.offset + m.extent + (p.batch - 1) * m.batch, generator=generator).to(p.dtype)
        return memory, memory.as_strided((p.batch, m.rows, m.columns), (m.batch, m.row, m.column), m.offset)

    memory, views = zip(*(operand(x) for x in p.matrices), strict=True)
    shape = result_shape(p, config)
    result = torch.full((torch.Size(shape).numel(),), float("nan"), dtype=torch.float32 if config.split > 1 else p.dtype)
    buffers = {**dict(zip("abc", memory, strict=False)), "result": result}
    interpreter.run(source or entry(p, config), buffers, {"m": p.m, "n": p.n, "k": p.k})
    a, b, *others = (v.double() for v in views)
    expected = a @ b * (a @ others[0] + 1) if others else a @ b
    torch.testing.assert_close(result.double().view(shape).sum(0), expected, rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_pointers_take_any_size_and_layout(interpreter: Interpreter, layout: str) -> None:
    check(interpreter, problem(41, 71, 45, layout, batch=2), POINTER)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_descriptors_take_any_layout(interpreter: Interpreter, layout: str) -> None:
    check(interpreter, problem(40, 72, 44, layout), TMA)
    check(interpreter, problem(40, 72, 48, layout, batch=2), TMA)


@pytest.mark.parametrize(
    "config",
    [
        replace(POINTER, block_n=64, subtile=4),
        replace(POINTER, block_m=16, swap=True),
        replace(POINTER, split=2),
        replace(POINTER, split=4, group=1),  # of three blocks: the last part is empty
        replace(TMA, block_m=16, swap=True),
        replace(TMA, split=4, swap=True),
        replace(TMA, block_n=64, subtile=2, programs=3, group=2),
        replace(TMA, subtile=2, programs=3, flatten=True),
    ],
    ids=str,
)
def test_forms(interpreter: Interpreter, config: GemmConfig) -> None:
    for layout in ("nt", "nn"):
        check(interpreter, problem(70, 72, 48, layout, batch=2), config)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_last_round_of_narrow_tiles(interpreter: Interpreter, layout: str) -> None:
    """After one round, several, or none; in some the last columns are beyond the matrix."""
    config = replace(TMA, subtile=2, programs=4, flatten=True)
    for tail, whole in ((2, 12), (4, 3), (2, 0)):
        check(interpreter, problem(40, 72, 48, layout, batch=2), replace(config, tail=tail, whole=whole))


def test_narrow_tiles_are_for_a_last_round_that_leaves_most_of_the_gpu_idle() -> None:
    target = Target.cuda(90)
    wide = GemmConfig(True, 128, 256, 64, 8, 4, subtile=2, programs=132, flatten=True)
    products = {n: problem(4096, n, 768, dtype=BF16) for n in (2304, 3072, 768)}  # 24 and 120 tiles are left; 96 in all
    assert {n: with_tail(p, wide, target).tail for n, p in products.items()} == {2304: 4, 3072: 1, 768: 1}
    assert with_tail(products[2304], replace(wide, flatten=False, programs=0), target).tail == 1
    found = with_tail(products[2304], wide, target)
    assert found.whole == 2 * 132
    assert estimate(products[2304], found, target) < estimate(products[2304], wide, target)
    _, meta = compile_triton(entry(products[2304], found), target)
    assert meta["n_spills"] == 0 and meta["shared"] <= wide.shared_bytes(products[2304])


@pytest.mark.parametrize(
    "config", [replace(POINTER, block_n=64, subtile=2), TMA, replace(TMA, subtile=2, programs=3)], ids=str
)
def test_dual_products(interpreter: Interpreter, config: GemmConfig) -> None:
    for layout in ("nt", "nn"):
        p = problem(40, 72, 48, layout, batch=2)
        check(interpreter, replace(p, c=replace(p.b, offset=8)), config)
    if not config.tma:
        p = problem(41, 71, 45, "nn")
        check(interpreter, replace(p, c=p.b), config)


def test_a_view_in_a_larger_buffer(interpreter: Interpreter) -> None:
    p = problem(40, 72, 48, "nt", offset=8)
    for config in (POINTER, TMA):
        check(interpreter, replace(p, a=replace(p.a, row=64)), config)
        check(interpreter, replace(p, batch=2, b=replace(p.b, batch=0), a=replace(p.a, batch=40 * 48)), config)


def test_sizes_known_at_run_time(interpreter: Interpreter) -> None:
    for layout, names in zip(LAYOUTS, ("m", "n", "k", "mnk"), strict=True):
        p = replace(problem(41, 71, 45, layout, batch=2), static=False)
        for config in (POINTER, replace(POINTER, split=2)):
            check(interpreter, p, config, entry(p, config, names))


def test_wide_offsets(interpreter: Interpreter) -> None:
    p = problem(41, 71, 45, "nn")
    source = entry(p, POINTER)
    assert "WIDE=False" in source.text and "WIDE=True" in entry(replace(p, a=replace(p.a, row=2**26)), POINTER).text
    check(interpreter, p, POINTER, replace(source, text=source.text.replace("WIDE=False", "WIDE=True")))


# --- code


def gated(p: GemmProblem) -> GemmProblem:
    return replace(p, c=p.b)


COMPILED = {
    "gated": gated(problem(2048, 14336, 4096, dtype=BF16)),
    "large": problem(4096, 4096, 4096, dtype=BF16),
    "few rows": problem(16, 4096, 4096, dtype=BF16),
}


@pytest.mark.parametrize("name", COMPILED)
@pytest.mark.parametrize("arch", [80, 90, 100])
def test_the_first_proposal_compiles_without_spills(name: str, arch: int) -> None:
    target = Target.cuda(arch)
    first = configs(COMPILED[name], target)[0]
    _, meta = compile_triton(entry(COMPILED[name], first), target)
    assert meta["n_spills"] == 0
    assert meta["shared"] <= first.shared_bytes(COMPILED[name]) <= target.shared_per_block
    assert (arch >= 90) == first.tma == ("tensor_map" in meta["parameters"])


@pytest.mark.parametrize(
    "config",
    [
        GemmConfig(True, 128, 256, 64, 8, 3, subtile=2),
        GemmConfig(False, 128, 128, 64, 8, 3),
        GemmConfig(True, 16, 64, 64, 4, 4, split=4, swap=True),
    ],
    ids=str,
)
def test_hopper_multiplies_by_warp_groups(config: GemmConfig) -> None:
    ptx = compile_to_text(entry(problem(256, 512, 512, dtype=BF16), config), Target.cuda(90), "ptx")
    assert "wgmma.mma_async" in ptx
    assert ("cp.async.bulk.tensor" in ptx) == config.tma
    assert ("cp.async.cg" in ptx) == (not config.tma)


def test_sizes_known_at_run_time_compile() -> None:
    p = replace(problem(4096, 768, 768, dtype=BF16), static=False)
    first = configs(p, Target.cuda(90))[0]
    source = entry(p, first, "m")
    _, meta = compile_triton(source, Target.cuda(90))
    assert meta["n_spills"] == 0 and meta["parameters"] == ["ptr", "ptr", "ptr", "i32"]
    assert "cp.async.cg" in compile_to_text(source, Target.cuda(90), "ptx")


def test_what_the_launcher_is_told_of_a_descriptor() -> None:
    p = problem(256, 512, 320, dtype=BF16, offset=64)
    _, meta = compile_triton(entry(p, GemmConfig(True, 128, 64, 64, 4, 2)), Target.cuda(90))
    assert meta["parameters"] == ["tensor_map", "tensor_map", "ptr"]
    bf16, swizzle_128_bytes = 9, 3  # CU_TENSOR_MAP_DATA_TYPE_BFLOAT16, CU_TENSOR_MAP_SWIZZLE_128B
    assert meta["tensor_maps"][0] == {
        "shape": [256, 320],
        "strides": [320, 1],
        "offset": 64,
        "block": [128, 64],
        "swizzle": swizzle_128_bytes,
        "itemsize": 2,
        "element_type": bf16,
    }
    assert meta["tensor_maps"][1]["shape"] == [512, 320] and meta["tensor_maps"][1]["offset"] == 0
