"""The benchmark of convolutions by kernels of ours: its cases, what it compiles for them, and how it judges."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

pytest.importorskip("triton")

from benchmarks.conv_kernels import FusedCase, cases, printed, report, summary
from fxopt.ir.region import Alternatives, Call
from fxopt.target import Target
from fxopt.tune.measure import BoundCall
from tests.lower.contracting import searched

CPU = torch.device("cpu")


def listed() -> dict[str, FusedCase]:
    return {c.title: c for c in cases()}


def test_no_convolution_twice_and_no_product() -> None:
    assert len(listed()) == len(list(cases()))
    assert {c.conv.model for c in cases()} == {
        "convnext-t", "mobilenet-v3", "efficientnet-b0", "resnet50", "vit-b", "unet",
    }  # fmt: skip
    assert not any(c.conv.is_product for c in cases())


@pytest.mark.parametrize("title", ["240x28x28 -> 240, 5x5", "256x28x28 -> 256, 3x3"])
def test_each_way_is_there_and_each_configuration_once(title: str) -> None:
    case = next(c for name, c in listed().items() if title in name)
    case = replace(case, conv=replace(case.conv, batch=1))
    (found,) = searched(case.function, *case.inputs(CPU), every=True).steps
    assert isinstance(found, Alternatives)
    ways = printed(found, Target.cuda(90), 6)
    labels = [way.label for way in ways]
    assert len(set(labels)) == len(labels) and len(labels) >= 5
    first, ours = ways[0], [way for way in ways if way.seconds is not None]
    assert first.label == "library" and isinstance(first.parts[0], BoundCall) and isinstance(first.parts[0].call, Call)
    assert all(not isinstance(p, BoundCall) for way in ours for p in way.parts)
    assert len({way.parts[-1].text for way in ours}) == len(ours)  # type: ignore[union-attr]


def test_what_the_tuner_would_not_compile_does_not_count() -> None:
    library = {"label": "library", "us_hot": 10.0, "us_cold": 12.0}
    ours = {"label": "stencil 1", "us_hot": 5.0, "us_cold": 6.0, "estimate_us": 4.0, "proposed": True, "excess_error": 0.5}
    better = {**ours, "label": "stencil 2", "us_hot": 4.0, "us_cold": 4.0, "proposed": False, "excess_error": 2.0}
    entry = {"case": "one", "rows": [library, ours, better, {"label": "stencil 3", "failed": "no memory"}]}
    assert summary([entry]) == {"geometric_mean": pytest.approx(2.0), "wins": {"stencil": 1}, "ratios": {"one": 2.0}}
    text = report(entry)
    assert "WRONG: ['stencil 2']" in text and "proposed stencil 1 5.5" in text and "best stencil 2 4.0" in text
    assert "not run: ['stencil 3: no memory']" in text
