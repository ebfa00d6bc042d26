"""Remove calls that return a value equal, bit for bit, to one of their operands.

`x + 0` is one for integers only: it turns -0.0 into 0.0; `x - 0` is one for every dtype. Whether the result may then share
memory with the operand is decided in one place, `facts.may_stand_for`.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import fx

from fxopt.ir.spec import known_equal
from fxopt.passes.context import Context, Rule, apply_rules
from fxopt.passes.facts import arguments, is_positive_zero, same_tensor, tensor, uniform_value


def no_ops(context: Context) -> None:
    apply_rules(context, RULES)


def _same(node: fx.Node, operand: Any) -> fx.Node | None:
    """`operand`, if it is a tensor node with the shape, dtype, device and strides of `node`."""
    return operand if isinstance(operand, fx.Node) and same_tensor(node, operand) else None


def same_as_first(context: Context, node: fx.Node) -> fx.Node | None:
    """Ops whose result is their first operand whenever both look the same: views, copies, broadcasts to the same shape."""
    return _same(node, node.args[0])


def cast_to_same(context: Context, node: fx.Node) -> fx.Node | None:
    return None if node.kwargs.get("pin_memory") else _same(node, node.args[0])


def _is_complex(node: fx.Node) -> bool:
    value = tensor(node)
    return value is None or value.dtype.is_complex


def add_zero(context: Context, node: fx.Node) -> fx.Node | None:
    """x + 0 and 0 + x of integers."""
    value = tensor(node)
    if value is None or value.dtype.is_floating_point or value.dtype.is_complex:
        return None
    a, b = node.args[0], node.args[1]
    if uniform_value(b) == 0:
        return _same(node, a)
    return _same(node, b) if uniform_value(a) == 0 and node.kwargs.get("alpha", 1) == 1 else None


def subtract_zero(context: Context, node: fx.Node) -> fx.Node | None:
    """x - 0; for floats the zero is positive, since -0.0 - -0.0 is 0.0."""
    alpha = node.kwargs.get("alpha", 1)
    return _same(node, node.args[0]) if is_positive_zero(uniform_value(node.args[1])) and alpha == 1 else None


def multiply_one(context: Context, node: fx.Node) -> fx.Node | None:
    """x * 1 and 1 * x, not for complex numbers, where inf * 1 has a NaN part."""
    if _is_complex(node):
        return None
    for operand, other in ((node.args[0], node.args[1]), (node.args[1], node.args[0])):
        if uniform_value(other) == 1 and _same(node, operand) is not None:
            return _same(node, operand)
    return None


def second_is_one(context: Context, node: fx.Node) -> fx.Node | None:
    """x / 1 and x ** 1 (without a rounding mode)."""
    if node.kwargs.get("rounding_mode") is not None or _is_complex(node):
        return None
    return _same(node, node.args[0]) if uniform_value(node.args[1]) == 1 else None


def mask_neutral(context: Context, node: fx.Node) -> fx.Node | None:
    """x & all-ones, x | 0, x ^ 0 and their boolean forms."""
    value = tensor(node)
    if value is None or value.dtype.is_floating_point:
        return None
    boolean = value.dtype == torch.bool
    name = str(node.target)
    neutral: Any = (True if boolean else -1) if "and" in name else (False if boolean else 0)
    if not boolean and "logical" in name:
        return None
    for operand, other in ((node.args[0], node.args[1]), (node.args[1], node.args[0])):
        constant = uniform_value(other)
        if constant is not None and constant == neutral and _same(node, operand) is not None:
            return _same(node, operand)
    return None


def equal_operands(context: Context, node: fx.Node) -> fx.Node | None:
    """max(x, x), min(x, x), x & x, x | x."""
    return _same(node, node.args[0]) if node.args[0] is node.args[1] else None


def where_constant(context: Context, node: fx.Node) -> fx.Node | None:
    """where(True, a, b) is a; where(c, a, a) is a."""
    if len(node.args) != 3:
        return None
    condition, a, b = node.args
    if a is b:
        return _same(node, a)
    constant = uniform_value(condition)
    return None if constant is None else _same(node, a if constant else b)


def masked_fill_nothing(context: Context, node: fx.Node) -> fx.Node | None:
    constant = uniform_value(node.args[1])
    return _same(node, node.args[0]) if constant is not None and not constant else None


def cat_of_one(context: Context, node: fx.Node) -> fx.Node | None:
    """cat of one tensor, once empty 1-D operands (which cat ignores) are left out."""
    operands = [x for x in _list(node.args[0]) if not _is_legacy_empty(x)]
    return _same(node, operands[0]) if len(operands) == 1 else None


def _list(argument: Any) -> list[Any]:
    return list(argument) if isinstance(argument, tuple | list) else []


def _is_legacy_empty(node: Any) -> bool:
    value = tensor(node)
    return value is not None and value.dim() == 1 and known_equal(value.shape[0], 0)


def by_nothing(context: Context, node: fx.Node) -> fx.Node | None:
    """A pad or roll whose amounts are all zero."""
    return _same(node, node.args[0]) if all(type(n) is int and n == 0 for n in _list(node.args[1])) else None


def flip_nothing(context: Context, node: fx.Node) -> fx.Node | None:
    """flip over no dimension, or only over dimensions of size 1."""
    value = tensor(node)
    dims = _list(node.args[1])
    trivial = value is not None and all(known_equal(value.shape[d], 1) for d in dims)
    return _same(node, node.args[0]) if trivial else None


def permute_identity(context: Context, node: fx.Node) -> fx.Node | None:
    value, dims = tensor(node), _list(node.args[1])
    identity = value is not None and [d % value.dim() for d in dims] == list(range(value.dim()))
    return _same(node, node.args[0]) if identity else None


def transpose_identity(context: Context, node: fx.Node) -> fx.Node | None:
    value = tensor(node)
    a, b = node.args[1], node.args[2]
    identity = value is not None and isinstance(a, int) and isinstance(b, int) and (a - b) % max(value.dim(), 1) == 0
    return _same(node, node.args[0]) if identity else None


def slice_all(context: Context, node: fx.Node) -> fx.Node | None:
    """A slice with step 1 that keeps the size keeps every element."""
    return _same(node, node.args[0]) if arguments(node)["step"] == 1 else None


def replace_all(context: Context, node: fx.Node) -> fx.Node | None:
    """slice_scatter of a whole tensor, copy: the result is the source (the second operand)."""
    return _same(node, node.args[1])


def integer_rounding(context: Context, node: fx.Node) -> fx.Node | None:
    """floor, ceil, round and trunc of integers."""
    value = tensor(node)
    return _same(node, node.args[0]) if value is not None and not value.dtype.is_floating_point else None


def idempotent(context: Context, node: fx.Node) -> fx.Node | None:
    """relu(relu(x)), abs(abs(x)), floor(floor(x)), ..."""
    inner = node.args[0]
    return _same(node, inner) if isinstance(inner, fx.Node) and inner.target is node.target else None


_AS_FIRST: tuple[Rule, ...] = (same_as_first,)
_MASK: tuple[Rule, ...] = (mask_neutral, equal_operands)
_ROUNDING: tuple[Rule, ...] = (integer_rounding, idempotent)

RULES: dict[str, tuple[Rule, ...]] = {
    **dict.fromkeys(
        "clone alias detach lift_fresh contiguous view _unsafe_view reshape expand expand_copy view_copy alias_copy squeeze "
        "repeat".split(),
        _AS_FIRST,
    ),
    "_to_copy": (cast_to_same,),
    "add": (add_zero,),
    "sub": (subtract_zero,),
    "mul": (multiply_one,),
    "div": (second_is_one,),
    "pow": (second_is_one,),
    **dict.fromkeys("bitwise_and bitwise_or logical_and logical_or".split(), _MASK),
    **dict.fromkeys("bitwise_xor logical_xor".split(), (mask_neutral,)),
    **dict.fromkeys("maximum minimum fmax fmin".split(), (equal_operands,)),
    "where": (where_constant,),
    "masked_fill": (masked_fill_nothing,),
    "cat": (cat_of_one,),
    "constant_pad_nd": (by_nothing,),
    "roll": (by_nothing,),
    "flip": (flip_nothing,),
    "permute": (permute_identity,),
    "transpose": (transpose_identity,),
    "slice": (slice_all,),
    "slice_scatter": (replace_all,),
    "copy": (replace_all,),
    **dict.fromkeys("floor ceil round trunc".split(), _ROUNDING),
    **dict.fromkeys("relu abs sgn sign".split(), (idempotent,)),
}
"""Op name -> rules, tried in order."""
