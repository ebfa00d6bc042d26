"""Algebra that real models need. Every rule is exact, or rounds no more often than eager does.

Floating addition and multiplication are not reassociated; a division becomes a multiplication only when the reciprocal is
exact.
"""

from __future__ import annotations

import math

import torch
from torch import fx

from fxopt.ir.spec import known_equal
from fxopt.passes.context import Context, Rule, apply_rules
from fxopt.passes.facts import arguments, same_tensor, static_shape, tensor, uniform_value

aten = torch.ops.aten
_MANTISSA = {torch.float16: 11, torch.bfloat16: 8, torch.float32: 24, torch.float64: 53}
_INTEGERS = (torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64)


def algebra(context: Context) -> None:
    apply_rules(context, RULES)


def small_power(context: Context, node: fx.Node) -> fx.Node | None:
    """x**2, x**3, x**0.5, x**-1 and x**-0.5 as eager itself computes them: x*x, x*x*x, sqrt, reciprocal, rsqrt."""
    x, exponent, value = node.args[0], uniform_value(node.args[1]), tensor(node)
    held = tensor(x)
    if node.target is not aten.pow.Tensor_Scalar or value is None or held is None or value.dtype != held.dtype:
        return None
    if exponent == 2:
        return context.emit(aten.mul.Tensor, (x, x), node)
    if not value.dtype.is_floating_point:
        return None
    if exponent == 3:
        return context.emit(aten.mul.Tensor, (context.emit(aten.mul.Tensor, (x, x), node), x), node)
    function = {0.5: aten.sqrt.default, -1: aten.reciprocal.default, -0.5: aten.rsqrt.default}.get(exponent or 0.0)
    return None if function is None else context.emit(function, (x,), node)


def exact_reciprocal(context: Context, node: fx.Node) -> fx.Node | None:
    """x / 2**k is x * 2**-k, bit for bit, when x's dtype holds both numbers as normal ones."""
    x, divisor, value = node.args[0], uniform_value(node.args[1]), tensor(node)
    held = tensor(x)
    if node.kwargs or value is None or held is None or value.dtype != held.dtype or value.dtype not in _MANTISSA:
        return None
    if divisor is None or divisor == 0 or not math.isfinite(divisor) or abs(math.frexp(divisor)[0]) != 0.5:
        return None
    limits = torch.finfo(value.dtype)
    if not all(limits.tiny <= abs(c) <= limits.max for c in (divisor, 1.0 / divisor)):
        return None
    return context.emit(aten.mul.Tensor, (x, 1.0 / divisor), node)


def lossless_cast_chain(context: Context, node: fx.Node) -> fx.Node | None:
    """cast(cast(x, wide), d) is cast(x, d), or x, when `wide` holds every value of x's dtype."""
    inner = node.args[0]
    if not isinstance(inner, fx.Node) or not _only_casts(node) or not _only_casts(inner):
        return None
    source, between, value = tensor(inner.args[0]), tensor(inner), tensor(node)
    if source is None or between is None or value is None or not holds(between.dtype, source.dtype):
        return None
    if same_tensor(node, inner.args[0]):
        return inner.args[0]  # type: ignore[return-value]
    to_integer = value.dtype in _INTEGERS and source.dtype not in _INTEGERS and source.dtype != torch.bool
    if value.dtype == source.dtype or to_integer or value.device != source.device:
        return None
    return context.emit(aten._to_copy.default, (inner.args[0],), node, dict(node.kwargs))


def _only_casts(node: fx.Node) -> bool:
    """Whether `node` is a _to_copy that changes the dtype and nothing else."""
    if node.target is not aten._to_copy.default:
        return False
    before, after = tensor(node.args[0]), tensor(node)
    return before is not None and after is not None and before.device == after.device and set(node.kwargs) <= {"dtype"}


def holds(wide: torch.dtype, narrow: torch.dtype) -> bool:
    """Whether every value of `narrow` is exactly a value of `wide`."""
    if wide == narrow or narrow == torch.bool:
        return True
    if wide in _MANTISSA:
        if narrow in _MANTISSA:
            a, b = torch.finfo(wide), torch.finfo(narrow)
            return _MANTISSA[wide] >= _MANTISSA[narrow] and a.max >= b.max and a.tiny <= b.tiny
        exact = min(2 ** _MANTISSA[wide], torch.finfo(wide).max)
        return narrow in _INTEGERS and max(-torch.iinfo(narrow).min, torch.iinfo(narrow).max) <= exact
    if wide in _INTEGERS and narrow in _INTEGERS:
        return torch.iinfo(wide).min <= torch.iinfo(narrow).min and torch.iinfo(wide).max >= torch.iinfo(narrow).max
    return False


def involution(context: Context, node: fx.Node) -> fx.Node | None:
    """neg(neg(x)), not(not(x)) of the same dtype is x."""
    inner = node.args[0]
    if isinstance(inner, fx.Node) and inner.target is node.target and same_tensor(node, inner.args[0]):
        return inner.args[0]  # type: ignore[return-value]
    return None


def integer_chain(context: Context, node: fx.Node) -> fx.Node | None:
    """(x + a) + b and (x * a) * b of one integer dtype with literal a, b: one operation (exact, since integers wrap)."""
    inner, b, value = node.args[0], node.args[1], tensor(node)
    if not isinstance(inner, fx.Node) or inner.target is not node.target or node.kwargs or inner.kwargs:
        return None
    a, held = inner.args[1], tensor(inner.args[0])
    if type(a) is not int or type(b) is not int or value is None or held is None or value.dtype not in _INTEGERS:
        return None
    total = a + b if node.target is aten.add.Tensor else a * b
    if held.dtype != value.dtype or not torch.iinfo(value.dtype).min <= total <= torch.iinfo(value.dtype).max:
        return None
    return context.emit(node.target, (inner.args[0], total), node)


def sum_of_expanded(context: Context, node: fx.Node) -> fx.Node | None:
    """The sum over dimensions that were only broadcast is n times the value: one rounding instead of n."""
    expand, value, given = node.args[0], tensor(node), arguments(node)
    if not isinstance(expand, fx.Node) or expand.target is not aten.expand.default or given["dtype"] is not None:
        return None
    wide, source = tensor(expand), tensor(expand.args[0])
    if wide is None or source is None or value is None or value.dtype not in _MANTISSA or wide.dim() != source.dim():
        return None
    dims = [d % wide.dim() for d in given["dim"] or range(wide.dim())]
    count = math.prod(s if isinstance(s := wide.shape[d], int) else 0 for d in dims)
    broadcast_only = all(known_equal(source.shape[d], 1) for d in dims) and _kept_elsewhere(wide, source, dims)
    if not broadcast_only or not 1 < count <= 2 ** _MANTISSA[value.dtype] or count > torch.finfo(value.dtype).max:
        return None
    kept: fx.Node | None = expand.args[0]  # type: ignore[assignment]
    if not given["keepdim"]:
        kept = context.derive(aten.squeeze.dims, (kept, dims), node)
    if kept is None or not same_tensor(node, kept):
        return None
    product = context.emit(aten.mul.Tensor, (kept, count), node)
    return context.emit(aten.add.Tensor, (product, 0.0), node)  # a sum of -0.0 is 0.0


def _kept_elsewhere(wide: torch.Tensor, source: torch.Tensor, dims: list[int]) -> bool:
    return all(known_equal(wide.shape[d], source.shape[d]) for d in range(wide.dim()) if d not in dims)


def negated_operand(context: Context, node: fx.Node) -> fx.Node | None:
    """x + (-y) is x - y."""
    x, negation = node.args[0], node.args[1]
    if node.kwargs or not isinstance(negation, fx.Node) or negation.target is not aten.neg.default or tensor(x) is None:
        return None
    a, b, value = tensor(x), tensor(negation), tensor(node)
    if a is None or b is None or value is None or not (a.dtype == b.dtype == value.dtype):
        return None
    return context.emit(aten.sub.Tensor, (x, negation.args[0]), node)


def bmm_of_one(context: Context, node: fx.Node) -> fx.Node | None:
    """A batched product of one matrix pair (einsum writes these) is mm, which fuses and which libraries do best."""
    a, b, value = tensor(node.args[0]), tensor(node.args[1]), tensor(node)
    if a is None or b is None or value is None or not static_shape(value) or value.shape[0] != 1:
        return None
    left = context.derive(aten.squeeze.dim, (node.args[0], 0), node)
    right = context.derive(aten.squeeze.dim, (node.args[1], 0), node)
    product = context.derive(aten.mm.default, (left, right), node) if left is not None and right is not None else None
    return None if product is None else context.emit_checked(aten.view.default, (product, list(value.shape)), node)


_CHAINS: tuple[Rule, ...] = (integer_chain,)

RULES: dict[str, tuple[Rule, ...]] = {
    "pow": (small_power,),
    "div": (exact_reciprocal,),
    "_to_copy": (lossless_cast_chain,),
    "neg": (involution,),
    "bitwise_not": (involution,),
    "logical_not": (involution,),
    "add": (*_CHAINS, negated_operand),
    "mul": _CHAINS,
    "sum": (sum_of_expanded,),
    "bmm": (bmm_of_one,),
}
"""Op name -> rules, tried in order."""
