"""Linear layers in fp8 while training: option `precision` without a calibration, in a graph that autograd records.

A layer y = x @ w.T has three products: y itself, the gradient of x, dy @ w, and that of w, dy.T @ x. Each becomes
`fxopt::scaled_mm` of operands in float8 (e4m3) with a scale for each row of the one and each column of the other, made of
the largest magnitude along what is summed over, in that very step ("dynamic scaling"): no history, no state, and gradients
need no range of their own. Sums, biases, weights and what the optimizer sees are as they were.

This is done to forward and backward as one graph, before the partitioner decides what is saved between them. A layer's
backward is told by its weight: a product of it, and the product that its gradient is.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx

from fxopt.ir import ops
from fxopt.ir.graph import Phase
from fxopt.ir.layers import LINEAR
from fxopt.ir.quantized_ops import SCALED_MM
from fxopt.passes.context import Context
from fxopt.passes.facts import is_contiguous, tensor
from fxopt.passes.quantize import TOPIC, scaled_rows
from fxopt.precision import HIGH, MULTIPLE, PRECISIONS, TRAINED
from fxopt.target import Target

aten = torch.ops.aten


@dataclass(frozen=True)
class _Trained:
    """A layer: its products, forward first, and its weight's placeholder."""

    name: str
    weight: fx.Node
    products: tuple[fx.Node, ...]


def fp8_training(context: Context) -> None:
    decisions = context.options.precision
    if context.graph.phase is not Phase.JOINT or decisions is None or context.options.calibration is not None:
        return
    for layer in _layers(context):
        name = decisions.of_layer(layer.name) or HIGH
        if name == HIGH:
            continue
        problem = f"training has {' and '.join(TRAINED)} only" if name not in TRAINED else _obstacle(layer)
        if problem is not None:
            context.journal.note(TOPIC, f"{layer.name} trains as it is, not in {name}: {problem}")
            context.reject(name, problem)
            continue
        done = sum(_rewritten(context, product) for product in layer.products)
        context.journal.note(TOPIC, f"{layer.name}: trains in fp8, {done} of {len(layer.products)} products")


# ---------------------------------------------------------------------- layers


def _layers(context: Context) -> list[_Trained]:
    """In the order of the graph."""
    nodes = context.nodes
    inputs = [n for n in nodes if n.op == "placeholder"]
    weights = {n for n in inputs if "tangents" not in n.name}
    late = _dependent([n for n in inputs if "tangents" in n.name])
    gradients = _gradients(context, [n for n in inputs if n in weights])
    seen: Counter[str] = Counter()
    found = []
    for node in nodes:
        operands = _operands(node)
        if operands is None or node in late:
            continue
        weight = _source(operands[1])
        if weight not in weights:
            continue
        backward = [n for n in nodes if n in late and (of := _operands(n)) is not None and _source(of[1]) is weight]
        own = gradients.get(weight)
        backward += [own] if own is not None and _operands(own) is not None else []
        module = node.meta.get("module", "")
        name = f"{module}#{seen[module]}" if seen[module] else module
        seen[module] += 1
        found.append(_Trained(name, weight, (node, *dict.fromkeys(backward))))
    return found


def _operands(node: fx.Node) -> tuple[fx.Node, fx.Node, fx.Node | None] | None:
    """Left and right operand [M, K] and [K, N] of a product, and its bias."""
    if node.target is aten.mm.default:
        return node.args[0], node.args[1], None  # type: ignore[return-value]
    if node.target is aten.addmm.default and not node.kwargs:
        return node.args[1], node.args[2], node.args[0]  # type: ignore[return-value]
    return None


def _source(node: fx.Node) -> fx.Node:
    """What `node` views or casts."""
    while node.op == "call_function" and (ops.is_view(node.target) or node.target is aten._to_copy.default):
        if len(node.all_input_nodes) != 1:
            break
        node = node.all_input_nodes[0]
    return node


def _dependent(sources: list[fx.Node]) -> set[fx.Node]:
    """All that is computed from `sources`."""
    found, left = set(sources), list(sources)
    while left:
        for user in left.pop().users:
            if user not in found:
                found.add(user)
                left.append(user)
    return found


def _gradients(context: Context, inputs: list[fx.Node]) -> dict[fx.Node, fx.Node]:
    """For each input that has one, its gradient without views and casts: the last results of a joint graph, in order."""
    results = torch.utils._pytree.tree_leaves(context.graph.gm.graph.output_node().args[0], is_leaf=lambda x: x is None)
    pairs = zip(inputs, results[len(results) - len(inputs) :], strict=True)
    return {given: _source(gradient) for given, gradient in pairs if isinstance(gradient, fx.Node)}


def _obstacle(layer: _Trained) -> str | None:
    for product in layer.products:
        operands = _operands(product)
        assert operands is not None
        a, b = tensor(operands[0]), tensor(operands[1])
        if a is None or b is None or a.dtype != b.dtype or a.dtype not in (torch.float16, torch.bfloat16, torch.float32):
            return "an operand is not floating, or they differ"
        sizes = (*a.shape, b.shape[1])
        if not all(isinstance(size, int) and size > 0 for size in sizes):
            return "its sizes are known only at run time"
        if a.device.type != "cuda":
            continue
        if any(size % MULTIPLE for size in sizes):
            return f"a product of {' x '.join(map(str, sizes))}: on a GPU all have to be multiples of {MULTIPLE}"
        if torch.cuda.is_available() and not Target.current(a.device).has_float8:
            return "its GPU does not multiply float8"
    return None


# ---------------------------------------------------------------------- products


def _rewritten(context: Context, product: fx.Node) -> bool:
    operands = _operands(product)
    if operands is None or context.exhausted:
        return False
    left, right, bias = operands
    turned = _derive(context, aten.t.default, (right,), product)
    a, b = _narrow(context, left, product), _narrow(context, turned, product)
    if a is None or b is None:
        return False
    value = product.meta["val"]
    own = bias if bias is not None and tuple(bias.meta["val"].shape) == (value.shape[1],) else None
    result = _derive(context, SCALED_MM, (a[0], b[0], a[1], b[1], own, value.dtype), product)
    if bias is not own:
        result = _derive(context, aten.add.Tensor, (result, bias), product)
    return result is not None and context.replace(LINEAR, product, result)


def _narrow(context: Context, x: fx.Node | None, product: fx.Node) -> tuple[fx.Node, fx.Node] | None:
    """`x` [R, K] in float8 with K contiguous, and the scales of its rows [R]."""
    if x is not None and not is_contiguous(x.meta["val"]):
        x = _derive(context, aten.clone.default, (x,), product, {"memory_format": torch.contiguous_format})
    if x is not None and x.meta["val"].dtype != torch.float32:
        x = _derive(context, aten._to_copy.default, (x,), product, {"dtype": torch.float32})
    if x is None:
        return None
    largest = PRECISIONS["fp8"].largest
    made = scaled_rows(lambda target, args: _derive(context, target, args, product), x, largest)
    clamped = _derive(context, aten.clamp.default, (made[0], -largest, largest), product)
    cast = _derive(context, aten._to_copy.default, (clamped,), product, {"dtype": torch.float8_e4m3fn})
    return None if cast is None or made[1] is None else (cast, made[1])


def _derive(
    context: Context, target: Any, args: tuple[Any, ...], product: fx.Node, kwargs: dict[str, Any] | None = None
) -> fx.Node | None:
    """None where an argument is, or propagation fails."""
    if args[0] is None:
        return None
    return context.derive(target, args, product, kwargs, symbolic=True)
