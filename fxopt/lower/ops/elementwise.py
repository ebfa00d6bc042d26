"""What element-wise lowerings share: eager's type promotion, operands as terms, one formula for many ops."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Sequence
from typing import Any

import torch

from fxopt.errors import UnsupportedError
from fxopt.ir.exprs import Expr, Int
from fxopt.ir.loops import Const, Load, Op, Scalar, postorder
from fxopt.ir.rounding import HALVES, NARROW, rounded
from fxopt.lower.calls import moved
from fxopt.lower.lowering import Lowering
from fxopt.lower.ops.terms import Term
from fxopt.lower.table import Table
from fxopt.lower.values import Computed, Stored, Value, at, broadcast_indices, broadcast_shape, cast, pointwise, size_value


def compute_dtype(dtype: torch.dtype) -> torch.dtype:
    """What element-wise ops and reductions of `dtype` compute in: float32 for the narrow types, else `dtype`."""
    return torch.float32 if dtype in NARROW else dtype


def is_value(x: Any) -> bool:
    return isinstance(x, (Stored, Computed))


def is_number(x: Any) -> bool:
    return isinstance(x, (bool, int, float, Expr))


# ---------------------------------------------------------------------- promotion


def _rank(dtype: torch.dtype) -> int:
    return 2 if dtype.is_floating_point else 0 if dtype == torch.bool else 1


def _number_dtype(x: Any) -> torch.dtype:
    return torch.bool if isinstance(x, bool) else torch.get_default_dtype() if isinstance(x, float) else torch.int64


def result_type(*args: Any) -> torch.dtype:
    """torch.result_type of Values and numbers: a number, or a 0-dim tensor next to larger ones, counts only by its category

    (bool < integer < floating). Source: "Tensor Attributes", type promotion, in torch's documentation.
    """
    classes: list[list[torch.dtype]] = [[], [], []]  # tensors with dimensions, 0-dim tensors, numbers
    for a in args:
        if is_value(a):
            classes[0 if a.shape else 1].append(a.dtype)
        else:
            classes[2].append(_number_dtype(a))
    joined = [functools.reduce(torch.promote_types, members) for members in classes if members]
    return functools.reduce(lambda high, low: high if _rank(high) >= _rank(low) else torch.promote_types(high, low), joined)


# ---------------------------------------------------------------------- operands


def widened(x: Scalar, dtype: torch.dtype) -> Scalar:
    """`x` as `dtype`, looking through a rounding to a half type: between element-wise ops nothing is rounded."""
    if dtype.is_floating_point and isinstance(x, Op) and x.name == "cast" and x.dtype in HALVES:
        inner = x.args[0]
        if inner.dtype.is_floating_point:
            return cast(inner, dtype)
    return cast(x, dtype)


def operand(arg: Any, indices: Sequence[Int], dtype: torch.dtype, *, exact: bool = False) -> Scalar:
    """An argument of an element-wise op (a Value or a number) at `indices`, as `dtype`; rounded first when `exact`."""
    if isinstance(arg, (Stored, Computed)):
        element = at(arg, broadcast_indices(arg.shape, indices))
        return cast(rounded(element), dtype) if exact else widened(element, dtype)
    if isinstance(arg, Expr):
        return size_value(arg, dtype)
    if isinstance(arg, float) and not math.isfinite(arg) and not dtype.is_floating_point:
        raise UnsupportedError(f"{arg} as {dtype}")
    return Const(arg, dtype)


def on_device(ctx: Lowering, value: Value, device: torch.device) -> Value:
    """`value` where a kernel on `device` can read it: a single element from elsewhere, which eager takes too, is copied."""
    if value.device == device:
        return value
    loads = isinstance(value, Stored) or any(isinstance(n, Load) for n in postorder((value.body,)))
    if loads and value.shape:
        raise UnsupportedError(f"combines {value.device} memory with tensors on {device}")
    return moved(ctx, value, device) if loads else value


def elementwise(
    ctx: Lowering,
    args: Sequence[Any],
    fn: Callable[..., Term],
    *,
    compute: torch.dtype | None = None,
    computes: Sequence[torch.dtype] | None = None,
    exact: bool = False,
    position: int | None = None,
) -> Computed:
    """fn(*terms) over the broadcast `args`: Values and numbers, each as `compute` (by default what the result computes in).

    `computes` gives each argument a dtype of its own. `exact` rounds half types first, as memory would. None and strings are
    given to `fn` as they are. `position` is that of the result among several.
    """
    out = ctx.out(position)
    computes = computes or [compute or compute_dtype(out.dtype)] * len(args)
    args = [on_device(ctx, a, out.device) if isinstance(a, (Stored, Computed)) else a for a in args]
    values = [a for a in args if isinstance(a, (Stored, Computed))]
    shape = broadcast_shape(*(v.shape for v in values))

    def body(indices: tuple[Int, ...]) -> Scalar:
        given = [
            Term(operand(a, indices, dtype, exact=exact)) if is_value(a) or is_number(a) else a
            for a, dtype in zip(args, computes, strict=True)
        ]
        return fn(*given).scalar

    return pointwise(shape, out.dtype, out.device, body, values)


Formula = Callable[..., Term]


def formula(table: Table, *ops: Any) -> Callable[[Formula], Formula]:
    """Decorator: in `table`, each op is this formula of its arguments: positional ones as terms, keyword ones as given."""

    def register(fn: Formula) -> Formula:
        def lower(ctx: Lowering, *args: Any, **kwargs: Any) -> Computed:
            return elementwise(ctx, args, lambda *terms: fn(*terms, **kwargs))

        table.lowers(*ops)(lower)
        return fn

    return register
