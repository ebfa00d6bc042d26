"""What the pass `quantize` asks of attention: which calls can be had in fp8, and how a value has to lie."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import fx

from fxopt.ir.attention_backends import enabled_backends
from fxopt.ir.layers import AttentionLayer
from fxopt.passes.facts import static_shape, tensor
from fxopt.precision import MULTIPLE, misfit_of_attention
from fxopt.target import Target

aten = torch.ops.aten

MASK_DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.bool)
"""What kernels of attention read."""


def obstacle_of_attention(layer: AttentionLayer, precision: str, given: dict[str, Any]) -> str | None:
    """Why a call, with the arguments `given`, cannot have a precision; None if it can."""
    operands = [tensor(x) for x in layer.operands.values()]
    known = [x for x in operands if x is not None]
    if len(known) < 3 or not all(static_shape(x) and x.numel() for x in known):
        return "its sizes are known only at run time"
    half = all(x.dtype in (torch.float16, torch.bfloat16) for x in known)
    problem = misfit_of_attention(precision, [x.shape[3] for x in known], half)
    if problem is not None:
        return problem
    if given["dropout_p"]:
        return "it drops"
    problem = "kernels of ours are switched off" if kernels_are_off() else obstacle_of_mask(given)
    if problem is not None:
        return problem
    device = known[0].device
    if device.type == "cuda" and torch.cuda.is_available() and not Target.current(device).has_float8:
        return "its GPU does not multiply float8"
    return None


def kernels_are_off() -> bool:
    """Whether attention is left to torch: without kernels of ours, operands in 8 bits would only be widened again."""
    return torch.are_deterministic_algorithms_enabled() or len(enabled_backends()) < 2


def obstacle_of_mask(given: dict[str, Any]) -> str | None:
    """Why kernels of ours do not take the mask; None if they do, or there is none."""
    mask = tensor(given["attn_mask"])
    if mask is None:
        return None
    if given["is_causal"]:
        return "it has a mask and is causal"
    return None if mask.dtype in MASK_DTYPES else f"its mask is {mask.dtype}"


def rows_last(derive: Callable[..., fx.Node], value: fx.Node) -> fx.Node:
    """`value` [B, G, T, E] as [B, G, E, T + padding] in its own memory: tensor cores read float8 along what they sum over,
    and each feature's rows begin at a multiple of 16 bytes. `derive(op, arguments, kwargs=...)` makes nodes."""
    turned = derive(aten.transpose.int, (value, 2, 3))
    padding = -value.meta["val"].shape[2] % MULTIPLE
    if padding:
        return derive(aten.constant_pad_nd.default, (turned, [0, padding], 0.0))
    return derive(aten.clone.default, (turned,), kwargs={"memory_format": torch.contiguous_format})
