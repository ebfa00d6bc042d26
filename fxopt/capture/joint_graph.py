"""What torch does to a joint graph that costs more than it must, removing duplicates and printing for logs nobody reads, and
what it overlooks: inputs that have changed when the backward runs.

torch removes duplicates from a joint graph before it is partitioned with a function that imports most of Inductor, for the
sake of one helper: half a second of the first training step. `remove_duplicates` does the same without.
"""

from __future__ import annotations

import contextlib
import functools
import logging
import operator
from collections.abc import Callable, Iterator
from typing import Any
from unittest import mock

import torch
from torch import fx
from torch._functorch import compile_utils
from torch._functorch._aot_autograd import graph_compile
from torch._logging._internal import trace_log
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._pytree import tree_flatten
from torch.utils.checkpoint import CheckpointPolicy

_RESULTS = {"_log_joint_graph": None, "_log_fw_bw_graphs": (None, None), "_log_inference_graph": None}
"""Functions of torch's that print graphs for its logs, and what they return where logging is off."""

_LOGS = ("aot_joint_log", "aot_graphs_log")


def remove_duplicates(graph: fx.Graph) -> fx.Graph:
    """`graph` with equal calls made once, in place; what torch's `fx_graph_cse` gives.

    Random ops, `empty` and what shares memory with a result stay as they are, and so do equal calls with a write in between.
    """
    if any(_is_foreign(node) for node in graph.nodes):
        return compile_utils.fx_graph_cse(graph)
    kept_apart = _sharing_memory_with_results(graph)
    first: dict[int, tuple[Any, int, fx.Node]] = {}
    writes = 0
    for node in list(graph.nodes):
        if node.op != "call_function":
            continue
        if isinstance(node.target, torch._ops.OpOverload):
            writes += node.target._schema.is_mutable
            packet = node.target.overloadpacket
            if packet in compile_utils.rand_ops or packet is torch.ops.aten.empty:
                continue
        if node in kept_apart:
            continue
        number, call = _call(node)
        equal = first.get(number)
        if equal is not None and equal[:2] == (call, writes):
            node.replace_all_uses_with(equal[2])
            graph.erase_node(node)
        elif equal is None or equal[0] == call:
            first[number] = call, writes, node
    return graph


def save_before_changes(graph: fx.Graph) -> None:
    """Mark what is computed of inputs that `graph`, a joint graph, changes in the end: to be saved, not computed again by
    the backward, which would be given the changed input."""
    copies = list(graph.find_nodes(op="call_function", target=torch.ops.aten.copy_.default))
    waiting = [n.args[0] for n in copies if isinstance(n.args[0], fx.Node) and n.args[0].op == "placeholder"]
    seen = set(copies)
    while waiting:
        for user in waiting.pop().users:
            if user in seen or user.op != "call_function":
                continue
            seen.add(user)
            if isinstance(user.target, torch._ops.OpOverload) and user.target.is_view:
                waiting.append(user)
            else:
                user.meta["recompute"] = CheckpointPolicy.MUST_SAVE


def _is_foreign(node: fx.Node) -> bool:
    """Whether `node` is a symbolic size, or something whose schema does not say if it writes."""
    value = node.meta.get("val")
    if node.op != "call_function" or node.target is operator.getitem:
        return node.op in ("call_method", "call_module") or isinstance(value, torch.SymInt | torch.SymFloat)
    if not isinstance(node.target, torch._ops.OpOverload) or not isinstance(value, torch.Tensor | tuple | list):
        return True
    return node.target.namespace not in ("aten", "prims", "fxopt")


def _sharing_memory_with_results(graph: fx.Graph) -> set[fx.Node]:
    storages = {node: StorageWeakRef(value.untyped_storage()) for node, value in _tensors(graph)}
    results = {storages[node] for node in graph.output_node().all_input_nodes if node in storages}
    return {node for node, storage in storages.items() if storage in results}


def _tensors(graph: fx.Graph) -> Iterator[tuple[fx.Node, torch.Tensor]]:
    for node in graph.nodes:
        value = node.meta.get("val")
        if isinstance(value, torch.Tensor) and value.layout == torch.strided:
            yield node, value


def _call(node: fx.Node) -> tuple[int, Any]:
    """(a hash, what makes two calls equal): literals with their types, since 1 and 1.0 and True differ."""
    leaves, spec = tree_flatten((node.args, dict(node.kwargs)))
    typed = tuple((type(leaf), leaf) for leaf in leaves)
    return hash((node.target, typed)), (node.target, typed, spec)


@contextlib.contextmanager
def without_unread_logs() -> Iterator[None]:
    """AOTAutograd does not print its graphs in the block, unless somebody listens to its logs."""
    if any(map(_writes, trace_log.handlers)) or any(_log(name).isEnabledFor(logging.INFO) for name in _LOGS):
        yield
        return
    with contextlib.ExitStack() as stack:
        for name, result in _RESULTS.items():
            if hasattr(graph_compile, name):
                stack.enter_context(mock.patch.object(graph_compile, name, _returning(result)))
        yield


def _writes(handler: logging.Handler) -> bool:
    """Whether a handler of structured traces has somewhere to write: torch's own waits for TORCH_TRACE to name one."""
    return getattr(handler, "root_dir", handler) is not None


def _log(name: str) -> logging.Logger:
    log: logging.Logger = getattr(graph_compile, name)
    return log


def _returning(result: Any) -> Callable[..., Any]:
    return functools.partial(lambda value, *_, **__: value, result)
