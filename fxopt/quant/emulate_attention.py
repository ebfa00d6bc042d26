"""Attention in fp8 in eager: the arithmetic of the kernel in floating point, on any device."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.overrides import TorchFunctionMode

from fxopt.ir.quantized_attention import steps_by_groups
from fxopt.precision import misfit_of_attention
from fxopt.quant.ranges import FP8

LARGEST_PROBABILITY = 256.0
"""What the kernel multiplies probabilities by before it rounds them."""


@dataclass(frozen=True)
class AttentionCall:
    """One call of `scaled_dot_product_attention` as it runs: query [B, H, S, E], key [B, G, T, E], value [B, G, T, Ev]."""

    name: str
    query: Tensor
    key: Tensor
    value: Tensor
    mask: Tensor | None
    is_causal: bool
    scale: float | None
    enable_gqa: bool


Attend = Callable[[AttentionCall], Tensor | None]
"""What a call returns instead of its result; None leaves it as it is."""


class Attentions(TorchFunctionMode):
    """While this lasts, calls of `scaled_dot_product_attention` return what `attend` makes of them, if that is a tensor.

    `name` gives the next call's. Calls with dropout, and those of other than four dimensions, are left alone, and so is
    attention inside `torch.nn.MultiheadAttention`, which torch calls where no mode sees it.
    """

    def __init__(self, attend: Attend, name: Callable[[], str | None]) -> None:
        super().__init__()
        self._attend, self._name = attend, name

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func is F.scaled_dot_product_attention:
            call = self._call(*args, **kwargs)
            result = None if call is None else self._attend(call)
            if result is not None:
                return result
        return func(*args, **kwargs)

    def _call(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attn_mask: Tensor | None = None,
        dropout_p: float = 0.0,
        is_causal: bool = False,
        scale: float | None = None,
        enable_gqa: bool = False,
    ) -> AttentionCall | None:
        name = self._name()
        if name is None or dropout_p or not query.dim() == key.dim() == value.dim() == 4:
            return None
        return AttentionCall(name, query, key, value, attn_mask, is_causal, scale, enable_gqa)


def quantized_attention(call: AttentionCall, scales: Mapping[str, float | Tensor]) -> Tensor:
    """The result in fp8, in the query's dtype, as passes/quantize.py and the kernel compute it.

    `scales`: of "query", "key" and "value", for all heads or float32 [heads]. Samples are computed one by one, since all
    scores are there at once.
    """
    query = scales["query"]
    if isinstance(query, Tensor):
        scales = {**scales, "query": steps_by_groups(query, call.key.shape[1])}
    parts = [_of_sample(call, index, scales) for index in range(len(call.query))]
    return torch.cat(parts).to(call.query.dtype)


def _of_sample(call: AttentionCall, index: int, scales: Mapping[str, float | Tensor]) -> Tensor:
    query, key, value = (
        _on_grid(x[index : index + 1].float(), scales[name])
        for name, x in (("query", call.query), ("key", call.key), ("value", call.value))
    )
    group = query.shape[1] // key.shape[1]
    if group > 1:
        key, value = key.repeat_interleave(group, 1), value.repeat_interleave(group, 1)
    scale = query.shape[3] ** -0.5 if call.scale is None else call.scale
    scores = query @ key.mT * scale
    if call.mask is not None:
        mask = call.mask if call.mask.dim() < 4 or len(call.mask) == 1 else call.mask[index : index + 1]
        hidden = scores.new_zeros(()).masked_fill(~mask, -torch.inf) if mask.dtype == torch.bool else mask.float()
        scores = scores + hidden
    if call.is_causal:
        seen = torch.ones(scores.shape[-2:], dtype=torch.bool, device=scores.device).tril()
        scores = scores.masked_fill(~seen, -torch.inf)
    most = scores.amax(-1, keepdim=True)
    weights = (scores - torch.where(most == -torch.inf, 0.0, most)).exp()
    total = weights.sum(-1, keepdim=True)
    rounded = FP8.rounded(weights * LARGEST_PROBABILITY).float() / LARGEST_PROBABILITY
    return rounded @ value / torch.where(total == 0, 1.0, total)


def _on_grid(x: Tensor, scale: float | Tensor) -> Tensor:
    steps = scale.to(x.device)[:, None, None] if isinstance(scale, Tensor) else x.new_tensor(scale)
    return FP8.rounded((x * steps.reciprocal()).double()).float() * steps


def unfit(call: AttentionCall, precision: str) -> str | None:
    """Why passes/quantize.py leaves the call as it is; None if it does not."""
    operands = (call.query, call.key, call.value)
    half = all(x.dtype in (torch.float16, torch.bfloat16) for x in operands)
    return misfit_of_attention(precision, [x.shape[3] for x in operands], half)
