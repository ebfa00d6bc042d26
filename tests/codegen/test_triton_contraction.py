"""Contractions as Triton kernels: their values in Triton's interpreter, the text, and machine code without spills."""

from __future__ import annotations

import functools
import math
import os
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from fxopt.ir.exprs import Sym, symbol
from fxopt.ir.loops import Load, transform
from fxopt.ir.region import Contraction, Region, SideBySide
from fxopt.lower.contractions import BESIDE, FUSED, TWO
from fxopt.lower.parts_for_reader import PARTS
from tests.codegen.padding import padded
from tests.codegen.triton_interpreter import Interpreter
from tests.lower.contracting import alternatives, fused, kept, searched, searched_for_any
from tests.lower.interpreter import sizes_of
from tests.lower.test_grouped_products import activated, gated
from tests.numerics import assert_closer, to_float64

pytest.importorskip("triton")

from fxopt.codegen import triton_block
from fxopt.codegen.templates.gemm_config import configs
from fxopt.codegen.templates.gemm_problem import GemmConfig, GemmProblem
from fxopt.codegen.triton_build import compile_to_text, compile_triton
from fxopt.codegen.triton_contraction import print_contraction, print_side_by_side, problem_of, with_room, with_vectors
from fxopt.errors import UnsupportedError
from fxopt.target import Target
from fxopt.tune.candidate import contraction_candidates, side_by_side_candidates, triton_candidates

GOLDEN = Path(__file__).parents[1] / "golden"
TARGET = Target.cuda(90)
F = torch.nn.functional
BF16, F16, F32 = torch.bfloat16, torch.float16, torch.float32
POINTER = GemmConfig(False, 32, 32, 16, 4, 3)
TMA = replace(POINTER, tma=True)
CONFIGS = [
    POINTER,
    replace(POINTER, group=1, subtile=2),
    replace(POINTER, swap=True),
    replace(POINTER, split=3),
    replace(POINTER, split=8, swap=True),
    TMA,
    replace(TMA, swap=True, subtile=2),
    replace(TMA, programs=3),
    replace(TMA, programs=3, flatten=True, subtile=2),
    replace(TMA, split=2),
    replace(TMA, split=8, swap=True),
]


def rand(*shape: int, dtype: torch.dtype = F16) -> torch.Tensor:
    return torch.randn(shape, dtype=dtype)


def run(
    server: Interpreter, fn: Callable[..., Any], args: tuple[torch.Tensor, ...], config: GemmConfig, way: str = FUSED
) -> list[torch.Tensor]:
    """Results of `fn` and its arguments afterwards; `fn` has to be one contraction, which runs as printed kernels."""
    low = kept(searched(fn, *args), way)
    (contraction,) = low.steps
    assert isinstance(contraction, Contraction | SideBySide)
    print_one = print_side_by_side if isinstance(contraction, SideBySide) else print_contraction
    printed = print_one(contraction, config, TARGET)  # type: ignore[operator]
    memory = {name: padded(value) for name, value in zip(low.inputs, args, strict=True)}
    specs = [low.buffers[n] for n in contraction.writes() if n not in memory] + list(printed.scratch)
    for spec in specs:
        memory[spec.name] = padded(torch.empty(spec.extent, dtype=spec.dtype).fill_(float("nan")))  # type: ignore[arg-type]
    for kernel in printed.kernels:
        server.run(kernel, memory)

    def result(name: str) -> torch.Tensor:
        spec = low.buffers[name]
        return memory[name].as_strided(spec.shape, spec.strides, memory[name].storage_offset())  # type: ignore[arg-type]

    return [*(result(o.name) for o in low.outputs if o is not None), *(result(n) for n in low.inputs)]


def check(
    server: Interpreter, fn: Callable[..., Any], args: tuple[torch.Tensor, ...], config: GemmConfig, way: str = FUSED
) -> None:
    """Assert that `fn` through printed kernels is as close to float64 as eager is."""
    got = run(server, fn, args, config, way)
    eager, exact = ([*_results(fn, own), *own] for own in ([a.clone() for a in args], list(to_float64(args))))
    assert_closer(got, eager, exact)


def _results(fn: Callable[..., Any], args: list[torch.Tensor]) -> list[torch.Tensor]:
    out = fn(*args)
    return [] if out is None else list(out) if isinstance(out, tuple) else [out]


def linear_gelu(x: torch.Tensor, w: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    return F.gelu(F.linear(x, w, b))


def with_dropout(x: torch.Tensor, w: torch.Tensor, y: torch.Tensor, seed: torch.Tensor) -> torch.Tensor:
    h = x @ w
    keep = torch.ops.fxopt.rand(seed + 7, list(h.shape)) >= 0.25
    return y + torch.where(keep, h * (1 / 0.75), torch.zeros([], dtype=h.dtype))


def several(x: torch.Tensor, w: torch.Tensor) -> tuple[torch.Tensor, ...]:
    h = x @ w
    return h, torch.relu(h), h.float()


def own_operand(x: torch.Tensor, w: torch.Tensor) -> torch.Tensor:
    return x + torch.relu(x @ w)


def added_to(y: torch.Tensor, x: torch.Tensor, w: torch.Tensor) -> None:
    y.add_(x @ w)


def part_of_qkv(qkv: torch.Tensor, w: torch.Tensor) -> torch.Tensor:
    return torch.tanh(qkv.chunk(3, dim=1)[1] @ w)


def heads(x: torch.Tensor, w: torch.Tensor) -> torch.Tensor:
    return (F.linear(x, w).view(2, 35, 4, 16).permute(0, 2, 1, 3) * 0.5).contiguous()


# All in float16: Triton's interpreter multiplies the bits of bfloat16.
M, K, N = 38, 40, 56  # no block divides any of them; rows of whole sixteen bytes, as tensor maps ask for
FUNCTIONS: dict[str, tuple[Callable[..., Any], tuple[torch.Tensor, ...]]] = {
    "linear": (linear_gelu, (rand(M, K), rand(N, K), rand(N))),
    "whole blocks": (lambda x, w: torch.relu(x @ w), (rand(64, 48), rand(48, 32))),
    "left transposed": (lambda x, w: torch.relu(x.T @ w), (rand(K, 72), rand(K, N))),
    "dropout": (with_dropout, (rand(M, K), rand(K, N), rand(M, N), torch.tensor(99))),
    "several": (several, (rand(M, K), rand(K, N))),
    "own operand": (own_operand, (rand(M, N), rand(N, N))),
    "in place": (added_to, (rand(M, N), rand(M, K), rand(K, N))),
    "part of QKV": (part_of_qkv, (rand(M, 3 * K), rand(K, N))),
    "bmm": (lambda x, w: torch.tanh(torch.bmm(x, w)), (rand(3, M, 48), rand(3, 48, N))),
    "bmm transposed": (lambda c, x, w: torch.tanh(torch.baddbmm(c, x, w.mT)), (rand(3, 1, N), rand(3, M, K), rand(3, N, K))),
    "one weight for all": (lambda x, w: torch.relu(torch.bmm(x, w.expand(3, 48, N))), (rand(3, M, 48), rand(48, N))),
    "heads": (heads, (rand(2, 35, K), rand(64, K))),
    "columns of addends": (lambda c, x, w: torch.relu(torch.addmm(c, x, w)), (rand(M, 1), rand(M, K), rand(K, N))),
}


def swiglu(x: torch.Tensor, gate: torch.Tensor, up: torch.Tensor) -> torch.Tensor:
    return F.silu(x @ gate) * (x @ up)


def merged(x: torch.Tensor, w: torch.Tensor, *bias: torch.Tensor) -> torch.Tensor:
    one, two = F.linear(x, w, *bias).chunk(2, dim=-1)
    return F.gelu(one) * two


def kept_too(x: torch.Tensor, gate: torch.Tensor, up: torch.Tensor) -> tuple[torch.Tensor, ...]:
    g, u = x @ gate.T, x @ up.T
    return g, u, F.relu(g) * u


GATED: dict[str, tuple[Callable[..., Any], tuple[torch.Tensor, ...]]] = {
    "swiglu": (swiglu, (rand(M, K), rand(K, N), rand(K, N))),
    "merged": (merged, (rand(M, K), rand(2 * N, K))),
    "merged, bias": (merged, (rand(M, K), rand(2 * N, K), rand(2 * N))),
    "one row": (merged, (rand(1, K), rand(2 * N, K))),
    "products kept": (kept_too, (rand(M, K), rand(N, K), rand(N, K))),
    "batches": (lambda x, v, w: torch.sigmoid(x @ v) * (x @ w), (rand(3, M, 48), rand(3, 48, N), rand(3, 48, N))),
}


@pytest.mark.parametrize("name", FUNCTIONS)
def test_values(interpreter: Interpreter, name: str) -> None:
    """Each through pointers, transposed and in parts, and through tensor maps with an epilogue in parts."""
    for config in (CONFIGS[4], CONFIGS[8]):
        check(interpreter, *FUNCTIONS[name], config)


@pytest.mark.parametrize("name", GATED)
def test_values_of_two_products(interpreter: Interpreter, name: str) -> None:
    for config in (POINTER, CONFIGS[1], TMA, CONFIGS[8]):
        check(interpreter, *GATED[name], config, TWO)


def test_values_of_two_products_at_odd_sizes(interpreter: Interpreter) -> None:
    """Halves that no tensor map describes, and that begin inside a block."""
    for args in ((rand(37, 29), rand(82, 29)), (rand(1, 29), rand(82, 29))):
        check(interpreter, merged, args, POINTER, TWO)


@pytest.mark.parametrize("config", CONFIGS, ids=str)
def test_values_in_every_configuration(interpreter: Interpreter, config: GemmConfig) -> None:
    check(interpreter, *FUNCTIONS["linear"], config)


def vocabulary(x: torch.Tensor, w: torch.Tensor, b: torch.Tensor, y: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    logits = F.linear(x, w, b) * 2 + y
    return logits, y > 0


@pytest.mark.parametrize("columns", [67, 74, 76, 97], ids=str)
def test_values_of_rows_of_equal_alignment(interpreter: Interpreter, columns: int) -> None:
    """Rows that begin at one, two, four and eight remainders of a vector, some of which no tile has."""
    args = rand(80, 32), rand(columns, 32), rand(columns), rand(80, columns)
    problem = problem_of(a_contraction(linear_gelu, *args[:3]))
    config = replace(TMA, classes=problem.classes, programs=3, flatten=True, subtile=2)
    assert problem.classes == 8 // math.gcd(8, columns)
    check(interpreter, linear_gelu, args[:3], replace(config, vectors=True))
    check(interpreter, vocabulary, args, replace(config, classes=problem_of(a_contraction(vocabulary, *args)).classes))


def test_rows_of_equal_alignment_store_whole_vectors() -> None:
    x, w, b = (rand(*shape, dtype=BF16) for shape in ((2048, 256), (1001, 256), (1001,)))
    contraction = a_contraction(linear_gelu, x, w, b)
    aligned, *_ = configs(problem_of(contraction), TARGET, limit=1)
    assert aligned.classes == 8
    (kernel,) = print_contraction(contraction, aligned, TARGET).kernels
    ptx = compile_to_text(kernel, TARGET, "ptx")
    assert ptx.count("st.global.v4.b32") == aligned.block_m * aligned.block_n // (aligned.warps * 32 * 8)
    assert compile_triton(kernel, TARGET)[1]["n_spills"] == 0


def scaled(
    x: torch.Tensor, w: torch.Tensor, one: torch.Tensor, rows: torch.Tensor, columns: torch.Tensor, b: torch.Tensor
) -> torch.Tensor:
    """Factors for everything, for rows and for columns, and a bias in float32, which no longer fits."""
    return (torch.relu(x @ w) * one * rows * columns + b).half()


VECTORS: dict[str, tuple[Callable[..., Any], tuple[torch.Tensor, ...]]] = {
    "factors": (scaled, (rand(M, K), rand(K, N), rand(1), rand(M, 1), rand(N), rand(N, dtype=F32))),
    "batches": (lambda x, w, b: torch.tanh(torch.bmm(x, w) + b), (rand(3, M, 48), rand(3, 48, N), rand(3, 1, N))),
    **{name: FUNCTIONS[name] for name in ("linear", "columns of addends")},
}


@pytest.mark.parametrize("name", VECTORS)
def test_values_of_vectors_that_are_loaded_for_whole_tiles(interpreter: Interpreter, name: str) -> None:
    for config in (
        replace(POINTER, subtile=4, swap=True, vectors=True),
        replace(TMA, subtile=2, programs=3, flatten=True, vectors=True),
        replace(TMA, subtile=2, programs=3, flatten=True, vectors=True, tail=2, whole=2),
    ):
        check(interpreter, *VECTORS[name], config)


@pytest.mark.parametrize(
    ("columns", "block", "warps", "beyond"), [(128, 64, 4, True), (128, 128, 4, False), (160, 128, 4, True)]
)
def test_vectors_end_where_the_columns_do(
    interpreter: Interpreter, columns: int, block: int, warps: int, beyond: bool
) -> None:
    """Also those of a last tile that has fewer columns than there are threads, each of which loads one."""
    args = rand(M, K), rand(columns, K), rand(columns)
    for config in (replace(POINTER, block_n=block, warps=warps, vectors=True), replace(TMA, block_n=block, vectors=True)):
        (kernel,) = print_contraction(a_contraction(linear_gelu, *args), config, TARGET).kernels
        (load,) = (line for line in kernel.text.split("def epilogue")[0].splitlines() if "tl.load" in line)
        assert ("x_mask" in load) == beyond, load
        check(interpreter, linear_gelu, args, config)


def test_vectors_with_wide_indices(interpreter: Interpreter, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(triton_block, "int32_limits", lambda region, tiling: None)
    check(interpreter, *VECTORS["batches"], replace(POINTER, subtile=2, vectors=True))


@pytest.mark.parametrize("columns", [2304, 30522], ids=["projections", "vocabulary"])
def test_a_bias_is_loaded_once_for_a_tile(columns: int) -> None:
    """One element a thread, not all that the thread adds, one by one; tiles at the ends of rows excepted."""
    x, w, b = (rand(*shape, dtype=BF16) for shape in ((4096, 768), (columns, 768), (columns,)))
    contraction = a_contraction(lambda x, w, b: x @ w.T + b, x, w, b)
    proposed = contraction_candidates(contraction, TARGET, "default")
    assert proposed and all("vectors" in c.label for c in proposed)
    (kernel,) = proposed[0].sources
    inside, *edge = kernel.text.split("def edge")
    text = "def edge".join([inside, *(e.replace("tl.load(b3 + x, x_mask)", "0.0 * x") for e in edge)])
    assert compile_to_text(replace(kernel, text=text), TARGET, "ptx").count("ld.global") == 1


def test_vectors_are_whatever_varies_along_one_dimension_and_fits() -> None:
    """Not what the epilogue writes, nor what is of the result's size; a bias in float32 beside another one is too much."""
    contraction = a_contraction(scaled, *VECTORS["factors"][1])
    loads = triton_block.loads_for_tiles(contraction.region, contraction.axes, contraction.products)
    assert [contraction.buffers[n.buffer].shape for n in loads] == [(1,), (M, 1), (N,)]
    for fn, args in (FUNCTIONS["in place"], FUNCTIONS["several"], FUNCTIONS["own operand"]):
        assert not with_vectors(a_contraction(fn, *args), TMA).vectors


def test_vectors_are_loaded_for_whole_tiles_where_that_pays() -> None:
    many, few = ((rand(m, 768), rand(3072, 768), rand(3072)) for m in (128, 64))
    biased, gelu = a_contraction(lambda x, w, b: x @ w.T + b, *many), a_contraction(linear_gelu, *many)
    wide = replace(TMA, warps=8)
    assert with_vectors(biased, TMA).vectors and with_vectors(gelu, wide).vectors
    assert not with_vectors(gelu, TMA).vectors and not with_vectors(biased, replace(TMA, split=2)).vectors
    assert not with_vectors(a_contraction(linear_gelu, *few), wide).vectors


def test_values_of_parts_that_one_thread_adds_up(interpreter: Interpreter) -> None:
    fn, args = FUNCTIONS["linear"]
    low = kept(searched(fn, *args), FUSED)
    (contraction,) = low.steps
    assert isinstance(contraction, Contraction)
    printed = print_contraction(contraction, replace(POINTER, split=3), TARGET, unrolled=True)
    assert "tl.sum" not in printed.kernels[1].text
    memory = {name: padded(value) for name, value in zip(low.inputs, args, strict=True)}
    (name,) = contraction.writes()
    memory |= {name: padded(torch.full((M * N,), float("nan"), dtype=F16))}
    memory |= {s.name: padded(torch.full((int(s.extent),), float("nan"))) for s in printed.scratch}
    for kernel in printed.kernels:
        interpreter.run(kernel, memory)
    assert_closer(memory[name].view(M, N), fn(*args), fn(*to_float64(args)))


@pytest.mark.parametrize("config", [c for c in CONFIGS if not c.tma], ids=str)
def test_values_at_odd_sizes_and_strides(interpreter: Interpreter, config: GemmConfig) -> None:
    """What no tensor map describes: rows of odd lengths, and columns that are apart."""
    check(interpreter, linear_gelu, (rand(37, 29), rand(41, 29), rand(41)), config)
    check(interpreter, lambda x, w: torch.relu(x[:, 3:32] @ w[:, ::2]), (rand(37, 33), rand(29, 82)), config)
    check(interpreter, lambda x, w: torch.relu(x.T @ w.T), (rand(29, 37), rand(41, 29)), config)


@pytest.mark.parametrize("config", [POINTER, replace(POINTER, split=2)], ids=str)
def test_values_with_wide_indices(interpreter: Interpreter, config: GemmConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    """The code for memory beyond 2**31 elements, on less."""
    monkeypatch.setattr(GemmProblem, "wide", True)
    monkeypatch.setattr(triton_block, "int32_limits", lambda region, tiling: None)
    for name in ("dropout", "bmm transposed"):
        check(interpreter, *FUNCTIONS[name], config)


def sequences(x: torch.Tensor, w: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    return F.gelu(x @ w.T + b)


@pytest.mark.parametrize("way", [FUSED, TWO])
def test_values_for_any_number_of_rows(interpreter: Interpreter, way: str) -> None:
    """One kernel, run for other numbers than those of tracing; two sizes of which the rows are the product."""
    config = replace(POINTER, subtile=2)
    fn, args = (
        (sequences, (rand(3, 20, 24), rand(40, 24), rand(40))) if way == FUSED else (merged, (rand(60, 24), rand(80, 24)))
    )
    low = kept(searched_for_any(fn, args, {(0, 0), (0, 1)} if way == FUSED else {(0, 0)}), way)
    (contraction,) = [s for s in low.steps if isinstance(s, Contraction)]
    (kernel,) = print_contraction(contraction, config, TARGET).kernels
    for shape in ((3, 20), (2, 33), (1, 7)) if way == FUSED else ((60,), (33,), (2,)):
        x = rand(*shape, 24)
        own = (x, *args[1:])
        sizes = sizes_of(low.buffers, dict(zip(low.inputs, own, strict=True)))
        memory = {name: padded(value) for name, value in zip(low.inputs, own, strict=True)}
        (name,) = contraction.writes()
        memory[name] = padded(torch.full((x[..., 0].numel() * 40,), float("nan"), dtype=F16))
        interpreter.run(kernel, memory, sizes)
        assert_closer(memory[name].view(*shape, 40), fn(*own), fn(*to_float64(own)))


def test_a_product_of_any_number_of_rows_is_whole_and_through_pointers() -> None:
    low = searched_for_any(linear_gelu, (rand(64, 24), rand(40, 24), rand(40)), {(0, 0)})
    (contraction,) = [s for s in kept(low, FUSED).steps if isinstance(s, Contraction)]
    assert not any(c.tma for c in configs(problem_of(contraction), TARGET))
    for config in (TMA, replace(POINTER, split=2)):
        with pytest.raises(UnsupportedError):
            print_contraction(contraction, config, TARGET)


def test_what_may_win_for_any_number_of_rows_wins_for_each() -> None:
    """By the cost model: a gated layer of a large model does; GELU after a short product loses where there are many rows."""
    args = rand(60, 4096, dtype=BF16), rand(2 * 14336, 4096, dtype=BF16)
    (gated,) = [s for s in kept(searched_for_any(merged, args, {(0, 0)}), TWO).steps if isinstance(s, Contraction)]
    proposed = contraction_candidates(gated, TARGET, "default")
    assert 1 <= len(proposed) <= 3
    (kernel,) = proposed[0].sources
    _, meta = compile_triton(kernel, TARGET)
    assert meta["n_spills"] == 0
    short = searched_for_any(linear_gelu, of(60, 768, 3072)[:3], {(0, 0)})
    (contraction,) = [s for s in kept(short, FUSED).steps if isinstance(s, Contraction)]
    assert contraction_candidates(contraction, TARGET, "default") == []
    assert contraction_candidates(contraction, TARGET, "max-autotune")


def projections(
    x: torch.Tensor, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, b: torch.Tensor, c: torch.Tensor
) -> tuple[torch.Tensor, ...]:
    return F.linear(x, q, b), x @ k.T, F.linear(x, v, c)


@pytest.mark.parametrize("config", [c for c in CONFIGS if c.split == 1 and not c.programs], ids=str)
def test_values_side_by_side(interpreter: Interpreter, config: GemmConfig) -> None:
    """Each part has its own weight, bias and result; sizes that no block divides."""
    args = (rand(70, K), rand(N, K), rand(N, K), rand(N, K), rand(N), rand(N))
    check(interpreter, projections, args, config, BESIDE)


def test_values_side_by_side_of_weights_by_row(interpreter: Interpreter) -> None:
    args = (rand(70, K), rand(K, N), rand(K, N))
    for config in (POINTER, TMA):
        check(interpreter, lambda x, v, w: (x @ v, x @ w), args, config, BESIDE)


@pytest.mark.parametrize("rows", [128, 197])
def test_side_by_side_candidates_compile_without_spills(rows: int) -> None:
    """Projections of BERT-base and ViT-B at batch 1, whose three products each leave most multiprocessors idle."""
    empty = functools.partial(torch.empty, dtype=BF16)
    weights = [empty(768, 768) for _ in range(3)]
    low = kept(searched(projections, empty(rows, 768), *weights, empty(768), empty(768)), BESIDE)
    (step,) = [s for s in low.steps if isinstance(s, SideBySide)]
    proposed = side_by_side_candidates(step, TARGET, "default")
    assert 1 <= len(proposed) <= 3
    (kernel,) = proposed[0].sources
    assert kernel.grid[1] == 3
    _, meta = compile_triton(kernel, TARGET)
    assert meta["n_spills"] == 0 and meta["shared"] <= TARGET.shared_per_block


def test_side_by_side_is_not_proposed_where_each_product_fills_the_gpu() -> None:
    x, *weights = (torch.empty(rows, 8192, dtype=BF16) for rows in (512, 8192, 8192))
    low = kept(searched(lambda x, v, w: (x @ v.T, x @ w.T), x, *weights), BESIDE)
    (step,) = [s for s in low.steps if isinstance(s, SideBySide)]
    assert side_by_side_candidates(step, TARGET, "default") == []


def normed(x: torch.Tensor, w: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    return F.layer_norm(x @ w.T + y, (w.shape[0],))


@pytest.mark.parametrize(("rows", "count", "config"), [(70, 4, POINTER), (1, 8, replace(TMA, swap=True))], ids=str)
def test_values_in_parts_for_a_norm(interpreter: Interpreter, rows: int, count: int, config: GemmConfig) -> None:
    """The partial sums of a product and the norm that adds them up, each as a kernel."""
    args = rand(rows, 1024), (rand(1024, N) / 32).T if rows == 1 else rand(N, 1024) / 32, rand(rows, N)
    low = kept(searched(normed, *args), f"{PARTS} {count}")
    product, norm = low.steps
    wide = replace(config, block_k=128)
    assert isinstance(product, Contraction) and isinstance(norm, Region)
    kernels = [*print_contraction(product, wide, TARGET).kernels, *triton_candidates(norm, TARGET, "default")[0].sources]
    memory = {name: padded(value) for name, value in zip(low.inputs, args, strict=True)}
    for name in (*product.writes(), *norm.writes()):
        spec = low.buffers[name]
        memory[name] = padded(torch.full((int(spec.extent),), float("nan"), dtype=spec.dtype))
    for kernel in kernels:
        interpreter.run(kernel, memory)
    (result,) = norm.writes()
    assert_closer(memory[result].view(rows, N), normed(*args), normed(*to_float64(args)))


@pytest.mark.parametrize("rows", [128, 197])
def test_parts_for_a_norm_compile_without_spills(rows: int) -> None:
    """The last product of BERT-base's and ViT-B's layers at batch 1."""
    low = searched(normed, *(torch.empty(shape, dtype=BF16) for shape in ((rows, 3072), (768, 3072), (rows, 768))))
    for way in (w for each in alternatives(low) for w in each.ways if w.label.startswith(PARTS)):
        product, norm = way.steps
        for candidate in (
            contraction_candidates(product, TARGET, "default")[0],
            triton_candidates(norm, TARGET, "default")[0],
        ):
            _, meta = compile_triton(candidate.sources[0], TARGET)
            assert meta["n_spills"] == 0


GROUPED = [POINTER, replace(POINTER, swap=True), replace(TMA, block_k=32), replace(TMA, swap=True, subtile=2)]


@pytest.mark.parametrize("config", GROUPED, ids=str)
@pytest.mark.parametrize("ends", [[10, 10, 47, 48, 75], [0, 0, 75, 75, 75], [3, 30, 40, 41, 41]], ids=str)
def test_values_of_grouped_products(interpreter: Interpreter, config: GemmConfig, ends: list[int]) -> None:
    """Groups without rows, and rows without a group: of those nothing is written."""
    x, w, group_ends = rand(75, 64, dtype=BF16), rand(5, 96, 64, dtype=BF16) / 8, torch.tensor(ends, dtype=torch.int32)
    for fn, way in ((activated, FUSED), (gated, TWO)):
        if way == TWO and config.swap:
            continue
        (got, *_) = run(interpreter, fn, (x, w, group_ends), config, way)
        last = ends[-1]
        exact = fn(x.double(), w.double(), group_ends)
        assert_closer(got[:last], fn(x, w, group_ends)[:last], exact[:last])
        assert got[last:].isnan().all(), "rows without a group keep what was there"


def test_a_grouped_product_with_weights_by_row(interpreter: Interpreter) -> None:
    """[G, K, N], whose descriptor folds the groups into the inner dimension: only whole blocks of it."""
    x, w, ends = (
        rand(75, 64, dtype=BF16),
        rand(5, 64, 96, dtype=BF16) / 8,
        torch.tensor([10, 10, 47, 48, 75], dtype=torch.int32),
    )

    def fn(x: torch.Tensor, w: torch.Tensor, ends: torch.Tensor) -> torch.Tensor:
        return activated(x, w.mT, ends)

    for config in (POINTER, TMA):
        (got, *_) = run(interpreter, fn, (x, w, ends), config)
        assert_closer(got, fn(x, w, ends), fn(x.double(), w.double(), ends))
    ragged = a_contraction(fn, rand(75, 72, dtype=BF16), rand(5, 72, 96, dtype=BF16), ends)
    assert not any(c.tma and c.block_k > 8 for c in configs(problem_of(ragged), TARGET))


def test_a_grouped_product_has_as_many_programs_as_any_groups_need() -> None:
    """Few rows are in few of many groups."""
    for rows, groups in ((75, 5), (3, 64), (64, 1)):
        ends = torch.full((groups,), rows, dtype=torch.int32)
        contraction = a_contraction(activated, rand(rows, 64, dtype=BF16), rand(groups, 96, 64, dtype=BF16), ends)
        (kernel,) = print_contraction(contraction, POINTER, TARGET).kernels
        one_each = [1] * (min(rows, groups) - 1)
        worst = [*one_each, rows - len(one_each)]
        assert sum(-(-n // 32) for n in worst) * 3 <= kernel.grid[0] <= (rows // 32 + min(rows, groups)) * 3


@pytest.mark.parametrize("layer", ["activated", "gated"])
def test_grouped_candidates_compile_without_spills(layer: str) -> None:
    x, w = torch.empty(16384, 2048, dtype=BF16), torch.empty(8, 1536, 2048, dtype=BF16)
    fn, way = (activated, FUSED) if layer == "activated" else (gated, TWO)
    low = kept(searched(fn, x, w, torch.zeros(8, dtype=torch.int32)), way)
    (contraction,) = [s for s in low.steps if isinstance(s, Contraction)]
    config, *_ = configs(problem_of(contraction), TARGET, limit=1)
    assert config.tma and config.split == 1 and not config.programs
    (kernel,) = print_contraction(contraction, config, TARGET).kernels
    _, meta = compile_triton(kernel, TARGET)
    assert meta["n_spills"] == 0 and meta["shared"] <= TARGET.shared_per_block


def test_a_product_that_overflows_its_dtype_is_used_unrounded(interpreter: Interpreter) -> None:
    """Nothing is rounded before the epilogue; float16 ends at 65504."""
    args = (rand(32, 64).fill_(100.0), rand(64, 32).fill_(100.0))
    (result, *_) = run(interpreter, lambda x, w: (x @ w) * 0.01, args, POINTER)
    assert torch.equal(result, torch.full((32, 32), 6400.0, dtype=F16))


def test_indices_are_as_wide_as_memory_asks_for() -> None:
    """Operands, and what the epilogue reads and writes: each for itself."""
    contraction = a_contraction(lambda x, w, y: torch.relu(x @ w) + y, rand(128, 64), rand(64, 32), rand(128, 32))

    def text(changed: Contraction) -> str:
        return print_contraction(changed, POINTER, TARGET).kernels[0].text

    assert "WIDE=False" in text(contraction) and "int64" not in text(contraction)
    far = replace(contraction, a=replace(contraction.a, row=1 << 25))
    assert "WIDE=True" in text(far) and "int64" not in text(far)
    specs = {n: replace(s, strides=(1 << 25, 1)) for n, s in contraction.region.buffers.items()}
    far = replace(contraction, region=replace(contraction.region, buffers=specs))
    assert "WIDE=False" in text(far) and "y = y.to(tl.int64)" in text(far)


def a_contraction(fn: Callable[..., Any], *args: torch.Tensor) -> Contraction:
    (found,) = fused(fn, *args)
    return found


def both_products(fn: Callable[..., Any], *args: torch.Tensor) -> Contraction:
    found = [s for s in kept(searched(fn, *args), TWO).steps if isinstance(s, Contraction)]
    assert len(found) == 1 and found[0].c is not None
    return found[0]


def block(x: torch.Tensor, w: torch.Tensor, b: torch.Tensor, y: torch.Tensor, seed: torch.Tensor) -> torch.Tensor:
    """What ends a transformer's feed-forward layer in training."""
    h = F.linear(x, w, b)
    keep = torch.ops.fxopt.rand(seed + 7, list(h.shape)) >= 0.1
    return y + torch.where(keep, h * (1 / 0.9), torch.zeros([], dtype=h.dtype))


def of(*sizes: int) -> tuple[torch.Tensor, ...]:
    m, k, n = sizes
    return rand(m, k, dtype=BF16), rand(n, k, dtype=BF16), rand(n, dtype=BF16), rand(m, n, dtype=BF16), torch.tensor(1)


def test_golden_text() -> None:
    """EXPECTTEST_ACCEPT=1 accepts a change."""
    contraction = a_contraction(block, *of(192, 256, 200))
    texts = []
    for config in (GemmConfig(False, 128, 64, 64, 4, 3), GemmConfig(True, 64, 64, 64, 4, 3, split=2)):
        for kernel in print_contraction(contraction, config, TARGET).kernels:
            options = kernel.compile_options
            head = [
                f"# {config}: grid {kernel.grid}, {options['num_warps']} warps, buffers {kernel.buffers}, {kernel.sizes}"
            ]
            head += [f"# {name}: {geometry}" for name, geometry in options.get("tensor_maps", {}).items()]
            texts.append("\n".join([*head, kernel.text]))
    text, path = "\n\n".join(texts), GOLDEN / "triton_contraction.txt"
    if os.environ.get("EXPECTTEST_ACCEPT"):
        path.write_text(text)
    assert path.exists(), f"no golden text {path.name}: run with EXPECTTEST_ACCEPT=1"
    assert text == path.read_text()


@pytest.mark.parametrize("arch", [80, 90, 100])
@pytest.mark.parametrize("epilogue", ["gelu", "block", "swiglu", "merged", "products kept"])
def test_the_first_candidates_compile_without_spills(epilogue: str, arch: int) -> None:
    target = Target.cuda(arch)
    x, w, b, y, seed = of(2048, 1024, 1024)
    match epilogue:
        case "gelu":
            contraction = a_contraction(linear_gelu, x, w, b)
        case "block":
            contraction = a_contraction(block, x, w, b, y, seed)
        case "merged":
            contraction = both_products(merged, x, rand(2816, 1024, dtype=BF16))
        case "swiglu":
            contraction = both_products(swiglu, x, w, w.clone())
        case _:
            contraction = both_products(kept_too, x, w, w.clone())
    for config in configs(problem_of(contraction), target, limit=1):
        config = with_vectors(contraction, with_room(contraction, config, target))
        for kernel in print_contraction(contraction, config, target).kernels:
            cubin, meta = compile_triton(kernel, target)
            assert cubin[:4] == b"\x7fELF" and meta["n_spills"] == 0, f"{config}: {meta}"
            assert config.split > 1 or meta["shared"] <= target.shared_per_block


def test_tf32_operands_are_loaded_as_tf32(monkeypatch: pytest.MonkeyPatch) -> None:
    """By tensor cores that take TF32, from tensor maps of the driver's type 11, which rounds."""
    monkeypatch.setattr("fxopt.lower.contractions.products_use_tf32", lambda: True)
    args = tuple(t.float() for t in of(2048, 1024, 1024)[:3])
    contraction = a_contraction(linear_gelu, *args)
    config, *_ = configs(problem_of(contraction), TARGET, limit=1)
    (kernel,) = print_contraction(contraction, config, TARGET).kernels
    _, meta = compile_triton(kernel, TARGET)
    assert [m["element_type"] for m in meta["tensor_maps"]] == [11, 11] and meta["n_spills"] == 0
    assert 'PRECISION="tf32"' in kernel.text


def test_equal_layers_are_one_text() -> None:
    one, other = (a_contraction(block, *of(128, 64, 96)) for _ in range(2))
    renamed = _renamed(other, "second.")
    first, second = (print_contraction(c, POINTER, TARGET).kernels[0] for c in (one, renamed))
    assert first.text == second.text and first.key("t") == second.key("t")
    assert set(second.buffers) == {f"second.{n}" for n in first.buffers}


def _renamed(contraction: Contraction, prefix: str) -> Contraction:
    region = contraction.region
    buffers = {n: replace(s, name=prefix + n) for n, s in region.buffers.items()}
    stores = tuple(
        replace(
            s, buffer=prefix + s.buffer, value=transform(s.value, {}, lambda x: Load(prefix + x.buffer, x.index, x.dtype))
        )
        for s in region.nest.stores
    )
    return replace(
        contraction,
        a=replace(contraction.a, buffer=prefix + contraction.a.buffer),
        b=replace(contraction.b, buffer=prefix + contraction.b.buffer),
        result=prefix + contraction.result,
        region=replace(
            region, nest=replace(region.nest, stores=stores), buffers={prefix + n: s for n, s in buffers.items()}
        ),
        buffers={prefix + n: replace(s, name=prefix + n) for n, s in contraction.buffers.items()},
    )


def test_what_triton_does_not_take_is_refused() -> None:
    contraction = a_contraction(linear_gelu, *of(128, 64, 96)[:3])
    with pytest.raises(UnsupportedError):
        print_contraction(contraction, POINTER, Target.cpu())
    with pytest.raises(UnsupportedError):
        print_contraction(replace(contraction, a=replace(contraction.a, row=symbol(Sym("s0", lo=2)))), POINTER, TARGET)
