"""Products of 8-bit operands with scales of groups along what is summed over, as an op. Importing the module registers

    fxopt::group_scaled_mm(Tensor a, Tensor b, Tensor scale_a, Tensor scale_b, Tensor? bias, ScalarType out_dtype) -> Tensor

A scale for each group of neighbours keeps what is large in a row from taking the steps of what is small; but sums have to be
scaled group by group, so that no library's product of 8-bit integers does it in one call.
"""

from __future__ import annotations

import torch
from torch import Tensor

from fxopt.ir.quantized_ops import check_scaled, has_float8_call, int_sums

_SCHEMA = "group_scaled_mm(Tensor a, Tensor b, Tensor scale_a, Tensor scale_b, Tensor? bias, ScalarType out_dtype) -> Tensor"


def group_scaled_mm(
    a: Tensor, b: Tensor, scale_a: Tensor, scale_b: Tensor, bias: Tensor | None, out_dtype: torch.dtype
) -> Tensor:
    """The sum over groups g of neighbours along K of a_g @ b_g.T * scale_a[:, g] * scale_b[:, g], + bias: [M, N] in
    `out_dtype`, added up in float32 and rounded once.

    a [M, K] and b [N, K] are both float8_e4m3fn or both int8, whose sums within a group are int32. scale_a, float32
    [M, groups], or [1, groups] for all rows; scale_b, float32 [N, groups]. The bias [N] is floating. Raises ValueError for
    others.
    """
    group = _check(a, b, scale_a, scale_b, bias, out_dtype)
    out = torch.zeros((), device=a.device)
    for index in range(scale_b.shape[1]):
        part = slice(index * group, (index + 1) * group)
        out = out + _sums(a[:, part], b[:, part]).to(torch.float32) * scale_a[:, index, None] * scale_b[:, index]
    return (out if bias is None else out + bias).to(out_dtype)


def _sums(a: Tensor, b: Tensor) -> Tensor:
    """a @ b.T of 8-bit matrices: exactly, of int8, else in float32."""
    if a.device.type == "cuda":  # where not every library takes rows that lie apart
        a, b = a.contiguous(), b.contiguous()
    if a.dtype == torch.int8:
        return int_sums(a, b)
    if has_float8_call(a, b, torch.float32):
        one = torch.ones((), device=a.device)
        return torch._scaled_mm(a, b.t(), one, one, out_dtype=torch.float32, use_fast_accum=True)
    return a.to(torch.float32) @ b.to(torch.float32).t()


def _check(a: Tensor, b: Tensor, scale_a: Tensor, scale_b: Tensor, bias: Tensor | None, out_dtype: torch.dtype) -> int:
    """The number of neighbours in a group."""
    one = torch.ones((), dtype=torch.float32, device="meta")
    check_scaled(a, b, one, one, bias, out_dtype)
    groups = scale_b.shape[1] if scale_b.dim() == 2 else 0
    if not groups or a.shape[1] % groups or scale_b.dtype != torch.float32 or scale_b.shape[0] != b.shape[0]:
        raise ValueError(
            f"the weight's scales are float32 [{b.shape[0]}, groups] of {a.shape[1]} neighbours, not {scale_b.dtype}"
            f" {list(scale_b.shape)}"
        )
    rows = scale_a.shape[0] if scale_a.dim() == 2 else 0
    if scale_a.dtype != torch.float32 or scale_a.dim() != 2 or scale_a.shape[1] != groups or rows not in (1, a.shape[0]):
        raise ValueError(
            f"scales of rows are float32 [1 or {a.shape[0]}, {groups}], not {scale_a.dtype} {list(scale_a.shape)}"
        )
    return a.shape[1] // groups


def _fake(a: Tensor, b: Tensor, scale_a: Tensor, scale_b: Tensor, bias: Tensor | None, out_dtype: torch.dtype) -> Tensor:
    _check(a, b, scale_a, scale_b, bias, out_dtype)
    return a.new_empty((a.shape[0], b.shape[0]), dtype=out_dtype)


_LIBRARY = torch.library.Library("fxopt", "FRAGMENT")
_LIBRARY.define(_SCHEMA, tags=(torch.Tag.pt2_compliant_tag,))
_LIBRARY.impl("group_scaled_mm", group_scaled_mm, "CompositeExplicitAutograd")
torch.library.register_fake("fxopt::group_scaled_mm", _fake, lib=_LIBRARY)

GROUP_SCALED_MM = torch.ops.fxopt.group_scaled_mm.default
