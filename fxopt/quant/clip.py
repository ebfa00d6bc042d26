"""Weights are clipped where that costs less than it saves: fewer values of large magnitude for finer steps of all others."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor, nn

from fxopt.ir.layers import CONVOLUTION
from fxopt.ir.quantized_ops import dequantized, quantize_weight
from fxopt.precision import PRECISIONS, Refinement, convolution_misfit, group_of, misfit
from fxopt.quant.arguments import check_quantizes, given_module
from fxopt.quant.smooth import checked_groups, weight_of
from fxopt.quant.table import Calibration, LayerRange

SHARES = tuple(1.0 - step / 20 for step in range(11))
"""Of the largest magnitude: what is tried as a limit."""


def clipped(calibration: Calibration, model: nn.Module, precision: str = "int4-weight") -> Calibration:
    """`calibration` with the limits at which the weights of `model`'s layers are clipped in `precision`.

    For each output channel, or group of neighbours in it, every share of SHARES of its largest magnitude is tried, and the
    one with the least mean squared error of the quantized weights is kept: all of it is one, so that no error grows. That
    is worth most with 4 bits, where a step is a seventh of the largest magnitude. A correction that was fitted to a layer
    in another way is dropped.

    Raises OptionError for a precision that is none, CalibrationError for a model that is not the calibration's.
    """
    check_quantizes(precision)
    model = given_module(model, "clipped")
    checked_groups(calibration, model)
    layers = []
    for layer in calibration.layers:
        weight = weight_of(model, layer)
        fits = weight is not None and _fits(layer, weight, precision)
        layers.append(_clipped(layer, weight, precision) if weight is not None and fits else layer)
    return replace(calibration, layers=tuple(layers))


def _fits(layer: LayerRange, weight: Tensor, precision: str) -> bool:
    if layer.kind == CONVOLUTION and convolution_misfit(precision, weight.dim(), 1, transposed=False) is not None:
        return False
    return misfit(precision, len(weight), weight.shape[1], weight.device.type) is None


def _clipped(layer: LayerRange, weight: Tensor, precision: str) -> LayerRange:
    values = weight.detach().float()
    if layer.channels is not None:
        values = values * layer.channels.to(values.device).view(-1, *[1] * (values.dim() - 2))
    return replace(layer, refined=Refinement(precision, limits=best_limits(values.flatten(1), precision).cpu()))


def best_limits(weight: Tensor, precision: str) -> Tensor:
    """The limits of least squared error of `weight`, float32 [N, K]: float32 [N], or [N, K / group]; 1 where all is zero."""
    given = PRECISIONS[precision]
    group = (group_of(weight.shape[1]) or 0) if given.group else 0
    shape = (weight.shape[0], -1) if given.group else (weight.shape[0],)
    whole = (weight.shape[0], -1, group or weight.shape[1])
    largest = weight.abs().reshape(whole).amax(-1).reshape(shape)
    best, least = largest, torch.full_like(largest, torch.inf)
    for share in SHARES:
        limits = (largest * share).clamp_min(torch.finfo(torch.float32).tiny)
        stored = quantize_weight(weight, getattr(torch, str(given.weights)), given.bits, group, limits)
        off = (dequantized(*stored, given.bits, group) - weight).reshape(whole).square().sum(-1).reshape(shape)
        better = off < least
        best, least = torch.where(better, limits, best), torch.where(better, off, least)
    return torch.where(largest > 0, best, 1.0)
