"""Compilation of printed kernels without a GPU: golden texts, registers, spills and the width of memory accesses."""

from __future__ import annotations

import os
import re
from pathlib import Path

import pytest
import torch

from tests.codegen import triton_nests as nests
from tests.codegen.triton_nests import BF16, F32, Case

pytest.importorskip("triton")

from fxopt.codegen.triton import TritonConfig, configs, print_region
from fxopt.codegen.triton_build import compile_to_text, compile_triton, toolchain_id
from fxopt.ir.kernel import KernelSource
from fxopt.ir.region import Region
from fxopt.target import Target

GOLDEN = Path(__file__).parents[1] / "golden"
CASES: dict[str, Case] = {
    "triton_pointwise_bf16": nests.pointwise(1 << 20, BF16),
    "triton_transposed": nests.transposed(F32, 2048, 1024),
    "triton_nhwc_add": nests.nhwc_add(),
    "triton_softmax": nests.softmax(4096, 1000, BF16),
    "triton_softmax_long": nests.softmax(512, 100_000, F32),
    "triton_layer_norm": nests.layer_norm(4096, 1024, BF16),
    "triton_layer_norm_short": nests.layer_norm(8192, 96, F32),
    "triton_sum_split": nests.reduction("sum", 4, 1 << 20, F32),
    "triton_variance_columns": nests.variance(256, 50_000),
    "triton_column_sum": nests.reduction("sum", 768, 4096, BF16, columns=True),
    "triton_column_store": nests.gelu_backward(4096, 3072, BF16),
    "triton_norm_gradients": nests.norm_gradients(8192, 1024, BF16),
    "triton_norm_gradients_short": nests.norm_gradients(1 << 17, 64, F32),
    "triton_norm_gradients_long": nests.norm_gradients(8192, 8192, BF16),
    "triton_group_sums": nests.group_totals(4096, 4, 1024, BF16),
    "triton_group_sums_short": nests.group_totals(4096, 8, 50, F32),
    "triton_argmax": nests.reduction("argmax", 64, 50257, F32),
    "triton_cat": nests.cat(),
    "triton_gather": nests.gather(),
    "triton_scatter_add": nests.scatter_add(),
    "triton_cumsum": nests.cumulative("cumsum", 1024, 512),
    "triton_in_place": nests.in_place(1 << 20),
    "triton_symbolic": nests.broadcast_symbolic(),
}


def kernels(case: Case, target: Target) -> tuple[KernelSource, ...]:
    return print_region(case.region, configs(case.region, target)[0], target).kernels


@pytest.mark.parametrize("name", CASES)
def test_golden_text(name: str) -> None:
    """EXPECTTEST_ACCEPT=1 accepts a change."""
    printed = kernels(CASES[name], Target.cuda(90))
    text = "\n".join(
        f"# grid {k.grid}, {k.compile_options['num_warps']} warps, {k.compile_options['constexprs']}\n{k.text}"
        for k in printed
    )
    path = GOLDEN / f"{name}.txt"
    if os.environ.get("EXPECTTEST_ACCEPT"):
        path.write_text(text)
    assert path.exists(), f"no golden text {path.name}: run with EXPECTTEST_ACCEPT=1"
    assert text == path.read_text()


@pytest.mark.parametrize("arch", [80, 90, 100])
@pytest.mark.parametrize("name", CASES)
def test_compiles_without_spills(name: str, arch: int) -> None:
    target = Target.cuda(arch)
    for kernel in kernels(CASES[name], target):
        cubin, meta = compile_triton(kernel, target)
        assert cubin[:4] == b"\x7fELF"
        assert 0 < meta["n_regs"] <= 255
        if not kernel.compile_options["asserts"]:  # __assertfail itself keeps a small stack frame
            assert meta["n_spills"] == 0
        assert len(meta["parameters"]) == len(kernel.buffers) + len(kernel.sizes)
        assert meta["shared"] <= target.shared_per_block


@pytest.mark.parametrize("dtype", [F32, BF16])
def test_accesses_are_sixteen_bytes_wide(dtype: torch.dtype) -> None:
    target = Target.cuda(90)
    for case in (nests.pointwise(1 << 20, dtype), nests.layer_norm(4096, 1024, dtype)):
        ptx = compile_to_text(kernels(case, target)[0], target, "ptx")
        assert re.search(r"ld\.global[.\w:]*\.v4\.b32", ptx)
        assert re.search(r"st\.global[.\w:]*\.v4\.b32", ptx)


@pytest.mark.parametrize(("dtype", "name"), [(BF16, "bf16"), (torch.float16, "f16")])
def test_rounding_takes_two_values_where_the_gpu_can(dtype: torch.dtype, name: str) -> None:
    """The conversion of one has the rate of an exponential."""
    case = nests.rounded_product(1 << 20, dtype)
    for arch in (75, 80, 90):
        target = Target.cuda(arch)
        ptx = compile_to_text(kernels(case, target)[0], target, "ptx")
        assert (f"cvt.rn.{name}x2.f32" in ptx) == (arch >= 80)
        assert arch < 80 or f"cvt.rn.{name}.f32" not in ptx


@pytest.mark.parametrize("row", [4096, 65536])
def test_bytes_do_not_spread_what_lies_beside_them(row: int) -> None:
    """Each thread takes 16 bytes of float32 and the 4 bytes of the mask that belong to them; no layout is converted."""
    target = Target.cuda(90)
    (kernel,) = kernels(nests.masked_excess(512, row), target)
    ptx = compile_to_text(kernel, target, "ptx")
    assert set(re.findall(r"(?:ld|st)\.global[.\w:]*?((?:\.v\d)?\.b\d+)", ptx)) == {".v4.b32", ".b32"}
    assert compile_triton(kernel, target)[1]["shared"] <= 4 * 32, "only what joins the warps' sums"


def test_a_sigmoid_has_no_branch() -> None:
    target = Target.cuda(90)
    ptx = compile_to_text(kernels(nests.pointwise(1 << 20, F32), target)[0], target, "ptx")
    assert "rcp.approx.ftz.f32" in ptx and "div." not in ptx and "rcp.rn" not in ptx


def test_a_step_of_running_statistics_has_no_branch() -> None:
    target = Target.cuda(90)
    part = kernels(nests.variance(256, 50_000), target)[0]
    assert "h.welford_step" in part.text
    ptx = compile_to_text(part, target, "ptx")
    assert "rcp.approx.ftz.f32" in ptx and "div.rn" not in ptx


def test_what_one_row_has_of_bytes_is_no_run() -> None:
    """Said to be one, a row at a time in a loop, Triton ended the process."""
    case, target = nests.kept_rows(1 << 16, 1024), Target.cuda(90)
    turning = next(c for c in configs(case.region, target) if c.programs and c.x_block == 1)
    (kernel,) = print_region(case.region, turning, target).kernels
    assert "max_contiguous" not in kernel.text
    assert compile_triton(kernel, target)[1]["n_spills"] == 0


@pytest.mark.parametrize("name", ["triton_column_sum", "triton_column_store", "triton_variance_columns"])
def test_column_reductions_read_whole_lines(name: str) -> None:
    """Parts of a column reduction: 128 contiguous bytes per row, 16 per thread, enough programs, every byte read once."""
    target, case = Target.cuda(90), CASES[name]
    part, join = kernels(case, target)
    itemsize = min(case.region.buffers[b].dtype.itemsize for b in case.inputs)
    assert part.compile_options["constexprs"]["XB"] * itemsize >= 128
    assert 2 * target.sm_count <= int(part.grid[0]) <= 8 * target.sm_count
    ptx = compile_to_text(part, target, "ptx")
    assert set(re.findall(r"ld\.global[.\w:]*?((?:\.v\d)?\.b\d+)", ptx)) == {".v4.b32"}
    assert part.text.count("tl.load(") == len(case.inputs)
    assert int(join.grid[0]) < 2 * target.sm_count


def test_unaligned_pointers_are_not_assumed_wide() -> None:
    target = Target.cuda(90)
    config = TritonConfig(1024, aligned=False)
    kernel = print_region(nests.pointwise(1 << 20, BF16).region, config, target).kernels[0]
    assert kernel.compile_options["aligned"] == []
    assert ".v4.b32" not in compile_to_text(kernel, target, "ptx")


def test_both_sides_of_a_transpose_are_contiguous() -> None:
    target = Target.cuda(90)
    case = nests.transposed(F32, 2048, 1024)
    kernel = print_region(case.region, TritonConfig(64, y_block=64, num_warps=8), target).kernels[0]
    ptx = compile_to_text(kernel, target, "ptx")
    assert len(re.findall(r"ld\.global[.\w:]*\.v4\.b32", ptx)) >= 2
    assert ".shared" in ptx  # the layouts meet in shared memory


def test_proposals_fit_the_work() -> None:
    target = Target.cuda(90)
    first = {name: configs(case.region, target)[0] for name, case in CASES.items()}
    assert first["triton_sum_split"].split > 1
    assert first["triton_layer_norm"].persistent
    assert first["triton_layer_norm"].r_block == 1024
    assert first["triton_layer_norm_short"].x_block > 1
    assert not first["triton_softmax_long"].persistent
    assert first["triton_transposed"].y_block >= 16
    assert all(len(configs(c.region, target)) > 1 for c in CASES.values())


def test_one_warp_may_take_turns_at_short_rows() -> None:
    target = Target.cuda(90)
    many, few, long = (nests.softmax(*shape, BF16).region for shape in ((65536, 1024), (8192, 1024), (65536, 2048)))
    (alone,) = (c for c in configs(many, target)[:5] if c.num_warps == 1)
    assert (alone.x_block, alone.programs, alone.stages) == (1, 16 * target.sm_count, 3)
    assert not any(c.programs and c.num_warps == 1 for r in (few, long) for c in configs(r, target))
    _, meta = compile_triton(print_region(many, alone, target).kernels[0], target)
    assert meta["n_regs"] <= 128 and not meta["n_spills"], "or fewer programs run at once"
    waiting = configs(nests.weighted_log_softmax(65536, 1024, BF16).region, target)[:5]
    assert alone in waiting, "a loop finds all at once, but not a row in registers"


def test_a_light_loop_of_either_width_is_proposed_beside_rows_in_registers() -> None:
    light = [str(c) for c in configs(nests.softmax(8192, 8192, BF16).region, Target.cuda(90))[2:4]]
    assert light == ["x1 r2048 looped w8", "x1 r4096 looped w16"]


@pytest.mark.parametrize("region", [nests.computed_gather_symbolic(3, 50).region, nests.plus_number(5, 100).region])
def test_sizes_of_either_width_compile(region: Region) -> None:
    target = Target.cuda(90)
    (kernel,) = print_region(region, TritonConfig(64), target).kernels
    _, meta = compile_triton(kernel, target)
    assert "i64" in meta["parameters"]


def test_toolchain_names_the_architecture_and_the_helpers() -> None:
    assert toolchain_id(Target.cuda(80)) != toolchain_id(Target.cuda(90))
    assert "triton 3" in toolchain_id(Target.cuda(90))
    assert "helpers" in toolchain_id(Target.cuda(90))
    assert "ptxas Build cuda_" in toolchain_id(Target.cuda(90))


def test_toolchain_tells_assemblers_apart_by_version(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    found = []
    for version in ("12.8", "12.9"):
        ptxas = tmp_path / f"ptxas-{version}"
        ptxas.write_text(f"#!/bin/sh\necho Build cuda_{version}\n")
        ptxas.chmod(0o755)
        monkeypatch.setenv("TRITON_PTXAS_PATH", str(ptxas))
        found.append(toolchain_id.__wrapped__(Target.cuda(90)))
    monkeypatch.setenv("TRITON_PTXAS_PATH", str(tmp_path / "missing"))
    assert found[0] != found[1]
    assert toolchain_id.__wrapped__(Target.cuda(90)) == toolchain_id(Target.cuda(90)), "Triton takes its own then"
    assert "Build cuda_12" in toolchain_id.__wrapped__(Target.cuda(100)), "Blackwell's assembler has a variable of its own"
