"""Updates of state in its own memory: a cache of which a few rows change must not be copied to change them.

A functional graph says `new = index_copy(cache, ...)` and, at its end, `copy_(cache, new)`. When nothing needs the old
contents after `new`, the op may write into the cache at once; the final copy then has nothing to do.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import fx

from fxopt.ir.loops import Load, postorder
from fxopt.lower.lowering import Lowering
from fxopt.lower.values import Computed, Stored, Value, address, at, dim_indices

copy_ = torch.ops.aten.copy_.default


def own_memory(ctx: Lowering, x: Value, updates: Sequence[Value]) -> Stored | None:
    """The memory of `x`, the current node's first argument, if the node may write its result there; None if it may not.

    It may when `x` is a whole input that ends up holding the result, nothing evaluated later reads the old contents, and
    `updates` (what the node reads besides) do not read them at all. Expressions that still want the old contents are stored.
    """
    if not _becomes_input(ctx, x) or any(_loads(v, x) for v in updates):
        return None
    assert isinstance(x, Stored)
    ctx.store_pending_readers(x.buffer, ctx.node)
    return x


def own_view(ctx: Lowering, x: Value, view: Value, source: Value) -> Stored | None:
    """The memory of `view`, a view of `x`, if the node may write `source` there, under the conditions of `own_memory`.

    `source` may read the elements that it replaces, each at its own place.
    """
    if not _becomes_input(ctx, x) or not isinstance(view, Stored):
        return None
    where = address(view, dim_indices(view.shape))
    if any(load.index != where or load.indirect for load in _loads(source, x)):
        return None
    ctx.store_pending_readers(view.buffer, ctx.node)
    return view


def _becomes_input(ctx: Lowering, x: Value) -> bool:
    """Whether `x` is a whole input into which the node's result is copied, and whose old contents nothing needs after it."""
    node, base = ctx.node, ctx.node.args[0]
    if not isinstance(base, fx.Node) or base.op != "placeholder" or not isinstance(x, Stored):
        return False
    copied = any(u.target is copy_ and u.args[0] is base and u.args[1] is node for u in node.users)
    return copied and not any(_is_needed(ctx, holder, value, x.buffer) for holder, value in ctx.values.items())


def _is_needed(ctx: Lowering, holder: fx.Node, value: Any, buffer: str) -> bool:
    """Whether `holder` is a view of `buffer`, or a tuple of values that read it, with a reader after the current node.

    The final copy reads nothing; a single expression can still be stored before the contents change.
    """
    single = isinstance(value, (Stored, Computed))
    if isinstance(value, Computed) or not any(_reads(v, buffer) for v in ([value] if single else _values(value))):
        return False
    later = (u for u in holder.users if u not in ctx.values and u is not ctx.node)
    return any(u.target is not copy_ or u.args[0] is not holder for u in later)


def _values(value: Any) -> Iterator[Any]:
    if isinstance(value, (tuple, list)):
        for v in value:
            yield from _values(v)
    else:
        yield value


def _reads(value: Any, buffer: str) -> bool:
    if isinstance(value, Stored):
        return value.buffer == buffer
    return isinstance(value, Computed) and any(isinstance(n, Load) and n.buffer == buffer for n in postorder((value.body,)))


def _loads(value: Value, x: Value) -> list[Load]:
    """The loads of `value`, at its own canonical indices, from the memory of `x`."""
    assert isinstance(x, Stored)
    body = at(value, dim_indices(value.shape))
    return [n for n in postorder((body,)) if isinstance(n, Load) and n.buffer == x.buffer]
