"""Norms of one row between two products, within their kernels: eager's values, where nobody needs what is left out."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from fxopt.ir.region import Alternatives, Region, Way
from fxopt.lower import Lowered
from fxopt.lower.contractions import ROW, replaced
from fxopt.lower.row_norms import APART, LARGEST_ROW, WITHIN, kept, with_row_norms
from tests.codegen.triton_interpreter import Interpreter
from tests.lower.contracting import kept as kept_ways
from tests.lower.contracting import searched
from tests.lower.interpreter import run_lowered
from tests.numerics import assert_closer, to_float64

pytest.importorskip("triton")

from fxopt.codegen.triton import configs, print_region
from fxopt.target import Target

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
