"""Scatters with a reduction other than the sum: each destination looks through the few sources that may be meant for it.

Memory has an atomic addition and no atomic product. A destination that reduces over the sources whose index is its own needs
none, gives the same bits every time, and reads each source once for each place along the dimension: so only for few.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch

from fxopt.errors import UnsupportedError
from fxopt.ir.exprs import Int, ask
from fxopt.ir.loops import Const, Masked, Op, Scalar
from fxopt.lower.lowering import Lowering
from fxopt.lower.ops.bounds import BOOL, all_of, compare, dim_of, is_empty
from fxopt.lower.ops.elements import Indices, fresh
from fxopt.lower.ops.indirect import require_device, require_integer
from fxopt.lower.table import Table
from fxopt.lower.values import Computed, Stored, Value, at, cast, pointwise, size_value

aten = torch.ops.aten
TABLE = Table()

MAX_SOURCES = 256
"""Sources along the dimension, for each place of the other dimensions, that a destination looks through."""

KINDS = {"prod": "prod", "multiply": "prod", "amax": "max", "amin": "min", "mean": "sum"}
JOINS = {"prod": "mul", "max": "maximum", "min": "minimum", "sum": "add"}

Source = Callable[[Indices], Scalar]


def scatter_with(
    ctx: Lowering, x: Value, dim: int, index: Value, src: Value | Scalar, reduce: str, include_self: bool
) -> Value:
    """torch.scatter_reduce: src[i] is reduced into x at i with index[i] in place of i[dim]; `src` may be one number."""
    dim = dim_of(dim, len(x.shape))
    inputs = (index, src) if isinstance(src, (Stored, Computed)) else (index,)
    if not x.shape or not index.shape:
        raise UnsupportedError(f"scatter with reduction {reduce!r} of scalars")

    def element(i: Indices) -> Scalar:
        return at(src, i) if isinstance(src, (Stored, Computed)) else src

    return _searched(ctx, x, dim, index.shape, lambda i: at(index, i), element, reduce, include_self, inputs)


@TABLE.lowers(aten.index_reduce.default)
def index_reduce(
    ctx: Lowering, x: Value, dim: int, index: Value, source: Value, reduce: str, *, include_self: bool = True
) -> Value:
    """Slices of `source` along `dim` are reduced into those of `x` that `index` names."""
    if not x.shape or not index.shape or not source.shape:
        raise UnsupportedError("index_reduce of scalars")
    dim = dim_of(dim, len(x.shape))
    shape = (*x.shape[:dim], index.shape[0], *x.shape[dim + 1 :])
    own = lambda i: at(index, (i[dim],))  # noqa: E731
    return _searched(ctx, x, dim, shape, own, lambda i: at(source, i), reduce, include_self, (index, source))


def _searched(
    ctx: Lowering,
    x: Value,
    dim: int,
    shape: Sequence[Int],
    index: Source,
    element: Source,
    reduce: str,
    include_self: bool,
    inputs: Sequence[Value],
) -> Value:
    """`x` with element(i), for each i of `shape`, reduced into its place i with index(i) for i[dim]."""
    if reduce not in KINDS:
        raise UnsupportedError(f"scatter with reduction {reduce!r}")
    require_integer(inputs[0])
    require_device(x.device, *inputs)
    if is_empty(x.shape) or is_empty(shape):
        return fresh(x)
    if ask("<=", shape[dim], MAX_SOURCES) is not True:
        raise UnsupportedError(f"scatter with reduction {reduce!r} from many places")
    kind, dtype = KINDS[reduce], torch.float32 if x.dtype in (torch.float16, torch.bfloat16) else x.dtype
    search = _Search(ctx, x, dim, shape, index, inputs)
    found = search.reduce(kind, dtype, lambda i: cast(element(i), dtype), neutral(kind, dtype))
    if include_self and reduce != "mean":
        return pointwise(
            x.shape, x.dtype, x.device, lambda i: Op(JOINS[kind], (cast(at(x, i), dtype), at(found, i)), dtype), (x, found)
        )
    count = search.reduce("sum", torch.int64, lambda i: Const(1, torch.int64), Const(0, torch.int64))

    def body(i: Indices) -> Scalar:
        own, many = cast(at(x, i), dtype), at(count, i)
        touched = Op("ne", (many, Const(0, torch.int64)), BOOL)
        value = at(found, i)
        if reduce == "mean":
            value = _mean(value, own, many, include_self)
        return Op("where", (touched, value, own), dtype)

    return pointwise(x.shape, x.dtype, x.device, body, (x, found, count))


def _mean(total: Scalar, own: Scalar, many: Scalar, include_self: bool) -> Scalar:
    dtype = total.dtype
    if include_self:
        total, many = Op("add", (own, total), dtype), Op("add", (many, Const(1, torch.int64)), torch.int64)
    divisor = cast(Op("maximum", (many, Const(1, torch.int64)), torch.int64), dtype)
    return Op("truediv" if dtype.is_floating_point else "floordiv", (total, divisor), dtype)


def neutral(kind: str, dtype: torch.dtype) -> Const:
    """What changes nothing in a reduction of `kind`."""
    if kind in ("sum", "prod"):
        return Const(0 if kind == "sum" else 1, dtype)
    if dtype == torch.bool:
        return Const(kind == "min", dtype)
    limits = torch.finfo(dtype) if dtype.is_floating_point else torch.iinfo(dtype)
    infinite = float("inf") if dtype.is_floating_point else limits.max
    lowest = -float("inf") if dtype.is_floating_point else limits.min
    return Const(lowest if kind == "max" else infinite, dtype)


class _Search:
    """Reductions, for each place of `x`, over the sources along `dim` whose index is that place."""

    def __init__(
        self, ctx: Lowering, x: Value, dim: int, shape: Sequence[Int], index: Source, inputs: Sequence[Value]
    ) -> None:
        self.ctx, self.x, self.dim, self.shape, self.index, self.inputs = ctx, x, dim, shape, index, inputs

    def reduce(self, kind: str, dtype: torch.dtype, element: Source, nothing: Const) -> Value:
        rank = len(self.x.shape)

        def operands(i: Indices) -> tuple[Scalar, ...]:
            source = (*i[: self.dim], i[rank], *i[self.dim + 1 : rank])
            covered = all_of(
                [compare("lt", k, n) for d, (k, n) in enumerate(zip(source, self.shape, strict=True)) if d != self.dim]
            )
            hit = Op("eq", (self._checked(source), size_value(i[self.dim])), BOOL)
            chosen = Op("where", (hit, element(source), nothing), dtype)
            return (Masked(covered, chosen, nothing),)

        domain = (*self.x.shape, self.shape[self.dim])
        (result,) = self.ctx.reduce(
            kind, domain, (rank,), operands, accumulate=dtype, inputs=self.inputs, results=((0, dtype),)
        )
        return result

    def _checked(self, source: Indices) -> Scalar:
        """The index at `source`; the kernel reports one that is negative or too large, as eager does."""
        size = size_value(self.x.shape[self.dim])
        value = cast(self.index(source), torch.int64)
        value = Op("where", (Op("lt", (value, Const(0, torch.int64)), BOOL), size, value), torch.int64)
        return Op("checked_index", (value, size), torch.int64)
