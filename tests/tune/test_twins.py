"""Regions that differ in names only are printed once, and get what they would have got by themselves."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.nn.functional as F

from fxopt.ir.exprs import Int, Sym, contiguous_strides, symbol
from fxopt.ir.loops import Load, Nest, Op, Reduce, Store
from fxopt.ir.region import Attention, BufferSpec, Contraction, Region, Strided
from fxopt.target import Target
from fxopt.tune.candidate import Candidate, attention_candidates, contraction_candidates, triton_candidates
from fxopt.tune.twins import Printer
from tests.lower.contracting import alternatives, searched

CUDA = torch.device("cuda", 0)


def spec(name: str, *shape: Int, dtype: torch.dtype = torch.float32) -> BufferSpec:
    return BufferSpec(name, dtype, CUDA, shape, contiguous_strides(shape))


def summed(out: str, a: str, b: str, rows: int = 4096, row: int = 1024) -> Region:
    """out[p] = sum of a[p, r] * b[p, r] over r."""
    p, r = Sym("x0", size=rows), Sym("r1", size=row)
    loads = [Load(source, symbol(p) * row + symbol(r), torch.float32) for source in (a, b)]
    value = Reduce("sum", (Op("mul", tuple(loads), torch.float32),), (r,), torch.float32)
    buffers = {a: spec(a, rows, row), b: spec(b, rows, row), out: spec(out, rows)}
    return Region(f"region_{out}", Nest((p,), (r,), (Store(out, symbol(p), value),)), buffers, CUDA, (f"node_{out}",))


def added(out: str, a: str, b: str, n: int = 1 << 20) -> Region:
    x = Sym("x0", size=n)
    value = Op("add", tuple(Load(s, symbol(x), torch.float32) for s in (a, b)), torch.float32)
    return Region(
        f"region_{out}", Nest((x,), (), (Store(out, symbol(x), value),)), {s: spec(s, n) for s in (a, b, out)}, CUDA
    )


def alone(region: Region) -> list[Candidate]:
    return triton_candidates(region, Target.cuda(90), "default")


SPLIT = {"rows": 4, "row": 1 << 20}
LONG = {"rows": 4096, "row": 16384}


@pytest.mark.parametrize(
    "twins",
    [
        [summed("o", "a", "b"), summed("p", "b", "c"), summed("a", "p", "o")],
        [summed("o", "a", "b", **SPLIT), summed("p", "c", "d", **SPLIT)],
        [added("o", "a", "b"), added("c", "b", "a")],
        [added("a", "a", "b"), added("c", "c", "a")],
        [replace(region, backwards=True) for region in (added("o", "a", "b"), added("c", "b", "a"))],
        [replace(region, reread=True) for region in (summed("o", "a", "b", **LONG), summed("p", "b", "c", **LONG))],
    ],
    ids=["reductions", "in parts", "element-wise", "in place", "backwards", "read again"],
)
def test_twins_are_printed_once(twins: list[Region]) -> None:
    printed: list[Region] = []

    def candidates(region: Region) -> list[Candidate]:
        printed.append(region)
        return alone(region)

    printer = Printer(candidates)
    assert [printer(region) for region in twins] == [alone(region) for region in twins]
    assert len(printed) == 1


@pytest.mark.parametrize(
    ("one", "other"),
    [
        (added("o", "a", "b"), added("o", "a", "a")),
        (added("o", "a", "b"), added("a", "a", "b")),
        (added("o", "a", "b"), added("o", "a", "b", n=1 << 21)),
        (summed("o", "a", "b"), summed("o", "a", "a")),
        (
            added("o", "a", "b"),
            replace(added("o", "a", "b"), buffers=added("o", "a", "b").buffers | {"a": spec("a", 1 << 10, 1 << 10)}),
        ),
        (added("o", "a", "b"), replace(added("o", "a", "b"), backwards=True)),
        (summed("o", "a", "b"), replace(summed("o", "a", "b"), reread=True)),
    ],
    ids=["one operand", "in place", "size", "one operand reduced", "shape", "direction", "what the next reads"],
)
def test_other_regions_are_not(one: Region, other: Region) -> None:
    printed: list[Region] = []

    def candidates(region: Region) -> list[Candidate]:
        printed.append(region)
        return []

    printer = Printer(candidates)
    for region in (one, other):
        printer(region)
    assert len(printed) == 2


def attended(k: int, keys: int = 512, split: bool = False) -> Attention:
    """Layer number `k`'s attention with a mask that all layers share; one row of queries if its keys are to be split."""
    rows = 1 if split else 512
    sizes = {f"q{k}": rows, f"k{k}": keys, f"v{k}": keys, f"o{k}": rows}
    shapes = {name: (1, 12, size, 64) for name, size in sizes.items()} | {"mask": (1, 1, rows, keys)}
    tensors = {name: Strided(name, shape, contiguous_strides(shape)) for name, shape in shapes.items()}  # type: ignore[arg-type]
    mask = replace(tensors["mask"], shape=(1, 12, rows, keys), strides=(0, 0, keys, 1))
    buffers = {name: spec(name, *shape, dtype=torch.bfloat16) for name, shape in shapes.items()}
    names = (tensors[f"{x}{k}"] for x in "qkv")
    return Attention(f"o{k}.attention", *names, mask, tensors[f"o{k}"], False, 0.125, buffers, (f"node_{k}",))


@pytest.mark.parametrize("split", [False, True])
def test_attention_of_equal_layers_is_printed_once(split: bool) -> None:
    def own(work: Attention) -> list[Candidate]:
        printed.append(work.name)
        return attention_candidates(work, Target.cuda(90), "default")

    printed: list[str] = []
    printer, keys = Printer(own), 8192 if split else 512
    layers = [attended(k, keys, split) for k in range(3)]
    for layer in layers:
        expected = attention_candidates(layer, Target.cuda(90), "default")
        found = printer(layer)
        assert [c.identity for c in found] == [c.identity for c in expected]
        assert [[s.buffers for s in c.sources] for c in found] == [[s.buffers for s in c.sources] for c in expected]
        assert [c.scratch for c in found] == [c.scratch for c in expected]
        assert any(c.scratch for c in found) is split
    assert len(printed) == 1
    printer(attended(4, keys // 2, split))
    assert len(printed) == 2


def two_layers(layer: Callable[..., torch.Tensor], *shapes: tuple[int, ...]) -> list[Contraction]:
    """The products of two layers of equal weights in a row, each with what is computed from it."""
    given = [torch.randn(shape).bfloat16() for shape in (*shapes, *shapes[1:])]
    given = [x.contiguous(memory_format=torch.channels_last) if x.dim() == 4 else x for x in given]

    def both(x: torch.Tensor, *weights: torch.Tensor) -> torch.Tensor:
        half = len(weights) // 2
        return layer(layer(x, *weights[:half]), *weights[half:])

    ways = (way for each in alternatives(searched(both, *given, every=True)) for way in each.ways[1:])
    return [step for way in ways for step in way.steps if isinstance(step, Contraction)]


IMAGES, WEIGHT, CHANNEL = (8, 128, 28, 28), (128, 128, 1, 1), (128,)


@pytest.mark.parametrize(
    ("layer", "shapes"),
    [
        (lambda x, w, b: F.gelu(F.linear(x, w, b)), ((4096, 1024), (1024, 1024), (1024,))),
        (lambda x, w, r: F.linear(x, w) + r, ((64, 1024), (1024, 1024), (64, 1024))),
        (lambda x, w, v: F.silu(x @ w) * (x @ v), ((4096, 1024), (1024, 1024), (1024, 1024))),
        (lambda x, w, b: F.relu(F.conv2d(x, w, b) + x), (IMAGES, WEIGHT, CHANNEL)),
        (lambda x, w: F.relu(F.conv2d(x, w, padding=1)), (IMAGES, (128, 128, 3, 3))),
    ],
    ids=["activation", "few rows", "gated", "pointwise convolution", "convolution"],
)
def test_products_of_equal_layers_are_printed_once(layer: Any, shapes: tuple[tuple[int, ...], ...]) -> None:
    def own(work: Contraction) -> list[Candidate]:
        printed.append(work.name)
        return contraction_candidates(work, Target.cuda(90), "max-autotune")

    printed: list[str] = []
    printer, layers = Printer(own), two_layers(layer, *shapes)
    for work in layers:
        expected = contraction_candidates(work, Target.cuda(90), "max-autotune")
        assert printer(work) == expected and expected
    assert 2 * len(printed) == len(layers) > 1


def test_products_that_differ_are_not() -> None:
    def layer(x: torch.Tensor, w: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
        return F.gelu(F.linear(x, w, b))

    work = two_layers(layer, (4096, 1024), (1024, 1024), (1024,))[0]
    others = [
        replace(work, tf32=True),
        replace(work, b=replace(work.b, row=work.b.column, column=work.b.row)),
        replace(work, region=replace(work.region, steady=frozenset(work.region.reads()) - {work.result})),
        replace(work, buffers=work.buffers | {n: replace(s, dtype=torch.float16) for n, s in work.buffers.items()}),
    ]
    printed: list[Contraction] = []
    printer = Printer(lambda work: printed.append(work) or [])
    for each in (work, *others):
        printer(each)
    assert len(printed) == 5
