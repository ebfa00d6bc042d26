"""A calibration: what the layers of a model were given, and the scales that follow; as a value, and as two files.

    bert.fxcal                     JSON: layers in the order of the graph, counts, versions; to be read and edited
    bert.fxcal.3f2a91c0.tensors    safetensors: ranges of channels and histograms; its hash is in the JSON and in its name

A user may set `method`, and for each layer `precision` and `scale`; they hold when the file is read again. Nothing in the
files is trusted: a field that is missing, ill-typed or contradicts another is a CalibrationError that names it. Each file is
written aside and renamed, the JSON last, so that a reader finds the old calibration or the new one.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import json
import math
import os
import re
import tempfile
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fxopt.errors import CalibrationError
from fxopt.ir.layers import CONVOLUTION, LINEAR
from fxopt.ir.observer_ops import BINS, FIRST_NOT_FINITE
from fxopt.options import suggestion
from fxopt.precision import PRECISIONS, KnownLayer
from fxopt.quant import ranges
from fxopt.quant.observers import Range

FORMAT = 1

NEVER = "calibration gave it no data"
ZERO = "calibration gave it only zeros"
AMBIGUOUS = "several layers of different shapes have its name"

_LEAST_SCALE = torch.finfo(torch.float32).tiny
_DTYPES = ("float16", "bfloat16", "float32")
_PARTS = ("minimum", "maximum", "histogram")
_CHANNELS = "channels"


@dataclass(frozen=True, eq=False)
class LayerRange:
    """A layer: `shape` of its weight (() where several differ), `dtype` of what it is given, and what was seen of that.

    `precision` and `scale` are the user's: they go before what options and ranges say. `channels`, float32 [K] on the CPU,
    are powers of two by which what a linear layer is given is divided, and its weight multiplied, before both are quantized.
    """

    name: str
    kind: str
    shape: tuple[int, ...]
    dtype: str
    seen: Range | None
    precision: str | None = None
    scale: float | None = None
    channels: Tensor | None = None

    @functools.cached_property
    def amax(self) -> float:
        """The largest magnitude, 0 where nothing was seen."""
        if self.seen is None or not self.seen.minimum.numel():
            return 0.0
        return max(abs(float(self.seen.minimum.min())), abs(float(self.seen.maximum.max())))

    @property
    def elements(self) -> int:
        """Values that were counted."""
        return 0 if self.seen is None else int(self.seen.histogram.sum())

    @property
    def obstacle(self) -> str | None:
        """Why it has to stay high."""
        if not self.shape:
            return AMBIGUOUS
        if not self.elements:
            return NEVER
        return ZERO if self.amax == 0 else None

    def channel_amax(self) -> Tensor:
        """The largest magnitude of each channel: float32 [K] of a linear layer, [C_in] of a convolution."""
        if self.seen is None:
            return torch.zeros(0)
        return torch.maximum(self.seen.minimum.abs(), self.seen.maximum.abs())


@dataclass(frozen=True, eq=False)
class Calibration:
    """The layers of a model in the order of its graphs, from `batches` batches; `method` says how ranges become scales (see
    `ranges.clipping_limit`). Immutable; `versions` are those of the programs that made it.
    """

    layers: tuple[LayerRange, ...]
    batches: int
    method: str = "amax"
    versions: Mapping[str, str] = field(default_factory=dict)

    # ------------------------------------------------------------------ what compilation asks

    def names(self) -> list[str]:
        """The names of all layers, in order: what options={"precision": {...}} speaks of."""
        return [layer.name for layer in self.layers]

    def known(self, layer: str) -> KnownLayer | None:
        found = self._by_name.get(layer)
        return None if found is None else KnownLayer(found.kind, found.shape, found.precision, found.obstacle)

    def scale(self, layer: str, precision: str) -> float:
        """What a quantized activation of `layer` is multiplied by. Raises CalibrationError for a layer without a range and
        for a precision that takes none."""
        key = layer, precision
        if key not in self._scales:
            self._scales[key] = self._scale(self[layer], precision)
        return self._scales[key]

    def channels(self, layer: str) -> Tensor | None:
        found = self._by_name.get(layer)
        return None if found is None else found.channels

    def digest(self) -> str:
        """Of everything that a compilation reads."""
        return self._digest

    # ------------------------------------------------------------------ what users do

    def __getitem__(self, layer: str) -> LayerRange:
        """Raises CalibrationError for a layer that is not there."""
        if layer not in self._by_name:
            raise CalibrationError(f"the calibration has no layer {layer!r}{suggestion(layer, self.names())}")
        return self._by_name[layer]

    def with_layer(self, layer: str, *, precision: str | None = None, scale: float | None = None) -> Calibration:
        """A calibration in which the user's `precision` and `scale` of one layer are these (None: none)."""
        changed = replace(self[layer], precision=precision, scale=scale)
        _check_edits(changed.precision, changed.scale, f"layer {layer!r}")
        return replace(self, layers=tuple(changed if x.name == layer else x for x in self.layers))

    def with_method(self, method: str) -> Calibration:
        """A calibration whose ranges become scales in another way. Raises CalibrationError for an unknown method."""
        check_method(method)
        return replace(self, method=method)

    @classmethod
    def merge(cls, first: Calibration, *others: Calibration) -> Calibration:
        """The calibration over the data of all, as if it had been made in one pass. What users have set must not differ.

        Raises CalibrationError naming the first layer that is not in all of them, or another one.
        """
        merged = first
        for other in others:
            merged = merged._joined(other)
        return merged

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write both files. Raises OSError where that is not possible."""
        import safetensors.torch

        path = Path(path)
        content = safetensors.torch.save(self._tensors())
        digest = hashlib.sha256(content).hexdigest()
        file = f"{path.name}.{digest[:8]}.tensors"
        before = _tensor_file_of(path)
        _write(path.with_name(file), content)
        document = self._document() | {"tensors": {"file": file, "sha256": digest}}
        _write(path, (json.dumps(document, indent=1) + "\n").encode())
        if before is not None and before != file:
            path.with_name(before).unlink(missing_ok=True)

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> Calibration:
        """What `save` wrote. Raises CalibrationError for files that are missing, damaged or edited into nonsense."""
        path = Path(path)
        try:
            document = json.loads(path.read_text("utf-8"))
        except OSError as error:
            raise CalibrationError(f"{path}: cannot be read: {error.strerror}") from error
        except ValueError as error:
            raise CalibrationError(f"{path}: no JSON: {error}") from error
        return _Reader(path, document).calibration()

    def __str__(self) -> str:
        lines = [f"{len(self.layers)} layers, {self.batches} batches, method {self.method}"]
        for layer in self.layers:
            text = f"{layer.name or '(the model itself)'}  {' x '.join(map(str, layer.shape))}  |x| <= {layer.amax:.4g}"
            edits = [f"precision {layer.precision}"] if layer.precision else []
            edits += [f"scale {layer.scale:.4g}"] if layer.scale else []
            lines.append("  ".join([text, *edits, *([layer.obstacle] if layer.obstacle else [])]))
        return "\n".join(lines)

    # ------------------------------------------------------------------ inside

    @functools.cached_property
    def _by_name(self) -> dict[str, LayerRange]:
        return {layer.name: layer for layer in self.layers}

    @functools.cached_property
    def _scales(self) -> dict[tuple[str, str], float]:
        return {}

    @functools.cached_property
    def _digest(self) -> str:
        digest = hashlib.sha256(json.dumps(self._document(), sort_keys=True).encode())
        for name, value in sorted(self._tensors().items()):
            digest.update(name.encode() + value.numpy().tobytes())
        return digest.hexdigest()

    def _scale(self, layer: LayerRange, precision: str) -> float:
        if layer.scale is not None:
            return layer.scale
        given = PRECISIONS[precision]
        if layer.obstacle is not None or layer.seen is None:
            raise CalibrationError(f"layer {layer.name!r} has no scale: {layer.obstacle}")
        if not given.is_static or given.activations is None:
            raise CalibrationError(f"{precision!r} takes no scale from a calibration: layer {layer.name!r} has none for it")
        if layer.channels is None:
            limit = ranges.clipping_limit(layer.seen.histogram, layer.amax, self.method, ranges.GRIDS[given.activations])
        else:  # the histogram is that of other values
            limit = float((layer.channel_amax() / layer.channels).max())
        return max(limit / given.largest, _LEAST_SCALE)

    def _document(self) -> dict[str, Any]:
        return {
            "format": FORMAT,
            "made by": dict(self.versions),
            "batches": self.batches,
            "method": self.method,
            "graph": graph_digest(self.layers),
            "layers": [_layer_document(layer) for layer in self.layers],
        }

    def _tensors(self) -> dict[str, Tensor]:
        """Contiguous, on the CPU, sharing no memory, as safetensors needs them."""
        seen = {
            f"{layer.name}.{part}": getattr(layer.seen, part).clone()
            for layer in self.layers
            if layer.seen is not None
            for part in _PARTS
        }
        return seen | {f"{x.name}.{_CHANNELS}": x.channels.clone() for x in self.layers if x.channels is not None}

    def _joined(self, other: Calibration) -> Calibration:
        if self.method != other.method:
            raise CalibrationError(f"merging calibrations of different methods: {self.method!r} and {other.method!r}")
        for name in [*self.names(), *other.names()]:
            if name not in self._by_name or name not in other._by_name:
                raise CalibrationError(f"merging calibrations of different models: only one of them has a layer {name!r}")
        joined = tuple(_joined_layer(layer, other._by_name[layer.name]) for layer in self.layers)
        return replace(self, layers=joined, batches=self.batches + other.batches)


def graph_digest(layers: Iterable[LayerRange]) -> str:
    """Of the names, kinds and shapes of layers, in order."""
    text = json.dumps([[layer.name, layer.kind, list(layer.shape)] for layer in layers])
    return hashlib.sha256(text.encode()).hexdigest()


def _layer_document(layer: LayerRange) -> dict[str, Any]:
    return {
        "name": layer.name,
        "kind": layer.kind,
        "shape": list(layer.shape),
        "dtype": layer.dtype,
        "precision": layer.precision,
        "scale": layer.scale,
        "amax": layer.amax,
        "elements": layer.elements,
    }


def _joined_layer(a: LayerRange, b: LayerRange) -> LayerRange:
    if (a.kind, a.shape, a.dtype) != (b.kind, b.shape, b.dtype):
        raise CalibrationError(
            f"merging calibrations of different models: layer {a.name!r} is {a.kind} {list(a.shape)} of {a.dtype} and"
            f" {b.kind} {list(b.shape)} of {b.dtype}"
        )
    for what, mine, theirs in (("precision", a.precision, b.precision), ("scale", a.scale, b.scale)):
        if mine is not None and theirs is not None and mine != theirs:
            raise CalibrationError(f"merging calibrations: the {what} of layer {a.name!r} is set to {mine!r} and {theirs!r}")
    if a.channels is not None and b.channels is not None and not torch.equal(a.channels, b.channels):
        raise CalibrationError(f"merging calibrations: the channels of layer {a.name!r} are scaled in different ways")
    seen = b.seen if a.seen is None else a.seen if b.seen is None else a.seen.joined(b.seen)
    channels = b.channels if a.channels is None else a.channels
    return replace(a, seen=seen, precision=a.precision or b.precision, scale=a.scale or b.scale, channels=channels)


# ---------------------------------------------------------------------- files


def _write(path: Path, content: bytes) -> None:
    handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        os.chmod(name, 0o666 & ~_umask())
        os.replace(name, path)
    except BaseException:
        with contextlib.suppress(OSError):
            os.unlink(name)
        raise


def _umask() -> int:
    mask = os.umask(0o077)
    os.umask(mask)
    return mask


def _tensor_file_of(path: Path) -> str | None:
    """The name of the tensors' file that the calibration at `path` has so far."""
    try:
        document = json.loads(path.read_text("utf-8"))
    except (OSError, ValueError):
        return None
    tensors = document.get("tensors") if isinstance(document, dict) else None
    file = tensors.get("file") if isinstance(tensors, dict) else None
    return file if isinstance(file, str) and _is_tensor_file(file, path) else None


def _is_tensor_file(file: str, path: Path) -> bool:
    return re.fullmatch(re.escape(path.name) + r"\.[0-9a-f]{8}\.tensors", file) is not None


class _Reader:
    """Reads one document, field by field."""

    def __init__(self, path: Path, document: Any) -> None:
        self.path, self.document = path, document

    def fail(self, where: str, problem: str) -> CalibrationError:
        return CalibrationError(f"{self.path}: {where}: {problem}")

    def calibration(self) -> Calibration:
        if not isinstance(self.document, dict):
            raise self.fail("the document", "it is no object")
        if self.get(self.document, "format", int, "format") != FORMAT:
            raise self.fail("format", f"it is {self.document['format']}, this version of fxopt reads {FORMAT}")
        listed = self.get(self.document, "layers", list, "layers")
        described = [self.layer(given, index) for index, given in enumerate(listed)]
        if len({layer.name for layer in described}) != len(described):
            raise self.fail("layers", "two have one name")
        if self.get(self.document, "graph", str, "graph") != graph_digest(described):
            raise self.fail(
                "graph", "it is not the digest of the layers' names, kinds and shapes, which are not to be edited"
            )
        tensors = self.tensors()
        layers = tuple(self.with_range(*pair, tensors) for pair in zip(described, listed, strict=True))
        if tensors:
            raise self.fail("tensors", f"{min(tensors)!r} belongs to no layer")
        method = self.get(self.document, "method", str, "method")
        with self.located("method"):
            check_method(method)
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
        kind = self.get(given, "kind", str, where)
        if kind not in (LINEAR, CONVOLUTION):
            raise self.fail(where, f"its kind is {kind!r}, not {LINEAR!r} or {CONVOLUTION!r}")
        shape = self.get(given, "shape", list, where)
        if not all(type(size) is int and size > 0 for size in shape):
            raise self.fail(where, f"its shape is {shape}")
        dtype = self.get(given, "dtype", str, where)
        if dtype not in _DTYPES:
            raise self.fail(where, f"its dtype is {dtype!r}")
        precision, scale = given.get("precision"), given.get("scale")
        with self.located(where):
            _check_edits(precision, scale, where)
        return LayerRange(name, kind, tuple(shape), dtype, None, precision, scale)

    def with_range(self, described: LayerRange, given: Mapping[str, Any], tensors: dict[str, Tensor]) -> LayerRange:
        where = f"layer {described.name!r}"
        channels = self.channels(where, described, tensors)
        layer = replace(described, seen=self.range(where, described.name, tensors), channels=channels)
        for what, value in (("amax", layer.amax), ("elements", layer.elements)):
            if given.get(what) != value:
                raise self.fail(
                    where, f"its {what} is {given.get(what)!r}, but {value!r} in the tensors; to clip, set scale"
                )
        return layer

    def channels(self, where: str, layer: LayerRange, tensors: dict[str, Tensor]) -> Tensor | None:
        """Takes the layer's own out of `tensors`."""
        found = tensors.pop(f"{layer.name}.{_CHANNELS}", None)
        if found is None:
            return None
        if layer.kind != LINEAR or found.dtype != torch.float32 or tuple(found.shape) != layer.shape[1:]:
            raise self.fail(where, "its channels are no float32 vector for the columns of a linear layer's weight")
        if not bool((found.isfinite() & (found > 0)).all()) or bool((found.frexp().mantissa != 0.5).any()):
            raise self.fail(where, "its channels are not scaled by powers of two")
        return found

    def range(self, where: str, name: str, tensors: dict[str, Tensor]) -> Range | None:
        """Takes the layer's own out of `tensors`."""
        parts = [tensors.pop(f"{name}.{part}", None) for part in _PARTS]
        if all(part is None for part in parts):
            return None
        minimum, maximum, histogram = parts
        if minimum is None or maximum is None or histogram is None:
            raise self.fail(where, "some of its tensors are missing")
        if not minimum.dtype == maximum.dtype == torch.float32 or minimum.dim() != 1 or minimum.shape != maximum.shape:
            raise self.fail(where, "its ranges are no two float32 vectors of one size")
        if not bool((minimum <= maximum).all()) or not bool((minimum.isfinite() & maximum.isfinite()).all()):
            raise self.fail(where, "its ranges are not finite, or a least value is above the largest")
        if histogram.dtype != torch.int64 or tuple(histogram.shape) != (BINS,) or bool((histogram < 0).any()):
            raise self.fail(where, f"its histogram is no int64 [{BINS}] of counts")
        if bool(histogram[FIRST_NOT_FINITE:].any()):
            raise self.fail(where, "its histogram counts NaN or Inf")
        return Range(minimum, maximum, histogram)

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
            raise self.fail("tensors", f"{beside} cannot be read: {error.strerror}; it belongs beside") from error
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


def _check_edits(precision: Any, scale: Any, where: str) -> None:
    if precision is not None and (not isinstance(precision, str) or precision not in PRECISIONS):
        raise CalibrationError(
            f"{where}: there is no precision {precision!r}{suggestion(precision, PRECISIONS)}: {', '.join(PRECISIONS)}"
        )
    number = isinstance(scale, (int, float)) and not isinstance(scale, bool)
    if scale is not None and not (number and math.isfinite(scale) and scale >= _LEAST_SCALE):
        raise CalibrationError(f"{where}: a scale is a finite number of at least {_LEAST_SCALE:.3g}, not {scale!r}")


def check_method(method: str) -> None:
    """Raises CalibrationError for a method that does not exist."""
    if method not in ranges.METHODS:
        raise CalibrationError(
            f"there is no method {method!r}{suggestion(method, ranges.METHODS)}: {', '.join(ranges.METHODS)}"
        )


def joined_layers(found: Sequence[tuple[str, str, tuple[int, ...], torch.dtype, Range | None]]) -> tuple[LayerRange, ...]:
    """Layers by name, in the order in which they come first: a module that several graphs call is one layer.

    Where they are different layers that share a name, that one has no shape and no range, and stays high.
    """
    layers: dict[str, LayerRange] = {}
    for name, kind, shape, dtype, seen in found:
        layer = LayerRange(name, kind, shape, str(dtype).removeprefix("torch."), seen)
        before = layers.setdefault(name, layer)
        if before is layer:
            continue
        if (before.kind, before.shape, before.dtype) != (kind, shape, layer.dtype):
            layers[name] = replace(before, shape=(), seen=None)
        else:
            layers[name] = _joined_layer(before, layer)
    return tuple(layers.values())
