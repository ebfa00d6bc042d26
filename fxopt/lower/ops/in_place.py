"""Updates of state in its own memory: a cache of which a few rows change must not be copied to change them.

A functional graph says `new = index_copy(cache, ...)` and, at its end, `copy_(cache, new)`, with more updates and views
between the two. When nothing needs the old contents after `new`, the op may write into the cache at once; the final copy
then has nothing to do. What it writes may be computed from the old contents: then it is stored apart before.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import fx

from fxopt.ir import ops
from fxopt.ir.exprs import Int
from fxopt.ir.loops import Load, Scalar, postorder
from fxopt.lower.lowering import Lowering
from fxopt.lower.ops.bounds import dim_of, range_start, wrapped
from fxopt.lower.ops.views import apply, selected, sliced
from fxopt.lower.values import Computed, Stored, Value, address, at, dim_indices, pointwise

aten = torch.ops.aten
copy_ = aten.copy_.default

UPDATES = frozenset(
    {
        *(aten.index_put.default, aten._unsafe_index_put.default, aten.index_copy.default, aten.index_add.default),
        *(aten.index_fill.int_Scalar, aten.index_fill.int_Tensor, aten.put.default, aten.scatter.src, aten.scatter.value),
        *(aten.scatter_add.default, aten.slice_scatter.default, aten.select_scatter.default),
    }
)
"""Ops whose result is their first argument with some elements replaced."""

WHOLE_VIEWS = frozenset(
    {
        *(aten.view.default, aten._unsafe_view.default, aten.permute.default, aten.transpose.int, aten.t.default),
        *(aten.unsqueeze.default, aten.squeeze.dim, aten.squeeze.dims, aten.squeeze.default, aten.alias.default),
    }
)
"""Views of every element of their argument, once each."""


def own_memory(ctx: Lowering, x: Value) -> Stored | None:
    """The memory of `x`, the current node's first argument, if the node may write its result there; None if it may not.

    It may when `x` is a whole input, or a view of one, that ends up holding what becomes of the result, and nothing
    evaluated later reads the old contents. Expressions that still want these are stored. What the node itself writes must
    not read them elsewhere than where it writes (`stored_apart`).
    """
    if not isinstance(x, Stored) or not _becomes_input(ctx, x):
        return None
    ctx.store_pending_readers(x.buffer, ctx.node)
    return x


def stored_apart(
    ctx: Lowering, x: Stored, shape: Sequence[Int], value: Callable[[tuple[Int, ...]], Scalar], dtype: torch.dtype
) -> Callable[[tuple[Int, ...]], Scalar]:
    """`value`, a scalar for each index of `shape`, in a buffer of its own if it reads the memory of `x`."""
    if not reads(value(dim_indices(shape)), x.buffer):
        return value
    stored = ctx.store(pointwise(tuple(shape), dtype, x.device, value, ()))
    return lambda i: at(stored, i)


def reads(value: Scalar, buffer: str) -> bool:
    return any(isinstance(n, Load) and n.buffer == buffer for n in postorder((value,)))


def reads_elsewhere(view: Stored, source: Value) -> bool:
    """Whether elements of `source` read the memory of `view` at other places than their own."""
    body = at(source, dim_indices(source.shape))
    loads = [n for n in postorder((body,)) if isinstance(n, Load) and n.buffer == view.buffer]
    return any(load.index != address(view, dim_indices(view.shape)) or load.indirect for load in loads)


def same_elements(a: Value, b: Value) -> bool:
    """Whether both are the same memory, element by element."""
    if not isinstance(a, Stored) or not isinstance(b, Stored) or (a.buffer, a.shape) != (b.buffer, b.shape):
        return False
    return address(a, dim_indices(a.shape)) == address(b, dim_indices(b.shape))


def slice_of(x: Value, src: Value, dim: int, start: Int | None, step: Int) -> Value:
    """What of `x` a slice_scatter of `src` replaces."""
    dim = dim_of(dim, len(x.shape))
    return apply(x, sliced(x.shape, dim, range_start(start, x.shape[dim]), step, src.shape[dim]))


def selection_of(x: Value, dim: int, position: Int) -> Value:
    """What of `x` a select_scatter replaces."""
    dim = dim_of(dim, len(x.shape))
    return apply(x, selected(x.shape, dim, wrapped(position, x.shape[dim])))


def _becomes_input(ctx: Lowering, x: Stored) -> bool:
    """Whether `x` is an input, or part of one, into which what becomes of the node's result is copied, and whose old
    contents nothing needs after it."""
    inputs = (n for n, v in ctx.values.items() if n.op == "placeholder" and isinstance(v, Stored) and v.buffer == x.buffer)
    base = next(inputs, None)
    way = None if base is None else _way_into(ctx, ctx.node, ctx.node.args[0], x, base)
    if base is None or way is None or any(_is_returned(ctx, n) for n in (ctx.node, *way)):
        return False
    others = ((holder, value) for holder, value in ctx.values.items() if holder is not base)
    later = [u for u in base.users if u not in ctx.values and u is not ctx.node]
    if any(u.op != "output" and (u not in way or u.args[0] is not base) for u in later):  # returned is the input itself
        return False
    return not any(_is_needed(ctx, holder, value, x.buffer, way) for holder, value in others)


def _is_returned(ctx: Lowering, node: fx.Node) -> bool:
    """Whether the caller gets the result of `node`, or what may be a view of it: a tensor of its own, which must not share
    memory with the input."""
    views_of_inputs = ctx.graph.notes.get("views of inputs", ())
    for user in node.users:
        if user.op == "output":
            results = enumerate(user.args[0])  # type: ignore[arg-type]
            if any(result is node and position not in views_of_inputs for position, result in results):
                return True
            continue
        may_share = user.op == "call_function" and (ops.is_view(user.target) or user.target is aten._to_copy.default)
        if may_share and user.target is not copy_ and _is_returned(ctx, user):
            return True
    return False


def _way_into(ctx: Lowering, node: fx.Node, first: Any, x: Stored | None, base: fx.Node) -> frozenset[fx.Node] | None:
    """The nodes that update the result of `node` further, see it through views, put it back into what it is a part of, and
    copy it into `base`; None if it does not end there.

    The result is `first` with some elements replaced, and would be in the memory `x` (None after views).
    """
    for user in node.users:
        if user.target is copy_ and user.args[0] is base and user.args[1] is node and _is_all_of(first, base):
            return frozenset((user,))
        way = None
        if user.args and user.args[0] is node and user.target in UPDATES:
            way = _way_into(ctx, user, first, x, base)
        elif user.args and user.args[0] is node and (user.target in WHOLE_VIEWS or user.target is aten.clone.default):
            # index_copy_ of a view is decomposed with a clone, into a layout that the final copy does not need.
            way = _way_into(ctx, user, first, None, base)
        elif x is not None and user.target in (aten.slice_scatter.default, aten.select_scatter.default):
            before = user.args[0]
            whole = ctx.values.get(before) if isinstance(before, fx.Node) else None
            if user.args[1] is node and isinstance(whole, Stored) and _is_replaced(user, whole, x):
                way = _way_into(ctx, user, before, whole, base)
        if way is not None:
            return way | {user}
    return None


def _is_all_of(node: Any, base: fx.Node) -> bool:
    """Whether `node` is `base`, or views and updates of it: then it has every element of `base` once."""
    while isinstance(node, fx.Node) and (node.target in WHOLE_VIEWS or node.target in UPDATES):
        node = node.args[0]
    return node is base


def _is_replaced(scatter: fx.Node, whole: Stored, x: Stored) -> bool:
    """Whether `scatter`, of a slice or a selection, replaces just the elements `x` of its first argument, `whole`."""
    dim, start, end, step = (*scatter.args[2:], *(0, None, None, 1)[len(scatter.args) - 2 :])[:4]
    if scatter.kwargs or not isinstance(dim, int) or any(isinstance(n, fx.Node) for n in (start, end, step)):
        return False
    if scatter.target is aten.select_scatter.default:
        return isinstance(start, int) and same_elements(selection_of(whole, dim, start), x)
    return len(whole.shape) == len(x.shape) and same_elements(slice_of(whole, x, dim, start, step), x)  # type: ignore[arg-type]


def _is_needed(ctx: Lowering, holder: fx.Node, value: Any, buffer: str, way: frozenset[fx.Node]) -> bool:
    """Whether `holder` is a view of `buffer`, or a tuple of values that read it, with a reader after the current node.

    Those on the `way` of the result into the input want of their first argument what is not replaced, and the final copy
    nothing; a single expression can still be stored before the contents change.
    """
    single = isinstance(value, (Stored, Computed))
    if isinstance(value, Computed) or not any(_reads(v, buffer) for v in ([value] if single else _values(value))):
        return False
    later = (u for u in holder.users if u not in ctx.values and u is not ctx.node)
    return any(u not in way or u.args[0] is not holder for u in later)


def _values(value: Any) -> Iterator[Any]:
    if isinstance(value, (tuple, list)):
        for v in value:
            yield from _values(v)
    else:
        yield value


def _reads(value: Any, buffer: str) -> bool:
    if isinstance(value, Stored):
        return value.buffer == buffer
    return isinstance(value, Computed) and reads(value.body, buffer)
