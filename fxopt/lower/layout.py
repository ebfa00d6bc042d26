"""Which nodes need memory, and in which layout."""

from __future__ import annotations

import operator
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from torch import fx

from fxopt.ir.exprs import Int, contiguous_strides
from fxopt.ir.region import Ref, Size
from fxopt.lower.opsets import MULTIPLE_VIEW_OPS, VIEW_OPS
from fxopt.lower.values import known_equal

if TYPE_CHECKING:
    from fxopt.lower.lowering import Lowering


def nodes_needing_memory(gm: fx.GraphModule, is_library: Callable[[fx.Node], bool]) -> set[fx.Node]:
    """Nodes whose value a library call or the caller reads, looking through views to the tensor behind them."""
    needed: set[fx.Node] = set()
    for node in gm.graph.nodes:
        if node.op == "output" or (node.op == "call_function" and is_library(node)):
            needed.update(behind_views(a) for a in node.all_input_nodes)
    return needed


def behind_views(node: fx.Node) -> fx.Node:
    """The tensor that `node` is a view of (itself when it is none)."""
    while node.op == "call_function" and _is_view(node) and node.all_input_nodes:
        node = node.all_input_nodes[0]
    return node


def _is_view(node: fx.Node) -> bool:
    """Whether `node` shares its first argument's memory: a view, or one of the parts of a tensor that was split."""
    if node.target is operator.getitem:
        node = node.all_input_nodes[0]
        return node.target in MULTIPLE_VIEW_OPS
    return node.target in VIEW_OPS or node.target in MULTIPLE_VIEW_OPS


def reader_count(node: fx.Node) -> int:
    """How many computations read `node`'s value, directly or through views."""
    return sum(reader_count(u) if u.op == "call_function" and u.target in VIEW_OPS else 1 for u in node.users)


def dense_strides(ctx: Lowering, val: Any) -> tuple[Int, ...]:
    """The strides torch gives this tensor if they are dense and do not overlap, else row-major ones.

    Dense means: sorted by stride, each stride is the product of the sizes below it.
    """
    shape, strides = ctx.sizes(val.shape), ctx.sizes(val.stride())
    if any(known_equal(s, 0) for s in shape):
        return strides
    todo = [(size, stride) for size, stride in zip(shape, strides, strict=True) if not known_equal(size, 1)]
    expected: Int = 1
    while todo:
        match = next((pair for pair in todo if pair[1] == expected), None)
        if match is None:
            return contiguous_strides(shape)
        todo.remove(match)
        expected = expected * match[0]
    return strides


PLAIN = (type(None), bool, int, float, complex, str, torch.dtype, torch.device, torch.layout, torch.memory_format, Ref, Size)


def is_plain_data(args: Any) -> bool:
    """True when every leaf of nested tuples, lists and dicts is something a Plan can hold."""
    if isinstance(args, (tuple, list)):
        return all(map(is_plain_data, args))
    if isinstance(args, dict):
        return all(map(is_plain_data, args.values()))
    return isinstance(args, PLAIN) and not isinstance(args, torch.SymInt)
