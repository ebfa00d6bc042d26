"""The C++ text of scalar ops and literals. Operands are texts of C++ values; functions are those of cpp_math.h."""

from __future__ import annotations

import math
import struct

import torch

from fxopt.errors import UnsupportedError
from fxopt.ir.loops import COMPARE, FLOAT_UNARY, Const, Op

STORED = {
    torch.float32: "float",
    torch.float64: "double",
    torch.bfloat16: "fx::bf16",
    torch.float16: "fx::f16",
    torch.bool: "bool",
    torch.int8: "int8_t",
    torch.int16: "int16_t",
    torch.int32: "int32_t",
    torch.int64: "int64_t",
    torch.uint8: "uint8_t",
    torch.uint16: "uint16_t",
    torch.uint32: "uint32_t",
    torch.uint64: "uint64_t",
}
"""Element types in memory."""

_INFIX = {"add": "+", "sub": "-", "mul": "*", "truediv": "/", "bitwise_and": "&", "bitwise_or": "|", "bitwise_xor": "^"}
_COMPARE = {"eq": "==", "ne": "!=", "lt": "<", "le": "<=", "gt": ">", "ge": ">="}
_BOOL = {
    "add": "fx::mask_or({0}, {1})",
    "mul": "fx::mask_and({0}, {1})",
    "sub": "fx::mask_xor({0}, {1})",
    "maximum": "fx::mask_or({0}, {1})",
    "minimum": "fx::mask_and({0}, {1})",
    "bitwise_or": "fx::mask_or({0}, {1})",
    "bitwise_and": "fx::mask_and({0}, {1})",
    "bitwise_xor": "fx::mask_xor({0}, {1})",
    "bitwise_not": "fx::mask_not({0})",
    "eq": "fx::mask_not(fx::mask_xor({0}, {1}))",
    "ne": "fx::mask_xor({0}, {1})",
    "lt": "fx::mask_and(fx::mask_not({0}), {1})",
    "le": "fx::mask_or(fx::mask_not({0}), {1})",
    "gt": "fx::mask_and({0}, fx::mask_not({1}))",
    "ge": "fx::mask_or({0}, fx::mask_not({1}))",
    "pow": "fx::mask_or({0}, fx::mask_not({1}))",
    "abs": "{0}",
    "sign": "{0}",
    "floor": "{0}",
    "ceil": "{0}",
    "trunc": "{0}",
    "round": "{0}",
    "where": "fx::mask_select({0}, {1}, {2})",
}
_INTEGER_DIVISION = frozenset("floordiv truncdiv remainder fmod".split())
_POWERS = {
    2.0: "({0} * {0})",
    3.0: "({0} * {0} * {0})",
    1.0: "{0}",
    0.5: "fx::sqrt({0})",
    -0.5: "fx::rsqrt({0})",
    -1.0: "fx::reciprocal({0})",
    -2.0: "fx::reciprocal({0} * {0})",
}
"""Exponents that torch's own pow computes by other means, with its results."""


def stored_type(dtype: torch.dtype) -> str:
    """The C++ type of an element in memory. Raises UnsupportedError for dtypes without one (complex, float8, ...)."""
    try:
        return STORED[dtype]
    except KeyError:
        raise UnsupportedError(f"no C++ type for {dtype}") from None


def value_type(dtype: torch.dtype) -> str:
    """The C++ type of a value in an expression."""
    return "float" if dtype in (torch.float16, torch.bfloat16) else stored_type(dtype)


def literal(node: Const) -> str:
    """`node` as a C++ literal of its value type."""
    ctype, value = value_type(node.dtype), node.value
    if node.dtype == torch.bool:
        return "true" if value else "false"
    if not node.dtype.is_floating_point:
        if value == -(2**63):
            return "std::numeric_limits<int64_t>::min()"
        return f"{ctype}({int(value)}{'u' if value > 2**63 - 1 else ''})"
    return _float_literal(float(value), ctype)


def _float_literal(value: float, ctype: str) -> str:
    suffix = "f" if ctype == "float" else ""
    if suffix and math.isfinite(value):
        try:
            value = struct.unpack("f", struct.pack("f", value))[0]
        except OverflowError:
            value = math.copysign(math.inf, value)
    if math.isnan(value):
        return f"std::numeric_limits<{ctype}>::quiet_NaN()"
    if math.isinf(value):
        return f"{'-' if value < 0 else ''}std::numeric_limits<{ctype}>::infinity()"
    return repr(value) + suffix


def divides_integers(node: Op) -> bool:
    """An integer division, which must not meet a zero divisor."""
    return node.name in _INTEGER_DIVISION and not node.dtype.is_floating_point


def op_text(node: Op, args: list[str], vector: bool) -> str:
    """`node` applied to operand texts, all vectors or all scalars (except a condition)."""
    name = node.name
    of = node.args[1 if name == "where" else 0].dtype
    if of == torch.bool and name in _BOOL:
        return _BOOL[name].format(*args)
    if name in COMPARE:
        return f"({args[0]} {_COMPARE[name]} {args[1]})"
    if name in ("cast", "bitcast"):
        return _cast_text(node, args[0]) if name == "cast" else _bitcast_text(node, args[0], vector)
    if name == "where":
        return f"fx::select({', '.join(args)})"
    if of == torch.bool:
        raise UnsupportedError(f"{name} of bool values")
    if name in _INFIX:
        text = f"({args[0]} {_INFIX[name]} {args[1]})"
        narrow = not vector and not node.dtype.is_floating_point and node.dtype.itemsize < 4
        return f"static_cast<{stored_type(node.dtype)}>{text}" if narrow else text
    if not of.is_floating_point and name in ("isnan", "isinf"):
        return f"({args[0]} != {args[0]})"
    if name == "pow":
        return _pow_text(node, args)
    if name == "nextafter" and of in (torch.float16, torch.bfloat16):
        return f"fx::nextafter16<{stored_type(of)}>({', '.join(args)})"
    if not of.is_floating_point and (name in FLOAT_UNARY or name in ("reciprocal", "truediv")):
        raise UnsupportedError(f"{name} of {of}")
    return f"fx::{'int_' if divides_integers(node) else ''}{name}({', '.join(args)})"


def _pow_text(node: Op, args: list[str]) -> str:
    exponent = node.args[1]
    if not node.dtype.is_floating_point:
        return f"fx::int_pow({args[0]}, {args[1]})"
    if isinstance(exponent, Const) and exponent.value in _POWERS:
        return _POWERS[float(exponent.value)].format(args[0])
    return f"fx::pow({args[0]}, {args[1]})"


def _cast_text(node: Op, arg: str) -> str:
    source, target = node.args[0].dtype, node.dtype
    if value_type(source) == value_type(target):
        return arg
    if source == torch.bool:
        return f"fx::from_bool<{value_type(target)}>({arg})"
    if target == torch.bool:
        return f"fx::to_bool({arg})"
    return f"fx::cast<{value_type(target)}>({arg})"


def _bitcast_text(node: Op, arg: str, vector: bool) -> str:
    source, target = stored_type(node.args[0].dtype), stored_type(node.dtype)
    width = "W" if vector else "1"
    return f"fx::widen<{target}>(fx::bits_as<fx::Raw<{target}, {width}>>(fx::shrink<{source}>({arg})))"
