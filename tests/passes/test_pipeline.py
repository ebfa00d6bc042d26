"""The pipeline itself: order, switches, fuel, dumps, the journal, the early phase, and the bisection built on fuel."""

from __future__ import annotations

import itertools
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from fxopt.errors import GraphSpecError
from fxopt.journal import Journal
from fxopt.passes import pipeline
from fxopt.passes.bisect import bisect, first_bad_rewrite
from fxopt.passes.context import Context, DefaultOptions
from fxopt.passes.pipeline import NAMES, PASSES, Pass, run, run_early, run_passes
from tests.passes.graphs import CHECKED, assert_identical, calls, capture, execute, optimize


def layer(x: torch.Tensor, w: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    y = (x @ w.t() + b) * 1
    return (y.view(2, 3, 5).transpose(1, 2).transpose(1, 2) / 4.0).reshape(6, 5) ** 2


ARGS = (torch.randn(6, 4), torch.randn(5, 4), torch.randn(5))


def test_every_rewrite_is_counted_in_the_journal() -> None:
    journal = Journal("test")
    context = run(capture(layer, ARGS), CHECKED, journal)
    assert [name for name, _, _ in journal.passes] == [p.name for p in PASSES]
    assert sum(count for _, count, _ in journal.passes) == len(context.log) > 5
    assert ("rewrite", "mm_bias.match x1") in journal.notes


def test_rejections_are_counted_with_their_reason() -> None:
    journal = Journal("test")
    run(capture(lambda x, w: x @ w + x, (torch.randn(3, 3), torch.randn(3, 3))), CHECKED, journal)
    assert ("rejected", "mm_bias: the addend is not one value per column x1") in journal.notes


NOT_FOR_THIS_LAYER = (
    "open_mask", "attention_mask", "canonical_calls", "hand_attention", "attention", "linear_cross_entropy", "pad_gemm",
    "mm_view_bias", "constant_folding", "cse", "complex_pairs", "flat_convolution", "channels_last", "convolution_bias",
    "merged_products", "quantize", "quantized_residuals", "stored_attention", "product_bias", "fp8_training",
    "disjoint_windows", "quantized_pools", "encoder_layer", "module_floats",
)  # fmt: skip


@pytest.mark.parametrize("name", [n for n in NAMES if n not in NOT_FOR_THIS_LAYER])
def test_a_disabled_pass_does_nothing(name: str) -> None:
    _, context = optimize(layer, ARGS)
    assert any(r.rule.startswith(f"{name}.") for r in context.log)
    graph, context = optimize(layer, ARGS, options=replace(CHECKED, disable=(name,)))
    assert not any(r.rule.startswith(f"{name}.") for r in context.log)
    torch.testing.assert_close(execute(graph, ARGS)[0], layer(*ARGS))


def test_every_amount_of_fuel_gives_a_legal_and_right_graph() -> None:
    whole = len(optimize(layer, ARGS)[1].log)
    for fuel in range(whole + 1):
        graph, context = optimize(layer, ARGS, options=replace(CHECKED, fuel=fuel))
        assert len(context.log) == fuel
        torch.testing.assert_close(execute(graph, ARGS)[0], layer(*ARGS))


def test_no_fuel_changes_nothing() -> None:
    graph, _ = optimize(layer, ARGS, options=replace(CHECKED, fuel=0))
    assert calls(graph) == calls(capture(layer, ARGS))


def test_dumps_are_numbered_and_only_for_passes_that_changed_something(tmp_path: Path) -> None:
    journal = Journal("test")
    run(capture(layer, ARGS), DefaultOptions(dump=str(tmp_path)), journal)
    names = sorted(p.name for p in (tmp_path / "test").iterdir())
    changed = [name for name, count, _ in journal.passes if count]
    assert names == [f"{i:02d}_{name}.py" for i, name in enumerate(["captured", *changed])]
    texts = [(tmp_path / "test" / name).read_text() for name in names]
    assert all(a != b for a, b in itertools.pairwise(texts))
    for text in texts:
        compile(text, "dump", "exec")
    assert "by mm_bias" in texts[-1]


def test_a_pass_that_breaks_the_rules_is_named() -> None:
    def breaks(context: Context) -> None:
        node = next(n for n in context.nodes if n.op == "call_function")
        context.spend("oops", node)
        node.meta["val"] = node.meta["val"].new_empty(1)

    with pytest.raises(GraphSpecError, match="after pass 'breaks'"):
        run_passes((Pass("breaks", breaks),), capture(layer, ARGS), CHECKED, Journal("test"), check=True)


@pytest.mark.parametrize("first_bad", [1, 2, 7, 99, 100])
def test_bisect_finds_the_first_failure(first_bad: int) -> None:
    asked: list[int] = []
    assert bisect(lambda fuel: asked.append(fuel) or fuel >= first_bad, 100) == first_bad
    assert len(asked) <= 10


def test_bisect_says_when_no_rewrite_is_to_blame() -> None:
    assert bisect(lambda fuel: False, 100) is None
    with pytest.raises(ValueError, match="not to blame"):
        bisect(lambda fuel: True, 100)


def test_first_bad_rewrite_names_the_culprit(monkeypatch: pytest.MonkeyPatch) -> None:
    """A deliberately wrong pass is planted in the middle of the pipeline; the bisection must name its rewrite."""

    def plant(context: Context) -> None:
        for node in context.nodes:
            if node.target is torch.ops.aten.mul.Tensor and not context.exhausted:
                context.spend("wrong", node)
                node.target = torch.ops.aten.sub.Tensor

    at = [p.name for p in PASSES].index("algebra") + 1
    monkeypatch.setattr(pipeline, "PASSES", (*PASSES[:at], Pass("planted", plant), *PASSES[at:]))
    monkeypatch.setattr("fxopt.passes.pipeline.PASSES", pipeline.PASSES)

    def is_right(graph: object) -> bool:
        return torch.allclose(execute(graph, ARGS)[0], layer(*ARGS), atol=1e-5)  # type: ignore[arg-type]

    found = first_bad_rewrite(lambda: capture(layer, ARGS), is_right)
    assert found is not None
    assert found.rule == "planted.wrong"


def test_the_early_phase_gives_equal_calls_one_spelling() -> None:
    seen: list[torch.fx.GraphModule] = []

    def backend(gm: torch.fx.GraphModule, inputs: list[torch.Tensor]) -> object:
        run_early(gm, DefaultOptions(), Journal("graph 0"))
        seen.append(gm)
        return gm

    def attention(q: torch.Tensor, k: torch.Tensor, n: int) -> torch.Tensor:
        return (q @ k.transpose(-2, -1) / 2.0 + 1).softmax(-1).matmul(k) * n

    torch.compiler.reset()
    args = (torch.randn(2, 3, 4), torch.randn(2, 3, 4), 3)
    torch.testing.assert_close(torch.compile(attention, backend=backend)(*args), attention(*args))
    targets = [n.target for n in seen[0].graph.nodes if n.op in ("call_function", "call_method")]
    assert targets == [
        torch.transpose, torch.matmul, torch.div, torch.add, torch.softmax, torch.matmul, torch.mul
    ]  # fmt: skip


def test_dynamic_shapes_add_no_guard() -> None:
    def function(x: torch.Tensor, w: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
        y = (x.transpose(0, 1).transpose(0, 1) * 1 @ w + b).view(-1).view(x.shape[0], -1)
        return y / 2.0 + y.clone()

    args = (torch.randn(6, 4), torch.randn(4, 4), torch.randn(4))
    graph = capture(function, args, dynamic=True)
    shape_env = graph.gm.graph.find_nodes(op="placeholder")[0].meta["val"].fake_mode.shape_env
    before = len(shape_env.guards)
    context = run(graph, DefaultOptions(), Journal("test"))
    assert len(shape_env.guards) == before
    assert any(r.rule == "algebra.exact_reciprocal" for r in context.log)
    torch.testing.assert_close(execute(graph, args)[0], function(*args))


def test_identical_graphs_are_rewritten_identically() -> None:
    graphs = [optimize(layer, ARGS)[0] for _ in range(2)]
    assert str(graphs[0].gm.code) == str(graphs[1].gm.code)
    assert_identical(graphs[0], lambda *a: execute(graphs[1], a), ARGS)
