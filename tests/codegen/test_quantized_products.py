"""Products of few bits as Triton kernels: values in Triton's interpreter, and machine code without spills."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any

import pytest
import torch

from fxopt.ir.quantized_ops import FLOAT8, LARGEST, QUANTIZE_WEIGHT, SCALED_MM, WEIGHT_ONLY_MM
from fxopt.ir.region import Contraction, Region, Way
from fxopt.lower import opsets
from fxopt.lower.contractions import APART, FUSED, LIBRARY, ROW, TWO
from fxopt.lower.ops import quantized
from fxopt.lower.quantized_products import DEQUANTIZED, INT_MM
from tests.codegen.padding import padded
from tests.codegen.test_triton_chain import around_the_wait
from tests.codegen.triton_interpreter import Interpreter
from tests.lower.contracting import alternatives, searched
from tests.lower.interpreter import run_lowered

pytest.importorskip("triton")

from fxopt.codegen.templates.gemm_problem import GemmConfig
from fxopt.codegen.templates.weight_config import (
    DotConfig,
    VectorConfig,
    WeightConfig,
    WeightProblem,
    configs,
    dot_configs,
    vector_configs,
)
from fxopt.codegen.triton import Printed
from fxopt.codegen.triton_build import compile_to_text, compile_triton
from fxopt.codegen.triton_contraction import epilogue_ops, print_contraction
from fxopt.codegen.triton_weights import print_vector, print_weights
from fxopt.errors import UnsupportedError
from fxopt.ir.kernel import KernelSource
from fxopt.lower.ways import replaced
from fxopt.target import Target
from fxopt.tune.candidate import contraction_candidates, triton_candidates

F = torch.nn.functional
BF16, F16 = torch.bfloat16, torch.float16
TARGET = Target.cuda(90)
POINTER = GemmConfig(False, 32, 32, 32, 4, 3)
TMA = replace(POINTER, tma=True)

Layer = Callable[..., torch.Tensor]
Operands = tuple[torch.Tensor, ...]


@pytest.fixture(autouse=True)
def _as_on_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(quantized, "sums_apart", lambda device: False)


def scaled_gelu(
    a: torch.Tensor, b: torch.Tensor, rows: torch.Tensor, columns: torch.Tensor, bias: torch.Tensor, y: torch.Tensor
) -> torch.Tensor:
    return F.gelu(SCALED_MM(a, b, rows, columns, bias, BF16)) + y


def scaled(dtype: torch.dtype, m: int, k: int, n: int, per_row: bool = True) -> tuple[Layer, Operands]:
    generator = torch.Generator().manual_seed(0)
    a, b = (torch.randint(-100, 101, s, generator=generator).to(dtype) for s in ((m, k), (n, k)))
    rows = torch.rand(m if per_row else (), generator=generator) * 0.01
    columns, bias = torch.rand(n, generator=generator) * 0.01, torch.randn(n, generator=generator).to(BF16)
    return scaled_gelu, (a, b, rows, columns, bias, torch.randn(m, n, generator=generator).to(BF16))


def weight_only(
    bits: int, m: int, k: int, n: int, group: int = 0, dtype: torch.dtype = BF16, stored: torch.dtype = torch.int8
) -> tuple[Layer, Operands]:
    generator = torch.Generator().manual_seed(0)
    weight, scale = QUANTIZE_WEIGHT(
        torch.randn(n, k, generator=generator), torch.uint8 if bits == 4 else stored, bits, group
    )

    def layer(x: torch.Tensor, weight: torch.Tensor, scale: torch.Tensor, bias: torch.Tensor) -> torch.Tensor:
        return torch.relu(WEIGHT_ONLY_MM(x, weight, scale, bias, bits, group))

    x = torch.randn(m, k, generator=generator).to(dtype)
    return layer, (x, weight, scale, torch.randn(n, generator=generator).to(dtype))


def way_of(fn: Layer, args: Operands, label: str) -> tuple[Any, Way]:
    low = searched(fn, *args)
    (each,) = alternatives(low)
    return low, next(w for w in each.ways if w.label == label)


def check(server: Interpreter, fn: Layer, args: Operands, label: str, printed: Callable[[Any], Printed]) -> None:
    """Assert that the only step of way `label`, run as `printed` kernels, gives the values of `fn`."""
    low, way = way_of(fn, args, label)
    (step,) = way.steps
    made = printed(step)
    memory = {name: padded(value) for name, value in zip(low.inputs, args, strict=True)}
    buffers = step.buffers
    for spec in (*(buffers[n] for n in step.writes()), *made.scratch):
        memory[spec.name] = padded(torch.empty(spec.extent, dtype=spec.dtype).fill_(float("nan")))
    for kernel in made.kernels:
        server.run(kernel, memory)
    got, want = memory[step.writes()[0]].double(), fn(*args).double()
    torch.testing.assert_close(got.view(want.shape), want, rtol=2**-6, atol=2**-6)


CONFIGS = [
    POINTER,
    replace(POINTER, split=2, swap=True),
    replace(TMA, promote=True, programs=3, flatten=True, subtile=2),
]


@pytest.mark.parametrize("config", CONFIGS, ids=str)
@pytest.mark.parametrize("dtype", LARGEST)
def test_values_of_scaled_products(interpreter: Interpreter, dtype: torch.dtype, config: GemmConfig) -> None:
    k = 96 if config.tma else 75
    layer = scaled(dtype, 41, k, 55, per_row=not config.tma)
    check(interpreter, *layer, FUSED, lambda step: print_contraction(step, config, TARGET))


@pytest.mark.parametrize(
    ("bits", "group", "dtype", "split"),
    [(8, 0, BF16, 1), (8, 0, F16, 2), (4, 32, BF16, 2), (4, 64, F16, 1), (4, 0, BF16, 1)],
)
def test_values_of_weights_of_few_bits(
    interpreter: Interpreter, bits: int, group: int, dtype: torch.dtype, split: int
) -> None:
    config = WeightConfig(16, 32, 32, 4, 3, split)
    layer = weight_only(bits, 19, 128 if bits == 4 else 100, 41, group, dtype)
    check(interpreter, *layer, FUSED, lambda step: print_weights(step, config, TARGET))


def rows(label: str = "default") -> Callable[[Region], Printed]:
    def printed(region: Region) -> Printed:
        first = triton_candidates(region, TARGET, label)[0]
        return Printed(first.sources, first.scratch)

    return printed


@pytest.mark.parametrize("layer", [weight_only(8, 1, 100, 9), weight_only(4, 3, 96, 9, 16), scaled(torch.int8, 2, 75, 9)])
def test_values_of_few_rows_as_loops(interpreter: Interpreter, layer: tuple[Layer, Operands]) -> None:
    check(interpreter, *layer, ROW, rows())


def test_a_weight_in_float8(interpreter: Interpreter) -> None:
    layer = weight_only(8, 9, 64, 33, stored=FLOAT8)
    config = WeightConfig(16, 32, 32, 4, 3)
    check(interpreter, *layer, FUSED, lambda step: print_weights(step, config, TARGET))


@pytest.mark.parametrize("m", [1, 5, 24])
def test_every_way_has_the_same_values(m: int) -> None:
    layers = [scaled(torch.int8, m, 48, 40), weight_only(8, m, 48, 40), weight_only(8, m, 48, 40, dtype=F16)]
    layers += [weight_only(4, m, 48, 40, group) for group in (0, 8)]
    labels = set()
    for fn, args in layers:
        low = searched(fn, *args)
        (each,) = alternatives(low)
        for way in each.ways:
            if way.label == DEQUANTIZED and any(getattr(s, "op", "") == "aten::mm.dtype" for s in way.steps):
                continue  # which torch has on GPUs only
            if any(isinstance(s, Contraction) and s.quantized for s in way.steps):
                continue  # the interpreter of the loop IR has no unpacking; Triton's ran above
            labels.add(way.label)
            (got,) = run_lowered(replaced(low, {each.name: way}), dict(zip(low.inputs, args, strict=True)))
            # A library's sums are rounded before they are scaled.
            torch.testing.assert_close(got, fn(*args), rtol=2**-6, atol=2**-4 if way.label == DEQUANTIZED else 2**-6)
    assert labels == ({LIBRARY, FUSED, ROW} if m < 9 else {LIBRARY, FUSED, INT_MM, DEQUANTIZED})


def gated(x: torch.Tensor, weight: torch.Tensor, scale: torch.Tensor, bits: int, group: int) -> torch.Tensor:
    return halves(WEIGHT_ONLY_MM(x, weight, scale, None, bits, group))


def halves(both: torch.Tensor) -> torch.Tensor:
    gate, up = both.chunk(2, -1)
    return F.silu(gate) * up


@pytest.mark.parametrize(
    ("bits", "k", "group", "config"),
    [
        (4, 128, 32, VectorConfig(4, 4, 1, 4)),
        (4, 224, 32, VectorConfig(8, 4, 2, 4)),
        (4, 96, 0, VectorConfig(4, 2, 1, 4)),
        (4, 1024, 128, VectorConfig(4, 8, 2, 4)),
        (8, 144, 0, VectorConfig(4, 8, 2, 4)),
        (8, 512, 0, VectorConfig(8, 8, 2, 4)),
        (16, 144, 0, VectorConfig(4, 16, 2, 4)),
        (16, 256, 0, VectorConfig(8, 8, 2, 4, ahead=2)),
        (4, 384, 32, DotConfig(16, 2, 3, 32, 2)),
        (4, 512, 128, DotConfig(16, 4, 1, 64, 4)),
        (8, 384, 0, DotConfig(16, 2, 3, 64, 2)),
        (8, 256, 0, DotConfig(16, 2, 2, 64, 2, ahead=1)),
    ],
    ids=str,
)
def test_values_of_one_row(
    interpreter: Interpreter, bits: int, k: int, group: int, config: VectorConfig | DotConfig
) -> None:
    """In one block or several, the last of which may be short."""
    layer = of_one_row(bits, k, 41, group)
    check(interpreter, *layer, FUSED, lambda step: print_vector(step, config, TARGET))
    args = of_one_row(bits, k, 44, group)[1][: 2 if bits == 16 else 3]
    two = (lambda x, w: halves(F.linear(x, w))) if bits == 16 else lambda *given: gated(*given, bits, group)
    check(interpreter, two, args, TWO, lambda step: print_vector(step, config, TARGET))


def of_one_row(bits: int, k: int, n: int, group: int) -> tuple[Layer, Operands]:
    if bits != 16:
        return weight_only(bits, 1, k, n, group)
    generator = torch.Generator().manual_seed(0)
    x, weight, bias = (torch.randn(s, generator=generator).to(BF16) for s in ((1, k), (n, k), (n,)))
    return lambda *given: torch.relu(F.linear(*given)), (x, weight, bias)


@pytest.mark.parametrize("fn", [partial(WEIGHT_ONLY_MM, bias=None, bits=4, group=128), partial(gated, bits=4, group=128)])
def test_a_weight_of_4_bits_is_loaded_before_its_row_is_there(fn: Layer) -> None:
    """The first block of each row, here the whole of it; the scales as well, if nothing writes either."""
    args = (torch.empty(1, 2048, dtype=BF16), torch.empty(64, 1024, dtype=torch.uint8), torch.empty(64, 16))
    low = searched(fn, *args)
    (step,) = next(w for w in alternatives(low)[0].ways if w.label in (FUSED, TWO)).steps
    for steady, early in ((low.inputs[1:], True), (low.inputs[1:2], False)):
        marked = replace(step, region=replace(step.region, steady=frozenset(steady)))
        (kernel,) = print_vector(marked, VectorConfig(4, 32, 2, 4), TARGET).kernels
        before, after = around_the_wait(kernel)
        assert bool(before) == early and after
        assert not early or sum("ld." in line for line in after) == 2  # the row's halves
    (kernel,) = print_vector(replace(step, region=marked.region), DotConfig(16, 4, 2, 128, 4), TARGET).kernels
    assert not around_the_wait(kernel)[0]  # its scales may be written


@pytest.mark.parametrize("bits", [8, 4])
def test_programs_of_one_row_have_the_whole_of_it_in_flight(bits: int) -> None:
    for n, k, products in ((3072, 2048, 1), (2048, 8192, 1), (8192, 2048, 2)):
        problem = WeightProblem(1, n, k, BF16, bits, 128 if bits == 4 else 0, products)
        (first, *_) = dots = dot_configs(problem, TARGET, 4)
        assert all(c.slices * c.chunks * c.width * 8 == k * bits and c.warps <= c.slices for c in dots)
        assert any(c.holds_row(problem) for c in dots) and first.programs(problem) >= 0.9 * TARGET.sm_count
        found = vector_configs(problem, TARGET, 4)
        assert len(found) == 4 and all(c.block_bytes == problem.row_bytes for c in found)
        values = [c.rows * k * products / (32 * c.warps) for c in found]
        assert max(values) <= 256
        assert values[0] * 768 * TARGET.sm_count < 2 * max(n * k * products, 64 * 768 * TARGET.sm_count)


@pytest.mark.parametrize("m", [1, 24])
@pytest.mark.parametrize("bits", [8, 4])
def test_gated_weights_of_few_bits_are_not_left_to_the_library(bits: int, m: int) -> None:
    """Each product is a kernel, and the gate another; of one row both are one. All ways give the same values."""
    args = weight_only(bits, m, 256, 48)[1][:3]
    low = searched(lambda *given: gated(*given, bits, 0), *args)
    (each,) = alternatives(low)
    assert {way.label for way in each.ways} == {LIBRARY, APART, TWO, ROW if m == 1 else DEQUANTIZED}
    for way in each.ways:
        if any(isinstance(s, Contraction) and s.quantized for s in way.steps):
            found = contraction_candidates(way.steps[0], TARGET, "default")
            assert bool(found) == (way.label == APART or m == 1)
            continue
        (got,) = run_lowered(replaced(low, {each.name: way}), dict(zip(low.inputs, args, strict=True)))
        want = gated(*args, bits, 0).float()
        assert (got.float() - want).norm() < 0.01 * want.norm()


def test_configurations_of_weights_fill_the_gpu() -> None:
    for m, n, k, bits, group in ((1, 4096, 4096, 4, 128), (64, 28672, 4096, 8, 0), (8, 4096, 14336, 4, 32)):
        problem = WeightProblem(m, n, k, BF16, bits, group)
        found = configs(problem, TARGET, 3)
        assert len({(c.block_n, c.block_k) for c in found}) == len(found) >= 2
        assert all(c.shared_bytes(problem) <= TARGET.shared_per_block for c in found)
        assert found[0].programs(problem) >= TARGET.sm_count * 0.9
    assert not configs(WeightProblem(1, 4096, 4096, BF16, 4, 40), TARGET, 3)  # no block divides these groups
    assert not configs(WeightProblem(4096, 4096, 4096, BF16, 8, 0), TARGET, 3)  # the library's product is faster


def compiled(sources: tuple[KernelSource, ...], arch: int) -> None:
    for source in sources:
        _, meta = compile_triton(source, Target.cuda(arch))
        assert meta["n_spills"] == 0


@pytest.mark.parametrize(("dtype", "arch"), [(FLOAT8, 90), (torch.int8, 90), (torch.int8, 80)])
def test_the_first_candidate_of_scaled_products_compiles_without_spills(dtype: torch.dtype, arch: int) -> None:
    m, k, n = 512, 1024, 1024
    args = (torch.empty(m, k, dtype=dtype), torch.empty(n, k, dtype=dtype), torch.empty(m), torch.empty(n))
    _, way = way_of(scaled_gelu, (*args, torch.empty(n, dtype=BF16), torch.empty(m, n, dtype=BF16)), FUSED)
    (first, *_) = contraction_candidates(way.steps[0], Target.cuda(arch), "default")
    compiled(first.sources, arch)
    if arch == 90:
        ptx = compile_to_text(first.sources[0], Target.cuda(arch), "ptx")
        kind = "e4m3.e4m3" if dtype == FLOAT8 else "s8.s8"
        assert re.search(rf"wgmma\.mma_async\.sync\.aligned\.m64n\d+k32\.[fs]32\.{kind}", ptx)


@pytest.mark.parametrize(("bits", "arch", "m"), [(4, 80, 4), (4, 90, 4), (8, 90, 4), (4, 90, 1)])
def test_the_first_candidate_of_weights_of_few_bits_compiles_without_spills(bits: int, arch: int, m: int) -> None:
    k, n, group = 4096, 4096, 128 if bits == 4 else 0
    stored = (torch.empty(n, k // 2, dtype=torch.uint8), torch.empty(n, k // 128)) if bits == 4 else None
    weight, scale = stored or (torch.empty(n, k, dtype=torch.int8), torch.empty(n))
    _, way = way_of(lambda *a: WEIGHT_ONLY_MM(*a, None, bits, group), (torch.empty(m, k, dtype=BF16), weight, scale), FUSED)
    found = contraction_candidates(way.steps[0], Target.cuda(arch), "default")
    compiled(next(c for c in found if m > 1 or c.label.startswith("dot")).sources, arch)


@pytest.mark.parametrize("stored", [torch.int8, FLOAT8])
@pytest.mark.parametrize(("m", "inner", "split"), [(16, 128, 1), (64, 32, 1), (64, 256, 1), (64, 128, 2)])
def test_widened_weights_are_read_before_the_next_ones_are_widened(
    stored: torch.dtype, m: int, inner: int, split: int
) -> None:
    """Other kernels are refused (`triton_in_flight.py`)."""
    k, n = 2048, 256
    args = (torch.empty(m, k, dtype=BF16), torch.empty(n, k, dtype=stored), torch.empty(n))
    _, way = way_of(lambda *a: WEIGHT_ONLY_MM(*a, None, 8, 0), args, FUSED)
    source, *_ = print_weights(way.steps[0], WeightConfig(m, 64, inner, 4, 3, split), TARGET).kernels
    compiled((source,), 90)
    text = compile_to_text(source, TARGET, "ttgir")
    assert "ttng.warp_group_dot " in text and set(re.findall(r"pendings = (\d+)", text)) == {"0"}


def test_what_has_no_float8_is_refused() -> None:
    _, way = way_of(*scaled(FLOAT8, 80, 64, 48), FUSED)
    with pytest.raises(UnsupportedError, match="float8"):
        contraction_candidates(way.steps[0], Target.cuda(80), "default")


def test_the_largest_tiles_and_programs_apart_are_measured_of_products_in_8_bits() -> None:
    """Where the model has them behind: it does not know the L2 cache's rate well enough. Not where tiles store directly, for
    which these columns are no whole groups, nor of other operands in default mode.
    """

    def biased(a: torch.Tensor, b: torch.Tensor, rows: torch.Tensor, columns: torch.Tensor, bias: torch.Tensor) -> Any:
        return torch.relu(SCALED_MM(a, b, rows, columns, bias, BF16))

    def proposed(mode: str, n: int, dtype: torch.dtype) -> list[str]:
        _, (*args, _) = scaled(dtype, 4096, 768, n, per_row=False)
        (step,) = way_of(biased, tuple(args), FUSED)[1].steps
        return [c.label for c in contraction_candidates(step, TARGET, mode)]

    first, *others = proposed("default", 2288, torch.int8)
    assert first.startswith("tma 128x128x128 w8 s3 g8 sub2 p264 flat")
    assert any(label.startswith(f"{first} apart") for label in others)
    assert any("128x256" in label and label.endswith("tail4") for label in others)
    plain, *others = proposed("default", 2304, torch.int8)
    assert plain == first and others and all(label.endswith(" direct") for label in others)
    x, w, r = (torch.randn(*shape).to(BF16) for shape in ((4096, 768), (2304, 768), (4096, 2304)))
    (step,) = way_of(lambda x, w, r: torch.relu(x @ w.T) + r, (x, w, r), FUSED)[1].steps
    assert not any("apart" in c.label for c in contraction_candidates(step, TARGET, "default"))
    assert any("apart" in c.label for c in contraction_candidates(step, TARGET, "max-autotune"))


def test_a_gelu_rounded_to_float8_leaves_room_for_large_tiles(monkeypatch: pytest.MonkeyPatch) -> None:
    """As on a GPU, where the cast is the kernel's own: a third of an error function, and no spilled registers."""
    monkeypatch.setattr(opsets, "KERNEL_DTYPES", frozenset((*opsets.KERNEL_DTYPES, FLOAT8)))

    def layer(
        a: torch.Tensor, b: torch.Tensor, rows: torch.Tensor, columns: torch.Tensor, bias: torch.Tensor, scale: torch.Tensor
    ) -> torch.Tensor:
        y = F.gelu(SCALED_MM(a, b, rows, columns, bias, BF16))
        return (y.float() * scale).clamp(-448.0, 448.0).to(FLOAT8)

    _, (*args, _) = scaled(FLOAT8, 4096, 768, 3072, per_row=False)
    (step,) = way_of(layer, (*args, torch.tensor(8.0)), FUSED)[1].steps
    assert epilogue_ops(step) < 0.7
    for candidate in contraction_candidates(step, TARGET, "default"):
        (kernel,) = candidate.sources
        assert "h.coarse_gelu" in kernel.text and compile_triton(kernel, TARGET)[1]["n_spills"] == 0
    assert any("128x256" in c.label for c in contraction_candidates(step, TARGET, "default"))


def test_long_sums_of_float8_are_promoted_on_hopper() -> None:
    for k, promoted in ((14336, False), (28672, True)):
        args = (torch.empty(512, k, dtype=FLOAT8), torch.empty(512, k, dtype=FLOAT8), torch.empty(512), torch.empty(512))
        _, way = way_of(lambda *a: SCALED_MM(*a, None, BF16), args, FUSED)
        labels = [c.label for c in contraction_candidates(way.steps[0], TARGET, "default")]
        assert labels and all(("promote" in label) == promoted for label in labels)
        assert not any("promote" in c.label for c in contraction_candidates(way.steps[0], Target.cuda(100), "default"))
