"""Attention in training (`ir/scored_attention_op.py`) as products and what is between them, where no kernel computes it.

An op's eager form is that, written for pieces of the scores. Traced as a whole it becomes nodes like any others, which fuse:
the softmax is one kernel, and the ops of the gradients share their products.
"""

from __future__ import annotations

import math
import operator
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, fx
from torch._guards import detect_fake_mode
from torch.fx.experimental.proxy_tensor import make_fx
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import _disable_current_modes

from fxopt.capture.decompositions import decompositions
from fxopt.capture.foreach import is_symbolic
from fxopt.capture.splicing import splice
from fxopt.ir.graph import Graph
from fxopt.ir.scored_attention_op import EAGER, in_one_piece

MOST_SCORES = 1 << 28
"""Elements of scores that are stored as a whole: of more the eager form has a piece at a time."""


def take_scores_apart(graph: Graph, wanted: Callable[[str], bool] | None = None) -> list[str]:
    """Replace the ops of attention in training, or those of which a result's name is `wanted`, by what they consist of, in
    place.

    A result has the name of its node, one of several with "_" and its number. Returns the names of the nodes replaced. Ops
    of symbolic sizes, and of more than MOST_SCORES scores, stay as they are.
    """
    gm = graph.gm
    targets = [n for n in gm.graph.nodes if n.target in EAGER and _suits(n) and _is_wanted(n, wanted)]
    if not targets:
        return []
    mode: Any = detect_fake_mode([pytree.tree_leaves(n.meta["val"])[0] for n in targets])
    table = decompositions()
    with _disable_current_modes(), torch._C._DisablePythonDispatcher(), torch.no_grad():
        for node in targets:
            _take(gm, node, table, mode)
    gm.recompile()
    return [node.name for node in targets]


def _is_wanted(node: fx.Node, wanted: Callable[[str], bool] | None) -> bool:
    val = node.meta["val"]
    names = [node.name] if isinstance(val, Tensor) else [f"{node.name}_{k}" for k in range(len(val))]
    return wanted is None or any(map(wanted, names))


def _suits(node: fx.Node) -> bool:
    values = [n.meta["val"] for n in node.all_input_nodes]
    if any(map(is_symbolic, pytree.tree_leaves((values, node.args, node.kwargs)))):
        return False
    query, key = _operand(node, "query"), _operand(node, "key")
    return math.prod(query.shape[:3]) * key.shape[2] <= MOST_SCORES


def _operand(node: fx.Node, name: str) -> Tensor:
    place = [a.name for a in node.target._schema.arguments].index(name)  # type: ignore[union-attr]
    value: Tensor = node.args[place].meta["val"]  # type: ignore[union-attr]
    return value


def _take(gm: fx.GraphModule, node: fx.Node, table: dict[Any, Callable[..., Any]], mode: Any) -> None:
    leaves, spec = pytree.tree_flatten((node.args, node.kwargs))
    places = [k for k, leaf in enumerate(leaves) if isinstance(leaf, fx.Node)]

    def whole(*tensors: Tensor) -> Any:
        given = list(leaves)
        for k, tensor in zip(places, tensors, strict=True):
            given[k] = tensor
        args, kwargs = pytree.tree_unflatten(given, spec)
        with in_one_piece():
            return EAGER[node.target](*args, **kwargs)

    functional = torch.func.functionalize(whole, remove="mutations")
    with mode:
        traced = make_fx(functional, decomposition_table=table)(*(leaves[k].meta["val"] for k in places))
    with gm.graph.inserting_before(node):
        results = splice(gm, node, traced, [leaves[k] for k in places], mode)
    if isinstance(results, fx.Node):
        node.replace_all_uses_with(results)
    else:
        for user in list(node.users):
            assert user.target is operator.getitem
            user.replace_all_uses_with(results[user.args[1]])
            gm.graph.erase_node(user)
    gm.graph.erase_node(node)
