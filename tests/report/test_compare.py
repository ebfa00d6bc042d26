"""Measuring contenders: errors, kernel counts, interleaving, limits, skipping. No claims about speed."""

from __future__ import annotations

import contextlib
import io
import itertools
import json
import math
import os
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from rich.console import Console

from fxopt.report import cases, measure
from fxopt.report.cases import BACKWARD, FORWARD, Case, relative_error
from fxopt.report.compare import CompileTimeout, Plan, Row, compare, compile_ahead, speedup, time_limit
from fxopt.report.contenders import CACHE_VARIABLES, CONTENDERS, COPY, Contender, caches_under, pick
from fxopt.report.measure import interleaved, kernels_seen
from fxopt.report.tables import comparison_table

CPU = torch.device("cpu")
# Dynamo's pass-through backend: compiles in milliseconds and computes what eager computes.
PASS_THROUGH = Contender("aot", "aot_eager")


def linear_case(training: bool = False) -> Case:
    model = torch.nn.Linear(6, 3).train(training)
    grad = torch.randn(4, 3) if training else None
    return Case(model, (torch.randn(4, 6),), training, grad)


def test_relative_error_is_against_the_largest_exact_value() -> None:
    exact = torch.tensor([2.0, -4.0], dtype=torch.float64)
    assert relative_error((torch.tensor([2.0, -3.0]),), (exact,)) == pytest.approx(0.25)


def test_relative_error_sees_nan_on_one_side_only() -> None:
    both, one = torch.tensor([float("nan"), 1.0]), torch.tensor([1.0, 1.0])
    assert relative_error((both,), (both.double(),)) == 0.0
    assert relative_error((both,), (one.double(),)) == math.inf


def test_relative_error_looks_at_all_parts_of_a_large_tensor(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cases, "PART_ELEMENTS", 10)
    exact = torch.ones(3, 7, 2, dtype=torch.float64)
    exact[0, 0, 0] = 4.0
    for place in ((0, 0, 1), (2, 6, 1), (1, 3, 0)):
        actual = exact.float()
        actual[place] += 1.0
        assert relative_error((actual,), (exact,)) == pytest.approx(0.25)
    actual[2, 6, 0] = float("nan")
    assert relative_error((actual,), (exact,)) == math.inf


def test_relative_error_of_a_vanishing_gradient_uses_the_scale_of_the_others() -> None:
    exact = (torch.tensor([1.0]).double(), torch.tensor([1e-18]).double())
    assert relative_error((torch.tensor([1.0]), torch.tensor([1e-8])), exact) == pytest.approx(1e-8)


def test_case_returns_outputs_then_gradients() -> None:
    case = linear_case(training=True)
    output, weight, bias = case.drive(case.module)
    assert (output.shape, weight.shape, bias.shape) == ((4, 3), (3, 6), (3,))
    assert case.grad_output is not None
    assert torch.allclose(bias, case.grad_output.sum(0))
    exact = case.exact()
    assert exact is not None
    assert all(t.dtype == torch.float64 for t in exact)
    assert relative_error((output, weight, bias), exact) < 1e-5


def test_exact_leaves_the_module_alone() -> None:
    case = linear_case()
    case.exact()
    assert case.module.weight.dtype == torch.float32  # type: ignore[union-attr]


def test_kernels_are_counted_innermost_and_without_views() -> None:
    x = torch.randn(8, 8)
    seen = kernels_seen(lambda: torch.relu(x.t().reshape(64)[:32]).sum(), CPU)
    assert seen.pop("aten::relu", 0) + seen.pop("aten::clamp_min", 0) == 1
    assert seen.pop("aten::sum") == 1
    assert seen == {"aten::copy_": 1} or seen == {"aten::clone": 1}  # the transposed reshape is a copy


@pytest.mark.parametrize(("disturbed", "rounds"), [(0, 3), (1, 5), (99, 9)])
def test_timing_goes_on_for_a_while_when_it_was_disturbed(
    disturbed: int, rounds: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A round takes a second of this clock, for 2 seconds or, with patience, 8."""

    class Timer:
        def __init__(self) -> None:
            self.taken = 0

        def repeats(self, call: object) -> int:
            return 1

        def sample(self, call: object, repeats: int) -> float:
            self.taken += 1
            return 1.0 + self.taken if self.taken <= disturbed else 1.0

    clock = itertools.count()
    monkeypatch.setattr(measure, "_HostTimer", Timer)
    monkeypatch.setattr(measure, "time", SimpleNamespace(perf_counter=lambda: float(next(clock))))
    timing = interleaved({"one": lambda: None}, CPU, seconds=2.0, patience=4.0)["one"]
    assert len(timing.samples) == rounds
    assert (timing.median == 1.0) == (disturbed < rounds)


def test_interleaved_turns_the_order_and_samples_all_equally() -> None:
    order: list[str] = []
    calls = {n: (lambda n=n: (order.append(n), time.sleep(0.011))) for n in "abc"}
    timings = interleaved(calls, CPU, seconds=0, min_rounds=3)
    assert {n: len(t.samples) for n, t in timings.items()} == {"a": 3, "b": 3, "c": 3}
    order = order[9:]  # three calls each estimated the repeats
    assert order == ["a", "b", "c", "b", "c", "a", "c", "a", "b"]


def test_compare_measures_everyone_and_says_why_not() -> None:
    broken = Contender("broken", "no_such_backend")
    rows = compare(
        linear_case(),
        [CONTENDERS["eager"], PASS_THROUGH, broken, CONTENDERS["inductor"]],
        Plan(CPU, seconds=0.01, skip=lambda c: "not today" if c.name == "inductor" else ""),
    )
    eager, aot, failed, skipped = rows
    assert eager.seconds and aot.seconds and aot.error is not None and aot.error < 1e-6
    assert aot.kernels == {"aten::addmm": 1}
    assert speedup(aot, rows) == pytest.approx(eager.seconds / aot.seconds)
    assert failed.seconds is None
    assert "no_such_backend" in failed.skipped
    assert skipped.skipped == "not today"
    json.dumps([r.to_dict() for r in rows])


def test_frozen_contenders_do_not_train() -> None:
    frozen = Contender("frozen", "aot_eager", frozen=True)
    (row,) = compare(linear_case(training=True), [frozen], Plan(CPU, seconds=0.01))
    assert row.skipped == "freezing is for inference"


def test_in_place_cases_are_judged_from_their_initial_state() -> None:
    state = torch.ones(4)
    case = Case(lambda x: x.mul_(0.5), (state,), reset=lambda: state.fill_(1.0))
    (row,) = compare(case, [PASS_THROUGH], Plan(CPU, seconds=0.01))
    assert row.error == 0.0


def scaled(x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    return x * y


def scaled_case() -> Case:
    x, y = (torch.full((4, 8), v, requires_grad=True) for v in (2.0, 3.0))
    case = Case(scaled, (x, y), True, torch.ones(4, 8), backward_reads=(0, 1))
    case.alternatives = {
        "liger": lambda: replace(case, module=lambda x, y: y * x),
        "fused": lambda: replace(case, module=lambda x, y: x * y * 1.001),
    }
    return case


def test_passes_are_timed_each_alone_against_a_copy_of_as_many_bytes() -> None:
    rows = compare(
        scaled_case(),
        [CONTENDERS["eager"], COPY, PASS_THROUGH, CONTENDERS["liger"]],
        Plan(CPU, seconds=0.01, split=True),
        rebuild=scaled_case,
    )
    assert [(r.contender, r.part) for r in rows] == [
        (c, p) for c in ("eager", "copy", "aot", "liger") for p in (FORWARD, BACKWARD)
    ]
    for row in rows:
        assert row.skipped == ""
        assert row.bytes_moved == 32 * 4 * (3 if row.part == FORWARD else 5)
        assert row.seconds and row.copy_share == pytest.approx(speedup(row, rows, "copy"))
    kernels = {(r.contender, r.part): r.kernels for r in rows}
    assert kernels["aot", FORWARD] == {"aten::mul": 1}
    assert kernels["aot", BACKWARD] == {"aten::mul": 2}
    assert "eager backward" in _text(comparison_table("passes", rows))


def _text(table: object) -> str:
    console = Console(file=io.StringIO(), width=120)
    console.print(table)
    assert isinstance(console.file, io.StringIO)
    return console.file.getvalue()


def test_values_are_judged_and_timed_in_turn_and_compiled_before() -> None:
    order: list[str] = []

    @contextlib.contextmanager
    def turn() -> Iterator[None]:
        order.append("turn")
        yield
        order.append("over")

    def report(what: str, share: float) -> None:
        order.append(what)

    compare(
        scaled_case(),
        [CONTENDERS["eager"], COPY, PASS_THROUGH, CONTENDERS["liger"]],
        Plan(CPU, seconds=0.0, split=True, turn=turn),
        report,
        rebuild=scaled_case,
    )
    assert order[: order.index("timing")] == [
        *("compiling eager", "compiling copy", "compiling aot"),
        *("compiling liger", "turn", "over", "turn"),  # what compiles nothing of ours may keep the device
        *("checking eager", "checking copy", "checking aot", "checking liger"),
    ]
    assert order[-1] == "over"


def test_an_implementation_of_long_steps_is_not_timed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("fxopt.report.compare.LONGEST_STEP", 0.05)

    def slow_case() -> Case:
        made = scaled_case()
        made.alternatives["fused"] = lambda: replace(made, module=lambda x, y: (time.sleep(0.1), x * y)[1])
        return made

    plan = Plan(CPU, seconds=0.0, split=True)
    rows = compare(slow_case(), [CONTENDERS[n] for n in ("eager", "liger", "fused")], plan, rebuild=slow_case)
    assert all(row.seconds is not None for row in rows if row.contender in ("eager", "liger"))
    (slow,) = (row for row in rows if row.contender == "fused")
    assert slow.seconds is None and "SlowStepError: one step takes" in slow.skipped


def test_who_spoils_its_inputs_is_wrong() -> None:
    def halves_its_input(x: torch.Tensor) -> torch.Tensor:
        return x.detach().mul_(0.5) * 2

    def case() -> Case:
        made = Case(lambda x: x * 1.0, (torch.ones(4),), traffic={FORWARD: 1})
        made.alternatives = {"liger": lambda: replace(made, module=halves_its_input)}
        return made

    contenders = [CONTENDERS["liger"], CONTENDERS["eager"], CONTENDERS["liger"]]
    first, eager, second = compare(case(), contenders, Plan(CPU, seconds=0.0, split=True), rebuild=case)
    assert first.error == 0.5 and eager.error == 0.0
    assert "off by 5.0e-01" in second.skipped


def test_wrong_values_are_not_timed_alone_and_missing_implementations_are_named() -> None:
    contenders = [CONTENDERS["eager"], CONTENDERS["fused"]]
    _, _, wrong = compare(scaled_case(), contenders, Plan(CPU, seconds=0.01, split=True))
    assert wrong.seconds is None
    assert "off by 1.0e-03" in wrong.skipped
    missing, copy = compare(linear_case(), [CONTENDERS["liger"], COPY], Plan(CPU, seconds=0.01))
    assert missing.skipped == "no implementation of this by liger"
    assert "single passes" in copy.skipped


def test_a_random_case_is_judged_by_the_draws_that_it_shows() -> None:
    x = torch.full((64,), 3.0, requires_grad=True)

    def reference(outputs: tuple[torch.Tensor, ...]) -> tuple[torch.Tensor, ...]:
        kept = (outputs[1] != 0).double() * 2
        return x.detach().double() * kept, kept

    case = Case(lambda x: torch.nn.functional.dropout(x, 0.5), (x,), True, torch.ones(64), random=True, reference=reference)
    (row,) = compare(case, [PASS_THROUGH], Plan(CPU, seconds=0.01))
    assert row.error == 0.0


def test_what_a_call_changes_and_does_not_return_is_an_output() -> None:
    state = torch.ones(4)

    def double(x: torch.Tensor) -> None:
        x.mul_(2)

    case = Case(double, (state,), state=(state,), traffic={FORWARD: 7})
    (after,) = case.drive(double)
    assert after.tolist() == [2.0] * 4
    assert case.bytes_moved((after,)) == {FORWARD: 7}


def test_time_limit_stops_a_compilation() -> None:
    with pytest.raises(CompileTimeout, match="longer than"), time_limit(0.05):
        time.sleep(5)


def test_caches_point_elsewhere_for_the_block_only(tmp_path: object) -> None:
    before = {name: os.environ.get(name) for name in CACHE_VARIABLES}
    with caches_under(str(tmp_path)):
        assert all(os.environ[name].startswith(str(tmp_path)) for name in CACHE_VARIABLES)
    assert {name: os.environ.get(name) for name in CACHE_VARIABLES} == before


def test_pick_lists_the_valid_names() -> None:
    assert [c.name for c in pick("eager, fxopt")] == ["eager", "fxopt"]
    with pytest.raises(ValueError, match="inductor-max-autotune"):
        pick("tensorrt")


@pytest.mark.parametrize(("name", "switched_off"), [("fxopt", True), ("fxopt-freeze", True), ("inductor", False)])
def test_plans_without_replay_make_no_cuda_graphs(name: str, switched_off: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    options: list[Any] = []

    def compiled(fn: Any, **settings: Any) -> Any:
        options.append(settings.get("options") or {})
        return fn

    monkeypatch.setattr(torch, "compile", compiled)
    for replay in (True, False):
        CONTENDERS[name].compile(lambda: None, torch.device("meta"), replay)
    assert "cuda_graphs" not in options[0]
    assert (options[1].get("cuda_graphs") is False) == switched_off
    compare(linear_case(), [CONTENDERS[name]], Plan(CPU, seconds=0.01, replay=False))
    assert options[-1].get("cuda_graphs", True) != switched_off


def test_table_shows_numbers_and_reasons() -> None:
    from rich.console import Console

    console = Console(width=100, record=True, file=io.StringIO())
    rows = [Row("eager", "default", False, seconds=0.2, error=1e-7), Row("fxopt", "default", False, skipped="no compiler")]
    console.print(comparison_table("t", rows))
    text = console.export_text()
    assert "200.0 ms" in text
    assert "fxopt: no compiler" in text


def test_what_was_compiled_ahead_is_found_in_its_caches(tmp_path: Path) -> None:
    plan, way = Plan(CPU, seconds=0.01, caches=str(tmp_path)), CONTENDERS["fxopt"]

    def case() -> Case:
        return Case(lambda x: x.softmax(-1).tanh(), (torch.randn(4, 6),))

    row = compile_ahead(case(), way, plan)
    assert row.cache.startswith("cold") and row.compile_seconds is not None and row.seconds is None and not row.skipped
    assert sum(row.choices.values()) > 0

    def kept() -> set[str]:
        return {str(path) for path in tmp_path.rglob("*") if path.suffix in (".so", ".cpp", ".json")}

    made = kept()
    assert made and all(path.startswith(f"{tmp_path}/fxopt/") for path in made)
    _, own = compare(case(), [CONTENDERS["eager"], way], plan)
    assert own.seconds is not None and own.choices == row.choices
    assert kept() == made


def test_a_compilation_ahead_that_fails_or_is_not_wanted_says_so(tmp_path: Path) -> None:
    plan = Plan(CPU, caches=str(tmp_path), skip=lambda contender: "not today" if contender.name == "fxopt" else "")
    assert compile_ahead(linear_case(), CONTENDERS["fxopt"], plan).skipped == "not today"
    assert "freezing" in compile_ahead(linear_case(training=True), CONTENDERS["fxopt-freeze"], plan).skipped
    broken = compile_ahead(linear_case(), Contender("broken", "no-such-backend"), plan)
    assert broken.skipped.startswith("failed") and broken.compile_seconds is None
