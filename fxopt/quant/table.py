"""A calibration: what the layers of a model were given, and the scales that follow; as a value, and as two files.

    bert.fxcal                     JSON: layers in the order of the graph, counts, versions; to be read and edited
    bert.fxcal.3f2a91c0.tensors    safetensors: ranges of channels and histograms; its hash is in the JSON and in its name

A user may set `method`, and for each layer `precision`, `scale` and `symmetric`; they hold when the file is read again.
Nothing in the files is trusted: a field that is missing, ill-typed or contradicts another is a CalibrationError that names
it. Each file is written aside and renamed, the JSON last, so that a reader finds the old calibration or the new one.
"""

from __future__ import annotations

import functools
import hashlib
import json
import math
import os
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fxopt.errors import CalibrationError
from fxopt.ir.layers import LINEAR, attention_of
from fxopt.options import suggestion
from fxopt.precision import PRECISIONS, KnownLayer, Refinement, group_of
from fxopt.quant import ranges
from fxopt.quant.observers import Found, Range
from fxopt.quant.table_files import tensor_file_of, write_atomically

FORMAT = 1

NEVER = "calibration gave it no data"
ZERO = "calibration gave it only zeros"
AMBIGUOUS = "several layers of different shapes have its name"

_LEAST_SCALE = torch.finfo(torch.float32).tiny
DTYPES = ("float16", "bfloat16", "float32")
PARTS = ("minimum", "maximum", "histogram")
MORE_PARTS = ("rows", "average")
"""Of ranges, where they were observed."""

CHANNELS = "channels"
FITTED = ("limits", "correction")
"""Of refinements, where they were made."""

GAINS = "gains"

DOCUMENT_FIELDS = ("format", "made by", "batches", "method", "graph", "layers", "tensors")
LAYER_FIELDS = tuple("name kind shape dtype precision scale symmetric refined after amax elements".split())
"""Of the JSON."""

ROWS, AVERAGE = "rows", "average"
METHODS = (*ranges.METHODS, ROWS, AVERAGE)
"""How ranges become scales. The last two need observers of their own: the first looks at the largest magnitudes of rows, of
which a hundredth is clipped, the second at moving averages of the least and the largest value."""

_ROWS_WITHIN = 99.0
"""Of all rows, in %: those that ROWS does not clip."""

_HEADS_APART = 64.0
"""Largest magnitudes of heads so far apart need scales of their own: with one for all, a hundredth of the smaller one's
largest would be no normal number of float8."""

_WORTH_A_ZERO_POINT = 0.8
"""Steps of int8 that are this much smaller with a zero point are worth the sum that it costs."""


@dataclass(frozen=True, eq=False)
class LayerRange:
    """A layer: `shape` of its weight (() where several differ), `dtype` of what it is given, and what was seen of that.

    `precision` and `scale` are the user's: they go before what options and ranges say; so does `symmetric`, which says
    whether zero is the middle of int8's range (None: as the range suggests). `channels`, float32 [K] on the CPU, are powers
    of two by which what a linear layer is given is divided, and its weight multiplied, before both are quantized.
    `refined` was fitted to the layer as it is then. `after` is the layer whose result it is given, through nothing but what
    scales as that does, such as relu (None: none, or several); its output channels were multiplied by `gains`, float32, on
    the CPU (None: one).
    """

    name: str
    kind: str
    shape: tuple[int, ...]
    dtype: str
    seen: Range | None
    precision: str | None = None
    scale: float | None = None
    channels: Tensor | None = None
    symmetric: bool | None = None
    refined: Refinement | None = None
    after: str | None = None
    gains: Tensor | None = None

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
        """The names of all layers, in order: what options={"precision": {...}} speaks of. Attention has one name, although
        the table has three entries of it."""
        return list(dict.fromkeys(attention_of(x.name) or x.name for x in self.layers))

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

    def group_scales(self, layer: str, precision: str) -> Tensor:
        """What each group of neighbours along the inner dimension is multiplied by, in a precision that has groups: from the
        largest magnitudes of its channels, which the layer's own scale limits. Float32 [K / group]. Raises CalibrationError
        as `scale` does."""
        given, found = PRECISIONS[precision], self[layer]
        whole = torch.tensor(self.scale(layer, precision))
        if found.scale is not None:
            return whole.expand(found.shape[1] // (group_of(found.shape[1]) or 1)).clone()
        largest = found.channel_amax() if found.channels is None else found.channel_amax() / found.channels
        own = largest.view(-1, group_of(found.shape[1]) or 1).amax(1) / given.largest
        return torch.minimum(own, whole).clamp_min(_LEAST_SCALE)

    def head_scales(self, operand: str, precision: str) -> Tensor | None:
        """Of each head of an operand of attention, if their ranges are far apart: float32 [heads], which the operand's own
        scale limits; None where that does for all. Raises CalibrationError as `scale` does."""
        whole, found = torch.tensor(self.scale(operand, precision)), self[operand]
        largest = found.channel_amax()
        used = largest[largest > 0]
        if found.scale is not None or not used.numel() or float(used.max()) < _HEADS_APART * float(used.min()):
            return None
        own = torch.minimum(largest / PRECISIONS[precision].largest, whole).clamp_min(_LEAST_SCALE)
        return torch.where(largest > 0, own, whole)

    def zero_point(self, layer: str, precision: str) -> int:
        """0 where zero is the middle of the range: always but for integers whose range lies mostly on one side."""
        low, high = self._span(self[layer], precision)
        if low == -high:
            return 0
        return max(-128, min(127, round(-128.0 - low / self.scale(layer, precision))))

    def channels(self, layer: str) -> Tensor | None:
        found = self._by_name.get(layer)
        return None if found is None else found.channels

    def refinement(self, layer: str, precision: str) -> Refinement | None:
        found = self._by_name.get(layer)
        refined = None if found is None else found.refined
        return refined if refined is not None and refined.precision == precision else None

    def digest(self) -> str:
        """Of everything that a compilation reads."""
        return self._digest

    # ------------------------------------------------------------------ what users do

    def __getitem__(self, layer: str) -> LayerRange:
        """Raises CalibrationError for a layer that is not there."""
        if layer not in self._by_name:
            raise CalibrationError(f"the calibration has no layer {layer!r}{suggestion(layer, self.names())}")
        return self._by_name[layer]

    def with_layer(
        self, layer: str, *, precision: str | None = None, scale: float | None = None, symmetric: bool | None = None
    ) -> Calibration:
        """A calibration in which the user's `precision`, `scale` and `symmetric` of one layer are these (None: none).

        What was fitted to another scale is dropped.
        """
        before = self[layer]
        changed = replace(before, precision=precision, scale=scale, symmetric=symmetric)
        if (before.scale, before.symmetric) != (scale, symmetric):
            changed = replace(changed, refined=None)
        check_edits(precision, scale, symmetric, f"layer {layer!r}")
        return replace(self, layers=tuple(changed if x.name == layer else x for x in self.layers))

    def with_method(self, method: str) -> Calibration:
        """A calibration whose ranges become scales in another way; what was fitted to the scales is dropped. Raises
        CalibrationError for a method that is unknown, or needs what was not observed."""
        check_method(method, self.layers)
        layers = self.layers if method == self.method else tuple(replace(x, refined=None) for x in self.layers)
        return replace(self, method=method, layers=layers)

    @classmethod
    def merge(cls, first: Calibration, *others: Calibration) -> Calibration:
        """The calibration over the data of all, as if it had been made in one pass. What users have set must not differ;
        what was fitted to the data of one is dropped.

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
        before = tensor_file_of(path)
        write_atomically(path.with_name(file), content)
        document = self._document() | {"tensors": {"file": file, "sha256": digest}}
        write_atomically(path, (json.dumps(document, indent=1) + "\n").encode())
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
        from fxopt.quant.table_reader import Reader

        return Reader(path, document).calibration()

    def __str__(self) -> str:
        lines = [self._summary()]
        for layer in self.layers:
            text = f"{layer.name or '(the model itself)'}  {' x '.join(map(str, layer.shape))}  |x| <= {layer.amax:.4g}"
            edits = [f"precision {layer.precision}"] if layer.precision else []
            edits += [f"scale {layer.scale:.4g}"] if layer.scale else []
            lines.append("  ".join([text, *edits, *([layer.obstacle] if layer.obstacle else [])]))
        return "\n".join(lines)

    def __repr__(self) -> str:
        return f"<Calibration of {self._summary()}, {self.digest()[:16]}>"

    # ------------------------------------------------------------------ inside

    def _summary(self) -> str:
        layers = f"{len(self.layers)} layer{'s' * (len(self.layers) != 1)}"
        batches = f"{self.batches} batch{'es' * (self.batches != 1)}"
        return f"{layers}, {batches}, method {self.method}"

    @functools.cached_property
    def _by_name(self) -> dict[str, LayerRange]:
        return {layer.name: layer for layer in self.layers}

    @functools.cached_property
    def _scales(self) -> dict[tuple[str, str], float]:
        return {}

    @functools.cached_property
    def _spans(self) -> dict[tuple[str, str], tuple[float, float]]:
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
        low, high = self._span(layer, precision)
        steps = 2.0 * PRECISIONS[precision].largest if low == -high else 255.0
        return max((high - low) / steps, _LEAST_SCALE)

    def _span(self, layer: LayerRange, precision: str) -> tuple[float, float]:
        """The least and the largest value that are not clipped; one is the other's negative if zero is in the middle."""
        key = layer.name, precision
        if key not in self._spans:
            self._spans[key] = self._found_span(layer, precision)
        return self._spans[key]

    def _found_span(self, layer: LayerRange, precision: str) -> tuple[float, float]:
        given = PRECISIONS[precision]
        if layer.scale is not None:
            return -layer.scale * given.largest, layer.scale * given.largest
        if layer.obstacle is not None or layer.seen is None:
            raise CalibrationError(f"layer {layer.name!r} has no scale: {layer.obstacle}")
        if not given.is_static or given.activations is None:
            raise CalibrationError(f"{precision!r} takes no scale from a calibration: layer {layer.name!r} has none for it")
        if layer.channels is not None:  # histograms and averages are those of other values
            low = float((layer.seen.minimum / layer.channels).min())
            high = float((layer.seen.maximum / layer.channels).max())
        else:
            low, high = _bounds(layer, layer.seen, self.method, ranges.GRIDS[given.activations])
        low, high = min(low, 0.0), max(high, 0.0)
        limit = max(-low, high)
        if given.activations != "int8" or layer.kind != LINEAR or layer.symmetric or given.group:
            return -limit, limit
        saved = (high - low) / 255.0 <= _WORTH_A_ZERO_POINT * limit / given.largest
        return (low, high) if saved or layer.symmetric is False else (-limit, limit)

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
            for part in (*PARTS, *MORE_PARTS)
            if getattr(layer.seen, part) is not None
        }
        fitted = {
            f"{layer.name}.{part}": getattr(layer.refined, part).clone()
            for layer in self.layers
            for part in FITTED
            if getattr(layer.refined, part, None) is not None
        }
        vectors = {
            f"{layer.name}.{part}": getattr(layer, part).clone()
            for layer in self.layers
            for part in (CHANNELS, GAINS)
            if getattr(layer, part) is not None
        }
        return seen | fitted | vectors

    def _joined(self, other: Calibration) -> Calibration:
        if self.method != other.method:
            raise CalibrationError(f"merging calibrations of different methods: {self.method!r} and {other.method!r}")
        for name in [layer.name for layer in (*self.layers, *other.layers)]:
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
        "symmetric": layer.symmetric,
        "refined": None if layer.refined is None else layer.refined.precision,
        "after": layer.after,
        "amax": layer.amax,
        "elements": layer.elements,
    }


def _joined_layer(a: LayerRange, b: LayerRange) -> LayerRange:
    if (a.kind, a.shape, a.dtype) != (b.kind, b.shape, b.dtype):
        raise CalibrationError(
            f"merging calibrations of different models: layer {a.name!r} is {a.kind} {list(a.shape)} of {a.dtype} and"
            f" {b.kind} {list(b.shape)} of {b.dtype}"
        )
    for what in ("precision", "scale", "symmetric"):
        mine, theirs = getattr(a, what), getattr(b, what)
        if mine is not None and theirs is not None and mine != theirs:
            raise CalibrationError(f"merging calibrations: the {what} of layer {a.name!r} is set to {mine!r} and {theirs!r}")
    if a.channels is not None and b.channels is not None and not torch.equal(a.channels, b.channels):
        raise CalibrationError(f"merging calibrations: the channels of layer {a.name!r} are scaled in different ways")
    seen = b.seen if a.seen is None else a.seen if b.seen is None else a.seen.joined(b.seen)
    channels = b.channels if a.channels is None else a.channels
    symmetric = b.symmetric if a.symmetric is None else a.symmetric
    one_maker = a.after == b.after and _same(a.gains, b.gains)
    return replace(
        a if one_maker else replace(a, after=None, gains=None),
        seen=seen,
        precision=a.precision or b.precision,
        scale=a.scale or b.scale,
        channels=channels,
        symmetric=symmetric,
        refined=None,
    )


def _same(a: Tensor | None, b: Tensor | None) -> bool:
    return a is b or (a is not None and b is not None and torch.equal(a, b))


def _bounds(layer: LayerRange, seen: Range, method: str, grid: ranges.Grid) -> tuple[float, float]:
    """The least and the largest value that `method` lets a layer's quantized input reach."""
    if method == AVERAGE:
        assert seen.average is not None, "methods are checked"
        low, high, weight = seen.average.tolist()
        return low / weight, high / weight
    if method == ROWS:
        assert seen.rows is not None, "methods are checked"
        limit = ranges.clipping_limit(seen.rows, layer.amax, "percentile", grid, _ROWS_WITHIN)
    else:
        limit = ranges.clipping_limit(seen.histogram, layer.amax, method, grid)
    return max(float(seen.minimum.min()), -limit), min(float(seen.maximum.max()), limit)


def check_edits(precision: Any, scale: Any, symmetric: Any, where: str) -> None:
    """Raises CalibrationError for values that a user cannot have set for the layer that `where` names."""
    if precision is not None and (not isinstance(precision, str) or precision not in PRECISIONS):
        raise CalibrationError(
            f"{where}: there is no precision {precision!r}{suggestion(precision, PRECISIONS)}; "
            f"there are {', '.join(PRECISIONS)}"
        )
    number = isinstance(scale, (int, float)) and not isinstance(scale, bool)
    if scale is not None and not (number and math.isfinite(scale) and scale >= _LEAST_SCALE):
        raise CalibrationError(f"{where}: a scale is a finite number of at least {_LEAST_SCALE:.3g}, not {scale!r}")
    if symmetric not in (None, True, False):
        raise CalibrationError(f"{where}: symmetric is true, false or null, not {symmetric!r}")


def check_method(method: str, layers: Iterable[LayerRange] = ()) -> None:
    """Raises CalibrationError for a method that does not exist, or needs what was not observed of `layers`."""
    if method not in METHODS:
        raise CalibrationError(f"there is no method {method!r}{suggestion(method, METHODS)}; there are {', '.join(METHODS)}")
    if method not in (ROWS, AVERAGE):
        return
    for layer in layers:
        if layer.seen is not None and getattr(layer.seen, method) is None:
            raise CalibrationError(
                f"method {method!r}: layer {layer.name!r} was calibrated without it; that needs"
                f" fxopt.calibrate(..., observe=({method!r},))"
            )


def joined_layers(found: Iterable[Found]) -> tuple[LayerRange, ...]:
    """Layers by name, in the order in which they come first: a module that several graphs call is one layer.

    Where they are different layers that share a name, that one has no shape and no range, and stays high.
    """
    layers: dict[str, LayerRange] = {}
    for each in found:
        dtype, maker = str(each.dtype).removeprefix("torch."), each.producer
        layer = LayerRange(each.name, each.kind, each.shape, dtype, each.seen)
        if maker is not None:
            layer = replace(layer, after=maker.layer, gains=maker.gains)
        before = layers.setdefault(each.name, layer)
        if before is layer:
            continue
        if (before.kind, before.shape, before.dtype) != (layer.kind, layer.shape, layer.dtype):
            layers[each.name] = replace(before, shape=(), seen=None, after=None, gains=None)
        else:
            layers[each.name] = _joined_layer(before, layer)
    return tuple(layers.values())
