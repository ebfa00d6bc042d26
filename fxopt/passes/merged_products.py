"""Products of one operand with several frozen weights become one product with the weights side by side.

The projections of query, key and value, the gate and up layers of a gated MLP: each reads the same rows. One product over
all their columns reads those once, is one launch instead of several, and leaves fewer multiprocessors idle: the tiles of
all columns together need at most as many rounds as the tiles of each part. For few rows, where weights' bytes decide, more
loads are in flight. What reads one of the results reads columns of the merged one, in place: attention and kernels take
strides, and halves of a product are a form of the product templates (a gated layer).

Merged are products that work for the same next one: results which, through attention and whatever else has no weight of its
own, reach a common product with a weight. So a layer that has an epilogue of its own, as the MLP beside the attention of a
parallel block, keeps it. Biases are merged as well, with zeros for who has none.

Results that the graph returns keep eager's strides, so columns of a merged one cannot stand for them. Those of as many
columns each become one batch of products instead, each result a matrix of that: one launch, with as few idle
multiprocessors, and every matrix as dense as before. Biases are added after it, in half precision by the epilogue of a
kernel of ours. Few rows stay apart: products of one row have a kernel together already.

Products of quantized weights are merged likewise, with their scales: the same rows, in the same form.

Only frozen weights (CONSTANT inputs): others would be copied at each call. The merged weight is a constant of its own beside
the module's parameters, so a merged layer's weights take their memory twice.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx

from fxopt.ir import ops
from fxopt.ir.graph import Role
from fxopt.ir.layers import is_view_of
from fxopt.ir.quantized_ops import SCALED_MM, WEIGHT_ONLY_MM
from fxopt.passes.constant_folding import embed
from fxopt.passes.context import Context
from fxopt.passes.facts import arguments, escapes, is_contiguous, static_shape, tensor
from fxopt.passes.strides import StrideWalk

aten = torch.ops.aten

ALIGNMENT = 16
"""Bytes at which each part of a merged row begins, so that whoever reads it can load as much at a time."""

FEW_ROWS = 64
"""Of products that are returned, those of no more rows are not made a batch."""

MOST_VISITED = 400
"""Nodes looked at between a product and the next ones, in a graph that has none for long."""

Constants = dict[fx.Node, torch.Tensor]
Merge = Callable[[Context, "list[Part]", Constants, StrideWalk], None]

_PRODUCTS = (aten.mm.default, aten.addmm.default)
_QUANTIZED: dict[Any, tuple[str, str, str]] = {
    SCALED_MM: ("b", "scale_b", "bias"),
    WEIGHT_ONLY_MM: ("weight", "scale", "bias"),
}
"""Products of quantized weights, and the names of their weight, scales and bias."""

_NEXT = frozenset({"mm", "addmm", "linear", "convolution", "fxopt::scaled_mm", "fxopt::weight_only_mm"})


def merges(device: torch.device) -> bool:
    """Whether one wide product is faster there than several: on CPUs, threads share out each, and columns are copied."""
    return device.type == "cuda"


@dataclass(frozen=True)
class Part:
    """`node` multiplies rows by `weight` [K, N], a view of a frozen input, and adds `bias` [N], such an input or None.

    The weight lies in memory row by row, or (`turned`) column by column, as that of a linear layer. That of a quantized
    product is [N, K] and has scales, [N] or [N, groups].
    """

    node: fx.Node
    weight: fx.Node
    turned: bool
    bias: fx.Node | None
    scales: fx.Node | None = None

    @property
    def columns(self) -> int:
        return int(self.node.meta["val"].shape[1])


def merged_products(context: Context) -> None:
    constants = _constants(context)
    if not constants:
        return
    walk = StrideWalk(context)
    for group, merge in list(_groups(context, constants)):
        if context.exhausted:
            break
        merge(context, group, constants, walk)
    if walk.traced:
        for node in context.nodes:
            walk.visit(node)


def _constants(context: Context) -> dict[fx.Node, torch.Tensor]:
    """The frozen inputs with their values."""
    placeholders = (n for n in context.nodes if n.op == "placeholder")
    given = zip(placeholders, context.graph.inputs, strict=True)
    return {n: i.value for n, i in given if i.role is Role.CONSTANT and i.value is not None}


def _groups(context: Context, constants: Constants) -> Iterator[tuple[list[Part], Merge]]:
    """Products that may be merged, two or more at a time, in the order of the graph, and how."""
    by_operand: dict[Any, list[Part]] = defaultdict(list)
    for node in context.nodes:
        part, operand = _part(node, constants)
        if part is not None:
            value = node.meta["val"]
            by_operand[operand, part.turned, value.dtype].append(part)
    for parts in by_operand.values():
        returned = [part for part in parts if escapes(part.node)]
        inner = [part for part in parts if part not in returned]
        if len(inner) > 1:
            yield from ((group, _merge) for group in _with_a_common_aim(context, inner))
        for columns in dict.fromkeys(part.columns for part in returned):
            alike = [part for part in returned if part.columns == columns]
            if len(alike) > 1 and _may_be_a_batch(alike):
                yield alike, _batch


def _part(node: fx.Node, constants: Constants) -> tuple[Part | None, Any]:
    """`node` as a part of a merged product, with the operand that all parts share."""
    value = tensor(node)
    if node.op != "call_function" or value is None or not merges(value.device):
        return None, None
    if node.target in _QUANTIZED:
        return _quantized_part(node, constants)
    if node.target not in _PRODUCTS:
        return None, None
    given = arguments(node)
    rows, weight, bias = given["self"], given["mat2"], None
    if node.target is aten.addmm.default:
        rows, bias = given["mat1"], given["self"]
        if given["beta"] != 1 or given["alpha"] != 1 or bias not in constants:
            return None, None
    turned, columns = _is_turned(weight.meta["val"]), value.shape[1]
    if turned is None or not is_view_of(weight, constants):
        return None, None
    if rows in constants or columns * value.element_size() % ALIGNMENT:
        return None, None
    if bias is not None and (bias.meta["val"].shape != (columns,) or bias.meta["val"].dtype != value.dtype):
        return None, None
    return Part(node, weight, turned, bias), rows


def _quantized_part(node: fx.Node, constants: Constants) -> tuple[Part | None, Any]:
    """`_part` of a product with a quantized weight; what the parts share is everything but weight, scales and bias."""
    given = arguments(node)
    names = _QUANTIZED[node.target]
    weight, scales, bias = (given.pop(name) for name in names)
    if weight not in constants or scales not in constants or not (bias is None or bias in constants) or escapes(node):
        return None, None
    columns, value = weight.meta["val"].shape[0], node.meta["val"]
    layouts = [n.meta["val"] for n in (weight, scales) if n is not None]
    if not all(is_contiguous(x) for x in layouts) or columns * value.element_size() % ALIGNMENT:
        return None, None
    if not scales.meta["val"].dim() or (bias is not None and bias.meta["val"].dtype not in (value.dtype, torch.float32)):
        return None, None
    shared = (node.target, *given.values(), weight.meta["val"].dtype, scales.meta["val"].shape[1:])
    return Part(node, weight, True, bias, scales), shared


def _is_turned(weight: torch.Tensor) -> bool | None:
    """Whether a matrix lies in memory column by column; None where it has gaps or its sizes are not known."""
    rows, columns = weight.shape
    if not static_shape(weight) or weight.stride() not in ((columns, 1), (1, rows)):
        return None
    return weight.stride(0) == 1


def _with_a_common_aim(context: Context, parts: list[Part]) -> Iterator[list[Part]]:
    """`parts` in groups of those whose results reach a common product."""
    groups: list[tuple[set[fx.Node], list[Part]]] = []
    for part in parts:
        aims = _aims(part.node)
        found = next((g for g in groups if g[0] & aims), None)
        if found is None:
            groups.append((aims, [part]))
        else:
            found[0].update(aims)
            found[1].append(part)
    for _, group in groups:
        if len(group) > 1:
            yield group
        else:
            context.reject("merged_products", "its result is for another product than those of its operand's others")


def _aims(node: fx.Node) -> set[fx.Node]:
    """The first products with a weight that `node` reaches."""
    found, seen, stack = set(), {node}, [node]
    while stack and len(seen) < MOST_VISITED:
        for user in stack.pop().users:
            if user.op != "call_function" or user in seen:
                continue
            seen.add(user)
            if ops.name_of(user.target) in _NEXT:
                found.add(user)
            else:
                stack.append(user)
    return found


def _merge(context: Context, parts: list[Part], constants: Constants, walk: StrideWalk) -> None:
    """One product in the place of the first of `parts`; `walk` learns of the columns that stand for each."""
    first = parts[0].node
    merged, start = _merged(context, parts, constants, first), 0
    for part in parts:
        if context.exhausted:
            return
        stop = start + part.columns
        columns = (
            None if merged is None else context.derive(aten.slice.Tensor, (merged, 1, start, stop), part.node, symbolic=True)
        )
        if columns is None:
            context.reject("merged_products", "the merged weight or product cannot be computed")
            return
        start, before = stop, part.node.meta["val"]
        context.replace("columns", part.node, columns)
        walk.traced[columns] = before
        walk.show_as_traced(columns)


def _may_be_a_batch(parts: list[Part]) -> bool:
    """Whether so many rows are known to be multiplied that it pays, and biases cost no pass of their own."""
    value = parts[0].node.meta["val"]
    if not static_shape(value) or value.shape[0] <= FEW_ROWS:
        return False
    return value.dtype in (torch.float16, torch.bfloat16) or all(part.bias is None for part in parts)


def _batch(context: Context, parts: list[Part], constants: Constants, walk: StrideWalk) -> None:
    """A batch of products in the place of the first of `parts`, of which each is a matrix."""
    product = _batched(context, parts, constants, parts[0].node)
    for number, part in enumerate(parts):
        if context.exhausted:
            return
        matrix = None if product is None else context.derive(aten.select.int, (product, 0, number), part.node)
        if matrix is None or matrix.meta["val"].stride() != part.node.meta["val"].stride():
            context.reject("merged_products", "the batch of weights or products cannot be computed")
            return
        context.replace_by_part("batch", part.node, matrix)


def _batched(context: Context, parts: list[Part], constants: Constants, first: fx.Node) -> fx.Node | None:
    """The products [parts, M, N], with biases, before `first`."""
    given = arguments(first)
    rows = given["mat1"] if first.target is aten.addmm.default else given["self"]
    weights = _stacked(context, parts, constants)
    if weights is None:
        return None
    one = context.derive(aten.unsqueeze.default, (rows, 0), first)
    shared = None if one is None else context.derive(aten.expand.default, (one, [len(parts), -1, -1]), first)
    product = None if shared is None else context.derive(aten.bmm.default, (shared, weights), first)
    if product is None or all(p.bias is None for p in parts):
        return product
    value = first.meta["val"]
    zeros = {"dtype": value.dtype, "device": value.device}
    biases = [p.bias or context.derive(aten.full.default, ([p.columns], 0.0), first, zeros) for p in parts]
    bias = context.derive(aten.cat.default, (biases, 0), first)
    each = None if bias is None else context.derive(aten.view.default, (bias, [len(parts), 1, parts[0].columns]), first)
    return None if each is None else context.derive(aten.add.Tensor, (product, each), first)


def _stacked(context: Context, parts: list[Part], constants: Constants) -> fx.Node | None:
    """The weights as one constant [parts, K, N], in the memory order of each. None where memory is short."""
    turned = parts[0].turned
    try:
        values = [_value(p.weight, constants) for p in parts]
        value = torch.stack([w.t() for w in values]).mT if turned else torch.stack(values)
    except RuntimeError:
        return None
    joined = context.derive(aten.stack.default, ([p.weight for p in parts],), parts[0].node)
    if joined is None or hasattr(value, "fake_mode"):
        return None
    joined.meta["val"] = joined.meta["val"].new_empty_strided(value.shape, value.stride())
    return embed(context, joined, value)


def _merged(context: Context, parts: list[Part], constants: Constants, first: fx.Node) -> fx.Node | None:
    """The product over all columns, before `first`."""
    given = arguments(first)
    if first.target in _QUANTIZED:
        return _merged_quantized(context, parts, constants, first, given)
    rows = given["mat1"] if first.target is aten.addmm.default else given["self"]
    weight = _side_by_side(context, parts, constants)
    if weight is None:
        return None
    if all(p.bias is None for p in parts):
        return context.derive(aten.mm.default, (rows, weight), first, symbolic=True)
    bias = _biases(context, parts, first)
    return None if bias is None else context.derive(aten.addmm.default, (bias, rows, weight), first, symbolic=True)


def _biases(context: Context, parts: list[Part], first: fx.Node) -> fx.Node | None:
    """The biases side by side, zeros for who has none."""
    dtypes = {p.bias.meta["val"].dtype for p in parts if p.bias is not None}
    dtype = dtypes.pop() if len(dtypes) == 1 else torch.float32
    biases = [_bias(context, part, dtype, first) for part in parts]
    return None if any(b is None for b in biases) else context.derive(aten.cat.default, (biases, 0), first)


def _bias(context: Context, part: Part, dtype: torch.dtype, first: fx.Node) -> fx.Node | None:
    if part.bias is None:
        zeros = {"dtype": dtype, "device": first.meta["val"].device}
        return context.derive(aten.full.default, ([part.columns], 0.0), first, zeros)
    if part.bias.meta["val"].dtype == dtype:
        return part.bias
    return context.derive(aten._to_copy.default, (part.bias,), first, {"dtype": dtype})


def _merged_quantized(
    context: Context, parts: list[Part], constants: Constants, first: fx.Node, given: dict[str, Any]
) -> fx.Node | None:
    """The product over all columns of quantized weights."""
    weight, scales, bias = _QUANTIZED[first.target]
    joined = [_joined(context, [p.weight for p in parts], constants, first)]
    joined.append(_joined(context, [p.scales for p in parts if p.scales is not None], constants, first))
    added = None if all(p.bias is None for p in parts) else _biases(context, parts, first)
    if any(n is None for n in joined) or (added is None and any(p.bias is not None for p in parts)):
        return None
    given = given | dict(zip((weight, scales, bias), (*joined, added), strict=True))
    return context.derive(first.target, tuple(given.values()), first, symbolic=True)


def _joined(context: Context, nodes: list[fx.Node], constants: Constants, before: fx.Node) -> fx.Node | None:
    """Constants one below the other, as one; None where memory is short."""
    try:
        value = torch.cat([constants[n].detach() for n in nodes])
    except RuntimeError:  # torch's OutOfMemoryError is one
        return None
    joined = context.derive(aten.cat.default, (nodes, 0), before)
    return None if joined is None or hasattr(value, "fake_mode") else embed(context, joined, value)


def _side_by_side(context: Context, parts: list[Part], constants: Constants) -> fx.Node | None:
    """The weights as one constant [K, all N], in the memory order of each. None where memory is short: joined
    at each call instead of once, they would cost more than several products.
    """
    turned = parts[0].turned
    try:
        weights = [_value(p.weight, constants) for p in parts]
        value = torch.cat([w.t() for w in weights]).t() if turned else torch.cat(weights, 1)
    except RuntimeError:  # torch's OutOfMemoryError is one
        return None
    joined = context.derive(aten.cat.default, ([p.weight for p in parts], 1), parts[-1].node)
    if joined is None or hasattr(value, "fake_mode"):
        return None
    joined.meta["val"] = joined.meta["val"].new_empty_strided(value.shape, value.stride())
    return embed(context, joined, value)


def _value(node: fx.Node, constants: Constants) -> torch.Tensor:
    """What a frozen input or a view of one is."""
    if node in constants:
        return constants[node].detach()
    args, kwargs = fx.node.map_arg((node.args, dict(node.kwargs)), lambda n: _value(n, constants))
    with torch.no_grad():
        value: torch.Tensor = node.target(*args, **kwargs)  # type: ignore[operator]
    return value
