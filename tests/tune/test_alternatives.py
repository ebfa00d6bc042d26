"""Which way to compute a product and its epilogue is kept, and the plan that comes of it."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from fxopt import compiler
from fxopt.assemble import _launches, assemble
from fxopt.codegen.compile import Ready
from fxopt.ir.graph import Graph, Input, Phase, Role
from fxopt.ir.kernel import Artifact, CompileFailure, KernelSource
from fxopt.ir.region import Alias, BufferSpec, Call, Contraction, Ref, Region
from fxopt.journal import Journal
from fxopt.lower import Lowered, norm_scales, row_norms
from fxopt.lower.contractions import FUSED, LIBRARY, PADDED, ROW
from fxopt.lower.convolutions import ADD_RELU, BIAS_OF, CUDNN, RELU
from fxopt.lower.steady import with_steady_reads
from fxopt.options import Options
from fxopt.report.render import journal_to_text
from fxopt.runtime.artifacts import ArtifactStore
from fxopt.runtime.launch import CudaError
from fxopt.runtime.plan import Launch, Plan, allocated, check
from fxopt.target import Target
from fxopt.tune import alternatives as ways
from fxopt.tune import candidate, measure
from fxopt.tune.candidate import Candidate, Choice, contraction_candidates, triton_candidates
from fxopt.tune.choose import choose
from fxopt.tune.measure import Trial
from fxopt.tune.suspects import Suspects
from fxopt.tune.twins import Printer
from tests.lower.contracting import alternatives, searched
from tests.lower.test_grouped_products import activated

tuner = importlib.import_module("fxopt.tune.choose")  # the package has the function under that name
F = torch.nn.functional
BF16 = torch.bfloat16
TARGET = Target.cuda(90)
COMPARE = measure.Measurements.compare
MAX = {"mode": "max-autotune"}  # the cost model prunes nothing


class Bench:
    """Stands in for the compiler and the GPU: `seconds` by the beginning of a trial's label, 1 for the others."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.seconds: dict[str, float] = {}
        self.compiled: list[KernelSource] = []
        self.measured: list[tuple[str, list[str]]] = []
        self.buffers: list[dict[str, BufferSpec]] = []
        self.cold: list[frozenset[str]] = []
        self.failing: Callable[[KernelSource], bool] = lambda source: False
        self.spilling: Callable[[KernelSource], bool] = lambda source: False
        self.bytes_spilled = 8
        monkeypatch.setattr(Target, "current", staticmethod(lambda device: TARGET))
        monkeypatch.setattr(tuner, "compile_kernels", self.compile)
        monkeypatch.setattr(measure, "device_identity", lambda device: "gpu-test")
        monkeypatch.setattr(tuner.Measurements, "compare", lambda own, name, *rest: self.compare(name, *rest[:3]))

    def compile(self, sources: Iterable[KernelSource], target: Target, store: Any, ready: Ready) -> None:
        wanted = list(sources)
        for place, source in enumerate(wanted):
            self.compiled.append(source)
            wanted += ready(place, self._artifact(source))

    def _artifact(self, source: KernelSource) -> Artifact | CompileFailure:
        if self.failing(source):
            return CompileFailure("key", f"no {source.entry}")
        meta = {"n_spills": self.bytes_spilled if self.spilling(source) else 0}
        return Artifact(source.key("toolchain"), "triton", source.entry, Path("kernel.cubin"), meta)

    def compare(self, name: str, memory: measure.Memory, device: torch.device, trials: Sequence[Trial]) -> list[float]:
        self.measured.append((name, [t.label for t in trials]))
        self.buffers.append(dict(memory.buffers))
        self.cold.append(memory.cold)
        return [min((s for k, s in self.seconds.items() if t.label.startswith(k)), default=1.0) for t in trials]

    @property
    def contests(self) -> list[str]:
        """Names of the contests between ways, in order."""
        return [name for name, labels in self.measured if labels[0] == LIBRARY]


@pytest.fixture
def bench(monkeypatch: pytest.MonkeyPatch) -> Bench:
    return Bench(monkeypatch)


def rand(*shape: int) -> torch.Tensor:
    return torch.empty(shape, dtype=BF16)


def layer(x: torch.Tensor, w: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    return F.gelu(F.linear(x, w, b))


LAYER = (rand(256, 128), rand(512, 128), rand(512))


def captured(fn: Callable[..., Any] = layer, args: tuple[torch.Tensor, ...] = LAYER) -> Lowered:
    return searched(fn, *args)


def tuned(low: Lowered, store: ArtifactStore, **options: Any) -> tuple[Lowered, dict[str, Choice], list[Any], Journal]:
    journal = Journal("test")
    return *choose(low, Options(**{**MAX, **options}), store, journal), journal


def steps_of(low: Lowered) -> list[Any]:
    return [s for s in low.steps if not isinstance(s, Alias)]


def planned(low: Lowered, chosen: dict[str, Choice]) -> Plan:
    """The plan for `low`, through JSON and checked."""
    gm = torch.fx.symbolic_trace(torch.nn.Identity())
    inputs = [Input(n, Role.USER) for n in low.inputs]
    plan = assemble(Graph(gm, inputs, Phase.INFERENCE, "test", int), low, chosen, Journal("test"))
    again = Plan.from_json(plan.to_json())
    assert again == plan
    check(again)
    return again


def test_the_library_wins_ties(bench: Bench, store: ArtifactStore) -> None:
    bench.seconds = {FUSED: 0.98}
    low, chosen, failed, _ = tuned(captured(), store)
    call, region = steps_of(low)
    assert not failed and isinstance(call, Call) and isinstance(region, Region)
    assert set(chosen) == {region.name}
    plan = planned(low, chosen)
    assert [type(s) for s in plan.steps if isinstance(s, Call | Launch)] == [Call, Launch]


def test_products_are_compiled_first(bench: Bench, store: ArtifactStore) -> None:
    """Their texts are short, but they take longest."""
    tuned(captured(), store)
    products = ["gemm" in source.text for source in bench.compiled]
    assert products == sorted(products, reverse=True) and set(products) == {True, False}


def test_the_fastest_configuration_is_kept(bench: Bench, store: ArtifactStore) -> None:
    low = captured()
    (each,) = alternatives(low)
    labels = [c.label for c in contraction_candidates(each.ways[1].steps[0], TARGET, "max-autotune")]  # type: ignore[arg-type]
    bench.seconds = {FUSED: 0.9, f"{FUSED} {labels[2]}": 0.5}
    after, chosen, _, journal = tuned(low, store)
    (step,) = steps_of(after)
    assert isinstance(step, Contraction) and chosen[step.name].label == labels[2]
    assert bench.measured[-1][1] == [LIBRARY, *(f"{FUSED} {label}" for label in labels)]
    said = f"contractions: {step.name}: {FUSED} {labels[2]} (fused {labels[2]}: 500000.0 us, library: 1000000.0 us)"
    assert said in journal_to_text(journal)


LARGE = (rand(4096, 1024), rand(4096, 1024), rand(4096))


def kernel_beside_the_library(low: Lowered) -> tuple[Region, list[Candidate]]:
    """The region of the only alternatives' first way, and its candidates."""
    (each,) = alternatives(low)
    (region,) = (s for s in each.ways[0].steps if isinstance(s, Region))
    return region, Printer(lambda work: triton_candidates(work, TARGET, "default"))(region)


def beside_products(bench: Bench) -> list[KernelSource]:
    return [source for source in bench.compiled if "gemm" not in source.text]


def test_a_kernel_that_loses_to_a_product_is_compiled_in_one_configuration(bench: Bench, store: ArtifactStore) -> None:
    low = captured(args=LARGE)
    region, candidates = kernel_beside_the_library(low)
    assert len(candidates) > 1
    bench.seconds = {FUSED: 0.5}
    after, _, failed, _ = tuned(low, store, mode="default")
    assert not failed and isinstance(steps_of(after)[0], Contraction)
    assert [s.text for s in beside_products(bench)] == [candidates[0].sources[0].text]
    assert region.name not in [name for name, labels in bench.measured if labels[0] != LIBRARY]


def test_one_that_wins_is_compiled_in_all_and_chosen_among_them(bench: Bench, store: ArtifactStore) -> None:
    low = captured(args=LARGE)
    region, candidates = kernel_beside_the_library(low)
    bench.seconds = {candidates[-1].label: 0.5}
    after, chosen, failed, _ = tuned(low, store, mode="default")
    assert not failed and [type(s) for s in steps_of(after)] == [Call, Region]
    assert chosen[region.name].label == candidates[-1].label
    assert len(beside_products(bench)) == len(candidates)
    assert (region.name, [c.label for c in candidates]) in bench.measured
    planned(after, chosen)


@pytest.mark.parametrize("product", [0.5, 2.0])
@pytest.mark.parametrize("how", ["failing", "spilling"])
def test_where_its_first_configuration_is_no_good_another_one_stands_for_it(
    bench: Bench, store: ArtifactStore, how: str, product: float
) -> None:
    low = captured(args=LARGE)
    region, candidates = kernel_beside_the_library(low)
    (bad,) = candidates[0].sources
    setattr(bench, how, lambda source: source.compile_options == bad.compile_options and source.text == bad.text)
    bench.bytes_spilled = 64
    bench.seconds = {FUSED: product, candidates[0].label: 0.1}
    after, chosen, failed, _ = tuned(low, store, mode="default")
    assert not failed
    if product < 1:
        assert isinstance(steps_of(after)[0], Contraction)
    else:
        assert chosen[region.name].label in [c.label for c in candidates[1:]]


def test_a_fused_product_has_no_buffer(bench: Bench, store: ArtifactStore) -> None:
    """Nor the views of weights that only the library call named."""
    bench.seconds = {f"{FUSED} pointer": 0.5}
    low, chosen, _, _ = tuned(captured(), store)
    plan = planned(low, chosen)
    assert not any(isinstance(s, Alias) for s in plan.steps)
    ((name, choice),) = chosen.items()
    assert name == steps_of(low)[0].name
    assert set(allocated(plan)) == {low.outputs[0].name, *(s.name for s in choice.scratch)}


def test_an_operand_of_product_and_epilogue_is_two_parameters_of_the_kernel(bench: Bench, store: ArtifactStore) -> None:
    """And both of the product are promised to be aligned, which the executor sees to."""
    bench.seconds = {f"{FUSED} pointer": 0.5}
    low, chosen, _, _ = tuned(captured(lambda x, w: x + torch.relu(x @ w), (rand(256, 256), rand(256, 256))), store)
    (launch,) = (s for s in planned(low, chosen).steps if isinstance(s, Launch))
    x, w = low.inputs
    assert launch.buffers == (x, w, x, low.outputs[0].name) and set(launch.aligned) == {0, 1, 2, 3}
    assert not launch.inplace, "other programs still read the operand"


def test_a_split_product_shares_one_buffer_between_its_launches(bench: Bench, store: ArtifactStore) -> None:
    low = captured(layer, (rand(8, 4096), rand(256, 4096), rand(256)))
    (each,) = alternatives(low)
    options = contraction_candidates(each.ways[1].steps[0], TARGET, "max-autotune")  # type: ignore[arg-type]
    label = next(c.label for c in options if c.scratch)
    bench.seconds = {f"{FUSED} {label}": 0.5}
    after, chosen, _, _ = tuned(low, store)
    plan = planned(after, chosen)
    first, second = (s for s in plan.steps if isinstance(s, Launch))
    (scratch,) = chosen[each.name].scratch
    assert first.writes == (scratch.name,) and scratch.name in second.buffers and after.outputs[0].name in second.writes


def test_one_row_may_be_a_reduction(bench: Bench, store: ArtifactStore) -> None:
    bench.seconds = {ROW: 0.5}
    low, chosen, _, _ = tuned(captured(layer, (rand(1, 4096), rand(4096, 4096), rand(4096))), store)
    (region,) = steps_of(low)
    assert isinstance(region, Region) and region.name.endswith(ROW) and region.nest.reduced
    assert set(chosen) == {region.name}
    (launch,) = (s for s in planned(low, chosen).steps if isinstance(s, Launch))
    assert launch.label == region.name


def test_the_second_compilation_asks_the_records(bench: Bench, store: ArtifactStore) -> None:
    bench.seconds = {FUSED: 0.5}
    first, chosen, _, _ = tuned(captured(), store)
    assert len(bench.contests) == 1
    bench.seconds = {}
    second, again, _, _ = tuned(captured(), store)
    assert len(bench.contests) == 1
    assert [c.label for c in chosen.values()] == [c.label for c in again.values()]
    assert [s.name for s in steps_of(first)] == [s.name for s in steps_of(second)]
    tuned(captured(layer, (rand(320, 128), *LAYER[1:])), store)
    assert len(bench.contests) == 2, "other sizes are another contest"


def test_another_dtype_or_layout_of_an_operand_is_another_contest(bench: Bench, store: ArtifactStore) -> None:
    tuned(captured(), store)
    tuned(captured(lambda x, w, b: F.gelu(x @ w + b), (LAYER[0], rand(128, 512), LAYER[2])), store)
    tuned(captured(layer, tuple(t.to(torch.float16) for t in LAYER)), store)
    assert len(bench.contests) == 3


def two_layers(x: torch.Tensor, v: torch.Tensor, c: torch.Tensor, w: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    return layer(layer(x, v, c), w, b)


SQUARE = (rand(256, 512), rand(512, 512), rand(512), rand(512, 512), rand(512))


@pytest.mark.parametrize("winner", [LIBRARY, FUSED])
def test_equal_layers_are_one_contest_and_keep_their_buffers(bench: Bench, store: ArtifactStore, winner: str) -> None:
    bench.seconds = {winner: 0.5}
    low = captured(two_layers, SQUARE)
    first, second = alternatives(low)
    after, chosen, _, _ = tuned(low, store)
    assert bench.contests == [first.name]
    one, other = (chosen[n].kernels[0] for n in (first.name, second.name))
    assert one[1] == other[1] and set(one[0].buffers) != set(other[0].buffers)
    assert chosen[first.name].label == chosen[second.name].label
    plan = planned(after, chosen)
    one, other = (s for s in plan.steps if isinstance(s, Launch))
    if winner == FUSED:
        assert set(one.writes) <= set(other.buffers), "the second layer reads what the first has stored"
        weights = [{n for n in step.buffers if low.buffers[n].shape == (512, 512)} for step in (one, other)]
        assert [len(w) for w in weights] == [1, 1] and weights[0] != weights[1]


def test_a_configuration_that_does_not_compile_costs_only_itself(bench: Bench, store: ArtifactStore) -> None:
    bench.failing = lambda source: "tma" in source.text
    bench.seconds = {FUSED: 0.5}
    low, chosen, failed, _ = tuned(captured(), store)
    ((_, labels),) = [m for m in bench.measured if m[1][0] == LIBRARY]
    assert not failed and len(labels) > 1 and not any("tma" in label for label in labels)
    (step,) = steps_of(low)
    assert chosen[step.name].label.startswith("pointer")


def test_a_configuration_that_does_not_run_costs_only_itself(bench: Bench, store: ArtifactStore) -> None:
    bench.seconds = {f"{FUSED} tma": float("inf"), f"{FUSED} pointer": 0.5}
    low, chosen, _, _ = tuned(captured(), store)
    (step,) = steps_of(low)
    assert chosen[step.name].label.startswith("pointer")


def test_a_kernel_that_the_driver_refuses_to_launch_costs_only_itself(monkeypatch: pytest.MonkeyPatch) -> None:
    """A tensor that it cannot describe, or too many registers: found out at the first launch only."""
    launches: list[int] = []

    class Kernel:
        def bind(self, entry: str) -> Callable[..., None]:
            def launch(*arguments: int) -> None:
                launches.append(len(arguments))
                raise CudaError("launching", 701, "CUDA_ERROR_LAUNCH_OUT_OF_RESOURCES", "too many resources")

            return launch

    class Stream:
        cuda_stream = 0

    monkeypatch.setattr(measure, "load_cubin", lambda *args: Kernel())
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(torch.cuda, "current_stream", Stream)
    source = KernelSource("triton", "k", "", ("x",), (), (1, 1, 1), {})
    artifact = Artifact("key", "triton", "k", Path("kernel.cubin"), {})
    assert measure.runner(Trial("k", ((source, artifact),)), {"x": torch.empty(1)}, {}) is None
    assert launches == [5]


def test_products_that_spill_are_no_candidates(bench: Bench, store: ArtifactStore) -> None:
    bench.seconds = {FUSED: 0.1}
    bench.spilling = lambda source: "gemm" in source.text
    low, _, failed, _ = tuned(captured(), store)
    assert not failed and [type(s) for s in steps_of(low)] == [Call, Region]
    bench.spilling = lambda source: "gemm" in source.text and source.compile_options["num_warps"] == 4
    _, chosen, failed, _ = tuned(captured(), store)
    assert not failed and [k.compile_options["num_warps"] for c in chosen.values() for k, _ in c.kernels] == [8]


def test_without_any_contraction_that_compiles_the_library_is_kept(bench: Bench, store: ArtifactStore) -> None:
    bench.failing = lambda source: "gemm" in source.text
    low, chosen, failed, _ = tuned(captured(), store)
    assert not failed and not bench.contests
    assert [type(s) for s in steps_of(low)] == [Call, Region] and planned(low, chosen)


def test_a_region_beside_the_library_that_does_not_compile_is_reported(bench: Bench, store: ArtifactStore) -> None:
    """Whatever the contraction would have done: what there is to retreat to has to work."""
    bench.failing = lambda source: "gemm" not in source.text
    low = captured()
    (each,) = alternatives(low)
    _, chosen, failed, _ = tuned(low, store)
    assert not chosen and [(region.name, reason[:3]) for region, reason in failed] == [(each.ways[0].steps[1].name, "no ")]


def test_without_a_budget_the_library_is_kept_for_now(
    bench: Bench, store: ArtifactStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tuner.Measurements, "compare", COMPARE)
    low, chosen, _, journal = tuned(captured(), store, tuning_seconds=0)
    assert journal.provisional
    assert [type(s) for s in steps_of(low)] == [Call, Region] and planned(low, chosen)


def test_what_cannot_win_by_the_cost_model_is_not_compiled(
    bench: Bench, store: ArtifactStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(candidate, "MODEL_ERROR", 0.0)
    bench.failing = lambda source: "gemm" in source.text
    low, _, failed, _ = tuned(captured(), store, mode="default")
    assert not failed and not bench.contests and [type(s) for s in steps_of(low)] == [Call, Region]
    assert not any("gemm" in source.text for source in bench.compiled)
    tuned(captured(), store)
    assert any("gemm" in source.text for source in bench.compiled), "max-autotune tries everything"


def test_trials_have_the_memory_that_calls_and_kernels_name(bench: Bench, store: ArtifactStore) -> None:
    tuned(captured(), store)
    (each,) = alternatives(captured())
    assert set(bench.buffers[-1]) == set(each.buffers)
    named = {n for way in each.ways for s in way.steps if not isinstance(s, Call) for n in (*s.reads(), *s.writes())}
    assert named <= set(each.buffers) and {v.of for v in each.views} <= set(each.buffers)


def convolution(x: torch.Tensor, w: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    return F.relu(F.conv2d(x, w, b, padding=1))


def images() -> tuple[torch.Tensor, ...]:
    return rand(2, 16, 7, 5).contiguous(memory_format=torch.channels_last), rand(24, 16, 3, 3), rand(24)


def test_a_convolution_with_its_activation_is_one_call(bench: Bench, store: ArtifactStore) -> None:
    bench.seconds = {CUDNN: 0.5}
    low, chosen, _, _ = tuned(captured(convolution, images()), store)
    (call,) = steps_of(low)
    assert call.op == RELU and not chosen
    plan = planned(low, chosen)
    assert plan.steps[0] == call and set(allocated(plan)) <= {low.outputs[0].name}


def test_regions_beside_a_convolution_take_their_own_winners(bench: Bench, store: ArtifactStore) -> None:
    """Of a padded copy before it and a pooling after it one configuration each is in the contest."""

    def first_layer(x: torch.Tensor, w: torch.Tensor) -> torch.Tensor:
        return F.max_pool2d(F.silu(F.conv2d(x, w, None, 2, 3)), 3, 2, 1)

    bench.seconds = {PADDED: 0.5}
    images = rand(16, 3, 112, 112).contiguous(memory_format=torch.channels_last), rand(64, 3, 7, 7)
    low, chosen, failed, _ = tuned(captured(first_layer, images), store, mode="default")
    *copies, product, pooling = steps_of(low)
    assert not failed and [type(s) for s in (*copies, product, pooling)] == [Region, Region, Contraction, Region]
    labels = [label for _, found in bench.measured if found[0] == LIBRARY for label in found if label.startswith(PADDED)]
    assert len(labels) == len(contraction_candidates(product, TARGET, "default")) > 1
    launches = [s for s in planned(low, chosen).steps if isinstance(s, Launch)]
    assert len(launches) == 4


@pytest.mark.parametrize("op", [RELU, ADD_RELU])
@pytest.mark.parametrize("keeps", [True, False])
def test_a_call_that_makes_zero_of_nan_is_no_candidate(op: str, keeps: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """As cuDNN's relu does, unless it is told to keep NaN; torch's keeps it."""
    given: list[torch.Tensor | None] = []

    def fused(*args: Any) -> torch.Tensor:
        given.append(args[BIAS_OF[op]])
        value = F.relu(F.conv2d(args[0], args[1], given[-1]))
        return value if keeps else value.nan_to_num(0)

    monkeypatch.setattr(measure, "resolve_op", lambda name: fused)
    names = ("x", "w", "z") if op == ADD_RELU else ("x", "w")
    shapes = {"x": (1, 2, 3, 3), "w": (4, 2, 1, 1), "z": (1, 4, 3, 3)}
    tensors = {n: torch.zeros(shapes[n]) for n in names}
    buffers = {n: BufferSpec(n, t.dtype, t.device, t.shape, t.stride()) for n, t in tensors.items()}
    more = (1.0, None) if op == ADD_RELU else (None,)
    call = Call(op, (*map(Ref, names), *more, [1, 1], [0, 0], [1, 1], 1))
    run = measure.runner(Trial("cudnn", (measure.BoundCall(call, buffers, ()),)), tensors, {})
    assert (run is not None) == keeps
    assert given[0] is None and given[1] is not None


def test_groups_of_made_up_rows_are_even(monkeypatch: pytest.MonkeyPatch) -> None:
    """Made-up ends of zero would be no rows at all, and nothing to measure."""
    low = captured(activated, (rand(75, 64), rand(5, 96, 64), torch.zeros(5, dtype=torch.int32)))
    (each,) = alternatives(low)
    memory = ways.memory_of(each)
    assert list(memory.ends.values()) == [75]
    seen: list[torch.Tensor] = []
    monkeypatch.setattr(measure, "runner", lambda trial, tensors, *rest: seen.extend(tensors[n] for n in memory.ends))
    monkeypatch.setattr(measure, "interleaved", lambda *args: [])
    on_cpu = {n: replace(s, device=torch.device("cpu")) for n, s in memory.buffers.items()}
    measure.time_trials(replace(memory, buffers=on_cpu), torch.device("cpu"), [Trial("one", ())], Suspects(None))
    assert [t.tolist() for t in seen] == [[15, 30, 45, 60, 75]]


@pytest.mark.parametrize(("total", "cold"), [(1 << 20, False), (1 << 30, True)])
def test_weights_of_a_large_model_are_cold(bench: Bench, store: ArtifactStore, total: int, cold: bool) -> None:
    """Where a product of one row reads little else, in its ways' contest and in that of a region's configurations."""
    low = captured(layer, (rand(1, 2048), rand(2048, 2048), rand(2048)))
    marked = with_steady_reads(low, low.inputs[1:])
    assert marked.lasting_bytes == 2 * (2048 * 2048 + 2048)
    tuned(replace(marked, lasting_bytes=total), store)
    assert bench.cold[-1] == (frozenset(low.inputs[1:]) if cold else frozenset())


def test_other_settings_of_cudnn_are_another_contest(bench: Bench, store: ArtifactStore) -> None:
    """It may compute by other algorithms then."""
    for benchmark, contests in ((False, 1), (True, 2), (False, 2)):
        with torch.backends.cudnn.flags(enabled=True, benchmark=benchmark):
            tuned(captured(convolution, images()), store)
        assert len(bench.contests) == contests


@pytest.mark.parametrize(("programs", "early"), [(1, True), (128, False)])
def test_tiles_are_launched_early_beside_few_programs(programs: int, early: bool) -> None:
    (contraction,) = (s for each in alternatives(captured()) for s in each.ways[1].steps if isinstance(s, Contraction))
    printed = contraction_candidates(contraction, TARGET, "max-autotune")[0]
    made = [Artifact("key", "triton", s.entry, Path("kernel.cubin"), {"chained": True}) for s in printed.sources]
    choice = Choice(printed.label, tuple(zip(printed.sources, made, strict=True)))
    before = Launch("k", "triton", "k", ("x",), ("x",), contraction.device, grid=(programs, 1, 1))
    (launch,) = _launches(contraction, choice, True, before)
    assert isinstance(launch, Launch) and launch.early is early
    assert not any(s.early for s in _launches(contraction, choice, False, before) if isinstance(s, Launch))


@pytest.mark.parametrize("faster", [row_norms.APART, row_norms.WITHIN])
def test_a_norm_goes_into_its_products_where_that_is_faster(bench: Bench, store: ArtifactStore, faster: str) -> None:
    def fn(x: torch.Tensor, residual: torch.Tensor, w: torch.Tensor, g: torch.Tensor, v: torch.Tensor) -> Any:
        total = residual + F.linear(x, w)
        return total, F.linear(F.rms_norm(total, (512,), g), v)

    low = captured(fn, (rand(1, 128), rand(1, 512), rand(512, 128), rand(512), rand(256, 512)))
    bench.seconds = {ROW: 0.5, faster: 0.5}
    first, chosen, failed, journal = tuned(low, store)
    assert not failed and len(steps_of(first)) == 3
    gm = torch.fx.symbolic_trace(torch.nn.Identity())
    graph = Graph(gm, [Input(n, Role.PARAMETER) for n in low.inputs], Phase.INFERENCE, "test", int)
    kept, chosen = compiler._with_row_norms(graph, first, chosen, Options(), journal, store)
    assert len(steps_of(kept)) == (3 if faster == row_norms.APART else 2)
    assert bench.measured[-1][1][0].startswith(row_norms.APART)
    planned(kept, chosen)


@pytest.mark.parametrize("faster", [norm_scales.STORED, norm_scales.SCALED])
def test_a_norm_becomes_factors_of_rows_where_that_is_faster(bench: Bench, store: ArtifactStore, faster: str) -> None:
    def fn(x: torch.Tensor, residual: torch.Tensor, g: torch.Tensor, w: torch.Tensor) -> Any:
        total = residual + x
        return total, F.linear(F.rms_norm(total, (512,), g), w)

    args = (rand(2048, 512), rand(2048, 512), *(torch.rand(shape).to(torch.bfloat16) for shape in ((512,), (256, 512))))
    low = captured(fn, args)
    known = dict(zip(low.inputs[2:], args[2:], strict=True))
    low = replace(low, inputs=low.inputs[:2], constants=known)
    first, chosen, failed, journal = tuned(low, store)
    assert not failed and isinstance(steps_of(first)[1], Call)
    bench.seconds = {faster: 0.98}  # ways that differ in little else
    gm = torch.fx.symbolic_trace(torch.nn.Identity())
    graph = Graph(gm, [Input(n, Role.PARAMETER) for n in low.inputs], Phase.INFERENCE, "test", int)
    kept, chosen = compiler._with_row_norms(graph, first, chosen, Options(), journal, store)
    contraction = steps_of(kept)[1]
    assert isinstance(contraction, Contraction) == (faster == norm_scales.SCALED)
    assert bench.measured[-1][1][0].startswith(norm_scales.STORED)
    if isinstance(contraction, Contraction):
        weight = kept.constants[contraction.b.buffer]
        assert torch.equal(weight, (args[3].double() * args[2].double()).to(weight.dtype))
    planned(kept, chosen)
    off = Options(disable=(norm_scales.NAME,))
    assert compiler._with_row_norms(graph, first, chosen, off, journal, store)[0] is first


def test_the_product_before_adds_up_a_norms_squares_where_that_is_faster(bench: Bench, store: ArtifactStore) -> None:
    def fn(x: torch.Tensor, residual: torch.Tensor, before: torch.Tensor, g: torch.Tensor, w: torch.Tensor) -> Any:
        total = residual + F.linear(x, before)
        return total, F.linear(F.rms_norm(total, (512,), g), w)

    weights = (torch.rand(shape).to(torch.bfloat16) for shape in ((512, 256), (512,), (256, 512)))
    args = (rand(2048, 256), rand(2048, 512), *weights)
    low = captured(fn, args)
    low = replace(low, inputs=low.inputs[:2], constants=dict(zip(low.inputs[2:], args[2:], strict=True)))
    first, chosen, failed, journal = tuned(low, store)
    assert not failed and [type(s) for s in steps_of(first)] == [Call, Region, Call]
    bench.seconds = {norm_scales.SUMMED: 0.5}
    gm = torch.fx.symbolic_trace(torch.nn.Identity())
    graph = Graph(gm, [Input(n, Role.PARAMETER) for n in low.inputs], Phase.INFERENCE, "test", int)
    kept, chosen = compiler._with_row_norms(graph, first, chosen, Options(), journal, store)
    assert [type(s) for s in steps_of(kept)] == [Contraction, Region, Contraction]
    labels = bench.measured[-1][1]
    assert [label.split()[0] for label in labels] == [norm_scales.STORED, norm_scales.SCALED, norm_scales.SUMMED]
    planned(kept, chosen)


@pytest.mark.parametrize("faster", [row_norms.APART, row_norms.SUMMED])
def test_a_norm_adds_up_parts_of_the_librarys_product_where_that_is_faster(
    bench: Bench, store: ArtifactStore, faster: str
) -> None:
    def fn(x: torch.Tensor, residual: torch.Tensor, w: torch.Tensor, g: torch.Tensor) -> Any:
        return F.rms_norm(residual + x @ w, (512,), g)

    low = captured(fn, (rand(1, 1024), rand(1, 512), rand(1024, 512), rand(512)))
    bench.seconds = {LIBRARY: 0.5, faster: 0.5}
    first, chosen, failed, journal = tuned(low, store)
    assert not failed and isinstance(steps_of(first)[0], Call)
    gm = torch.fx.symbolic_trace(torch.nn.Identity())
    graph = Graph(gm, [Input(n, Role.PARAMETER) for n in low.inputs], Phase.INFERENCE, "test", int)
    kept, chosen = compiler._with_row_norms(graph, first, chosen, Options(), journal, store)
    assert isinstance(steps_of(kept)[0], Call) == (faster == row_norms.APART)
    assert bench.measured[-1][1][0].startswith(row_norms.APART)
    planned(kept, chosen)


@pytest.mark.parametrize(
    ("seconds", "kept"),
    [((5.0, 1.0, 1.03), "kernel a bounded"), ((5.0, 1.0, 1.04), "kernel a"), ((1.0, 1.2, 1.01), "kernel a bounded")],
)
def test_what_may_read_less_wins_a_tie(seconds: tuple[float, ...], kept: str) -> None:
    """Made-up masks show all keys."""
    figures = dict(zip(("library", "kernel a", "kernel a bounded"), seconds, strict=True))
    winner = min(figures, key=figures.__getitem__)
    assert ways._reading_less(winner, figures) == kept
    assert ways._reading_less("library", {"library": 1.0, "kernel a": 2.0}) == "library"
    assert ways._reading_less("library", {}) == "library", "nothing has run"
