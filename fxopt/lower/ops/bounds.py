"""Index arithmetic that op lowerings share: conditions on indices, wrap-around, reshaping."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch

from fxopt.errors import UnsupportedError
from fxopt.ir.exprs import Int, ask, floordiv, maximum, minimum, prod, ravel, unravel
from fxopt.ir.loops import Const, IndexValue, Op, Scalar
from fxopt.lower.values import known_equal

BOOL = torch.bool


def compare(name: str, a: Int, b: Int) -> Scalar:
    """`a name b` (lt, le, gt, ge, eq, ne of integers) as a bool scalar; a constant when it is statically known."""
    if name in ("gt", "le"):
        known = ask("<=", a, b)
    elif name in ("lt", "ge"):
        known = ask("<", a, b)
    else:
        known = ask("==", a, b)
    if known is not None:
        return Const(known != (name in ("gt", "ge", "ne")), BOOL)
    return Op(name, (IndexValue(a), IndexValue(b)), BOOL)


def all_of(conditions: Iterable[Scalar]) -> Scalar:
    """The conjunction of bool scalars, constants folded."""
    out: Scalar = Const(True, BOOL)
    for cond in conditions:
        if isinstance(cond, Const):
            if not cond.value:
                return cond
        else:
            out = cond if isinstance(out, Const) else Op("bitwise_and", (out, cond), BOOL)
    return out


def inside(i: Int, size: Int) -> Scalar:
    """0 <= i < size."""
    return all_of((compare("ge", i, 0), compare("lt", i, size)))


def dim_of(dim: int, rank: int) -> int:
    """A dimension argument counted from the front; 0-dim tensors count as having one dimension, as in eager."""
    return dim % max(rank, 1)


def wrapped(i: Int, size: Int) -> Int:
    """Index `i` with negative ones counted from the end. Raises UnsupportedError when the sign depends on sizes."""
    negative = ask("<", i, 0)
    if negative is None:
        raise UnsupportedError(f"the sign of index {i} is not known")
    return i + size if negative else i


def range_start(start: Int | None, size: Int) -> Int:
    """Where a slice that begins at `start` begins, in [0, size]."""
    if start is None:
        return 0
    return minimum(maximum(wrapped(start, size), 0), size)


def is_empty(shape: Sequence[Int]) -> bool:
    """True when a dimension is known to be 0, so that no element is ever computed."""
    return any(known_equal(size, 0) for size in shape)


def reshape_indices(old: Sequence[Int], new: Sequence[Int], indices: Sequence[Int]) -> tuple[Int, ...]:
    """The index into row-major shape `old` of element `indices` of its reshape to `new` (equal element counts).

    Dimensions are grouped into the smallest runs of equal products first, so that unrelated ones keep their plain indices.
    """
    if is_empty(old):
        return (0,) * len(old)
    out: list[Int] = []
    for olds, news in _groups(old, new):
        own = [old[k] for k in olds]
        linear = ravel(tuple(indices[k] for k in news), tuple(new[k] for k in news))
        out += unravel(linear, tuple(own))
    return tuple(out)


def _groups(old: Sequence[Int], new: Sequence[Int]) -> list[tuple[range, range]]:
    """Pairs of runs of dimensions (old, new) whose products are equal."""
    groups, i, j = [], 0, 0
    while i < len(old) or j < len(new):
        i0, j0 = i, j
        i, j = min(i + 1, len(old)), min(j + 1, len(new))
        while not known_equal(prod(old[i0:i]), prod(new[j0:j])):
            if i == len(old) and j == len(new):
                break
            grow_old = j == len(new) or (i < len(old) and _smaller(prod(old[i0:i]), prod(new[j0:j])))
            i, j = (i + 1, j) if grow_old else (i, j + 1)
        groups.append((range(i0, i), range(j0, j)))
    return groups


def _smaller(a: Int, b: Int) -> bool:
    """Whether to take more factors into `a` than into `b`; with symbolic sizes a guess (a divides b), any being right."""
    known = ask("<", a, b)
    if known is not None:
        return known
    quotient = floordiv(b, a)
    return known_equal(quotient * a, b)
