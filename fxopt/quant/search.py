"""`fxopt.quantize(model, loader, budget)`: a precision for each layer, from measured errors and measured times.

1. Each shape of layer is compiled in each precision and timed on this device (savings.py).
2. Each layer that gets faster is quantized alone in eager (emulate.py) on real batches: the model's error that follows is
   the layer's. Where there are many, gradients estimate it first (gradients.py), and those that come first are tried.
3. Layers are put in order, most time for their error first (choice.py). How many of them the budget allows is found by
   bisection, with all of them quantized at once in eager.
4. That is compiled, its error or metric measured on real batches, and layers are taken back until the budget holds.
5. It is timed beside the compiled model that is not quantized. If that is as fast, half as many layers are tried, those that
   save most for their error: times of single layers are not those of layers in a model. The last of them is none.

Steps 1 and 2 are the same for every budget: a `Search` does them once, and decides for as many budgets as it is asked.

Errors are deterministic, times are not: two searches may differ in layers that save about as much.
"""

from __future__ import annotations

import itertools
import math
import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import nn

from fxopt.errors import OptionError
from fxopt.ir.layers import ATTENTION, LINEAR, OPERANDS, attention_of
from fxopt.options import suggestion
from fxopt.precision import HIGH, PRECISIONS, Decisions
from fxopt.quant import savings
from fxopt.quant.arguments import given_module
from fxopt.quant.awq import activation_aware
from fxopt.quant.batches import Forward, compiled_apart, first_batches, on_device, shown
from fxopt.quant.calibrate import calibrate
from fxopt.quant.choice import Offer, decisions, in_order
from fxopt.quant.emulate import LayerCall, obstacle
from fxopt.quant.emulate_attention import AttentionCall, unfit
from fxopt.quant.gradients import estimated_errors
from fxopt.quant.report import LayerReport, Report
from fxopt.quant.savings import NOISE, AttentionShape, ConvolutionShape, LayerShape
from fxopt.quant.smooth import groups
from fxopt.quant.table import Calibration
from fxopt.quant.trial import Loss, Metric, Trial, longest
from fxopt.report.measure import interleaved

PROBES = 2
"""Batches on which each layer alone is tried; decisions are tried on all."""

MOST_TRIED = 128
"""Layers and precisions that are tried one by one if no other number is given; of more, gradients tell which come first."""

MOST_COMPILATIONS = 4
"""Of the quantized model, each with fewer layers than the one before."""

NOISE_OF_MODEL = 0.01
"""Of a call's time: less than that is no gain."""

PATIENCE = 4.0
"""How many times as long whole models are timed at most, while other jobs of the machine disturb them: what looks faster by
chance would be slower later, and what looks slower would be refused."""

BEYOND = "beyond the budget"

BACK_OFF = 0.9
"""How much of the budget is aimed at after a compiled model was over it."""


@dataclass(frozen=True)
class Result:
    """`model` is a function that is called as the module given, under `torch.no_grad()`: where gradients are recorded,
    nothing is quantized. `decisions` are the precisions of its layers.

    `refused` says why nothing is quantized, None if something is. With `options={"precision": decisions, "calibration":
    calibration}` the same model is compiled again.
    """

    model: Any
    calibration: Calibration
    decisions: Decisions
    refused: str | None
    _report: Report

    def report(self) -> Report:
        """What was measured of each layer and of the whole, and why it was decided; `str()` makes a table of it."""
        return self._report

    def __repr__(self) -> str:
        return f"<fxopt.quantize: {'; '.join(self._report.summary().splitlines())}>"


def quantize(
    model: nn.Module,
    loader: Iterable[Any],
    budget: float = 0.01,
    *,
    metric: Metric | None = None,
    precisions: Sequence[str] = ("fp8", "int8", "int8-dynamic", HIGH),
    batches: int = 8,
    forward: Forward | None = None,
    method: str = "amax",
    fit: bool = True,
    seconds: float = 0.5,
    trials: int = MOST_TRIED,
    progress: bool = True,
    backend: Any = "fxopt",
) -> Result:
    """Quantize the layers of `model` that save the most time for their error, within `budget`; compile it.

    Without a metric, the budget is the relative error of the outputs on the loader's batches that quantizing may add. With
    `metric`, a callable from a model to a number of which higher is better, it is how much of that may be lost; the metric
    is called about ten times. `batches` of the loader are used at most, and kept in memory; `forward` and `method` are
    those of `fxopt.calibrate`. With `fit`, outliers of linear layers' channels are moved into weights as it suits the first
    of `precisions` that is one of integers (`fxopt.activation_aware`). `precisions` are those to choose from; "high", the
    model's own, always is one. `seconds` is the time for measuring each shape of layer, `trials` how many layers and
    precisions are tried one by one at most: of the others, gradients estimate the error. The model is in evaluation mode;
    its weights are frozen.

    What is returned was measured: the budget holds on these batches, and the model is faster than the compiled model that
    is not quantized. If there is no such, that one is returned, with a warning, and `refused` says why.

    Raises OptionError for a budget, precisions, numbers of batches, seconds or trials that are none, CalibrationError for
    a model, batches or a metric that cannot be used (see `fxopt.calibrate`).
    """
    _check_budget(budget)
    search = Search(
        model,
        loader,
        metric=metric,
        precisions=precisions,
        batches=batches,
        forward=forward,
        method=method,
        fit=fit,
        seconds=seconds,
        trials=trials,
        progress=progress,
        backend=backend,
    )
    return search.within(budget)


def _checked_precisions(precisions: Sequence[str]) -> list[str]:
    if isinstance(precisions, str):
        raise OptionError(f"precisions are several names, such as ({precisions!r}, {HIGH!r}), not one string")
    for name in precisions:
        if name not in PRECISIONS:
            raise OptionError(
                f"there is no precision {name!r}{suggestion(name, PRECISIONS)}; there are {', '.join(PRECISIONS)}"
            )
    wanted = [name for name in dict.fromkeys(precisions) if name != HIGH]
    if not wanted:
        raise OptionError(f"precisions to choose from besides {HIGH!r} are {', '.join(p for p in PRECISIONS if p != HIGH)}")
    return wanted


def _check_trials(trials: int) -> None:
    if not isinstance(trials, int) or isinstance(trials, bool) or trials < 1:
        raise OptionError(f"a number of trials is an integer of 1 or more, not {trials!r}")


def _check_seconds(seconds: float) -> None:
    number = isinstance(seconds, (int, float)) and not isinstance(seconds, bool)
    if not number or not (math.isfinite(seconds) and seconds > 0.0):
        raise OptionError(f"seconds for measuring a layer are a number above 0, not {seconds!r}")


def _check_budget(budget: float) -> None:
    number = isinstance(budget, (int, float)) and not isinstance(budget, bool)
    if not number or not (math.isfinite(budget) and budget >= 0.0):
        raise OptionError(f"a budget is a number of 0 or more, not {budget!r}")


@dataclass
class _Tried:
    """A compiled model, what it takes of a budget and, once timed, the seconds of a call unquantized and quantized."""

    model: Callable[..., Any]
    reached: float
    seconds: tuple[float, float] | None = None

    @property
    def gain(self) -> float:
        """How many times as fast a call is quantized. It has been timed."""
        assert self.seconds is not None
        return self.seconds[0] / self.seconds[1]


class Search:
    """What `quantize` measures of a model and its layers, once, and what it decides from that for a budget.

    The arguments are those of `quantize`.
    """

    def __init__(
        self,
        model: nn.Module,
        loader: Iterable[Any],
        *,
        metric: Metric | None = None,
        precisions: Sequence[str] = ("fp8", "int8", "int8-dynamic", HIGH),
        batches: int = 8,
        forward: Forward | None = None,
        method: str = "amax",
        fit: bool = True,
        seconds: float = 0.5,
        trials: int = MOST_TRIED,
        progress: bool = True,
        backend: Any = "fxopt",
    ) -> None:
        wanted = _checked_precisions(precisions)
        _check_trials(trials)
        _check_seconds(seconds)
        model = given_module(model, "quantize")
        kept = [on_device(batch, model) for batch in first_batches(loader, batches)]
        on_gpu = any(t.is_cuda for t in itertools.chain(model.parameters(), model.buffers())) if kept else False
        observe = (ATTENTION,) if on_gpu and "fp8" in wanted else ()
        table = calibrate(model, kept, forward=forward, method=method, observe=observe, progress=progress, backend=backend)
        integers = next((name for name in wanted if "int" in str(PRECISIONS[name].weights)), None)
        if fit and integers is not None and groups(table, model, (LINEAR,)):
            table = activation_aware(table, model, kept, integers, forward=forward, kinds=(LINEAR,))
        self.calibration, self.trial = table, Trial(model, kept, table, forward)
        self.metric, self.backend, self.seconds, self.progress = metric, backend, seconds, progress
        self.device = next(itertools.chain(model.parameters(), model.buffers())).device
        self.rows: dict[str, LayerReport] = {}
        self._emulated: dict[int, float] = {}
        self._tried: dict[Decisions, _Tried] = {}
        per_batch = self.trial.calls()
        self.at = longest(per_batch)
        self.timed = kept[self.at]
        self.high = self._compiled({})
        self.loss = Loss(self.trial, metric, self.high)
        self.order = in_order(self._offers(per_batch[self.at], wanted, trials))

    def within(self, budget: float) -> Result:
        """The model with the layers quantized that save the most time within `budget`. Raises OptionError for a budget that
        is none."""
        _check_budget(budget)
        self.budget, self.slower = budget, set[str]()
        count = self._most_within(budget)
        for _ in range(MOST_COMPILATIONS):
            if not count:
                break
            chosen = decisions(self.order[:count])
            tried = self._compiled_and_judged(chosen)
            if tried.reached > budget:
                aim = budget * BACK_OFF * (budget / tried.reached if math.isfinite(tried.reached) else 0.0)
                count = min(count - 1, self._most_within(aim))
            elif self._is_faster(tried):
                return self._result(tried.model, chosen, BEYOND, None, tried)
            else:
                self.slower |= chosen.keys()
                count //= 2  # the layers that save most for their error
        return self._fastest_tried(budget)

    def _fastest_tried(self, budget: float) -> Result:
        """The fastest model that was timed for another budget and keeps this one, too; or the unquantized one."""
        if not self.order:
            return self._refused("no layer is faster in another precision on this device")
        fitting = {key: tried for key, tried in self._tried.items() if tried.reached <= budget and tried.seconds is not None}
        if not fitting:
            return self._refused(f"no layer that is faster leaves {self._what()} within the budget of {budget:g}")
        key, fastest = max(fitting.items(), key=lambda item: item[1].gain)
        if not self._is_faster(fastest):
            return self._refused("quantized, the whole model is not faster", fastest)
        return self._result(fastest.model, dict(key.rules), BEYOND, None, fastest)

    def _what(self) -> str:
        return "the error" if self.metric is None else "the metric's loss"

    # ------------------------------------------------------------------ measurements of layers

    def _offers(self, calls: Mapping[str, LayerCall], precisions: Sequence[str], trials: int) -> list[Offer]:
        possible: dict[str, list[str]] = {}
        for layer in self.calibration.layers:
            if layer.kind == ATTENTION:
                continue
            call = calls.get(layer.name)
            problem = layer.obstacle
            if problem is None and call is None:
                problem = "the longest batch does not run it, or not as a product"
            row = LayerReport(layer.name, layer.shape, 0 if call is None else call.rows, str(layer.dtype), problem or "")
            self.rows[layer.name] = row
            if problem is None and call is not None:
                obstacles = {p: savings.unavailable(p, call.weight.device) or obstacle(call, p) for p in precisions}
                possible[layer.name] = [p for p, why in obstacles.items() if why is None]
                row.why = "" if possible[layer.name] else str(obstacles[precisions[0]])
        self._time(calls, possible)
        self._time_attention(precisions)
        pairs = [(name, p) for name, row in self.rows.items() for p in row.saved if row.saved[p] > 0.0]
        errors = estimated_errors(self.trial, pairs, PROBES) if len(pairs) > trials else {}
        offers = [Offer(name, p, errors.get((name, p), 0.0), self.rows[name].saved[p]) for name, p in pairs]
        # Those that would go first, or of which gradients tell nothing, are tried.
        ahead = [(offer.layer, offer.precision) for offer in in_order(offers)] if errors else pairs
        tried = {pair for pair in pairs if pair not in errors} | set(ahead[:trials] if errors else pairs)
        for name, precision in shown([pair for pair in pairs if pair in tried], "errors of layers", self.progress):
            errors[name, precision] = self.trial.emulated_error({name: precision}, PROBES)
        for name, precision in pairs:
            row = self.rows[name]
            row.error[precision] = errors[name, precision]
            if (name, precision) not in tried:
                row.estimated.append(precision)
        return [replace(offer, error=errors[offer.layer, offer.precision]) for offer in offers]

    def _time(self, calls: Mapping[str, LayerCall], possible: Mapping[str, Sequence[str]]) -> None:
        """What each precision saves; nothing where it is no more than measuring is off by."""
        shapes: dict[tuple[LayerShape | ConvolutionShape, tuple[str, ...]], list[str]] = {}
        for name, precisions in possible.items():
            if precisions:
                shapes.setdefault((_shape(calls[name]), tuple(precisions)), []).append(name)
        for (shape, precisions), names in shown(list(shapes.items()), "times of layers", self.progress):
            times = savings.measured(shape, precisions, self.calibration, names[0], self.backend, self.seconds)
            for name in names:
                self._note_times(self.rows[name], times, precisions)

    def _note_times(self, row: LayerReport, times: Mapping[str, float], precisions: Sequence[str]) -> None:
        row.seconds = times[HIGH]
        for precision in precisions:
            gain = times[HIGH] - times[precision]
            row.saved[precision] = gain if gain > NOISE * times[HIGH] else min(gain, 0.0)

    def _time_attention(self, precisions: Sequence[str]) -> None:
        """A row for each attention that calibration has observed, and what fp8 saves."""
        names = dict.fromkeys(name for x in self.calibration.layers if (name := attention_of(x.name)) is not None)
        calls = self.trial.attention_calls(self.at) if names else {}
        times: dict[AttentionShape, dict[str, float]] = {}
        for name in shown(list(names), "times of attention", self.progress):
            call = calls.get(name)
            query = self.calibration[f"{name}.{OPERANDS[0]}"]
            rows = 0 if call is None else call.query.shape[2]
            problem = self._obstacle_of_attention(name, call, precisions)
            row = self.rows[name] = LayerReport(name, query.shape, rows, str(query.dtype), problem or "")
            if problem is None and call is not None:
                shape = _attention_shape(call, self.device)
                if shape not in times:
                    times[shape] = savings.measured_attention(
                        shape, ("fp8",), self.calibration, name, self.backend, self.seconds
                    )
                self._note_times(row, times[shape], ("fp8",))

    def _obstacle_of_attention(self, name: str, call: AttentionCall | None, precisions: Sequence[str]) -> str | None:
        if call is None:
            return "the longest batch does not run it, or not as scaled_dot_product_attention"
        if "fp8" not in precisions:
            return unfit(call, precisions[0])
        operands = (self.calibration[f"{name}.{operand}"].obstacle for operand in OPERANDS)
        return savings.unavailable("fp8", self.device) or unfit(call, "fp8") or next(filter(None, operands), None)

    # ------------------------------------------------------------------ decisions

    def _most_within(self, budget: float) -> int:
        """How many of the order's first layers may be quantized in eager within `budget`, by bisection."""
        low, high = 0, len(self.order)
        while low < high:
            middle = (low + high + 1) // 2
            low, high = (middle, high) if self._emulated_loss(middle) <= budget else (low, middle - 1)
        return low

    def _emulated_loss(self, count: int) -> float:
        if count not in self._emulated:
            self._emulated[count] = self.loss.emulated(decisions(self.order[:count]))
        return self._emulated[count]

    def _compiled_and_judged(self, chosen: Mapping[str, str]) -> _Tried:
        """The model with `chosen` layers quantized. What one budget has compiled and timed serves the next."""
        key = Decisions.of(chosen)
        if key not in self._tried:
            quantized = self._compiled(chosen)
            self._tried[key] = _Tried(quantized, self.loss.of(quantized))
        return self._tried[key]

    def _compiled(self, chosen: Mapping[str, str]) -> Callable[..., Any]:
        """`chosen` layers quantized, compiled as the user would; run once on each batch."""
        options: dict[str, Any] = {"freeze": True}
        if chosen:
            # All layers by name: a precision that a table's user has set must not come in between.
            every = {name: chosen.get(name, HIGH) for name in self.calibration.names()}
            options |= {"precision": Decisions.of(every), "calibration": self.calibration}
        return compiled_apart(self.trial.model, self.backend, options)

    # ------------------------------------------------------------------ results

    def _is_faster(self, tried: _Tried) -> bool:
        forward, batch = self.trial.forward, self.timed
        if tried.seconds is None:
            calls = {HIGH: lambda: forward(self.high, batch), "quantized": lambda: forward(tried.model, batch)}
            with torch.no_grad():
                timings = interleaved(calls, self.device, seconds=4 * self.seconds, patience=PATIENCE)
            tried.seconds = timings[HIGH].median, timings["quantized"].median
        return tried.gain > 1.0 / (1.0 - NOISE_OF_MODEL)

    def _refused(self, why: str, tried: _Tried | None = None) -> Result:
        warnings.warn(f"fxopt.quantize: {why}; the model stays as it is", stacklevel=5)
        return self._result(self.high, {}, why, why, tried)

    def _explained(self, chosen: Mapping[str, str], left_out: str) -> tuple[LayerReport, ...]:
        """The rows with decisions and reasons; `left_out` is that of layers which would be faster."""
        rows = []
        for name, row in self.rows.items():
            decision, why = chosen.get(name, HIGH), row.why
            if decision != HIGH:
                why = "saves the most for its error"
            elif not why:
                why = left_out if any(gain > 0.0 for gain in row.saved.values()) else "no precision is faster"
                if why == BEYOND and name in self.slower:
                    why = "with it, the whole model is not faster"
            rows.append(replace(row, decision=decision, why=why))
        return tuple(rows)

    def _result(
        self, model: Any, chosen: Mapping[str, str], left_out: str, refused: str | None, tried: _Tried | None
    ) -> Result:
        before, after = (None, None) if tried is None or tried.seconds is None else tried.seconds
        report = Report(
            layers=self._explained(chosen, left_out),
            measure="relative error" if self.metric is None else "metric's loss",
            budget=self.budget,
            reached=None if tried is None else tried.reached,
            floor=self.loss.floor,
            seconds=before,
            quantized_seconds=after,
            refused=refused,
        )
        every = Decisions.of({name: chosen.get(name, HIGH) for name in self.rows})
        return Result(model, self.calibration, every, refused, report)


def _attention_shape(call: AttentionCall, device: torch.device) -> AttentionShape:
    (batch, heads, rows, width), (_, groups, keys, value_width) = call.query.shape, call.value.shape
    return AttentionShape(batch, heads, groups, rows, keys, width, value_width, call.is_causal, call.query.dtype, device)


def _shape(call: LayerCall) -> LayerShape | ConvolutionShape:
    if call.window is not None:
        last = call.x.dim() == 4 and call.x.is_contiguous(memory_format=torch.channels_last)
        shapes = (tuple(call.x.shape), tuple(call.weight.shape))
        return ConvolutionShape(*shapes, call.window, call.bias is not None, call.x.dtype, call.weight.device, last)
    (rows, inner), columns = call.x.shape, call.weight.shape[0]
    return LayerShape(rows, inner, columns, call.bias is not None, call.x.dtype, call.weight.device)
