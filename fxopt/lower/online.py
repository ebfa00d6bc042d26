"""A row's maximum and the sum of exp(x - maximum) in one pass.

Taken apart, a softmax reduces twice: the sum needs the maximum first. Whether a kernel that loops over long rows reads them
twice is decided here: the pair becomes the two results of one `softmax_stats` reduction, which rescales its sum whenever it
meets a larger element (Milakov and Gimelshein, "Online normalizer calculation for softmax", 2018). Rows of -inf, +inf or NaN
give NaN for the sum either way.

So it is with a sum over the row of w * (x - maximum - l), as a cross-entropy with weights or smoothed labels has: l is known
only after the row, but comes in as l times the sum of w. What is summed instead, w * (x - maximum), moves with the maximum
by the weights so far, so it is as exact.
"""

from __future__ import annotations

import torch

from fxopt.ir.exprs import Sym
from fxopt.ir.loops import Const, Nest, Op, Reduce, Scalar, cast_to, holds_reduction, postorder, replaced_in


def one_pass(nest: Nest) -> Nest:
    """`nest` with every such pair over the same axes merged; the same object when there is none."""
    merged: dict[Scalar, Scalar] = {}
    for node in postorder(nest.roots):
        top = _maximum_below(node) if isinstance(node, Reduce) else None
        if top is not None:
            merged[top], merged[node] = _statistic(top, 0), _statistic(top, 1)
    return _replaced(nest, merged) if merged else nest


def with_weighted_sums(nest: Nest) -> Nest:
    """`nest` with a sum of weighted logarithms of probabilities of a row found with the row's statistics, in its first pass.

    Those that weigh the same row in another way stay as they are: they would each need statistics of their own.
    """
    merged: dict[Scalar, Scalar] = {}
    for node in postorder(nest.roots):
        found = _weighted_distance(node) if isinstance(node, Reduce) else None
        if found is None:
            continue
        x, weight, rest = found
        assert isinstance(node, Reduce)
        operands, axes = (x, x, weight), node.axes
        weighted = [Reduce("weighted_softmax", operands, axes, node.dtype, k) for k in range(4)]
        own: dict[Scalar, Scalar] = {Reduce("softmax_stats", (x,), axes, node.dtype, k): weighted[k] for k in (0, 1)}
        if own.keys().isdisjoint(merged):
            later = Op("mul", (replaced_in(rest, own), weighted[3]), node.dtype)
            merged |= own | {node: Op("sub", (weighted[2], later), node.dtype)}
    return _replaced(nest, merged) if merged else nest


def _weighted_distance(total: Reduce) -> tuple[Scalar, Scalar, Scalar] | None:
    """x, w and l if `total` is sum(w * ((x - m) - l)), or without w, with the row's maximum m and some l of the row."""
    if total.kind != "sum" or total.dtype not in (torch.float32, torch.float64):
        return None
    term, axes = _as_computed(total.operands[0], total.dtype), frozenset(total.axes)
    pairs: list[tuple[Scalar, Scalar]] = [(term, Const(1.0, total.dtype))]
    if isinstance(term, Op) and term.name == "mul":
        pairs = [(term.args[0], term.args[1]), (term.args[1], term.args[0])]
    for distance, weight in pairs:
        found = _distance(_as_computed(distance, total.dtype), total.axes)
        if found is not None and not axes & found[1].symbols() and not holds_reduction(weight):
            return found[0], cast_to(weight, total.dtype), found[1]
    return None


def _as_computed(value: Scalar, dtype: torch.dtype) -> Scalar:
    """What `value` is a cast of: a value of few bits is computed in float32, and rounded only where a graph says so."""
    while isinstance(value, Op) and value.name == "cast" and value.dtype.is_floating_point:
        inner = value.args[0]
        if dtype != torch.float32 or not inner.dtype.is_floating_point or inner.dtype == torch.float64:
            break
        value = inner
    return value


def _distance(value: Scalar, axes: tuple[Sym, ...]) -> tuple[Scalar, Scalar] | None:
    """x and l if `value` is (x - m) - l, with the maximum m of x over `axes`."""
    if not (isinstance(value, Op) and value.name == "sub"):
        return None
    below, rest = value.args
    if not (isinstance(below, Op) and below.name == "sub"):
        return None
    x, top = below.args
    is_top = isinstance(top, Reduce) and (top.kind, top.output, top.operands, top.axes) == ("softmax_stats", 0, (x,), axes)
    return (x, rest) if is_top and not holds_reduction(x) else None


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
