"""What counts as a write in Dynamo's graph."""

from __future__ import annotations

import operator
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F

from fxopt.passes.in_place import WrittenMemory, writes


def captured(fn: Callable[..., Any], *args: Any) -> torch.fx.Graph:
    graphs = []

    def backend(gm: torch.fx.GraphModule, inputs: Any) -> Any:
        graphs.append(gm.graph)
        return gm.forward

    torch.compiler.reset()
    torch.compile(fn, backend=backend)(*args)
    return graphs[0]


WRITES: dict[str, Callable[[torch.Tensor], Any]] = {
    "method": lambda x: x.mul_(2),
    "operator": lambda x: x.__iadd__(1),
    "item": lambda x: x.__setitem__(0, 1.0),
    "out": lambda x: torch.add(x, 1, out=x),
    "keyword": lambda x: F.relu(x, inplace=True),
    "positional flag": lambda x: F.dropout(x, 0.5, True, True),
    "torch function": lambda x: torch.relu_(x),
    "overload": lambda x: torch.ops.aten.add_.Tensor(x, 1),
}


@pytest.mark.parametrize("name", WRITES)
def test_writes(name: str) -> None:
    def call(x: torch.Tensor) -> torch.Tensor:
        y = x + 1
        WRITES[name](y)
        return y * 2

    graph = captured(call, torch.randn(3))
    assert [n for n in graph.nodes if writes(n)]
    returned = next(n for n in graph.nodes if n.target is operator.mul)
    assert returned.args[0] in WrittenMemory(graph.nodes)
    assert returned not in WrittenMemory(graph.nodes)


def test_pure_calls_do_not_write() -> None:
    def call(x: torch.Tensor) -> torch.Tensor:
        hidden = (x > 0) & (x < 1) | (x == 2)
        return F.dropout(F.relu(x), 0.5, True, False).view(-1).add(1).masked_fill(hidden.flatten(), 0.0)

    assert not [n for n in captured(call, torch.randn(3, 3)).nodes if writes(n)]


def test_views_of_what_is_written_are_written() -> None:
    def call(x: torch.Tensor) -> torch.Tensor:
        y = x.clone()
        row, other = y.view(-1)[3:6], x * 2
        row.fill_(0)
        return y.T + other

    graph = captured(call, torch.randn(3, 3))
    written = WrittenMemory(graph.nodes)
    names = {str(n.target) for n in graph.nodes if n in written}
    assert "clone" in names
    assert "view" in names
    assert not any(n in written for n in graph.nodes if n.target is operator.mul or n.op == "placeholder")
