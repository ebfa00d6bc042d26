"""Channels between two layers are divided in one weight and multiplied in the other, until both have the same range."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from fxopt.errors import CalibrationError
from fxopt.quant.arguments import given_module
from fxopt.quant.smooth import weight_of, whole_octaves, with_channels
from fxopt.quant.table import Calibration

_MOST_SWEEPS = 20
_CONVERGED = 0.01
"""Octaves, of which divisors are whole numbers."""


def equalized(calibration: Calibration, model: nn.Module) -> Calibration:
    """`calibration` with divisors of the channels between two layers of `model`, from their weights alone.

    Where nothing is between two layers but what scales as its input does (relu, pooling, casts, views; norms that do not
    train are part of the first), dividing an output channel of the first weight by s, and multiplying by s what the second
    one multiplies it by, changes nothing. With s = sqrt(r1 / r2), r1 and r2 the largest magnitudes of the two, both have the
    same range (Nagel et al., "Data-free quantization through weight equalization and bias correction", 2019), and so have,
    as far as weights make them, the channels of the activation between, which share one scale. A channel between several
    layers has one s for all; chains are gone through until nothing changes. s is rounded to a power of two, which is exact,
    and applied where the second layer's input is quantized: the first one's weight has a scale for each output channel, to
    which such factors mean nothing.

    Which layers follow each other is what calibration has seen (`after` in the table); others keep their divisors, and so do
    those whose user has set `scale`. Raises CalibrationError if there are no two such layers.
    """
    divisors = equalizing_divisors(calibration, given_module(model, "equalized"))
    if not divisors:
        raise CalibrationError(
            "no two of the calibration's layers follow each other in this model with nothing between them but what scales as"
            " its input does, such as relu"
        )
    return with_channels(calibration, divisors)


def equalizing_divisors(calibration: Calibration, model: nn.Module) -> dict[str, Tensor]:
    """What `equalized` gives to the layers that have one, by name: powers of two for their input channels."""
    chain = _Chain.of(calibration, model)
    chain.equalize()
    return chain.divisors()


@dataclass(frozen=True)
class _Chain:
    """Layers that follow each other.

    `weights`: magnitudes [output channels, input channels] of all of them, of a window the largest. `readers`: for each
    layer with C output channels those that are given its result; `before`: the other way round. `gains` [C] multiply the
    result. `octaves`: what the channels of a result are divided by, as logarithms [C].
    """

    weights: dict[str, Tensor]
    readers: dict[str, list[str]] = field(default_factory=dict)
    before: dict[str, str] = field(default_factory=dict)
    gains: dict[str, Tensor] = field(default_factory=dict)
    octaves: dict[str, Tensor] = field(default_factory=dict)

    @classmethod
    def of(cls, calibration: Calibration, model: nn.Module) -> _Chain:
        known = {layer.name: w for layer in calibration.layers if (w := weight_of(model, layer)) is not None}
        pairs = [layer for layer in calibration.layers if layer.name in known and layer.after in known]
        names = {name for layer in pairs for name in (layer.name, str(layer.after))}
        chain = cls({name: _magnitudes(known[name]) for name in names})
        for layer in pairs:
            first = str(layer.after)
            channels, inputs = len(chain.weights[first]), chain.weights[layer.name].shape[1]
            if inputs % channels or first == layer.name:
                continue
            chain.readers.setdefault(first, []).append(layer.name)
            chain.before[layer.name] = first
            chain.gains[first] = torch.ones(channels) if layer.gains is None else layer.gains
            chain.octaves[first] = torch.zeros(channels)
        return chain

    def equalize(self) -> None:
        for _ in range(_MOST_SWEEPS):
            change = 0.0
            for first in self.readers:
                rows, columns = self._rows(first), self._columns(first)
                used = (rows > 0) & (columns > 0)
                new = torch.where(used, (rows.log2() - columns.log2()) / 2, 0.0)
                change = max(change, float((new - self.octaves[first]).abs().max()))
                self.octaves[first] = new
            if change < _CONVERGED:
                return

    def divisors(self) -> dict[str, Tensor]:
        """Of the input channels of each reader."""
        found: dict[str, Tensor] = {}
        for first, readers in self.readers.items():
            used = (self._rows(first) > 0) & (self._columns(first) > 0)
            own = whole_octaves(self.octaves[first], used)
            found |= {name: own.repeat_interleave(self._repeats(first, name)) for name in readers}
        return found

    def _rows(self, first: str) -> Tensor:
        """The largest magnitudes of a layer's output channels, whose input has been divided, but not their own result."""
        weight, before = self.weights[first], self.before.get(first)
        if before is not None:
            weight = weight * self.octaves[before].exp2().repeat_interleave(self._repeats(before, first))
        return weight.amax(1) * self.gains[first]

    def _columns(self, first: str) -> Tensor:
        """The largest magnitudes that a layer's output channels are multiplied by, in results that have been divided."""
        found = []
        for name in self.readers[first]:
            weight = self.weights[name]
            if name in self.octaves:
                weight = weight / self.octaves[name].exp2()[:, None]
            found.append(weight.amax(0).view(len(self.octaves[first]), -1).amax(1))
        return torch.stack(found).amax(0)

    def _repeats(self, first: str, reader: str) -> int:
        """Neighbours among the reader's inputs that are one channel of `first`: of images that were made rows."""
        return self.weights[reader].shape[1] // len(self.octaves[first])


def _magnitudes(weight: Tensor) -> Tensor:
    wide = weight.detach().abs().float().cpu()
    return wide if wide.dim() == 2 else wide.flatten(2).amax(2)
