"""In training on GPUs a relu's gradient asks what went into the relu, where that costs no memory: after a norm, say.

Autograd asks the result. Kernels of the backward read that then, beside what the norm's gradients need: of a batch norm's
three operands, each read twice, one. What is below zero can be told from the norm's input, which is read anyway; to compute
the norm again is arithmetic that memory hides. A relu's result that nothing else wants is not saved any more.
"""

from __future__ import annotations

from collections.abc import Collection

import torch
from torch import fx

from fxopt.ir.graph import Phase
from fxopt.passes.context import Context
from fxopt.passes.facts import static_shape, tensor

aten = torch.ops.aten

POINTWISE = frozenset({aten.add.Tensor, aten.sub.Tensor, aten.mul.Tensor, aten._to_copy.default})
"""What is computed again, and what may stand between a value and the gradient that reads it."""
SMALL_SHARE = 16
"""A value with one element for so many of the relu's costs nothing to save or to read: statistics, weights of channels."""


def waits_for_memory(device: torch.device) -> bool:
    """Whether a norm computed again is hidden behind what kernels of this device load."""
    return device.type == "cuda"


def relu_masks(context: Context) -> None:
    if context.graph.phase is not Phase.JOINT:
        return
    late: set[fx.Node] | None = None
    for node in context.nodes:
        if context.exhausted:
            return
        before = _before_relu(node)
        value = tensor(before)
        if before is None or value is None or not waits_for_memory(value.device) or not static_shape(value):
            continue
        late = _of_gradients(context) if late is None else late
        read = _read_for(before, value.numel())
        if len(read) != 1 or not _is_read_by(next(iter(read)), late):
            context.reject("relu_masks", "what went into a relu is not known from one value that its gradient reads")
            continue
        mask = context.derive(aten.le.Scalar, (before, 0), node)
        if mask is not None:
            context.replace("before_relu", node, mask)


def _before_relu(node: fx.Node) -> fx.Node | None:
    """x, where `node` is relu(x) <= 0."""
    if node.target is not aten.le.Scalar or node.args[1] != 0:
        return None
    source = node.args[0]
    while isinstance(source, fx.Node) and source.target is aten.alias.default:
        source = source.args[0]
    if not isinstance(source, fx.Node) or source.target is not aten.relu.default:
        return None
    before = source.args[0]
    return before if isinstance(before, fx.Node) else None


def _of_gradients(context: Context) -> set[fx.Node]:
    """The nodes that depend on a result's gradient."""
    found: set[fx.Node] = set()
    for node in context.nodes:
        is_given = node.op == "placeholder" and str(node.target).startswith("tangents")
        if is_given or not found.isdisjoint(node.all_input_nodes):
            found.add(node)
    return found


def _read_for(node: fx.Node, count: int) -> set[fx.Node]:
    """The values that have to be read to compute `node`, of `count` elements, again; small ones do not count."""
    found, seen, waiting = set[fx.Node](), set[fx.Node](), [node]
    while waiting:
        each = waiting.pop()
        value = tensor(each)
        if each in seen or (value is not None and static_shape(value) and value.numel() * SMALL_SHARE <= count):
            continue
        seen.add(each)
        if each.target in POINTWISE:
            waiting += each.all_input_nodes
        else:
            found.add(each)
    return found


def _is_read_by(value: fx.Node, late: Collection[fx.Node]) -> bool:
    """Whether one of `late` reads `value`, or something that is computed of it element by element."""
    seen, waiting = set[fx.Node](), [value]
    while waiting:
        for user in waiting.pop().users:
            if user.target in POINTWISE and user in late:
                return True
            if user.target in POINTWISE and user not in seen:
                seen.add(user)
                waiting.append(user)
    return False
