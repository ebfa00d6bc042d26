"""A model on a few batches of real data: how far it gets from its own outputs with some layers quantized."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from fxopt.errors import CalibrationError
from fxopt.ir.layers import OPERANDS
from fxopt.precision import HIGH
from fxopt.quant.batches import Forward, call_model
from fxopt.quant.emulate import LayerCall, layer_by_layer, treated, with_table
from fxopt.quant.emulate_attention import AttentionCall, quantized_attention
from fxopt.quant.table import Calibration

Metric = Callable[[Any], float]


def floating_outputs(result: Any) -> list[Tensor]:
    """The tensors of a model's result whose error can be told."""
    leaves = torch.utils._pytree.tree_leaves(result)
    return [t for t in leaves if isinstance(t, Tensor) and t.is_floating_point() and t.numel()]


def attention_scales(table: Calibration, layer: str, precision: str) -> dict[str, float | Tensor]:
    """Of the operands of attention: one for all heads, or one for each."""
    found: dict[str, float | Tensor] = {}
    for operand in OPERANDS:
        own = table.head_scales(f"{layer}.{operand}", precision)
        found[operand] = table.scale(f"{layer}.{operand}", precision) if own is None else own
    return found


class Trial:
    """`model` in eager on `batches` (on its device): its outputs there are what errors are relative to."""

    def __init__(self, model: nn.Module, batches: Sequence[Any], calibration: Calibration, forward: Forward | None) -> None:
        self.model, self.batches, self.calibration = model, batches, calibration
        self.forward: Forward = forward or call_model
        self._names = frozenset(calibration.names())
        with torch.no_grad(), layer_by_layer():
            self._outputs = [floating_outputs(self.forward(model, batch)) for batch in batches]
        for number, outputs in enumerate(self._outputs):
            if not outputs:
                raise CalibrationError(f"batch {number}: the model returns no floating tensor whose error could be told")
            if not all(bool(t.isfinite().all()) for t in outputs):
                raise CalibrationError(f"batch {number}: the model's own outputs have NaN or Inf")

    def name_of(self, call: LayerCall) -> str | None:
        """The layer's name in the calibration. A module that several graphs call is one layer there."""
        return next((n for n in (call.name, call.name.partition("#")[0]) if n in self._names), None)

    def calls(self) -> list[dict[str, LayerCall]]:
        """For each batch, the layers of the calibration that it runs; of one that runs several times, with the most rows.

        Of what they were given only sizes and dtype are kept, on the meta device.
        """
        found: list[dict[str, LayerCall]] = []

        def note(call: LayerCall) -> None:
            name = self.name_of(call)
            if name is not None and (name not in found[-1] or found[-1][name].rows < call.rows):
                found[-1][name] = replace(call, x=torch.empty_like(call.x, device="meta"))

        for batch in self.batches:
            found.append({})
            with torch.no_grad(), treated(self.model, note):
                self.forward(self.model, batch)
        return found

    def attention_calls(self, batch: int) -> dict[str, AttentionCall]:
        """The attention of the calibration that a batch runs, on the meta device."""
        found: dict[str, AttentionCall] = {}

        def note(call: AttentionCall) -> None:
            if call.name in self._names:
                query, key, value = (torch.empty_like(x, device="meta") for x in (call.query, call.key, call.value))
                found.setdefault(call.name, replace(call, query=query, key=key, value=value, mask=None))

        with torch.no_grad(), treated(self.model, lambda call: None, note):
            self.forward(self.model, self.batches[batch])
        return found

    def quantized(self, call: LayerCall, precision: str) -> Tensor:
        """The result of a layer of the calibration in `precision`."""
        name = self.name_of(call)
        assert name is not None, "it is one of the calibration's layers"
        return with_table(call, precision, self.calibration, name)

    def emulating(self, decisions: Mapping[str, str]) -> AbstractContextManager[None]:
        """While this lasts, the model computes in eager what it will with these precisions of layers."""

        def treat(call: LayerCall) -> Tensor | None:
            name = self.name_of(call)
            precision = HIGH if name is None else decisions.get(name, HIGH)
            if name is None or precision == HIGH:
                return None
            return self.quantized(call, precision)

        def attend(call: AttentionCall) -> Tensor | None:
            precision = decisions.get(call.name, HIGH)
            if call.name not in self._names or precision == HIGH:
                return None
            return quantized_attention(call, attention_scales(self.calibration, call.name, precision))

        return treated(self.model, treat, attend)

    def error(self, run: Callable[..., Any], most: int | None = None) -> float:
        """The relative error of `run`'s outputs, on `most` batches or all: the norm of the difference over that of the
        outputs, of the output where it is largest. Inf where a value is not finite or an output is missing."""
        off: dict[int, float] = {}
        size: dict[int, float] = {}
        with torch.no_grad():
            for batch, exact in zip(self.batches[:most], self._outputs, strict=False):
                outputs = floating_outputs(self.forward(run, batch))
                if [t.shape for t in outputs] != [t.shape for t in exact]:
                    return math.inf
                for at, (a, b) in enumerate(zip(outputs, exact, strict=True)):
                    off[at] = off.get(at, 0.0) + float((a.double() - b.double()).square().sum())
                    size[at] = size.get(at, 0.0) + float(b.double().square().sum())
        return max(_ratio(off[at], size[at]) for at in off)

    def emulated_error(self, decisions: Mapping[str, str], most: int | None = None) -> float:
        with self.emulating(decisions):
            return self.error(self.model, most)


def _ratio(off: float, size: float) -> float:
    if off == 0.0:
        return 0.0
    return math.sqrt(off / size) if size > 0.0 and math.isfinite(off) else math.inf


class Loss:
    """What the budget is for: error that quantizing adds, or what it takes from the user's metric.

    Two ways to compute a model in bfloat16 differ by roundings that no precision can avoid. `floor` is the error of the
    compiled model that is not quantized; what is added are the squares beyond its own.
    """

    def __init__(self, trial: Trial, metric: Metric | None, floor: Callable[..., Any]) -> None:
        self._trial, self._metric = trial, metric
        self.floor = trial.error(floor)
        with layer_by_layer():
            self.reference = None if metric is None else self._value(trial.model)

    def of(self, run: Callable[..., Any]) -> float:
        if self.reference is not None:
            return self.reference - self._value(run)
        return self._added(self._trial.error(run))

    def emulated(self, decisions: Mapping[str, str]) -> float:
        if self.reference is not None:
            with self._trial.emulating(decisions):
                return self.reference - self._value(self._trial.model)
        return self._added(self._trial.emulated_error(decisions))

    def _added(self, error: float) -> float:
        return math.sqrt(max(0.0, error**2 - self.floor**2))

    def _value(self, run: Any) -> float:
        assert self._metric is not None
        with torch.no_grad():
            value = self._metric(run)
        try:
            number = float(value)
        except (TypeError, ValueError) as error:
            raise CalibrationError(f"metric returned a {type(value).__name__}, not a number") from error
        if math.isnan(number):
            raise CalibrationError("metric returned NaN")
        return number


def longest(batches: Iterable[Mapping[str, LayerCall]]) -> int:
    """Which batch has the most rows in all layers."""
    rows = [sum(call.rows for call in calls.values()) for calls in batches]
    return max(range(len(rows)), key=rows.__getitem__)
