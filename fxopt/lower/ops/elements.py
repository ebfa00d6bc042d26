"""Values made of another value's elements, or of none: what joins, gathers and scatters start from."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from fxopt.errors import UnsupportedError
from fxopt.ir.exprs import Int
from fxopt.ir.loops import Const
from fxopt.lower.ops.bounds import is_empty
from fxopt.lower.values import Computed, Value, at, dim_indices, nodes_of, pointwise

Indices = tuple[Int, ...]


def moved(x: Value, shape: Sequence[Int], source: Callable[[Indices], Sequence[Int]]) -> Computed:
    """The value of `shape` whose element at `i` is x[source(i)]."""
    if is_empty(shape) or is_empty(x.shape):
        return nothing(x, shape)
    return pointwise(shape, x.dtype, x.device, lambda i: at(x, source(i)), (x,))


def nothing(x: Value, shape: Sequence[Int]) -> Computed:
    """A value without elements, of the dtype of `x`. Raises UnsupportedError if `shape` may have some."""
    if not is_empty(shape):
        raise UnsupportedError(f"elements of shape {list(shape)} from an empty tensor")
    return Computed(Const(0, x.dtype), x.dtype, x.device, tuple(shape))


def zeros(like: Value, shape: Sequence[Int]) -> Computed:
    """Zeros of `shape` with the dtype and device of `like`."""
    return Computed(Const(0, like.dtype), like.dtype, like.device, tuple(shape))


def fresh(value: Value) -> Computed:
    """`value` as an expression, so that the result is new memory and never an alias of it."""
    if isinstance(value, Computed):
        return value
    body = at(value, dim_indices(value.shape))
    return Computed(body, value.dtype, value.device, value.shape, nodes_of(value))
