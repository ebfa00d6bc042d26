"""Kernel workloads: functions of the kind that real models spend their memory-bound time in."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.workload import Sizes, Values, Workload
from fxopt.report.cases import Case


def layer_norm(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    return F.layer_norm(x, x.shape[-1:], weight, bias)


def add_rms_norm(x: Tensor, residual: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
    total = x + residual
    wide = total.float() if total.dtype in (torch.float16, torch.bfloat16) else total
    return (wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + 1e-6)).to(x.dtype) * weight, total


def softmax(x: Tensor) -> Tensor:
    return F.softmax(x, dim=-1)


def gelu_mul(x: Tensor, gate: Tensor) -> Tensor:
    return F.gelu(gate, approximate="tanh") * x


def swiglu(x: Tensor) -> Tensor:
    gate, up = x.chunk(2, dim=-1)
    return F.silu(gate) * up


def cross_entropy(logits: Tensor, target: Tensor) -> Tensor:
    return F.cross_entropy(logits, target)


def dropout_add_norm(x: Tensor, residual: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    return F.layer_norm(F.dropout(x, 0.1) + residual, x.shape[-1:], weight, bias)


def column_sum(x: Tensor) -> Tensor:
    return x.sum(0)


def transpose_add(x: Tensor, y: Tensor) -> Tensor:
    return x.t().contiguous() + y


def rotary(q: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    half = q.shape[-1] // 2
    turned = torch.cat((-q[..., half:], q[..., :half]), -1)
    return q * cos + turned * sin


def group_norm_silu(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    return F.silu(F.group_norm(x, 8, weight, bias))


def adamw_step(parameters: list[Tensor], gradients: list[Tensor], first: list[Tensor], second: list[Tensor]) -> list[Tensor]:
    """One AdamW step in place (decoupled weight decay, Loshchilov and Hutter 2019); bias correction of step 10."""
    for p, g, m, v in zip(parameters, gradients, first, second, strict=True):
        p.mul_(1 - 1e-3 * 0.01)
        m.lerp_(g, 0.1)
        v.mul_(0.999).addcmul_(g, g, value=0.001)
        denominator = (v / (1 - 0.999**10)).sqrt_().add_(1e-8)
        p.addcdiv_(m, denominator, value=-1e-3 / (1 - 0.9**10))
    return parameters


_ROWS = {"full": {"rows": 16384, "cols": 4096}, "tiny": {"rows": 12, "cols": 40}}
_ROW_RANGES = {"rows": (1, 32768), "cols": (17, 8192)}


def _rowwise(
    name: str,
    fn: Callable[..., Any],
    inputs: Callable[[Values, int, int], tuple[Any, ...]],
    *,
    training: bool = False,
    **case: Any,
) -> Workload:
    """A workload over a [rows, cols] domain."""

    def build(sizes: Sizes, device: torch.device, dtype: torch.dtype) -> Case:
        rows, cols = sizes["rows"], sizes["cols"]
        make = Values(device, dtype, grad=training)
        tensors = inputs(make, rows, cols)
        grad = Values(device, dtype)(rows, cols) if training else None
        return Case(fn, tensors, training=training, grad_output=grad, **case)

    full, tiny = _ROWS["full"], _ROWS["tiny"]
    return Workload(name, "kernel", build, full, tiny, _ROW_RANGES, training)


def _build_adamw(sizes: Sizes, device: torch.device, dtype: torch.dtype) -> Case:
    make = Values(device, dtype)
    groups = [[make(sizes["width"], sizes["width"]) for _ in range(sizes["count"])] for _ in range(4)]
    groups[3] = [v.abs() for v in groups[3]]
    saved = [[t.clone() for t in group] for group in groups]

    def reset() -> None:
        for group, values in zip(groups, saved, strict=True):
            torch._foreach_copy_(group, values)

    return Case(adamw_step, tuple(groups), reset=reset)


def _build_rotary(sizes: Sizes, device: torch.device, dtype: torch.dtype) -> Case:
    make, heads, tokens = Values(device, dtype), sizes["heads"], sizes["tokens"]
    return Case(rotary, (make(heads, tokens, 64), make(tokens, 64), make(tokens, 64)))


def _build_group_norm(sizes: Sizes, device: torch.device, dtype: torch.dtype) -> Case:
    make, batch, side = Values(device, dtype), sizes["batch"], sizes["side"]
    x = make(batch, 64, side, side).contiguous(memory_format=torch.channels_last)
    return Case(group_norm_silu, (x, make(64), make(64)))


def _build_cross_entropy(training: bool) -> Callable[[Sizes, torch.device, torch.dtype], Case]:
    def build(sizes: Sizes, device: torch.device, dtype: torch.dtype) -> Case:
        make = Values(device, dtype, grad=training)
        logits = make(sizes["rows"], sizes["cols"])
        return Case(cross_entropy, (logits, make.classes(sizes["rows"], sizes["cols"])), training=training)

    return build


_LOGITS = ({"rows": 4096, "cols": 50257}, {"rows": 6, "cols": 131}, {"rows": (1, 4096), "cols": (100, 65536)})

KERNELS = (
    _rowwise("layer-norm", layer_norm, lambda m, r, c: (m(r, c), m(c), m(c))),
    _rowwise("layer-norm-train", layer_norm, lambda m, r, c: (m(r, c), m(c), m(c)), training=True),
    _rowwise("add-rms-norm", add_rms_norm, lambda m, r, c: (m(r, c), m(r, c), m(c))),
    _rowwise("softmax", softmax, lambda m, r, c: (m(r, c),)),
    _rowwise("softmax-train", softmax, lambda m, r, c: (m(r, c),), training=True),
    _rowwise("gelu-mul", gelu_mul, lambda m, r, c: (m(r, c), m(r, c))),
    _rowwise("gelu-mul-train", gelu_mul, lambda m, r, c: (m(r, c), m(r, c)), training=True),
    _rowwise("swiglu", swiglu, lambda m, r, c: (m(r, 2 * c),)),
    _rowwise("dropout-add-norm", dropout_add_norm, lambda m, r, c: (m(r, c), m(r, c), m(c), m(c)), random=True),
    _rowwise("column-sum", column_sum, lambda m, r, c: (m(r, c),)),
    _rowwise("transpose-add", transpose_add, lambda m, r, c: (m(r, c), m(c, r))),
    Workload("cross-entropy", "kernel", _build_cross_entropy(False), *_LOGITS),
    Workload("cross-entropy-train", "kernel", _build_cross_entropy(True), *_LOGITS, training=True),
    Workload(
        "rotary", "kernel", _build_rotary, {"heads": 512, "tokens": 2048}, {"heads": 4, "tokens": 9}, {"tokens": (1, 4096)}
    ),
    Workload(
        "group-norm-silu-nhwc",
        "kernel",
        _build_group_norm,
        {"batch": 32, "side": 64},
        {"batch": 2, "side": 6},
        {"side": (1, 80)},
    ),
    Workload(
        "adamw-step", "kernel", _build_adamw, {"count": 64, "width": 1024}, {"count": 3, "width": 8}, {"width": (8, 1024)}
    ),
)
