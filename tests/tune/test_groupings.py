"""Which grouping is kept where the estimate cannot tell, and the plan that comes of it."""

from __future__ import annotations

import pytest
import torch

from fxopt.lower import Lowered
from fxopt.lower.groupings import AGAIN, IN_TWO, STORED, WHOLE
from fxopt.report.render import journal_to_text
from fxopt.runtime.artifacts import ArtifactStore
from fxopt.runtime.plan import Launch, Plan, allocated
from tests.lower.test_groupings import empty, grouped, squeezed
from tests.tune.test_alternatives import Bench, planned, tuned

F = torch.nn.functional


@pytest.fixture
def bench(monkeypatch: pytest.MonkeyPatch) -> Bench:
    return Bench(monkeypatch)


X = 8 * 256 * 4096


def across_a_product() -> Lowered:
    return grouped(squeezed, empty(8, 256, 4096), empty(256), empty(256, 256))


def long_rows() -> Lowered:
    return grouped(lambda x, y, z: F.softmax(x * y + z, -1), *(empty(256, 65536) for _ in range(3)))


def launches(plan: Plan) -> list[Launch]:
    return [step for step in plan.steps if isinstance(step, Launch)]


@pytest.mark.parametrize("faster", [STORED, AGAIN])
def test_the_faster_grouping_is_kept_and_explained(bench: Bench, store: ArtifactStore, faster: str) -> None:
    bench.seconds = {STORED: 0.9, AGAIN: 1.0, faster: 0.5}
    low = across_a_product()
    stored, _ = (name for name, spec in low.groupings[0].buffers.items() if name.startswith("buf") and spec.numel == X)
    after, chosen, failed, journal = tuned(low, store, mode="default")
    plan = planned(after, chosen)
    assert not failed and not after.groupings
    assert (stored in allocated(plan)) == (faster == STORED)
    assert {launch.label for launch in launches(plan)} == set(chosen)
    assert f"groupings: r0.grouping: {faster}" in journal_to_text(journal)


def test_a_row_in_two_kernels_replaces_one(bench: Bench, store: ArtifactStore) -> None:
    bench.seconds = {IN_TWO: 0.5}
    after, chosen, _, _ = tuned(long_rows(), store, mode="default")
    *rows, elements = launches(planned(after, chosen))
    assert {launch.label for launch in rows} == {"r0.rows"} and elements.label == "r0" and set(chosen) == {"r0.rows", "r0"}
    assert "r0.shared" in rows[0].writes and "r0.shared" in elements.buffers
    bench.seconds = {}
    again, chosen, _, _ = tuned(long_rows(), store, mode="default")
    assert [s.name for s in again.steps] == [s.name for s in after.steps], "remembered"


def test_each_kernel_of_a_grouping_is_chosen_by_itself(bench: Bench, store: ArtifactStore) -> None:
    """So that two ways are compared, and not every combination of their kernels' configurations."""
    tuned(long_rows(), store, mode="default")
    (trials,) = (labels for _, labels in bench.measured if labels[0].startswith(WHOLE))
    assert len(trials) == 2
    assert sum(name.startswith("r0.rows") for name, _ in bench.measured) == 1


def test_a_grouping_that_does_not_compile_is_none(bench: Bench, store: ArtifactStore) -> None:
    bench.seconds = {IN_TWO: 0.5}
    bench.failing = lambda source: len(source.buffers) > 4
    after, chosen, failed, _ = tuned(long_rows(), store, mode="default")
    assert not failed and planned(after, chosen) and set(chosen) == {"r0"}
