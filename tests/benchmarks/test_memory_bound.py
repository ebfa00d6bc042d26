"""The sweep over memory-bound kernels and the optimizers at tiny sizes, on CPU."""

from __future__ import annotations

import contextlib
import importlib.util
import json
import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import typer
from typer.testing import CliRunner

from benchmarks import case_worker, liger, memory_bound
from benchmarks.memory_bound import WORKLOADS, Grid, choose, plan_jobs, spread
from benchmarks.memory_bound_kernels import SWEEP
from benchmarks.optimizers import OPTIMIZERS, bert_shapes
from benchmarks.plot import shares
from benchmarks.results import MOST_LINE, Results, folded, load
from benchmarks.summary import summarize, summary_tables
from fxopt.report.cases import BACKWARD, FORWARD, Case, relative_error
from fxopt.report.compare import Row

CPU = torch.device("cpu")
GRID = Grid(("bfloat16", "float32"), (16, 128, 1024), (64, 1024, 8192, 131072))


def tiny(name: str, dtype: torch.dtype = torch.float32) -> Case:
    return WORKLOADS[name].build(WORKLOADS[name].sizes(tiny=True), CPU, dtype)


@pytest.mark.parametrize("name", WORKLOADS)
def test_every_workload_is_near_float64_and_its_passes_run_twice(name: str) -> None:
    case = tiny(name)
    outputs = case.drive(case.module)
    exact = case.reference(outputs) if case.reference is not None else case.exact()
    assert exact is not None
    # Lion's steps have a sign, which rounding decides where it is nearly zero.
    assert relative_error(outputs, exact) < (1e-3 if name == "lion" else 1e-5)
    passes, moved = case.passes(case.module), case.bytes_moved(outputs)
    assert list(passes) == list(moved) == ([FORWARD, BACKWARD] if case.training else [FORWARD])
    assert all(n > 0 for n in moved.values())
    for call in passes.values():
        call()
        call()


@pytest.mark.parametrize("name", ["dropout-add-layer-norm", "dropout-add-rms-norm-cast"])
def test_a_dropout_that_keeps_too_much_is_wrong(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    case = tiny(name)
    monkeypatch.setattr(torch.nn.functional, "dropout", lambda x, p: x * 1.0)
    outputs = case.drive(case.module)
    assert case.reference is not None
    with pytest.raises(ValueError, match=r"kept 1\.0000"):
        case.reference(outputs)


def test_bytes_are_those_of_inputs_and_outputs_once() -> None:
    def moved(name: str) -> dict[str, int]:
        case = tiny(name)
        return case.bytes_moved(case.drive(case.module))

    rows, row = 4 * 128 * 16, 4 * 16
    assert moved("softmax") == {FORWARD: 2 * rows, BACKWARD: 3 * rows}
    # Both outputs' gradients and the sum are read; x and the residual share one gradient.
    assert moved("add-rms-norm") == {FORWARD: 4 * rows + row, BACKWARD: 4 * rows + 2 * row}
    elements = 4 * sum(torch.Size(s).numel() for s in bert_shapes(16, 2, 97))
    assert [moved(n)[FORWARD] // elements for n in ("sgd-momentum", "adam", "adamw", "lion")] == [5, 7, 7, 5]


def test_shapes_are_those_of_bert() -> None:
    assert len(bert_shapes(768, 12, 30522)) == 202
    transformers = pytest.importorskip("transformers")
    config = transformers.BertConfig(
        hidden_size=16, num_hidden_layers=2, num_attention_heads=1, intermediate_size=64, vocab_size=97
    )
    with torch.device("meta"):
        model = transformers.BertForMaskedLM(config)
    assert [tuple(p.shape) for p in model.parameters()] == bert_shapes(16, 2, 97)


@pytest.mark.parametrize("workload", [w for w in OPTIMIZERS if w.name != "lion"], ids=lambda w: w.name)
def test_fused_optimizers_make_the_same_step(workload: Any) -> None:
    case = tiny(workload.name)
    fused = case.alternatives["fused"]()
    assert relative_error(fused.drive(fused.module), case.drive(case.module)) < 1e-5
    assert fused.reset is not None
    fused.reset()
    assert relative_error(fused.drive(fused.module), case.drive(case.module)) > 1e-5  # the other has made two steps


def test_cells_keep_to_the_lengths_that_a_kernel_is_used_with() -> None:
    def lengths(name: str) -> set[int]:
        return {cols for (_, _, cols), _ in GRID.cells(WORKLOADS[name])}

    assert lengths("softmax") == {64, 1024, 8192, 131072}
    assert lengths("rotary") == {64, 256}
    assert lengths("adam") == {0}
    for (dtype, size, cols), (_, sizes, _) in GRID.cells(WORKLOADS["softmax"]):
        assert sizes["rows"] * cols * (2 if dtype == "bfloat16" else 4) == size * (1 << 20)


def test_a_short_run_has_seen_something_of_everything() -> None:
    jobs = plan_jobs(list(WORKLOADS.values()), GRID, seed=3)
    assert jobs == plan_jobs(list(WORKLOADS.values()), GRID, seed=3)
    assert jobs != plan_jobs(list(WORKLOADS.values()), GRID, seed=4)
    assert {w.name for w, _, _ in jobs[: len(WORKLOADS)]} == set(WORKLOADS)
    first = spread(GRID.cells(WORKLOADS["softmax"]), random.Random(0))[:4]
    assert len({sizes["cols"] for _, sizes, _ in first}) == 4
    assert len({sizes["rows"] * sizes["cols"] for _, sizes, _ in first}) > 2
    assert [dtype for _, _, dtype in first].count("float32") == 2


def test_choose_knows_groups_and_names() -> None:
    assert [w.name for w in choose("adam,optimizers")] == ["adam", "sgd-momentum", "adamw", "lion"]
    assert len(choose("kernels")) == len(SWEEP)
    with pytest.raises(ValueError, match="softmax"):
        choose("bogus")


def _app() -> typer.Typer:
    app = typer.Typer(pretty_exceptions_enable=False)
    app.command()(memory_bound.main)
    return app


def test_a_run_is_resumed_summed_up_and_drawn(tmp_path: Path) -> None:
    out = tmp_path / "m.json"
    arguments = ["--tiny", "--device", "cpu", "--dtype", "float32", "--seconds", "0.01", "--out", str(out), "--resume"]
    arguments += ["--contenders", "eager,copy,liger,fused"]
    result = CliRunner().invoke(_app(), [*arguments, "--workloads", "softmax"])
    assert result.exit_code == 0, result.output
    first = load(out)["cases"]
    result = CliRunner().invoke(_app(), [*arguments, "--workloads", "softmax,adamw"])
    assert result.exit_code == 0, result.output
    data = load(out)
    assert [c["workload"] for c in data["cases"]] == ["softmax", "adamw"]
    assert data["cases"][0] == first[0]
    eager = {r["part"]: r for r in first[0]["rows"] if r["contender"] == "eager"}
    assert set(eager) == {FORWARD, BACKWARD}
    assert eager[BACKWARD]["bytes_moved"] == 3 * 4 * 128 * 16
    assert eager[FORWARD]["copy_share"] > 0
    assert eager[FORWARD]["kernels"] == {"aten::_softmax": 1}
    if not liger.available():
        assert data["settings"]["absent"] == {"liger": "liger-kernel is not installed"}
        assert "without liger" in result.output
    fused = next(r for r in data["cases"][1]["rows"] if r["contender"] == "fused")
    assert fused["seconds"] > 0 and fused["error"] < 1e-5
    assert set(shares(data)) == {"eager", "fused"}


def test_worker_processes_run_the_cases_and_a_run_is_resumed(tmp_path: Path) -> None:
    out = tmp_path / "m.json"
    arguments = ["--tiny", "--device", "cpu", "--dtype", "float32", "--seconds", "0.01", "--out", str(out), "--resume"]
    arguments += ["--contenders", "eager,copy", "--processes", "2"]
    result = CliRunner().invoke(_app(), [*arguments, "--workloads", "softmax,gelu"])
    assert result.exit_code == 0, result.output
    first = load(out)["cases"]
    assert {c["workload"] for c in first} == {"softmax", "gelu"}
    result = CliRunner().invoke(_app(), [*arguments, "--workloads", "softmax,gelu,adamw"])
    assert result.exit_code == 0, result.output
    assert "3 of 3 cases done" in result.output
    data = load(out)
    assert data["cases"][:2] == first
    assert data["settings"]["processes"] == 2
    for case in data["cases"]:
        assert all(r["seconds"] > 0 and r["copy_share"] > 0 for r in case["rows"])
    softmax = next(c for c in data["cases"] if c["workload"] == "softmax")
    eager = {r["part"]: r for r in softmax["rows"] if r["contender"] == "eager"}
    assert eager[FORWARD]["kernels"] == {"aten::_softmax": 1}
    assert eager[BACKWARD]["bytes_moved"] == 3 * 4 * 128 * 16
    assert out.with_suffix(".png").exists() == (importlib.util.find_spec("matplotlib") is not None)


def test_compact_files_hold_the_rows_in_short(tmp_path: Path) -> None:
    long = "void at::native::(anonymous namespace)::reduce<4, f(int)>(float*, std::array<char*, 2ul>)"
    row = Row("fxopt", "default", False, seconds=1 / 3, kernels={long: 2, long + "x": 1, "triton_red_0": 1}, part=FORWARD)
    results = Results(tmp_path / "r.json", CPU, {}, compact=True)
    again = Row("fxopt", "default", False, seconds=None, kernels={"k": 1}, part=BACKWARD)
    rows = [row, again, Row("liger", "default", False, skipped="no")]
    results.add(WORKLOADS["softmax"], {"rows": 2, "cols": 3}, "float32", rows)
    (case,) = load(tmp_path / "r.json")["cases"]
    own, backward, liger = case["rows"]
    assert own == {**row.to_dict(), "seconds": 0.3333, "kernels": {"reduce": 3, "triton_red_0": 1}}
    assert backward == again.to_dict()
    assert liger == Row("liger", "default", False, skipped="no").to_dict()
    text = (tmp_path / "r.json").read_text()
    assert "retreats" not in text.split('"usual"')[0]
    assert folded(list(range(200))) == folded(json.loads(folded(list(range(200)))))
    assert max(map(len, text.splitlines())) <= MOST_LINE + 50


def test_inductor_tunes_while_it_has_the_device(monkeypatch: pytest.MonkeyPatch) -> None:
    from torch._inductor.runtime.triton_heuristics import CachingAutotuner
    from torch._inductor.select_algorithm import AlgorithmSelectorCache

    order: list[str] = []

    @contextlib.contextmanager
    def device_turn() -> Iterator[None]:
        order.append("turn")
        yield
        order.append("over")

    def compared(cls: type, x: int) -> str:
        order.append(f"{cls.__name__} compared {x}")
        return "best"

    monkeypatch.setattr(CachingAutotuner, "benchmark_all_configs", lambda self, x: order.append(f"measured {x}"))
    monkeypatch.setattr(CachingAutotuner, "bench", CachingAutotuner.bench)  # so that the real one is back afterwards
    monkeypatch.setattr(AlgorithmSelectorCache, "benchmark_in_current_process", classmethod(compared))
    case_worker.inductor_tunes_in_turn(device_turn)
    CachingAutotuner.benchmark_all_configs(None, 3)
    assert AlgorithmSelectorCache.benchmark_in_current_process(4) == "best"
    assert order == ["turn", "measured 3", "over", "turn", "AlgorithmSelectorCache compared 4", "over"]


def test_what_does_not_fit_is_left_for_another_run(tmp_path: Path) -> None:
    out = tmp_path / "m.json"
    arguments = ["--tiny", "--device", "cpu", "--dtype", "float32", "--contenders", "eager,copy", "--workloads", "gelu"]
    result = CliRunner().invoke(_app(), [*arguments, "--minutes", "0", "--out", str(out)])
    assert result.exit_code == 0, result.output
    assert "0 of 1 cases done" in result.output
    assert load(out)["cases"] == []


def test_the_yardsticks_must_be_there(tmp_path: Path) -> None:
    result = CliRunner().invoke(_app(), ["--device", "cpu", "--contenders", "fxopt", "--out", str(tmp_path / "m.json")])
    assert result.exit_code != 0
    assert "copy and eager" in result.output


def _row(contender: str, part: str, seconds: float, share: float | None = None) -> dict[str, Any]:
    skipped = "" if seconds else "failed: WrongValueError: off"
    return {
        "contender": contender,
        "part": part,
        "seconds": seconds or None,
        "copy_share": share,
        "bytes_moved": 4000,
        "skipped": skipped,
    }


def test_the_summary_lists_what_is_too_slow() -> None:
    rows = [
        _row("fxopt", FORWARD, 1.0, 0.97),
        _row("fxopt", BACKWARD, 2.0, 0.9),
        _row("inductor", FORWARD, 2.0),
        _row("inductor", BACKWARD, 1.9),
        _row("liger", FORWARD, 5.0),
        _row("liger", BACKWARD, 1.0),
        _row("eager", "", 0.0),
    ]
    case = {"workload": "softmax", "dtype": "float32", "sizes": {"rows": 4, "cols": 8}, "one_pass": [8, 8], "rows": rows}
    data: dict[str, Any] = {"target": {"l2_bytes": 1000}, "cases": [case]}
    summary = summarize(data)
    assert [(e["part"], e["copy_share"]) for e in summary["below_copy"]] == [(BACKWARD, 0.9)]
    assert [(e["part"], round(e["times"], 2)) for e in summary["slower_than_inductor"]] == [(BACKWARD, 1.05)]
    inductor, liger = summary["over"]["inductor"], summary["over"]["liger"]
    assert inductor["mean"] == pytest.approx((2.0 * 0.95) ** 0.5)
    assert (inductor["passes"], inductor["slower"], inductor["least"]) == (2, 1, pytest.approx(0.95))
    assert liger["steps_mean"] == pytest.approx(2.0)  # of both passes together
    assert liger["mean"] == pytest.approx((5.0 * 0.5) ** 0.5)
    assert set(summary["over"]) == {"inductor", "liger"}
    assert summary["one_pass"] == {"passes": 2, "reached": 1, "least": 0.9}
    assert summary["kernels"]["softmax backward"]["least_over_inductor"] == pytest.approx(0.95)
    assert [e["contender"] for e in summary["failed"]] == ["eager"]
    assert len(summary_tables(summary)) == 4
    case["one_pass"] = [8, 4]
    assert summarize(data)["below_copy"] == []
    case["one_pass"], data["target"] = [8, 8], {"l2_bytes": 2000}
    assert summarize(data)["below_copy"] == []
