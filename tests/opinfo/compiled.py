"""Problems compiled together: capture all, compile every kernel of all of them at once, then run.

A C++ compiler takes seconds for a file and milliseconds more for another kernel in it, so kernels of many samples share few
files. Most samples enter at AOTAutograd (`capture.aot.compile_with_autograd`, a graph of one node that calls the op), which
skips Dynamo's time; the first sample of each op, and whatever AOTAutograd alone cannot trace, goes through torch.compile.
"""

from __future__ import annotations

import functools
import types
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import fx
from torch.utils import _pytree as pytree

from fxopt import passes
from fxopt.backend import compile_dynamo_graph
from fxopt.capture.aot import as_it_is, compile_with_autograd, retreat
from fxopt.capture.normalize import copy_module
from fxopt.codegen.compile import compile_kernels
from fxopt.compiler import compile_graph
from fxopt.errors import UnsupportedError
from fxopt.ir import spec
from fxopt.ir.graph import Graph, Role
from fxopt.ir.kernel import KernelSource
from fxopt.ir.region import Call, Ref, Region
from fxopt.journal import Journal
from fxopt.lower import Lowered, lower_graph
from fxopt.lower.calls import overload_name
from fxopt.lower.cost import nbytes
from fxopt.lower.opsets import LIBRARY_OPS
from fxopt.lower.schedule import schedule
from fxopt.options import Options
from fxopt.runtime.artifacts import default_store
from fxopt.target import Target
from fxopt.tune.candidate import candidates
from tests.lower.interpreter import run_lowered
from tests.opinfo.samples import DEVICES, Problem

OPTIONS = {"cpu": Options(), "cuda": Options(tuning_seconds=0)}
"""By device. Samples are too small to measure kernels with, and processes that share a GPU would disturb each other."""

PLANNED = frozenset(overload_name(op) for op in LIBRARY_OPS)


@dataclass
class Outcome:
    """How one problem's graphs were compiled."""

    retreats: list[tuple[str, str]] = field(default_factory=list)
    internal: list[str] = field(default_factory=list)
    planned: list[str] = field(default_factory=list)
    generated_bytes: int = 0
    library_bytes: int = 0
    graphs: int = 0

    @property
    def generated(self) -> bool:
        """Whether nothing but generated kernels, views and planned library calls ran."""
        return not self.retreats and not self.internal


class Postponed:
    """A captured graph that is compiled at its first call after `batch.compile()`; called before, it runs as it is."""

    def __init__(self, batch: Batch, outcome: Outcome, graph: Graph, examples: Sequence[Any], journal: Journal) -> None:
        self.batch, self.outcome, self.graph = batch, outcome, graph
        self.examples, self.journal = examples, journal
        self.original = copy_module(graph.gm)
        self.run: Callable[[list[Any]], Sequence[Any]] | None = None
        outcome.graphs += 1

    def __call__(self, args: list[Any]) -> Sequence[Any]:
        if not self.batch.ready:
            return self.as_it_is(args)
        if self.run is None:
            self.run = self.compile()
        return self.run(args)

    def as_it_is(self, args: list[Any]) -> Sequence[Any]:
        given = iter(list(args))
        values = [i.value if i.role is Role.CONSTANT else next(given) for i in self.graph.inputs]
        args.clear()
        return as_it_is(self.original)(values)

    def compile(self) -> Callable[[list[Any]], Sequence[Any]]:
        """Compiled as `capture.aot` would: what cannot be is a retreat of the whole graph, and noted."""
        try:
            with torch.no_grad():
                run = self.batch.build(self)
            spec.check(self.graph, None)
        except Exception as error:
            if not isinstance(error, UnsupportedError):
                self.outcome.internal.append(f"{type(error).__name__}: {error}")
            retreat(self.journal, "the whole graph", error)
            run = self.as_it_is
        self.outcome.retreats += self.journal.retreats
        return run

    def lowered(self, journal: Journal) -> Lowered:
        """The schedule of a copy of the graph."""
        graph = Graph(
            copy_module(self.original),
            [*self.graph.inputs],
            self.graph.phase,
            self.graph.name,
            self.graph.to_int,
            self.graph.saved,
            dict(self.graph.notes),
        )
        passes.run(graph, self.batch.options, journal)
        return schedule(lower_graph(graph, journal))


class Batch:
    """Problems whose kernels are compiled together. `executor` is one of DEVICES; "interpreter" does without a compiler."""

    def __init__(self, executor: str = "cpp") -> None:
        self.executor = executor
        self.options = OPTIONS[DEVICES[executor]]
        self.ready = False
        self.sources: dict[torch.device, list[KernelSource]] = {}

    def add(self, problem: Problem, dynamo: bool) -> tuple[Callable[..., Any], Outcome]:
        """(a function of the problem's tensors that gives its result's leaves, how its graphs were compiled).

        Raises what tracing raises.
        """
        outcome = Outcome()
        collect = functools.partial(self.collect, outcome)
        return (through_dynamo if dynamo else through_autograd)(problem, collect, self.options), outcome

    def collect(
        self, outcome: Outcome, graph: Graph, examples: Sequence[Any], options: Options, journal: Journal
    ) -> Callable[[list[Any]], Sequence[Any]]:
        """A `compile_graph` that prints the graph's kernels and leaves the rest for later."""
        postponed = Postponed(self, outcome, graph, examples, journal)
        try:
            with torch.no_grad():
                lowered = postponed.lowered(Journal(graph.name))
        except Exception:  # comes again, and is noted, when the graph is compiled for good
            return postponed
        count_bytes(outcome, lowered)
        if self.executor != "interpreter":
            for region in (s for s in lowered.steps if isinstance(s, Region)):
                self.sources.setdefault(region.device, []).extend(_sources(region, self.options))
        return postponed

    def compile(self) -> None:
        """Compile every kernel seen so far into the store; from here on graphs run compiled."""
        for device, sources in self.sources.items():
            compile_kernels(sources, Target.current(device), default_store())
        self.sources.clear()
        self.ready = True

    def build(self, postponed: Postponed) -> Callable[[list[Any]], Sequence[Any]]:
        if self.executor != "interpreter":
            return compile_graph(postponed.graph, postponed.examples, self.options, postponed.journal)
        lowered = postponed.lowered(postponed.journal)

        def run(args: list[Any]) -> list[Any]:
            values = dict(zip(lowered.inputs, args, strict=True))
            args.clear()
            return run_lowered(lowered, values)

        return run


def _sources(region: Region, options: Options) -> list[KernelSource]:
    try:
        return [s for candidate in candidates(region, options) for s in candidate.sources]
    except UnsupportedError:  # a retreat, noted when the graph is compiled for good
        return []


def count_bytes(outcome: Outcome, lowered: Lowered) -> None:
    """Bytes that kernels and unplanned library calls read and write, each tensor once per step."""
    for step in lowered.steps:
        if isinstance(step, Region):
            outcome.generated_bytes += sum(nbytes(b) for b in step.buffers.values())
        elif isinstance(step, Call):
            if step.op in PLANNED:
                outcome.planned.append(step.op)
            else:
                names = [a.name for a in pytree.tree_leaves((step.args, step.kwargs), is_leaf=_is_ref) if _is_ref(a)]
                specs = [lowered.buffers.get(n) for n in (*names, *(o for o in step.outputs if o))]
                outcome.library_bytes += sum(nbytes(s) for s in specs if s is not None)


def _is_ref(x: Any) -> bool:
    return isinstance(x, Ref)


class NeedsDynamo(Exception):
    """The result holds something that is not a tensor, which a graph of one node cannot return."""


def through_autograd(problem: Problem, collect: Callable[..., Any], options: Options) -> Callable[..., Any]:
    """The op as a graph of one node, handed to AOTAutograd. Its result's leaves come back as a list."""
    graph = fx.Graph()
    inputs = [graph.placeholder(f"x{k}") for k in range(len(problem.tensors))]

    def apply_op(*tensors: torch.Tensor) -> tuple[torch.Tensor, ...]:
        leaves = pytree.tree_leaves(problem.call(list(tensors)))
        if not all(isinstance(leaf, torch.Tensor) for leaf in leaves):
            raise NeedsDynamo
        return tuple(leaves)

    result = graph.call_function(apply_op, tuple(inputs))
    count = len(apply_op(*problem.inputs()))
    graph.output(tuple(graph.call_function(_item, (result, k)) for k in range(count)))
    gm = fx.GraphModule(torch.nn.Module(), graph)
    return compile_with_autograd(gm, problem.inputs(), options, collect)


def _item(values: tuple[torch.Tensor, ...], k: int) -> torch.Tensor:
    return values[k]


def through_dynamo(problem: Problem, collect: Callable[..., Any], options: Options) -> Callable[..., Any]:
    """The op through torch.compile, graph breaks and all. Its result's leaves come back as a list."""

    def backend(gm: fx.GraphModule, inputs: Sequence[Any]) -> Callable[..., Any]:
        return compile_dynamo_graph(gm, inputs, options, collect)

    compiled = torch.compile(own_code(problem), backend=backend, dynamic=False)

    def run(*tensors: torch.Tensor) -> list[Any]:
        return pytree.tree_leaves(compiled(list(tensors)))

    return run


def own_code(problem: Problem) -> Callable[[list[torch.Tensor]], Any]:
    """`problem.call` with a code object that nobody else has: Dynamo counts recompilations by code object."""

    def call(tensors: list[torch.Tensor]) -> Any:
        return problem.call(tensors)

    return types.FunctionType(call.__code__.replace(), call.__globals__, "call", call.__defaults__, call.__closure__)
