"""Products of quantized operands as ops: what ATen has no op for, or only one with limits.

Importing the module registers

    fxopt::quantize_weight(Tensor weight, ScalarType dtype, int bits=8, int group=0) -> (Tensor, Tensor)
    fxopt::scaled_mm(Tensor a, Tensor b, Tensor scale_a, Tensor scale_b, Tensor? bias, ScalarType out_dtype) -> Tensor
    fxopt::weight_only_mm(Tensor x, Tensor weight, Tensor scale, Tensor? bias, int bits, int group) -> Tensor
    fxopt::dequantize(Tensor values, Tensor scale, ScalarType dtype) -> Tensor

Weights are [N, K], as a linear layer has them, so that the inner dimension is contiguous for tensor cores and for rows.

Two 4-bit values share a byte: byte j of a row has value j in its low half and value j + K / 2 in its high half. So a
block of bytes is two blocks of neighbours, and whoever unpacks it needs no exchange between lanes.

The eager forms call the library where it has a form (`aten::_scaled_mm`, `aten::_int_mm`), and compute in float32
elsewhere. They have no gradients.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

SCHEMAS = {
    "quantize_weight": "(Tensor weight, ScalarType dtype, int bits=8, int group=0) -> (Tensor, Tensor)",
    "scaled_mm": "(Tensor a, Tensor b, Tensor scale_a, Tensor scale_b, Tensor? bias, ScalarType out_dtype) -> Tensor",
    "weight_only_mm": "(Tensor x, Tensor weight, Tensor scale, Tensor? bias, int bits, int group) -> Tensor",
    "dequantize": "(Tensor values, Tensor scale, ScalarType dtype) -> Tensor",
}

FLOAT8 = torch.float8_e4m3fn
LARGEST = {FLOAT8: 448.0, torch.int8: 127.0}
"""The magnitude that each 8-bit type is scaled to. Of int8, only activations with a zero point use -128."""

LARGEST_OF_4_BITS, ZERO_OF_4_BITS = 7, 8
"""4-bit values are -7 to 7, stored with 8 added."""

ERROR_OF_SUMS = 5e-6
"""What tensor cores lose of a sum of K products of 8-bit floats, times K ** (2/3): root mean square, relative to the sums.
Measured on an H100 (quantized_products_h100.json, the rounding of the result taken off): 4e-4 for K = 768, 1.1e-3 for 3072,
1.3e-3 for 4096, 2.9e-3 for 14336.
"""

ERROR_OF_FLOAT8 = 3e-2
"""What rounding both operands to float8 costs, in the same measure. It grows with the largest products as the other does."""

LONGEST_IMPRECISE_SUM = int((ERROR_OF_FLOAT8 / 10 / ERROR_OF_SUMS) ** 1.5)
"""Products of 8-bit floats that are summed as tensor cores do it, which loses up to a tenth of what float8 has cost: errors
that do not depend on each other add up to half a percent more. Longer sums are added up in float32, block by block.
"""

_MULTIPLE = 16
"""Of K and N, for `aten::_scaled_mm`."""

_FEWEST_ROWS_OF_INT_MM = 17
_MULTIPLE_OF_INT_MM = 8
"""For `aten::_int_mm` on CUDA."""


def quantize_weight(
    weight: Tensor, dtype: torch.dtype, bits: int = 8, group: int = 0, limits: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """`weight` [N, K], floating, in few bits, and the float32 scales by which its values are to be multiplied.

    8 bits: float8_e4m3fn or int8 [N, K], a scale for each output channel, [N], or with a `group` one for each so many
    neighbours along K, [N, K / group]. 4 bits: uint8 [N, K / 2], packed as the module says, and scales [N, K / group] (0:
    all of K are one group). A scale brings the largest magnitude to the type's; it is 1 where all are zero, and NaN where
    one is NaN or infinite. `limits`, positive, shaped as the scales, are magnitudes that scales bring to the type's instead
    where they are smaller: what is beyond is clipped.

    Raises ValueError for another dtype or number of bits, and K that is odd (4 bits) or no multiple of `group`.
    """
    rows, inner = _checked_weight(weight, dtype, bits, group)
    wide = weight.detach().to(torch.float32)
    if bits == 8:
        grouped = wide.reshape(rows, -1, group) if group else wide
        scale = _scales(grouped, LARGEST[dtype], limits)
        values = (grouped / scale[..., None]).reshape(rows, inner)
        if dtype == torch.int8:
            values = values.round()
        largest = LARGEST[dtype]
        return _finite(values, dtype).clamp(-largest, largest).to(dtype), scale
    grouped = wide.reshape(rows, -1, group or inner)
    scale = _scales(grouped, LARGEST_OF_4_BITS, limits)
    values = (grouped / scale[..., None]).round().clamp(-LARGEST_OF_4_BITS, LARGEST_OF_4_BITS).reshape(rows, inner)
    stored = (_finite(values, dtype) + ZERO_OF_4_BITS).to(torch.uint8)
    return stored[:, : inner // 2] | (stored[:, inner // 2 :] << 4), scale


def _finite(values: Tensor, dtype: torch.dtype) -> Tensor:
    """`values` for a cast: integers have no NaN; their scale, which is NaN, says it."""
    return values if dtype.is_floating_point else values.nan_to_num(0.0)


def _scales(values: Tensor, largest: float, limits: Tensor | None) -> Tensor:
    amax = values.abs().amax(-1)
    scale = (amax if limits is None else torch.minimum(amax, limits.to(amax))) / largest
    scale = torch.where(amax == 0, 1.0, scale)
    # A scale that underflows would make infinities of values.
    scale = scale.clamp_min(torch.finfo(torch.float32).tiny)
    return torch.where(amax.isfinite(), scale, torch.nan)


def zero_point_offset(weight: Tensor, scales: Tensor, scale: float, zero: int) -> Tensor:
    """What to add to `scaled_mm` where its left operand, of this `scale`, has the zero point `zero`: float32 [N].

    weight int8 [N, K] and scales [N] as `quantize_weight` makes them. (q - zero) @ w = q @ w - zero * sum(w).
    """
    sums = weight.sum(1, dtype=torch.int64).double()
    return (sums * scales.double() * (-float(zero) * scale)).float()


def unpacked(weight: Tensor) -> Tensor:
    """The values of a weight of 4 bits, uint8 [N, K / 2], as int8 [N, K]."""
    return torch.cat([weight & 15, weight >> 4], 1).to(torch.int8) - ZERO_OF_4_BITS


def dequantized(weight: Tensor, scale: Tensor, bits: int, group: int) -> Tensor:
    """The float32 [N, K] that `weight` and `scale`, as `quantize_weight` makes them, stand for."""
    values = (weight if bits == 8 else unpacked(weight)).to(torch.float32)
    if scale.dim() == 1:
        return values * scale[:, None]
    rows, inner = values.shape
    return (values.reshape(rows, -1, group or inner) * scale[..., None]).reshape(rows, inner)


def scaled_mm(a: Tensor, b: Tensor, scale_a: Tensor, scale_b: Tensor, bias: Tensor | None, out_dtype: torch.dtype) -> Tensor:
    """a @ b.T * scale_a * scale_b + bias, [M, N] in `out_dtype`, rounded once.

    a [M, K] and b [N, K] are both float8_e4m3fn (summed in float32, on a GPU up to LONGEST_IMPRECISE_SUM as its tensor cores
    do it) or both int8 (in int32, which K up to 2**17 cannot overflow). Scales are float32: scale_a [] or [M], scale_b [] or
    [N]. The bias [N] is floating. Raises ValueError for others.
    """
    check_scaled(a, b, scale_a, scale_b, bias, out_dtype)
    if a.dtype == FLOAT8 and has_float8_call(a, b, out_dtype):
        return _float8_call(a, b, scale_a, scale_b, bias, out_dtype)
    sums = int_sums(a, b) if a.dtype == torch.int8 else a.to(torch.float32) @ b.to(torch.float32).t()
    out = sums.to(torch.float32) * _column(scale_a) * scale_b
    return (out if bias is None else out + bias).to(out_dtype)


def _column(scale: Tensor) -> Tensor:
    return scale[:, None] if scale.dim() == 1 else scale


def has_float8_call(a: Tensor, b: Tensor, out_dtype: torch.dtype) -> bool:
    if a.device.type != "cuda" or torch.version.hip is not None or torch.cuda.get_device_capability(a.device) < (8, 9):
        return False
    contiguous = a.stride(-1) == b.stride(-1) == 1
    return contiguous and out_dtype in (torch.bfloat16, torch.float16, torch.float32) and _fits(a, b, _MULTIPLE)


def _fits(a: Tensor, b: Tensor, multiple: int) -> bool:
    return a.shape[0] > 0 and a.shape[1] % multiple == 0 and b.shape[0] % multiple == 0 and a.shape[1] > 0 and b.shape[0] > 0


def _float8_call(
    a: Tensor, b: Tensor, scale_a: Tensor, scale_b: Tensor, bias: Tensor | None, out_dtype: torch.dtype
) -> Tensor:
    """`aten::_scaled_mm`, with one scale for each operand, or one for each row and column and a bfloat16 result."""
    fast = a.shape[1] <= LONGEST_IMPRECISE_SUM
    if scale_a.dim() == scale_b.dim() == 0:
        own = bias if bias is not None and bias.dtype == out_dtype != torch.float32 else None
        wide = out_dtype if own is bias else torch.float32
        out = torch._scaled_mm(a, b.t(), scale_a, scale_b, own, out_dtype=wide, use_fast_accum=fast)
        return out if own is bias or bias is None else (out + bias).to(out_dtype)
    if out_dtype == torch.bfloat16 and (bias is None or bias.dtype == torch.bfloat16):
        rows = scale_a.expand(a.shape[0]).contiguous()[:, None]
        columns = scale_b.expand(b.shape[0]).contiguous()[None, :]
        return torch._scaled_mm(a, b.t(), rows, columns, bias, out_dtype=out_dtype, use_fast_accum=fast)
    one = torch.ones((), device=a.device)
    out = torch._scaled_mm(a, b.t(), one, one, out_dtype=torch.float32, use_fast_accum=fast) * _column(scale_a) * scale_b
    return (out if bias is None else out + bias).to(out_dtype)


def int_sums(a: Tensor, b: Tensor) -> Tensor:
    """a @ b.T of int8 matrices, exactly, in int32 or float64."""
    fits = a.shape[0] >= _FEWEST_ROWS_OF_INT_MM and _fits(a, b, _MULTIPLE_OF_INT_MM)
    if a.device.type == "cpu" or fits:
        return torch._int_mm(a, b.t())
    return a.to(torch.float64) @ b.to(torch.float64).t()


def weight_only_mm(x: Tensor, weight: Tensor, scale: Tensor, bias: Tensor | None, bits: int, group: int) -> Tensor:
    """x @ dequantized(weight).T + bias, [M, N] in x's dtype, computed in float32 and rounded once.

    x [M, K] is floating; weight and scale are as `quantize_weight` makes them for `bits` and `group`; bias [N] is floating.
    Raises ValueError for others.
    """
    _check_weight_only(x, weight, scale, bias, bits, group)
    if bits == 8:
        out = (x.to(torch.float32) @ weight.to(torch.float32).t()) * scale
    else:
        out = x.to(torch.float32) @ dequantized(weight, scale, bits, group).t()
    return (out if bias is None else out + bias).to(x.dtype)


def dequantize(values: Tensor, scale: Tensor, dtype: torch.dtype) -> Tensor:
    """values * scale in `dtype`, of the shape of `values`; within a kernel not rounded, as no arithmetic in half types is.

    `values` are int8, `scale` float32 [], `dtype` floating. Raises ValueError for others.
    """
    _check_dequantized(values, scale, dtype)
    return (values.to(torch.float32) * scale).to(dtype)


# ---------------------------------------------------------------------- what is taken


def _checked_weight(weight: Tensor, dtype: torch.dtype, bits: int, group: int) -> tuple[int, int]:
    """N and K."""
    if weight.dim() != 2 or not weight.is_floating_point():
        raise ValueError(f"a weight is a floating matrix [N, K], not {weight.dtype} {list(weight.shape)}")
    rows, inner = weight.shape
    if (bits, dtype) not in ((8, FLOAT8), (8, torch.int8), (4, torch.uint8)):
        raise ValueError(f"{bits} bits in {dtype}: known are 8 in float8_e4m3fn or int8, and 4 in uint8")
    if bits == 8 and (group < 0 or (group and inner % group)):
        raise ValueError(f"the inner dimension {inner} is no multiple of the group {group}")
    if bits == 4:
        _check_groups(inner, group)
    return rows, inner


def _check_groups(inner: int, group: int) -> None:
    if inner % 2 or group < 0 or (group and inner % group):
        raise ValueError(f"4-bit weights need an even inner dimension, a multiple of the group: {inner}, {group}")


def check_scaled(
    a: Tensor, b: Tensor, scale_a: Tensor, scale_b: Tensor, bias: Tensor | None, out_dtype: torch.dtype
) -> None:
    if a.dtype != b.dtype or a.dtype not in LARGEST:
        raise ValueError(f"operands are both float8_e4m3fn or both int8, not {a.dtype} and {b.dtype}")
    if a.dim() != 2 or b.dim() != 2 or a.shape[1] != b.shape[1]:
        raise ValueError(f"operands are [M, K] and [N, K], not {list(a.shape)} and {list(b.shape)}")
    for scale, size in ((scale_a, a.shape[0]), (scale_b, b.shape[0])):
        if scale.dtype != torch.float32 or (scale.dim() and tuple(scale.shape) != (size,)):
            raise ValueError(f"a scale is float32, [] or [{size}], not {scale.dtype} {list(scale.shape)}")
    _check_bias(bias, b.shape[0])
    if not out_dtype.is_floating_point or out_dtype.itemsize < 2:
        raise ValueError(f"the result's dtype is floating, of 16 bits or more, not {out_dtype}")


def _check_weight_only(x: Tensor, weight: Tensor, scale: Tensor, bias: Tensor | None, bits: int, group: int) -> None:
    if x.dim() != 2 or weight.dim() != 2 or not x.is_floating_point():
        raise ValueError(f"operands are floating [M, K] and a quantized weight, not {x.dtype} {list(x.shape)}")
    rows, inner = weight.shape
    if bits == 4:
        inner *= 2
        _check_groups(inner, group)
    elif bits != 8 or group:
        raise ValueError(f"known are 8 bits without groups and 4 bits, not {bits} and {group}")
    expected = (rows,) if bits == 8 else (rows, inner // (group or inner))
    if weight.dtype not in ((torch.uint8,) if bits == 4 else tuple(LARGEST)) or x.shape[1] != inner:
        raise ValueError(f"{list(x.shape)} by a weight of {bits} bits, {weight.dtype} {list(weight.shape)}")
    if scale.dtype != torch.float32 or tuple(scale.shape) != expected:
        raise ValueError(f"scales are float32 {list(expected)}, not {scale.dtype} {list(scale.shape)}")
    _check_bias(bias, rows)


def _check_dequantized(values: Tensor, scale: Tensor, dtype: torch.dtype) -> None:
    if values.dtype != torch.int8 or scale.dtype != torch.float32 or scale.dim() or not dtype.is_floating_point:
        raise ValueError(f"int8 by a float32 scale into a floating type, not {values.dtype}, {scale.dtype} and {dtype}")


def _check_bias(bias: Tensor | None, columns: int) -> None:
    if bias is not None and (tuple(bias.shape) != (columns,) or not bias.is_floating_point()):
        raise ValueError(f"a bias is floating [{columns}], not {bias.dtype} {list(bias.shape)}")


# ---------------------------------------------------------------------- registration


def _fake_quantize(weight: Tensor, dtype: torch.dtype, bits: int = 8, group: int = 0) -> tuple[Tensor, Tensor]:
    rows, inner = _checked_weight(weight, dtype, bits, group)
    if bits == 8:
        scales = (rows, inner // group) if group else (rows,)
        return weight.new_empty((rows, inner), dtype=dtype), weight.new_empty(scales, dtype=torch.float32)
    scale = weight.new_empty((rows, inner // (group or inner)), dtype=torch.float32)
    return weight.new_empty((rows, inner // 2), dtype=dtype), scale


def _fake_scaled(
    a: Tensor, b: Tensor, scale_a: Tensor, scale_b: Tensor, bias: Tensor | None, out_dtype: torch.dtype
) -> Tensor:
    check_scaled(a, b, scale_a, scale_b, bias, out_dtype)
    return a.new_empty((a.shape[0], b.shape[0]), dtype=out_dtype)


def _fake_weight_only(x: Tensor, weight: Tensor, scale: Tensor, bias: Tensor | None, bits: int, group: int) -> Tensor:
    _check_weight_only(x, weight, scale, bias, bits, group)
    return x.new_empty((x.shape[0], weight.shape[0]))


def _fake_dequantized(values: Tensor, scale: Tensor, dtype: torch.dtype) -> Tensor:
    _check_dequantized(values, scale, dtype)
    return torch.empty_like(values, dtype=dtype)


_LIBRARY = torch.library.Library("fxopt", "FRAGMENT")
_FORMS: dict[str, tuple[Any, Any]] = {
    "quantize_weight": (quantize_weight, _fake_quantize),
    "scaled_mm": (scaled_mm, _fake_scaled),
    "weight_only_mm": (weight_only_mm, _fake_weight_only),
    "dequantize": (dequantize, _fake_dequantized),
}
for _name, (_eager, _fake) in _FORMS.items():
    _LIBRARY.define(_name + SCHEMAS[_name], tags=(torch.Tag.pt2_compliant_tag,))
    _LIBRARY.impl(_name, _eager, "CompositeExplicitAutograd")
    torch.library.register_fake(f"fxopt::{_name}", _fake, lib=_LIBRARY)

QUANTIZE_WEIGHT = torch.ops.fxopt.quantize_weight.default
SCALED_MM = torch.ops.fxopt.scaled_mm.default
WEIGHT_ONLY_MM = torch.ops.fxopt.weight_only_mm.default
DEQUANTIZE = torch.ops.fxopt.dequantize.default
