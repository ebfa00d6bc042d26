"""Which made-up values a region can be measured on, where elements of its buffers are indices into others."""

from __future__ import annotations

import torch

from fxopt.ir.exprs import Int, minimum
from fxopt.ir.loops import Const, Load, Masked, Op, Scalar, postorder
from fxopt.ir.region import Region


def index_bounds(region: Region) -> dict[str, Int] | None:
    """For each buffer whose elements are indices, what they must stay below to be valid; None when that cannot be told.

    An index is an element as it is, of whatever integer type, or one of several under a condition. What is computed from
    elements otherwise may be out of bounds whatever they are, and a check that fails ends the CUDA context.
    """
    bounds: dict[str, Int] = {}
    checked = [n for nest in region.nests for n in postorder(nest.roots) if isinstance(n, Op) and n.name == "checked_index"]
    for node in checked:
        value, size = node.args
        limit = _integer(size)
        if limit is None or not _collect(value, limit, bounds):
            return None
    return bounds


def indexes_indirectly(region: Region) -> bool:
    """Whether the time that `region` takes depends on values that are indices: it checks some, or adds where they say."""
    nodes = (n for nest in region.nests for n in postorder(nest.roots))
    if any(isinstance(n, Op) and n.name == "checked_index" for n in nodes):
        return True
    return any(store.mode == "add" and store.indirect for nest in region.nests for store in nest.stores)


def _integer(size: Scalar) -> Int | None:
    """The integer that `size` stands for, if it is one known without memory."""
    if isinstance(size, Const):
        return int(size.value)
    return getattr(size, "expr", None)


def _collect(value: Scalar, limit: Int, bounds: dict[str, Int]) -> bool:
    """Note in `bounds` the buffers that `value` selects an element of; whether elements below `limit` make it valid."""
    match value:
        case Const():
            return isinstance(limit, int) and 0 <= int(value.value) < limit
        case Load() if not value.dtype.is_floating_point and value.dtype != torch.bool:
            bounds[value.buffer] = minimum(bounds[value.buffer], limit) if value.buffer in bounds else limit
            return True
        case Masked():
            return _collect(value.body, limit, bounds) and _collect(value.other, limit, bounds)
        case Op(name="where", args=(Op(name="lt", args=(tested, Const(value=0))), _, index)) if tested is index:
            return _collect(index, limit, bounds)  # what becomes of negative ones does not matter
        case Op(name="where"):
            return all(_collect(arm, limit, bounds) for arm in value.args[1:])
        case Op(name="cast") if not value.args[0].dtype.is_floating_point:
            return _collect(value.args[0], limit, bounds)
    return False
