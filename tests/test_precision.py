"""Which rule holds for which layer, and which options are refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from fxopt.errors import OptionError
from fxopt.options import Options
from fxopt.precision import HIGH, Decisions, misfit


@pytest.mark.parametrize(
    ("rules", "expected"),
    [
        ("fp8", "fp8"),
        ({"layers.0.fc": "int8", "layers.*": "fp8", "*": "high"}, "int8"),
        ({"layers.*": "fp8", "layers.0.*": "int8", "*": "high"}, "int8"),
        ({"*": "fp8", "encoder.*": "high"}, "fp8"),
        ({"encoder.*": "int8"}, None),
        ({"Layers.*": "int8"}, None),
    ],
)
def test_exact_names_go_before_the_longest_pattern(rules: Any, expected: str | None) -> None:
    assert Decisions.of(rules).of_layer("layers.0.fc") == expected


def test_unmatched_rules() -> None:
    decisions = Decisions.of({"a": "fp8", "b.*": "fp8", "c.?": "fp8", "*": "high"})
    assert decisions.unmatched(["a", "c.1"]) == ["b.*"]


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"precision": "fp9"}, ["'fp9'", "did you mean 'fp8'", "int4-weight", "weights in 4 bits"]),
        ({"precision": {"a": "int8-weigth"}}, ["'int8-weigth' (for 'a')", "did you mean 'int8-weight'"]),
        ({"precision": {1: "fp8"}}, ["named by a string"]),
        ({"precision": ["fp8"]}, ["a list"]),
        ({"calibration": 3}, ["'calibration'", "a Calibration, a path or None"]),
        ({"precision": "fp8", "freeze": False}, ["'freeze'", "freezes weights"]),
    ],
)
def test_bad_options_say_what_is_valid(options: dict[str, Any], words: list[str]) -> None:
    with pytest.raises(OptionError) as caught:
        Options.parse(None, options)
    for word in words:
        assert word in str(caught.value)


def test_quantizing_freezes_and_enters_keys() -> None:
    plain = Options.parse(None, {"freeze": True})
    parsed = [
        Options.parse(None, o) for o in ({"precision": "fp8"}, {"precision": {"a": "fp8"}}, {"calibration": Path("t")})
    ]
    assert all(p.freeze for p in parsed)
    facts = [json.dumps(p.cache_key_facts()) for p in (plain, *parsed)]
    assert len(set(facts)) == 4


def test_weights_of_few_bits_are_for_few_rows_on_a_gpu() -> None:
    for precision, device, rows, fits in (
        ("int8-weight", "cuda", 256, True),
        ("int4-weight", "cuda", 257, False),
        ("int8-weight", "cuda", None, True),
        ("int8-weight", "cpu", 4096, True),
        ("fp8", "cuda", 4096, True),
        (HIGH, "cuda", 4096, True),
    ):
        assert (misfit(precision, 256, 256, device, rows) is None) == fits


def test_a_vocabulary_need_be_no_multiple_of_16() -> None:
    for columns, inner, device, fits in (
        (30522, 768, "cuda", True),
        (50257, 768, "cuda", False),
        (1010, 768, "cuda", False),
        (1010, 768, "cpu", True),
        (30522, 760, "cuda", False),
    ):
        assert (misfit("fp8", columns, inner, device) is None) == fits
