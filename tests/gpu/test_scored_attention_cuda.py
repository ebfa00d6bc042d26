"""Attention in training by kernels of ours on a GPU: values and gradients of every case of the benchmark, made small."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from benchmarks.attention_training import CASES, Case, compiling, outcome
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
