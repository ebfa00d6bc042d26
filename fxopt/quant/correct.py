"""Errors of quantized layers that are the same for all data are added back as a bias."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from fxopt.ir.layers import ATTENTION, CHANNEL
from fxopt.precision import Refinement
from fxopt.quant.arguments import check_quantizes, given_module
from fxopt.quant.awq import layer_rows
from fxopt.quant.batches import Forward
from fxopt.quant.emulate import LayerCall, obstacle, with_table
from fxopt.quant.table import Calibration, LayerRange


def bias_corrected(
    calibration: Calibration,
    model: nn.Module,
    loader: Iterable[Any],
    precision: str = "int8",
    *,
    batches: int = 2,
    forward: Forward | None = None,
) -> Calibration:
    """`calibration` with the mean error of each layer of `model` in `precision`, which is taken off its result.

    What rounding a weight changes, times what its inputs are on average, is the same for all data (Nagel et al.,
    "Data-free quantization through weight equalization and bias correction", 2019); so is what clipping takes from inputs.
    The mean is that of rows of `loader`'s first `batches`, of convolutions that of places in images. A layer keeps its
    correction only if half of the rows or images, which the mean of the other half has not seen, get nearer to the model's
    own results. It is part of the bias, and costs
    nothing. What was fitted to the layer's weight in this precision (`fxopt.clipped`) stays.

    Raises OptionError for a precision that is none, CalibrationError for no batches.
    """
    check_quantizes(precision)
    model = given_module(model, "bias_corrected")
    names = {layer.name for layer in calibration.layers if layer.kind != ATTENTION and layer.obstacle is None}
    rows = layer_rows(model, loader, batches, names, forward)
    layers = (_corrected(calibration, x, rows[x.name], precision) if x.name in rows else x for x in calibration.layers)
    return replace(calibration, layers=tuple(layers))


def _corrected(calibration: Calibration, layer: LayerRange, call: LayerCall, precision: str) -> LayerRange:
    if obstacle(call, precision) is not None or len(call.x) < 2:
        return layer
    before = calibration.refinement(layer.name, precision)
    bare = Refinement(precision, None if before is None else before.limits)
    table = replace(calibration, layers=(replace(layer, refined=bare),))
    with torch.no_grad():
        off = call.exact().double() - with_table(call, precision, table, layer.name).double()
    if not _helps(off):
        return layer if before is None else replace(layer, refined=bare)
    return replace(layer, refined=replace(bare, correction=_mean(off).flatten().float().cpu()))


def _helps(off: Tensor) -> bool:
    """Whether the mean of half of the errors [M, N, ...] makes the other half smaller, both ways."""
    halves = off[0::2], off[1::2]
    return all(float((b - _mean(a)).square().sum()) < float(b.square().sum()) for a, b in (halves, tuple(reversed(halves))))


def _mean(off: Tensor) -> Tensor:
    """Of each channel: [1, N, ...]."""
    return off.mean([d for d in range(off.dim()) if d != CHANNEL], keepdim=True)
