"""Remove calls whose result nobody uses. Mutating, random and asserting ops stay; so do placeholders."""

from __future__ import annotations

from fxopt.ir import ops
from fxopt.passes.context import Context


def dead_code(context: Context) -> None:
    """Last node first, so that a whole unused chain goes in one walk."""
    graph = context.graph.gm.graph
    for node in reversed(context.nodes):
        if context.exhausted:
            return
        unused = not node.users and (node.op == "get_attr" or (node.op == "call_function" and ops.is_pure(node.target)))
        if unused:
            context.spend("unused", node)
            graph.erase_node(node)
