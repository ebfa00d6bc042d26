"""The convolutions' benchmark: its cases, that each way computes what it says, and how it judges."""

from __future__ import annotations

import dataclasses

import pytest
import torch

from benchmarks.conv_micro import ConvCase, cases, error, exact, judge, operands, report, ways

CPU = torch.device("cpu")
SMALL = [
    ConvCase("test", 2, 8, 12, 6, 1),
    ConvCase("test", 2, 8, 12, 6, 3, 2),
    ConvCase("test", 2, 3, 8, 8, 4, 4),
    ConvCase("test", 1, 8, 8, 6, 7, 1, 8),
]


def test_every_convolution_is_there_once() -> None:
    listed = list(cases())
    assert len({c.title for c in listed}) == len(listed)
    layers = [c for c in listed if c.model == "resnet50" and c.batch == 64 and c.dtype == torch.bfloat16]
    assert len(layers) == 23
    assert sum(c.is_product for c in layers) == 12
    assert {c.groups for c in listed if c.model == "convnext-t"} == {1, 96, 192, 384, 768}


@pytest.mark.parametrize("case", SMALL, ids=lambda c: c.title)
def test_ways_agree_with_float64(case: ConvCase) -> None:
    o = operands(case, CPU)
    chosen = ways(case, o)
    assert ("product" in chosen) == case.is_product
    errors, refused = judge(case, o, chosen)
    assert not refused
    assert {name for name in chosen if not name.startswith("then")} == errors.keys()
    assert all(e < 2 for e in errors.values())
    assert torch.equal(chosen["then relu"].call(), chosen["channels-last"].call().relu())
    assert torch.equal(chosen["then add"].call(), chosen["channels-last"].call() + o.residual)


def test_a_wrong_way_is_told() -> None:
    case = dataclasses.replace(SMALL[0], dtype=torch.float32)
    o = operands(case, CPU)
    want = exact(case, o, "relu")
    assert error(want.float(), want) < 1
    spoilt = want.float()
    spoilt[0, 0, 0, 0] = float("nan")
    entry = {"case": "a case", "us": {"relu": 1.0}, "errors": {"relu": error(spoilt, want)}, "hides_nan": []}
    assert report(entry).endswith("WRONG: relu")
