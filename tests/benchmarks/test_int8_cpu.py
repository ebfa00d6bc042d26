"""The benchmark of int8 products on CPUs: every contender computes the product it names."""

from __future__ import annotations

import pytest
import torch

from benchmarks.int8_cpu import calls, measured


@pytest.mark.skipif(not torch.backends.mkldnn.is_available(), reason="no oneDNN")
def test_contenders_run_and_are_timed() -> None:
    runs = calls(8, 32, 16)
    assert all(run().shape == (8, 16) for run in runs.values())
    times = measured((8, 32, 16), 1)["microseconds"]
    assert times.keys() == runs.keys() and all(us > 0 for us in times.values())
