"""What quantized convolutions read is stored in 8 bits alone, where it is a residual besides.

In a chain of blocks each result is read twice: quantized, by the next convolution, and as it is, by the addition at the end
of the next block. The addition then reads the quantized values as well, and the wide ones are never written, which is
most of what such a block writes and reads.

Values change as they do for the convolution: by half a step, and those beyond the calibration's range are clipped. That is
done for int8 only, whose values kernels read.
"""

from __future__ import annotations

import torch
from torch import fx

from fxopt.ir.quantized_convolution import SCALED_CONVOLUTION
from fxopt.ir.quantized_ops import DEQUANTIZE
from fxopt.passes.context import Context
from fxopt.passes.facts import escapes, tensor

aten = torch.ops.aten

_CAST = (aten._to_copy.default, aten.clamp.default, aten.round.default, aten.mul.Tensor)
"""What makes int8 of float32 values, the last op first (passes/quantize.py)."""


def quantized_residuals(context: Context) -> None:
    place = {node: k for k, node in enumerate(context.nodes)}
    done: set[fx.Node] = set()
    for node in context.nodes:
        if node.target is not SCALED_CONVOLUTION or context.exhausted:
            continue
        values, scale = node.args[0], node.args[2]
        assert isinstance(values, fx.Node) and isinstance(scale, fx.Node)
        if values in done:
            continue
        done.add(values)
        chain = cast_chain(values)
        if chain is None or escapes(chain[-1]):
            continue
        source = chain[-1]
        additions = [u for u in source.users if u not in chain]
        if additions and all(_is_residual(u, source) and place[u] > place[values] for u in additions):
            _read_quantized(context, source, values, scale, additions)


def cast_chain(values: fx.Node) -> list[fx.Node] | None:
    """The nodes between int8 `values` and the floating ones that they are made of, which come last."""
    held = tensor(values)
    if held is None or held.dtype != torch.int8:
        return None
    chain = [values]
    for target in _CAST:
        node = chain[-1]
        if node.target is not target or (node is not values and len(node.users) != 1):
            return None
        before = node.args[0]
        assert isinstance(before, fx.Node)
        chain.append(before)
    wide = chain[-1]
    if wide.target is aten._to_copy.default and set(wide.kwargs) == {"dtype"} and len(wide.users) == 1:
        narrow = wide.args[0]
        value = tensor(narrow)
        if isinstance(narrow, fx.Node) and value is not None and value.is_floating_point():
            chain.append(narrow)
    return chain


def _is_residual(user: fx.Node, source: fx.Node) -> bool:
    """Whether `user` adds `source`, once, to another tensor of its shape and dtype."""
    if user.target is not aten.add.Tensor or user.kwargs or len(user.args) != 2:
        return False
    left, right = user.args
    other = tensor(right if left is source else left)
    own = tensor(source)
    if other is None or own is None or left is right:
        return False
    return other.shape == own.shape and other.dtype == own.dtype


def _read_quantized(context: Context, source: fx.Node, values: fx.Node, scale: fx.Node, additions: list[fx.Node]) -> None:
    after = min(additions, key=context.nodes.index)
    read = context.derive(DEQUANTIZE, (values, scale, source.meta["val"].dtype), after, symbolic=True)
    if read is None:
        return
    context.spend("residual", source)
    for user in additions:
        user.replace_input_with(source, read)
    module = source.meta.get("module", "")
    context.journal.note("precision", f"{source.name} ({module}) is stored in int8 alone, for {len(additions)} residuals")
