"""Which nodes of Dynamo's graph write into their arguments: there, unlike in ATen graphs, calls mutate freely."""

from __future__ import annotations

import functools
import inspect
import operator
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch
from torch import fx
from torch.multiprocessing.reductions import StorageWeakRef

from fxopt.ir import ops
from fxopt.passes.dynamo_facts import is_special

OPERATORS: frozenset[Callable[..., Any]] = frozenset(
    {
        *(operator.setitem, operator.delitem, operator.iadd, operator.isub, operator.imul, operator.itruediv),
        *(operator.ifloordiv, operator.imod, operator.ipow, operator.iand, operator.ior, operator.ixor),
        *(operator.imatmul, operator.ilshift, operator.irshift),
    }
)
SPECIAL_METHODS = frozenset(f"__{function.__name__}__" for function in OPERATORS)


def writes(node: fx.Node) -> bool:
    """Whether a call may change the memory of an argument; true also for what cannot be looked into."""
    if node.op == "call_method":
        return _ends_in_underscore(str(node.target)) or node.target in SPECIAL_METHODS
    if node.op != "call_function":
        return node.op == "call_module"
    if getattr(node.target, "__module__", "") == operator.add.__module__:
        return node.target in OPERATORS
    if node.kwargs.get("out") is not None or ops.is_higher_order(node.target):
        return True
    if ops.is_overload(node.target):
        return ops.is_mutating(node.target)
    return _ends_in_underscore(getattr(node.target, "__name__", "")) or _is_inplace(node)


class WrittenMemory:
    """Which memory the calls of a graph may change. Dynamo's example values share storage where the values will."""

    def __init__(self, nodes: Iterable[fx.Node]) -> None:
        arguments = {argument for node in nodes if writes(node) for argument in node.all_input_nodes}
        self._storages = {storage for node in arguments for storage in _storages(node)}

    def __contains__(self, node: fx.Node) -> bool:
        return not self._storages.isdisjoint(_storages(node))


def _storages(node: fx.Node) -> Iterator[StorageWeakRef]:
    value = node.meta.get("example_value")
    for tensor in value if isinstance(value, tuple | list) else (value,):
        if isinstance(tensor, torch.Tensor) and not is_special(tensor):
            yield StorageWeakRef(tensor.untyped_storage())


def _ends_in_underscore(name: str) -> bool:
    return name.endswith("_") and not name.endswith("__")


def _is_inplace(node: fx.Node) -> bool:
    """Whether a Python function is called with its `inplace` set."""
    position = _position(node.target, "inplace")
    given = node.args[position] if position is not None and position < len(node.args) else node.kwargs.get("inplace")
    return bool(given)


@functools.cache
def _position(function: Any, parameter: str) -> int | None:
    try:
        names = list(inspect.signature(function).parameters)
    except (TypeError, ValueError):  # builtins have no signature to ask
        return None
    return names.index(parameter) if parameter in names else None
