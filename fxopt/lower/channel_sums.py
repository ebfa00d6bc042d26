"""Regions that compute relu(image * factor + residual * factor + offset), factors and offset one number for each channel.

That is what follows a convolution in most networks: a bias, a batch normalization that does not train, a shortcut.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

import torch

from fxopt.ir.exprs import Int, mod, prod
from fxopt.ir.loops import Const, Load, Op, Scalar, postorder
from fxopt.ir.region import BufferSpec, Region
from fxopt.ir.rounding import HALVES, unrounded
from fxopt.lower.values import cast

_FLOATS = (*HALVES, torch.float32)

_CHANNEL_OPS: dict[str, Callable[..., torch.Tensor]] = {
    **{name: getattr(torch, name) for name in ("add", "sub", "mul", "neg", "sqrt", "rsqrt", "reciprocal")},
    "truediv": torch.true_divide,
    "cast": lambda x: x,
}
"""What factors and offsets may be computed by, in float64: there a cast does nothing."""


@dataclass(frozen=True)
class ChannelSum:
    """relu(image * factor + residual * residual_factor + offsets) at every element of a channels-last tensor of `channels`
    channels.

    `image` and `residual` are loads at the element. Factors (None: one) and `offsets` load at `channel`, the element's, or
    at known indices.
    """

    image: Load
    factor: Scalar | None
    residual: Load | None
    residual_factor: Scalar | None
    offsets: tuple[Scalar, ...]
    channel: Int
    channels: int

    def of_channels(
        self, value: Scalar, constants: Mapping[str, torch.Tensor], buffers: Mapping[str, BufferSpec]
    ) -> torch.Tensor | None:
        """`value` for each channel, float64 [channels] or a scalar, if all that it loads are `constants`."""
        return constant_along(value, self.channel, self.channels, constants, buffers)


def constant_along(
    value: Scalar, index: Int, count: int, constants: Mapping[str, torch.Tensor], buffers: Mapping[str, BufferSpec]
) -> torch.Tensor | None:
    """`value` for each of the `count` values of `index`, float64 [count] or a scalar, if all that it loads are `constants`
    of so many elements, at `index`, or single elements of others, and it is computed by what a ChannelSum may be."""
    done: dict[Scalar, torch.Tensor] = {}
    for node in postorder((value,)):
        match node:
            case Const():
                done[node] = torch.tensor(node.value, dtype=torch.float64)
            case Load(buffer=buffer, index=place):
                constant = constants.get(buffer)
                extent = buffers[buffer].extent
                if constant is None or not isinstance(extent, int) or (place == index and extent != count):
                    return None
                if place != index and not isinstance(place, int):
                    return None
                memory = constant.detach().as_strided((extent,), (1,)).double()
                done[node] = memory if place == index else memory[place]  # type: ignore[index]
            case Op():
                inner = unrounded(node)
                if inner is not node:
                    done[node] = done[inner]
                elif node.name in _CHANNEL_OPS:
                    done[node] = _CHANNEL_OPS[node.name](*(done[a] for a in node.args))
                elif node.name != "bitcast":
                    return None
            case _:
                return None
    return done.get(value)


@dataclass(frozen=True)
class _Form:
    """A sum of loads at the element, each times a factor (None: one), and of offsets."""

    images: dict[Load, Scalar | None] = field(default_factory=dict)
    offsets: tuple[Scalar, ...] = ()

    def plus(self, other: _Form) -> _Form | None:
        if self.images.keys() & other.images.keys():
            return None
        return _Form({**self.images, **other.images}, (*self.offsets, *other.offsets))

    def scaled(self, name: str, by: Scalar) -> _Form:
        """Multiplied or divided by what is the same for a channel."""

        def one(x: Scalar | None) -> Scalar:
            return Op(name, (_wide(Const(1.0, torch.float32) if x is None else x), _wide(by)), torch.float32)

        return _Form({load: one(x) for load, x in self.images.items()}, tuple(one(x) for x in self.offsets))


def channel_sum(region: Region, result: BufferSpec) -> ChannelSum | None:
    """What `region`, which reads the channels-last tensor `result` [N, C, H, W] of known size, makes of it, if that is a
    ChannelSum with `result` as its image, in an order of elements that is the result's.
    """
    nest = region.nest
    if region.across is not None or nest.reduced or len(nest.stores) != 1:
        return None
    (store,) = nest.stores
    points = prod(p.size for p in nest.points if p.size is not None)
    if store.mode != "set" or store.indirect or points != result.numel:
        return None
    value = _under_relu(store.value)
    channels = result.shape[1]
    assert isinstance(channels, int)
    if value is None:
        return None
    channel = mod(store.index, channels)
    form = _form(value, lambda load: _leaf(load, store.index, channel, region.buffers[load.buffer], result))
    image = Load(result.name, store.index, result.dtype)
    if form is None or image not in form.images or len(form.images) > 2:
        return None
    residual = next((load for load in form.images if load != image), None)
    factor = None if residual is None else form.images[residual]
    return ChannelSum(image, form.images[image], residual, factor, form.offsets, channel, channels)


def uncast(x: Scalar) -> Scalar:
    """`x` without the roundings and casts between floating types that are its last operations."""
    while isinstance(x, Op):
        inner = unrounded(x)
        if inner is x and x.name == "cast" and {x.dtype, x.args[0].dtype} <= {*_FLOATS}:
            inner = x.args[0]
        if inner is x:
            break
        x = inner
    return x


def _under_relu(value: Scalar) -> Scalar | None:
    value = uncast(value)
    if not isinstance(value, Op) or value.name != "maximum":
        return None
    others = [a for a in value.args if not (isinstance(a, Const) and a.value == 0)]
    return others[0] if len(others) == 1 else None


def _leaf(load: Load, element: Int, channel: Int, spec: BufferSpec, result: BufferSpec) -> _Form | None:
    if load.indirect or load.dtype not in _FLOATS:
        return None
    if load.index == element and (spec.shape, spec.strides) == (result.shape, result.strides):
        return _Form({load: None})
    return _Form(offsets=(load,)) if load.index == channel or isinstance(load.index, int) else None


def _form(value: Scalar, leaf: Callable[[Load], _Form | None]) -> _Form | None:
    forms: dict[Scalar, _Form | None] = {}
    for node in postorder((value,)):
        forms[node] = leaf(node) if isinstance(node, Load) else _combined(node, forms)
    return forms[value]


def _combined(node: Scalar, forms: Mapping[Scalar, _Form | None]) -> _Form | None:
    if isinstance(node, Const):
        return _Form(offsets=(node,))
    if not isinstance(node, Op):
        return None
    if uncast(node) is not node:
        return forms[uncast(node)]
    given = [forms[a] for a in node.args]
    if node.dtype not in _FLOATS or node.name not in _CHANNEL_OPS or any(f is None for f in given):
        return None
    operands = [f for f in given if f is not None]
    if not any(f.images for f in operands):
        return _Form(offsets=(node,))
    match node.name, operands:
        case "add", [a, b]:
            return a.plus(b)
        case "sub", [a, b] if not b.images:
            return a.plus(_Form(offsets=(Op("neg", (_wide(node.args[1]),), torch.float32),)))
        case "mul" | "truediv", [a, b] if not b.images:
            return a.scaled(node.name, node.args[1])
        case "mul", [a, b] if not a.images:
            return b.scaled(node.name, node.args[0])
    return None


def _wide(x: Scalar) -> Scalar:
    return cast(x, torch.float32)
