"""`fxopt::attention`: scaled-dot-product attention without gradients, whose backend eager chooses when it runs.

Traced under FakeTensors, `aten::scaled_dot_product_attention` has to pick a backend before there are tensors, and what it
picks is often the decomposed form, several times slower than the fused kernels that eager would take. This op postpones the
choice: importing the module registers

    fxopt::attention(query, key, value, attn_mask=None, dropout_p=0.0, is_causal=False, *, scale=None, enable_gqa=False)

with the parameters of `torch.nn.functional.scaled_dot_product_attention`, restricted to query [B, H, S, E], key
[B, G, T, E], value [B, G, T, Ev] of one floating dtype (G = H unless enable_gqa) and dropout_p = 0. The result is
[B, H, S, Ev]. It has no gradient: `passes/attention.py` puts it only where none is wanted. Under autocast its floating
tensors are cast as eager's are.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

SCHEMA = (
    "attention(Tensor query, Tensor key, Tensor value, Tensor? attn_mask=None, float dropout_p=0.0, bool is_causal=False, "
    "*, float? scale=None, bool enable_gqa=False) -> Tensor"
)

_AUTOCAST_KEYS = {"cuda": "AutocastCUDA", "cpu": "AutocastCPU"}


def attend(query: Tensor, key: Tensor, value: Tensor, *args: Any, **kwargs: Any) -> Tensor:
    """What the op computes, for callers that have no use for a dispatcher in between."""
    result = F.scaled_dot_product_attention(query, key, value, *args, **kwargs)
    return result.clone() if _shares_memory(result, value) else result


def _shares_memory(result: Tensor, value: Tensor) -> bool:
    """Whether a decomposed attention over a single key returned a view of its value: results of an op are fresh memory."""
    return result.untyped_storage().data_ptr() == value.untyped_storage().data_ptr() and result.numel() > 0


def _fake(query: Tensor, key: Tensor, value: Tensor, *args: Any, **kwargs: Any) -> Tensor:
    """The layout that fused kernels give: flash and cuDNN follow the query's; the memory-efficient one is [B, S, H, Ev].

    A backend that gives another layout costs a copy, nothing else.
    """
    batch, heads, length, _ = query.shape
    efficient = query.device.type == "cuda" and query.dtype == torch.float32
    if not efficient and query.shape[-1] == value.shape[-1]:
        return torch.empty_like(query)
    return query.new_empty((batch, length, heads, value.shape[-1])).transpose(1, 2)


def _under_autocast(device_type: str) -> Any:
    """What autocast does to `scaled_dot_product_attention`: floating tensors other than float64 take the lower precision."""

    def cast(x: Any, dtype: torch.dtype) -> Any:
        here = isinstance(x, Tensor) and x.device.type == device_type
        return x.to(dtype) if here and x.is_floating_point() and x.dtype != torch.float64 else x

    def lowered(*args: Any, **kwargs: Any) -> Tensor:
        dtype = torch.get_autocast_dtype(device_type)
        given = [cast(a, dtype) for a in args]
        named = {k: cast(a, dtype) for k, a in kwargs.items()}
        with torch.autocast(device_type, enabled=False):
            result: Tensor = attention(*given, **named)
        return result

    return lowered


_LIBRARY = torch.library.Library("fxopt", "FRAGMENT")
_LIBRARY.define(SCHEMA, tags=(torch.Tag.pt2_compliant_tag,))
_LIBRARY.impl("attention", attend, "CompositeExplicitAutograd")
torch.library.register_fake("fxopt::attention", _fake, lib=_LIBRARY)
for _device_type, _key in _AUTOCAST_KEYS.items():
    _LIBRARY.impl("attention", _under_autocast(_device_type), _key)

attention = torch.ops.fxopt.attention.default
