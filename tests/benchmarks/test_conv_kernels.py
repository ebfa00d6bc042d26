"""The benchmark of convolutions by kernels of ours: its cases, what it compiles for them, and how it judges."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

pytest.importorskip("triton")

from benchmarks.conv_kernels import Case, PooledCase, cases, printed, report, summary, tuned
from fxopt.ir.kernel import KernelSource
from fxopt.ir.region import Alternatives, Call
from fxopt.target import Target
from fxopt.tune.measure import BoundCall
from tests.lower.contracting import searched

CPU = torch.device("cpu")


def listed() -> dict[str, Case]:
    return {c.title: c for c in cases()}


def test_no_convolution_twice_and_no_product() -> None:
    assert len(listed()) == len(list(cases()))
    assert {c.conv.model for c in cases()} == {
        "convnext-t", "mobilenet-v3", "efficientnet-b0", "resnet50", "vit-b", "unet",
        "vgg-16", "tiny-yolov3", "densenet-121", "first-unet",
    }  # fmt: skip
    assert not any(c.conv.is_product for c in cases() if not isinstance(c, PooledCase))


@pytest.mark.parametrize(
    "title",
    [
        "240x28x28 -> 240, 5x5 groups 240",
        "resnet50 b64 bfloat16 256x28x28 -> 256, 3x3 stride 2",
        "240x28x28 -> 240, 5x5 groups 240 gradients",
        "vgg-16 b32 bfloat16 256x56x56 -> 256, 3x3, pooled",
        "densenet-121 b64 bfloat16 512x28x28 -> 256, 1x1, pooled",
    ],
)
def test_each_way_is_there_and_each_configuration_once(title: str) -> None:
    case = next(c for name, c in listed().items() if name.endswith(title))
    case = replace(case, conv=replace(case.conv, batch=1))
    (found,) = searched(case.function, *case.inputs(CPU), every=True).steps
    assert isinstance(found, Alternatives)
    ways = printed(found, Target.cuda(90), 6)
    labels = [way.label for way in ways]
    assert len(set(labels)) == len(labels) and len(labels) >= 5
    first, ours = ways[0], [way for way in ways if way.config]
    assert first.label == "library" and isinstance(first.parts[0], BoundCall) and isinstance(first.parts[0].call, Call)
    with_cudnn = "cudnn" in labels  # which does all of a common convolution that is followed by relu
    chosen = tuned(found, Target.cuda(90))
    assert chosen <= set(labels) and bool(chosen) != with_cudnn
    alone = [way for way in ours if not any(isinstance(p, BoundCall) for p in way.parts)]
    keys = {tuple(p.key("any") for p in way.parts if isinstance(p, KernelSource)) for way in alone}
    assert len(alone) >= 3 and len(keys) == len(alone)


def test_what_the_tuner_would_not_compile_does_not_count() -> None:
    library = {"label": "library", "ours": False, "us_hot": 10.0, "us_cold": 12.0}
    ours = {"label": "stencil 1", "ours": True, "us_hot": 5.0, "us_cold": 6.0, "estimate_us": 4.0, "proposed": True}
    better = {**ours, "label": "stencil 2", "us_hot": 4.0, "us_cold": 4.0, "proposed": False, "excess_error": 2.0}
    entry = {"case": "one", "rows": [library, ours, better, {"label": "stencil 3", "failed": "no memory"}]}
    assert summary([entry]) == {"geometric_mean": pytest.approx(2.0), "wins": {"stencil": 1}, "ratios": {"one": 2.0}}
    text = report(entry)
    assert "WRONG: ['stencil 2']" in text and "proposed stencil 1 5.5" in text and "best stencil 2 4.0" in text
    assert "not run: ['stencil 3: no memory']" in text
