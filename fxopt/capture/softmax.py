"""Softmax, log-softmax, log-sum-exp and their gradients as amax, subtract, exp, sum, log; the gradient of the loss after it.

Whole, each of them keeps its result for the backward: for a language model's loss that is the largest tensor of the step. In
pieces, the partitioner saves a row's maximum and sum and computes the rest again from the logits. float16 and bfloat16 are
computed in float32 and rounded at the end, as eager does inside its kernels; results are contiguous, as eager's are.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.fx.experimental.symbolic_shapes import guard_or_false, guard_or_true

aten = torch.ops.aten


def _widened(x: Tensor) -> Tensor:
    return x.to(torch.float32) if x.dtype in (torch.float16, torch.bfloat16) else x


def _is_empty(x: Tensor) -> bool:
    """Whether `x` has no elements (amax refuses those): of sizes that depend on data, whether that is known."""
    return any(guard_or_false(size == 0) for size in x.shape)


def _may_be_empty(x: Tensor, over: list[int]) -> bool:
    """Whether rows along `over` have a size that depends on data and may be zero: the op is whole then."""
    return x.dim() > 0 and not _is_empty(x) and any(guard_or_true(x.shape[dim] == 0) for dim in over)


def _finished(value: Tensor, dtype: torch.dtype) -> Tensor:
    return value.to(dtype).contiguous()


def _softmax(x: Tensor, dim: int, half_to_float: bool) -> Tensor:
    if _may_be_empty(x, [dim]):
        return NotImplemented
    wide = _widened(x)
    if not _is_empty(x):
        exponential = torch.exp(wide - torch.amax(wide, dim, keepdim=True))
        wide = exponential / torch.sum(exponential, dim, keepdim=True)
    return _finished(wide, wide.dtype if half_to_float else x.dtype)


def _log_softmax(x: Tensor, dim: int, half_to_float: bool) -> Tensor:
    if _may_be_empty(x, [dim]):
        return NotImplemented
    wide = _widened(x)
    if not _is_empty(x):
        shifted = wide - torch.amax(wide, dim, keepdim=True)
        wide = shifted - torch.log(torch.sum(torch.exp(shifted), dim, keepdim=True))
    return _finished(wide, wide.dtype if half_to_float else x.dtype)


def _softmax_backward_data(grad_output: Tensor, output: Tensor, dim: int, input_dtype: torch.dtype) -> Tensor:
    grad, y = _widened(grad_output), _widened(output)
    return _finished((grad - torch.sum(grad * y, dim, keepdim=True)) * y, input_dtype)


def _log_softmax_backward_data(grad_output: Tensor, output: Tensor, dim: int, input_dtype: torch.dtype) -> Tensor:
    grad, y = _widened(grad_output), _widened(output)
    return _finished(grad - torch.exp(y) * torch.sum(grad, dim, keepdim=True), input_dtype)


def _logsumexp(x: Tensor, dim: list[int], keepdim: bool = False) -> Tensor:
    """log(sum) + maximum; the maximum itself where it is infinite (the sum is NaN there)."""
    if x.is_complex():
        return NotImplemented
    x = x if x.is_floating_point() else x.to(torch.get_default_dtype())
    wide, over = _widened(x), list(dim) if dim else list(range(x.dim()))
    if _is_empty(x):
        return torch.log(torch.sum(torch.exp(wide), over, keepdim=keepdim)).to(x.dtype)
    top = torch.amax(wide, over, keepdim=True)
    total = torch.sum(torch.exp(wide - top), over, keepdim=True)
    result = torch.where(torch.abs(top) == math.inf, top, torch.log(total) + top)
    return (result if keepdim else torch.squeeze(result, over)).to(x.dtype)


def _nll_loss_backward(
    grad_output: Tensor,
    self: Tensor,
    target: Tensor,
    weight: Tensor | None,
    reduction: int,
    ignore_index: int,
    total_weight: Tensor,
) -> Tensor:
    """The row's gradient at its target, zero elsewhere: a comparison per element, so that it fuses.

    torch's own decomposition scatters into a tensor of zeros as large as the logits. No target is out of bounds here: the
    forward would have raised.
    """
    channel = 0 if self.dim() < 2 else 1
    grad = _widened(grad_output)
    if reduction == _MEAN:
        grad = grad / _widened(total_weight)
    if self.dim() == 1 and target.dim() > 0:
        target = target[0]
    if self.dim() > grad.dim() > 0:
        grad = grad.unsqueeze(channel)
    target = target.unsqueeze(channel)
    row = torch.where(target != ignore_index, -grad, 0.0)
    shape = [-1] + [1] * (self.dim() - channel - 1)
    if weight is not None:
        row = row * _widened(weight).reshape(shape)
    classes = torch.arange(self.shape[channel], device=self.device).reshape(shape)
    return torch.where(classes == target, row, 0.0).to(self.dtype)


_MEAN = 1
"""torch's number for reduction="mean"."""

SOFTMAX: dict[Any, Callable[..., Tensor]] = {
    aten._softmax.default: _softmax,
    aten._log_softmax.default: _log_softmax,
    aten._softmax_backward_data.default: _softmax_backward_data,
    aten._log_softmax_backward_data.default: _log_softmax_backward_data,
    aten.logsumexp.default: _logsumexp,
    aten.nll_loss_backward.default: _nll_loss_backward,
    aten.nll_loss2d_backward.default: _nll_loss_backward,
}
"""What capture/decompositions.py adds to its table."""
