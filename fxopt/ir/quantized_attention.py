"""Attention whose operands are stored in 8 bits, as an op. Importing the module registers

    fxopt::scaled_attention(Tensor query, Tensor key, Tensor value, Tensor? query_scale, Tensor? key_scale,
                            Tensor? value_scale, Tensor? attn_mask, bool is_causal, float? scale, bool enable_gqa,
                            ScalarType out_dtype) -> Tensor

query [B, H, S, E], key [B, G, T, E] and value [B, G, T, Ev] stand for themselves times their scales, and the result is that
of `fxopt::attention` on these, [B, H, S, Ev] in `out_dtype`, float16 or bfloat16. Key and value are int8 or float8_e4m3fn.
The query has the result's dtype, or is float8_e4m3fn, as are key and value then. Scales are floating: of the query one
number []; of key and value broadcast to [B, G, T, 1].

The eager form widens the operands and leaves the rest to `fxopt::attention`. A kernel that multiplies 8-bit floats rounds
the probabilities to float8_e4m3fn as well, between 0 and 256.
"""

from __future__ import annotations

import torch
from torch import Tensor

from fxopt.ir.attention_op import attend

SCHEMA = (
    "scaled_attention(Tensor query, Tensor key, Tensor value, Tensor? query_scale, Tensor? key_scale, Tensor? value_scale,"
    " Tensor? attn_mask, bool is_causal, float? scale, bool enable_gqa, ScalarType out_dtype) -> Tensor"
)

FLOAT8 = torch.float8_e4m3fn
STORED = (FLOAT8, torch.int8)
"""What keys and values may be stored in."""


def scaled_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    query_scale: Tensor | None,
    key_scale: Tensor | None,
    value_scale: Tensor | None,
    attn_mask: Tensor | None,
    is_causal: bool,
    scale: float | None,
    enable_gqa: bool,
    out_dtype: torch.dtype,
) -> Tensor:
    """What `fxopt::scaled_attention` computes. Raises ValueError for operands of other dtypes or ranks."""
    _check(query, key, value, query_scale, key_scale, value_scale, out_dtype)
    q, k, v = (_widened(*pair, out_dtype) for pair in ((query, query_scale), (key, key_scale), (value, value_scale)))
    return attend(q, k, v, attn_mask, 0.0, is_causal, scale=scale, enable_gqa=enable_gqa)


def steps_by_groups(steps: Tensor, groups: int) -> Tensor:
    """`steps` [H] of a query's heads as those that are given the same key share them, the largest of each group: they can be
    multiplied into the key's scales, since the op has one number for the query."""
    return steps.view(groups, -1).amax(1).repeat_interleave(len(steps) // groups)


def _widened(x: Tensor, scale: Tensor | None, dtype: torch.dtype) -> Tensor:
    return x.to(dtype) if scale is None else (x.to(torch.float32) * scale.to(torch.float32)).to(dtype)


def _check(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    query_scale: Tensor | None,
    key_scale: Tensor | None,
    value_scale: Tensor | None,
    out_dtype: torch.dtype,
) -> None:
    if not query.dim() == key.dim() == value.dim() == 4:
        raise ValueError(f"operands have 4 dimensions, not {query.dim()}, {key.dim()} and {value.dim()}")
    if out_dtype not in (torch.float16, torch.bfloat16):
        raise ValueError(f"the result is float16 or bfloat16, not {out_dtype}")
    narrow = query.dtype == key.dtype == value.dtype == FLOAT8
    if not narrow and (query.dtype != out_dtype or key.dtype not in STORED or value.dtype not in STORED):
        raise ValueError(f"no attention of {query.dtype}, {key.dtype} and {value.dtype} with a result of {out_dtype}")
    if query_scale is not None and (query_scale.dim() or not query_scale.is_floating_point()):
        raise ValueError(f"the query's scale is one number, not {query_scale.dtype} {list(query_scale.shape)}")
    for what, x, given in (("key", key, key_scale), ("value", value, value_scale)):
        if given is None:
            continue
        whole = (*x.shape[:3], 1)
        fits = given.dim() <= 4 and all(n in (1, m) for n, m in zip(given.shape[::-1], whole[::-1], strict=False))
        if not given.is_floating_point() or not fits:
            raise ValueError(f"the {what}'s scale does not broadcast to {list(whole)}: {given.dtype} {list(given.shape)}")


def _fake(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    query_scale: Tensor | None,
    key_scale: Tensor | None,
    value_scale: Tensor | None,
    attn_mask: Tensor | None,
    is_causal: bool,
    scale: float | None,
    enable_gqa: bool,
    out_dtype: torch.dtype,
) -> Tensor:
    """In the layout that fused kernels give: that of the query."""
    _check(query, key, value, query_scale, key_scale, value_scale, out_dtype)
    if query.shape[-1] == value.shape[-1]:
        return torch.empty_like(query, dtype=out_dtype)
    batch, heads, rows, _ = query.shape
    return query.new_empty((batch, rows, heads, value.shape[-1]), dtype=out_dtype).transpose(1, 2)


_LIBRARY = torch.library.Library("fxopt", "FRAGMENT")
_LIBRARY.define(SCHEMA, tags=(torch.Tag.pt2_compliant_tag,))
_LIBRARY.impl("scaled_attention", scaled_attention, "CompositeExplicitAutograd")
torch.library.register_fake("fxopt::scaled_attention", _fake, lib=_LIBRARY)

SCALED_ATTENTION = torch.ops.fxopt.scaled_attention.default
