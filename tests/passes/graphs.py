"""Capture small functions as graphs, run passes on them and compare what comes out with eager, bit for bit."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch.fx.experimental.proxy_tensor import make_fx

from fxopt.ir import ops
from fxopt.ir.graph import Graph, Input, Phase, Role
from fxopt.journal import Journal
from fxopt.passes.context import Context, DefaultOptions
from fxopt.passes.pipeline import NAMES, run

CHECKED = DefaultOptions(check=True)


def capture(
    function: Callable[..., Any], args: Sequence[torch.Tensor], *, frozen: Sequence[int] = (), dynamic: bool = False
) -> Graph:
    """`function` as a functional ATen graph; the inputs at positions `frozen` are CONSTANT."""
    given = [a.clone() if a.is_contiguous() else a for a in args]
    gm = make_fx(torch.func.functionalize(function), tracing_mode="symbolic" if dynamic else "fake")(*given)
    output = gm.graph.output_node()
    if not isinstance(output.args[0], tuple | list):
        output.args = ((output.args[0],),)
    for unused in [n for n in gm.graph.nodes if n.op == "call_function" and ops.name_of(n.target) == "detach"]:
        unused.replace_all_uses_with(unused.args[0])
        gm.graph.erase_node(unused)
    gm.recompile()
    inputs = [Input(n.name, Role.USER) for n in gm.graph.nodes if n.op == "placeholder"]
    for position in frozen:
        inputs[position] = Input(inputs[position].name, Role.CONSTANT, args[position])
    return Graph(gm, inputs, Phase.INFERENCE, "test")


def optimize(
    function: Callable[..., Any],
    args: Sequence[torch.Tensor],
    *,
    only: str | None = None,
    frozen: Sequence[int] = (),
    dynamic: bool = False,
    options: DefaultOptions = CHECKED,
) -> tuple[Graph, Context]:
    """Capture and run the pipeline, the spec checked after every pass; `only` disables every other pass but dead_code."""
    graph = capture(function, args, frozen=frozen, dynamic=dynamic)
    if only is not None:
        options = replace(options, disable=tuple(n for n in NAMES if n not in (only, "dead_code")))
    return graph, run(graph, options, Journal("test"))


def execute(graph: Graph, args: Sequence[torch.Tensor]) -> tuple[Any, ...]:
    """Run the graph on `args`; constants that passes added are appended."""
    extra = [i.value for i in graph.inputs[len(args) :]]
    return tuple(graph.gm(*args, *extra))


def calls(graph: Graph) -> list[str]:
    """The names of the ops called, in order."""
    return [ops.name_of(n.target) for n in graph.gm.graph.nodes if n.op == "call_function"]


def aliasing(inputs: Sequence[torch.Tensor], outputs: Sequence[Any]) -> list[list[bool]]:
    """Which of inputs and outputs share memory with which."""
    tensors = [t for t in (*inputs, *outputs) if isinstance(t, torch.Tensor)]
    storages = [t.untyped_storage().data_ptr() for t in tensors]
    return [[a == b for b in storages] for a in storages]


def assert_identical(graph: Graph, function: Callable[..., Any], args: Sequence[torch.Tensor]) -> None:
    """The graph gives eager's outputs: every bit, dtype, stride and alias, and the same writes into its inputs."""
    ours, theirs = [a.clone() for a in args], [a.clone() for a in args]
    actual, expected = execute(graph, ours), function(*theirs)
    expected = tuple(expected) if isinstance(expected, tuple | list) else (expected,)
    assert len(actual) == len(expected)
    for a, e in zip((*actual, *ours), (*expected, *theirs), strict=True):
        assert a.dtype == e.dtype
        assert a.shape == e.shape
        assert a.stride() == e.stride()
        assert bits(a) == bits(e), f"{a} is not {e}"
    assert aliasing(ours, actual) == aliasing(theirs, expected)


def bits(tensor: torch.Tensor) -> bytes:
    """The elements as bytes, every NaN the same."""
    dense = tensor.detach().contiguous().clone()
    if dense.is_floating_point():
        dense[dense.isnan()] = float("nan")
    return dense.flatten().view(torch.uint8).numpy().tobytes()
