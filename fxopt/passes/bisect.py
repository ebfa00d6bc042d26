"""Find the one rewrite that makes a result wrong, by rationing fuel."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

from fxopt.ir.graph import Graph
from fxopt.journal import Journal
from fxopt.passes.context import DefaultOptions, PassOptions, Rewrite
from fxopt.passes.pipeline import run


def bisect(fails: Callable[[int], bool], most: int) -> int | None:
    """The smallest fuel in [1, most] for which `fails` holds, given that failure persists with more fuel.

    None when it does not fail at `most`. Raises ValueError when it fails with no fuel: no rewrite is to blame. Calls `fails`
    about log2(most) times.
    """
    if fails(0):
        raise ValueError("it fails without any rewrite: the passes are not to blame")
    if not fails(most):
        return None
    good, bad = 0, most
    while bad - good > 1:
        middle = (good + bad) // 2
        good, bad = (good, middle) if fails(middle) else (middle, bad)
    return bad


def first_bad_rewrite(
    capture: Callable[[], Graph], is_right: Callable[[Graph], bool], options: PassOptions | None = None
) -> Rewrite | None:
    """The first rewrite after which `is_right` no longer holds; None when the graph is right after all of them.

    `capture` returns the graph before any pass, the same at every call; `options.disable` is obeyed, `options.fuel` is not.
    Raises ValueError when the graph is wrong before the first rewrite.
    """
    disable = options.disable if options is not None else ()
    logs: dict[int | None, list[Rewrite]] = {}

    def optimized(fuel: int | None) -> Graph:
        graph = capture()
        limited = replace(DefaultOptions(disable=disable), fuel=fuel)
        logs[fuel] = run(graph, limited, Journal(graph.name)).log
        return graph

    optimized(None)
    found = bisect(lambda fuel: not is_right(optimized(fuel)), len(logs[None]))
    if found is None:
        return None
    return logs[found][found - 1]
