"""Errors of layers as gradients tell them: a few backward passes for all layers, where trying each takes too long."""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from fxopt.quant.emulate import LayerCall, treated
from fxopt.quant.trial import Trial, floating_outputs

PROBES = 4
"""Random directions in which outputs are looked at, for each batch."""

Pair = tuple[str, str]
"""A layer and a precision."""


def estimated_errors(trial: Trial, pairs: Collection[Pair], batches: int) -> dict[Pair, float]:
    """The model's relative error with one layer alone in one precision, as gradients tell it, on the first `batches`.

    An error d in a layer's output changes the model's by J d, if it is small. For a vector v of random signs, the mean of
    (v^T J d)^2 is |J d|^2 (Hutchinson's estimator), and v^T J is what one backward pass gives for all layers. Samples of a
    batch (its first dimension) are taken as independent, which makes as many estimates of each pass: enough for an order.

    Left out are layers that are no module's whole result; the dictionary is empty where the model has no gradients.
    """
    squares = dict.fromkeys(pairs, 0.0)
    size, seen = 0.0, set[str]()
    generator = torch.Generator().manual_seed(0)
    for batch in trial.batches[:batches]:
        for _ in range(PROBES):
            try:
                gradients, norm = _gradients(trial, batch, {name for name, _ in pairs}, generator)
            except RuntimeError:  # an op without a derivative, or memory
                return {}
            size += norm
            for pair, square in _squares(trial, batch, pairs, gradients).items():
                squares[pair] += square
            seen |= gradients.keys()
    return {pair: math.sqrt(square / size) for pair, square in squares.items() if pair[0] in seen and size > 0.0}


def _gradients(
    trial: Trial, batch: Any, layers: Collection[str], generator: torch.Generator
) -> tuple[dict[str, Tensor], float]:
    """For each layer that is a module, v^T J as [samples, values of one]; and the outputs' squared norm."""
    places: dict[str, Tensor] = {}
    handles = []
    for name in layers:
        module = _submodule(trial.model, name)
        if module is not None:
            handles.append(module.register_forward_hook(_observing(places, name)))
    try:
        with torch.enable_grad():
            outputs = floating_outputs(trial.forward(trial.model, batch))
            directed = [(t * _signs(t, generator)).sum() for t in outputs if t.requires_grad]
            held = list(places.items())
            found = torch.autograd.grad(directed, [p for _, p in held], allow_unused=True) if directed else ()
    finally:
        for handle in handles:
            handle.remove()
    norm = sum(float(t.detach().double().square().sum()) for t in outputs)
    pairs = zip(held, found, strict=False)
    return {name: grad.reshape(len(grad), -1) for (name, _), grad in pairs if grad is not None}, norm


def _submodule(model: nn.Module, name: str) -> nn.Module | None:
    try:
        return model.get_submodule(name) if name else None
    except AttributeError:
        return None


def _observing(places: dict[str, Tensor], name: str) -> Callable[..., Tensor | None]:
    """A hook that adds zeros to a module's result, whose gradient is the result's."""

    def add(module: nn.Module, args: object, result: Any) -> Tensor | None:
        if not isinstance(result, Tensor) or name in places or result.dim() < 2:
            return None
        places[name] = torch.zeros_like(result, requires_grad=True)
        return result + places[name]

    return add


def _signs(t: Tensor, generator: torch.Generator) -> Tensor:
    return (torch.randint(0, 2, t.shape, generator=generator) * 2 - 1).to(t.device, t.dtype)


def _squares(trial: Trial, batch: Any, pairs: Collection[Pair], gradients: Mapping[str, Tensor]) -> dict[Pair, float]:
    """The sum over samples of (v^T J d)^2, d being what a precision changes in a layer's result."""
    squares: dict[Pair, float] = {}
    wanted: dict[str, list[str]] = {}
    for name, precision in pairs:
        wanted.setdefault(name, []).append(precision)

    def compare(call: LayerCall) -> None:
        gradient = gradients.get(call.name)
        if gradient is None or call.name not in wanted or gradient.numel() != call.rows * len(call.weight):
            return
        exact = call.exact().float()
        for precision in wanted[call.name]:
            error = trial.quantized(call, precision).float() - exact
            along = (error.reshape(gradient.shape) * gradient.float()).sum(1)
            squares[call.name, precision] = float(along.double().square().sum())

    with torch.no_grad(), treated(trial.model, compare):
        trial.forward(trial.model, batch)
    return squares
