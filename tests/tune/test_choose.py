"""Contests between candidates: equal regions share one, few are compiled where that is enough, ties are stable."""

from __future__ import annotations

import contextlib
import fcntl
import importlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from fxopt.codegen.compile import Ready
from fxopt.ir.exprs import Int, Sym, contiguous_strides, symbol
from fxopt.ir.kernel import Artifact, CompileFailure, KernelSource
from fxopt.ir.loops import Load, Nest, Op, Reduce, Store
from fxopt.ir.region import Batch, BufferSpec, Region
from fxopt.journal import Journal
from fxopt.lower import Lowered
from fxopt.lower.batching import steps_of
from fxopt.options import Options
from fxopt.runtime.artifacts import ArtifactStore
from fxopt.target import Target
from fxopt.tune import measure
from fxopt.tune.candidate import CANDIDATES_AT_MOST, Choice, candidate_count, triton_candidates
from fxopt.tune.choose import choose
from fxopt.tune.measure import Trial
from fxopt.tune.suspects import FOLDER
from fxopt.tune.values import unlike_the_first

tuner = importlib.import_module("fxopt.tune.choose")  # the package has the function under that name
CUDA = torch.device("cuda", 0)
TARGET = Target.cuda(90)


def spec(name: str, *shape: Int) -> BufferSpec:
    return BufferSpec(name, torch.float32, CUDA, shape, contiguous_strides(shape))


def row_sum(name: str, source: str, rows: Int = 4096, row: int = 1024) -> Region:
    p, r = Sym("x0", size=rows), Sym("r1", size=row)
    value = Reduce("sum", (Load(source, symbol(p) * row + symbol(r), torch.float32),), (r,), torch.float32)
    nest = Nest((p,), (r,), (Store(name, symbol(p), value),))
    return Region(f"region_{name}", nest, {source: spec(source, rows, row), name: spec(name, rows)}, CUDA)


def square(name: str, source: str, n: int) -> Region:
    x = Sym("x0", size=n)
    load = Load(source, symbol(x), torch.float32)
    nest = Nest((x,), (), (Store(name, symbol(x), Op("mul", (load, load), torch.float32)),))
    return Region(f"region_{name}", nest, {source: spec(source, n), name: spec(name, n)}, CUDA)


class Bench:
    """Stands in for the compiler and the GPU: `seconds` by label, or the same for all."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.seconds: dict[str, float] = {}
        self.compiled: list[KernelSource] = []
        self.measured: list[str] = []
        self.failing: tuple[str, ...] = ()
        self.spilled: Callable[[KernelSource], int] = lambda source: 0
        monkeypatch.setattr(Target, "current", staticmethod(lambda device: TARGET))
        monkeypatch.setattr(tuner, "compile_kernels", self.compile)
        monkeypatch.setattr(measure, "device_identity", lambda device: "gpu-test")
        monkeypatch.setattr(tuner.Measurements, "compare", lambda own, name, *rest: self.compare(name, rest[2]))

    def compile(self, sources: Iterable[KernelSource], target: Target, store: Any, ready: Ready) -> None:
        wanted = list(sources)
        for place, source in enumerate(wanted):
            self.compiled.append(source)
            wanted += ready(place, self._artifact(source))

    def _artifact(self, source: KernelSource) -> Artifact | CompileFailure:
        if source.entry in self.failing:
            return CompileFailure("key", f"no {source.entry}")
        meta = {"n_spills": self.spilled(source)}
        return Artifact(source.key("toolchain"), "triton", source.entry, Path("kernel.cubin"), meta)

    def compare(self, name: str, trials: Sequence[Trial]) -> list[float]:
        self.measured.append(name)
        return [self.seconds.get(t.label, 1.0) for t in trials]


@pytest.fixture
def bench(monkeypatch: pytest.MonkeyPatch) -> Bench:
    return Bench(monkeypatch)


def lowered(*regions: Region | Batch) -> Lowered:
    buffers = {n: s for r in regions for n, s in r.buffers.items()}
    return Lowered(list(regions), buffers, (), {}, ())


def choices(regions: Sequence[Region | Batch], store: ArtifactStore, **options: Any) -> tuple[dict[str, Choice], list[Any]]:
    return choose(lowered(*regions), Options(**options), store, Journal("test"))[1:]


def test_equal_regions_are_measured_once_and_keep_their_own_buffers(bench: Bench, store: ArtifactStore) -> None:
    regions = [row_sum("a", "x"), row_sum("b", "y"), row_sum("c", "z", row=2048)]
    chosen, failed = choices(regions, store)
    assert not failed
    assert bench.measured == ["region_a", "region_c"]
    assert [k.buffers for k, _ in chosen["region_a"].kernels] == [("x", "a")]
    assert [k.buffers for k, _ in chosen["region_b"].kernels] == [("y", "b")]
    assert chosen["region_a"].kernels[0][1] == chosen["region_b"].kernels[0][1]


def test_what_spills_a_few_words_is_measured_after_what_spills_nothing(
    bench: Bench, store: ArtifactStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    region, trials = row_sum("a", "x"), list[str]()

    def compare(name: str, given: Sequence[Trial]) -> list[float]:
        trials.extend(t.label for t in given)
        return [1.0 for _ in given]

    monkeypatch.setattr(bench, "compare", compare)
    offered = triton_candidates(region, TARGET, "default")
    labels = [c.label for c in offered]
    assert len(labels) > 2
    spilled = {s.key("toolchain"): n for c, n in zip(offered, (8, 64), strict=False) for s in c.sources}
    bench.spilled = lambda source: spilled.get(source.key("toolchain"), 0)
    choices([region], store)
    assert trials == [*labels[2:], labels[0]]


def test_configurations_must_have_the_values_of_the_first(
    bench: Bench, store: ArtifactStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A compiler's mistake in one of them is found before that one is timed."""
    checks = []

    def compare(own: Any, name: str, memory: Any, device: Any, trials: Sequence[Trial], check: Any) -> list[float]:
        checks.append(check)
        return [1.0 for _ in trials]

    monkeypatch.setattr(tuner.Measurements, "compare", compare)
    choices([row_sum("a", "x")], store)
    assert checks == [unlike_the_first]


def test_what_is_built_is_measured_while_the_rest_is_compiled(
    bench: Bench, store: ArtifactStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    log: list[str] = []

    def compile(sources: Iterable[KernelSource], target: Target, store: Any, ready: Ready) -> None:
        for place, source in enumerate(list(sources)):
            log.append("built")
            ready(place, bench._artifact(source))

    def compare(own: Any, name: str, memory: Any, device: Any, trials: Sequence[Trial], *rest: Any) -> list[float]:
        log.append(f"measured {len(trials)}")
        return [1.0 for _ in trials]

    monkeypatch.setattr(tuner, "compile_kernels", compile)
    monkeypatch.setattr(tuner.Measurements, "compare", compare)

    def decide_calls(low: Lowered) -> Lowered:
        log.append("calls")
        return low

    regions = lowered(row_sum("a", "x"), row_sum("b", "y", row=2048))
    _, chosen, failed = choose(regions, Options(), store, Journal("test"), decide_calls)
    assert not failed and set(chosen) == {"region_a", "region_b"}
    measured = [k for k, entry in enumerate(log) if entry.startswith("measured")]
    assert log[0] == "calls" and sorted(log[k] for k in measured) == ["measured 3", "measured 4"]  # one moves 32 MiB
    assert measured[0] < len(log) - 1 - log[::-1].index("built")


def test_equal_split_regions_have_scratch_of_their_own(bench: Bench, store: ArtifactStore) -> None:
    chosen, _ = choices([row_sum("a", "x", 4, 1 << 20), row_sum("b", "y", 4, 1 << 20)], store)
    scratch = {name: [s.name for s in choice.scratch] for name, choice in chosen.items()}
    assert scratch == {"region_a": ["region_a.scratch0"], "region_b": ["region_b.scratch0"]}
    assert "region_b.scratch0" in chosen["region_b"].kernels[0][0].buffers


def test_the_second_compilation_asks_the_records(bench: Bench, store: ArtifactStore) -> None:
    labels = [c.label for c in triton_candidates(row_sum("a", "x"), TARGET, "default")]
    bench.seconds = {labels[1]: 0.5}
    assert choices([row_sum("a", "x")], store)[0]["region_a"].label == labels[1]
    assert choices([row_sum("b", "y")], store)[0]["region_b"].label == labels[1]
    assert bench.measured == ["region_a"]


def test_a_contest_that_another_process_measured_meanwhile_is_not_measured_again(
    bench: Bench, store: ArtifactStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    labels = [c.label for c in triton_candidates(row_sum("a", "x"), TARGET, "default")]
    turns: list[torch.device] = []

    @contextlib.contextmanager
    def turn(own: Any, device: torch.device, cache: Path) -> Iterator[None]:
        turns.append(device)
        if len(turns) == 1:  # this process waits, and the other one compiles the same
            bench.seconds = {labels[1]: 0.5}
            choices([row_sum("a", "x")], ArtifactStore(store.directory))
            bench.seconds = {}
        yield

    monkeypatch.setattr(tuner.Measurements, "turn", turn)
    assert choices([row_sum("b", "y")], store)[0]["region_b"].label == labels[1]
    assert bench.measured == ["region_a"]
    assert turns == [CUDA, CUDA]


def test_waiting_for_the_gpu_ends_and_is_not_charged(bench: Bench, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(measure, "PATIENCE_SECONDS", 0.05)
    monkeypatch.setenv("FXOPT_LOCK_DIR", str(tmp_path / "elsewhere"))
    (tmp_path / "elsewhere").mkdir()
    journal = Journal("test")
    measurements = measure.Measurements(journal, budget=0.01)
    with open(tmp_path / "elsewhere" / "gpu-test", "w") as other:
        fcntl.flock(other, fcntl.LOCK_EX)
        for _ in range(2):
            with measurements.turn(CUDA, tmp_path):
                assert measurements.left == 0.01
    assert len(journal.notes) == 1
    assert not (tmp_path / "locks").exists()
    with measurements.turn(CUDA, tmp_path):
        pass
    assert len(journal.notes) == 1


def test_records_hold_for_the_sizes_that_were_assumed(
    bench: Bench, store: ArtifactStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows = symbol(Sym("s0", lo=2))
    regions = [row_sum("a", "x", rows, 4096)]
    choices(regions, store)
    choices(regions, store)
    assert bench.measured == ["region_a"]
    monkeypatch.setattr(measure, "assumed", lambda x: 2048)
    choices(regions, store)
    assert bench.measured == ["region_a", "region_a"]


@pytest.mark.parametrize(("second", "winner"), [(0.99, 0), (0.98, 1), (1.5, 0)])
def test_ties_go_to_the_cost_model(bench: Bench, store: ArtifactStore, second: float, winner: int) -> None:
    labels = [c.label for c in triton_candidates(row_sum("a", "x"), TARGET, "default")]
    bench.seconds = {labels[1]: second}
    assert choices([row_sum("a", "x")], store)[0]["region_a"].label == labels[winner]


def test_what_does_not_compile_is_reported_for_every_region(bench: Bench, store: ArtifactStore) -> None:
    bench.failing = ("fx_row_sum",)
    chosen, failed = choices([row_sum("a", "x"), row_sum("b", "y")], store)
    assert not chosen
    assert [(r.name, reason) for r, reason in failed] == [("region_a", "no fx_row_sum"), ("region_b", "no fx_row_sum")]


def test_small_regions_are_not_measured(bench: Bench, store: ArtifactStore) -> None:
    choices([square("a", "x", 4096), row_sum("b", "y", 16, 64)], store)
    assert len(bench.compiled) == 2 and not bench.measured


@pytest.mark.parametrize("mode", ["default", "max-autotune"])
def test_without_time_for_measuring_the_cost_models_choice_alone_is_compiled(
    bench: Bench, store: ArtifactStore, mode: str
) -> None:
    first = triton_candidates(row_sum("a", "x"), TARGET, mode)[0].label
    chosen, _ = choices([row_sum("a", "x")], store, mode=mode, tuning_seconds=0)
    assert chosen["region_a"].label == first and len(bench.compiled) == 1 and not bench.measured


def test_regions_that_check_indices_are_measured_on_valid_ones(bench: Bench, store: ArtifactStore) -> None:
    from tests.codegen.triton_nests import gather

    region = gather().region
    buffers = {n: replace(s, device=CUDA) for n, s in region.buffers.items()}
    choices([replace(region, device=CUDA, buffers=buffers)], store, mode="max-autotune")
    assert len(bench.compiled) > 1 and bench.measured == [region.name]


def test_modes_widen_the_search() -> None:
    big = row_sum("a", "x")
    assert candidate_count(big, "default") == 3
    assert candidate_count(square("a", "x", 1 << 20), "default") == 2
    assert candidate_count(big, "max-autotune") == CANDIDATES_AT_MOST
    assert len(triton_candidates(row_sum("a", "x", row=8192), TARGET, "max-autotune")) > 3


def batch_of_squares(*sizes: int) -> Batch:
    (batch,) = steps_of("region", [square(f"o{k}", f"x{k}", n) for k, n in enumerate(sizes)])
    assert isinstance(batch, Batch)
    return batch


def test_a_batch_is_one_contest_over_all_of_its_members(bench: Bench, store: ArtifactStore) -> None:
    batch = batch_of_squares(*([1 << 20] * 7), 5)
    chosen, failed = choices([batch], store)
    assert not failed and bench.measured == [batch.name]
    ((source, _),) = chosen[batch.name].kernels
    assert source.members == batch.elements and source.grid[0] == 7 * (1 << 20) // source.block + 1
    assert source.buffers[:4] == ("x0", "o0", "x1", "o1") and source.entry == "fx_batch_mul"


def test_a_part_of_a_batch_is_measured(bench: Bench, store: ArtifactStore, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[tuple[dict[str, BufferSpec], Sequence[Trial]]] = []

    def compare(own: Any, name: str, memory: measure.Memory, device: Any, trials: Sequence[Trial], *_: Any) -> list[float]:
        seen.append((dict(memory.buffers), trials))
        return [1.0] * len(trials)

    monkeypatch.setattr(tuner.Measurements, "compare", compare)
    monkeypatch.setattr(tuner, "SAMPLE_BYTES", 1 << 20)
    choices([batch_of_squares(*([1 << 20] * 8))], store)
    ((buffers, measured),) = seen
    assert sum(s.numel * 4 for s in buffers.values()) == 1 << 20
    for trial in measured:
        ((source, _),) = trial.parts
        assert isinstance(source, KernelSource) and set(source.buffers) == set(buffers)
        assert sum(source.members) * 8 == 1 << 20


def test_small_batches_are_not_measured(bench: Bench, store: ArtifactStore) -> None:
    choices([batch_of_squares(*range(1, 12))], store)
    assert len(bench.compiled) == 1 and not bench.measured


def test_a_batch_that_does_not_compile_is_reported(bench: Bench, store: ArtifactStore) -> None:
    bench.failing = ("fx_batch_mul",)
    batch = batch_of_squares(*range(100, 112))
    chosen, failed = choices([batch], store)
    assert not chosen and failed == [(batch, "no fx_batch_mul")]


def test_a_kernel_that_has_hung_is_no_candidate(bench: Bench, store: ArtifactStore) -> None:
    """Though it is what the cost model puts first. A twin under another name is the same kernel."""
    first, second, *_ = triton_candidates(row_sum("b", "y"), TARGET, "default")
    (source,) = first.sources
    store.cache.put_document(FOLDER, source.key("toolchain"), {"pid": 1, "started": 0, "hung": True})
    journal = Journal("test")
    _, chosen, failed = choose(lowered(row_sum("a", "x")), Options(), store, journal)
    assert not failed and chosen["region_a"].label == second.label
    said = f"region_a: {first.label} is no candidate: it did not end"
    assert any(topic == "tuning" and text.startswith(said) for topic, text in journal.notes)
