"""The benchmark harness at tiny sizes, on CPU."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from typer.testing import CliRunner

from benchmarks.model_summary import BEST_MODE, summarize, summary_table
from benchmarks.plot import label_of, rows_of, speedups
from benchmarks.results import load
from benchmarks.run import WORKLOADS, Budget, app, choose, jobs, usual_dtype
from fxopt.report.cases import relative_error
from fxopt.report.compare import Row
from fxopt.report.contenders import CONTENDERS

CPU = torch.device("cpu")
# At these sizes BatchNorm over two images divides by next to nothing, in eager too.
ILL_CONDITIONED = {"resnet50-train", "resnet50-nchw-train"}


@pytest.mark.parametrize("name", [n for n in WORKLOADS if n != "minilm"])
def test_every_workload_runs_eagerly_and_is_near_float64(name: str) -> None:
    workload = WORKLOADS[name]
    if workload.kind == "model":
        pytest.importorskip("transformers")
    case = workload.build(workload.sizes(tiny=True), CPU, torch.float32)
    exact, outputs = case.exact(), case.drive(case.module)
    assert case.training == workload.training
    assert (exact is None) == case.random
    if exact is not None:
        assert relative_error(outputs, exact) < (0.5 if name in ILL_CONDITIONED else 1e-4)


def test_choose_knows_groups_and_names() -> None:
    assert [w.name for w in choose("softmax,kernels")][:2] == ["softmax", "layer-norm"]
    assert all(w.training for w in choose("train"))
    with pytest.raises(ValueError, match="column-sum"):
        choose("bogus")


def test_the_end_to_end_workloads_are_inference_decoding_and_training_steps() -> None:
    names = [w.name for w in choose("end-to-end")]
    assert len(names) == len(set(names)) >= 14
    assert {"resnet50-fp16-b1", "gpt2-decode", "llama-1b-decode", "vit-b-train"} <= set(names)
    half = WORKLOADS["resnet50-fp16"]
    assert [usual_dtype(half, torch.device(d)) for d in ("cpu", "cuda")] == ["float32", "float16"]
    assert usual_dtype(WORKLOADS["vit-b"], torch.device("cuda")) == "bfloat16"


@pytest.mark.parametrize("name", ["gpt2-decode", "llama-1b-decode"])
def test_a_decoding_step_does_the_same_again_and_again(name: str) -> None:
    pytest.importorskip("transformers")
    case = WORKLOADS[name].build(WORKLOADS[name].sizes(tiny=True), CPU, torch.float32)
    first, again = (case.drive(case.module) for _ in range(2))
    assert torch.equal(first[0], again[0])
    cache: Any = case.module.cache  # type: ignore[attr-defined]
    cache.layers[0].values[:, :, 9:] = 7.0  # beyond the token's own place nothing is in use
    assert torch.equal(first[0], case.drive(case.module)[0])
    cache.layers[0].values[:, :, :8] = 7.0
    assert not torch.equal(first[0], case.drive(case.module)[0])


def test_random_shapes_follow_their_seed() -> None:
    kernels = choose("kernels")
    first, again, other = (jobs(kernels, tiny=False, seed=s, draws=2) for s in (7, 7, 8))
    assert first == again
    assert first != other
    low, high = WORKLOADS["softmax"].ranges["cols"]
    assert all(low <= sizes["cols"] <= high for w, sizes in first if w.name == "softmax")


def test_budget_skips_what_does_not_fit_and_says_so() -> None:
    budget = Budget(time.monotonic() + 50, compile_limit=300, slow=False)
    model, kernel = WORKLOADS["gpt2"], WORKLOADS["softmax"]
    assert "--slow" in budget.why_skip(model, CONTENDERS["inductor-max-autotune"])
    assert budget.why_skip(kernel, CONTENDERS["inductor-max-autotune"]) == ""
    budget.learn(model, [Row("inductor", "default", False, compile_seconds=70.0)])
    assert "time budget" in budget.why_skip(model, CONTENDERS["inductor"])
    assert budget.why_skip(model, CONTENDERS["fxopt"]) == ""
    assert budget.plan(model, CPU, seconds=5, cold=True).compile_limit <= 50


def test_a_run_writes_results_that_can_be_resumed_and_drawn(tmp_path: Path) -> None:
    out = tmp_path / "r.json"
    arguments = ["--tiny", "--contenders", "eager", "--seconds", "0.01", "--device", "cpu", "--out", str(out), "--resume"]
    result = CliRunner().invoke(app, [*arguments, "--workloads", "softmax"])
    assert result.exit_code == 0, result.output
    first = load(out)["cases"]
    result = CliRunner().invoke(app, [*arguments, "--workloads", "softmax,swiglu"])
    assert result.exit_code == 0, result.output
    data = load(out)
    assert [c["workload"] for c in data["cases"]] == ["softmax", "swiglu"]
    assert data["cases"][0] == first[0]
    assert data["target"]["kind"] == "cpu"
    assert data["versions"]["torch"] == torch.__version__
    assert rows_of(data["cases"][0])[0].kernels == {"aten::_softmax": 1}


def test_contenders_are_compiled_ahead_by_other_processes(tmp_path: Path) -> None:
    out = tmp_path / "r.json"
    arguments = ["--tiny", "--workloads", "softmax", "--contenders", "eager,fxopt", "--seconds", "0.01", "--processes", "1"]
    result = CliRunner().invoke(app, [*arguments, "--device", "cpu", "--out", str(out)])
    assert result.exit_code == 0, result.output
    (case,) = load(out)["cases"]
    eager, own = case["rows"]
    assert (eager["cache"], own["cache"]) == ("", "cold, first use")
    assert eager["seconds"] > 0 and own["seconds"] > 0 and own["compile_seconds"] > 0
    assert sum(own["choices"].values()) > 0 and "unfinished" not in case


def test_a_workload_that_fails_does_not_end_the_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import dataclasses

    def explode(*args: object) -> None:
        raise MemoryError("too large")

    monkeypatch.setitem(WORKLOADS, "softmax", dataclasses.replace(WORKLOADS["softmax"], build=explode))
    out = tmp_path / "r.json"
    arguments = ["--tiny", "--workloads", "softmax,swiglu", "--contenders", "eager", "--seconds", "0.01", "--out", str(out)]
    result = CliRunner().invoke(app, [*arguments, "--device", "cpu"])
    assert result.exit_code == 0, result.output
    failed, fine = json.loads(out.read_text())["cases"]
    assert "too large" in failed["rows"][0]["skipped"]
    assert fine["rows"][0]["seconds"] > 0


def test_speedups_are_over_eager_and_labels_tell_cases_apart() -> None:
    def case(cols: int, seconds: float) -> dict[str, object]:
        rows = [{"contender": "eager", "seconds": 1.0}, {"contender": "fxopt", "seconds": seconds}]
        return {"workload": "softmax", "sizes": {"rows": 4, "cols": cols}, "rows": rows}

    cases = [case(3, 0.5), case(5, 0.25)]
    assert speedups({"cases": cases}) == {"fxopt": {"softmax 4x3": 2.0, "softmax 4x5": 4.0}}
    assert label_of(cases[0], cases[:1]) == "softmax"
    split = [
        {"contender": c, "seconds": s, "part": p}
        for c, s in (("eager", 3.0), ("fxopt", 1.0))
        for p in ("forward", "backward")
    ]
    assert speedups({"cases": [{**cases[0], "rows": split}]}) == {"fxopt": {"softmax forward": 3.0, "softmax backward": 3.0}}


def _row(contender: str, seconds: float, reserved: int = 0, frozen: bool = False) -> dict[str, object]:
    base = {"contender": contender, "seconds": seconds or None, "frozen": frozen, "part": ""}
    return {**base, "reserved_bytes": reserved or None}


def test_the_summary_is_against_the_best_mode_with_the_same_freezing() -> None:
    rows = [
        _row("eager", 8.0, 100),
        _row("inductor", 4.0, 50),
        _row("inductor-reduce-overhead", 2.0, 200),
        _row("inductor-freezing", 1.0, frozen=True),
        _row("inductor-max-autotune", 0.0),
        _row("fxopt", 2.1, 150),
        _row("fxopt-freeze", 0.5, frozen=True),
        _row("fxopt-reduce-overhead", 1.0),
    ]
    case = {"workload": "vit-b", "dtype": "bfloat16", "sizes": {"batch": 1}, "rows": rows}
    alone = {**case, "workload": "bert-base", "rows": [_row("eager", 1.0), _row("fxopt", 0.5)]}
    summary = summarize([case, alone])
    (line,) = summary["fxopt"]["workloads"]
    assert (line["best"], line["over_best"], line["over_eager"]) == ("inductor-reduce-overhead", 2.0 / 2.1, 8.0 / 2.1)
    assert (line["memory_to_best"], line["memory_to_eager"]) == (0.75, 1.5)
    assert summary["fxopt"]["slower"] == ["vit-b"]
    assert summary["fxopt-freeze"]["over_best"] == 2.0
    assert summary["fxopt-reduce-overhead"]["slower"] == []
    assert summary["fxopt-reduce-overhead"]["workloads"][0]["memory_to_eager"] is None
    assert summary_table("fxopt", summary["fxopt"]).row_count == 1
    assert summary["fxopt"]["more_memory"] == ["vit-b"]  # than eager's
    assert summarize([{**case, "training": True}])["fxopt"]["more_memory"] == []  # than reduce-overhead's
    (best,) = summary[BEST_MODE]["workloads"]
    assert (best["contender"], best["over_best"]) == ("fxopt-reduce-overhead", 2.0)
    assert line["reserved_bytes"] == {"fxopt": 150, "inductor": 50, "inductor-reduce-overhead": 200, "eager": 100}
