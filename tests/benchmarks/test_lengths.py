"""Lengths as sentences have them."""

from __future__ import annotations

from collections import Counter

from benchmarks.lengths import BUCKET, drawn, padded


def test_few_lengths_come_often() -> None:
    lengths = drawn(2000, 100)
    assert lengths == drawn(2000, 100) and set(lengths) <= set(range(2, 101))
    counts = [count for _, count in Counter(lengths).most_common()]
    assert counts[0] > 250 and counts[50] < 20
    assert [padded(n) for n in (1, BUCKET, BUCKET + 1)] == [BUCKET, BUCKET, 2 * BUCKET]
