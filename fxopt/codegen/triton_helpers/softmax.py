"""Maxima with sums of exponentials measured from them, in one pass."""

# mypy: disable-error-code="no-untyped-def,no-untyped-call,misc,untyped-decorator"

from __future__ import annotations

import triton
import triton.language as tl

from fxopt.codegen.triton_helpers.arithmetic import largest
from fxopt.codegen.triton_helpers.exponentials import flushing_exp


@triton.jit
def softmax_stats(max_a, sum_a, max_b, sum_b):
    """Joins two (max, sum of exp(x - max)); equal infinite maxima count as no distance (Milakov and Gimelshein 2018).

    One of the two sums keeps its scale, so one exponential is enough. Its absolute error is below a rounding error of the
    final sum, which is at least 1, so the fast exponential is as good as an exact one.
    """
    top = largest(max_a, max_b)
    scale = tl.where(max_a == max_b, 1.0, flushing_exp(tl.minimum(max_a, max_b) - top))
    return top, tl.where(max_a == top, sum_a + sum_b * scale, sum_a * scale + sum_b)


@triton.jit
def finite_base(top):
    """What elements up to `top` are measured from: 0 where all are -inf, so that no difference is NaN."""
    return tl.where(top == float("-inf"), 0.0, top)


@triton.jit
def softmax_step(top, total, x):
    """(max, sum of exp(x - max)) of accumulators [n, m], each joined with its share of the neighbours in `x` [n, m * k].

    An accumulator changes its scale once for k elements, which then take five instructions each.
    """
    share: tl.constexpr = x.shape[1] // top.shape[1]
    own = tl.reshape(x, [top.shape[0], top.shape[1], share])
    new = largest(top, tl.reduce(own, 2, largest))
    base = finite_base(new)
    terms = tl.sum(flushing_exp(own - tl.expand_dims(base, 2)), 2)
    return new, total * flushing_exp(top - base) + terms


@triton.jit
def weighted_softmax(max_a, sum_a, term_a, weight_a, max_b, sum_b, term_b, weight_b):
    """Joins two (max, sum of exp(x - max), sum of w * (x - max), sum of w): what is relative to the lower maximum moves by
    the distance times its weights. Nothing moves from -inf, the maximum of no elements and of those that are -inf.
    """
    top, total = softmax_stats(max_a, sum_a, max_b, sum_b)
    low = tl.minimum(max_a, max_b)
    moved = tl.where((max_a == max_b) | (low == float("-inf")), 0.0, low - top)
    return top, total, term_a + term_b + tl.where(max_a == top, weight_b, weight_a) * moved, weight_a + weight_b


@triton.jit
def weighted_softmax_step(top, total, term, weight, x, y, w):
    """`softmax_step` with the sums of w * (y - max) and of w beside it, for `y` that is `x` where `w` is not zero."""
    share: tl.constexpr = x.shape[1] // top.shape[1]
    own = tl.reshape(x, [top.shape[0], top.shape[1], share])
    values = tl.reshape(y, [top.shape[0], top.shape[1], share])
    weights = tl.reshape(w, [top.shape[0], top.shape[1], share])
    new = largest(top, tl.reduce(own, 2, largest))
    base = finite_base(new)
    terms = tl.sum(flushing_exp(own - tl.expand_dims(base, 2)), 2)
    weighted = tl.sum(weights * (values - tl.expand_dims(base, 2)), 2)
    moved = tl.where(top == float("-inf"), 0.0, top - base)
    return new, total * flushing_exp(top - base) + terms, term + weight * moved + weighted, weight + tl.sum(weights, 2)


@triton.jit
def softmax_total(top, total):
    """The sum for a finished row: NaN when its maximum is infinite, as exp(inf - inf) makes it in eager."""
    return tl.where(tl.abs(top) == float("inf"), float("nan"), total)
