"""The benchmark of norms before products: the whole of it on a CPU, where there are no contests."""

from __future__ import annotations

import torch

from benchmarks.norm_scales import MODELS, WAYS, measured, report


def test_a_model_is_right_each_way() -> None:
    entry = measured(MODELS[0].tiny, torch.device("cpu"), torch.bfloat16, 0.01)
    assert entry["contests"] == {} and set(entry["us"]) == {"eager", *WAYS}
    assert all(error <= 1 for error in entry["excess_error"].values())
    assert all(way in report(entry) for way in WAYS)
