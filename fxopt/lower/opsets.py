"""Sets of ops that lowering treats alike."""

from __future__ import annotations

import torch

import fxopt.ir.random_ops  # noqa: F401  (defines torch.ops.fxopt.seed)
from fxopt.ir.attention_op import attention, attention_backward, attention_forward
from fxopt.ir.group_scaled_op import GROUP_SCALED_MM
from fxopt.ir.linear_cross_entropy_op import linear_cross_entropy_backward, linear_cross_entropy_op
from fxopt.ir.observer_ops import exponent_histogram
from fxopt.ir.quantized_attention import SCALED_ATTENTION
from fxopt.ir.quantized_convolution import SCALED_CONVOLUTION
from fxopt.ir.quantized_ops import QUANTIZE_WEIGHT, SCALED_MM, WEIGHT_ONLY_MM
from fxopt.ir.rounding import FLOAT8
from fxopt.ir.scored_attention_op import SCORED

aten = torch.ops.aten

VIEW_OPS = frozenset(
    {
        aten.alias.default,
        aten.as_strided.default,
        aten.detach.default,
        aten.diagonal.default,
        aten.expand.default,
        aten.permute.default,
        aten.reshape.default,
        aten.select.int,
        aten.slice.Tensor,
        aten.squeeze.default,
        aten.squeeze.dim,
        aten.squeeze.dims,
        aten.t.default,
        aten.transpose.int,
        aten.unfold.default,
        aten.unsqueeze.default,
        aten.view.default,
        aten._unsafe_view.default,
    }
)
"""Ops whose result shares the memory of their first argument (reshape only when strides allow)."""

MULTIPLE_VIEW_OPS = frozenset(
    {
        aten.split.Tensor,
        aten.split.sizes,
        aten.split_with_sizes.default,
        aten.chunk.default,
        aten.unbind.int,
    }
)
"""Ops with several results, each of which shares the memory of the first argument."""

STORAGE_OFFSET_OPS = frozenset({aten.as_strided.default, aten.as_strided_copy.default, aten.as_strided_scatter.default})
"""Ops with an offset that is counted from the start of a storage, not of a tensor."""

LIBRARY_OPS = frozenset(
    {
        aten.mm.default,
        aten.addmm.default,
        aten.bmm.default,
        aten.baddbmm.default,
        *(getattr(aten, name).dtype for name in ("mm", "addmm", "bmm", "baddbmm")),  # half operands, a float32 result
        aten._addmm_activation.default,
        aten._scaled_mm.default,
        aten._int_mm.default,
        aten._grouped_mm.default,
        aten._scaled_grouped_mm.default,
        aten.convolution.default,
        aten.convolution_backward.default,
        aten.cudnn_convolution_relu.default,
        aten.cudnn_convolution_add_relu.default,
        aten.scaled_dot_product_attention.default,
        aten._scaled_dot_product_flash_attention.default,
        aten._scaled_dot_product_flash_attention_backward.default,
        aten._scaled_dot_product_efficient_attention.default,
        aten._scaled_dot_product_efficient_attention_backward.default,
        aten._scaled_dot_product_cudnn_attention.default,
        aten._scaled_dot_product_cudnn_attention_backward.default,
        aten._scaled_dot_product_flash_attention_for_cpu.default,
        aten._scaled_dot_product_flash_attention_for_cpu_backward.default,
        attention,
        attention_forward,
        attention_backward,
        *SCORED,
        SCALED_ATTENTION,
        linear_cross_entropy_op,
        linear_cross_entropy_backward,
        exponent_histogram,
        QUANTIZE_WEIGHT,
        GROUP_SCALED_MM,
        SCALED_CONVOLUTION,
        SCALED_MM,
        WEIGHT_ONLY_MM,
        torch.ops.fxopt.seed.default,
        # What tracing one_hot, repeat_interleave and the like leaves to be checked at run time.
        aten._assert_async.default,
        aten._assert_async.msg,
        # Free views between complex tensors and their pairs, which passes/complex_pairs.py computes with.
        aten.view_as_real.default,
        aten.view_as_complex.default,
        aten._conj.default,
        aten.resolve_conj.default,
    }
)
"""Contractions, attention, losses over many classes, the draw of a seed, assertions, complex views: running them as library
calls is the plan, not a retreat."""

KERNEL_DTYPES = frozenset(
    {
        *(torch.float16, torch.bfloat16, torch.float32, torch.float64),
        *(torch.bool, torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64),
    }
)
"""Element types that generated kernels read and write; ops on others are library calls."""


def kernels_hold(dtype: torch.dtype, device: torch.device) -> bool:
    """Whether generated kernels of `device` read and write `dtype`: on GPUs those of 8 floating bits too."""
    return dtype in KERNEL_DTYPES or (dtype in FLOAT8 and device.type == "cuda")
