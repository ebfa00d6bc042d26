"""Compute at compile time what depends on no run-time value.

Three outcomes, so that nothing is folded that costs more to load than to compute:
- a value that is the same everywhere becomes `full` (a literal inside a kernel);
- a value computed from frozen inputs becomes a CONSTANT input, if it is not much larger than what it came from;
- a value computed from sizes alone becomes a CONSTANT input only if it is small and needs more than a loop to compute
  (cumsum, sort, matmul): loops inline arange and pointwise arithmetic for nothing.
What leaves the graph is not turned into an input: an output must be fresh memory at every call.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import fx

from fxopt.ir import ops
from fxopt.ir.graph import Input, Role
from fxopt.passes.context import Context
from fxopt.passes.facts import escapes, is_contiguous, static_shape, tensor

aten = torch.ops.aten
MAX_GENERATED = 1 << 18  # elements evaluated from sizes alone; larger ones are too slow to be worth a look
MAX_EMBEDDED = 1 << 16  # elements of a generated value that may become an input
GROWTH = 2  # a folded value may have this many times the bytes of the frozen inputs it came from
SMALL_BYTES = 1 << 20  # ... or this many, if that is more
_INLINED = frozenset({"pointwise", "view", "factory"})
_FOLDABLE = _INLINED | {"indexing", "reduction", "scan", "contraction", "getitem"}


_COMPARABLE = {
    *(torch.bool, torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64),
    *(torch.float16, torch.bfloat16, torch.float32, torch.float64),
}


class _Known:
    """A node's value at compile time. `bytes_from` counts frozen input bytes; `inlined`: loops compute it for nothing."""

    __slots__ = ("bytes_from", "inlined", "value")

    def __init__(self, value: Any, bytes_from: int, inlined: bool) -> None:
        self.value, self.bytes_from, self.inlined = value, bytes_from, inlined


def constant_folding(context: Context) -> None:
    known = _frozen_inputs(context)
    for node in context.nodes:
        if node.op == "call_function" and _may_evaluate(node, known):
            result = _evaluate(node, known)
            if result is not None:
                known[node] = result
    for node in list(known):
        if context.exhausted:
            return
        if node.op == "call_function" and _is_frontier(node, known):
            _materialize(context, node, known[node])


def _frozen_inputs(context: Context) -> dict[fx.Node, _Known]:
    placeholders = (n for n in context.nodes if n.op == "placeholder")
    return {
        node: _Known(given.value, given.value.nbytes, True)
        for node, given in zip(placeholders, context.graph.inputs, strict=True)
        if given.role is Role.CONSTANT and given.value is not None
    }


def _may_evaluate(node: fx.Node, known: dict[fx.Node, _Known]) -> bool:
    if not ops.may_merge(node.target) or ops.category(node.target) not in _FOLDABLE:
        return False
    if not all(a in known for a in node.all_input_nodes):
        return False
    value = node.meta.get("val")
    values = value if isinstance(value, tuple | list) else (value,)
    if not all(isinstance(v, torch.Tensor) and v.layout == torch.strided and static_shape(v) for v in values):
        return False
    nbytes_from = sum(known[a].bytes_from for a in node.all_input_nodes)
    if nbytes_from:
        return bool(sum(v.numel() * v.element_size() for v in values) <= max(GROWTH * nbytes_from, SMALL_BYTES))
    return bool(sum(v.numel() for v in values) <= MAX_GENERATED)


def _evaluate(node: fx.Node, known: dict[fx.Node, _Known]) -> _Known | None:
    """The node's value, or None where it cannot be computed here (the graph's device is absent, memory is short)."""
    args, kwargs = fx.node.map_arg((node.args, dict(node.kwargs)), lambda n: known[n].value)
    try:
        with torch.no_grad():
            value = node.target(*args, **kwargs)  # type: ignore[operator]
    except (RuntimeError, AssertionError):
        return None
    if hasattr(value, "fake_mode"):  # an enclosing FakeTensorMode: nothing can be computed
        return None
    origins = [known[a] for a in node.all_input_nodes]
    inlined = ops.category(node.target) in _INLINED and all(o.inlined for o in origins)
    return _Known(value, sum(o.bytes_from for o in origins), inlined)


def _is_frontier(node: fx.Node, known: dict[fx.Node, _Known]) -> bool:
    """Whether `node` owns memory and something that is not constant reads it, directly or through views of it."""
    if ops.is_view(node.target) and node.target is not ops.GETITEM:
        return False
    stack = [node]
    while stack:
        for user in stack.pop().users:
            if user not in known:
                return True
            if ops.is_view(user.target):
                stack.append(user)
    return False


def _materialize(context: Context, node: fx.Node, known: _Known) -> None:
    held = tensor(node)
    if held is None or not isinstance(known.value, torch.Tensor) or node.target is aten.full.default:
        return
    uniform = _uniform(known.value) if is_contiguous(held) else None
    if uniform is not None:
        kwargs = {"dtype": held.dtype, "device": held.device}
        full = context.emit(aten.full.default, (list(held.shape), uniform), node, kwargs)
        context.replace("uniform", node, full)
        return
    worth_it = known.bytes_from > 0 or (not known.inlined and held.numel() <= MAX_EMBEDDED)
    if worth_it and not escapes(node):
        context.spend("frozen" if known.bytes_from else "generated", node)
        embed(context, node, known.value)


def _uniform(value: torch.Tensor) -> bool | int | float | None:
    """The one value of all elements (NaN equal to itself, -0.0 not equal to 0.0), or None."""
    if value.numel() == 0 or value.dtype not in _COMPARABLE:
        return None
    first = value.flatten()[0]
    same = torch.isnan(value).all() if bool(torch.isnan(first)) else (value == first).all()
    if not bool(same) or (value.dtype.is_floating_point and not bool((value.signbit() == first.signbit()).all())):
        return None
    item: bool | int | float = first.item()
    return item


def embed(context: Context, node: fx.Node, value: torch.Tensor) -> fx.Node:
    """Replace `node` by a new CONSTANT input, the result, that holds its value in the strides that its users expect."""
    held = tensor(node)
    assert held is not None
    if value.stride() != held.stride():
        value = torch.empty_strided(held.shape, held.stride(), dtype=held.dtype, device=held.device).copy_(value)
    fresh = add_constant(context, node.name, value, node.meta)
    node.replace_all_uses_with(fresh)
    context.graph.gm.graph.erase_node(node)
    return fresh


def add_constant(context: Context, name: str, value: torch.Tensor, meta: dict[str, Any]) -> fx.Node:
    """A new CONSTANT input that holds `value`. `meta` describes it: "val", and the "module" that it is for."""
    graph = context.graph.gm.graph
    placeholders = [n for n in graph.nodes if n.op == "placeholder"]
    with graph.inserting_before(next(n for n in graph.nodes if n.op != "placeholder")):
        fresh = graph.placeholder(f"folded_{len(placeholders)}_{name}")
    fresh.meta = {**meta, "pass": context.pass_name}
    context.graph.inputs.append(Input(fresh.name, Role.CONSTANT, value))
    return fresh
