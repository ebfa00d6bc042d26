"""What is known of a value before it is printed: where it is rounded, what it is clamped to, whether it is narrow."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TypeGuard

import torch

from fxopt.codegen import triton_ops as ops
from fxopt.codegen.triton_index import computed_in_int32
from fxopt.ir.exprs import Int, bounds
from fxopt.ir.loops import Const, IndexValue, Load, Masked, Nest, Op, Reduce, Scalar, postorder

RELATIVE = ("mul", "truediv", "neg", "where")
ARITHMETIC = (*RELATIVE, "sqrt", "rsqrt", "reciprocal", "add", "sub", "maximum", "minimum", "sigmoid", "tanh", "erf")
_BRANCHING = ("truediv", "reciprocal", "sqrt")
_COMPARES = ("eq", "ne", "lt", "le", "gt", "ge")


def rounded_soon(nest: Nest, between: Sequence[str] = RELATIVE) -> frozenset[Scalar]:
    """float32 values that only ops named in `between` lie between and a rounding to half precision.

    Products, quotients and selections keep a relative error as it is, so what `ops.apply` calls fast is invisible after the
    rounding. Where sums lie between too (`ARITHMETIC`) they may cancel, and show of an error what they show of roundings of
    float32 themselves: functions that are off by as little (`ops.FEW_UNITS`) may be fast there.
    """
    return _rounded_by_casts(nest, between, ops.HALF)


def rounded_to_8_bits(nest: Nest) -> frozenset[Scalar]:
    """Values that only products, selections, bounds and wider casts lie between and a cast to float8_e4m3fn."""
    between = (*RELATIVE, "maximum", "minimum", "cast")
    return _rounded_by_casts(nest, between, (torch.float8_e4m3fn,), (*ops.HALF, torch.float32))


def _rounded_by_casts(
    nest: Nest, between: Sequence[str], dtypes: Sequence[torch.dtype], held: Sequence[torch.dtype] = (torch.float32,)
) -> frozenset[Scalar]:
    """Values of the types `held` that only ops named in `between` lie between and casts to `dtypes`."""
    users: dict[Scalar, list[Scalar]] = {}
    nodes = list(postorder(nest.roots))
    for node in nodes:
        for arg in node.args:
            users.setdefault(arg, []).append(node)
    exact = {v for v in nest.roots if v.dtype not in dtypes}
    rounded: set[Scalar] = set()
    for node in reversed(nodes):
        own = users.get(node, [])
        if node.dtype not in held or not own or node in exact:
            continue
        if all(_leads_to(u, rounded, between, dtypes) for u in own):
            rounded.add(node)
    return frozenset(rounded)


def _leads_to(user: Scalar, rounded: set[Scalar], between: Sequence[str], dtypes: Sequence[torch.dtype]) -> bool:
    if not isinstance(user, Op):
        return isinstance(user, Masked) and user in rounded
    return (user.name == "cast" and user.dtype in dtypes) or (user.name in between and user in rounded)


def is_clamped(value: Scalar) -> bool:
    """Whether `value`, of a narrow dtype, is within its range or NaN because it was clamped to bounds that are known."""
    if not value.dtype.is_floating_point:
        return False
    largest = torch.finfo(value.dtype).max
    _, low, high = _bounded(value)
    return -largest <= low and high <= largest


def saturated(value: Scalar) -> Scalar | None:
    """What `value`, a float8_e4m3fn, is before a clamp to that type's range, which the GPU's conversion does itself."""
    largest = torch.finfo(torch.float8_e4m3fn).max
    if value.dtype != torch.float8_e4m3fn:
        return None
    inner, low, high = _bounded(value)
    return inner if (low, high) == (-largest, largest) and inner.dtype == torch.float32 else None


def _bounded(value: Scalar) -> tuple[Scalar, float, float]:
    """What `value` is made of by casts between floating types and bounds, the least and the greatest of these."""
    low, high = -math.inf, math.inf
    while isinstance(value, Op) and value.name in ("cast", "minimum", "maximum") and value.args[0].dtype.is_floating_point:
        varying = [a for a in value.args if not isinstance(a, Const)]
        if len(varying) != 1:
            break
        if value.name != "cast":
            (bound,) = (float(a.value) for a in value.args if isinstance(a, Const))
            low = max(low, bound) if value.name == "maximum" else low
            high = min(high, bound) if value.name == "minimum" else high
        value = varying[0]
    return value, low, high


def rounded_within_int8(node: Op) -> tuple[Scalar, float, float] | None:
    """(value, low, high) of a cast to int8 of a rounded float32 that is clamped to whole bounds within its range."""
    if node.name != "cast" or node.dtype != torch.int8 or node.args[0].dtype != torch.float32:
        return None
    value, low, high = node.args[0], -math.inf, math.inf
    while isinstance(value, Op) and value.name in ("minimum", "maximum"):
        bounds = [float(a.value) for a in value.args if isinstance(a, Const)]
        if len(bounds) != 1 or not bounds[0].is_integer():
            return None
        low, high = (max(low, bounds[0]), high) if value.name == "maximum" else (low, min(high, bounds[0]))
        value = next(a for a in value.args if not isinstance(a, Const))
    if not (isinstance(value, Op) and value.name == "round" and -128.0 <= low < high <= 127.0):
        return None
    return value.args[0], low, high


def scaled_relu(node: Scalar) -> tuple[Scalar, Scalar | None]:
    """(x, factor) of a float32 that is relu(x) times a factor that is one for all elements, or x times a constant that is
    not negative; otherwise (`node`, None).
    """
    if not _is_product(node):
        return node, None
    for factor, x in (node.args, reversed(node.args)):
        if not factor.symbols() and isinstance(factor, Load | Const):
            if (inner := _below_relu(x)) is not None:
                return inner, factor
            if isinstance(factor, Const) and factor.value >= 0:
                return x, factor
    return node, None


def _below_relu(node: Scalar) -> Scalar | None:
    """The x of which `node` is the larger one of x and 0, as it is held in registers."""
    held = {*ops.HALF, torch.float32}
    while isinstance(node, Op) and node.name == "cast" and {node.dtype, node.args[0].dtype} <= held:
        node = node.args[0]
    if not (isinstance(node, Op) and node.name == "maximum"):
        return None
    varying = [a for a in node.args if not (isinstance(a, Const) and a.value == 0)]
    return varying[0] if len(varying) == 1 else None


def gelu_argument(node: Scalar) -> Scalar | None:
    """The x of which `node` is x / 2 * (1 + erf(x / sqrt(2))) in float32, with its factors in any order."""
    if not _is_product(node):
        return None
    for alone, other in (node.args, reversed(node.args)):
        factors = [alone, *other.args] if _is_product(other) else []
        halves = [f for f in factors if isinstance(f, Const) and f.value == 0.5]
        shares = [(f, share) for f in factors if (share := _beside_one(f)) is not None]
        if len(halves) != 1 or len(shares) != 1:
            continue
        ((total, share),) = shares
        (x,) = (f for f in factors if f is not halves[0] and f is not total)
        if _is_product(share.args[0]) and x in share.args[0].args:
            scale = next((a for a in share.args[0].args if isinstance(a, Const)), None)
            if scale is not None and math.isclose(scale.value, math.sqrt(0.5), rel_tol=1e-6):
                return x
    return None


def _beside_one(node: Scalar) -> Op | None:
    """The error function of which `node` is the sum with 1."""
    if not (isinstance(node, Op) and node.name == "add" and any(isinstance(a, Const) and a.value == 1 for a in node.args)):
        return None
    return next((a for a in node.args if isinstance(a, Op) and a.name == "erf"), None)


def _is_product(node: Scalar) -> TypeGuard[Op]:
    return isinstance(node, Op) and node.name == "mul" and node.dtype == torch.float32


def reduced_dtype(node: Reduce) -> torch.dtype:
    """The dtype whose working form a reduction is carried out in: the values' for arg reductions, else the result's."""
    return node.operands[0].dtype if node.kind in ("argmax", "argmin", "max", "min", "any", "all") else node.dtype


def is_within(index: Scalar, size: Scalar) -> bool:
    """Whether `index` is clamped to what is legal for a dimension of `size`, so that a check would only cost its barrier."""
    if not (isinstance(size, Const) and isinstance(index, Op) and index.name == "minimum"):
        return False
    below, top = index.args
    if not (isinstance(below, Op) and below.name == "maximum" and isinstance(top, Const)):
        return False
    low = below.args[1]
    return isinstance(low, Const) and -size.value <= low.value <= top.value < size.value


def is_narrow_comparison(node: Scalar) -> bool:
    """A comparison of integers that fit the index type, which needs no int64 values."""
    return isinstance(node, Op) and node.name in _COMPARES and all(_narrow(a) for a in node.args)


def asked_of_index(node: Scalar) -> tuple[IndexValue, Scalar] | None:
    """(index, wanted) of a comparison of a narrow, non-negative index with an int64 that is one for many indices, as a
    one-hot vector asks it: for equality an int32 does in its place."""
    if not (isinstance(node, Op) and node.name in ("eq", "ne")):
        return None
    for index, wanted in (node.args, reversed(node.args)):
        if not (isinstance(index, IndexValue) and _narrow(index) and _is_natural(index.expr)):
            continue
        if wanted.dtype == torch.int64 and not index.symbols() <= wanted.symbols():
            return index, wanted
    return None


def larger_place(node: Scalar) -> tuple[Scalar, Scalar, int, Scalar] | None:
    """(value, top, place, other) of a choice of the number `place` where `value` is larger than `top` or NaN, else of
    `other`, by which the largest element under a window is found: of values in half precision, and numbers of 16 bits."""
    if not (isinstance(node, Op) and node.name == "where" and node.dtype == torch.int32 and _fits_int16(node)):
        return None
    condition, place, other = node.args
    if not (isinstance(condition, Op) and condition.name == "bitwise_or" and isinstance(place, Const)):
        return None
    larger, invalid = condition.args
    if not (isinstance(larger, Op) and larger.name == "gt" and isinstance(invalid, Op) and invalid.name == "isnan"):
        return None
    value, top = larger.args
    if invalid.args[0] is not value or not (_is_half(value) and _is_half(top)):
        return None
    return value, top, int(place.value), other


def _fits_int16(node: Scalar) -> bool:
    """A choice among small numbers."""
    chosen = [node]
    while chosen:
        match chosen.pop():
            case Const(value=value) if -(2**15) <= value < 2**15:
                pass
            case Op(name="where", args=(_, one, other)) | Masked(body=one, other=other):
                chosen += [one, other]
            case _:
                return False
    return True


def _is_half(node: Scalar) -> bool:
    """A value in half precision that is not computed with more bits: something loaded, or the largest of such."""
    if node.dtype not in ops.HALF:
        return False
    chosen = [node]
    while chosen:
        match chosen.pop():
            case Load():
                pass
            case Const(value=value) if math.isinf(value):
                pass
            case Op(name="maximum", args=(one, other)) | Masked(body=one, other=other):
                chosen += [one, other]
            case _:
                return False
    return True


def _is_natural(x: Int) -> bool:
    low, _ = bounds(x)
    return low is not None and low >= 0


def is_of_half(node: Scalar) -> bool:
    """exp(x) or sigmoid(x) of an x in half precision, to whose rounding any error of a float32's exponential is nothing."""
    if not (isinstance(node, Op) and node.name in ("exp", "sigmoid") and node.dtype == torch.float32):
        return False
    inner = uncast(node.args[0])
    return inner is not node.args[0] and inner.dtype in ops.HALF


def counts_index(node: Scalar) -> bool:
    """A random number at an index, of which a printer takes quotient and remainder."""
    return isinstance(node, Op) and node.name == "rand" and isinstance(node.args[1], IndexValue)


def is_share(node: Scalar) -> bool:
    """A softmax in float32: exp(x - maximum) over the row's sum of these, which is at least 1 or NaN."""
    if not (isinstance(node, Op) and node.name == "truediv" and node.dtype == torch.float32):
        return False
    part, total = node.args
    if not (isinstance(total, Reduce) and total.kind in ("softmax_stats", "weighted_softmax") and total.output == 1):
        return False
    distance = part.args[0] if isinstance(part, Op) and part.name == "exp" else None
    if not (isinstance(distance, Op) and distance.name == "sub"):
        return False
    top = distance.args[1]
    return isinstance(top, Reduce) and top.output == 0 and (top.kind, top.operands) == (total.kind, total.operands)


def is_bell(node: Scalar) -> bool:
    """exp(-c * x * x), whose value is at most 1 and falls faster than a relative error of its exponent grows."""
    if not (isinstance(node, Op) and node.name == "exp" and node.dtype == torch.float32):
        return False
    product = node.args[0]
    if not (isinstance(product, Op) and product.name == "mul"):
        return False
    square, factor = product.args
    negative = isinstance(factor, Const) and factor.value < 0
    return negative and isinstance(square, Op) and square.name == "mul" and square.args[0] is square.args[1]


def has_slow_path(node: Scalar) -> bool:
    """A quotient or root of floats, whose exact forms branch."""
    return isinstance(node, Op) and node.name in _BRANCHING and node.args[0].dtype.is_floating_point


def exact_reciprocal(node: Scalar) -> float | None:
    """1 / `node` if that is a known power of two, far from the ends of float32."""
    node = uncast(node)
    if not isinstance(node, Const) or abs(math.frexp(node.value)[0]) != 0.5 or not 2.0**-100 < abs(node.value) < 2.0**100:
        return None
    return 1 / node.value


def uncast(node: Scalar) -> Scalar:
    return node.args[0] if isinstance(node, Op) and node.name == "cast" else node


def _narrow(node: Scalar) -> bool:
    if isinstance(node, Const):
        return isinstance(node.value, int) and abs(node.value) < 2**31
    return isinstance(node, IndexValue) and computed_in_int32(node.expr)
