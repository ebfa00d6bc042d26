"""Masks of fxopt's attention ops in the form that fused kernels take, made once instead of at every call.

Given a boolean mask, or one whose strides do not suit them, the fused backends convert and pad it in every layer, or leave
the call to the decomposed form. Here a mask that hides nothing disappears (models build one from position indices, and
folding has shown by now that it is all true), and a boolean one becomes an additive one in the query's dtype, row-major,
with rows padded to 16 bytes and without the dimensions it is merely broadcast along. Layers that share a mask share the
result.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import fx

from fxopt.ir import ops
from fxopt.ir.attention_backends import MASK_ALIGNMENT
from fxopt.ir.attention_op import attention, attention_backward, attention_forward
from fxopt.passes.context import Context
from fxopt.passes.facts import arguments, static_shape, tensor, uniform_value

aten = torch.ops.aten
ATTENTION = (attention, attention_forward, attention_backward)


def attention_mask(context: Context) -> None:
    for node in context.nodes:
        if context.exhausted:
            return
        if node.op != "call_function" or node.target not in ATTENTION:
            continue
        mask = arguments(node).get("attn_mask")
        held = tensor(mask)
        if not isinstance(mask, fx.Node) or held is None or held.dtype != torch.bool:
            continue
        if uniform_value(mask) is True:
            _give(context, "hides_nothing", node, None)
        elif static_shape(held):
            bias = _bias(context, node, mask, held)
            if bias is not None:
                _give(context, "additive", node, bias)


def _give(context: Context, rule: str, node: fx.Node, mask: fx.Node | None) -> None:
    """Make `mask` the mask of this call; its result does not change."""
    context.spend(rule, node)
    given = {**arguments(node), "attn_mask": mask}
    positional = [a.name for a in ops.schema(node.target).arguments if not a.kwarg_only]
    node.args = tuple(given.pop(name) for name in positional)
    node.kwargs = given


def _bias(context: Context, node: fx.Node, mask: fx.Node, held: torch.Tensor) -> fx.Node | None:
    """0 where `mask` is true and minus infinity elsewhere, in the layout described above."""
    query = arguments(node)["query"].meta["val"]
    kwargs = {"dtype": query.dtype, "device": held.device}
    core: fx.Node | None = mask
    for dim in range(held.dim() - 2):
        if core is not None and held.shape[dim] > 1 and held.stride(dim) == 0:
            core = context.derive(aten.slice.Tensor, (core, dim, 0, 1), node)
    zero = context.derive(aten.full.default, ([], 0.0), node, kwargs)
    hidden = context.derive(aten.full.default, ([], float("-inf")), node, kwargs)
    if core is None or zero is None or hidden is None:
        return None
    steps: list[tuple[Any, tuple[Any, ...], dict[str, Any]]] = [(aten.where.self, (zero, hidden), {})]
    columns = held.shape[-1]
    if columns % MASK_ALIGNMENT:
        steps.append((aten.constant_pad_nd.default, ([0, -columns % MASK_ALIGNMENT], float("-inf")), {}))
    steps.append((aten.clone.default, (), {"memory_format": torch.contiguous_format}))
    if columns % MASK_ALIGNMENT:
        steps.append((aten.slice.Tensor, (held.dim() - 1, 0, columns), {}))
    out: fx.Node | None = core
    for target, rest, options in steps:
        out = None if out is None else context.derive(target, (out, *rest), node, options)
    return out
