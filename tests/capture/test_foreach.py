"""List ops are taken apart into element ops with eager's values, and optimizers over lists fuse per parameter."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch.testing._internal.common_methods_invocations import (
    foreach_binary_op_db,
    foreach_other_op_db,
    foreach_pointwise_op_db,
    foreach_reduce_op_db,
    foreach_unary_op_db,
)
from torch.utils._pytree import tree_map

from fxopt.capture.foreach import FOREACH
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
