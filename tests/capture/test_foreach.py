"""List ops are taken apart into element ops with eager's values, and optimizers over lists fuse per parameter."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import Any
from unittest import mock

import pytest
import torch
from torch import fx
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx
from torch.multiprocessing.reductions import StorageWeakRef
from torch.testing._internal.common_methods_invocations import (
    foreach_binary_op_db,
    foreach_other_op_db,
    foreach_pointwise_op_db,
    foreach_reduce_op_db,
    foreach_unary_op_db,
)
from torch.utils._pytree import tree_map

from fxopt.capture import foreach
from fxopt.capture.decompositions import decompositions
from fxopt.capture.foreach import FOREACH, take_lists_apart, values_by_layout
from fxopt.journal import RECENT
from tests.numerics import assert_closer, to_float64

OPS = (
    *(*foreach_unary_op_db, *foreach_binary_op_db, *foreach_pointwise_op_db, *foreach_reduce_op_db, *foreach_other_op_db),
)


class _Decomposed(torch.utils._python_dispatch.TorchDispatchMode):
    """Runs list ops through their decompositions, and counts them."""

    count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func in FOREACH:
            self.count += 1
        return FOREACH.get(func, func)(*args, **(kwargs or {}))


@pytest.mark.parametrize("op", OPS, ids=lambda op: op.name)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.int64], ids=str)
def test_decompositions_give_what_eager_gives(op: Any, dtype: torch.dtype) -> None:
    if not op.supports_dtype(dtype, "cpu"):
        return
    method, ran, count = getattr(torch.ops.aten, op.name), 0, 0
    for number, sample in enumerate(op.sample_inputs("cpu", dtype, noncontiguous=False)):
        if number == 12:
            break
        args = (sample.input, *sample.args)
        kwargs = {k: v for k, v in sample.kwargs.items() if k in ("alpha", "value", "ord", "dtype", "weight")}
        try:
            eager = method(*args, **kwargs)
        except (RuntimeError, IndexError, TypeError):
            continue
        with _Decomposed() as mode:
            got = method(*args, **kwargs)
        ran, count = ran + 1, count + mode.count
        assert [(t.shape, t.dtype) for t in got] == [(t.shape, t.dtype) for t in eager]
        torch.testing.assert_close(list(got), list(eager), equal_nan=True)
    assert count or not ran or op.name == "_foreach_powsum"  # stays whole


OPTIMIZERS: dict[str, Callable[[list[torch.nn.Parameter]], torch.optim.Optimizer]] = {
    "AdamW": lambda p: torch.optim.AdamW(p, lr=1e-2, foreach=True),
    "AdamW amsgrad, maximize": lambda p: torch.optim.AdamW(p, lr=1e-2, amsgrad=True, maximize=True, foreach=True),
    "SGD with momentum": lambda p: torch.optim.SGD(p, lr=1e-2, momentum=0.9, nesterov=True, weight_decay=0.1, foreach=True),
    "RMSprop": lambda p: torch.optim.RMSprop(p, lr=1e-2, momentum=0.5, centered=True, foreach=True),
    "Adagrad": lambda p: torch.optim.Adagrad(p, lr=1e-2, foreach=True),
    "Adamax": lambda p: torch.optim.Adamax(p, lr=1e-2, foreach=True),
    "NAdam": lambda p: torch.optim.NAdam(p, lr=1e-2, foreach=True),
}

SHAPES = ((7, 5), (300,), (1,), (4, 3, 2, 2), (300,))


def trained(make: Callable[..., torch.optim.Optimizer], dtype: torch.dtype, compiled: bool) -> Any:
    torch.manual_seed(3)
    parameters = [torch.nn.Parameter(torch.randn(s).to(dtype)) for s in SHAPES]
    optimizer = make(parameters)
    step = torch.compile(optimizer.step, backend="fxopt", options={"strict": True}) if compiled else optimizer.step
    for _ in range(4):
        for p in parameters:
            p.grad = torch.randn(p.shape).to(dtype)
        step()
    state = [{k: v for k, v in optimizer.state[p].items() if isinstance(v, torch.Tensor)} for p in parameters]
    return tree_map(lambda t: t.detach(), (parameters, state))


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_optimizers_fuse_each_parameter_and_step_as_eager_does(name: str) -> None:
    torch.compiler.reset()
    make, before = OPTIMIZERS[name], len(RECENT)
    got = trained(make, torch.float32, compiled=True)
    graphs = [j for j in list(RECENT)[before:] if j.kernels]
    assert not any(op.startswith("aten::_foreach") for j in graphs for op, _ in j.library)
    assert max(len(j.kernels) for j in graphs) <= 3 * len(SHAPES)  # one or two of numbers that all elements share
    eager, exact = (trained(make, dtype, compiled=False) for dtype in (torch.float32, torch.float64))
    assert_closer(got, eager, to_float64(exact))


LAYOUTS = [
    *(torch.empty(3, 4), torch.empty(4, 3).t(), torch.empty(3, 4)),
    *(torch.empty(2), torch.empty(2).double(), torch.empty(3, 4)),
]


def list_ops(x: list[torch.Tensor], y: list[torch.Tensor]) -> list[torch.Tensor]:
    """Ops with factors of each kind, some of which are taken apart further, and an item that nobody reads."""
    moved = torch._foreach_lerp(torch._foreach_add(x, y, alpha=3), x, 0.25)
    root = torch._foreach_sqrt(torch._foreach_addcmul(moved, x, y, [1.0, 2, 3.0, 4.0, 5.0, 6.0]))
    lowest = torch._foreach_maximum(torch._foreach_pow(2.0, root), 1.5)
    return torch._foreach_addcdiv(torch._foreach_mul(moved, torch.tensor(0.5)), lowest, root, value=2.0)[1:]


def described(gm: fx.GraphModule) -> list[Any]:
    """Each node: what is called, of which nodes, and the layout of the result."""
    numbers = {node: k for k, node in enumerate(gm.graph.nodes)}
    lines = []
    for node in gm.graph.nodes:
        given = fx.node.map_arg((node.args, dict(node.kwargs)), lambda n: f"node {numbers[n]}")
        val = node.meta.get("val")
        layout = (val.shape, val.stride(), val.dtype) if isinstance(val, torch.Tensor) else None
        lines.append((node.op, node.target if node.op == "call_function" else "", given, layout))
    return lines


def test_list_ops_taken_apart_are_what_tracing_their_decompositions_gives() -> None:
    table, others = decompositions(), [t.clone() for t in LAYOUTS]
    with FakeTensorMode() as mode:
        x, y = ([mode.from_tensor(t) for t in tensors] for tensors in (LAYOUTS, others))
        traced = make_fx(list_ops, decomposition_table=table)(x, y)
        apart = make_fx(list_ops, decomposition_table={op: f for op, f in table.items() if op not in FOREACH})(x, y)
    assert any("_foreach" in str(node.target) for node in apart.graph.nodes)
    take_lists_apart(apart, table)
    for gm in (apart, traced):
        gm.graph.eliminate_dead_code()
    assert described(apart) == described(traced)
    made = [
        n.meta["val"] for n in apart.graph.nodes if n.op == "call_function" and n.target is not torch.ops.aten.expand.default
    ]
    storages = [StorageWeakRef(value.untyped_storage()) for value in made]
    assert len(set(storages)) == len(storages) > 30


def test_fakes_of_list_ops_are_computed_once_a_layout_and_are_torchs() -> None:
    with FakeTensorMode() as mode:
        x = [mode.from_tensor(t) for t in LAYOUTS]
        want = [torch._foreach_add(x, x), torch._foreach_mul(x, [1.0, 2, 3.0, 4.0, 5.0, 6.0]), torch._foreach_norm(x)]
        with values_by_layout(), mock.patch.object(foreach, "like", wraps=foreach.like) as made:
            got = [torch._foreach_add(x, x), torch._foreach_mul(x, [1.0, 2, 3.0, 4.0, 5.0, 6.0]), torch._foreach_norm(x)]
        assert made.call_count == 3 * len(LAYOUTS)
        for a, b in zip(itertools.chain(*got), itertools.chain(*want), strict=True):
            assert (a.shape, a.stride(), a.dtype, a.device) == (b.shape, b.stride(), b.dtype, b.device)
        storages = {StorageWeakRef(t.untyped_storage()) for t in itertools.chain(*got)}
        assert len(storages) == 3 * len(LAYOUTS)
        assert torch._foreach_add(x[3:5], x[3:5])[1].dtype == torch.float64
