"""On GPUs the bias of a convolution is added by the kernel after it, and its gradient summed by the one before.

cuDNN knows no bias: torch adds it in place after the call, a pass over the result that a generated kernel makes anyway, and
sums its gradient in a kernel of its own. As ATen ops of their own both fuse with what stands around them.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import fx

from fxopt.ir import ops
from fxopt.ir.graph import Phase
from fxopt.ir.spec import known_equal
from fxopt.passes.context import Context, Rule, apply_rules
from fxopt.passes.facts import arguments, is_contiguous, tensor

aten = torch.ops.aten


def adds_bias_apart(device: torch.device) -> bool:
    """Whether convolutions of this device add their bias in a pass of its own."""
    return device.type == "cuda"


def convolution_bias(context: Context) -> None:
    if context.graph.phase in (Phase.INFERENCE, Phase.JOINT):
        apply_rules(context, RULES)


def bias_apart(context: Context, node: fx.Node) -> fx.Node | None:
    """convolution(x, weight, bias) is convolution(x, weight) + bias."""
    given = arguments(node)
    bias, result = given["bias"], tensor(node)
    if bias is None or result is None or not adds_bias_apart(result.device) or _has_own_kernel(given, result):
        return None
    operands = (given["input"], given["weight"], None, *node.args[3:])
    plain = context.derive(aten.convolution.default, operands, node, dict(node.kwargs), symbolic=True)
    shape = [-1, *[1] * (result.dim() - 2)]
    column = context.derive(aten.view.default, (bias, shape), node, symbolic=True)
    return None if plain is None or column is None else context.derive(aten.add.Tensor, (plain, column), node, symbolic=True)


def _has_own_kernel(given: dict[str, Any], result: torch.Tensor) -> bool:
    """Row-major depthwise convolutions are often torch's own, which take a bias."""
    weight = tensor(given["weight"])
    return given["groups"] != 1 and weight is not None and known_equal(weight.shape[1], 1) and is_contiguous(result)


def bias_gradient_apart(context: Context, node: fx.Node) -> fx.Node | None:
    """The gradient of the bias is the sum of the result's over all but the channels."""
    given = arguments(node)
    gradient, mask = given["grad_output"], given["output_mask"]
    held = tensor(gradient)
    if not mask[2] or held is None or not adds_bias_apart(held.device):
        return None
    picked = [u for u in node.users if u.target is ops.GETITEM and u.args[1] == 2]
    dims = [d for d in range(held.dim()) if d != 1]
    for item in picked:
        total = context.derive(aten.sum.dim_IntList, (gradient, dims), item, symbolic=True)
        if total is None or not context.replace("bias_gradient", item, total):
            return None
    kept: dict[str, Any] = {**given, "output_mask": [*mask[:2], False]}
    return context.derive(aten.convolution_backward.default, tuple(kept.values()), node, symbolic=True)


RULES: dict[str, tuple[Rule, ...]] = {"convolution": (bias_apart,), "convolution_backward": (bias_gradient_apart,)}
"""Op name -> rules, tried in order."""
