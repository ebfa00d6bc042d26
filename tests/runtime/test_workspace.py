"""Blocks are reused, never shared, and not hoarded."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

from fxopt.runtime import workspace


@pytest.fixture(autouse=True)
def clean() -> Iterator[None]:
    workspace._kept.clear()
    yield
    workspace._kept.clear()


def test_a_block_is_used_again() -> None:
    first = workspace.take(10_000)
    assert first.numel() >= 10_000 and first.dtype == torch.uint8
    workspace.give(first)
    assert workspace.take(5_000) is first
    assert workspace.take(5_000) is not first, "it is taken"


def test_the_smallest_fitting_block_is_taken() -> None:
    small, large = workspace.take(10_000), workspace.take(100_000)
    workspace.give(large)
    workspace.give(small)
    assert workspace.take(8_000) is small and workspace.take(8_000) is large


def test_a_larger_block_replaces_a_smaller_one() -> None:
    workspace.give(workspace.take(10_000))
    workspace.give(workspace.take(100_000))
    assert [b.numel() >= 100_000 for b in workspace._kept] == [True]


def test_few_and_no_huge_blocks_are_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    for block in [workspace.take(n * 4096) for n in range(1, 10)]:
        workspace.give(block)
    assert sorted(b.numel() // 4096 for b in workspace._kept) == [6, 7, 8, 9]
    monkeypatch.setattr(workspace, "LARGEST_KEPT", 4096)
    workspace._kept.clear()
    workspace.give(workspace.take(4097))
    assert workspace._kept == []


def test_a_block_outlives_inference_mode() -> None:
    with torch.inference_mode():
        block = workspace.take(64)
    block.fill_(1)
    assert not block.is_inference()
