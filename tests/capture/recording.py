"""A `compile_graph` that checks each graph, keeps it, and runs it node by node: capture tested without the rest."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import fx

from fxopt.backend import compile_dynamo_graph
from fxopt.ir import spec
from fxopt.ir.graph import Graph, Phase, Role
from fxopt.options import Options


class Recorder:
    """Backend and record. `graphs` are the captured graphs in order; `options` are fxopt's."""

    def __init__(self, **options: Any) -> None:
        self.options = Options.parse(None, {"strict": True, **options})
        self.graphs: list[Graph] = []

    def __call__(self, gm: fx.GraphModule, inputs: Sequence[Any], **_: Any) -> Callable[..., Any]:
        return compile_dynamo_graph(gm, inputs, self.options, self.compile_graph)

    def compile_graph(
        self, graph: Graph, example_inputs: Sequence[Any], options: Options, journal: Any
    ) -> Callable[..., Any]:
        spec.check(graph, None)
        self.graphs.append(graph)
        return functools.partial(_run, graph)

    def compile(self, fn: Any, **kwargs: Any) -> Any:
        torch._dynamo.reset()
        return torch.compile(fn, backend=self, **kwargs)

    def of(self, phase: Phase) -> list[Graph]:
        return [g for g in self.graphs if g.phase is phase]

    def targets(self, phase: Phase = Phase.INFERENCE) -> list[str]:
        return [str(n.target) for g in self.of(phase) for n in g.gm.graph.nodes if n.op == "call_function"]


def _run(graph: Graph, args: list[Any]) -> Sequence[Any]:
    given = iter(args)
    values = [i.value if i.role is Role.CONSTANT else next(given) for i in graph.inputs]
    assert next(given, None) is None, "more values than inputs that are not constant"
    args.clear()
    return fx.Interpreter(graph.gm).boxed_run(values)
