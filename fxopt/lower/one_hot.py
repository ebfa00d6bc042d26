"""Sums of which at most one term is not zero.

The gradient of a picked element is one-hot along its row, and that of a log-softmax sums it over the row: the loss of a
classifier would count through all its classes to find again what it has in hand.
"""

from __future__ import annotations

import torch

from fxopt.ir.exprs import Sym, symbol
from fxopt.ir.loops import Const, IndexValue, Masked, Op, Scalar


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
    assert axis.size is not None
    below = Op("lt", (place, IndexValue(axis.size)), torch.bool)
    inside = Op("bitwise_and", (Op("ge", (place, Const(0, place.dtype)), torch.bool), below), torch.bool)
    return Op("where", (inside, value, Const(0, value.dtype)), value.dtype)


def _place(cond: Scalar, axis: Sym) -> Scalar | None:
    """What `axis` has to equal for `cond` to hold, if that is all it says."""
    if not (isinstance(cond, Op) and cond.name == "eq"):
        return None
    own = IndexValue(symbol(axis))
    sides = [s for s in cond.args if s is not own]
    return sides[0] if len(sides) == 1 and axis not in sides[0].symbols() else None
