"""Journals as text and data."""

from __future__ import annotations

import json

from fxopt.journal import Journal, KernelEntry
from fxopt.report.explanation import Explanation
from fxopt.report.render import fold_origins, journal_to_dict, journal_to_text


def sample() -> Journal:
    journal = Journal("graph 0 inference")
    journal.kernels.append(
        KernelEntry("k0", "cpp", ("encoder.norm", "encoder.norm", "encoder.act"), "AVX2", 3 << 20, "text")
    )
    journal.library += [("aten::addmm", "encoder.up"), ("aten::addmm", "encoder.down"), ("aten::mm", "head")]
    journal.retreats.append(("aten::cumprod", "no rule for it"))
    journal.passes += [("dead_code", 4, 0.002), ("algebra", 0, 0.001)]
    journal.seconds["lowering"] = 1.5
    journal.memory = {
        "peak": 3 << 20,
        "planned": 2 << 20,
        "own": 1 << 19,
        "library": 1 << 19,
        "outputs": 0,
        "eager": 4 << 20,
    }
    journal.note("cache", "7 of 8 kernels found")
    return journal


def test_text_says_what_fused_what_fell_back_and_why() -> None:
    text = journal_to_text(sample())
    assert "k0 [cpp, moves 3.0 MiB] <- encoder.norm, encoder.act" in text
    assert "library calls (3)" in text, "as many as the head line says"
    assert "2 x aten::addmm" in text
    assert "1 x aten::mm" in text
    assert "aten::cumprod: no rule for it" in text
    assert "7 of 8 kernels found" in text
    assert "1.50 s" in text
    assert "peak 3.0 MiB: planned 2.0 MiB, own storages and outputs 512.0 KiB, library results 512.0 KiB" in text
    assert "eager 4.0 MiB" in text


def test_text_lists_only_passes_that_changed_something() -> None:
    text = journal_to_text(sample())
    assert "dead_code" in text
    assert "algebra" not in text


def test_empty_sections_are_left_out() -> None:
    assert journal_to_text(Journal("graph 3 backward")) == "== graph 3 backward"


def test_dict_is_json_and_complete() -> None:
    data = json.loads(json.dumps(journal_to_dict(sample())))
    assert data["kernels"][0]["source"] == "text"
    assert data["passes"] == [
        {"name": "dead_code", "rewrites": 4, "seconds": 0.002},
        {"name": "algebra", "rewrites": 0, "seconds": 0.001},
    ]
    assert data["memory"]["peak"] == 3 << 20
    assert data["retreats"] == [{"what": "aten::cumprod", "reason": "no rule for it"}]


def test_long_origins_are_counted() -> None:
    assert fold_origins(tuple(f"layer.{i}" for i in range(9)), limit=2) == "layer.0, layer.1, and 7 more"
    assert fold_origins(("", "")) == "(no module)"


def test_explanation_sums_over_graphs() -> None:
    explanation = Explanation((sample(), sample()), ("print() in forward",))
    text = str(explanation)
    assert text.startswith("2 graph(s): 2 generated kernels, 6 library calls, 2 retreats to ATen")
    assert "graph break: print() in forward" in text
    assert explanation.to_dict()["graph_breaks"] == ["print() in forward"]


def test_explanation_without_graphs_says_so() -> None:
    assert "compiled no graph" in str(Explanation(()))
