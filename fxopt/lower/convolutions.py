"""Convolutions and what follows them as one call of cuDNN's: a bias, a residual and relu cost such a call nothing.

The region over a convolution's result says what it computes; if that is relu(convolution + bias + residual), bias and
residual optional, cuDNN has a call for it. A factor for each channel, as of a batch normalization that does not train, goes
into the weight where that is a constant.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch

from fxopt.ir.exprs import Int, contiguous_strides, prod
from fxopt.ir.loops import Load, Scalar
from fxopt.ir.precision import convolutions_use_tf32
from fxopt.ir.region import Alias, BufferSpec, Call, Ref, Region, Way
from fxopt.ir.rounding import HALVES
from fxopt.lower.channel_sums import ChannelSum, channel_sum, uncast
from fxopt.lower.lowering import Lowered
from fxopt.lower.products import CONVOLUTION, as_view

CUDNN, FOLDED = "cudnn", "cudnn-folded"
RELU, ADD_RELU = "aten::cudnn_convolution_relu.default", "aten::cudnn_convolution_add_relu.default"

BIAS_OF = {RELU: 2, ADD_RELU: 4}
"""cuDNN's calls, and which of their arguments is the bias. One of another dtype than the operands' gives garbage."""

FEWEST_CHANNELS = 9
"""Channels that a group needs: fused depthwise convolutions are many times slower than torch's own kernels (H100)."""

MOST_ELEMENTS = 2**31 - 1
"""Of a tensor: torch splits larger ones for plain convolutions only."""


@dataclass(frozen=True)
class _Operands:
    """The label of a way, and what its fused call takes: names of the weight and of the bias, if any."""

    label: str
    weight: str
    bias: str | None


class FusedConvolutions:
    """Finds the ways of `lowered`, already scheduled. `buffers` and `constants` have those that the ways add as well."""

    def __init__(self, lowered: Lowered) -> None:
        self.inputs = lowered.inputs
        self.buffers = dict(lowered.buffers)
        self.constants = dict(lowered.constants)
        self.views = {s.name: s for s in lowered.steps if isinstance(s, Alias)}

    def ways(self, call: Call, region: Region) -> tuple[Way, ...]:
        """The ways to compute `call` and `region`, the only reader of its result, as one call; none for what cuDNN cannot
        do or does slowly.
        """
        found = self._sum(call, region)
        if found is None or found.residual_factor is not None:
            return ()
        operands = self._given(call, found) or self._folded(call, found)
        return () if operands is None else (Way(operands.label, (_fused(call, region, found, operands),)),)

    def ways_with_shortcut(self, call: Call, shortcut: Call, region: Region) -> tuple[Way, ...]:
        """The same for `call` and `region` where that scales the residual as well, which is the result of convolution
        `shortcut` and read by nobody else: another norm, whose factor goes into the weight of `shortcut`.
        """
        found = self._sum(call, region)
        if found is None or found.residual is None or found.residual_factor is None:
            return ()
        if found.residual.buffer != shortcut.outputs[0] or not self._is_eligible(shortcut, region) or shortcut.args[2]:
            return ()
        scaled = self._scaled(shortcut, found, found.residual_factor)
        operands = None if scaled is None else self._folded(call, found)
        if scaled is None or operands is None:
            return ()
        weight = self._constant(f"{shortcut.outputs[0]}_weight", scaled, self.buffers[shortcut.args[1].name])
        before = replace(shortcut, args=(shortcut.args[0], Ref(weight), *shortcut.args[2:]))
        return (Way(operands.label, (before, _fused(call, region, found, operands))),)

    def _sum(self, call: Call, region: Region) -> ChannelSum | None:
        """What `region` makes of the result of `call`, if cuDNN may compute that."""
        if not self._is_eligible(call, region):
            return None
        result = self.buffers[call.outputs[0] or ""]
        found = channel_sum(region, result)
        return found if found is not None and self._is_laid_out(found, region, result) else None

    def _is_eligible(self, call: Call, region: Region) -> bool:
        if call.op != CONVOLUTION:
            return False
        x, weight, _, *geometry, transposed, _, groups = call.args
        image, window = (as_view(ref.name, self.buffers, self.views) for ref in (x, weight))
        if image is None or window is None or call.outputs[0] is None or transposed:
            return False
        result = self.buffers[call.outputs[0]]
        if not _may_use_cudnn(result.dtype) or any(s.device.type != "cuda" for s in (result, region)):
            return False
        if any(self.buffers[v.of].dtype != result.dtype for v in (image, window)):
            return False
        if not all(isinstance(n, int) for numbers in (*geometry, [groups]) for n in numbers):
            return False
        if not all(len(s) == 4 and _is_moderate(s) for s in (image.shape, window.shape, result.shape)):
            return False
        if groups != 1 and int(window.shape[1]) < FEWEST_CHANNELS:  # type: ignore[arg-type]  # moderate: known
            return False
        return is_channels_last(image.shape, image.strides) and is_channels_last(result.shape, result.strides)

    def _is_laid_out(self, found: ChannelSum, region: Region, result: BufferSpec) -> bool:
        """Whether residual and region's result have dtype and layout of `result`, and the latter has memory of its own."""
        (made,) = region.writes()
        others = [made] if found.residual is None else [made, found.residual.buffer]
        specs = [self.buffers[n] for n in others]
        if any((s.dtype, s.shape, s.strides) != (result.dtype, result.shape, result.strides) for s in specs):
            return False
        return made not in (*region.reads(), *self.inputs, *self.constants)

    def _given(self, call: Call, found: ChannelSum) -> _Operands | None:
        """Those of the call if nothing is scaled and the bias, if any, is a tensor such as cuDNN takes."""
        _, weight, bias, *_ = call.args
        if found.factor is not None:
            return None
        if not found.offsets:
            return _Operands(CUDNN, weight.name, None if bias is None else bias.name)
        offset = uncast(found.offsets[0])
        if bias is not None or len(found.offsets) > 1 or not isinstance(offset, Load) or offset.index != found.channel:
            return None
        spec = self.buffers[offset.buffer]
        fits = (spec.dtype, spec.shape, spec.strides) == (found.image.dtype, (found.channels,), (1,))
        return _Operands(CUDNN, weight.name, spec.name) if fits else None

    def _folded(self, call: Call, found: ChannelSum) -> _Operands | None:
        """New constants, if factor and offsets are computed from constants."""
        _, weight, bias, *_ = call.args
        name = call.outputs[0]
        offsets = [found.of_channels(o, self.constants, self.buffers) for o in found.offsets]
        known = [o for o in offsets if o is not None]
        if weight.name not in self.constants or bias is not None or len(known) < len(offsets):
            return None
        zeros = torch.zeros(found.channels, dtype=torch.float64, device=self.constants[weight.name].device)
        shift = _rounded(sum(known, zeros), found.image.dtype)
        scaled = None if found.factor is None else self._scaled(call, found, found.factor)
        if shift is None or (scaled is None) != (found.factor is None):
            return None
        like = self.buffers[weight.name]
        kept = weight.name if scaled is None else self._constant(f"{name}_weight", scaled, like)
        return _Operands(FOLDED, kept, self._constant(f"{name}_bias", shift, like))

    def _scaled(self, call: Call, found: ChannelSum, factor: Scalar) -> torch.Tensor | None:
        """The weight of `call` times `factor`, if both are constants."""
        weight = self.constants.get(call.args[1].name)
        value = found.of_channels(factor, self.constants, self.buffers)
        if weight is None or value is None:
            return None
        return _rounded(weight.detach().double() * value.expand(found.channels)[:, None, None, None], weight.dtype)

    def _constant(self, name: str, value: torch.Tensor, like: BufferSpec) -> str:
        """The name of a new constant on the device of `like`."""
        self.constants[name] = value
        self.buffers[name] = BufferSpec(name, value.dtype, like.device, tuple(value.shape), tuple(value.stride()))
        return name


def _fused(call: Call, region: Region, found: ChannelSum, operands: _Operands) -> Call:
    """`call` and `region` as one call."""
    x, _, _, *geometry, _, _, groups = call.args
    weight, bias = Ref(operands.weight), None if operands.bias is None else Ref(operands.bias)
    op, args = RELU, (x, weight, bias, *geometry, groups)
    if found.residual is not None:
        op, args = ADD_RELU, (x, weight, Ref(found.residual.buffer), 1.0, bias, *geometry, groups)
    return Call(op, args, {}, region.writes(), call.origin)


def _may_use_cudnn(dtype: torch.dtype) -> bool:
    """Whether the user lets cuDNN compute in `dtype` (float32 as TF32) by any of its algorithms."""
    flags = torch.backends.cudnn
    if not flags.enabled or flags.deterministic or torch.are_deterministic_algorithms_enabled():
        return False
    return dtype in HALVES or (dtype == torch.float32 and convolutions_use_tf32())


def _is_moderate(shape: Sequence[Int]) -> bool:
    """Whether a tensor of `shape` has a known number of elements, neither none nor too many."""
    count = prod(shape)
    return all(isinstance(n, int) for n in shape) and isinstance(count, int) and 0 < count <= MOST_ELEMENTS


def is_channels_last(shape: Sequence[Int], strides: Sequence[Int]) -> bool:
    """Whether an image [N, C, H, W] is dense, with its channels side by side."""
    batch, channels, height, width = shape
    rows = contiguous_strides((batch, height, width, channels))
    wanted = (rows[0], rows[3], rows[1], rows[2])
    return all(a == b for a, b, n in zip(strides, wanted, shape, strict=True) if n != 1)


def _rounded(exact: torch.Tensor, dtype: torch.dtype) -> torch.Tensor | None:
    """float64 `exact` [channels, ...] as `dtype`; None if a channel does not fit its range: infinite, or of less precision
    than the dtype has, near zero.
    """
    value = exact.to(dtype)
    rows, errors = (x.abs().reshape(len(exact), -1).amax(1) for x in (exact, exact - value))
    return value if bool((errors <= torch.finfo(dtype).eps * rows).all()) else None
