"""Reading the files of a calibration (quant/table.py), of which nothing is trusted."""

from __future__ import annotations

import contextlib
import hashlib
from collections.abc import Collection, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fxopt.errors import CalibrationError
from fxopt.ir.layers import ATTENTION, CONVOLUTION, LINEAR
from fxopt.ir.observer_ops import BINS, FIRST_NOT_FINITE
from fxopt.options import suggestion
from fxopt.precision import PRECISIONS, Refinement
from fxopt.quant.observers import Range
from fxopt.quant.table import (
    CHANNELS,
    DOCUMENT_FIELDS,
    DTYPES,
    FITTED,
    FORMAT,
    GAINS,
    LAYER_FIELDS,
    MORE_PARTS,
    PARTS,
    Calibration,
    LayerRange,
    check_edits,
    check_method,
    graph_digest,
)


class Reader:
    """Reads the document of one calibration, field by field. Raises CalibrationError naming file and field."""

    def __init__(self, path: Path, document: Any) -> None:
        self.path, self.document = path, document

    def fail(self, where: str, problem: str) -> CalibrationError:
        return CalibrationError(f"{self.path}: {where}: {problem}")

    def calibration(self) -> Calibration:
        if not isinstance(self.document, dict):
            raise self.fail("the document", "it is no object")
        self.check_fields(self.document, DOCUMENT_FIELDS, "the document")
        if self.get(self.document, "format", int, "format") != FORMAT:
            raise self.fail("format", f"it is {self.document['format']}, this version of fxopt reads {FORMAT}")
        listed = self.get(self.document, "layers", list, "layers")
        described = [self.layer(given, index) for index, given in enumerate(listed)]
        if len({layer.name for layer in described}) != len(described):
            raise self.fail("layers", "two have one name")
        digest, tensors = self.get(self.document, "graph", str, "graph"), self.tensors()
        layers = tuple(self.with_range(*pair, tensors) for pair in zip(described, listed, strict=True))
        if digest != graph_digest(described):
            raise self.fail(
                "graph", "it is not the digest of the layers' names, kinds and shapes, which are not to be edited"
            )
        self.check_producers(layers)
        if tensors:
            raise self.fail("tensors", f"{min(tensors)!r} belongs to no layer")
        method = self.get(self.document, "method", str, "method")
        with self.located("method"):
            check_method(method, layers)
        batches = self.get(self.document, "batches", int, "batches")
        if batches < 0:
            raise self.fail("batches", f"it is {batches}")
        versions = self.get(self.document, "made by", dict, "made by")
        if not all(isinstance(v, str) for v in versions.values()):
            raise self.fail("made by", "versions are strings")
        return Calibration(layers, batches, method, versions)

    def layer(self, given: Any, index: int) -> LayerRange:
        """What the JSON says of a layer; its range is still to come."""
        where = f"layers[{index}]"
        if not isinstance(given, dict):
            raise self.fail(where, "it is no object")
        name = self.get(given, "name", str, where)
        where = f"layer {name!r}"
        self.check_fields(given, LAYER_FIELDS, where)
        kind = self.get(given, "kind", str, where)
        if kind not in (LINEAR, CONVOLUTION, ATTENTION):
            raise self.fail(where, f"its kind is {kind!r}, not {LINEAR!r}, {CONVOLUTION!r} or {ATTENTION!r}")
        shape = self.get(given, "shape", list, where)
        if not all(type(size) is int and size > 0 for size in shape):
            raise self.fail(where, f"its shape is {shape}")
        dtype = self.get(given, "dtype", str, where)
        if dtype not in DTYPES:
            raise self.fail(where, f"its dtype is {dtype!r}")
        precision, scale, symmetric = given.get("precision"), given.get("scale"), given.get("symmetric")
        with self.located(where):
            check_edits(precision, scale, symmetric, where)
        return LayerRange(name, kind, tuple(shape), dtype, None, precision, scale, symmetric=symmetric)

    def with_range(self, described: LayerRange, given: Mapping[str, Any], tensors: dict[str, Tensor]) -> LayerRange:
        where = f"layer {described.name!r}"
        channels = self.channels(where, described, tensors)
        refined = self.refined(where, described, given.get("refined"), tensors)
        seen = self.range(where, described.name, tensors)
        self.check_shape(where, described, given.get("elements"), seen)
        after, gains = given.get("after"), tensors.pop(f"{described.name}.{GAINS}", None)
        if after is not None and not isinstance(after, str):
            raise self.fail(where, f"it comes after {after!r}, which is no layer's name")
        layer = replace(described, seen=seen, channels=channels, refined=refined, after=after, gains=gains)
        for what, value in (("amax", layer.amax), ("elements", layer.elements)):
            if given.get(what) != value:
                raise self.fail(
                    where, f"its {what} is {given.get(what)!r}, but {value!r} in the tensors; to clip, set scale"
                )
        return layer

    def check_fields(self, given: Mapping[str, Any], known: Collection[str], where: str) -> None:
        """A field that nobody reads is a misspelt edit."""
        unknown = next((name for name in given if name not in known), None)
        if unknown is not None:
            raise self.fail(where, f"there is no field {unknown!r}{suggestion(unknown, known)}")

    def check_shape(self, where: str, layer: LayerRange, elements: Any, seen: Range | None) -> None:
        if seen is None:
            if elements:
                raise self.fail(where, "the tensors have no ranges of a layer of this name; names are not to be edited")
            return
        channels, known = seen.minimum.numel(), layer.shape[1] if len(layer.shape) > 1 else 0
        if (layer.kind == LINEAR and channels != known) or (layer.kind == CONVOLUTION and known and channels % known):
            told = f"its shape is {list(layer.shape)}, but what it was given has {channels} channels"
            raise self.fail(where, f"{told}; shapes are not to be edited")

    def check_producers(self, layers: Sequence[LayerRange]) -> None:
        shapes = {layer.name: layer.shape for layer in layers}
        for layer in layers:
            where, gains = f"layer {layer.name!r}", layer.gains
            if layer.after is not None and layer.after not in shapes:
                raise self.fail(where, f"it comes after {layer.after!r}, which is no layer")
            if gains is None:
                continue
            if layer.after is None or gains.dtype != torch.float32 or tuple(gains.shape) != shapes[layer.after][:1]:
                raise self.fail(where, "its gains are no float32 vector for the output channels of the layer before it")
            if not bool((gains.isfinite() & (gains >= 0)).all()):
                raise self.fail(where, "its gains are not finite, or negative")

    def channels(self, where: str, layer: LayerRange, tensors: dict[str, Tensor]) -> Tensor | None:
        """Takes the layer's own out of `tensors`."""
        found = tensors.pop(f"{layer.name}.{CHANNELS}", None)
        if found is None:
            return None
        if layer.kind == ATTENTION or found.dtype != torch.float32 or tuple(found.shape) != layer.shape[1:2]:
            raise self.fail(where, "its channels are no float32 vector for the input channels of its weight")
        if not bool((found.isfinite() & (found > 0)).all()) or bool((found.frexp().mantissa != 0.5).any()):
            raise self.fail(where, "its channels are not scaled by powers of two")
        return found

    def refined(self, where: str, layer: LayerRange, precision: Any, tensors: dict[str, Tensor]) -> Refinement | None:
        """Takes the layer's own out of `tensors`."""
        limits, correction = (tensors.pop(f"{layer.name}.{part}", None) for part in FITTED)
        if precision is None and limits is None and correction is None:
            return None
        if precision not in PRECISIONS or layer.kind == ATTENTION:
            raise self.fail(where, f"it is refined for {precision!r}, which is no precision of such a layer")
        for what, found in (("limits", limits), ("correction", correction)):
            dims = (1, 2) if what == "limits" and layer.kind == LINEAR else (1,)
            if found is None:
                continue
            if found.dtype != torch.float32 or found.dim() not in dims or found.shape[0] != layer.shape[0]:
                raise self.fail(where, f"its {what} are no float32 tensor for the rows of its weight")
            if not bool(found.isfinite().all()) or (what == "limits" and not bool((found > 0).all())):
                raise self.fail(where, f"its {what} are not finite, or not positive")
        return Refinement(precision, limits, correction)

    def range(self, where: str, name: str, tensors: dict[str, Tensor]) -> Range | None:
        """Takes the layer's own out of `tensors`."""
        parts = [tensors.pop(f"{name}.{part}", None) for part in (*PARTS, *MORE_PARTS)]
        if all(part is None for part in parts):
            return None
        minimum, maximum, histogram, rows, average = parts
        if minimum is None or maximum is None or histogram is None:
            raise self.fail(where, "some of its tensors are missing")
        if not minimum.dtype == maximum.dtype == torch.float32 or minimum.dim() != 1 or minimum.shape != maximum.shape:
            raise self.fail(where, "its ranges are no two float32 vectors of one size")
        if not bool((minimum <= maximum).all()) or not bool((minimum.isfinite() & maximum.isfinite()).all()):
            raise self.fail(where, "its ranges are not finite, or a least value is above the largest")
        for counts in (histogram, *(() if rows is None else (rows,))):
            if counts.dtype != torch.int64 or tuple(counts.shape) != (BINS,) or bool((counts < 0).any()):
                raise self.fail(where, f"its histogram is no int64 [{BINS}] of counts")
            if bool(counts[FIRST_NOT_FINITE:].any()):
                raise self.fail(where, "its histogram counts NaN or Inf")
        if average is not None and not _is_average(average):
            raise self.fail(where, "its moving average is no float64 vector of two finite values and their weight")
        return Range(minimum, maximum, histogram, rows, average)

    def tensors(self) -> dict[str, Tensor]:
        import safetensors
        import safetensors.torch

        given = self.get(self.document, "tensors", dict, "tensors")
        file, digest = self.get(given, "file", str, "tensors"), self.get(given, "sha256", str, "tensors")
        if "/" in file or "\\" in file or file in ("", ".", ".."):
            raise self.fail("tensors", f"{file!r} is no name of a file beside it")
        beside = self.path.with_name(file)
        try:
            content = beside.read_bytes()
        except OSError as error:
            raise self.fail(
                "tensors", f"{beside} cannot be read: {error.strerror}; it belongs beside {self.path.name}"
            ) from error
        if hashlib.sha256(content).hexdigest() != digest:
            raise self.fail("tensors", f"{beside} is damaged, or belongs to another calibration")
        try:
            return safetensors.torch.load(content)
        except (safetensors.SafetensorError, ValueError, KeyError) as error:
            raise self.fail("tensors", f"{beside} holds no safetensors: {error}") from error

    def get(self, given: Mapping[str, Any], name: str, kind: type, where: str) -> Any:
        value = given.get(name)
        if type(value) is not kind:
            raise self.fail(where, f"{name!r} must be {_KINDS[kind]}, not {value!r}")
        return value

    @contextlib.contextmanager
    def located(self, where: str) -> Any:
        try:
            yield
        except CalibrationError as error:
            raise CalibrationError(f"{self.path}: {error}") from error


_KINDS = {str: "a string", int: "an integer", list: "a list", dict: "an object"}


def _is_average(given: Tensor) -> bool:
    if given.dtype != torch.float64 or tuple(given.shape) != (3,) or not bool(given.isfinite().all()):
        return False
    low, high, weight = given.tolist()
    return low <= high and 0.0 < weight <= 1.0
