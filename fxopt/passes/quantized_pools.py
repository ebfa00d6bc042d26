"""What is quantized after a max pooling is quantized before it, in the epilogue of the convolution that the pooling follows.

The largest of quantized values is the quantized largest, since a cast with one positive scale keeps order. So the
convolution writes, and the pooling reads, one byte an element where it was two. That is done for int8, whose values
kernels compare, and where windows overlap: others read each element once, and quantize less.

An integer has no NaN: quantized after the pooling, a window with one is zero, and before it the largest of its other values.
"""

from __future__ import annotations

import operator

import torch
from torch import fx

from fxopt.ir import ops
from fxopt.ir.quantized_convolution import SCALED_CONVOLUTION
from fxopt.passes.channel_affine import constants_of
from fxopt.passes.context import Context
from fxopt.passes.facts import arguments, escapes, tensor
from fxopt.passes.quantized_residuals import cast_chain

aten = torch.ops.aten

_CONVOLUTIONS = (aten.convolution.default, SCALED_CONVOLUTION)


def pools_on(device: torch.device) -> bool:
    """Whether kernels on this device compute what follows a convolution as they write its result."""
    return device.type == "cuda"


def quantized_pools(context: Context) -> None:
    for values in context.nodes:
        if context.exhausted:
            return
        chain = cast_chain(values)
        pool = None if chain is None or escapes(values) else _pooling(chain[-1])
        if chain is None or pool is None or not _keeps_order(context, chain) or not _follows_convolution(pool):
            continue
        earlier = _quantized_first(context, chain, pool)
        if earlier is not None and earlier.meta["val"].stride() == values.meta["val"].stride():
            context.replace("max_pool", values, earlier)


def _pooling(node: fx.Node) -> fx.Node | None:
    """The max pooling whose values are `node`, read once, if its windows overlap and nobody wants its indices."""
    if node.target is not operator.getitem or node.args[1] != 0 or len(node.users) != 1:
        return None
    pool = node.args[0]
    if not isinstance(pool, fx.Node) or pool.target is not aten.max_pool2d_with_indices.default or len(pool.users) != 1:
        return None
    given = arguments(pool)
    window = given["kernel_size"]
    step = given["stride"] or window
    overlap = any(w > step[-1 if len(step) == 1 else d] for d, w in enumerate(window))
    value = tensor(node)
    return pool if overlap and value is not None and pools_on(value.device) else None


def _keeps_order(context: Context, chain: list[fx.Node]) -> bool:
    """Whether the cast multiplies by one positive constant."""
    (product,) = (n for n in chain if n.target is aten.mul.Tensor)
    factor = product.args[1]
    if not isinstance(factor, fx.Node):
        return isinstance(factor, int | float) and factor > 0
    value = constants_of(context.graph)(factor)
    return value is not None and value.numel() == 1 and bool(value > 0)


def _follows_convolution(pool: fx.Node) -> bool:
    """Whether what is pooled is a convolution's result, or computed of that alone and of what is smaller, and read by nobody
    else.
    """
    node = pool.args[0]
    while isinstance(node, fx.Node) and len(node.users) == 1:
        if node.target in _CONVOLUTIONS:
            return True
        value = tensor(node)
        if value is None or node.op != "call_function" or ops.category(node.target) != "pointwise":
            return False
        large = [n for n in node.all_input_nodes if (t := tensor(n)) is not None and t.shape == value.shape]
        if len(large) != 1:
            return False
        node = large[0]
    return False


def _quantized_first(context: Context, chain: list[fx.Node], pool: fx.Node) -> fx.Node | None:
    """The values of `pool` on what `chain`, the last op first, makes of its operand."""
    values, made = chain[0], pool.args[0]
    for node in reversed(chain[:-1]):
        made = context.derive(node.target, (made, *node.args[1:]), values, dict(node.kwargs))
        if made is None:
            return None
    pooled = context.derive(pool.target, (made, *pool.args[1:]), values, dict(pool.kwargs))
    return None if pooled is None else context.derive(operator.getitem, (pooled, 0), values)
