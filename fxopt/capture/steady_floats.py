"""Which floats among the inputs of Dynamo's graph stay as they are: those that modules hold and that have not changed yet.

With `torch.compile(dynamic=True)` all floats are inputs; without, those that had another value in an earlier compilation.
The latter are parts of schedules: were they literals, each value would be compiled, up to Dynamo's limit.
"""

from __future__ import annotations

from torch import fx

from fxopt.capture.private import changed_sources

KEY = "steady_float"
"""In `meta` of the placeholders that are such floats."""


def mark_steady_floats(gm: fx.GraphModule) -> None:
    """Mark such inputs of `gm`; called while Dynamo waits for its backend."""
    changed = changed_sources()
    for node in gm.graph.find_nodes(op="placeholder"):
        source = getattr(node.meta.get("grapharg"), "source", None)
        if source is not None and source.guard_source.is_unspecialized_nn_module():
            name = source.name() if callable(source.name) else source.name  # a method in older releases
            node.meta[KEY] = name not in changed
