"""Sums over a row that need not go through it: of which at most one term is not zero, or which are the same for all rows.

The gradient of a picked element is one-hot along its row, and that of a log-softmax sums it over the row: the loss of a
classifier would count through all its classes to find again what it has in hand. One with weights and smoothed labels adds
to that a multiple of the weights, whose sum all rows share.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch

from fxopt.ir.exprs import Sym, substitute, symbol
from fxopt.ir.loops import Const, IndexValue, Load, Masked, Op, Scalar, cast_to, indirect_symbol, postorder
from fxopt.ir.rounding import HALVES


@dataclass(frozen=True)
class Separated:
    """A sum over an axis as the sum of `alone`, which are no sums, and of each (factor, term): the factor times the sum of
    the term, which depends on nothing but the axis."""

    alone: tuple[Scalar, ...]
    shared: tuple[tuple[Scalar, Scalar], ...]

    def value(self, total: Callable[[Scalar], Scalar], dtype: torch.dtype) -> Scalar:
        """What the sum is, in float32 or wider, with the sum of a term as `total` has it."""
        parts = [cast_to(a, dtype) for a in self.alone]
        parts += [Op("mul", (cast_to(factor, dtype), total(term)), dtype) for factor, term in self.shared]
        whole = parts[0]
        for part in parts[1:]:
            whole = Op("add", (whole, part), dtype)
        return whole


def separated(operand: Scalar, axis: Sym, dtype: torch.dtype) -> Separated | None:
    """The sum of `operand` over `axis`, in `dtype`, without a loop of each row's own; None where one is needed."""
    if dtype not in (torch.float32, torch.float64) or operand.symbols() <= {axis}:
        return None
    alone: list[Scalar] = []
    shared: list[tuple[Scalar, Scalar]] = []
    waiting = [operand]
    while waiting:
        term = _as_computed(waiting.pop())
        if isinstance(term, Op) and term.name == "add":
            waiting += term.args
        elif (only := only_term(term, axis) or _picked_term(term, axis)) is not None:
            alone.append(only)
        else:
            factors, along = _factors(term, axis)
            if not factors or not along or not _product(along).symbols() <= {axis}:
                return None
            shared.append((_product(factors), _product(along)))
    return Separated(tuple(alone), tuple(shared)) if shared else None


def _as_computed(value: Scalar) -> Scalar:
    """What `value` is a cast of, where neither rounds: half types are computed in float32."""
    while isinstance(value, Op) and value.name == "cast" and {value.dtype, value.args[0].dtype} <= {torch.float32, *HALVES}:
        value = value.args[0]
    return value


def _factors(term: Scalar, axis: Sym) -> tuple[list[Scalar], list[Scalar]]:
    """The factors of `term` that do not vary along `axis`, and those that do, all in float32 or wider."""
    fixed: list[Scalar] = []
    along: list[Scalar] = []
    waiting = [term]
    while waiting:
        value = _as_computed(waiting.pop())
        if isinstance(value, Op) and value.name == "mul" and axis in value.symbols():
            waiting += value.args
        else:
            wide = cast_to(value, torch.float32) if value.dtype in HALVES else value
            (along if axis in value.symbols() else fixed).append(wide)
    return fixed, along


def _product(factors: list[Scalar]) -> Scalar:
    value = factors[0]
    for factor in factors[1:]:
        value = Op("mul", (value, factor), value.dtype)
    return value


def _picked_term(term: Scalar, axis: Sym) -> Scalar | None:
    """As `only_term`, of a term that is not zero at one index and varies along `axis`: with what it loads picked there."""
    around: list[Op] = []
    value = term
    while isinstance(value, Op) and value.name in ("cast", "bitcast"):
        around.append(value)
        value = value.args[0]
    if not (isinstance(value, Op) and value.name == "where"):
        return None
    cond, body, other = value.args
    place = _place(cond, axis)
    if place is None or not (isinstance(other, Const) and other.value == 0):
        return None
    inside = _is_inside(place, axis)
    assert axis.size is not None
    sym, pair = indirect_symbol(Op("where", (inside, place, Const(0, place.dtype)), place.dtype), axis.size)
    done: dict[Scalar, Scalar] = {}
    for node in postorder((body,)):
        args = tuple(done[a] for a in node.args)
        if axis not in node.symbols():
            done[node] = node
        elif isinstance(node, Load) and not node.indirect:
            done[node] = Load(node.buffer, substitute(node.index, {axis: symbol(sym)}), node.dtype, (pair,))
        elif isinstance(node, Op):
            done[node] = node.rebuild(args, {})
        else:
            return None
    picked = done[body]
    for each in reversed(around):
        picked = each.rebuild((picked,), {})
    return Op("where", (inside, picked, Const(0, picked.dtype)), picked.dtype)


def only_term(operand: Scalar, axis: Sym) -> Scalar | None:
    """The sum of `operand` over `axis` if that is zero wherever `axis` is not one certain index, else None."""
    around: list[Op] = []
    while isinstance(operand, Op) and operand.name in ("cast", "bitcast"):
        around.append(operand)
        operand = operand.args[0]
    if not (isinstance(operand, Masked) or (isinstance(operand, Op) and operand.name == "where")):
        return None
    cond, value, other = operand.args if isinstance(operand, Op) else (operand.cond, operand.body, operand.other)
    place = _place(cond, axis)
    if place is None or axis in value.symbols() or not (isinstance(other, Const) and other.value == 0):
        return None
    for node in reversed(around):
        value = node.rebuild((value,), {})
    return Op("where", (_is_inside(place, axis), value, Const(0, value.dtype)), value.dtype)


def _is_inside(place: Scalar, axis: Sym) -> Scalar:
    """Whether `axis` takes on the value `place`."""
    assert axis.size is not None
    below = Op("lt", (place, IndexValue(axis.size)), torch.bool)
    return Op("bitwise_and", (Op("ge", (place, Const(0, place.dtype)), torch.bool), below), torch.bool)


def _place(cond: Scalar, axis: Sym) -> Scalar | None:
    """What `axis` has to equal for `cond` to hold, if that is all it says."""
    if not (isinstance(cond, Op) and cond.name == "eq"):
        return None
    own = IndexValue(symbol(axis))
    sides = [s for s in cond.args if s is not own]
    return sides[0] if len(sides) == 1 and axis not in sides[0].symbols() else None
