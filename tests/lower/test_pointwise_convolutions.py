"""Convolutions with a window of one element as matrix products with epilogues: which are, and their values."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from fxopt.ir.exprs import coefficient
from fxopt.ir.region import Alternatives, BufferSpec, Contraction, Matrix
from fxopt.lower.contractions import FUSED as FUSED_WAY
from fxopt.lower.contractions import IMPLICIT, LIBRARY, with_contractions
from fxopt.lower.convolutions import CUDNN
from fxopt.lower.lowering import Lowered
from fxopt.lower.schedule import schedule
from tests.lower.capturing import lower_function, moved
from tests.lower.interpreter import run_lowered
from tests.numerics import assert_closer, to_float64

BF16 = torch.bfloat16


def image(*shape: int) -> Tensor:
    layout = torch.channels_last_3d if len(shape) == 5 else torch.channels_last
    return torch.randn(*shape).to(BF16).contiguous(memory_format=layout)


def weight(out: int, inside: int, dims: int = 2) -> Tensor:
    return (torch.randn(out, inside, *[1] * dims) / inside**0.5).to(BF16)


def column(x: Tensor) -> Tensor:
    return x[:, None, None]


def alternatives(fn: Callable[..., Any], args: tuple[Any, ...]) -> tuple[Lowered, list[Alternatives]]:
    lowered = with_contractions(moved(schedule(lower_function(fn, args)), "cuda"))
    return lowered, [s for s in lowered.steps if isinstance(s, Alternatives)]


def strided(flat: Tensor, matrix: Matrix, rows: int, columns: int) -> Tensor:
    return flat.as_strided((rows, columns), (matrix.row, matrix.column), matrix.offset)


def run_fused(lowered: Lowered, found: Alternatives, args: tuple[Tensor, ...]) -> list[Any]:
    """The outputs of `lowered`, whose one step is `found`, with the product in float32 where a kernel has registers."""
    (contraction,) = found.ways[1].steps
    assert isinstance(contraction, Contraction)
    given = dict(zip(lowered.inputs, args, strict=True))
    _, rows, depth, columns = contraction.sizes
    a, b = (given[m.buffer].as_strided((given[m.buffer].numel(),), (1,)) for m in (contraction.a, contraction.b))
    product = strided(a, contraction.a, rows, depth).float() @ strided(b, contraction.b, depth, columns).float()
    index = next(load.index for load in contraction.region.nest.loads() if load.buffer == contraction.result)
    steps = [coefficient(index, axis) for axis in contraction.axes if axis is not None]
    registers = torch.empty(rows * columns, dtype=BF16)
    registers.as_strided((rows, columns), steps).copy_(product)
    spec = BufferSpec(contraction.result, BF16, torch.device("cpu"), (rows * columns,), (1,))
    region = replace(contraction.region, buffers={**contraction.region.buffers, spec.name: spec})
    alone = replace(
        lowered, steps=[region], buffers={**lowered.buffers, spec.name: spec}, inputs=(*lowered.inputs, spec.name)
    )
    return run_lowered(moved(alone, "cpu"), {**given, spec.name: registers})


def normalized(x: Tensor, w: Tensor, mean: Tensor, scale: Tensor, shift: Tensor, residual: Tensor) -> Tensor:
    y = (F.conv2d(x, w).float() - column(mean)) * column(scale) + column(shift)
    return F.relu(y.to(BF16) + residual)


FUSED: dict[str, tuple[Callable[..., Any], tuple[Tensor, ...]]] = {
    "norm, residual, activation": (
        normalized, (image(3, 32, 7, 5), weight(48, 32), *(torch.rand(48) for _ in range(3)), image(3, 48, 7, 5))
    ),
    "bias": (lambda x, w, b: F.conv2d(x, w, b).relu(), (image(2, 32, 6, 5), weight(48, 32), torch.randn(48).to(BF16))),
    "one image, row by row": (lambda x, w: F.conv2d(x, w).tanh(), (torch.randn(1, 32, 9, 8).to(BF16), weight(16, 32))),
    "three dimensions": (lambda x, w: F.conv3d(x, w).relu(), (image(2, 32, 3, 4, 5), weight(48, 32, 3))),
    "the product is an output": (lambda x, w: ((y := F.conv2d(x, w)), y * 2), (image(2, 32, 6, 5), weight(48, 32))),
}  # fmt: skip


@pytest.mark.parametrize("name", FUSED)
def test_values(name: str) -> None:
    fn, args = FUSED[name]
    lowered, (found,) = alternatives(fn, args)
    assert [way.label for way in found.ways if way.label != CUDNN] == [LIBRARY, FUSED_WAY]
    want = fn(*args)
    want = list(want) if isinstance(want, tuple) else [want]
    wide = fn(*to_float64(args))
    assert_closer(run_fused(lowered, found, args), want, list(wide) if isinstance(wide, tuple) else [wide])


LEFT: dict[str, tuple[Callable[..., Any], tuple[Tensor, ...], set[str]]] = {
    "strided": (lambda x, w: F.conv2d(x, w, stride=2).relu(), (image(2, 32, 6, 6), weight(48, 32)), {IMPLICIT}),
    "padded": (lambda x, w: F.conv2d(x, w, padding=1).relu(), (image(2, 32, 6, 6), weight(48, 32)), {IMPLICIT}),
    "grouped": (lambda x, w: F.conv2d(x, w, groups=2).relu(), (image(2, 64, 6, 6), weight(48, 32)), set()),
    "a wide window": (lambda x, w: F.conv2d(x, w).relu(), (image(2, 32, 6, 6), torch.randn(48, 32, 1, 2).to(BF16)), set()),
    "transposed": (lambda x, w: F.conv_transpose2d(x, w).relu(), (image(2, 32, 6, 6), weight(32, 48)), set()),
    "images row by row": (lambda x, w: F.conv2d(x, w).relu(), (torch.randn(2, 32, 6, 6).to(BF16), weight(48, 32)), set()),
    "a part of every row": (lambda x, w: F.conv2d(x[..., 1:], w).relu(), (image(2, 32, 6, 6), weight(48, 32)), {IMPLICIT}),
}


@pytest.mark.parametrize("name", LEFT)
def test_others_are_no_products_of_matrices(name: str) -> None:
    """A kernel of ours gathers rows that do not lie evenly; libraries do the rest."""
    fn, args, gathered = LEFT[name]
    ways = {way.label for found in alternatives(fn, args)[1] for way in found.ways}
    assert ways - {LIBRARY, CUDNN} == gathered
