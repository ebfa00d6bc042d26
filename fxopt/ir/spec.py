"""What a legal graph is, as code. Tests run `check` after every pass; a broken rule names the node and the pass.

A functional graph (every phase but EARLY) obeys:
- placeholders come first, one Input each, in order; everything is in topological order; one output, last, a tuple or list;
- nodes call OpOverloads, higher-order ops, operator.getitem or arithmetic on sizes; get_attr names a subgraph or a tensor;
- nothing mutates except `aten.copy_(placeholder, value)`, and after the first of these come only others and the output;
- every value has meta["val"], and it is what FakeTensor propagation gives: shape, dtype, device, strides (strides of
  dimensions of size 1, and of empty tensors, are free). Sizes may be SymInts; outputs may alias inputs and each other.
An EARLY graph (Dynamo's) only has to be a well-formed FX graph. `ir/ops.py` lists the ops by category.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any, NoReturn

import torch
from torch import fx

from fxopt.errors import GraphSpecError
from fxopt.ir import ops
from fxopt.ir.graph import Graph, Phase, Role

COPY_INTO = torch.ops.aten.copy_.default
_DYNAMIC = {torch.Tag.dynamic_output_shape, torch.Tag.data_dependent_output}
_SCALARS = (int, float, bool, complex, str, torch.SymInt, torch.SymFloat, torch.SymBool, torch.dtype, torch.device)


class _Checker:
    """Carries what every message needs."""

    def __init__(self, graph: Graph, after: str | None) -> None:
        self.graph, self.after = graph, after
        self.nodes = list(graph.gm.graph.nodes)

    def fail(self, node: fx.Node | None, problem: str) -> NoReturn:
        where = f" at node {node.format_node()}" if node is not None else ""
        by = f" (after pass {self.after!r})" if self.after else ""
        raise GraphSpecError(f"{self.graph.name}{by}: {problem}{where}")


def check(graph: Graph, after: str | None, *, propagate: bool = True) -> None:
    """Raise GraphSpecError, naming the node and the pass `after`, unless `graph` is legal in its phase.

    `propagate=False` skips the comparison of meta["val"] with a fresh FakeTensor propagation (the expensive half).
    """
    checker = _Checker(graph, after)
    _check_structure(checker)
    _check_inputs(checker)
    if graph.phase is Phase.EARLY:
        return
    _check_targets(checker)
    _check_mutation(checker)
    _check_values(checker)
    if propagate:
        _check_propagation(checker)


def _check_structure(c: _Checker) -> None:
    seen: set[fx.Node] = set()
    for node in c.nodes:
        for arg in node.all_input_nodes:
            if arg not in seen:
                c.fail(node, f"argument {arg.name} is not defined before its use")
        seen.add(node)
    outputs = [n for n in c.nodes if n.op == "output"]
    if len(outputs) != 1 or c.nodes[-1] is not outputs[0]:
        c.fail(None, f"a graph ends in one output node, found {len(outputs)}")
    if c.graph.phase is Phase.EARLY:
        return
    results = outputs[0].args[0]
    if not isinstance(results, tuple | list):
        c.fail(outputs[0], "the output is not a tuple or list")
    if not 0 <= c.graph.saved <= len(results):
        c.fail(outputs[0], f"{c.graph.saved} saved activations but {len(results)} outputs")


def _check_inputs(c: _Checker) -> None:
    placeholders = [n for n in c.nodes if n.op == "placeholder"]
    if any(n.op != "placeholder" for n in c.nodes[: len(placeholders)]):
        c.fail(None, "placeholders must come first")
    if len(placeholders) != len(c.graph.inputs):
        c.fail(None, f"{len(placeholders)} placeholders but {len(c.graph.inputs)} inputs")
    for node, given in zip(placeholders, c.graph.inputs, strict=True):
        if given.name not in (node.name, node.target):
            c.fail(node, f"its Input is called {given.name!r}")
        if given.value is not None and given.role is not Role.CONSTANT:
            c.fail(node, f"a {given.role.value} input carries a value")


def _check_targets(c: _Checker) -> None:
    for node in c.nodes:
        if node.op in ("placeholder", "output"):
            continue
        if node.op == "get_attr":
            _check_attribute(c, node)
        elif node.op != "call_function":
            c.fail(node, f"op kind {node.op} is not allowed")
        elif ops.category(node.target) == "library" and not ops.is_overload(node.target):
            c.fail(node, f"target {node.target} is neither an OpOverload, a higher-order op, getitem nor size arithmetic")


def _check_attribute(c: _Checker, node: fx.Node) -> None:
    value: Any = c.graph.gm
    for part in str(node.target).split("."):
        if not hasattr(value, part):
            c.fail(node, f"attribute {node.target} does not exist")
        value = getattr(value, part)
    if isinstance(value, fx.GraphModule) and not all(ops.category(u.target) == "higher_order" for u in node.users):
        c.fail(node, "a subgraph is used by something that is not a higher-order op")


def _check_mutation(c: _Checker) -> None:
    ended = False
    for node in c.nodes:
        if node.op != "call_function":
            continue
        if ops.is_mutating(node.target):
            target = node.args[0] if node.args else None
            if node.target is not COPY_INTO or not isinstance(target, fx.Node) or target.op != "placeholder":
                c.fail(node, "only a trailing aten.copy_ into a placeholder may mutate")
            ended = True
        elif ended:
            c.fail(node, "computation after a copy_ into an input")


def _check_values(c: _Checker) -> None:
    for node in c.nodes:
        if node.op == "output" or (node.op == "get_attr" and "val" not in node.meta):
            continue
        if node.op == "call_function" and ops.is_overload(node.target) and not ops.schema(node.target).returns:
            continue
        if "val" not in node.meta:
            c.fail(node, 'no meta["val"]')
        if not _legal_value(node.meta["val"]) and ops.category(node.target) != "higher_order":
            c.fail(node, f'meta["val"] is a {type(node.meta["val"]).__name__}')


def _legal_value(value: Any) -> bool:
    if isinstance(value, tuple | list):
        return all(_legal_value(v) for v in value)
    return value is None or isinstance(value, (torch.Tensor, *_SCALARS))


def fake_mode(graph: Graph) -> Any:
    """The FakeTensorMode that the graph's values belong to, as a context manager (None when it has no tensors)."""
    for node in graph.gm.graph.nodes:
        value = node.meta.get("val")
        for tensor in value if isinstance(value, tuple | list) else (value,):
            mode = getattr(tensor, "fake_mode", None)
            if mode is not None:
                return mode
    return None


@contextlib.contextmanager
def propagation(mode: Any) -> Iterator[None]:
    """Run ops on fake tensors without recording gradients."""
    with torch.no_grad(), mode:
        yield


def _check_propagation(c: _Checker) -> None:
    mode = fake_mode(c.graph)
    if mode is None:
        return
    for node in c.nodes:
        if node.op != "call_function" or node.target is COPY_INTO or not _repeatable(node):
            continue
        args, kwargs = fx.node.map_arg((node.args, dict(node.kwargs)), lambda n: n.meta["val"])
        try:
            with propagation(mode):
                again = node.target(*args, **kwargs)
        except Exception as error:
            c.fail(node, f"FakeTensor propagation raises {type(error).__name__}: {error}")
        problem = difference(node.meta["val"], again)
        if problem:
            c.fail(node, f'meta["val"] is stale: {problem}')


def _repeatable(node: fx.Node) -> bool:
    if ops.is_higher_order(node.target) or "val" not in node.meta:
        return False
    if any("val" not in a.meta for a in node.all_input_nodes):
        return False
    return not (ops.is_overload(node.target) and _DYNAMIC & set(getattr(node.target, "tags", ())))


def difference(have: Any, want: Any) -> str | None:
    """How two values of meta["val"] differ in structure, shape, dtype, device or strides; None when they agree."""
    if isinstance(have, tuple | list) or isinstance(want, tuple | list):
        if not (isinstance(have, tuple | list) and isinstance(want, tuple | list)) or len(have) != len(want):
            return f"structure {type(have).__name__} against {type(want).__name__}"
        return next((d for h, w in zip(have, want, strict=True) if (d := difference(h, w))), None)
    if isinstance(have, torch.Tensor) != isinstance(want, torch.Tensor):
        return f"{type(have).__name__} against {type(want).__name__}"
    return _tensor_difference(have, want) if isinstance(have, torch.Tensor) else _scalar_difference(have, want)


def _scalar_difference(have: Any, want: Any) -> str | None:
    return f"{have} against {want}" if known_different(have, want) else None


def _tensor_difference(have: torch.Tensor, want: torch.Tensor) -> str | None:
    if have.dtype != want.dtype or have.device != want.device:
        return f"{have.dtype} on {have.device} against {want.dtype} on {want.device}"
    if have.dim() != want.dim() or any(known_different(a, b) for a, b in zip(have.shape, want.shape, strict=True)):
        return f"shape {tuple(have.shape)} against {tuple(want.shape)}"
    if have.layout != torch.strided or any(isinstance(s, int) and s == 0 for s in have.shape):
        return None
    strides = zip(have.shape, have.stride(), want.stride(), strict=True)
    if any(known_different(a, b) for size, a, b in strides if not (isinstance(size, int) and size == 1)):
        return f"strides {have.stride()} against {want.stride()}"
    return None


def known_equal(a: Any, b: Any) -> bool:
    """Whether a == b holds for every value of the size symbols. Adds no guard."""
    if isinstance(a, torch.SymInt) or isinstance(b, torch.SymInt):
        return a is b or _statically(a == b)
    return bool(a == b)


def known_different(a: Any, b: Any) -> bool:
    """Whether a != b holds for every value of the size symbols (NaN equals itself). Adds no guard."""
    if isinstance(a, torch.SymInt) or isinstance(b, torch.SymInt):
        return a is not b and _statically(a != b)
    if isinstance(a, torch.SymFloat | torch.SymBool) or isinstance(b, torch.SymFloat | torch.SymBool):
        return False
    return bool(a != b) and not (a != a and b != b)


def _statically(condition: Any) -> bool:
    if isinstance(condition, bool):
        return condition
    from torch.fx.experimental.symbolic_shapes import statically_known_true

    return statically_known_true(condition)
