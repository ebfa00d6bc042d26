"""Liger's kernels (PyPI: liger-kernel) as other implementations of the memory-bound kernels, where the package has them."""

from __future__ import annotations

import importlib
import importlib.util
from collections.abc import Callable
from typing import Any

from torch import Tensor

EPS = 1e-5


def available() -> bool:
    return importlib.util.find_spec("liger_kernel") is not None


def _ops() -> Any:
    return importlib.import_module("liger_kernel.ops")


def _functions() -> Any:
    return importlib.import_module("liger_kernel.transformers.functional")


def rms_norm(x: Tensor, weight: Tensor) -> Tensor:
    return _functions().liger_rms_norm(x, weight, 1e-6, in_place=False)


def add_rms_norm(x: Tensor, residual: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
    return _functions().liger_fused_add_rms_norm(x, residual, weight, 1e-6, in_place=False)


def layer_norm(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    return _functions().liger_layer_norm(x, weight, bias, EPS)


def group_norm(x: Tensor, weight: Tensor, bias: Tensor, groups: int) -> Tensor:
    return _functions().liger_group_norm(x, weight, bias, x.shape[1], groups, EPS)


def softmax(x: Tensor) -> Tensor:
    return _functions().liger_softmax(x)


def cross_entropy(logits: Tensor, target: Tensor) -> Tensor:
    return _functions().liger_cross_entropy(logits, target)


def weighted_cross_entropy(logits: Tensor, target: Tensor, weight: Tensor) -> Tensor:
    return _functions().liger_cross_entropy(logits, target, weight, label_smoothing=0.1)


def linear_cross_entropy(hidden: Tensor, weight: Tensor, labels: Tensor) -> Tensor:
    return _functions().liger_fused_linear_cross_entropy(hidden, weight, labels)


def gelu_mul(x: Tensor, gate: Tensor) -> Tensor:
    return _functions().liger_geglu(gate, x)


def swiglu(x: Tensor) -> Tensor:
    return _ops().LigerFusedGateUpSiLUMulFunction.apply(x)


def rotary(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
    return _functions().liger_rope(q, k, cos[None], sin[None])


IMPLEMENTATIONS: dict[str, Callable[..., Any]] = {
    "rms-norm": rms_norm,
    "add-rms-norm": add_rms_norm,
    "layer-norm": layer_norm,
    "group-norm": lambda x, weight, bias: group_norm(x, weight, bias, 8),
    "softmax": softmax,
    "cross-entropy": cross_entropy,
    "cross-entropy-weighted": weighted_cross_entropy,
    "geglu": gelu_mul,
    "swiglu": swiglu,
    "rotary": rotary,
}
"""By the workload's name. Several overwrite their inputs: RoPE, cross-entropy in its forward, GEGLU in its backward."""
