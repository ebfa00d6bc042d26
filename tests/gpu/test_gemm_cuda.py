"""Matrix product templates on a GPU: tensor maps and launches as the hardware takes them."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

pytest.importorskip("triton")

from fxopt.codegen.templates.gemm_config import plausible
from fxopt.codegen.templates.gemm_problem import GemmConfig, GemmProblem, Matrix
from fxopt.codegen.triton_build import compile_triton
from fxopt.codegen.triton_contraction import print_contraction, problem_of
from fxopt.ir.region import Contraction, SideBySide
from fxopt.journal import RECENT
from fxopt.lower.contractions import BESIDE, FUSED
from fxopt.runtime.launch import load_cubin
from fxopt.target import Target
from fxopt.tune.candidate import side_by_side_candidates
from tests.codegen.gemm_entries import entry, problem, result_shape
from tests.codegen.test_triton_contraction import projections
from tests.lower.contracting import kept, searched
from tests.lower.test_grouped_products import activated, gated
from tests.numerics import assert_closer
from tests.passes.test_merged_products import Attention

pytestmark = pytest.mark.gpu
BF16 = torch.bfloat16
BLOCKS = GemmConfig(True, 64, 128, 64, 4, 3)
CONFIGS = [
    BLOCKS,
    replace(BLOCKS, tma=False),
    replace(BLOCKS, subtile=2, programs=7, flatten=True),
    replace(BLOCKS, block_m=16, swap=True),
    replace(BLOCKS, block_m=16, block_n=32, split=4),
    replace(BLOCKS, tma=False, split=2, swap=True, block_m=32),
]


def check(p: GemmProblem, config: GemmConfig, folder: Path) -> None:
    """Two launches with operands at different addresses, each compared with float32."""
    if config.tma and not Target.current("cuda").has_tensor_maps:
        pytest.skip("this GPU has no tensor maps")
    source = entry(p, config)
    code, meta = compile_triton(source, Target.current("cuda"))
    (folder / "kernel.cubin").write_bytes(code)
    torch.cuda.synchronize()  # the context exists from here on
    launch = load_cubin(folder / "kernel.cubin", meta, 0).bind()

    def operand(m: Matrix) -> tuple[torch.Tensor, torch.Tensor]:
        memory = torch.randn(m.offset + m.extent + (p.batch - 1) * m.batch, device="cuda").to(p.dtype)
        return memory, memory.as_strided((p.batch, m.rows, m.columns), (m.batch, m.row, m.column), m.offset)

    for _ in range(2):
        memory, views = zip(*(operand(x) for x in p.matrices), strict=True)
        dtype = torch.float32 if config.split > 1 else p.dtype
        result = torch.full(result_shape(p, config), float("nan"), device="cuda", dtype=dtype)
        buffers = [memory[0], memory[1], result, *(memory[1:] if config.has_narrow_tiles else memory[2:])]
        launch(torch.cuda.current_stream().cuda_stream, *map(int, source.grid), *(b.data_ptr() for b in buffers))
        a, b, *others = (v.double() for v in views)
        expected = a @ b * (a @ others[0] + 1) if others else a @ b
        got = result.double().sum(0)
        torch.testing.assert_close(got, expected, rtol=1e-2, atol=1e-2 * expected.abs().max().item())


@pytest.mark.parametrize("config", CONFIGS, ids=str)
@pytest.mark.parametrize("layout", ["nt", "nn", "tn", "tt"])
def test_values(config: GemmConfig, layout: str, tmp_path: Path) -> None:
    check(problem(200, 328, 192, layout, batch=2, dtype=BF16, offset=8), config, tmp_path)


@pytest.mark.parametrize("config", CONFIGS[:3], ids=str)
def test_dual_products(config: GemmConfig, tmp_path: Path) -> None:
    p = problem(200, 328, 192, dtype=BF16)
    check(replace(p, c=p.b), replace(config, block_n=64), tmp_path)


@pytest.mark.parametrize("columns", [328 + 1, 256 + 4, 512 + 7, 1002])
def test_rows_of_equal_alignment(columns: int, tmp_path: Path) -> None:
    """Rows that begin at two, four and eight remainders of a vector; tiles that begin before the first column."""
    p = problem(320, columns, 192, dtype=BF16)
    config = replace(BLOCKS, subtile=2, programs=7, flatten=True, classes=p.classes)
    assert p.classes == 8 // math.gcd(columns, 8) > 1
    for changed in (
        config,
        replace(config, block_m=128, block_n=256, warps=8),
        replace(config, programs=132, flatten=False),
    ):
        check(p, changed, tmp_path)


@pytest.mark.parametrize("layout", ["nt", "nn", "tn"])
def test_a_last_round_of_narrow_tiles(layout: str, tmp_path: Path) -> None:
    config = replace(BLOCKS, subtile=2, programs=7, flatten=True)
    for tail, whole in ((2, 14), (4, 5), (2, 0)):
        check(problem(200, 328, 192, layout, batch=2, dtype=BF16), replace(config, tail=tail, whole=whole), tmp_path)


def test_an_inner_size_within_a_block(tmp_path: Path) -> None:
    for config in CONFIGS:
        check(problem(200, 328, 200, dtype=BF16), config, tmp_path)


def test_tf32(tmp_path: Path) -> None:
    p = replace(problem(256, 256, 256), precision="tf32")
    for config in [c for c in plausible(p, Target.current("cuda")) if c.stages == 3][:4]:
        check(p, config, tmp_path)


def test_tf32_is_rounded_as_the_library_rounds(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Operands that are truncated give several times the error: the bits that are cut off all pull the same way."""
    if not Target.current("cuda").has_tensor_maps:
        pytest.skip("this GPU has no tensor maps")
    monkeypatch.setattr(torch.backends.cuda.matmul, "allow_tf32", True)
    torch.manual_seed(0)
    x, w = torch.rand(512, 1024, device="cuda") + 0.5, torch.rand(512, 1024, device="cuda") + 0.5
    exact = x.double() @ w.double().t()
    p = replace(problem(512, 512, 1024), precision="tf32")
    config = next(c for c in plausible(p, Target.current("cuda")) if c.split == 1)
    code, meta = compile_triton(source := entry(p, config), Target.current("cuda"))
    (tmp_path / "kernel.cubin").write_bytes(code)
    result = torch.empty(512, 512, device="cuda")
    torch.cuda.synchronize()
    launch = load_cubin(tmp_path / "kernel.cubin", meta, 0).bind()
    launch(torch.cuda.current_stream().cuda_stream, *map(int, source.grid), *(b.data_ptr() for b in (x, w, result)))
    error, library = (float((got.double() - exact).abs().mean()) for got in (result, x @ w.t()))
    assert error <= 1.5 * library


def test_products_side_by_side(tmp_path: Path) -> None:
    """Each weight and result lies elsewhere in memory; values as close to float64 as the library's."""
    args = [torch.randn(197, 768, dtype=BF16), *(torch.randn(768, 768, dtype=BF16) / 28 for _ in range(3))]
    args += [torch.randn(768, dtype=BF16) for _ in range(2)]
    low = kept(searched(projections, *args), BESIDE)
    (step,) = [s for s in low.steps if isinstance(s, SideBySide)]
    target = Target.current("cuda")
    given = [a.cuda() for a in args]
    want, exact = projections(*given), projections(*(a.double() for a in given))
    for candidate in side_by_side_candidates(step, target, "default"):
        (source,) = candidate.sources
        code, meta = compile_triton(source, target)
        (tmp_path / "kernel.cubin").write_bytes(code)
        memory = dict(zip(low.inputs, given, strict=True)) | {
            n: torch.full_like(given[0], float("nan")) for n in step.writes()
        }
        torch.cuda.synchronize()
        launch = load_cubin(tmp_path / "kernel.cubin", meta, 0).bind()
        pointers = (memory[name].data_ptr() for name in source.buffers)
        launch(torch.cuda.current_stream().cuda_stream, *map(int, source.grid), *pointers)
        assert_closer(tuple(memory[o.name] for o in low.outputs), want, exact)


@pytest.mark.parametrize("columns", [768, 1002])
def test_a_bias_that_is_loaded_for_whole_tiles(columns: int, tmp_path: Path) -> None:
    """Rows that begin anywhere too; one load is bit for bit what several are."""

    def biased(x: torch.Tensor, w: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
        return x @ w.T + b

    target = Target.current("cuda")
    if not target.has_tensor_maps:
        pytest.skip("this GPU has no tensor maps")
    args = [torch.randn(640, 768, dtype=BF16), torch.randn(columns, 768, dtype=BF16) / 28, torch.randn(columns, dtype=BF16)]
    low = kept(searched(biased, *args), FUSED)
    (contraction,) = [s for s in low.steps if isinstance(s, Contraction)]
    given = [a.cuda() for a in args]
    classes = problem_of(contraction).classes
    config = replace(BLOCKS, subtile=2, programs=7, flatten=True, classes=classes)
    results = []
    for vectors in (False, True):
        (source,) = print_contraction(contraction, replace(config, vectors=vectors), target).kernels
        code, meta = compile_triton(source, target)
        (tmp_path / "kernel.cubin").write_bytes(code)
        (name,) = contraction.writes()
        result = torch.full((640, columns), float("nan"), device="cuda", dtype=BF16)
        memory = dict(zip(low.inputs, given, strict=True)) | {name: result}
        torch.cuda.synchronize()
        launch = load_cubin(tmp_path / "kernel.cubin", meta, 0).bind()
        pointers = (memory[name].data_ptr() for name in source.buffers)
        launch(torch.cuda.current_stream().cuda_stream, *map(int, source.grid), *pointers)
        results.append(result)
    assert torch.equal(*results)
    assert_closer(results[0], biased(*given), biased(*(a.double() for a in given)))


class Gated(torch.nn.Module):
    """A feed-forward layer as in Llama."""

    def __init__(self, size: int = 512, inner: int = 1408) -> None:
        super().__init__()
        self.gate, self.up = (torch.nn.Linear(size, inner, bias=False) for _ in range(2))
        self.down = torch.nn.Linear(inner, size, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        down: torch.Tensor = self.down(F.silu(self.gate(x)) * self.up(x))
        return x + down


@pytest.mark.parametrize("freeze", [False, True])
def test_layers_for_any_number_of_rows(freeze: bool) -> None:
    """Compiled once, with every way of each product measured; run for sizes around those of tiles."""
    torch.compiler.reset()
    model = Gated().to("cuda", BF16).eval()
    wide = copy.deepcopy(model).double()
    options = {"freeze": freeze, "strict": True, "mode": "max-autotune"}
    with torch.no_grad():
        run = torch.compile(model, backend="fxopt", options=options, dynamic=True)
        for rows in (96, 2, 127, 1000, 4097):
            x = torch.randn(2, rows, 512, device="cuda", dtype=BF16)
            assert_closer(run(x), model(x), wide(x.double()))


@pytest.mark.parametrize("rows", [16, 1000])
@pytest.mark.parametrize("layer", [activated, gated], ids=["activated", "gated"])
def test_grouped_products(layer: Callable[..., torch.Tensor], rows: int) -> None:
    """Every way measured; groups without rows, of one row, and of most."""
    if torch.cuda.get_device_capability() < (9, 0):
        pytest.skip("torch has no grouped products for this GPU")
    torch.compiler.reset()
    x = torch.randn(rows, 256, device="cuda", dtype=BF16)
    w = torch.randn(6, 384, 256, device="cuda", dtype=BF16) / 16
    run = torch.compile(layer, backend="fxopt", options={"strict": True, "mode": "max-autotune"})
    for ends in ([0, 1, 1, rows // 8, rows, rows], [rows // 6 * g for g in range(1, 6)] + [rows]):
        on_gpu = torch.tensor(ends, dtype=torch.int32, device="cuda")
        assert_closer(run(x, w, on_gpu), layer(x, w, on_gpu), layer(x.double(), w.double(), on_gpu))


def test_merged_products_are_read_in_place() -> None:
    """Attention takes columns of one product as query, key and value; a gated layer its halves."""
    torch.compiler.reset()
    model = Attention(size=512, groups=4).to("cuda", BF16).eval()
    wide, x = copy.deepcopy(model).double(), torch.randn(3, 200, 512, device="cuda", dtype=BF16)
    with torch.no_grad():
        run = torch.compile(model, backend="fxopt", options={"freeze": True, "strict": True})
        assert_closer(run(x), model(x), wide(x.double()))
    notes = [text for journal in RECENT for topic, text in journal.notes if topic == "rewrite"]
    assert any("merged_products.columns x5" in text for text in notes)
