"""Quantized products on a GPU: the op's library forms, every form of a compiled layer, casts to 8-bit floats."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor

pytest.importorskip("triton")

from benchmarks.quantized_products import FORMS, Case, error, exact
from fxopt.codegen.templates.weight_config import dot_configs, vector_configs
from fxopt.codegen.triton_build import compile_triton
from fxopt.codegen.triton_weights import print_vector, weight_problem
from fxopt.ir.quantized_ops import FLOAT8, LARGEST, QUANTIZE_WEIGHT, SCALED_MM
from fxopt.ir.region import Contraction
from fxopt.runtime.launch import load_cubin
from fxopt.target import Target
from tests.lower.test_row_norms import layer_of_one_row, norm_of_one_row

pytestmark = pytest.mark.gpu

CUDA = "cuda"
CASES = [
    Case("one row", 1, 256, 512, "silu-gate"),
    Case("few rows", 7, 256, 384, "gelu"),
    Case("some rows", 48, 512, 256, "residual"),
    Case("odd rows", 1031, 272, 336, "gelu"),
    Case("many rows", 2048, 2048, 1024, "residual"),
    Case("a vocabulary", 192, 256, 4106),
    Case("long float8 sums", 512, 14336, 512, "residual"),
    Case("promoted float8 sums", 128, 16384, 256, "residual"),
]
"""Of the last, sums of float8 are promoted; before, errors of sums are below a tenth of what float8 costs."""


def normal(*shape: int, scale: float = 1.0) -> Tensor:
    generator = torch.Generator(CUDA).manual_seed(sum(shape))
    return torch.empty(shape, device=CUDA, dtype=torch.bfloat16).normal_(std=scale, generator=generator)


def needs_float8(dtype: torch.dtype) -> None:
    if dtype == FLOAT8 and torch.cuda.get_device_capability() < (8, 9):
        pytest.skip("no float8 products on this GPU")


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
@pytest.mark.parametrize("form", FORMS)
def test_compiled_layers_are_as_exact_as_their_operands(form: str, case: Case) -> None:
    needs_float8(FLOAT8 if form.startswith("fp8") else torch.int8)
    if form == "int4-weight" and case.inner % 256:
        pytest.skip("the inner dimension is not in groups")
    if case.name.endswith("sums") and not form.startswith("fp8"):
        pytest.skip("only sums of float8 depend on their length")
    weight = normal(case.columns, case.inner, scale=case.inner**-0.5)
    bias, x, residual = normal(case.columns), normal(case.rows, case.inner), normal(case.rows, case.columns)
    layer = FORMS[form](case, weight, bias)
    torch._dynamo.reset()
    with torch.no_grad():
        compiled = torch.compile(layer, backend="fxopt", options={"freeze": True, "strict": True})
        for _ in range(3):  # plainly, captured, replayed
            got = compiled(x, residual)
        wanted = exact(layer, x, residual)
        assert error(got, wanted) < max(0.006, 2 * error(layer(x, residual), wanted))


@pytest.mark.parametrize("per_row", [False, True])
@pytest.mark.parametrize("out_dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("dtype", LARGEST)
@pytest.mark.parametrize("shape", [(33, 64, 48), (16, 64, 48), (5, 33, 7)])
def test_the_eager_form_is_float64s(
    shape: tuple[int, int, int], dtype: torch.dtype, out_dtype: torch.dtype, per_row: bool
) -> None:
    needs_float8(dtype)
    m, k, n = shape
    (a, rows), (b, columns) = QUANTIZE_WEIGHT(normal(m, k), dtype), QUANTIZE_WEIGHT(normal(n, k), dtype)
    bias = normal(n).to(out_dtype)
    if not per_row:
        rows, columns = rows[0], columns[0]
    got = SCALED_MM(a, b, rows, columns, bias, out_dtype)
    wanted = a.double() @ b.double().t() * (rows[:, None] if per_row else rows) * columns + bias
    assert got.dtype == out_dtype
    assert error(got, wanted) < (1e-3 if out_dtype == torch.float32 else 5e-3)


@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.float8_e5m2])
@pytest.mark.parametrize("clamped", [False, True])
def test_casts_have_torchs_bits(dtype: torch.dtype, clamped: bool) -> None:
    needs_float8(dtype)
    largest = torch.finfo(dtype).max
    around = torch.tensor([1.0, 1.02, 1.0357, 1.04, 1.0715, 1.08, 2.0], device=CUDA) * largest
    special = torch.tensor([float("inf"), float("nan"), 0.0, 2.0**-9, 2.0**-10, 2.0**-17], device=CUDA)
    x = torch.cat([around, special, torch.logspace(-6, 5, 4003, device=CUDA)])
    x = torch.cat([x, -x])

    def cast(x: Tensor) -> tuple[Tensor, Tensor]:
        stored = (x.clamp(-largest, largest) if clamped else x).to(dtype)
        return stored, stored.float() * 2

    got, want = torch.compile(cast, backend="fxopt")(x), cast(x)  # the second cast is the library's, a retreat
    alone = torch.compile(lambda x: cast(x)[0], backend="fxopt", options={"strict": True})(x)
    assert torch.equal(alone.view(torch.uint8), got[0].view(torch.uint8))
    assert torch.equal(got[0].float().nan_to_num(1e9, 2e9, -2e9), want[0].float().nan_to_num(1e9, 2e9, -2e9))
    torch.testing.assert_close(got[1], want[1], rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize(("bits", "gated"), [(4, False), (4, True), (8, False), (8, True), (16, False), (16, True)])
def test_every_kernel_of_one_row_has_the_values_of_a_norm_between_products(bits: int, gated: bool, tmp_path: Path) -> None:
    """Each configuration that is proposed, of a product with its residual and of one that computes the norm."""
    fn, args = layer_of_one_row(bits, gated, 2048, 1024, 1536)
    low, each = norm_of_one_row(fn, args, gated)
    args = [x.to(CUDA) for x in args]
    memory = {name: x.flatten().contiguous() for name, x in zip(low.inputs, args, strict=True)}
    target, stream = Target.current(CUDA), torch.cuda.current_stream().cuda_stream
    for step, want in zip(each.ways[1].steps, fn(*args), strict=True):
        assert isinstance(step, Contraction)
        (name,) = step.writes()
        problem = weight_problem(step)
        configs = [*vector_configs(problem, target, 4), *dot_configs(problem, target, 4)]
        configs = [c for c in configs if step.row is None or c.holds_row(problem)]
        assert len(configs) > 1
        for config in configs:
            (source,) = print_vector(step, config, target).kernels
            code, meta = compile_triton(source, target)
            (tmp_path / "kernel.cubin").write_bytes(code)
            launch = load_cubin(tmp_path / "kernel.cubin", meta, 0).bind()
            memory[name] = torch.full((step.buffers[name].extent,), torch.nan, dtype=torch.float16, device=CUDA)
            launch(stream, *map(int, source.grid), *(memory[b].data_ptr() for b in source.buffers))
            assert error(memory[name], want.flatten().float()) < 0.01, config
