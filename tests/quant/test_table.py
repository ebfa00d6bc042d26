"""Calibrations as values and as files: round trips, edits, damage, merging."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from fxopt.errors import CalibrationError
from fxopt.ir.observer_ops import exponent_histogram
from fxopt.quant import ranges
from fxopt.quant.observers import Found, Range
from fxopt.quant.table import AMBIGUOUS, NEVER, ZERO, Calibration, LayerRange, joined_layers

LINEAR = "linear"


def seen(x: Tensor) -> Range:
    return Range(x.amin(0), x.amax(0), exponent_histogram(x))


def table(*, batches: int = 2, scale: float = 1.0) -> Calibration:
    wide, narrow = torch.randn(50, 16) * scale, torch.randn(50, 8).relu()
    return Calibration(
        (
            LayerRange("encoder.q", LINEAR, (16, 16), "float32", seen(wide)),
            LayerRange("encoder.k", LINEAR, (16, 16), "float32", seen(wide)),
            LayerRange("head", LINEAR, (4, 8), "float32", seen(narrow)),
            LayerRange("unused", LINEAR, (4, 8), "bfloat16", None),
        ),
        batches,
        versions={"torch": "2"},
    )


def assert_same(a: Calibration, b: Calibration) -> None:
    assert (a.names(), a.batches, a.method, dict(a.versions)) == (b.names(), b.batches, b.method, dict(b.versions))
    assert a.digest() == b.digest()
    for mine, theirs in zip(a.layers, b.layers, strict=True):
        assert mine.amax == theirs.amax and mine.elements == theirs.elements and mine.obstacle == theirs.obstacle


def test_shown_in_one_line_that_tells_different_tables_apart() -> None:
    """Long tensors are cut in their own text, and a table among options is part of keys."""
    high = torch.arange(4096.0)
    tables = [
        Calibration((LayerRange("a", "linear", (8, 4096), "float32", Range(-high, top, exponent_histogram(top))),), 1)
        for top in (high, high.index_fill(0, torch.tensor([2048]), 1.0))
    ]
    first, second = map(repr, tables)
    assert first != second and first == repr(Calibration(tables[0].layers, 1))
    assert "1 layer" in first and "\n" not in first and len(first) < 120


def test_files_give_the_same_table(tmp_path: Path) -> None:
    given = table().with_layer("head", precision="int8", scale=0.25).with_method("mse")
    given.save(tmp_path / "a.fxcal")
    read = Calibration.load(tmp_path / "a.fxcal")
    assert_same(read, given)
    assert read.known("head") == given.known("head") and read.scale("head", "int8") == 0.25
    assert read.scale("encoder.q", "fp8") == given.scale("encoder.q", "fp8")


def test_saving_again_leaves_two_files(tmp_path: Path) -> None:
    for scale in (1.0, 2.0):
        table(scale=scale).save(tmp_path / "a.fxcal")
    assert sorted(p.suffix for p in tmp_path.iterdir()) == [".fxcal", ".tensors"]
    Calibration.load(tmp_path / "a.fxcal")


def test_a_write_that_fails_leaves_the_table_that_was_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first, path = table(), tmp_path / "a.fxcal"
    first.save(path)

    def no_json(source: Any, target: Any) -> None:
        if str(target).endswith(".fxcal"):
            raise OSError("disk full")
        Path(source).rename(target)

    monkeypatch.setattr("fxopt.quant.table.os.replace", no_json)
    with pytest.raises(OSError, match="disk full"):
        table(scale=3.0).save(path)
    assert_same(Calibration.load(path), first)
    assert not [p for p in tmp_path.iterdir() if p.name.startswith(".")]


@pytest.mark.parametrize("precision", ["int8", "fp8"])
def test_scales_come_from_limits(precision: str) -> None:
    given, x = table(), table().layers[0]
    assert x.seen is not None
    largest, grid = (127.0, ranges.INT8) if precision == "int8" else (448.0, ranges.FP8)
    for method in ranges.METHODS:
        limit = ranges.clipping_limit(given.layers[0].seen.histogram, given.layers[0].amax, method, grid)  # type: ignore[union-attr]
        assert given.with_method(method).scale("encoder.q", precision) == limit / largest
    assert given.scale("encoder.q", precision) == given.layers[0].amax / largest


def test_what_stands_in_the_way() -> None:
    zero = LayerRange("z", LINEAR, (4, 8), "float32", seen(torch.zeros(3, 8)))
    one, other = (LayerRange("a", LINEAR, shape, "float32", None) for shape in ((4, 8), (4, 9)))
    found = [Found(x.name, x.kind, x.shape, torch.float32, seen(torch.randn(3, 8)), None) for x in (one, other)]
    (ambiguous,) = joined_layers(found)
    assert (zero.obstacle, one.obstacle, ambiguous.obstacle) == (ZERO, NEVER, AMBIGUOUS)
    with pytest.raises(CalibrationError, match="'z' has no scale"):
        Calibration((zero,), 1).scale("z", "int8")


def test_a_name_in_several_graphs_is_one_layer() -> None:
    parts = torch.randn(4, 8), torch.randn(5, 8)
    (layer,) = joined_layers([Found("a", LINEAR, (4, 8), torch.float32, seen(x), None) for x in parts])
    whole = seen(torch.cat(parts))
    assert layer.seen is not None
    assert torch.equal(layer.seen.maximum, whole.maximum) and torch.equal(layer.seen.histogram, whole.histogram)


# ---------------------------------------------------------------------- edits


def edited(path: Path, edit: Callable[[dict[str, Any]], None]) -> None:
    document = json.loads(path.read_text())
    edit(document)
    path.write_text(json.dumps(document))


def test_edits_in_the_file_hold(tmp_path: Path) -> None:
    path = tmp_path / "a.fxcal"
    table().save(path)
    edited(path, lambda d: d["layers"][2].update(precision="fp8", scale=1))
    read = Calibration.load(path)
    assert read["head"].precision == "fp8" and read.scale("head", "fp8") == 1.0
    assert read.digest() != table().digest()


@pytest.mark.parametrize(
    ("edit", "words"),
    [
        (lambda d: d.pop("format"), ["'format' must be an integer"]),
        (lambda d: d.update(format=2), ["format", "reads 1"]),
        (lambda d: d.update(layers={}), ["'layers' must be a list"]),
        (lambda d: d["layers"].append(3), ["layers[4]", "no object"]),
        (lambda d: d["layers"][1].pop("name"), ["layers[1]", "'name' must be a string"]),
        (lambda d: d["layers"][1].update(name="encoder.q"), ["two have one name"]),
        (lambda d: d["layers"][0].update(name="encoder.v"), ["'encoder.v'", "no ranges of a layer of this name"]),
        (lambda d: d["layers"][0].update(shape=[16, 7]), ["'encoder.q'", "[16, 7]", "not to be edited"]),
        (lambda d: d["layers"][0].update(shape=[15, 16]), ["graph", "not to be edited"]),
        (lambda d: d["layers"][0].update(precission="fp8"), ["'encoder.q'", "'precission'", "did you mean 'precision'"]),
        (lambda d: d.update(methods="mse"), ["'methods'", "did you mean 'method'"]),
        (lambda d: d["layers"][0].update(shape=[16, -1]), ["'encoder.q'", "shape is [16, -1]"]),
        (lambda d: d["layers"][0].update(kind="rnn"), ["'encoder.q'", "'rnn'"]),
        (lambda d: d["layers"][0].update(dtype="int3"), ["'encoder.q'", "'int3'"]),
        (lambda d: d["layers"][0].update(precision="fp9"), ["'encoder.q'", "'fp9'", "did you mean 'fp8'"]),
        (lambda d: d["layers"][0].update(scale=0), ["'encoder.q'", "a scale is"]),
        (lambda d: d["layers"][0].update(scale=float("nan")), ["'encoder.q'", "a scale is"]),
        (lambda d: d["layers"][0].update(scale=True), ["'encoder.q'", "a scale is"]),
        (lambda d: d["layers"][0].update(amax=1e9), ["'encoder.q'", "amax", "set scale"]),
        (lambda d: d["layers"].pop(), ["graph"]),
        (lambda d: d["layers"].pop(0), ["graph"]),
        (lambda d: d["layers"].reverse(), ["graph"]),
        (lambda d: d.update(method="median"), ["'median'"]),
        (lambda d: d.update(batches=-1), ["batches"]),
        (lambda d: d["tensors"].update(sha256="0" * 64), ["damaged, or belongs to another"]),
        (lambda d: d["tensors"].update(file="../a.tensors"), ["no name of a file beside it"]),
        (lambda d: d["tensors"].update(file="gone.tensors"), ["cannot be read"]),
    ],
)
def test_edits_that_make_no_sense_name_the_field(tmp_path: Path, edit: Callable[[Any], Any], words: list[str]) -> None:
    path = tmp_path / "a.fxcal"
    table().save(path)
    edited(path, edit)
    with pytest.raises(CalibrationError) as caught:
        Calibration.load(path)
    assert all(word in str(caught.value) for word in [str(path), *words]), caught.value


def test_damaged_files(tmp_path: Path) -> None:
    path = tmp_path / "a.fxcal"
    table().save(path)
    (tensors,) = tmp_path.glob("*.tensors")
    content = bytearray(tensors.read_bytes())
    content[-1] ^= 1
    tensors.write_bytes(content)
    with pytest.raises(CalibrationError, match="damaged"):
        Calibration.load(path)
    path.write_text("{")
    with pytest.raises(CalibrationError, match="no JSON"):
        Calibration.load(path)
    with pytest.raises(CalibrationError, match="cannot be read"):
        Calibration.load(tmp_path / "b.fxcal")


# ---------------------------------------------------------------------- merging


def test_merging_does_not_depend_on_the_order() -> None:
    parts = [table(batches=n, scale=s) for n, s in ((1, 1.0), (2, 3.0), (4, 0.5))]
    forwards, backwards = Calibration.merge(*parts), Calibration.merge(*reversed(parts))
    assert_same(forwards, backwards)
    assert forwards.batches == 7 and forwards.layers[0].elements == 3 * 800
    assert forwards.layers[0].amax == max(p.layers[0].amax for p in parts)


def test_merging_keeps_what_users_have_set() -> None:
    merged = Calibration.merge(table(), table().with_layer("head", precision="fp8"))
    assert merged["head"].precision == "fp8"


@pytest.mark.parametrize(
    ("other", "words"),
    [
        (Calibration(table().layers[:3], 1), ["only one of them has a layer 'unused'"]),
        (
            Calibration((*table().layers[:3], LayerRange("unused", LINEAR, (4, 9), "bfloat16", None)), 1),
            ["'unused'", "[4, 9]"],
        ),
        (table().with_method("mse"), ["'amax' and 'mse'"]),
        (table().with_layer("head", scale=0.5), ["the scale of layer 'head'", "0.25", "0.5"]),
    ],
)
def test_merging_what_does_not_belong_together_names_the_first(other: Calibration, words: list[str]) -> None:
    with pytest.raises(CalibrationError) as caught:
        Calibration.merge(table().with_layer("head", scale=0.25), other)
    assert all(word in str(caught.value) for word in words)


def test_a_folder_that_is_not_there_is_named(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError) as raised:
        table().save(tmp_path / "none" / "model.fxcal")
    assert str(raised.value.filename).startswith(str(tmp_path / "none" / "model.fxcal"))
