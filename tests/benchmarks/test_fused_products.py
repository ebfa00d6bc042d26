"""The benchmark of products in compiled layers: what it keeps, and the whole of it on a CPU, where there are no contests."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch.nn import functional

from benchmarks.fused_products import BEST, FUSED, TWO, Gated, Layer, kept, measure, report
from fxopt.tune import alternatives


@pytest.mark.parametrize("merged", [False, True])
def test_a_layer_is_right(merged: bool) -> None:
    entry = measure(Layer("small", lambda: Gated(16, 32, functional.silu, merged), (2, 8, 16), True), torch.device("cpu"))
    assert entry["contests"] == {} and set(entry["ms"]) == {BEST} and entry["excess_error"][BEST] <= 1
    assert "WRONG" not in "".join(report(entry))


def test_the_way_asked_for_is_kept_where_there_is_one(monkeypatch: pytest.MonkeyPatch) -> None:
    figures = {"library": 1e-5, "two a": 3e-5, "two b": 2e-5}
    monkeypatch.setattr(alternatives, "decide", lambda *_: ("library", figures))
    call: Any = ("key", "name", {}, torch.device("cpu"), (), None, None)
    for way, winner in ((TWO, "two b"), (FUSED, "library"), (BEST, "library")):
        with kept(way) as contests:
            assert alternatives.decide(*call) == (winner, figures)
        assert contests == {"0 name": pytest.approx({label: s * 1e6 for label, s in figures.items()})}
