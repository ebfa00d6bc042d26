"""What the first proposals of cost models cost, replayed."""

from __future__ import annotations

import pytest

from benchmarks.proposals import main, regret


def test_the_best_of_the_first_proposals_against_the_best_of_all() -> None:
    timed = [(3.0, 8.0), (1.0, 12.0), (2.0, 10.0)]  # the model's order is the opposite of the right one
    assert [regret(timed, count) for count in (1, 2, 3)] == [1.5, 1.25, 1.0]


def test_committed_results_are_replayed(capsys: pytest.CaptureFixture[str]) -> None:
    main()
    lines = capsys.readouterr().out.splitlines()
    assert {line.split()[0] for line in lines} == {
        "implicit",
        "stencil",
        "stencil-direct",
        "stencil-and-sums",
        "sums",
        "attention",
    }
