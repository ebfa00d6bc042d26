"""On GPUs the bias of a product is added by the generated kernel that reads the product, where one does.

That costs it nothing, while a library that adds a bias chooses among fewer kernels than for the product alone. The product
is rounded before the bias is added, and their sum is not: as many roundings as in eager. What a product kernel of ours has
for an epilogue is the same either way.
"""

from __future__ import annotations

import torch
from torch import fx

from fxopt.ir.spec import known_equal
from fxopt.passes.context import Context, apply_rules
from fxopt.passes.facts import arguments, needs_memory, tensor

aten = torch.ops.aten


def adds_bias_later(device: torch.device) -> bool:
    """Whether generated kernels add the bias of this device's products for nothing."""
    return device.type == "cuda"


def product_bias(context: Context) -> None:
    apply_rules(context, {"addmm": (bias_later,)})


def bias_later(context: Context, node: fx.Node) -> fx.Node | None:
    """addmm(bias, rows, weight) is mm(rows, weight) + bias, if only generated kernels read it."""
    given, result = arguments(node), tensor(node)
    bias = tensor(given["self"])
    if result is None or bias is None or not adds_bias_later(result.device) or not node.users or needs_memory(node):
        return None
    half = result.dtype in (torch.float16, torch.bfloat16) and bias.dtype == result.dtype
    if not half or bias.dim() != 1 or not known_equal(bias.shape[0], result.shape[1]):
        return None
    if given["alpha"] != 1 or given["beta"] != 1:
        return None
    plain = context.derive(aten.mm.default, (given["mat1"], given["mat2"]), node, symbolic=True)
    return None if plain is None else context.derive(aten.add.Tensor, (plain, given["self"]), node, symbolic=True)
