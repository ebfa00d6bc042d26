"""Maximum pooling whose positions only its own backward reads saves one byte for each instead of eight."""

from __future__ import annotations

import math
import operator
from typing import Any

import torch
from torch import fx
from torch._guards import detect_fake_mode

from fxopt.ir import pool_ops

aten = torch.ops.aten


def save_pool_offsets(joint: fx.GraphModule) -> int:
    """Rewrite such pools on GPUs, with their backwards, in the joint graph; returns how many there were."""
    pools = joint.graph.find_nodes(op="call_function", target=aten.max_pool2d_with_indices.default)
    count = sum(map(_rewrite, pools))
    if count:
        joint.recompile()
    return count


def _rewrite(pool: fx.Node) -> bool:
    window = _window(pool)
    values = pool.meta.get("val")
    if window is None or not values or values[0].device.type != "cuda":
        return False
    positions = [u for u in pool.users if u.target is operator.getitem and u.args[1] == 1]
    backwards = [user for position in positions for user in position.users]
    if not backwards or any(u.target is not operator.getitem for u in pool.users):
        return False
    if not all(b.target is aten.max_pool2d_with_indices_backward.default and b.args[7] in positions for b in backwards):
        return False
    mode = detect_fake_mode(values)
    if mode is None:
        return False
    with mode:
        narrow = torch.empty_like(values[1], dtype=torch.int8)
    pool.target, pool.args, pool.kwargs = pool_ops.max_pool_offsets, (pool.args[0], *window), {}
    pool.meta["val"] = (values[0], narrow)
    for position in positions:
        position.meta["val"] = narrow
    for backward in backwards:
        grad, x, *_, offsets = backward.args
        backward.target = pool_ops.max_pool_offsets_backward
        backward.args = (grad, x, *window, offsets)
    for node in (pool, *positions, *backwards):
        node.meta.pop("tensor_meta", None)
    return True


def _window(pool: fx.Node) -> tuple[Any, ...] | None:
    """(kernel, stride, padding, ceil_mode) in full; None for what the offsets do not cover."""
    if pool.kwargs:
        return None
    given: list[Any] = [*pool.args[1:]]
    kernel, stride, padding, dilation, ceil_mode = given + [(), (), (0,), (1,), False][len(given) :]
    kernel = _pair(kernel)
    stride, padding = _pair(stride or kernel), _pair(padding)
    if math.prod(kernel) > pool_ops.MAX_TAPS or _pair(dilation) != [1, 1]:
        return None
    return kernel, stride, padding, ceil_mode


def _pair(given: Any) -> list[int]:
    values = [given] if isinstance(given, int) else list(given)
    return values * 2 if len(values) == 1 else values
