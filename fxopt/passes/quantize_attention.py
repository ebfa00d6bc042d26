"""What the pass `quantize` asks of attention: which calls can be had in fp8, and how a value has to lie."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import fx

from fxopt.ir.layers import AttentionLayer
from fxopt.passes.facts import static_shape, tensor
from fxopt.precision import MULTIPLE, misfit_of_attention
from fxopt.target import Target

aten = torch.ops.aten


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
    device = known[0].device
    if device.type == "cuda" and torch.cuda.is_available() and not Target.current(device).has_float8:
        return "its GPU does not multiply float8"
    return None


def rows_last(derive: Callable[..., fx.Node], value: fx.Node) -> fx.Node:
    """`value` [B, G, T, E] as [B, G, E, T + padding] in its own memory: tensor cores read float8 along what they sum over,
    and each feature's rows begin at a multiple of 16 bytes. `derive(op, arguments, kwargs=...)` makes nodes."""
    turned = derive(aten.transpose.int, (value, 2, 3))
    padding = -value.meta["val"].shape[2] % MULTIPLE
    if padding:
        return derive(aten.constant_pad_nd.default, (turned, [0, padding], 0.0))
    return derive(aten.clone.default, (turned,), kwargs={"memory_format": torch.contiguous_format})
