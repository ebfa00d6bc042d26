"""Whole models through AOTAutograd: forward and backward graphs, symbolic sizes, buffers that are written."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from functorch.compile import make_boxed_func
from torch import nn
from torch._dynamo.backends.common import aot_autograd

from fxopt.ir.graph import Graph, Input, Phase, Role
from fxopt.journal import Journal
from fxopt.passes.context import Context
from fxopt.passes.pipeline import run
from tests.numerics import assert_closer, to_float64
from tests.passes.graphs import CHECKED


class Block(nn.Module):
    """A pre-norm transformer block with attention spelled out, dropout off, and a counter that every call increments."""

    def __init__(self, width: int = 8, heads: int = 2) -> None:
        super().__init__()
        self.heads = heads
        self.norm, self.qkv = nn.LayerNorm(width), nn.Linear(width, 3 * width)
        self.out, self.drop = nn.Linear(width, width), nn.Dropout(0.0)
        self.register_buffer("calls", torch.zeros((), dtype=torch.int64))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.calls += 1
        batch, length, width = x.shape
        parts = self.qkv(self.norm(x)).view(batch, length, 3, self.heads, width // self.heads)
        q, k, v = parts.permute(2, 0, 3, 1, 4).unbind(0)
        scores = (q @ k.transpose(-2, -1)) / (width // self.heads) ** 0.5
        scores = scores + torch.triu(torch.full((length, length), float("-inf")), 1).to(scores.dtype)
        mixed = (scores.softmax(-1) @ v).transpose(1, 2).reshape(batch, length, width)
        return x + self.drop(nn.functional.gelu(self.out(mixed))) * 1.0


def passes_backend(contexts: list[Context]) -> Callable[..., Any]:
    """A torch.compile backend that runs the passes on every graph, checked, and then the graph itself."""

    def compiler(phase: Phase) -> Callable[..., Any]:
        def compile_graph(gm: torch.fx.GraphModule, example_inputs: Any) -> Callable[..., Any]:
            inputs = [Input(n.name, Role.USER) for n in gm.graph.find_nodes(op="placeholder", sort=True)]
            contexts.append(run(Graph(gm, inputs, phase, phase.value), CHECKED, Journal(phase.value)))
            return make_boxed_func(gm.forward)

        return compile_graph

    phases = (Phase.FORWARD, Phase.BACKWARD, Phase.INFERENCE)
    forward, backward, inference = (compiler(p) for p in phases)
    return aot_autograd(
        fw_compiler=forward, bw_compiler=backward, inference_compiler=inference, keep_inference_input_mutations=True
    )


@pytest.mark.parametrize("dynamic", [False, True])
@pytest.mark.parametrize("train", [False, True])
def test_block_is_right_and_rewritten(train: bool, dynamic: bool) -> None:
    torch.compiler.reset()
    block, x = Block(), torch.randn(2, 5, 8)
    wide, reference = to_float64(block), to_float64(block).float()
    contexts: list[Context] = []
    compiled = torch.compile(block, backend=passes_backend(contexts), dynamic=dynamic)

    def step(model: Any, given: torch.Tensor) -> tuple[torch.Tensor, ...]:
        given = given.clone().requires_grad_(train)
        with torch.set_grad_enabled(train):
            result = model(given)
            if train:
                result.square().sum().backward()
        return (result.detach(), given.grad) if train else (result,)

    assert_closer(step(compiled, x), step(reference, x), step(wide, x.double()))
    assert block.calls.item() == 1
    assert [c.graph.phase for c in contexts] == ([Phase.FORWARD, Phase.BACKWARD] if train else [Phase.INFERENCE])
    assert all(c.log for c in contexts)


def test_outputs_do_not_alias_inputs_or_each_other() -> None:
    torch.compiler.reset()

    def function(x: torch.Tensor) -> tuple[torch.Tensor, ...]:
        return x * 1, x.clone(), x.view(-1), x.exp(), x.exp()

    x = torch.randn(3, 4)
    results = torch.compile(function, backend=passes_backend([]))(x)
    for result in (results[0], results[1], results[3]):
        result.zero_()
    assert x.abs().sum() > 0
    assert torch.equal(results[4], x.exp())
    results[2].zero_()
    assert x.abs().sum() == 0
