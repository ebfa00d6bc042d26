"""Lower a plain function and run the result in the interpreter, next to eager."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from interpreter import run_lowered
from torch.func import functionalize
from torch.fx.experimental.proxy_tensor import make_fx
from torch.utils import _pytree as pytree

from fxopt.ir.graph import Graph, Input, Phase, Role
from fxopt.journal import Journal
from fxopt.lower import Lowered, lower_graph


def capture(fn: Callable[..., Any], *args: torch.Tensor, decompose: dict[Any, Any] | None = None) -> Graph:
    """The functional ATen graph of fn(*tensors) with static shapes; ops in `decompose` are taken apart."""
    gm = make_fx(functionalize(fn), decomposition_table=decompose or {}, tracing_mode="fake")(*args)
    inputs = [Input(n.name, Role.USER) for n in gm.graph.nodes if n.op == "placeholder"]
    return Graph(gm, inputs, Phase.INFERENCE, "test graph")


def lowered(fn: Callable[..., Any], *args: torch.Tensor, decompose: dict[Any, Any] | None = None) -> tuple[Lowered, Journal]:
    journal = Journal("test graph")
    return lower_graph(capture(fn, *args, decompose=decompose), journal), journal


def run(low: Lowered, args: Sequence[torch.Tensor]) -> list[Any]:
    return run_lowered(low, dict(zip(low.inputs, args, strict=True)))


def outputs(fn: Callable[..., Any], *args: torch.Tensor, decompose: dict[Any, Any] | None = None) -> list[torch.Tensor]:
    """Results of fn(*args) through lowering; a retreat to a library call is an error."""
    low, journal = lowered(fn, *args, decompose=decompose)
    assert not journal.retreats, journal.retreats
    return run(low, args)


def check(fn: Callable[..., Any], *args: torch.Tensor, tolerance: float | None = None) -> None:
    """Assert that fn through lowering gives eager's values, dtypes, shapes and strides."""
    got, want = outputs(fn, *args), pytree.tree_leaves(fn(*args))
    for g, w in zip(got, want, strict=True):
        assert g.stride() == w.stride() or g.numel() <= 1, (g.stride(), w.stride())
        limits: dict[str, Any] = {} if tolerance is None else {"atol": tolerance, "rtol": tolerance}
        torch.testing.assert_close(g, w, equal_nan=True, **limits)
