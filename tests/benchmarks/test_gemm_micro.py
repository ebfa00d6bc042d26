"""The benchmark of matrix products: its hand-written entries and epilogues are right (in Triton's interpreter)."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

pytest.importorskip("triton")

from benchmarks.gemm_micro import GemmCase, cases, choose_configs, sources
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
