"""Norms of one row between two products, within their kernels: eager's values, where nobody needs what is left out."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from fxopt.ir.quantized_ops import QUANTIZE_WEIGHT, WEIGHT_ONLY_MM
from fxopt.ir.region import Alternatives, Contraction, Region, Way
from fxopt.lower import Lowered
from fxopt.lower.contractions import FUSED, LIBRARY, ROW, TWO
from fxopt.lower.row_norms import APART, ELEMENTS, LARGEST_ROW, SUMMED, WITHIN, kept, with_row_norms
from fxopt.lower.ways import replaced
from tests.codegen.triton_interpreter import Interpreter
from tests.lower.contracting import kept as kept_ways
from tests.lower.contracting import searched
from tests.lower.interpreter import run_lowered
from tests.numerics import assert_closer, to_float64

pytest.importorskip("triton")

from fxopt.codegen.templates.weight_config import DotConfig, VectorConfig
from fxopt.codegen.triton import configs, print_region
from fxopt.codegen.triton_weights import print_vector, weight_problem
from fxopt.target import Target
from fxopt.tune.candidate import row_candidates

TARGET = Target.cuda(90)
HALF = torch.float16
WIDTH = 48


def rms_norm(x: Tensor, weight: Tensor) -> Tensor:
    wide = x.to(torch.promote_types(x.dtype, torch.float32))
    return weight * (wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + 1e-6)).to(x.dtype)


def layer_norm(x: Tensor, weight: Tensor) -> Tensor:
    return F.layer_norm(x, (x.shape[-1],), weight, 1 - weight)


def sublayer(norm: Callable[[Tensor, Tensor], Tensor]) -> Callable[..., tuple[Tensor, ...]]:
    def fn(x: Tensor, residual: Tensor, before: Tensor, weight: Tensor, *after: Tensor) -> tuple[Tensor, ...]:
        total = residual + F.linear(x, before)
        normed = norm(total, weight)
        return total, *(F.linear(normed, w) for w in after)

    return fn


def given(width: int = WIDTH, rows: int = 1, columns: tuple[int, ...] = (32, 16)) -> list[Tensor]:
    shapes = ((rows, 80), (rows, width), (width, 80), (width,), *((n, width) for n in columns))
    return [torch.randn(shape).to(HALF) for shape in shapes]


def chosen(fn: Callable[..., object], args: list[Tensor]) -> Lowered:
    """`fn` with its products as reductions of one row."""
    return kept_ways(searched(fn, *args), ROW)


def norms(low: Lowered) -> list[Alternatives]:
    return [s for s in low.steps if isinstance(s, Alternatives)]


@pytest.mark.parametrize("norm", [rms_norm, layer_norm])
@pytest.mark.parametrize("columns", [(32,), (32, 16)])
def test_both_ways_have_eagers_values(norm: Callable[[Tensor, Tensor], Tensor], columns: tuple[int, ...]) -> None:
    fn, args = sublayer(norm), given(columns=columns)
    both = with_row_norms(low := chosen(fn, args))
    (each,) = norms(both)
    assert [(way.label, len(way.steps)) for way in each.ways] == [(APART, 3), (WITHIN, 2)]
    exact, eager = fn(*to_float64(args)), fn(*args)
    for way in each.ways:
        got = run_lowered(replaced(both, {each.name: way}), dict(zip(low.inputs, args, strict=True)))
        assert_closer(tuple(got), eager, exact)


def beginning(x: Tensor, weight: Tensor, *after: Tensor) -> tuple[Tensor, ...]:
    normed = layer_norm(x, weight)
    return tuple(F.linear(normed, w) for w in after)


@pytest.mark.parametrize("columns", [(32,), (32, 16)])
def test_a_norm_of_what_no_product_makes(interpreter: Interpreter, columns: tuple[int, ...]) -> None:
    args = [given(columns=columns)[k] for k in (1, 3, *range(4, 4 + len(columns)))]
    both = with_row_norms(low := chosen(beginning, args))
    (each,) = norms(both)
    assert [(way.label, len(way.steps)) for way in each.ways] == [(APART, 2), (WITHIN, 1)]
    exact, eager = beginning(*to_float64(args)), beginning(*args)
    for way in each.ways:
        got = run_lowered(replaced(both, {each.name: way}), dict(zip(low.inputs, args, strict=True)))
        assert_closer(tuple(got), eager, exact)
    (region,) = each.ways[1].steps
    assert isinstance(region, Region)
    memory = {name: x.flatten().clone() for name, x in zip(low.inputs, args, strict=True)}
    memory |= {name: torch.full((region.buffers[name].extent,), torch.nan, dtype=HALF) for name in region.writes()}
    (kernel,) = print_region(region, configs(region, TARGET)[0], TARGET).kernels
    interpreter.run(kernel, memory)
    found = torch.cat([memory[name] for name in region.writes()])
    assert_closer(found, torch.cat([x.flatten() for x in eager]), torch.cat([x.flatten() for x in exact]))


@pytest.mark.parametrize("name", ["cast", "scale", "activation"])
def test_a_row_that_is_computed_element_by_element(interpreter: Interpreter, name: str) -> None:
    """By the product's kernel, where nobody else reads the row."""
    prologues: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
        "cast": lambda x, w: F.linear(x.to(w.dtype), w),
        "scale": lambda x, w: F.linear((x * w[0]).to(w.dtype), w),
        "activation": lambda x, w: F.linear(F.gelu(x).to(w.dtype), w),
    }
    fn, args = prologues[name], [torch.randn(1, WIDTH), torch.randn(32, WIDTH).to(HALF)]
    both = with_row_norms(low := chosen(fn, args))
    (each,) = norms(both)
    assert [(way.label, len(way.steps)) for way in each.ways] == [(APART, 2), (ELEMENTS, 1)]
    exact, eager = fn(*to_float64(args)), fn(*args)
    for way in each.ways:
        got = run_lowered(replaced(both, {each.name: way}), dict(zip(low.inputs, args, strict=True)))
        assert_closer(got[0], eager, exact)
    (region,) = each.ways[1].steps
    assert isinstance(region, Region)
    memory = {n: x.flatten().clone() for n, x in zip(low.inputs, args, strict=True)}
    (written,) = region.writes()
    memory[written] = torch.full((32,), torch.nan, dtype=HALF)
    (kernel,) = print_region(region, configs(region, TARGET)[0], TARGET).kernels
    interpreter.run(kernel, memory)
    assert_closer(memory[written].view(1, 32), eager, exact)


def test_a_row_that_others_read_or_that_varies_is_stored() -> None:
    x, w = torch.randn(1, WIDTH), torch.randn(32, WIDTH).to(HALF)

    def read_twice(x: Tensor, w: Tensor) -> tuple[Tensor, ...]:
        row = x.to(w.dtype)
        return row, F.linear(row, w)

    for fn, args in ((read_twice, [x, w]), (lambda x, w: F.linear(x.to(w.dtype), w), [torch.randn(2, WIDTH), w])):
        low = searched(fn, *args)
        assert not norms(with_row_norms(kept_ways(low, ROW if args[0].shape[0] == 1 else LIBRARY)))


def test_kernels_have_eagers_values(interpreter: Interpreter) -> None:
    fn, args = sublayer(layer_norm), given()
    low = chosen(fn, args)
    (each,) = norms(with_row_norms(low))
    memory = {name: x.flatten().clone() for name, x in zip(low.inputs, args, strict=True)}
    for region in each.ways[1].steps:
        assert isinstance(region, Region)
        printed = print_region(region, configs(region, TARGET)[0], TARGET)
        (kernel,) = printed.kernels
        for name in region.writes():
            memory[name] = torch.full((region.buffers[name].extent,), torch.nan, dtype=HALF)
        interpreter.run(kernel, memory)
    found = [memory[name] for region in each.ways[1].steps for name in region.writes()]
    exact, eager = fn(*to_float64(args)), fn(*args)
    assert_closer(tuple(found), tuple(x.flatten() for x in eager), tuple(x.flatten() for x in exact))


def test_what_is_kept_by_the_names_of_its_regions() -> None:
    both = with_row_norms(chosen(sublayer(rms_norm), given()))
    (each,) = norms(both)
    for way in each.ways:
        settled = replaced(both, {each.name: Way("", way.steps)})
        assert [s.name for s in kept(both, settled).steps if isinstance(s, Region)] == [
            s.name for s in settled.steps if isinstance(s, Region)
        ]


def of_normed(x: Tensor, residual: Tensor, before: Tensor, weight: Tensor, after: Tensor) -> tuple[Tensor, ...]:
    total = residual + F.linear(x, before)
    normed = rms_norm(total, weight)
    return total, normed, F.linear(normed, after)


def of_product(x: Tensor, residual: Tensor, before: Tensor, weight: Tensor, after: Tensor) -> tuple[Tensor, ...]:
    product = F.linear(x, before)
    total = residual + product
    return total, product, F.linear(rms_norm(total, weight), after)


def of_both(x: Tensor, residual: Tensor, before: Tensor, weight: Tensor, after: Tensor) -> tuple[Tensor, ...]:
    """The norm reads the product beside its sum with the residual."""
    product = F.linear(x, before)
    total = residual + product
    return total, F.linear(rms_norm(total, weight) * product, after)


@pytest.mark.parametrize("fn", [of_normed, of_product, of_both])
def test_not_where_others_read_what_would_be_left_out(fn: Callable[..., tuple[Tensor, ...]]) -> None:
    assert not norms(with_row_norms(chosen(fn, given(columns=(32,)))))


def test_not_for_several_or_long_rows() -> None:
    assert not norms(with_row_norms(chosen(sublayer(rms_norm), given(rows=2))))
    assert not norms(with_row_norms(chosen(sublayer(rms_norm), given(width=2 * LARGEST_ROW, columns=(2,)))))


def down(x: Tensor, residual: Tensor, w: Tensor, bias: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
    """GPT-2's: a weight [in, out]."""
    total = residual + torch.addmm(bias, x, w)
    return total, layer_norm(total, weight)


def for_down(width: int = WIDTH, inner: int = 96) -> list[Tensor]:
    return [torch.randn(shape).to(HALF) for shape in ((1, inner), (1, width), (inner, width), (width,), (width,))]


@pytest.mark.parametrize("way", [LIBRARY, ROW])
def test_a_norm_adds_up_a_products_parts(way: str) -> None:
    """Whichever way of the product has won before."""
    args = for_down()
    both = with_row_norms(low := kept_ways(searched(down, *args), way))
    (each,) = norms(both)
    assert [(w.label, len(w.steps)) for w in each.ways] == [(APART, 2), (SUMMED, 2)]
    exact, eager = down(*to_float64(args)), down(*args)
    for chosen_way in each.ways:
        settled = replaced(both, {each.name: Way("", chosen_way.steps)})
        own = kept(both, settled)
        assert [type(s) for s in own.steps] == [type(s) for s in settled.steps]
        assert_closer(tuple(run_lowered(own, dict(zip(low.inputs, args, strict=True)))), eager, exact)
    assert all(name in both.buffers for region in each.ways[1].steps for name in region.writes())


def test_parts_are_added_up_in_kernels(interpreter: Interpreter) -> None:
    args = for_down()
    low = kept_ways(searched(down, *args), ROW)
    (each,) = norms(with_row_norms(low))
    memory = {name: x.flatten().clone() for name, x in zip(low.inputs, args, strict=True)}
    for region in each.ways[1].steps:
        assert isinstance(region, Region)
        printed = print_region(region, next(c for c in configs(region, TARGET) if c.split == 1), TARGET)
        for name in region.writes():
            memory[name] = torch.full((region.buffers[name].extent,), torch.nan, dtype=region.buffers[name].dtype)
        interpreter.run(printed.kernels[0], memory)
    found = [memory[o.name] for o in low.outputs if o is not None]
    exact, eager = down(*to_float64(args)), down(*args)
    assert_closer(tuple(found), tuple(x.flatten() for x in eager), tuple(x.flatten() for x in exact))


def test_no_parts_of_rows_of_a_weight_or_for_others() -> None:
    def along_rows(x: Tensor, residual: Tensor, w: Tensor, bias: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
        return down(x, residual, w.mT, bias, weight)

    def product_too(x: Tensor, residual: Tensor, w: Tensor, bias: Tensor, weight: Tensor) -> tuple[Tensor, ...]:
        product = torch.addmm(bias, x, w)
        return product, *down(x, residual, w, bias, weight)

    x, residual, w, bias, weight = for_down()
    assert not norms(with_row_norms(kept_ways(searched(along_rows, x, residual, w.mT.contiguous(), bias, weight), ROW)))
    assert not norms(with_row_norms(kept_ways(searched(product_too, x, residual, w, bias, weight), ROW)))
    two = (torch.cat([x, x]), torch.cat([residual, residual]), w, bias, weight)
    assert not norms(with_row_norms(kept_ways(searched(down, *two), LIBRARY)))


def of_one_row(
    bits: int, gated: bool, x: Tensor, residual: Tensor, weight: Tensor, *quantized: Tensor
) -> tuple[Tensor, ...]:
    def product(x: Tensor, *given: Tensor) -> Tensor:
        return F.linear(x, *given) if bits == 16 else WEIGHT_ONLY_MM(x, *given, None, bits, 32 if bits == 4 else 0)

    half = len(quantized) // 2
    total = residual + product(x, *quantized[:half])
    out = product(rms_norm(total, weight), *quantized[half:])
    if gated:
        gate, up = out.chunk(2, -1)
        out = F.silu(gate) * up
    return total, out


Layer = Callable[..., tuple[Tensor, ...]]


def layer_of_one_row(bits: int, gated: bool, depth: int, width: int, columns: int) -> tuple[Layer, list[Tensor]]:
    """`of_one_row` and its arguments: products from `depth` to `width`, and from there to `columns`."""
    stored = torch.uint8 if bits == 4 else torch.int8
    sizes = ((width, depth), (columns, width))
    weights = [torch.randn(n, k) for n, k in sizes]
    quantized = [(w.to(HALF),) if bits == 16 else QUANTIZE_WEIGHT(w, stored, bits, 32 * (bits == 4)) for w in weights]
    x, residual, weight = (torch.randn(*shape).to(HALF) for shape in ((1, depth), (1, width), (width,)))
    return partial(of_one_row, bits, gated), [x, residual, weight, *quantized[0], *quantized[1]]


def norm_of_one_row(fn: Layer, args: list[Tensor], gated: bool) -> tuple[Lowered, Alternatives]:
    """`fn` with its products as contractions, both of them in the second as one kernel, and the ways of its norm."""
    low = searched(fn, *args)
    ways = {e.name: next(w for w in e.ways if w.label in (TWO, FUSED)) for e in norms(low)}
    if gated:
        ways |= {e.name: w for e in norms(low) for w in e.ways if w.label == TWO}
    (each,) = norms(with_row_norms(replaced(low, ways)))
    assert [(way.label, len(way.steps)) for way in each.ways] == [(APART, 3), (WITHIN, 2)]
    return low, each


@pytest.mark.parametrize(
    ("bits", "gated", "dots"), [(4, False, False), (4, True, True), (8, True, False), (8, False, True), (16, True, False)]
)
def test_norms_within_products_of_one_row(interpreter: Interpreter, bits: int, gated: bool, dots: bool) -> None:
    """Their kernels, of whatever kind, have eager's values: residual, weights and norm."""
    fn, args = layer_of_one_row(bits, gated, 128, 64, 48)
    low, each = norm_of_one_row(fn, args, gated)
    apart, within = each.ways
    memory = {name: x.flatten().clone() for name, x in zip(low.inputs, args, strict=True)}
    for step in within.steps:
        assert isinstance(step, Contraction) and set(step.buffers) == {*step.reads(), *step.writes()}
        problem = weight_problem(step)
        vector = VectorConfig(4, problem.row_bytes // 32, 2, 4)
        config = DotConfig(16, 2, 1, problem.row_elements // 2, 2) if dots else vector
        (kernel,) = print_vector(step, config, TARGET).kernels
        memory |= {n: torch.full((step.buffers[n].extent,), torch.nan, dtype=HALF) for n in step.writes()}
        interpreter.run(kernel, memory)
    found = [memory[name] for step in within.steps for name in step.writes()]
    for got, want in zip(found, fn(*args), strict=True):
        torch.testing.assert_close(got, want.flatten(), rtol=2**-7, atol=2**-6)
    assert {n for s in apart.steps for n in s.writes()} > {n for s in within.steps for n in s.writes()}


def test_rows_that_registers_cannot_hold_stay_in_memory() -> None:
    """Of a length that is no power of two."""
    w, scale = QUANTIZE_WEIGHT(torch.randn(48, 96), torch.int8, 8, 0)
    args = (torch.randn(1, 96).to(HALF), torch.randn(96).to(HALF), w, scale)
    low = searched(lambda x, weight, w, scale: WEIGHT_ONLY_MM(rms_norm(x, weight), w, scale, None, 8, 0), *args)
    ways = {e.name: next(w for w in e.ways if w.label == FUSED) for e in norms(low)}
    assert not norms(with_row_norms(replaced(low, ways)))


def test_programs_that_do_not_fit_beside_others_may_have_their_weights_brought() -> None:
    fn, args = layer_of_one_row(4, True, 128, 2048, 16384)
    _, each = norm_of_one_row(fn, args, gated=True)
    step = each.ways[1].steps[-1]
    assert isinstance(step, Contraction) and step.row is not None
    labels = [c.label for c in row_candidates(step, TARGET, "default")]
    dots = [label for label in labels if label.startswith("dot") and not label.endswith("ahead")]
    assert len(dots) == 2 and all(f"{label} ahead" in labels for label in dots)
    assert sum(label.endswith("ahead") for label in labels if label.startswith("vector")) <= 1
