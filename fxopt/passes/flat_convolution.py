"""On GPUs a convolution over one dimension, as over time, is one over two of which the first has one element.

So torch computes it anyway. As an image's it gets what is known of images' convolutions: channels-last operands, fused calls
and kernels of ours with what stands around it.
"""

from __future__ import annotations

import torch
from torch import fx

from fxopt.ir.graph import Phase
from fxopt.passes.channels_last import prefers_channels_last
from fxopt.passes.context import Context, Rule, apply_rules
from fxopt.passes.facts import arguments, tensor

aten = torch.ops.aten


def flat_convolution(context: Context) -> None:
    if context.graph.phase is Phase.INFERENCE:
        apply_rules(context, RULES)


def with_one_row(context: Context, node: fx.Node) -> fx.Node | None:
    """convolution(x [N, C, L], weight) is convolution(x [N, C, 1, L], weight [.., .., 1, K]) without that dimension."""
    given, result = arguments(node), tensor(node)
    if result is None or result.dim() != 3 or not prefers_channels_last(result.device):
        return None
    given["input"], given["weight"] = (
        context.derive(aten.unsqueeze.default, (given[name], 2), node, symbolic=True) for name in ("input", "weight")
    )
    for name, along_one_row in (("stride", 1), ("padding", 0), ("dilation", 1), ("output_padding", 0)):
        given[name] = [along_one_row, *given[name]]
    if given["input"] is None or given["weight"] is None:
        return None
    image = context.derive(aten.convolution.default, tuple(given.values()), node, symbolic=True)
    row = None if image is None else context.derive(aten.squeeze.dim, (image, 2), node, symbolic=True)
    return row if row is not None and row.meta["val"].stride() == result.stride() else None


RULES: dict[str, tuple[Rule, ...]] = {"convolution": (with_one_row,)}
"""Op name -> rules, tried in order."""
