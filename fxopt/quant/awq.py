"""How much of its channels' spread each layer's weight takes over, by measured error of the layer."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import nn

from fxopt.errors import CalibrationError
from fxopt.precision import PRECISIONS
from fxopt.quant.arguments import check_quantizes, given_module
from fxopt.quant.batches import Forward, first_batches, on_device, run_batch
from fxopt.quant.emulate import LayerCall, obstacle, treated, with_table
from fxopt.quant.equalize import equalizing_divisors
from fxopt.quant.smooth import KINDS, checked_groups, with_channels
from fxopt.quant.table import Calibration

STRENGTHS = (0.0, 0.25, 0.5, 0.75, 1.0)
ROWS, IMAGES = 256, 8
"""Of what a linear layer or a convolution is given in a batch, evenly spaced."""


def activation_aware(
    calibration: Calibration,
    model: nn.Module,
    loader: Iterable[Any],
    precision: str = "int4-weight",
    *,
    batches: int = 2,
    forward: Forward | None = None,
    kinds: Collection[str] = KINDS,
) -> Calibration:
    """`calibration` with divisors of channels that fit `precision`: of each layer those of the least error on real data.

    Weights of few bits lose most in the columns that large channels are multiplied by. `fxopt.smoothed` widens these at the
    cost of the others; by how much is best differs from layer to layer (Lin et al., "AWQ", 2023). For each layer, or the
    layers that are given the same, every strength of STRENGTHS, what `fxopt.equalized` gives and no divisors at all are
    tried on rows of `loader`'s first `batches`, for static int8 with and without a zero point, and what brings their results
    nearest to those of the model is kept. `kinds` are those of layers, "linear" and "convolution": an int8 convolution
    with divisors keeps the residual beside it from being stored in 8 bits alone.

    Raises OptionError for a precision that is none, CalibrationError for no batches and for a model that is not the
    calibration's.
    """
    check_quantizes(precision)
    model = given_module(model, "activation_aware")
    found = checked_groups(calibration, model, kinds)
    rows = layer_rows(model, loader, batches, {n for group in found for n in group.names}, forward)
    equalizing = equalizing_divisors(calibration, model)
    zero_points = PRECISIONS[precision].activations == "int8" and PRECISIONS[precision].is_static
    for group in found:
        calls = [rows[name] for name in group.names if name in rows and obstacle(rows[name], precision) is None]
        divisors = [None, equalizing.get(group.names[0]), *(group.divisors(strength) for strength in STRENGTHS)]
        tried = [with_channels(calibration, dict.fromkeys(group.names, d)) for d in divisors]
        if zero_points:
            tried = [_with_symmetry(table, group.names, symmetric) for table in tried for symmetric in (True, False)]
        calibration = min(tried, key=lambda table: _error(table, calls, precision))  # the first of equals
    return calibration


def _with_symmetry(table: Calibration, names: Iterable[str], symmetric: bool) -> Calibration:
    """What a user has said of a layer stays."""
    kept = {name for name in names if table[name].symmetric is None}
    return replace(table, layers=tuple(replace(x, symmetric=symmetric) if x.name in kept else x for x in table.layers))


def layer_rows(
    model: nn.Module, loader: Iterable[Any], batches: int, names: set[str], forward: Forward | None
) -> Mapping[str, LayerCall]:
    """Some rows or images of what each of the layers `names` is given by the first `batches` of `loader`.

    Raises CalibrationError for no batches, and as `run_batch` does.
    """
    found: dict[str, LayerCall] = {}

    def note(call: LayerCall) -> None:
        if call.name in names:
            rows = call.x[:: max(1, len(call.x) // (ROWS if call.window is None else IMAGES))]
            before = found.get(call.name)
            x = rows.clone() if before is None else torch.cat([before.x, rows])
            found[call.name] = replace(call, x=x)

    count = 0
    with torch.no_grad(), treated(model, note):
        for batch in first_batches(loader, batches):
            run_batch(model, on_device(batch, model), count, forward)
            count += 1
    if not count:
        raise CalibrationError("the loader gave no batch: it is empty, or an iterator that was gone through before")
    return found


def _error(table: Calibration, calls: Iterable[LayerCall], precision: str) -> float:
    """The sum of the layers' squared relative errors."""
    total = 0.0
    with torch.no_grad():
        for call in calls:
            exact = call.exact().double()
            off = with_table(call, precision, table, call.name).double() - exact
            total += float(off.square().sum() / exact.square().sum().clamp_min(torch.finfo(torch.float64).tiny))
    return total
