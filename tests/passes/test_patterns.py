"""Tests generated from the declarations: every sample of every pattern matches and is right, no near miss matches."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from fxopt.passes.fusions import PATTERNS
from fxopt.passes.pattern import Pattern, Sample, templates
from tests.numerics import assert_closer, to_float64
from tests.passes.graphs import CHECKED, aliasing, execute, optimize

SAMPLES = [pytest.param(p, s, id=f"{p.name}-{s.label}") for p in PATTERNS for s in p.samples()]
NEAR_MISSES = [pytest.param(p, s, id=f"{p.name}-{s.label}") for p in PATTERNS for s in p.near_misses()]


@pytest.mark.parametrize("declared", PATTERNS, ids=lambda p: p.name)
def test_declaration_is_complete(declared: Pattern) -> None:
    search, build = templates(declared)
    assert search.nodes
    assert build.nodes
    assert {n.target for n in search.nodes} >= set(declared.needs)
    assert len(declared.samples()) >= 3
    assert declared.near_misses()


@pytest.mark.parametrize(("declared", "sample"), SAMPLES)
def test_sample_matches_and_is_right(declared: Pattern, sample: Sample) -> None:
    args = sample.arguments()
    graph, context = optimize(sample.function, args)
    assert sum(r.rule == f"{declared.name}.match" for r in context.log) == 1
    actual, eager = execute(graph, args), sample.function(*args)
    eager = tuple(eager) if isinstance(eager, tuple) else (eager,)
    exact = sample.function(*to_float64(args))
    assert_closer(actual, eager, tuple(exact) if isinstance(exact, tuple) else (exact,))
    assert [a.stride() for a in actual] == [e.stride() for e in eager]
    assert aliasing(args, actual) == aliasing(args, eager)


@pytest.mark.parametrize(("declared", "sample"), SAMPLES)
def test_disabled_pattern_does_not_match(declared: Pattern, sample: Sample) -> None:
    _, context = optimize(sample.function, sample.arguments(), options=replace(CHECKED, disable=(declared.name,)))
    assert not any(r.rule.startswith(declared.name) for r in context.log)


@pytest.mark.parametrize(("declared", "sample"), NEAR_MISSES)
def test_near_miss_does_not_match(declared: Pattern, sample: Sample) -> None:
    args = sample.arguments()
    graph, context = optimize(sample.function, args)
    assert not any(r.rule == f"{declared.name}.match" for r in context.log)
    eager = sample.function(*args)
    for a, e in zip(execute(graph, args), eager if isinstance(eager, tuple) else (eager,), strict=True):
        torch.testing.assert_close(a, e)
