"""Outliers of a few channels are divided out of what layers are given, and multiplied into their weights."""

from __future__ import annotations

from collections.abc import Collection, Hashable, Mapping
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from fxopt.errors import CalibrationError, OptionError
from fxopt.ir.layers import CONVOLUTION, LINEAR
from fxopt.quant.arguments import given_module
from fxopt.quant.table import Calibration, LayerRange


def smoothed(calibration: Calibration, model: nn.Module, strength: float = 0.5) -> Calibration:
    """`calibration` with divisors for the input channels of the layers of `model`, the model that it was made of.

    A scale for all channels has to reach as far as the largest of them, which leaves few steps for the others. Weights are
    scaled by their rows, so that their columns may take over some of it (Xiao et al., "SmoothQuant", 2023): channel j is
    divided by max |x_j|^strength / max |w_j|^(1 - strength), rounded to a power of two, which is exact in every floating
    type. Layers that are given the same share their divisors, and quantize it once. `strength` 0 looks at weights alone, 1
    at activations. What a table's user has set as `scale` of a layer leaves that layer as it is.

    Layers without a range, and such whose weight is no parameter of the module with their name, stay as they are; raises
    CalibrationError if that is true of all, OptionError for a strength that is not between 0 and 1.
    """
    if not 0.0 <= strength <= 1.0:
        raise OptionError(f"a strength lies between 0 and 1, not at {strength!r}")
    found = checked_groups(calibration, given_module(model, "smoothed"))
    divisors = {name: group.divisors(strength) for group in found for name in group.names}
    return with_channels(calibration, divisors)


@dataclass(frozen=True)
class Group:
    """Layers that are given the same: the largest magnitudes of its channels and of what all their weights multiply these
    by, [K] of linear layers, [C_in] of convolutions."""

    names: tuple[str, ...]
    given: Tensor
    columns: Tensor

    def divisors(self, strength: float) -> Tensor:
        """Powers of two, float32 [K]; 1 for channels without values and those whose weights are zero."""
        used = (self.given > 0) & (self.columns > 0)
        ideal = strength * self.given.clamp_min(_LEAST).log2() - (1 - strength) * self.columns.clamp_min(_LEAST).log2()
        return whole_octaves(ideal, used)


def whole_octaves(ideal: Tensor, used: Tensor) -> Tensor:
    """Divisors, powers of two, for logarithms to base two [K]; 1 for channels that are not `used`.

    Only how channels stand to each other matters: about one they keep away from the ends of float16.
    """
    centered = ideal - ideal[used].median() if bool(used.any()) else ideal
    return torch.where(used, centered.round().clamp(-_MOST, _MOST), 0.0).exp2()


KINDS = (LINEAR, CONVOLUTION)
"""Of layers that have channels."""


def groups(calibration: Calibration, model: nn.Module, kinds: Collection[str] = KINDS) -> list[Group]:
    """Of the layers of these kinds that `smoothed` may change."""
    chosen = (layer for layer in calibration.layers if layer.kind in kinds)
    weights = {layer.name: w for layer in chosen if (w := weight_of(model, layer)) is not None}
    together: dict[Hashable, list[str]] = {}
    for layer in calibration.layers:
        if layer.name in weights:
            together.setdefault(_given(layer), []).append(layer.name)
    found = []
    for names in together.values():
        columns = torch.stack([channel_magnitudes(weights[name]) for name in names]).amax(0)
        found.append(Group(tuple(names), calibration[names[0]].channel_amax(), columns))
    return found


def checked_groups(calibration: Calibration, model: nn.Module, kinds: Collection[str] = KINDS) -> list[Group]:
    """`groups`. Raises CalibrationError where there are none."""
    found = groups(calibration, model, kinds)
    if not found:
        raise CalibrationError(
            f"none of the calibration's layers is a {' or '.join(kinds)} layer of this model that data has reached"
        )
    return found


def channel_magnitudes(weight: Tensor) -> Tensor:
    """The largest magnitude that each input channel is multiplied by, of a weight [N, K] or [C_out, C_in, R, S]: float32, on
    the CPU."""
    return weight.detach().abs().transpose(0, 1).flatten(1).amax(1).float().cpu()


def with_channels(calibration: Calibration, divisors: Mapping[str, Tensor | None]) -> Calibration:
    """`calibration` with these divisors of layers; the others keep theirs. What was fitted to other divisors is dropped."""
    layers = tuple(
        replace(x, channels=divisors[x.name], refined=None) if x.name in divisors else x for x in calibration.layers
    )
    return replace(calibration, layers=layers)


def weight_of(model: nn.Module, layer: LayerRange) -> Tensor | None:
    """The weight [N, K] or [C_out, C_in, R, S] of a layer whose scale is its range's; None of others, and of convolutions
    that are not quantized."""
    if layer.kind not in KINDS or layer.obstacle is not None or layer.scale is not None:
        return None
    try:
        module = model.get_submodule(layer.name.partition("#")[0])
    except AttributeError:
        return None
    weight = getattr(module, "weight", None)
    if not isinstance(weight, Tensor) or not weight.is_floating_point():
        return None
    if layer.kind == CONVOLUTION:
        plain = isinstance(module, nn.Conv2d) and module.groups == 1
        return weight if plain and tuple(weight.shape) == layer.shape else None
    if isinstance(module, nn.Linear):
        return weight if tuple(weight.shape) == layer.shape else None
    # Transformers' Conv1D has [K, N]; of a square one only its class would tell.
    own = [w for w in (weight, weight.t()) if tuple(w.shape) == layer.shape] if weight.dim() == 2 else []
    return own[0] if len(own) == 1 else None


def _given(layer: LayerRange) -> Hashable:
    """Equal for layers that were given the same: no two tensors have the same histogram and range of every channel."""
    assert layer.seen is not None
    parts = (layer.seen.minimum, layer.seen.maximum, layer.seen.histogram)
    return tuple(part.numpy().tobytes() for part in parts)


_LEAST = torch.finfo(torch.float32).tiny
_MOST = 10.0
"""Octaves that a channel may be moved by: float16 has fourteen below one for normal numbers."""
