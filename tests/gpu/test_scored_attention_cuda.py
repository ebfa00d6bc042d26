"""Attention in training by kernels of ours on a GPU: values and gradients of every case of the benchmark, made small."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from benchmarks.attention_training import CASES, DROPPING, DYNAMIC, Case, compiling, errors, outcome
from fxopt.ir.scored_attention_op import scored_attention
from fxopt.journal import RECENT
from fxopt.lower.attention_kernels import KERNEL
from fxopt.passes.hand_attention.scored import MOST_FEATURES
from tests.numerics import assert_closer, to_float64

pytestmark = pytest.mark.gpu
SMALL = {
    "t5 b8 s512": {"batch": 3, "length": 200, "addends": (((1, 12, 200, 200), True),)},
    "gemma2-27b b1 s4096": {"length": 300},
    "bloom b4 s1024": {"length": 260, "addends": (((16, 1, 260), False), ("causal", False))},
    "swin-t b32": {"batch": 128},
    "window b4 s2048": {"length": 700, "heads": 2, "groups": 2},
    "gemma2-2b b2 s2048": {"length": 200},
}


def test_dropout() -> None:
    """Kernels drop what the eager forms do, forward and backward."""
    generator = torch.Generator("cuda").manual_seed(0)
    shapes = ((3, 4, 200, 64), (3, 2, 130, 64), (3, 2, 130, 64), (1, 4, 200, 130), (3, 4, 200, 64))
    made = [torch.randn(shape, device="cuda", generator=generator).bfloat16() for shape in shapes]
    inputs, weight = tuple(x.requires_grad_() for x in made[:4]), made[4]
    seed = torch.tensor(2**40 + 1, device="cuda")

    def attend(q: Tensor, k: Tensor, v: Tensor, bias: Tensor) -> Tensor:
        return scored_attention(q, k, v, bias, None, seed, scale=0.125, cap=0.0, fill=0.0, band=[-200, 40], drop=0.2)[0]

    torch.compiler.reset()
    with compiling(KERNEL) as contests:
        results = outcome(torch.compile(attend, backend="fxopt", dynamic=False, options={"strict": True}), inputs, weight)
    own = [figures for figures in contests.values() if any(label.startswith(KERNEL) for label in figures)]
    assert len(own) == 4, contests
    assert_closer(results, outcome(attend, inputs, weight), outcome(attend, to_float64(inputs), weight.double()))


@pytest.mark.parametrize("case", DROPPING, ids=lambda c: c.name)
def test_written_out_with_dropout(case: Case) -> None:
    """Results are linear in the values: gradients drop what the forward has dropped, and the generator decides what."""
    torch.compiler.reset()
    q, k, v, *masks = replace(case, batch=2, addends=tuple(((2, *s[1:]), no) for s, no in case.addends)).inputs(  # type: ignore[misc]
        torch.device("cuda")
    )
    compiled = torch.compile(case.attend, backend="fxopt", dynamic=False, options={"strict": True})
    weight = torch.randn_like(case.attend(q, k, v, *masks))
    drawn = []
    for number in (1, 2, 1):
        torch.manual_seed(number)
        out = compiled(q, k, v, *masks)
        drawn.append(out.detach().clone())
        total = (out.double() * weight).sum()
        (slope,) = torch.autograd.grad(out, [v], weight)
        expected = (slope.double() * v).sum()
        scale = float((out.double() * weight).abs().sum())
        assert abs(float(total - expected)) < 1e-3 * scale, "of about as many terms, each rounded to 2 ** -9"
    assert torch.equal(drawn[0], drawn[2]) and not torch.equal(drawn[0], drawn[1])


@pytest.mark.parametrize("case", CASES, ids=lambda c: c.name)
def test_values_and_gradients(case: Case) -> None:
    torch.compiler.reset()
    inputs = replace(case, **SMALL[case.name]).inputs(torch.device("cuda"))
    weight = torch.randn_like(case.attend(*inputs))
    with compiling(KERNEL) as contests:
        compiled = torch.compile(case.attend, backend="fxopt", dynamic=False, options={"strict": True})
        results = outcome(compiled, inputs, weight)
    learned = any(learns for _, learns in case.addends)
    own = [figures for figures in contests.values() if any(label.startswith(KERNEL) for label in figures)]
    assert len(own) == (3 + learned if case.width <= MOST_FEATURES else 0), contests
    assert_closer(results, outcome(case.attend, inputs, weight), outcome(case.attend, to_float64(inputs), weight.double()))
    for one, two in zip(results, outcome(compiled, inputs, weight), strict=True):
        assert torch.equal(one, two), "the same bits each time"


@pytest.mark.parametrize("case", [CASES[0], CASES[2]], ids=lambda c: c.name)
def test_other_lengths_through_one_graph(case: Case) -> None:
    torch.compiler.reset()
    torch._dynamo.utils.counters.clear()
    case = replace(case, **SMALL[case.name])
    inputs = case.mark(case.inputs(torch.device("cuda")))
    with compiling(DYNAMIC) as contests:
        compiled = torch.compile(case.attend, backend="fxopt", options={"strict": True})
        outcome(compiled, inputs, torch.randn_like(case.attend(*inputs)))
    assert sum(any(label.startswith(KERNEL) for label in figures) for figures in contests.values()) >= 3, contests
    found = errors(case, compiled, torch.device("cuda"))
    assert found.pop("graphs") == 1
    assert len(found) == 6 and all(error <= 1 for error in found.values()), found


@pytest.mark.parametrize("case", CASES[:2], ids=lambda c: c.name)
def test_without_kernels_nothing_is_left_to_eager_forms(case: Case) -> None:
    torch.compiler.reset()
    RECENT.clear()
    inputs = replace(case, **SMALL[case.name]).inputs(torch.device("cuda"))
    weight = torch.randn_like(case.attend(*inputs))
    with compiling("refused"):
        compiled = torch.compile(case.attend, backend="fxopt", dynamic=False, options={"strict": True})
        results = outcome(compiled, inputs, weight)
    calls = [op for journal in RECENT for op, _ in journal.library]
    assert "aten::bmm.dtype" in calls and not any(op.startswith("fxopt::scored") for op in calls), calls
    assert_closer(results, outcome(case.attend, inputs, weight), outcome(case.attend, to_float64(inputs), weight.double()))
