"""Convolutions on GPUs run channels-last, whatever layout the model was written in.

Tensor cores multiply along the channels, so cuDNN's half-precision and TF32 kernels want them side by side in memory; given
row-major operands it transposes each one before a call and the result after it. Here an operand of a convolution or of its
backward that is not channels-last becomes a clone in that layout, and the strides of all that is computed from the result
are propagated again. So the layout spreads by itself through activations, norms, pooling and residual sums up to the next
convolution, and a clone is left only where something else reaches one: at inputs of the graph, at weights (once a call;
folded where they are frozen) and after what computes in another layout. Kernels write a clone's layout at no cost.

Where that does not pay, as with few channels, only those convolutions are converted that the library computes channels-last
as they are, because one of their operands is: it would transpose the others itself.

What is seen from outside keeps its strides: `strides.py` says how.

The pass runs on inference graphs, and on joint graphs before they are split: activations saved for the backward then
have the strides in which both sides compute.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import fx

from fxopt.ir.graph import Phase
from fxopt.ir.precision import convolutions_use_tf32
from fxopt.ir.spec import known_equal
from fxopt.passes.context import Context
from fxopt.passes.facts import arguments, tensor
from fxopt.passes.strides import StrideWalk, channels_at_the_end, has_strides, is_dense, owns_memory

aten = torch.ops.aten

FORMATS = {4: torch.channels_last, 5: torch.channels_last_3d}
"""Dimensions of a convolution's tensors -> their channels-last layout."""

OPERANDS: dict[Any, tuple[str, ...]] = {
    aten.convolution.default: ("input", "weight"),
    aten.convolution_backward.default: ("grad_output", "input", "weight"),
}
"""The ops that are given channels-last operands, with the names of those."""

MIN_CHANNELS = 16
"""Convolutions from or into fewer channels leave most of a tensor core's rows empty in either layout."""


def prefers_channels_last(device: torch.device) -> bool:
    """Whether the convolution library of this device is faster on channels-last operands."""
    return device.type == "cuda"


def channels_last(context: Context) -> None:
    if context.graph.phase not in (Phase.INFERENCE, Phase.JOINT):
        return
    found = [c for n in context.nodes if (c := _convolution(n)) is not None]
    if not found:
        return
    reason = _obstacle(found)
    if reason is not None:
        found = [c for c in found if _runs_channels_last(c.node.meta["val"])]
        if not found:
            context.reject("channels_last", reason)
            return
    walk = _Walk(context, convolutions={c.node for c in found})
    for node in context.nodes:
        walk.visit(node)


@dataclass(frozen=True)
class Convolution:
    """A convolution, or the backward of one, that could run channels-last. `inside`, `outside`: channels of one group."""

    node: fx.Node
    weight: torch.Tensor
    groups: int
    inside: Any
    outside: Any
    places: int | None
    """Positions of the window in one image; None where sizes are symbolic."""

    @property
    def is_dense(self) -> bool:
        return all(isinstance(c, int) and c >= MIN_CHANNELS for c in (self.inside, self.outside))

    @property
    def is_depthwise(self) -> bool:
        return self.groups > 1 and known_equal(self.weight.shape[1], 1)


def _convolution(node: fx.Node) -> Convolution | None:
    if node.op != "call_function" or node.target not in OPERANDS:
        return None
    given = arguments(node)
    operands = [tensor(given[name]) for name in OPERANDS[node.target]]
    weight = operands[-1]
    if weight is None or any(x is None or x.dim() not in FORMATS or not _suits(x) for x in operands):
        return None
    groups = given["groups"]
    first, second = weight.shape[0], weight.shape[1]
    inside, outside = (first // groups, second) if given["transposed"] else (second, first // groups)
    # The window's positions make the smaller image: a transposed convolution's input, the result of any other.
    result = operands[0] if len(operands) == 3 else tensor(node)
    image = operands[-2] if given["transposed"] else result
    sized = image is not None and all(isinstance(s, int) for s in (*image.shape[2:], *weight.shape))
    return Convolution(node, weight, groups, inside, outside, math.prod(image.shape[2:]) if sized else None)  # type: ignore[union-attr]


def _suits(x: torch.Tensor) -> bool:
    """cuDNN has channels-last kernels for half precision; for float32 they pay when they may use TF32."""
    if not prefers_channels_last(x.device):
        return False
    return x.dtype in (torch.float16, torch.bfloat16) or (x.dtype == torch.float32 and convolutions_use_tf32())


def _obstacle(found: list[Convolution]) -> str | None:
    """Why the graph's layout stays. Compared is the arithmetic of each kind, or that for one position of the window where
    sizes are symbolic."""
    dense, depthwise = [c for c in found if c.is_dense], [c for c in found if c.is_depthwise]
    if not dense:
        return f"no convolution from {MIN_CHANNELS} channels or more into as many"
    sized = all(c.places is not None for c in found)

    def work(kind: list[Convolution]) -> Any:
        return sum(math.prod(c.weight.shape) * ((c.places or 1) if sized else 1) for c in kind)

    return "most of the arithmetic is in depthwise convolutions" if work(dense) < work(depthwise) else None


@dataclass
class _Walk(StrideWalk):
    """Also gives `convolutions` operands in channels-last layout."""

    convolutions: set[fx.Node] = field(default_factory=set)

    def visit(self, node: fx.Node) -> None:
        if not has_strides(node):
            return
        given = (node.args, node.kwargs)
        cloned = node in self.convolutions and not self.context.exhausted and self._convert_operands(node)
        if not cloned and not any(a in self.traced for a in node.all_input_nodes):
            return
        self.settle(node)
        if cloned and not _all_channels_last(node.meta["val"]):
            self._take_back(node, given)
        elif cloned:
            self.context.spend("convolution", node)
        if node in self.traced and owns_memory(node):
            self.show_as_traced(node)

    def _convert_operands(self, node: fx.Node) -> bool:
        """Give a convolution channels-last operands; whether one of them had another layout."""
        given = arguments(node)
        operands = [given[name] for name in OPERANDS[node.target]]
        wrong = [x for x in operands if not _is_channels_last(x.meta["val"])]
        if wrong:
            self.clone_operands(node, wrong, FORMATS[wrong[0].meta["val"].dim()])
        return bool(wrong)

    def _take_back(self, node: fx.Node, given: tuple[Any, Any]) -> None:
        """The library computes this convolution row by row whatever it is given."""
        self.context.reject("convolution", "the library has no channels-last kernel")
        node.args, node.kwargs = given
        for key, clone in list(self.clones.items()):
            if not clone.users:
                self.context.graph.gm.graph.erase_node(clone)
                del self.clones[key]
        self.settle(node)


def _is_channels_last(value: torch.Tensor) -> bool:
    return is_dense(value, channels_at_the_end(value.dim()))


def _all_channels_last(value: Any) -> bool:
    """Of a convolution's result, or of all gradients that its backward gives but that of the bias."""
    return all(map(_is_channels_last, _images(value)))


def _runs_channels_last(value: Any) -> bool:
    """Whether a convolution's result, as it was traced, shows the layout: where all sizes of an image are 1, none does."""
    shown = any(not is_dense(v, list(range(v.dim()))) for v in _images(value))
    return shown and _all_channels_last(value)


def _images(value: Any) -> list[torch.Tensor]:
    values = value if isinstance(value, tuple | list) else (value,)
    return [v for v in values if isinstance(v, torch.Tensor) and v.dim() in FORMATS]
