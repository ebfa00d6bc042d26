"""The micro-benchmark's cases: each is one kernel, and right in its first configuration (in Triton's interpreter)."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

pytest.importorskip("triton")

from benchmarks.kernels_micro import MicroCase, candidates, cases, check, excess, flat, long_rows, lower, main_region
from fxopt.ir.kernel import Artifact
from fxopt.lower import Lowered
from fxopt.report.cases import widened
from fxopt.target import Target
from fxopt.tune.candidate import Choice
from tests.codegen.triton_interpreter import Interpreter
from tests.lower.capturing import moved

CPU, TARGET = torch.device("cpu"), Target.cuda(90)
SMALL = [
    c
    for c in (*cases(scale=512), *long_rows(scale=8192))
    if max(c.shapes[0]) <= 4096 and max(torch.Size(s).numel() for s in c.shapes) <= 1 << 17
]


def on_gpu(lowered: Lowered) -> Lowered:
    return moved(lowered, "cuda")


@pytest.mark.parametrize("case", [*cases(scale=512), *long_rows()], ids=lambda c: c.title.replace(" ", "-"))
def test_every_case_is_one_region(case: MicroCase) -> None:
    unfilled = [torch.empty(s, dtype=d) for s, d in zip(case.shapes, case.dtypes, strict=True)]
    region = main_region(lower(case, case.inputs(CPU) if case.nhwc else unfilled, on_gpu))
    assert len(candidates(region, TARGET)) > 3


@pytest.mark.parametrize("case", SMALL, ids=lambda c: c.title.replace(" ", "-"))
def test_values_are_right(interpreter: Interpreter, case: MicroCase) -> None:
    inputs = case.inputs(CPU)
    lowered = moved(lower(case, inputs, on_gpu), "cpu")
    first = candidates(main_region(lowered), TARGET)[0]
    kernels = tuple((s, Artifact("key", "triton", s.entry, Path())) for s in first.sources)

    def launch(choice: Choice, tensors: dict[str, torch.Tensor]) -> None:
        memory = {n: t.as_strided((t.untyped_storage().nbytes() // t.itemsize,), (1,)) for n, t in tensors.items()}
        memory |= {s.name: torch.full((int(s.numel),), float("nan"), dtype=s.dtype) for s in choice.scratch}  # type: ignore[arg-type]
        for source, _ in choice.kernels:
            interpreter.run(source, memory)

    eager, exact = case.function(*inputs), case.function(*widened(inputs))
    choice = Choice(first.label, kernels, first.scratch)
    assert check(lowered, choice, inputs, eager, exact, launch) <= 1


def test_a_wrong_value_is_noticed() -> None:
    exact = torch.ones(4, dtype=torch.float64)
    assert excess([torch.ones(4)], [torch.ones(4)], [exact]) == 0
    assert excess([torch.tensor([1, 1, 1, 1.1])], [torch.ones(4)], [exact]) > 1
    assert excess([torch.full((4,), float("nan"))], [torch.ones(4)], [exact]) == float("inf")
    assert flat(exact) == [exact]
