"""Functions captured on the CPU and scheduled as for a GPU, with the ways that their products can be computed in."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch._dynamo.source import ConstantSource
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.func import functionalize
from torch.fx.experimental.proxy_tensor import make_fx
from torch.fx.experimental.symbolic_shapes import DimDynamic, ShapeEnv, StatelessSymbolicContext
from torch.utils import _pytree as pytree

from fxopt.capture.decompositions import decompositions
from fxopt.capture.symbols import to_int
from fxopt.ir.graph import Graph, Input, Phase, Role
from fxopt.ir.region import Alternatives, Contraction, Way
from fxopt.journal import Journal
from fxopt.lower import Lowered, lower_graph
from fxopt.lower.contractions import FUSED, with_contractions
from fxopt.lower.schedule import schedule
from fxopt.lower.ways import replaced
from tests.lower.capturing import moved
from tests.lower.harness import lower
from tests.lower.interpreter import run_lowered
from tests.numerics import assert_closer, to_float64


def searched(fn: Callable[..., Any], *args: Any, every: bool = False, dynamic: bool = False) -> Lowered:
    """`fn` on tensors `args`, scheduled for CUDA, with alternatives for its products."""
    low = lower(fn, args, decompose=decompositions(), dynamic=dynamic)
    return with_contractions(schedule(moved(low, "cuda")), every=every)


def searched_for_any(fn: Callable[..., Any], args: tuple[torch.Tensor, ...], dims: set[tuple[int, int]]) -> Lowered:
    """`searched`, with the sizes of the dimensions `dims` (argument, dimension) known only at run time."""
    mode = FakeTensorMode(shape_env=ShapeEnv())

    def fake(k: int, x: torch.Tensor) -> torch.Tensor:
        kinds = [DimDynamic.DYNAMIC if (k, d) in dims else DimDynamic.STATIC for d in range(x.dim())]
        return mode.from_tensor(x, source=ConstantSource(f"x{k}"), symbolic_context=StatelessSymbolicContext(kinds))

    fakes = [fake(k, x) for k, x in enumerate(args)]
    gm = make_fx(functionalize(fn), decomposition_table=decompositions(), tracing_mode="symbolic")(*fakes)
    names = [n.name for n in gm.graph.nodes if n.op == "placeholder"]
    graph = Graph(gm, [Input(n, Role.USER) for n in names], Phase.INFERENCE, "test", to_int)
    return with_contractions(schedule(moved(lower_graph(graph, Journal("test")), "cuda")))


def alternatives(low: Lowered) -> list[Alternatives]:
    return [s for s in low.steps if isinstance(s, Alternatives)]


def fused(fn: Callable[..., Any], *args: Any) -> list[Contraction]:
    """The contractions that `fn` has."""
    found = (each.ways[1] for each in alternatives(searched(fn, *args)))
    contractions = [step for way in found if way.label == FUSED for step in way.steps]
    assert all(isinstance(c, Contraction) for c in contractions)
    return [c for c in contractions if isinstance(c, Contraction)]


def kept(low: Lowered, label: str) -> Lowered:
    """`low` with the way `label` of each of its alternatives that have one, else the first."""
    ways: dict[str, Way] = {}
    for each in alternatives(low):
        ways[each.name] = next((w for w in each.ways if w.label == label), each.ways[0])
    return replaced(low, ways)


def labels(low: Lowered) -> Iterator[str]:
    return iter(dict.fromkeys(w.label for each in alternatives(low) for w in each.ways))


def check_ways(fn: Callable[..., Any], *args: torch.Tensor, every: bool = False) -> Lowered:
    """Assert that every way gives results, and leaves inputs, as close to float64 as eager does. Returns the schedule."""
    low = searched(fn, *args, every=every)
    eager, exact = _after(fn, [a.clone() for a in args]), _after(fn, list(to_float64(args)))
    for label in ("no way at all", *labels(low)):
        own = [a.clone() for a in args]
        steps = low if label == "no way at all" else kept(low, label)
        got = run_lowered(steps, dict(zip(low.inputs, own, strict=True)))
        assert_closer([*got, *own], eager, exact)
    return low


def _after(fn: Callable[..., Any], args: list[torch.Tensor]) -> list[torch.Tensor]:
    """Results, and the arguments as they are afterwards."""
    return [*pytree.tree_leaves(fn(*args)), *args]
