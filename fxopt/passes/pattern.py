"""How a fusion pattern is declared, and how its two functions become templates of ATen nodes.

`pattern` and `replacement` are plain torch functions of the same parameters. Each is traced twice, with two sets of example
arguments; a literal that differs between the traces and equals a parameter in both is that parameter, so scalars and shapes
are parameters like tensors. Any other literal that differs is a detail of the examples' sizes and matches anything.
docs/adding-a-pattern.md walks through an example.
"""

from __future__ import annotations

import functools
import inspect
import operator
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx
from torch.utils._python_dispatch import TorchDispatchMode

from fxopt.ir import ops
from fxopt.ir.graph import Graph, Input, Phase, Role
from fxopt.passes.facts import arguments


@dataclass(frozen=True)
class Sample:
    """A function as users write it and a maker of its arguments (small, seeded by the test)."""

    label: str
    function: Callable[..., Any]
    arguments: Callable[[], tuple[Any, ...]]


@dataclass(frozen=True)
class Pattern:
    """One fusion, declared. `guard` returns None to accept a match or the reason for rejecting it.

    `examples`: two argument tuples that differ in every size and scalar. `through_casts`: a cast between floating dtypes may
    stand between any two matched nodes; declare it only when the replacement is no less accurate without these roundings.
    `needs`: operators of the pattern; a graph that lacks one of them is passed over without tracing the pattern.
    """

    name: str
    pattern: Callable[..., Any]
    replacement: Callable[..., Any]
    examples: tuple[tuple[Any, ...], tuple[Any, ...]]
    guard: Callable[[Any], str | None]
    samples: Callable[[], list[Sample]]
    near_misses: Callable[[], list[Sample]]
    through_casts: bool = False
    needs: tuple[Any, ...] = ()

    def __hash__(self) -> int:
        return hash(self.name)


@dataclass(frozen=True)
class Parameter:
    """A place where the value of a parameter stands."""

    name: str


@dataclass(frozen=True)
class Anything:
    """A literal that follows from the examples' sizes."""


@dataclass(frozen=True)
class Step:
    """The result of an earlier node of the template."""

    index: int


@dataclass(frozen=True)
class TemplateNode:
    """One call: arguments by schema name for matching, and as given (args, kwargs) for building."""

    target: Any
    arguments: dict[str, Any]
    args: tuple[Any, ...]
    kwargs: dict[str, Any]


@dataclass(frozen=True)
class Template:
    nodes: tuple[TemplateNode, ...]
    outputs: tuple[int, ...]


@functools.cache
def templates(declared: Pattern) -> tuple[Template, Template]:
    """(pattern, replacement) as templates. Raises ValueError for a declaration that cannot be one, saying why."""
    return _template(declared, declared.pattern), _template(declared, declared.replacement)


def _template(declared: Pattern, function: Callable[..., Any]) -> Template:
    names = list(inspect.signature(function).parameters)
    if names != list(inspect.signature(declared.pattern).parameters):
        raise ValueError(f"pattern {declared.name}: pattern and replacement must have the same parameters")
    first, second = (_trace(function, example) for example in declared.examples)
    if [n.target for n in first.calls] != [n.target for n in second.calls]:
        raise ValueError(f"pattern {declared.name}: {function.__name__} traces to different ops for its two examples")
    scalars = {n: (a, b) for n, a, b in zip(names, *declared.examples, strict=True) if not isinstance(a, torch.Tensor)}
    build = _Builder(names, first, second, scalars)
    template = Template(tuple(build.node(i) for i in range(len(first.calls))), build.outputs())
    if function is declared.replacement and any(_mentions_anything((n.args, n.kwargs)) for n in template.nodes):
        raise ValueError(f"pattern {declared.name}: the replacement depends on sizes; make them parameters")
    return template


class _Trace:
    """A function traced to ATen: its parameters' placeholders, its calls and its outputs."""

    def __init__(self, graph: fx.Graph, tensor_positions: list[int]) -> None:
        placeholders = [n for n in graph.nodes if n.op == "placeholder"]
        self.position = dict(zip(placeholders, tensor_positions, strict=True))
        self.calls = [n for n in graph.nodes if n.op == "call_function"]
        self.index = {n: i for i, n in enumerate(self.calls)}
        result: Any = next(n for n in graph.nodes if n.op == "output").args[0]
        self.results: tuple[fx.Node, ...] = tuple(result) if isinstance(result, tuple | list) else (result,)


def _trace(function: Callable[..., Any], example: tuple[Any, ...]) -> _Trace:
    """Trace over the tensors of `example` and bring the result to the form that graphs have when patterns are tried."""
    tensors = [i for i, a in enumerate(example) if isinstance(a, torch.Tensor)]
    graph = fx.Graph()
    placeholders = [graph.placeholder(f"a{i}") for i in tensors]
    with torch.no_grad(), _Recorder(graph) as recorder:
        given = list(example)
        for node, i in zip(placeholders, tensors, strict=True):
            like = example[i]
            given[i] = torch.empty_strided(like.shape, like.stride(), dtype=like.dtype, device="meta")
            recorder.assign(node, given[i])
        result = function(*given)
        graph.output(recorder.argument(tuple(result) if isinstance(result, tuple | list) else (result,)))
    inputs = [Input(n.name, Role.USER) for n in placeholders]
    _normalize(Graph(fx.GraphModule({}, graph), inputs, Phase.INFERENCE, "pattern"))
    return _Trace(graph, tensors)


class _Recorder(TorchDispatchMode):
    """Puts every ATen call on a known tensor into a graph. For the few calls of a pattern; `make_fx` would take a tenth of a
    second of each compilation's first graph to set up."""

    def __init__(self, graph: fx.Graph) -> None:
        super().__init__()
        self.graph = graph
        self._nodes: dict[int, tuple[fx.Node, torch.Tensor]] = {}  # by identity: the tensor is kept so that it stays its own

    def assign(self, node: fx.Node, value: Any) -> None:
        """Let `node` stand for `value`, a tensor or a sequence of tensors."""
        node.meta["val"] = value
        if isinstance(value, torch.Tensor):
            self._nodes[id(value)] = node, value
        elif isinstance(value, tuple | list):
            for k, part in enumerate(value):
                self.assign(self.graph.call_function(operator.getitem, (node, k)), part)

    def argument(self, value: Any) -> Any:
        """`value` with nodes for tensors."""
        return torch.utils._pytree.tree_map_only(torch.Tensor, lambda t: self._nodes[id(t)][0], value)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        out = func(*args, **kwargs)
        if any(id(t) in self._nodes for t in torch.utils._pytree.tree_leaves((args, kwargs))):
            self.assign(self.graph.call_function(func, self.argument(args), self.argument(kwargs)), out)
        return out


def _normalize(graph: Graph) -> None:
    from fxopt.passes.context import Context
    from fxopt.passes.dead_code import dead_code
    from fxopt.passes.no_ops import no_ops
    from fxopt.passes.views import views

    context = Context.without_options(graph)
    for step in (no_ops, views, dead_code):
        step(context)


class _Builder:
    """Turns the nodes of two traces into template nodes."""

    def __init__(self, names: list[str], first: _Trace, second: _Trace, scalars: dict[str, tuple[Any, Any]]) -> None:
        self.names, self.first, self.second, self.scalars = names, first, second, scalars

    def node(self, index: int) -> TemplateNode:
        a, b = self.first.calls[index], self.second.calls[index]
        given = self._value(by_name(a), by_name(b))
        kwargs: dict[str, Any] = self._value(dict(a.kwargs), dict(b.kwargs))
        return TemplateNode(a.target, given, tuple(self._value(list(a.args), list(b.args))), kwargs)

    def outputs(self) -> tuple[int, ...]:
        return tuple(self.first.index[n] for n in self.first.results)

    def _value(self, a: Any, b: Any) -> Any:
        if isinstance(a, fx.Node):
            return Parameter(self.names[self.first.position[a]]) if a in self.first.position else Step(self.first.index[a])
        for name, (x, y) in self.scalars.items():
            if _same_literal(a, x) and _same_literal(b, y):
                return Parameter(name)
        if isinstance(a, dict):
            return {k: self._value(v, b[k]) for k, v in a.items()}
        if isinstance(a, tuple | list) and isinstance(b, tuple | list) and len(a) == len(b):
            return [self._value(x, y) for x, y in zip(a, b, strict=True)]
        return a if _same_literal(a, b) else Anything()


def by_name(node: fx.Node) -> dict[str, Any]:
    """Arguments by schema name with defaults; by position for what has no schema."""
    if ops.is_overload(node.target):
        return arguments(node)
    return {**{str(i): a for i, a in enumerate(node.args)}, **node.kwargs}


def _same_literal(a: Any, b: Any) -> bool:
    if isinstance(a, tuple | list) and isinstance(b, tuple | list):
        return len(a) == len(b) and all(_same_literal(x, y) for x, y in zip(a, b, strict=True))
    return type(a) is type(b) and bool(a == b)


def _mentions_anything(value: Any) -> bool:
    if isinstance(value, dict):
        return any(_mentions_anything(v) for v in value.values())
    if isinstance(value, tuple | list):
        return any(_mentions_anything(v) for v in value)
    return isinstance(value, Anything)
