"""The ops that plans name, as functions to call."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

import fxopt.ir.linear_cross_entropy_op
import fxopt.ir.quantized_convolution
import fxopt.ir.quantized_ops  # noqa: F401  (these define ops that plans name)
from fxopt.errors import PlanError
from fxopt.ir.attention_backends import cudnn_backward
from fxopt.ir.attention_op import attend, attend_backward, attend_forward
from fxopt.runtime import draws

DIRECT: dict[str, Callable[..., Any]] = {
    "aten::mm.default": torch.mm,
    "aten::mm.out": torch.mm,
    "aten::addmm.default": torch.addmm,
    "aten::addmm.out": torch.addmm,
    "aten::bmm.default": torch.bmm,
    "aten::bmm.out": torch.bmm,
    "aten::baddbmm.default": torch.baddbmm,
    "aten::baddbmm.out": torch.baddbmm,
    "aten::convolution.default": torch.convolution,
    "fxopt::attention.default": attend,
    "fxopt::attention_forward.default": attend_forward,
    "fxopt::attention_backward.default": attend_backward,
    draws.SEED: draws.draw,
    "aten::_scaled_dot_product_cudnn_attention_backward.default": cudnn_backward,
}
"""Ops that models call most, as functions with the same parameters that reach the kernel with less Python in between: 1 to
5 us less a call than through the OpOverload. The last one is here for its values, the seed for captured runs."""


def resolve_op(op: str) -> Callable[..., Any]:
    """The torch op named "namespace::name.overload". Raises PlanError when this process has none of that name."""
    if op in DIRECT:
        return DIRECT[op]
    namespace, _, rest = op.partition("::")
    packet, _, overload = rest.partition(".")
    try:
        found: Callable[..., Any] = getattr(getattr(getattr(torch.ops, namespace), packet), overload or "default")
    except (AttributeError, RuntimeError) as error:
        raise PlanError(f"plan.steps: there is no op {op!r} here; import the library that defines it first") from error
    return found
