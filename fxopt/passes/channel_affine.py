"""What multiplies and shifts the channels of a convolution's result by constants: a bias, a batch normalization that does
not train. A quantized convolution scales its channels anyway, so that these cost nothing there.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import fx

from fxopt.ir import ops
from fxopt.ir.graph import Graph, Role
from fxopt.ir.layers import CHANNEL
from fxopt.passes.facts import escapes, tensor

aten = torch.ops.aten

_CONSTANT_CATEGORIES = frozenset({"pointwise", "view", "factory"})


@dataclass(frozen=True)
class ChannelAffine:
    """`last` is factor * first + offset, channel by channel, of which nobody reads what is between. float64 [channels]; None
    where `last` is `first` but for its dtype.
    """

    last: fx.Node
    factor: torch.Tensor | None
    offset: torch.Tensor | None


def channel_affine(first: fx.Node, channels: int, known: Callable[[fx.Node], torch.Tensor | None]) -> ChannelAffine:
    """The longest chain of additions and multiplications by channels' constants, and casts, over the result `first`.

    `known` gives the value of a node that is a constant, None for others.
    """
    found = ChannelAffine(first, None, None)
    while len(found.last.users) == 1 and not escapes(found.last):
        following = _with(found, next(iter(found.last.users)), channels, known)
        if following is None:
            break
        found = following
    return found


def value_of(graph: Graph, node: fx.Node) -> torch.Tensor:
    """The value of a frozen input, or of what is computed from such and nothing else."""
    if node.op == "placeholder":
        given = next(i for i in graph.inputs if i.name in (node.name, node.target))
        assert given.value is not None
        return given.value.detach()
    args, kwargs = fx.node.map_arg((node.args, dict(node.kwargs)), lambda n: value_of(graph, n))
    with torch.no_grad():
        value: torch.Tensor = node.target(*args, **kwargs)  # type: ignore[operator]
    return value


def constants_of(graph: Graph) -> Callable[[fx.Node], torch.Tensor | None]:
    """`value_of` for nodes that are computed element by element from frozen inputs and nothing else; None for others."""
    placeholders = (n for n in graph.gm.graph.nodes if n.op == "placeholder")
    frozen = {n for n, given in zip(placeholders, graph.inputs, strict=True) if given.role is Role.CONSTANT}

    def is_constant(node: fx.Node) -> bool:
        if node.op != "call_function":
            return node in frozen
        return ops.category(node.target) in _CONSTANT_CATEGORIES and all(map(is_constant, node.all_input_nodes))

    return lambda node: value_of(graph, node) if is_constant(node) else None


def _with(
    found: ChannelAffine, user: fx.Node, channels: int, known: Callable[[fx.Node], torch.Tensor | None]
) -> ChannelAffine | None:
    """`found` and what `user` does to it; None for anything else."""
    last, result = found.last, tensor(user)
    if result is None or not result.is_floating_point() or result.dtype == torch.float64:
        return None
    if user.target is aten._to_copy.default:
        return ChannelAffine(user, found.factor, found.offset) if set(user.kwargs) == {"dtype"} else None
    if user.target not in (aten.add.Tensor, aten.sub.Tensor, aten.mul.Tensor) or user.kwargs or len(user.args) != 2:
        return None
    left, right = user.args
    other = right if left is last else left
    if not isinstance(other, fx.Node) or other is last or (user.target is aten.sub.Tensor and left is not last):
        return None
    vector = _of_channels(other, channels, tensor(last), known)
    if vector is None:
        return None
    zeros, ones = torch.zeros_like(vector), torch.ones_like(vector)
    factor = ones if found.factor is None else found.factor
    offset = zeros if found.offset is None else found.offset
    if user.target is aten.mul.Tensor:
        return ChannelAffine(user, factor * vector, offset * vector)
    return ChannelAffine(user, factor, offset + vector if user.target is aten.add.Tensor else offset - vector)


def _of_channels(
    node: fx.Node, channels: int, image: torch.Tensor | None, known: Callable[[fx.Node], torch.Tensor | None]
) -> torch.Tensor | None:
    """The value of a constant that has one number for each channel of `image`, float64 [channels]."""
    held = tensor(node)
    if held is None or image is None or not held.is_floating_point() or held.dim() > image.dim():
        return None
    shape = [1] * (image.dim() - held.dim()) + list(held.shape)
    wanted = [channels if d == CHANNEL else 1 for d in range(image.dim())]
    if shape != wanted:
        return None
    value = known(node)
    return None if value is None else value.detach().double().reshape(channels)
