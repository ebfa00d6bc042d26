"""Which convolutions are worth a contest with the library, held against what an H100 measured of both."""

from __future__ import annotations

import json
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from fxopt.codegen.templates import gemm_estimate
from fxopt.codegen.templates.conv_config import LIBRARY_TILE, ConvProblem, implicit_may_win
from fxopt.ir.region import Patches
from fxopt.target import Target

DATA = Path(__file__).parents[2] / "benchmarks" / "results" / "conv_kernels_h100.json"
TARGET = Target.cuda(90)
TITLE = re.compile(r"resnet50 b(\d+) bfloat16 (\d+)x(\d+)x\d+ -> (\d+), (\d)x\d(?: stride (\d))?")


def problem(images: int, inside: int, side: int, out: int, window: int, stride: int) -> ConvProblem:
    """A convolution of square channels-last images in bfloat16, with a relu over its result."""
    padding = (window - 1) // 2
    places = (side + 2 * padding - window) // stride + 1
    patches = Patches(
        buffer="x",
        offset=0,
        shape=(images, side, side, inside),
        strides=(side * side * inside, side * inside, inside, 1),
        window=(window, window),
        places=(places, places),
        stride=(stride, stride),
        padding=(padding, padding),
        dilation=(1, 1),
    )
    weight = (1, window * window * inside, 0)
    written = 2 * images * places * places * out
    return ConvProblem(patches, out, torch.bfloat16, weight, written=written, epilogue_ops=0.05)


def case(title: str) -> ConvProblem | None:
    found = TITLE.fullmatch(title)
    return None if found is None else problem(*(int(n or 1) for n in found.groups()))


def seconds(row: dict[str, Any]) -> float:
    return float(row["us_hot"] + row["us_cold"]) / 2e6


def fills(each: ConvProblem) -> bool:
    tiles = -(-each.product.m // LIBRARY_TILE) * -(-each.product.n // LIBRARY_TILE)
    return tiles >= TARGET.sm_count


MEASURED = json.loads(DATA.read_text())["cases"]
CASES = [(found, c["rows"]) for c in MEASURED if (found := case(c["case"])) is not None]


@pytest.mark.parametrize("apart", [True, False], ids=["with epilogue", "alone"])
def test_contests_that_the_library_wins_by_far_are_not_held(apart: bool) -> None:
    """cuDNN's time is that of its call with a relu, which takes no longer than the convolution. Where cuDNN's tiles leave
    multiprocessors idle, ours may share the inner dimension among programs, which was not measured."""
    held = {}
    measured = [(each, rows) for each, rows in CASES if fills(each)]
    for each, rows in measured:
        ours = min(seconds(r) for r in rows if r["label"].startswith("implicit") and "us_hot" in r)
        library = next(seconds(r) for r in rows if r["label"] == "cudnn")
        if apart:
            library += gemm_estimate.SECOND_LAUNCH_SECONDS + 2 * each.written / TARGET.memory_rate
        held[library / ours] = implicit_may_win(each if apart else replace(each, epilogue_ops=0.0), TARGET)
    assert len(held) == len(measured) >= 12
    assert all(implicit_may_win(each, TARGET) for each, _ in CASES if not fills(each))
    assert all(held[gain] for gain in held if gain > 1.02)
    lost = [held[gain] for gain in held if gain < 0.75]
    assert len(lost) >= 8 and not any(lost)


def test_what_was_not_measured_is() -> None:
    lost = problem(64, 256, 14, 256, 3, 1)
    assert not implicit_may_win(lost, TARGET)
    assert implicit_may_win(problem(64, 96, 56, 192, 3, 1), TARGET), "channels that leave cuDNN's tiles half empty"
    assert implicit_may_win(lost, Target.cuda(80))
