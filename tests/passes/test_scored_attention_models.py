"""Attention of transformers' models in training with `dynamic=True`: one graph for all lengths, with ops of ours in it."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, fx

from fxopt.capture.steady_floats import mark_steady_floats
from fxopt.ir.scored_attention_op import scored_attention
from fxopt.journal import Journal
from fxopt.options import Options
from fxopt.passes import run_early
from tests.models.attention_spellings import SPELLINGS, as_on_a_gpu
from tests.numerics import assert_closer

pytest.importorskip("transformers")

WITHOUT_DROPOUT = {"T5": {"dropout_rate": 0.0}, "BLOOM": {"hidden_dropout": 0.0, "attention_dropout": 0.0}, "Gemma 2": {}}
ATTENTIONS = {"T5": 3, "BLOOM": 1, "Gemma 2": 2}
LENGTHS = ((2, 24), (3, 17), (2, 41))


def outcome(run: Callable[..., Any], model: Any, tokens: Tensor) -> list[Tensor]:
    """A result and the gradients of the parameters."""
    more = {"decoder_input_ids": tokens[:, :-3]} if model.config.model_type == "t5" else {}
    model.zero_grad()
    out = run(input_ids=tokens, use_cache=False, **more).last_hidden_state
    out.square().mean().backward()
    return [out.detach(), *(p.grad for p in model.parameters() if p.grad is not None)]


@pytest.mark.parametrize("name", WITHOUT_DROPOUT)
def test_lengths_known_only_at_run_time(name: str) -> None:
    spelling = SPELLINGS[name]
    model = replace(spelling, sizes=spelling.sizes | WITHOUT_DROPOUT[name]).model().train()
    exact = copy.deepcopy(model).double()
    graphs: list[fx.GraphModule] = []

    def early(gm: fx.GraphModule, inputs: list[Tensor]) -> Callable[..., Any]:
        mark_steady_floats(gm)
        run_early(gm, Options(), Journal("test", strict=True))
        graphs.append(gm)
        return gm.forward

    torch.compiler.reset()
    with as_on_a_gpu():
        compiled = torch.compile(model, backend=early, dynamic=True)
        for batch, length in LENGTHS:
            tokens = torch.arange(batch * length).reshape(batch, length) % 99
            results = outcome(compiled, model, tokens)
            eager = outcome(model, model, tokens)
            assert_closer(results, eager, outcome(exact, exact, tokens), factor=2)  # of roundings in all the model
    found = sum(n.target is scored_attention for gm in graphs for n in gm.graph.nodes)
    assert found == ATTENTIONS[name] and len(graphs) == 1
