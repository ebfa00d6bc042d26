"""The benchmark of matrix products: its hand-written entries and epilogues are right (in Triton's interpreter)."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch

pytest.importorskip("triton")

from benchmarks.gemm_micro import GemmCase, cases, choose_configs, sources, summarize
from fxopt.codegen.templates.gemm_problem import GemmConfig
from fxopt.target import Target
from tests.codegen.triton_interpreter import Interpreter


@pytest.mark.parametrize(
    "config",
    [GemmConfig(True, 16, 32, 16, 4, 3, vectors=True), GemmConfig(False, 32, 16, 16, 4, 3, split=2)],
    ids=str,
)
@pytest.mark.parametrize(("layout", "epilogue"), [("nt", "gelu"), ("nn", "bias"), ("nt", "gated")])
def test_values_are_right(interpreter: Interpreter, config: GemmConfig, layout: str, epilogue: str) -> None:
    case = GemmCase("small", 20, 40, 48, layout, epilogue, torch.float32)
    if epilogue == "gated":
        config = replace(config, split=1, vectors=False)
    inputs = case.inputs(torch.device("cpu"))
    kernels, scratch = sources(case, config)
    memory = {n: t.as_strided((t.numel(),), (1,)) for n, t in inputs.items()}
    memory["out"] = torch.full((case.m * case.n,), float("nan"))
    memory |= {s.name: torch.full(s.shape, float("nan")) for s in scratch}
    for kernel in kernels:
        interpreter.run(kernel, memory)
    expected = case.reference(**{n: t.double() for n, t in inputs.items()})
    torch.testing.assert_close(memory["out"].view(case.m, case.n).double(), expected, rtol=1e-5, atol=1e-5)


def test_each_case_has_several_kinds_of_configurations() -> None:
    target = Target.cuda(90)
    for case in cases():
        chosen = choose_configs(case.problem, target, 12)
        assert 6 <= len(chosen) <= 12 and {c.tma for c in chosen} == {True, False}, case.title


def test_large_cases_are_plain_and_large() -> None:
    large = [case for case in cases() if case.is_large]
    assert {case.name for case in large} >= {"square", "bert-b32", "vit-b64", "llama-prefill", "gpt2-b8", "gpt2-head"}
    assert all(not c.epilogue and c.dtype == torch.bfloat16 and c.m >= 2048 and c.n >= 2048 for c in large)


def test_the_summary_tells_the_slowest_case() -> None:
    def entry(case: str, library: float, *taken: float) -> dict[str, Any]:
        return {"case": case, "library": {"us_hot": library}, "rows": [*({"us_hot": t} for t in taken), {"error": "no"}]}

    found = summarize([entry("a", 10.0, 12.5, 10.0), entry("b", 10.0, 20.0), entry("c", 10.0)])
    assert found["slowest"] == "b" and found["least"] == 0.5 and list(found["speeds"]) == ["a", "b"]
    assert found["speeds"]["a"] == {"best": 1.0, "first": 0.8}
    assert summarize([]) == {"speeds": {}}
