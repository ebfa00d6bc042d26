"""Functions captured op by op, lowered and interpreted: the way from a Python function to a verdict without any printer."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

import torch
from torch.fx.experimental.proxy_tensor import make_fx
from torch.utils import _pytree as pytree

from fxopt.capture.symbols import to_int
from fxopt.ir.graph import Graph, Input, Phase, Role
from fxopt.ir.region import Call, Region
from fxopt.journal import Journal
from fxopt.lower import Lowered, lower_graph
from tests.lower.interpreter import run_lowered


def lower_function(
    fn: Callable[..., Any],
    args: tuple[Any, ...],
    *,
    dynamic: bool = False,
    table: Mapping[Any, Callable[..., Any]] | None = None,
) -> Lowered:
    """`fn` on tensors `args`, traced op by op (decomposed by `table`) and lowered; sizes are symbols when `dynamic`."""
    mode = "symbolic" if dynamic else "fake"
    gm = make_fx(lambda *given: fn(*given), decomposition_table=dict(table or {}), tracing_mode=mode)(*args)
    names = [n.name for n in gm.graph.nodes if n.op == "placeholder"]
    graph = Graph(gm, [Input(n, Role.USER) for n in names], Phase.INFERENCE, "test", to_int)
    return lower_graph(graph, Journal("test"))


def moved(lowered: Lowered, device: str) -> Lowered:
    """`lowered` as if its tensors were on `device`."""
    buffers = {n: replace(b, device=torch.device(device)) for n, b in lowered.buffers.items()}
    steps = [
        replace(s, device=torch.device(device), buffers={n: buffers[n] for n in s.buffers}) if isinstance(s, Region) else s
        for s in lowered.steps
    ]
    return replace(lowered, buffers=buffers, steps=steps)


def library_calls(lowered: Lowered) -> list[str]:
    """The ops that lowering left to the library."""
    return [s.op for s in lowered.steps if isinstance(s, Call)]


def check_exact(
    fn: Callable[..., Any],
    *args: Any,
    dynamic: bool = False,
    table: Mapping[Any, Callable[..., Any]] | None = None,
    generated: bool = True,
) -> Lowered:
    """Assert that `fn` lowered gives eager's bits, shapes, dtypes and strides; if `generated`, without library calls."""
    lowered = lower_function(fn, args, dynamic=dynamic, table=table)
    if generated:
        assert not library_calls(lowered)
    actual = run_lowered(lowered, dict(zip(lowered.inputs, args, strict=True)))
    for got, want in zip(actual, pytree.tree_leaves(fn(*args)), strict=True):
        assert_same(got, want)
    return lowered


def assert_same(got: Any, want: Any) -> None:
    """Equal bits (any NaN equals any NaN), dtype and shape, and equal strides where the eager tensor is dense."""
    if not isinstance(want, torch.Tensor):
        assert got == want
        return
    torch.testing.assert_close(got, want, rtol=0, atol=0, equal_nan=True)
    if want.numel() and _is_dense(want):
        strides = [(a, b) for a, b, n in zip(got.stride(), want.stride(), want.shape, strict=True) if n != 1]
        assert all(a == b for a, b in strides), f"strides {got.stride()}, eager's {want.stride()}"


def _is_dense(x: torch.Tensor) -> bool:
    """Whether the elements fill their memory without gaps or overlap, so that the strides are worth keeping."""
    expected = 1
    for stride, size in sorted((s, n) for s, n in zip(x.stride(), x.shape, strict=True) if n != 1):
        if stride != expected:
            return False
        expected *= size
    return True
