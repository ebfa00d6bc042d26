"""The table of lowerings: ATen overload → one small function that computes the op as loops."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

LoweringFn = Callable[..., Any]


class Table(dict[Any, LoweringFn]):
    """OpOverload → lowering.

    A lowering takes (ctx, *args, **kwargs) as the op does, tensors as Value, sizes as Int, and returns a Value (or a tuple
    of them). It raises UnsupportedError(reason) for what it does not cover; the op then runs as a library call.
    """

    def lowers(self, *ops: Any) -> Callable[[LoweringFn], LoweringFn]:
        """Decorator: register one function for `ops`."""

        def register(fn: LoweringFn) -> LoweringFn:
            for op in ops:
                if op in self:
                    raise ValueError(f"{op} already has a lowering")
                self[op] = fn
            return fn

        return register


@functools.cache
def table() -> Table:
    """Every lowering, joined from the tables of the op files."""
    from fxopt.lower import ops

    joined = Table()
    for part in ops.TABLES:
        for op, fn in part.items():
            if op in joined:
                raise ValueError(f"{op} is lowered twice")
            joined[op] = fn
    return joined
