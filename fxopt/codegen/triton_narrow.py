"""Integers that are chosen among indices, in 32 bits.

Which element of a pool's window is the largest is a chain of selections of int64 indices: two registers and two instructions
each, and two more for every comparison. Where all that may be chosen fits into 32 bits, they are made there.
"""

from __future__ import annotations

from dataclasses import replace

import torch

from fxopt.codegen.triton_index import computed_in_int32
from fxopt.ir.loops import Const, IndexValue, Masked, Nest, Op, Scalar, postorder

_COMPARES = ("eq", "ne", "lt", "le", "gt", "ge")
_LIMIT = 2**31


def with_narrow_choices(nest: Nest) -> Nest:
    """`nest` with selections among int64 indices and constants, and comparisons of them, made in int32."""
    narrow: dict[Scalar, Scalar] = {}
    changed: dict[Scalar, Scalar] = {}
    for node in postorder(nest.roots):
        args = tuple(changed.get(a, a) for a in node.args)
        twin = _twin(node, narrow, changed)
        if twin is not None:
            narrow[node] = twin
        if isinstance(node, Op) and node.name in _COMPARES and _any_chosen(node.args, narrow):
            changed[node] = Op(node.name, tuple(narrow[a] for a in node.args), node.dtype)
        elif twin is not None and isinstance(node, Masked | Op):
            changed[node] = Op("cast", (twin,), torch.int64)
        else:
            changed[node] = node if args == node.args else node.rebuild(args, {})
    if all(node is new for node, new in changed.items()):
        return nest
    return replace(nest, stores=tuple(s.transformed({}, changed.__getitem__) for s in nest.stores))


def _twin(node: Scalar, narrow: dict[Scalar, Scalar], changed: dict[Scalar, Scalar]) -> Scalar | None:
    """What gives the value of `node`, an int64, as an int32; None when it may not fit or is no index, constant or choice."""
    if node.dtype != torch.int64:
        return None
    match node:
        case Const(value=value) if -_LIMIT <= value < _LIMIT:
            return Const(value, torch.int32)
        case IndexValue(expr=expr) if computed_in_int32(expr):
            return Op("cast", (node,), torch.int32)
        case Masked(cond=cond, body=body, other=other) if body in narrow and other in narrow:
            return Masked(changed[cond], narrow[body], narrow[other])
        case Op(name="where", args=(cond, one, other)) if one in narrow and other in narrow:
            return Op("where", (changed[cond], narrow[one], narrow[other]), torch.int32)
    return None


def _any_chosen(args: tuple[Scalar, ...], narrow: dict[Scalar, Scalar]) -> bool:
    """All of `args` have a form in int32, and one of them is a choice: comparisons of indices are narrow already."""
    return all(a in narrow for a in args) and any(isinstance(a, Op | Masked) for a in args)
