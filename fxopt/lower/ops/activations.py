"""Activation functions and their derivatives. Formulas and edge cases are those of torch.nn.functional's eager kernels."""

from __future__ import annotations

import math
from typing import Any

import torch

from fxopt.lower.lowering import Lowering
from fxopt.lower.ops import terms as t
from fxopt.lower.ops.elementwise import elementwise, formula
from fxopt.lower.ops.terms import Term
from fxopt.lower.table import Table
from fxopt.lower.values import Computed, Value

aten = torch.ops.aten
TABLE = Table()


@formula(TABLE, aten.relu.default)
def _relu(x: Term) -> Term:
    return t.maximum(x, 0)


@formula(TABLE, aten.relu6.default)
def _relu6(x: Term) -> Term:
    return t.clamp(x, 0, 6)


@formula(TABLE, aten.threshold.default)
def _threshold(x: Term, threshold: Term, value: Term) -> Term:
    return t.where(x.le(threshold), value, x)


@formula(TABLE, aten.threshold_backward.default)
def _threshold_backward(grad: Term, x: Term, threshold: Term) -> Term:
    return t.where(x.le(threshold), 0, grad)


@formula(TABLE, aten.hardtanh.default)
def _hardtanh(x: Term, low: Term | float = -1, high: Term | float = 1) -> Term:
    return t.clamp(x, low, high)


@formula(TABLE, aten.hardtanh_backward.default)
def _hardtanh_backward(grad: Term, x: Term, low: Term, high: Term) -> Term:
    return t.where(x.le(low) | x.ge(high), 0.0, grad)


@formula(TABLE, aten.leaky_relu.default)
def _leaky_relu(x: Term, slope: Term | float = 0.01) -> Term:
    return t.where(x.gt(0.0), x, x * slope)


@TABLE.lowers(aten.leaky_relu_backward.default)
def _leaky_relu_backward(ctx: Lowering, grad: Value, x: Value, slope: Any, is_result: bool) -> Computed:
    return elementwise(ctx, (grad, x), lambda g, v: t.where(v.gt(0.0), g, g * slope))


@formula(TABLE, aten.elu.default)
def _elu(x: Term, alpha: Term | float = 1.0, scale: Term | float = 1.0, input_scale: Term | float = 1.0) -> Term:
    return t.where(x.le(0.0), t.expm1(x * input_scale) * alpha * scale, x * scale)


@TABLE.lowers(aten.elu_backward.default)
def _elu_backward(
    ctx: Lowering, grad: Value, alpha: Any, scale: Any, input_scale: Any, is_result: bool, x: Value
) -> Computed:
    def fn(g: Term, v: Term) -> Term:
        if is_result:
            return t.where(v.le(0.0), g * input_scale * (v + alpha * scale), g * scale)
        return t.where(v.le(0.0), g * (input_scale * alpha * scale) * t.exp(v * input_scale), g * scale)

    return elementwise(ctx, (grad, x), fn)


@formula(TABLE, aten.celu.default)
def _celu(x: Term, alpha: Term | float = 1.0) -> Term:
    return t.where(x.gt(0.0), x, t.expm1(x / alpha) * alpha)


SELU_ALPHA, SELU_SCALE = 1.6732632423543772, 1.0507009873554805


@formula(TABLE, aten.selu.default)
def _selu(x: Term) -> Term:
    return _elu(x, SELU_ALPHA, SELU_SCALE)


def _normal_cdf(x: Term) -> Term:
    return 0.5 * (1.0 + t.erf(x * math.sqrt(0.5)))


def _gelu_tanh_inner(x: Term) -> Term:
    return math.sqrt(2.0 / math.pi) * (x + 0.044715 * (x * x * x))


@formula(TABLE, aten.gelu.default)
def _gelu(x: Term, *, approximate: str = "none") -> Term:
    if approximate == "none":
        return x * _normal_cdf(x)
    return 0.5 * x * (1.0 + t.tanh(_gelu_tanh_inner(x)))


@formula(TABLE, aten.gelu_backward.default)
def _gelu_backward(grad: Term, x: Term, *, approximate: str = "none") -> Term:
    if approximate == "none":
        density = t.exp(-0.5 * (x * x)) * (1.0 / math.sqrt(2.0 * math.pi))
        return grad * (_normal_cdf(x) + x * density)
    tanh = t.tanh(_gelu_tanh_inner(x))
    inner_slope = math.sqrt(2.0 / math.pi) * (1.0 + 3.0 * 0.044715 * (x * x))
    return grad * (0.5 * (1.0 + tanh) + 0.5 * x * (1.0 - tanh * tanh) * inner_slope)


@formula(TABLE, aten.silu.default)
def _silu(x: Term) -> Term:
    return x / (1.0 + t.exp(-x))


@formula(TABLE, aten.silu_backward.default)
def _silu_backward(grad: Term, x: Term) -> Term:
    s = t.sigmoid(x)
    return grad * s * (1.0 + x * (1.0 - s))


@formula(TABLE, aten.sigmoid_backward.default)
def _sigmoid_backward(grad: Term, y: Term) -> Term:
    return grad * (1.0 - y) * y


@formula(TABLE, aten.tanh_backward.default)
def _tanh_backward(grad: Term, y: Term) -> Term:
    return grad * (1.0 - y * y)


@formula(TABLE, aten.mish.default)
def _mish(x: Term) -> Term:
    return x * t.tanh(t.log1p(t.exp(x)))


@formula(TABLE, aten.mish_backward.default)
def _mish_backward(grad: Term, x: Term) -> Term:
    tanh, s = t.tanh(t.log1p(t.exp(x))), t.sigmoid(x)
    return grad * (tanh + x * s * (1.0 - tanh * tanh))


@formula(TABLE, aten.hardsigmoid.default)
def _hardsigmoid(x: Term) -> Term:
    return t.clamp(x + 3.0, 0.0, 6.0) / 6.0


@formula(TABLE, aten.hardsigmoid_backward.default)
def _hardsigmoid_backward(grad: Term, x: Term) -> Term:
    return t.where(x.gt(-3.0) & x.lt(3.0), grad * (1.0 / 6.0), 0.0)


@formula(TABLE, aten.hardswish.default)
def _hardswish(x: Term) -> Term:
    return x * t.clamp(x + 3.0, 0.0, 6.0) / 6.0


@formula(TABLE, aten.hardswish_backward.default)
def _hardswish_backward(grad: Term, x: Term) -> Term:
    middle = grad * (x / 3.0 + 0.5)
    return t.where(x.le(-3.0), 0.0, t.where(x.lt(3.0), middle, grad))


@formula(TABLE, aten.softplus.default)
def _softplus(x: Term, beta: Term | float = 1.0, threshold: Term | float = 20.0) -> Term:
    scaled = x * beta
    return t.where(scaled.gt(threshold), x, t.log1p(t.exp(scaled)) / beta)


@formula(TABLE, aten.softplus_backward.default)
def _softplus_backward(grad: Term, x: Term, beta: Term, threshold: Term) -> Term:
    scaled = x * beta
    return t.where(scaled.gt(threshold), grad, grad * t.sigmoid(scaled))


@formula(TABLE, aten.hardshrink.default)
def _hardshrink(x: Term, threshold: Term | float = 0.5) -> Term:
    """NaN is kept: the comparison says what becomes zero."""
    return t.where(x.ge(-threshold) & x.le(threshold), 0.0, x)


@formula(TABLE, aten.softshrink.default)
def _softshrink(x: Term, threshold: Term | float = 0.5) -> Term:
    low = x + threshold
    return t.where(x.gt(threshold), x - threshold, t.where(x.lt(-threshold), low, x * 0.0))
