"""The regions at tiny sizes, on CPU, and what a run over them says."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
import typer
from typer.testing import CliRunner

from benchmarks import regions
from benchmarks.region_catalog import ATTENTION, CONVOLUTION, GEMV, REGIONS, Region
from benchmarks.region_summary import standings, summarize, summary_tables
from benchmarks.regions import BY_NAME, CONTESTS, WORKLOADS, Contest, choose, region_and_contest, summary_of, workload_of
from benchmarks.results import load
from fxopt.report.cases import FORWARD, relative_error
from fxopt.report.contenders import CONTENDERS

CPU = torch.device("cpu")


@pytest.mark.parametrize("model", dict.fromkeys(r.model for r in REGIONS))
def test_every_region_is_near_float64_and_the_same_each_time(model: str) -> None:
    for region in (r for r in REGIONS if r.model == model):
        case, again = (region.build(dict(region.tiny), CPU, torch.float32) for _ in range(2))
        outputs = case.drive(case.module)
        assert relative_error(outputs, case.exact() or ()) < 1e-5, region.name
        assert all(map(torch.equal, outputs, again.drive(again.module))), region.name
        assert case.bytes_moved(outputs)[FORWARD] > 0


def test_regions_are_those_of_the_models() -> None:
    assert len(BY_NAME) == len(REGIONS) >= 60
    assert set(Counter(r.model for r in REGIONS)) == {
        *("resnet50", "convnext-t", "vit-b", "bert-base", "gpt2", "llama-8b", "t5-base", "whisper-large", "sdxl-unet")
    }
    assert all(set(r.tiny) >= set(r.full) for r in REGIONS)
    assert all(r.full["batch"] * r.full["tokens"] == 1 for r in REGIONS if r.kind == GEMV)


def _full(name: str) -> torch.nn.Module:
    with torch.device("meta"):
        return BY_NAME[name].make(dict(BY_NAME[name].full))


def test_weights_have_the_sizes_of_llama() -> None:
    parameters = Counter[str]()
    for part in ("qkv", "attention-out", "swiglu", "down", "head"):
        parameters[part] = sum(p.numel() for p in _full(f"llama-8b/{part}-decode1").parameters())
    layer = sum(parameters.values()) - parameters["head"]
    # A layer has both of its norms in these parts; beside 32 of them stand the words and the last norm.
    assert 32 * layer + 2 * parameters["head"] + 4096 == 8_030_261_248


def test_convolutions_get_channels_last_images() -> None:
    for region in (r for r in REGIONS if r.kind == CONVOLUTION):
        for tensor in (t for t in region.build(dict(region.tiny), CPU, torch.float32).inputs if t.dim() == 4):
            assert tensor.is_contiguous(memory_format=torch.channels_last), region.name


def test_a_decoding_step_moves_its_weights() -> None:
    region = BY_NAME["llama-8b/down-decode1"]
    case = region.build(dict(region.tiny), CPU, torch.float32)
    width, hidden = region.tiny["width"], region.tiny["hidden"]
    assert case.bytes_moved(case.drive(case.module)) == {FORWARD: 4 * (width * hidden + hidden + 2 * width)}


def test_max_autotune_comes_last_and_models_take_turns() -> None:
    chosen = choose("", ",".join(CONTESTS))
    slow = ["max-autotune" in contest.contenders for _, contest in chosen]
    assert slow == sorted(slow)
    assert len({region.model for region, _ in chosen[:9]}) == 9
    frozen = {region.name for region, contest in chosen if contest.frozen}
    assert {r.name for r in REGIONS} - frozen == {r.name for r in REGIONS if r.kind == ATTENTION and not r.weighted}
    assert "gpt2/attention" not in frozen
    assert {region.name for region, _ in choose("vit-b/up,pooler", "plain")} == {
        *("vit-b/up", "vit-b/up-b1", "bert-base/pooler")
    }
    with pytest.raises(ValueError, match="tuned-frozen"):
        choose("", "frosted")
    with pytest.raises(ValueError, match="gpt2/head-decode"):
        choose("alexnet", "plain")


@pytest.mark.parametrize("contest", CONTESTS.values(), ids=lambda c: c.name)
def test_freezing_is_the_same_for_all_in_a_contest(contest: Any) -> None:
    workload = workload_of(REGIONS[0], contest)
    assert region_and_contest(workload.name) == (REGIONS[0], contest)
    contenders = regions.contenders_of((WORKLOADS[workload.name], {}, "bfloat16"))
    assert {c.name for c in contenders} > {"eager", "copy"}
    assert {c.frozen for c in contenders if c.backend} == {contest.frozen}


def test_max_autotune_is_torchs_mode_without_cuda_graphs() -> None:
    from torch._inductor import list_mode_options

    mode = list_mode_options("max-autotune-no-cudagraphs")
    assert CONTENDERS["inductor-max-autotune-no-cudagraphs"].options == mode
    assert CONTENDERS["inductor-max-autotune-no-cudagraphs-freezing"].options == {**mode, "freezing": True}


def test_a_run_is_resumed_summed_up_and_knows_its_kernels(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    app = typer.Typer(pretty_exceptions_enable=False)
    app.command()(regions.main)
    monkeypatch.setitem(CONTESTS, "plain", Contest("plain", False, "eager,copy,fxopt"))
    out = tmp_path / "r.json"
    arguments = ["--tiny", "--device", "cpu", "--dtype", "float32", "--seconds", "0.01", "--out", str(out), "--resume"]
    arguments += ["--only", "gpt2/up-decode", "--contests", "plain"]
    result = CliRunner().invoke(app, [*arguments, "--minutes", "0"])
    assert result.exit_code == 0, result.output
    assert "0 of 1 contests done" in result.output
    result = CliRunner().invoke(app, arguments)
    assert result.exit_code == 0, result.output
    first = load(out)
    (case,) = first["cases"]
    rows = {row["contender"]: row for row in case["rows"]}
    assert set(rows) == {"eager", "copy", "fxopt"}
    assert all(row["seconds"] > 0 for row in rows.values()), rows
    assert rows["fxopt"]["kernels"]
    assert "aten::addmm" in rows["eager"]["kernels"]
    assert first["summary"]["plain"]["gemv"]["shares"].keys() == {"gpt2/up-decode"}
    result = CliRunner().invoke(app, arguments)
    assert result.exit_code == 0, result.output
    assert load(out)["cases"] == first["cases"]


def _case(region: Region, contest: str, seconds: dict[str, float], error: float = 1.0) -> dict[str, Any]:
    rows = [
        {
            "contender": name,
            "seconds": s or None,
            "skipped": "" if s else "failed: off",
            "copy_share": 0.5,
            "error": 2.0 if name.startswith("fxopt") else error,
        }
        for name, s in seconds.items()
    ]
    return {"workload": f"{region.name} {contest}", "dtype": "bfloat16", "sizes": {"batch": 1}, "rows": rows}


def test_the_summary_judges_by_the_best_peer_with_the_same_freezing() -> None:
    step, head = BY_NAME["gpt2/up-decode"], BY_NAME["gpt2/head"]
    tuned = "inductor-max-autotune-no-cudagraphs"
    cases = [
        _case(step, "plain", {"eager": 4.0, "copy": 0.5, "inductor": 3.0, "fxopt": 2.0}),
        _case(step, "tuned", {"eager": 9.0, "copy": 0.5, tuned: 1.0, "fxopt": 2.0}, error=2.0),
        _case(head, "plain", {"eager": 3.0, "copy": 0.5, "inductor": 0.0, "fxopt": 2.0}, error=2.0),
        _case(step, "frozen", {"eager": 2.0, "copy": 0.5, "inductor-freezing": 4.0, "fxopt-freeze": 1.0}),
    ]
    summary = summary_of(cases)
    plain, frozen = summary["plain"], summary["frozen"]
    assert plain["regions_over_best"] == {"gpt2/up-decode bfloat16": 0.5, "gpt2/head bfloat16": 1.5}
    assert plain["over_best"] == pytest.approx((0.5 * 1.5) ** 0.5)
    assert plain["over"]["eager"] == pytest.approx((2.0 * 1.5) ** 0.5)  # as first measured
    assert plain["without"] == {"eager": [], "inductor": ["gpt2/head"], tuned: ["gpt2/head"]}
    assert [(e["region"], e["peer"], e["times"]) for e in plain["slower"]] == [("gpt2/up-decode", tuned, 2.0)]
    assert plain["models"]["gpt2"]["slower_regions"] == 1
    assert plain["gemv"] == {"regions": 1, "reached": 0, "shares": {"gpt2/up-decode": 0.5}}
    assert plain["plain_products"] == {"regions": 1, "reached": 1, "shares": {"gpt2/head": 1.5}}
    assert [e["region"] for e in plain["less_exact"]] == ["gpt2/up-decode"]
    assert [e["contender"] for e in plain["failed"]] == ["inductor"]
    assert frozen["over_best"] == 2.0
    assert len(summary_tables("plain", plain)) == 5


def test_regions_without_fxopts_time_are_failures_only() -> None:
    region = BY_NAME["gpt2/head"]
    cases = [(region.name, _case(region, "plain", {"eager": 3.0, "copy": 0.5, "fxopt": 0.0}))]
    found = standings(cases, {region.name: region.kind})
    summary = summarize(found, cases)
    assert found == [] and summary["over_best"] is None
    assert [e["contender"] for e in summary["failed"]] == ["fxopt"]
    assert summary_tables("plain", summary)
