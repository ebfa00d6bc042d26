"""Sums over groups of neighbouring points, as sums over parts of a tile.

`lower/group_sums.py` says what such a sum is: a `Reduce` over a symbol of its own, of the value at another row of the group.
The rows of a group are as many neighbours along a nest's last point symbol, so a program that holds whole groups has all the
values: its own row's value is summed over the rows beside it, and every row gets the result.
"""

from __future__ import annotations

from dataclasses import replace

import torch

from fxopt.errors import UnsupportedError
from fxopt.ir.exprs import Sym, symbol
from fxopt.ir.loops import Const, IndexValue, Nest, Op, Reduce, Scalar, postorder, transform
from fxopt.ir.region import Region

GROUP_SUM = "group_sum"


def with_group_sums(region: Region) -> Region:
    """`region` with its sums over groups as operators, which print as a sum over a part of the tile."""
    nest = region.nest
    own = frozenset(nest.reduced)
    if not any(isinstance(n, Reduce) and own.isdisjoint(n.axes) for n in postorder(nest.roots)):
        return region
    done: dict[Scalar, Scalar] = {}
    for node in postorder(nest.roots):
        args = tuple(done[a] for a in node.args)
        new = node if args == node.args else node.rebuild(args, {})
        done[node] = _operator(new, nest) if isinstance(new, Reduce) and own.isdisjoint(new.axes) else new
    stores = tuple(s.transformed({}, done.__getitem__) for s in nest.stores)
    return replace(region, nest=replace(nest, stores=stores))


def group_size(nest: Nest) -> int:
    """How many neighbouring points a program must hold multiples of: 1 without sums over groups."""
    sizes = {int(n.args[2].value) for n in postorder(nest.roots) if isinstance(n, Op) and n.name == GROUP_SUM}  # type: ignore[attr-defined]
    return max(sizes, default=1)


def _operator(node: Reduce, nest: Nest) -> Scalar:
    (axis,), (value,) = node.axes, node.operands
    member: Sym = nest.points[-1]
    if node.kind != "sum" or axis.size != member.size or not isinstance(member.size, int) or member in value.symbols():
        raise UnsupportedError(f"a reduction over {axis!r}, which is not one of the nest's")
    own = transform(value, {axis: symbol(member)})
    return Op(GROUP_SUM, (own, IndexValue(symbol(member)), Const(member.size, torch.int64)), node.dtype)
