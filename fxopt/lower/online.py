"""A row's maximum and the sum of exp(x - maximum) in one pass.

Taken apart, a softmax reduces twice: the sum needs the maximum first. Whether a kernel that loops over long rows reads them
twice is decided here: the pair becomes the two results of one `softmax_stats` reduction, which rescales its sum whenever it
meets a larger element (Milakov and Gimelshein, "Online normalizer calculation for softmax", 2018). Rows of -inf, +inf or NaN
give NaN for the sum either way.
"""

from __future__ import annotations

from fxopt.ir.loops import Nest, Op, Reduce, Scalar, postorder, replaced_in


def one_pass(nest: Nest) -> Nest:
    """`nest` with every such pair over the same axes merged; the same object when there is none."""
    merged: dict[Scalar, Scalar] = {}
    for node in postorder(nest.roots):
        top = _maximum_below(node) if isinstance(node, Reduce) else None
        if top is not None:
            merged[top], merged[node] = _statistic(top, 0), _statistic(top, 1)
    return _replaced(nest, merged) if merged else nest


def _maximum_below(total: Reduce) -> Reduce | None:
    """The maximum m if `total` is sum(exp(x - m)) with m = max(x) over the same axes, in one dtype."""
    if total.kind != "sum":
        return None
    term = total.operands[0]
    if not isinstance(term, Op) or term.name != "exp":
        return None
    difference = term.args[0]
    if not isinstance(difference, Op) or difference.name != "sub":
        return None
    x, top = difference.args
    if not isinstance(top, Reduce) or (top.kind, top.operands) != ("max", (x,)):
        return None
    return top if (top.axes, top.dtype) == (total.axes, total.dtype) and x.dtype == top.dtype else None


def _statistic(top: Reduce, output: int) -> Reduce:
    return Reduce("softmax_stats", top.operands, top.axes, top.dtype, output)


def _replaced(nest: Nest, merged: dict[Scalar, Scalar]) -> Nest:
    stores = (s.transformed({}, lambda v: replaced_in(v, merged)) for s in nest.stores)
    return Nest(nest.points, nest.reduced, tuple(stores))
