"""Norms as factors of their rows in the products after them: values beside eager's, and what is left as it is."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from fxopt.capture.decompositions import decompositions
from fxopt.errors import UnsupportedError
from fxopt.ir.loops import SUMMED_COLUMNS
from fxopt.ir.region import Alias, Alternatives, Contraction, Region, Way, base_of
from fxopt.lower import Lowered
from fxopt.lower.contractions import FUSED, LIBRARY, TWO, with_contractions
from fxopt.lower.norm_scales import (
    LEAST_BYTES,
    SCALED,
    SCALED_FUSED,
    STORED,
    SUMMED,
    SUMMED_FUSED,
    Fold,
    folded,
    with_norm_scales,
)
from fxopt.lower.schedule import schedule
from fxopt.lower.ways import replaced
from tests.codegen.triton_interpreter import Interpreter
from tests.lower.capturing import moved
from tests.lower.contracting import kept as kept_ways
from tests.lower.harness import lower
from tests.lower.interpreter import run_lowered
from tests.numerics import assert_closer, to_float64

pytest.importorskip("triton")

from fxopt.codegen.templates.gemm_problem import GemmConfig
from fxopt.codegen.triton import configs, print_region
from fxopt.codegen.triton_build import compile_triton
from fxopt.codegen.triton_contraction import print_contraction
from fxopt.target import Target
from fxopt.tune.candidate import contraction_candidates

HALF, BF16 = torch.float16, torch.bfloat16
Function = Callable[..., Tensor | tuple[Tensor, ...]]
WIDTH = 64


def wide(x: Tensor) -> Tensor:
    return x.to(torch.promote_types(x.dtype, torch.float32))


def normalized(x: Tensor) -> Tensor:
    return wide(x) * torch.rsqrt(wide(x).pow(2).mean(-1, keepdim=True) + 1e-6)


def llama(x: Tensor, weight: Tensor) -> Tensor:
    """Llama's and T5's: rounded, then times the weight."""
    return weight * normalized(x).to(x.dtype)


def gemma(x: Tensor, weight: Tensor) -> Tensor:
    return (normalized(x) * (1.0 + wide(weight))).type_as(x)


def divided(x: Tensor, weight: Tensor) -> Tensor:
    return (wide(x) / torch.sqrt(wide(x).pow(2).mean(-1, keepdim=True) + 1e-6)).to(x.dtype) * weight


def modules(x: Tensor, weight: Tensor) -> Tensor:
    """nn.RMSNorm's."""
    return F.rms_norm(x, (x.shape[-1],), weight, 1e-6)


NORMS = (llama, gemma, divided, modules)


def plain(norm: Callable[[Tensor, Tensor], Tensor]) -> Function:
    return lambda x, weight, w: F.linear(norm(x, weight), w)


def sublayer(norm: Callable[[Tensor, Tensor], Tensor]) -> Function:
    """A residual sum whose norm a gated layer reads."""

    def fn(x: Tensor, residual: Tensor, weight: Tensor, gate: Tensor, up: Tensor) -> tuple[Tensor, ...]:
        total = residual + x
        normed = norm(total, weight)
        return total, F.silu(F.linear(normed, gate)) * F.linear(normed, up)

    return fn


def activated(x: Tensor, weight: Tensor, w: Tensor, bias: Tensor) -> Tensor:
    return F.gelu(F.linear(llama(x, weight), w, bias))


def rand(*shape: int, dtype: torch.dtype = HALF) -> Tensor:
    return torch.randn(shape).to(dtype)


def frozen(fn: Function, args: Sequence[Tensor], constants: Sequence[int], way: str = LIBRARY) -> Lowered:
    """`fn` with its products by `way`, the arguments number `constants` frozen."""
    low = lower(fn, tuple(args), decompose=decompositions())
    known = {low.inputs[k]: args[k] for k in constants}
    low = replace(low, inputs=tuple(n for n in low.inputs if n not in known), constants=known)
    return kept_ways(with_contractions(schedule(moved(low, "cuda"))), way)


def of(both: Lowered) -> Alternatives:
    (each,) = (s for s in both.steps if isinstance(s, Alternatives))
    return each


def check(fn: Function, args: Sequence[Tensor], constants: Sequence[int], way: str = LIBRARY) -> list[Way]:
    """Assert that every way has values as close to float64 as eager's. Returns the ways."""
    low = frozen(fn, args, constants, way)
    both, folds = with_norm_scales(low, every=True)
    given = dict(zip(low.inputs, (x for k, x in enumerate(args) if k not in constants), strict=True))
    eager, exact = (out if isinstance(out, tuple) else (out,) for out in (fn(*args), fn(*to_float64(args))))
    for each in of(both).ways:
        got = run_lowered(folded(replaced(both, {of(both).name: each}), folds), given)
        assert_closer(tuple(got), eager, exact)
    return list(of(both).ways)


def labels(ways: Sequence[Way]) -> list[tuple[str, int]]:
    return [(way.label, len(way.steps)) for way in ways]


@pytest.mark.parametrize("dtype", [HALF, BF16])
@pytest.mark.parametrize("norm", NORMS)
def test_a_norm_and_a_product(norm: Callable[[Tensor, Tensor], Tensor], dtype: torch.dtype) -> None:
    args = (rand(2, 96, WIDTH, dtype=dtype), rand(WIDTH, dtype=dtype), rand(48, WIDTH, dtype=dtype))
    assert labels(check(plain(norm), args, (1, 2))) == [(STORED, 2), (SCALED, 2)]


@pytest.mark.parametrize("dtype", [HALF, BF16])
@pytest.mark.parametrize("norm", NORMS)
def test_a_residual_sum_and_a_gated_layer(norm: Callable[[Tensor, Tensor], Tensor], dtype: torch.dtype) -> None:
    args = [rand(*shape, dtype=dtype) for shape in ((96, WIDTH), (96, WIDTH), (WIDTH,), (48, WIDTH), (48, WIDTH))]
    assert labels(check(sublayer(norm), args, (2, 3, 4), TWO)) == [(STORED, 2), (SCALED, 2)]
    ways = check(sublayer(norm), args, (2, 3, 4), FUSED)
    assert labels(ways) == [(STORED, 3), (SCALED, 3)]
    region = ways[1].steps[0]
    assert isinstance(region, Region) and len(region.nest.stores) == 2  # the sum, and one number a row


def test_what_follows_the_product_is_its_epilogue() -> None:
    args = (rand(96, WIDTH), rand(WIDTH), rand(48, WIDTH), rand(48))
    ways = check(activated, args, (1, 2, 3))
    assert labels(ways) == [(STORED, 3), (SCALED, 3), (SCALED_FUSED, 2)]
    assert labels(check(activated, args, (1, 2, 3), FUSED)) == [(STORED, 2), (SCALED, 2)]


def test_weights_of_extreme_size() -> None:
    x, w = rand(64, WIDTH), rand(48, WIDTH) * 0.02
    for dtype in (HALF, BF16):
        weight = torch.ones(WIDTH)
        weight[::3], weight[1::3], weight[5] = 0.0, 30.0, 1e-3
        weight[8:12] = 4e-5
        check(plain(llama), (x.to(dtype), weight.to(dtype), w.to(dtype)), (1, 2))


def test_rows_of_large_values_and_outliers() -> None:
    x, w, weight = rand(64, WIDTH), rand(48, WIDTH) * 0.02, torch.full((WIDTH,), 0.5)
    x[:, 3], weight[3] = 900.0, 2e-3
    x[5], x[6], x[7] = x[5] * 1e4, x[6] * 1e-4, 0.0
    for norm in NORMS:
        check(plain(norm), (x.to(HALF), weight.to(HALF), w.to(HALF)), (1, 2))
        check(plain(norm), (x.to(BF16) * 1e15, weight.to(BF16), w.to(BF16)), (1, 2))


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_rows_that_are_not_finite_are_as_eagers(value: float) -> None:
    x, weight, w = rand(8, WIDTH), rand(WIDTH), rand(16, WIDTH)
    x[2, 5], weight[7] = value, 0.0
    x[4, 7] = value  # where the weight is zero
    low = frozen(plain(llama), (x, weight, w), (1, 2))
    both, folds = with_norm_scales(low, every=True)
    (got,) = run_lowered(folded(replaced(both, {of(both).name: of(both).ways[1]}), folds), {low.inputs[0]: x})
    eager = plain(llama)(x, weight, w)
    assert torch.equal(got.isnan(), eager.isnan()) and got[2].isnan().all() and got[4].isnan().all()


def test_a_weight_is_rounded_once_and_keeps_its_layout() -> None:
    weight, factor = rand(48, WIDTH).t(), torch.rand(WIDTH, dtype=torch.float64)
    value = Fold("w", factor, 0).value({"w": weight})
    assert value.stride() == weight.stride()
    assert torch.equal(value, (weight.double() * factor[:, None]).to(HALF))
    across = Fold("w", torch.rand(48, dtype=torch.float64), 1)
    assert torch.equal(across.value({"w": weight}), (weight.double() * across.factor).to(HALF))


def test_no_weight_needs_no_constants() -> None:
    fn: Function = lambda x, w: F.linear(F.rms_norm(x, (WIDTH,), None, 1e-6), w)  # noqa: E731
    args = (rand(96, WIDTH), rand(48, WIDTH))
    assert labels(check(fn, args, ())) == [(STORED, 2), (SCALED, 2)]
    assert not with_norm_scales(frozen(fn, args, ()), every=True)[1]


def test_some_of_the_rows() -> None:
    """As of a prompt the last ones are wanted."""
    fn: Function = lambda x, weight, w: F.linear(llama(x, weight)[20:], w)  # noqa: E731
    assert labels(check(fn, (rand(96, WIDTH), rand(WIDTH), rand(48, WIDTH)), (1, 2))) == [(STORED, 2), (SCALED, 2)]
    fn = lambda x, weight, w: F.linear(llama(x[:, 1], weight), w)  # noqa: E731
    assert labels(check(fn, (rand(96, 3, WIDTH), rand(WIDTH), rand(48, WIDTH)), (1, 2))) == [(STORED, 2), (SCALED, 2)]


def test_two_products_of_one_norm() -> None:
    fn: Function = lambda x, weight, w, v: (F.linear(n := llama(x, weight), w), F.linear(n, v))  # noqa: E731
    args = (rand(96, WIDTH), rand(WIDTH), rand(48, WIDTH), rand(32, WIDTH))
    assert labels(check(fn, args, (1, 2, 3))) == [(STORED, 3), (SCALED, 3)]


def returned(x: Tensor, weight: Tensor, w: Tensor) -> tuple[Tensor, ...]:
    normed = llama(x, weight)
    return normed, F.linear(normed, w)


def read_by_others(x: Tensor, weight: Tensor, w: Tensor) -> Tensor:
    normed = llama(x, weight)
    return F.linear(normed, w) + normed.flip(0)[:, :48]


def layer_norm(x: Tensor, weight: Tensor, w: Tensor) -> Tensor:
    return F.linear(F.layer_norm(x, (WIDTH,), weight), w)


def gated_norm(x: Tensor, weight: Tensor, w: Tensor) -> Tensor:
    return F.linear(llama(x, weight) * torch.sigmoid(x), w)


def part_of_rows(x: Tensor, weight: Tensor, w: Tensor) -> Tensor:
    return F.linear(llama(x, weight)[:, : WIDTH // 2], w[:, WIDTH // 2 :])


@pytest.mark.parametrize("fn", [returned, read_by_others, layer_norm, gated_norm, part_of_rows])
def test_what_is_left_as_it_is(fn: Function) -> None:
    args = (rand(96, WIDTH), rand(WIDTH), rand(48, WIDTH))
    both, folds = with_norm_scales(frozen(fn, args, (1, 2)), every=True)
    assert not any(isinstance(s, Alternatives) for s in both.steps)
    assert folded(both, folds).constants.keys() == both.constants.keys()


def attended(x: Tensor, weight: Tensor, key: Tensor) -> Tensor:
    """As where queries have a norm of their own."""
    return F.scaled_dot_product_attention(llama(x, weight), key, key)


def in_8_bits(x: Tensor, weight: Tensor, w: Tensor) -> Tensor:
    return F.linear(llama(x, weight).to(torch.float8_e4m3fn).to(x.dtype), w)


def across_rows_of_the_weight(x: Tensor, weight: Tensor, w: Tensor) -> Tensor:
    return F.linear(llama(x, weight), w.flatten()[10:-54].view(-1, WIDTH))


OTHERS: list[tuple[Function, tuple[int, ...], tuple[int, ...]]] = [
    (attended, (2, 4, 32, WIDTH), (2, 4, 32, WIDTH)),
    (in_8_bits, (96, WIDTH), (48, WIDTH)),
    (across_rows_of_the_weight, (96, WIDTH), (50, WIDTH)),
]


@pytest.mark.parametrize(("fn", "rows", "other"), OTHERS)
def test_what_no_product_with_a_whole_weight_reads_stays(
    fn: Function, rows: tuple[int, ...], other: tuple[int, ...]
) -> None:
    args = (rand(*rows), rand(WIDTH), rand(*other))
    both, _ = with_norm_scales(frozen(fn, args, (1, 2)), every=True)
    assert not any(isinstance(s, Alternatives) for s in both.steps)


@pytest.mark.parametrize("dtype", [HALF, BF16])
def test_rows_that_were_not_rounded_before_may_be_beyond_float16(dtype: torch.dtype) -> None:
    def fn(x: Tensor, residual: Tensor, weight: Tensor, w: Tensor) -> tuple[Tensor, ...]:
        total = wide(x) * 8 + wide(residual)
        return total.to(x.dtype), F.linear(llama(total, weight).to(x.dtype), w)

    args = [rand(*shape, dtype=dtype) for shape in ((96, WIDTH), (96, WIDTH), (WIDTH,), (48, WIDTH))]
    args[0][3] *= 2e4
    if dtype == BF16:
        check(fn, args, (2, 3))
    both, _ = with_norm_scales(frozen(fn, args, (2, 3)), every=True)
    assert any(isinstance(s, Alternatives) for s in both.steps) == (dtype == BF16)


def test_a_weight_along_both_of_its_dimensions() -> None:
    fn: Function = lambda x, weight, w: (F.linear(n := llama(x, weight), w), n @ w)  # noqa: E731
    assert labels(check(fn, (rand(96, WIDTH), rand(WIDTH), rand(WIDTH, WIDTH)), (1, 2))) == [(STORED, 3), (SCALED, 3)]


def test_two_norms_of_the_same_rows_and_one_weight() -> None:
    fn: Function = lambda x, one, two, w: F.linear(llama(x, one), w) + F.linear(llama(x, two), w)  # noqa: E731
    check(fn, (rand(96, WIDTH), rand(WIDTH), rand(WIDTH), rand(48, WIDTH)), (1, 2, 3))


@pytest.mark.parametrize("constants", [(), (1,), (2,)])
def test_weights_have_to_be_frozen(constants: tuple[int, ...]) -> None:
    args = (rand(96, WIDTH), rand(WIDTH), rand(48, WIDTH))
    both, _ = with_norm_scales(frozen(plain(llama), args, constants), every=True)
    assert not any(isinstance(s, Alternatives) for s in both.steps)


def test_a_weight_that_float16_cannot_hold_stays() -> None:
    weight = torch.ones(WIDTH)
    weight[3] = 4e-7  # of weights of 1e-3: 4e-10
    args = (rand(96, WIDTH), weight.to(HALF), rand(48, WIDTH) * 1e-3)
    both, _ = with_norm_scales(frozen(plain(llama), args, (1, 2)), every=True)
    assert not any(isinstance(s, Alternatives) for s in both.steps)


def test_small_norms_and_wide_products_are_not_worth_it() -> None:
    rows = LEAST_BYTES // (2 * WIDTH)
    for shape, columns, expected in (((rows, WIDTH), 48, 1), ((rows // 2, WIDTH), 48, 0), ((rows, WIDTH), 9000, 0)):
        args = (rand(*shape), rand(WIDTH), rand(columns, WIDTH))
        both, _ = with_norm_scales(frozen(plain(llama), args, (1, 2)))
        assert sum(isinstance(s, Alternatives) for s in both.steps) == expected


def between(x: Tensor, residual: Tensor, before: Tensor, weight: Tensor, w: Tensor) -> tuple[Tensor, ...]:
    """A residual sum of a product, and a layer of its norm."""
    total = residual + F.linear(x, before)
    return total, F.relu(F.linear(llama(total, weight), w))


def sublayers(dtype: torch.dtype, rows: tuple[int, ...] = (2, 48), width: int = 128) -> list[Tensor]:
    shapes = ((*rows, 80), (*rows, width), (width, 80), (width,), (64, width))
    return [rand(*shape, dtype=dtype) for shape in shapes]


@pytest.mark.parametrize("dtype", [HALF, BF16])
def test_the_product_before_adds_up_squares(dtype: torch.dtype) -> None:
    ways = check(between, sublayers(dtype), (2, 3, 4), LIBRARY)
    expected = [(STORED, 4), (SCALED, 4), (SCALED_FUSED, 3), (SUMMED, 4), (SUMMED_FUSED, 3)]
    assert labels(ways) == expected
    assert labels(check(between, sublayers(dtype), (2, 3, 4), FUSED)) == [(STORED, 3), (SCALED, 3), (SUMMED, 3)]


def run_kernels(
    server: Interpreter, both: Lowered, folds: dict[str, Fold], way: Way, given: Sequence[Tensor]
) -> list[Tensor]:
    """The results of `way`, by the printed kernels of the first candidates."""
    done, target = folded(replaced(both, {of(both).name: way}), folds), Target.cuda(90)
    memory = {n: x.flatten().clone() for n, x in zip(done.inputs, given, strict=True)}
    memory |= {n: x.flatten().clone() for n, x in done.constants.items()}
    for step in way.steps:
        assert isinstance(step, Region | Contraction)
        for name in step.writes():
            spec = done.buffers[name]
            memory[name] = torch.full((spec.extent,), torch.nan, dtype=spec.dtype)  # type: ignore[arg-type]
        if isinstance(step, Contraction):
            kernels = contraction_candidates(step, target, "max-autotune")[0].sources
        else:
            kernels = print_region(step, configs(step, target)[0], target).kernels
        for kernel in kernels:
            server.run(kernel, memory)
    specs = (done.buffers[base_of(o.name, {s.name: s for s in done.steps if isinstance(s, Alias)})] for o in done.outputs)
    return [memory[spec.name].view(spec.shape) for spec in specs]  # type: ignore[arg-type]


@pytest.mark.parametrize("dtype", [HALF, BF16])
def test_kernels_have_eagers_values(interpreter: Interpreter, dtype: torch.dtype) -> None:
    args = [rand(*shape, dtype=dtype) for shape in ((64, 128), (64, 128), (128,), (32, 128), (32, 128))]
    both, folds = with_norm_scales(frozen(sublayer(llama), args, (2, 3, 4), TWO), every=True)
    got = run_kernels(interpreter, both, folds, of(both).ways[1], args[:2])
    assert_closer(tuple(got), sublayer(llama)(*args), sublayer(llama)(*to_float64(args)))


@pytest.mark.parametrize("rows", [96, 70])
def test_kernels_that_add_up_squares_have_eagers_values(interpreter: Interpreter, rows: int) -> None:
    args = sublayers(BF16, (rows,), 192)
    both, folds = with_norm_scales(frozen(between, args, (2, 3, 4), FUSED), every=True)
    ways = {way.label: way for way in of(both).ways}
    got = run_kernels(interpreter, both, folds, ways[SUMMED], args[:2])
    assert_closer(tuple(got), between(*args), between(*to_float64(args)))


@pytest.mark.parametrize(("block", "subtile"), [(64, 1), (128, 2), (128, 1), (256, 2)])
@pytest.mark.parametrize("tma", [False, True])
def test_every_width_of_tile_adds_up_the_same_columns(interpreter: Interpreter, block: int, subtile: int, tma: bool) -> None:
    args = sublayers(BF16, (70,), 320)
    both, _ = with_norm_scales(frozen(between, args, (2, 3, 4), FUSED), every=True)
    contraction = next(way for way in of(both).ways if way.label == SUMMED).steps[0]
    assert isinstance(contraction, Contraction)
    config = GemmConfig(tma, 32, block, 16, 4, 3, subtile=subtile)
    (kernel,) = print_contraction(contraction, config, Target.cuda(90)).kernels
    memory = {n: x.flatten().clone() for n, x in zip(both.inputs, args[:2], strict=True)}
    memory |= {n: x.flatten().clone() for n, x in both.constants.items()}
    for name in contraction.writes():
        spec = both.buffers[name]
        memory[name] = torch.full((spec.extent,), torch.nan, dtype=spec.dtype)  # type: ignore[arg-type]
    interpreter.run(kernel, memory)
    (name,) = (n for n in contraction.writes() if both.buffers[n].dtype == torch.float32)
    total = args[1].double() + args[0].double() @ args[2].double().t()
    exact = total.square().unflatten(1, (-1, SUMMED_COLUMNS)).sum(-1)
    assert (memory[name].view(exact.shape) - exact).abs().max() < 1e-4 * exact.max()


def test_tiles_of_fewer_columns_add_up_nothing() -> None:
    both, _ = with_norm_scales(frozen(between, sublayers(BF16), (2, 3, 4), FUSED), every=True)
    contraction = next(way for way in of(both).ways if way.label == SUMMED).steps[0]
    assert isinstance(contraction, Contraction)
    for config in (GemmConfig(False, 32, 64, 16, 4, 3, subtile=2), GemmConfig(False, 32, 64, 16, 4, 3, split=2)):
        with pytest.raises(UnsupportedError, match="sums of columns"):
            print_contraction(contraction, config, Target.cuda(90))


@pytest.mark.parametrize("arch", [80, 90, 100])
def test_the_first_candidates_compile_without_spills(arch: int) -> None:
    target = Target.cuda(arch)
    args = [rand(*shape) for shape in ((2048, 512), (2048, 512), (512,), (1024, 512), (1024, 512))]
    layer = [rand(*shape) for shape in ((2048, 512), (2048, 768), (768, 512), (768,), (1024, 768))]
    for fn, own, constants, way in (
        (sublayer(llama), args, (2, 3, 4), TWO),
        (plain(llama), args[1:4], (1, 2), LIBRARY),
        (between, layer, (2, 3, 4), FUSED),
    ):
        both, _ = with_norm_scales(frozen(fn, own, constants, way))
        for contraction in (s for s in of(both).ways[-1].steps if isinstance(s, Contraction)):
            (kernel,) = contraction_candidates(contraction, target, "max-autotune")[0].sources
            assert compile_triton(kernel, target)[1]["n_spills"] == 0


def test_golden() -> None:
    """`EXPECTTEST_ACCEPT=1 pytest` writes the text anew."""
    args = [rand(*shape, dtype=BF16) for shape in ((4096, 768), (4096, 768), (768, 768), (768,), (3072, 768))]
    both, _ = with_norm_scales(frozen(between, args, (2, 3, 4), FUSED))
    texts = []
    for step in of(both).ways[-1].steps:
        if isinstance(step, Contraction):
            texts.append(
                print_contraction(step, GemmConfig(True, 128, 128, 64, 8, 3, subtile=2), Target.cuda(90)).kernels[0].text
            )
        elif isinstance(step, Region):
            texts.append(print_region(step, configs(step, Target.cuda(90))[0], Target.cuda(90)).kernels[0].text)
    path = Path(__file__).parents[1] / "golden" / "triton_norm_scales.txt"
    if os.environ.get("EXPECTTEST_ACCEPT"):
        path.write_text("\n\n".join(texts))
    assert path.read_text() == "\n\n".join(texts)
