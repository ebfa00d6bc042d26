"""Which layer makes what another layer is given, where nothing is between them but what scales as its input does.

If f is an activation like relu, a pooling, a cast or a view, f(s * x) = s * f(x) for positive s, and each channel by itself:
then one may be divided in the weight before f and multiplied in the one after it (quant/equalize.py). Norms that do not
train are part of the layer before them: their factors are its `gains`.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import fx

from fxopt.ir import ops
from fxopt.ir.graph import Graph
from fxopt.ir.layers import CHANNEL, Layer
from fxopt.passes.channel_affine import channel_affine, constants_of
from fxopt.passes.facts import arguments, tensor

aten = torch.ops.aten

_BY_CHANNEL = frozenset(
    "relu leaky_relu _to_copy clone max_pool2d_with_indices fxopt::max_pool_offsets avg_pool2d _adaptive_avg_pool2d".split()
)
"""Positively homogeneous ops whose result has the channels of their first argument, in the same dimension."""

_RESHAPES = frozenset("view _unsafe_view reshape".split())


@dataclass(frozen=True, eq=False)
class Producer:
    """`layer` makes the operand, whose channel j is the layer's output channel j // `repeats`; those were multiplied by
    `gains` [channels], float32 on the CPU (None: one)."""

    layer: str
    repeats: int
    gains: torch.Tensor | None


@dataclass(frozen=True)
class _Made:
    """What a layer and the constants after it make, in `node`."""

    layer: Layer
    gains: torch.Tensor | None


class Producers:
    """Of the `layers` of `graph`."""

    def __init__(self, graph: Graph, layers: Iterable[Layer]) -> None:
        known = constants_of(graph)
        self._made: dict[fx.Node, _Made] = {}
        for layer in layers:
            after = channel_affine(layer.node, layer.shape[0], known)
            gains = None if after.factor is None else after.factor.abs().float().cpu()
            self._made[after.last] = _Made(layer, gains)

    def of(self, x: fx.Node) -> Producer | None:
        """Of what a layer is given, whose channels are in dimension CHANNEL."""
        path: list[fx.Node] = []
        node = x
        while node not in self._made:
            source = node.args[0] if _passes_channels(node) else None
            if not isinstance(source, fx.Node):
                return None
            path.append(node)
            node = source
        made = self._made[node]
        channels = made.layer.shape[0]
        place: tuple[int, int] | None = (CHANNEL, 1)
        for step in reversed(path):
            place = None if place is None else _followed(step, channels, *place)
        if place is None or place[0] != CHANNEL:
            return None
        return Producer(made.layer.name, place[1], made.gains)


def _passes_channels(node: fx.Node) -> bool:
    if node.op != "call_function":
        return False
    if node.target is ops.GETITEM:
        return node.args[1:] == (0,)
    name = ops.name_of(node.target) if ops.is_overload(node.target) else ""
    return name in _BY_CHANNEL or name in _RESHAPES or name in ("permute", "transpose", "mean")


def _followed(node: fx.Node, channels: int, dim: int, repeats: int) -> tuple[int, int] | None:
    """(dimension, neighbours of one channel) of the result of `node`, from those of its input; None where the channels do
    not lie so in the result."""
    if node.target is ops.GETITEM:
        return dim, repeats
    name, source = ops.name_of(node.target), node.args[0]
    given, made = tensor(source), tensor(node)
    if given is None:
        return None
    if name in _BY_CHANNEL:
        return (dim, repeats) if "pool" not in name or dim < given.dim() - 2 else None
    if made is None:
        return None
    if name == "permute":
        order: list[int] = [d % given.dim() for d in arguments(node)["dims"]]
        return order.index(dim), repeats
    if name == "transpose":
        settings = arguments(node)
        first, second = settings["dim0"] % given.dim(), settings["dim1"] % given.dim()
        return {first: second, second: first}.get(dim, dim), repeats
    if name == "mean":
        return _after_mean(node, given.dim(), dim, repeats)
    return _after_view(given, made, channels, dim, repeats)


def _after_mean(node: fx.Node, dims: int, dim: int, repeats: int) -> tuple[int, int] | None:
    settings = arguments(node)
    reduced = {d % dims for d in settings.get("dim") or range(dims)}
    if dim in reduced:
        return None
    return dim if settings["keepdim"] else dim - sum(d < dim for d in reduced), repeats


def _after_view(given: torch.Tensor, made: torch.Tensor, channels: int, dim: int, repeats: int) -> tuple[int, int] | None:
    """Element n of a row-major tensor has channel (n // period) % channels, whatever its shape."""
    after = given.shape[dim + 1 :]
    if not all(isinstance(size, int) for size in after):
        return None
    period = math.prod(after) * repeats
    inner = 1
    for d in reversed(range(made.dim())):
        size = made.shape[d]
        if not isinstance(size, int):
            return None
        if period % inner == 0 and size == channels * (period // inner):
            return d, period // inner
        inner *= size
    return None
