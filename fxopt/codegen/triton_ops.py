"""Scalar ops of the loop IR as Triton text. Types of 8 and 16 floating bits are computed in float32."""

from __future__ import annotations

import math

import torch

from fxopt.codegen.triton_tiling import accumulator_dtype
from fxopt.errors import UnsupportedError
from fxopt.ir.rounding import saturates

TL_TYPE = {
    torch.float16: "tl.float16",
    torch.bfloat16: "tl.bfloat16",
    torch.float32: "tl.float32",
    torch.float64: "tl.float64",
    torch.int8: "tl.int8",
    torch.int16: "tl.int16",
    torch.int32: "tl.int32",
    torch.int64: "tl.int64",
    torch.uint8: "tl.uint8",
    torch.uint16: "tl.uint16",
    torch.uint32: "tl.uint32",
    torch.uint64: "tl.uint64",
    torch.bool: "tl.int1",
    torch.float8_e4m3fn: "tl.float8e4nv",
    torch.float8_e5m2: "tl.float8e5",
}

POINTER_TYPE = {
    torch.float16: "*fp16",
    torch.bfloat16: "*bf16",
    torch.float32: "*fp32",
    torch.float64: "*fp64",
    torch.int8: "*i8",
    torch.int16: "*i16",
    torch.int32: "*i32",
    torch.int64: "*i64",
    torch.uint8: "*u8",
    torch.uint16: "*u16",
    torch.uint32: "*u32",
    torch.uint64: "*u64",
    torch.bool: "*i1",
    torch.float8_e4m3fn: "*fp8e4nv",
    torch.float8_e5m2: "*fp8e5",
}

HALF = (torch.float16, torch.bfloat16)
"""Types whose rounding hides what `apply` calls fast."""

RANDOM = ("rand", "randn", "randint")
"""Ops that draw from a seed and an index, at the cost of tens of instructions."""

_UNSIGNED = (torch.uint8, torch.uint16, torch.uint32, torch.uint64)

_INFIX = {
    "add": "+",
    "sub": "-",
    "mul": "*",
    "bitwise_and": "&",
    "bitwise_or": "|",
    "bitwise_xor": "^",
    "eq": "==",
    "ne": "!=",
    "lt": "<",
    "le": "<=",
    "gt": ">",
    "ge": ">=",
}
INFIX = frozenset(_INFIX)
"""Ops printed as Python operators: a constant operand may be a bare literal."""

_CALLS = {
    "sqrt": "h.square_root",
    "sigmoid": "h.sigmoid",
    "abs": "tl.abs",
    "sign": "h.sign",
    "floor": "tl.floor",
    "ceil": "tl.ceil",
    "trunc": "libdevice.trunc",
    "round": "libdevice.rint",
    "maximum": "h.maximum",
    "minimum": "h.minimum",
    "truediv": "h.divide",
    "where": "tl.where",
    "rand": "h.rand",
    "randn": "h.randn",
    "randint": "h.randint",
    "lshift": "h.shift_left",
    "rshift": "h.shift_right",
}

_LIBDEVICE = frozenset(
    "rsqrt exp exp2 expm1 log log2 log10 log1p sin cos tan asin acos atan sinh cosh tanh asinh acosh atanh "
    "erf erfc erfinv lgamma atan2 hypot copysign nextafter fmod".split()
)

_BY_KIND = {  # op -> (floating point, integer)
    "floordiv": ("h.float_floordiv", "h.int_floordiv"),
    "remainder": ("h.float_remainder", "h.int_remainder"),
    "pow": ("libdevice.pow", "h.int_pow"),
}

_ONE_INSTRUCTION = {"maximum": "h.largest", "minimum": "h.smallest"}  # of float32; of two zeros either
_FAST = {"exp": "tl.exp", "rsqrt": "tl.rsqrt", "sigmoid": "h.fast_sigmoid", "sqrt": "tl.sqrt"}
FEW_UNITS = frozenset(("sqrt", "rsqrt", "reciprocal"))
"""Whose fast forms are off by two units in float32's last place at most; exact ones take a dozen instructions each."""
_INTEGER_IDENTITY = frozenset(("floor", "ceil", "trunc", "round"))


def tl_type(dtype: torch.dtype) -> str:
    """The Triton scalar type of `dtype` in memory. Raises UnsupportedError for complex and other types."""
    if dtype not in TL_TYPE:
        raise UnsupportedError(f"Triton kernels do not hold {dtype}")
    return TL_TYPE[dtype]


def compute_type(dtype: torch.dtype) -> str:
    """The Triton type that values of `dtype` are computed in."""
    return tl_type(accumulator_dtype(dtype))


def literal(value: bool | int | float) -> str:
    """A Python literal; infinities and NaN as float("...") calls, which the Triton frontend folds."""
    if isinstance(value, float) and not math.isfinite(value):
        return f'float("{value}")'
    return repr(value)


def typed_constant(value: bool | int | float, dtype: torch.dtype) -> str:
    return f"tl.full([], {literal(value)}, {compute_type(dtype)})"


def cast(text: str, source: torch.dtype, target: torch.dtype) -> str:
    """`text` of dtype `source` converted as torch's .to(target); narrow types stay in float32."""
    src, dst = accumulator_dtype(source), accumulator_dtype(target)
    if src == dst:
        return text
    if dst == torch.bool:
        return f"({text} != 0)"
    if src.is_floating_point and not dst.is_floating_point and dst.itemsize < 4:
        middle = "tl.int64" if dst in _UNSIGNED else "tl.int32"  # what c10's conversion goes through
        return f"{text}.to({middle}).to({tl_type(dst)})"
    return f"{text}.to({tl_type(dst)})"


def narrowed(text: str, dtype: torch.dtype, clamped: bool = False) -> str:
    """`text`, a float32, rounded to a narrow `dtype` as torch's cast does it. `clamped`: it is in the range of that, or NaN.

    The GPU's conversions to 8 bits saturate.
    """
    if dtype == torch.float8_e5m2:
        return f"h.to_float8e5({text})"
    if dtype == torch.float8_e4m3fn and not clamped and not saturates():
        text = f"h.nan_beyond_float8e4({text})"
    return f"{text}.to({tl_type(dtype)})"


def bitcast(text: str, source: torch.dtype, target: torch.dtype, clamped: bool = False) -> str:
    """The bits of `text` in its stored precision read as `target`; `clamped` as in `narrowed`."""
    if accumulator_dtype(source) != source:
        text = narrowed(text, source, clamped)
    text = f"{text}.to({tl_type(target)}, bitcast=True)"
    return text if accumulator_dtype(target) == target else f"{text}.to(tl.float32)"


def apply(name: str, args: list[str], operand: torch.dtype, fast: bool = False) -> str:
    """Op `name` (not cast, bitcast or checked_index) over printed `args`; `operand` is the dtype of the first argument.

    `fast` allows a relative error of 1e-5 (tl.exp of -100; elsewhere below 1e-6): the result is rounded to half precision.
    """
    floating = operand.is_floating_point
    if name in _INFIX:
        return _infix(name, args, operand)
    if fast and name in ("truediv", "reciprocal") and operand != torch.float64:
        return f"({args[0]} / {args[1]})" if name == "truediv" else f"(1.0 / {args[0]})"
    if name in ("neg", "bitwise_not", "reciprocal", "isnan", "isinf", "signbit"):
        return _unary(name, args[0], operand)
    if name in _INTEGER_IDENTITY and not floating:
        return args[0]
    if name == "truncdiv":
        return f"libdevice.trunc(h.divide({args[0]}, {args[1]}))" if floating else f"({args[0]} // {args[1]})"
    if name == "fmod" and not floating:
        return f"({args[0]} % {args[1]})"
    return f"{_function(name, operand, fast and operand != torch.float64)}({', '.join(args)})"


def _function(name: str, operand: torch.dtype, fast: bool) -> str:
    if name in _BY_KIND:
        return _BY_KIND[name][0 if operand.is_floating_point else 1]
    if name in _FAST and fast:
        return _FAST[name]
    if name in _ONE_INSTRUCTION and accumulator_dtype(operand) == torch.float32:
        return _ONE_INSTRUCTION[name]
    if name == "maximum" and operand == torch.int8:
        return "h.larger_int8"
    if name in _CALLS:
        return _CALLS[name]
    if name in _LIBDEVICE:
        return f"libdevice.{name}"
    raise UnsupportedError(f"no Triton form of scalar op {name!r}")


def _infix(name: str, args: list[str], operand: torch.dtype) -> str:
    symbol = _INFIX[name]
    if operand == torch.bool and name in ("add", "mul"):
        symbol = "|" if name == "add" else "&"
    return f"({args[0]} {symbol} {args[1]})"


def _unary(name: str, arg: str, operand: torch.dtype) -> str:
    floating = operand.is_floating_point
    if name == "neg":
        return f"({arg} * -1.0)" if floating else f"(-{arg})"  # 0 - x would lose the sign of zero
    if name == "bitwise_not":
        return f"(~{arg})"
    if name == "reciprocal":
        return f"h.divide({typed_constant(1.0, operand)}, {arg})"
    if not floating:
        return f"({arg} < 0)" if name == "signbit" else f"({arg} != {arg})"
    if name == "isnan":
        return f"({arg} != {arg})"
    if name == "isinf":
        return f'(tl.abs({arg}) == float("inf"))'
    bits = "tl.int64" if operand == torch.float64 else "tl.int32"
    return f"({arg}.to({bits}, bitcast=True) < 0)"


def identity(kind: str, dtype: torch.dtype) -> bool | int | float:
    """The neutral element of reduction or scan `kind` over `dtype`."""
    if kind in ("sum", "cumsum", "any"):
        return 0
    if kind in ("prod", "cumprod", "all"):
        return 1
    largest = kind in ("min", "argmin", "cummin")  # of the others, logcumsumexp too starts from -inf
    if dtype.is_floating_point:
        return math.inf if largest else -math.inf
    info = torch.iinfo(dtype)
    return info.max if largest else info.min
