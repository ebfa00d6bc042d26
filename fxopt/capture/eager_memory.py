"""What eager would hold at its peak, by the lifetimes of an ATen graph's values: a number to compare a plan's with."""

from __future__ import annotations

import itertools
from collections.abc import Iterator

import torch
from torch import fx
from torch.utils import _pytree as pytree

from fxopt.ir import ops
from fxopt.ir.graph import Graph


def eager_peak(graph: Graph, device: torch.device) -> int | None:
    """Most bytes on `device` that eager would hold at a time beside the graph's inputs; None where sizes are symbolic.

    Ops that come from the decomposition of one count as that one, whose own temporary memory is not known. A value is
    thought to end with its last use, as it does unless Python keeps a reference for longer.
    """
    nodes = list(graph.gm.graph.nodes)
    kernel = dict(zip(nodes, _kernels(nodes), strict=True))
    owner: dict[fx.Node, fx.Node] = {}
    last: dict[fx.Node, int] = {}
    for node in nodes:
        for argument in node.all_input_nodes:
            if argument in owner:
                last[owner[argument]] = kernel[node]
        if node.op == "call_function":
            first = next(iter(node.all_input_nodes), None)
            if not ops.is_view(node.target):
                owner[node] = node
            elif first in owner:
                owner[node] = owner[first]
    changes = [0] * (max(kernel.values(), default=0) + 2)
    for node, end in last.items():
        size = _nbytes(node, device)
        if size is None:
            return None
        if end > kernel[node]:
            changes[kernel[node]] += size
            changes[end + 1] -= size
    return max(itertools.accumulate(changes))


def _kernels(nodes: list[fx.Node]) -> Iterator[int]:
    """For each node the number of the eager kernel that it is part of."""
    number, before = -1, None
    for node in nodes:
        original = node.meta.get("original_aten")
        own = None if original is None else (original, node.meta.get("seq_nr"), node.meta.get("stack_trace"))
        number += own is None or own != before
        before = own
        yield number


def _nbytes(node: fx.Node, device: torch.device) -> int | None:
    total = 0
    for value in pytree.tree_leaves(node.meta.get("val")):
        if isinstance(value, torch.Tensor) and value.device == device:
            if not isinstance(value.numel(), int):
                return None
            total += value.numel() * value.dtype.itemsize
    return total
