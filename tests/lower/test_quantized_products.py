"""Quantized products in lowering: sums and an expression on CPUs, alternatives on GPUs, casts to 8-bit floats in kernels."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx

from fxopt.capture.decompositions import decompositions
from fxopt.capture.symbols import to_int
from fxopt.ir.graph import Graph, Input, Phase, Role
from fxopt.ir.loops import Load, postorder
from fxopt.ir.quantized_ops import FLOAT8, SCALED_MM, WEIGHT_ONLY_MM
from fxopt.ir.region import Alternatives, Call, Contraction, Region
from fxopt.journal import Journal
from fxopt.lower import Lowered, lower_graph
from fxopt.lower.contractions import FUSED, LIBRARY, ROW, TWO, with_contractions
from fxopt.lower.ops import quantized
from fxopt.lower.schedule import schedule
from tests.lower.capturing import moved
from tests.lower.contracting import alternatives, labels, searched
from tests.lower.harness import lower
from tests.lower.interpreter import run_lowered

F = torch.nn.functional


def layer(a: torch.Tensor, b: torch.Tensor, rows: torch.Tensor, columns: torch.Tensor, bias: torch.Tensor) -> torch.Tensor:
    return torch.relu(SCALED_MM(a, b, rows, columns, bias, torch.float32))


@pytest.mark.parametrize("per_row", [False, True])
@pytest.mark.parametrize("m", [1, 9])
def test_on_a_cpu_the_epilogue_is_an_expression_over_exact_sums(m: int, per_row: bool) -> None:
    a, b = (torch.randint(-127, 128, shape, dtype=torch.int8) for shape in ((m, 33), (12, 33)))
    args = (a, b, torch.rand(m) if per_row else torch.tensor(0.1), torch.rand(12), torch.randn(12))
    low = lower(layer, args)
    assert [s.op for s in low.steps if isinstance(s, Call)] == ["aten::_int_mm.default"]
    assert sum(isinstance(s, Region) for s in low.steps) == 1
    (got,) = run_lowered(low, dict(zip(low.inputs, args, strict=True)))
    torch.testing.assert_close(got, layer(*args))


def on_a_gpu(fn: object, *shapes: tuple[tuple[int, ...], torch.dtype]) -> tuple[Lowered, Journal]:
    """`fn` of tensors on a GPU that need not exist, scheduled."""
    with FakeTensorMode(), torch.no_grad():
        args = [torch.empty(shape, dtype=dtype, device="cuda") for shape, dtype in shapes]
        gm = make_fx(fn, decomposition_table=decompositions(), tracing_mode="real")(*args)  # type: ignore[arg-type]
    names = [n.name for n in gm.graph.nodes if n.op == "placeholder"]
    journal = Journal("test")
    low = lower_graph(Graph(gm, [Input(n, Role.USER) for n in names], Phase.INFERENCE, "test", to_int), journal)
    return with_contractions(schedule(low)), journal


def test_the_cast_of_the_rows_is_part_of_the_kernel_before() -> None:
    def quantized(x: torch.Tensor, scale: torch.Tensor, b: torch.Tensor, columns: torch.Tensor) -> torch.Tensor:
        rows = (F.gelu(x).float() / scale).clamp(-448.0, 448.0).to(FLOAT8)
        return SCALED_MM(rows, b, scale, columns, None, torch.bfloat16)

    float32 = torch.float32
    low, journal = on_a_gpu(quantized, ((80, 32), torch.bfloat16), ((), float32), ((48, 32), FLOAT8), ((48,), float32))
    assert not journal.retreats
    region, products = (s for s in low.steps if not isinstance(s, Call))
    assert isinstance(region, Region) and isinstance(products, Alternatives)
    assert region.buffers[region.writes()[0]].dtype == FLOAT8
    assert [w.label for w in products.ways] == [LIBRARY, FUSED]


def test_the_library_reads_a_value_rounded_to_8_bits() -> None:
    low, _ = on_a_gpu(lambda x: x.to(FLOAT8).float() * 2, ((64,), torch.float32))
    stored, read, doubled = low.steps
    assert isinstance(stored, Region) and isinstance(doubled, Region)
    assert isinstance(read, Call) and read.op == "aten::_to_copy.default"


@pytest.mark.parametrize("scale", ["one for all", "one for each", "not known"])
def test_a_scale_repeated_for_each_row_is_read_once(scale: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(quantized, "sums_apart", lambda device: False)
    a, b = (torch.randint(-127, 128, shape, dtype=torch.int8) for shape in ((80, 32), (48, 32)))
    rows = torch.full((80,), 0.25) if scale != "one for each" else torch.arange(80) / 16
    args = (a, b, rows, torch.rand(48), torch.randn(48))
    low = schedule(moved(lower(layer, args), "cuda"))
    name = low.inputs[2]
    known = {} if scale == "not known" else {name: rows}
    low = with_contractions(replace(low, inputs=tuple(n for n in low.inputs if n not in known), constants=known))
    (product,) = (s for w in alternatives(low)[0].ways for s in w.steps if w.label == FUSED)
    assert isinstance(product, Contraction)
    (factor,) = (n for n in postorder(product.region.nest.roots) if isinstance(n, Load) and n.buffer == name)
    assert (factor.index == 0) == (scale == "one for all")


def test_halves_of_a_quantized_product_are_one_kernel(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(quantized, "sums_apart", lambda device: False)

    def gated(a: torch.Tensor, b: torch.Tensor, row: torch.Tensor, columns: torch.Tensor) -> torch.Tensor:
        gate, up = SCALED_MM(a, b, row, columns, None, torch.bfloat16).chunk(2, -1)
        return F.silu(gate) * up

    a, b = torch.ones(80, 32, dtype=torch.int8), torch.ones(96, 32, dtype=torch.int8)
    low = searched(gated, a, b, torch.tensor(0.1), torch.ones(96))
    two = [s for each in alternatives(low) for w in each.ways if w.label == TWO for s in w.steps]
    assert len(two) == 1 and isinstance(two[0], Contraction) and two[0].c is not None


def test_weights_of_few_bits_are_read_once_for_few_rows() -> None:
    for m, loops in ((8, True), (9, False)):
        x, weight = torch.randn(m, 32).bfloat16(), torch.ones(48, 32, dtype=torch.int8)
        low = searched(lambda *a: WEIGHT_ONLY_MM(*a, None, 8, 0), x, weight, torch.ones(48))
        assert (ROW in labels(low)) == loops
