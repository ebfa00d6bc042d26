"""Convolutions on GPUs run channels-last, whatever layout the model was written in.

Tensor cores multiply along the channels, so cuDNN's half-precision and TF32 kernels want them side by side in memory; given
row-major operands it transposes each one before a call and the result after it. Here an operand of a convolution or of its
backward that is not channels-last becomes a clone in that layout, and the strides of all that is computed from the result
are propagated again. So the layout spreads by itself through activations, norms, pooling and residual sums up to the next
convolution, and a clone is left only where something else reaches one: at inputs of the graph, at weights (once a call;
folded where they are frozen) and after what computes in another layout. Kernels write a clone's layout at no cost.

What is seen from outside keeps its strides, and so does the memory behind it: outputs and the views of them, and operands of
calls of which nothing is known. There the value is cloned back, once.

The pass runs on inference graphs, and on joint graphs before they are split: activations saved for the backward then
have the strides in which both sides compute.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import fx

from fxopt.errors import UnsupportedError
from fxopt.ir import ops
from fxopt.ir.graph import Phase
from fxopt.ir.precision import convolutions_use_tf32
from fxopt.ir.spec import COPY_INTO, fake_mode, known_equal, propagation
from fxopt.passes.context import Context
from fxopt.passes.facts import arguments, tensor

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

FOLLOWING = frozenset({"pointwise", "reduction", "scan", "view", "indexing", "factory", "contraction", "getitem"})
"""Categories of ops whose values do not depend on the strides of their operands ..."""

FOLLOWING_CALLS = frozenset(
    "avg_pool2d avg_pool2d_backward avg_pool3d avg_pool3d_backward _adaptive_avg_pool2d _adaptive_avg_pool2d_backward "
    "_adaptive_avg_pool3d _adaptive_avg_pool3d_backward max_pool2d_with_indices max_pool2d_with_indices_backward "
    "max_pool3d_with_indices max_pool3d_with_indices_backward upsample_bicubic2d fxopt::max_pool_offsets "
    "fxopt::max_pool_offsets_backward".split()
)
"""... and names of others, which have kernels for both layouts."""

BY_STRIDES = frozenset("as_strided as_strided_scatter as_strided_copy _reshape_alias _int_mm _scaled_mm".split())
"""Names in FOLLOWING's categories of ops that read memory by its strides, or that take only some."""


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
        context.reject("channels_last", reason)
        return
    walk = _Walk(context, {c.node for c in found})
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
    """Why the graph stays as it is. Compared is the arithmetic of each kind, or that for one position of the window where
    sizes are symbolic."""
    dense, depthwise = [c for c in found if c.is_dense], [c for c in found if c.is_depthwise]
    if not dense:
        return f"no convolution from {MIN_CHANNELS} channels or more into as many"
    sized = all(c.places is not None for c in found)

    def work(kind: list[Convolution]) -> Any:
        return sum(math.prod(c.weight.shape) * ((c.places or 1) if sized else 1) for c in kind)

    return "most of the arithmetic is in depthwise convolutions" if work(dense) < work(depthwise) else None


@dataclass
class _Walk:
    """One pass over the nodes, in order. `traced` has the values of tracing of all nodes whose strides have changed."""

    context: Context
    convolutions: set[fx.Node]
    traced: dict[fx.Node, Any] = field(default_factory=dict)
    clones: dict[tuple[fx.Node, torch.memory_format], fx.Node] = field(default_factory=dict)

    def visit(self, node: fx.Node) -> None:
        if node.op != "call_function" or node.target is COPY_INTO or _is_size(node):
            return
        given = (node.args, node.kwargs)
        cloned = node in self.convolutions and not self.context.exhausted and self._convert_operands(node)
        if not cloned and not any(a in self.traced for a in node.all_input_nodes):
            return
        if not self._propagate(node):  # a view of rows that are no longer one after the other, say
            self._clone_operands(node, [a for a in node.all_input_nodes if a in self.traced], torch.contiguous_format)
            self._propagate(node)
        if cloned and not _all_channels_last(node.meta["val"]):
            self._take_back(node, given)
        elif cloned:
            self.context.spend("convolution", node)
        if node in self.traced and _owns_memory(node):
            self._show_as_traced(node)

    def _convert_operands(self, node: fx.Node) -> bool:
        """Give a convolution channels-last operands; whether one of them had another layout."""
        given = arguments(node)
        operands = [given[name] for name in OPERANDS[node.target]]
        wrong = [x for x in operands if not _is_channels_last(x.meta["val"])]
        if wrong:
            self._clone_operands(node, wrong, FORMATS[wrong[0].meta["val"].dim()])
        return bool(wrong)

    def _clone_operands(self, node: fx.Node, operands: list[fx.Node], layout: torch.memory_format) -> None:
        for operand in operands:
            node.replace_input_with(operand, self._clone(operand, layout, node))

    def _clone(self, operand: fx.Node, layout: torch.memory_format, user: fx.Node) -> fx.Node:
        known = self.clones.get((operand, layout))
        if known is None:
            known = self._copy(operand, user, layout)
            self.clones[operand, layout] = known
        return known

    def _copy(self, node: fx.Node, before: fx.Node, layout: torch.memory_format) -> fx.Node:
        clone = self.context.emit(aten.clone.default, (node,), before, {"memory_format": layout})
        with propagation(fake_mode(self.context.graph)):
            _set_value(clone, node.meta["val"].clone(memory_format=layout))
        return clone

    def _take_back(self, node: fx.Node, given: tuple[Any, Any]) -> None:
        """The library computes this convolution row by row whatever it is given."""
        self.context.reject("convolution", "the library has no channels-last kernel")
        node.args, node.kwargs = given
        for key, clone in list(self.clones.items()):
            if not clone.users:
                self.context.graph.gm.graph.erase_node(clone)
                del self.clones[key]
        if not self._propagate(node):
            self._clone_operands(node, [a for a in node.all_input_nodes if a in self.traced], torch.contiguous_format)
            self._propagate(node)

    def _propagate(self, node: fx.Node) -> bool:
        """Give `node` the value that follows from its operands' values; False where there is none."""
        before = self.traced.get(node, node.meta["val"])
        value = self.context.propagate(node.target, node.args, node.kwargs, symbolic=True)
        if value is None:
            return False
        self.traced.pop(node, None)
        if _moved(value, before):
            self.traced[node] = before
        _set_value(node, value if node in self.traced else before)
        return True

    def _show_as_traced(self, owner: fx.Node) -> None:
        """Have those uses of new memory for which its strides matter, or those of its views, see it as it was traced."""
        strict = [u for u in owner.users if _by_strides(u)]
        if not strict:
            return
        shown = self._as_traced(owner, self.traced[owner], owner.next)
        for user in strict:
            user.replace_input_with(owner, shown)

    def _as_traced(self, owner: fx.Node, traced: torch.Tensor, before: fx.Node) -> fx.Node:
        """A copy of `owner` with the strides of `traced`: row-major, after the dimensions are sorted by stride."""
        order = _order(traced)
        if order is None:
            raise UnsupportedError(f"{owner.name} was traced with strides that are not dense: {traced.stride()}")
        straight = order == sorted(order)
        sorted_by_stride = owner if straight else self._permuted(owner, order, before)
        copy = self._copy(sorted_by_stride, before, torch.contiguous_format)
        shown = copy if straight else self._permuted(copy, [order.index(d) for d in range(len(order))], before)
        for made in {sorted_by_stride, copy, shown} - {owner}:
            made.meta = {**owner.meta, "val": made.meta["val"], "pass": self.context.pass_name}
        _set_value(shown, traced)
        return shown

    def _permuted(self, node: fx.Node, order: list[int], before: fx.Node) -> fx.Node:
        permuted = self.context.emit(aten.permute.default, (node, order), before)
        with propagation(fake_mode(self.context.graph)):
            _set_value(permuted, node.meta["val"].permute(order))
        return permuted


def _set_value(node: fx.Node, value: Any) -> None:
    node.meta["val"] = value
    node.meta.pop("tensor_meta", None)


def _is_size(node: fx.Node) -> bool:
    """Arithmetic on sizes, and the sizes of tensors (but neither their strides nor their offsets)."""
    name = ops.name_of(node.target)
    return ops.is_symbolic(node.target) and "stride" not in name and "offset" not in name


def _owns_memory(node: fx.Node) -> bool:
    """Whether `node` is a tensor in new memory: no view, and no tuple of tensors but each of its members."""
    if tensor(node) is None:
        return False
    source: Any = node.args[0] if node.target is ops.GETITEM else node
    return not ops.is_view(source.target)


def _by_strides(user: fx.Node) -> bool:
    """Whether the strides of what `user` reads are seen outside: by the caller, or by a call of which nothing is known."""
    if user.op == "output":
        return True
    if user.target is COPY_INTO or _is_size(user):
        return False
    if not _follows(user):
        return True
    return ops.is_view(user.target) and any(map(_by_strides, user.users))


def _follows(node: fx.Node) -> bool:
    name = ops.name_of(node.target)
    if name in BY_STRIDES or node.target is aten.view.dtype:
        return False
    return ops.category(node.target) in FOLLOWING or name in FOLLOWING_CALLS


def _moved(value: Any, before: Any) -> bool:
    """Whether two values of one node differ in strides (those of dimensions of size 1 are free)."""
    if isinstance(value, tuple | list):
        return any(_moved(v, b) for v, b in zip(value, before, strict=True))
    if not isinstance(value, torch.Tensor):
        return False
    strides = zip(value.shape, value.stride(), before.stride(), strict=True)
    return any(not known_equal(a, b) for size, a, b in strides if not known_equal(size, 1))


def _is_dense(value: torch.Tensor, order: list[int]) -> bool:
    """Whether the dimensions, in this order, are known to lie in memory without gaps, the last one's elements adjacent."""
    expected: Any = 1
    for d in reversed(order):
        if known_equal(value.shape[d], 1):
            continue
        if not known_equal(value.stride(d), expected):
            return False
        expected = expected * value.shape[d]
    return True


def _is_channels_last(value: torch.Tensor) -> bool:
    return _is_dense(value, _channels_at_the_end(value.dim()))


def _all_channels_last(value: Any) -> bool:
    """Of a convolution's result, or of all gradients that its backward gives but that of the bias."""
    values = value if isinstance(value, tuple | list) else (value,)
    return all(_is_channels_last(v) for v in values if isinstance(v, torch.Tensor) and v.dim() in FORMATS)


def _channels_at_the_end(dims: int) -> list[int]:
    return [0, *range(2, dims), 1]


def _order(value: torch.Tensor) -> list[int] | None:
    """The dimensions by falling stride, for a dense tensor; None for any other."""
    orders = [list(range(value.dim())), _channels_at_the_end(value.dim())] if value.dim() > 1 else [list(range(value.dim()))]
    if all(isinstance(s, int) for s in value.stride()):
        orders.append(sorted(range(value.dim()), key=lambda d: value.stride(d), reverse=True))
    return next((order for order in orders if _is_dense(value, order)), None)
