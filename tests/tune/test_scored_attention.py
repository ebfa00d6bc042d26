"""Attention in training by kernels of ours: the plan that comes of it, and what runs when nothing is measured."""

from __future__ import annotations

import pytest

from fxopt.ir.region import Alternatives, ScoredAttention
from fxopt.lower import Lowered
from fxopt.lower.attention_kernels import KERNEL, LIBRARY
from fxopt.runtime.artifacts import ArtifactStore
from fxopt.runtime.plan import Launch
from tests.lower.test_attention_kernels import searched
from tests.lower.test_scored_attention import BIAS, STATISTICS, K, Q, V, backward
from tests.tune import test_alternatives
from tests.tune.test_alternatives import Bench, planned, tuned

GRAD = Q.transpose(1, 2).contiguous()


@pytest.fixture
def bench(monkeypatch: pytest.MonkeyPatch) -> Bench:
    return Bench(monkeypatch)


def gradients() -> Lowered:
    return searched(backward, Q, K, V, BIAS, GRAD, *STATISTICS)


def test_gradients_are_launches(bench: Bench, store: ArtifactStore) -> None:
    low = gradients()
    names = [s.name for s in low.steps if isinstance(s, Alternatives)]
    bench.seconds = {KERNEL: 0.5}
    after, chosen, failed, _ = tuned(low, store, mode="default")
    own = [s for s in after.steps if isinstance(s, ScoredAttention)]
    assert not failed and [s.name for s in own] == names and len(own) == 3
    assert all(labels[0] == LIBRARY and len(labels) > 2 for _, labels in bench.measured)
    launches = [s for s in planned(after, chosen).steps if isinstance(s, Launch)]
    assert [launch.writes for launch in launches] == [s.writes() for s in own]


def test_unmeasured_kernels_run(bench: Bench, store: ArtifactStore, monkeypatch: pytest.MonkeyPatch) -> None:
    """The eager forms would store all scores."""
    monkeypatch.setattr(test_alternatives.tuner.Measurements, "compare", lambda *_: None)
    after, _, failed, _ = tuned(gradients(), store, mode="default")
    assert not failed and sum(isinstance(s, ScoredAttention) for s in after.steps) == 3
