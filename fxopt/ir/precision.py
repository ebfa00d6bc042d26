"""What torch's global settings allow libraries to do to float32."""

from __future__ import annotations

import torch


def products_use_tf32() -> bool:
    """Whether cuBLAS may round the operands of float32 products to TF32 (not by default)."""
    try:
        return bool(torch.backends.cuda.matmul.allow_tf32)
    except RuntimeError:  # set by way of fp32_precision, which the older flag cannot express
        return getattr(torch.backends.cuda, "matmul").fp32_precision == "tf32"  # noqa: B009 - unknown to older torch


def convolutions_use_tf32() -> bool:
    """Whether cuDNN may round the operands of float32 convolutions to TF32 (torch's default)."""
    try:
        return bool(torch.backends.cudnn.allow_tf32)
    except RuntimeError:  # set by way of fp32_precision, which the older flag cannot express
        return getattr(torch.backends.cudnn, "conv").fp32_precision == "tf32"  # noqa: B009 - unknown to older torch
