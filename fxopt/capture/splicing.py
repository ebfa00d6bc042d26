"""A traced function put into a graph in the place of a call."""

from __future__ import annotations

import functools
import operator
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, fx
from torch._subclasses.fake_tensor import FakeTensor
from torch.utils import _pytree as pytree


def splice(gm: fx.GraphModule, node: fx.Node, traced: fx.GraphModule, given: Sequence[fx.Node], mode: Any) -> Any:
    """Copy the calls of `traced` for `node` to where nodes are inserted into `gm`, on the nodes `given`.

    Returns the nodes of its results. `mode` is the FakeTensorMode of the graph's values.
    """
    operands, made = iter(given), dict[fx.Node, fx.Node]()
    result: Any = None
    for step in traced.graph.nodes:
        if step.op == "placeholder":
            made[step] = next(operands)
        elif step.op == "output":
            result = fx.node.map_arg(step.args[0], made.__getitem__)
        else:
            made[step] = _copied(gm, node, step, made, mode)
    return result


def _copied(gm: fx.GraphModule, node: fx.Node, step: fx.Node, made: dict[fx.Node, fx.Node], mode: Any) -> fx.Node:
    """A copy of `step` for `node`, with a value of its own: shared ones would look like shared memory."""
    copy = gm.graph.node_copy(step, lambda n: made[n])
    call: Any = step.target
    if call is operator.getitem:
        copy.meta = {**node.meta, "val": copy.args[0].meta["val"][copy.args[1]]}  # type: ignore[union-attr]
        return copy
    if all(returned.alias_info is None for returned in call._schema.returns):
        copy.meta = {**node.meta, "val": pytree.tree_map(functools.partial(like, mode), step.meta["val"])}
        return copy
    args, kwargs = fx.node.map_arg((copy.args, copy.kwargs), lambda n: n.meta["val"])
    with mode:
        copy.meta = {**node.meta, "val": call(*args, **kwargs)}
    return copy


def like(mode: Any, value: Tensor) -> Tensor:
    """A new fake of `value`'s layout. No mode may be active."""
    memory = torch.empty_strided(*sizes(value), dtype=value.dtype, device="meta")
    return FakeTensor(mode, memory, value.device)


def sizes(value: Tensor) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Shape and strides, all of which are known."""
    return tuple(map(int, value.shape)), tuple(map(int, value.stride()))
