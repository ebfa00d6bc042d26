"""Frozen weights: constants in the graph, changes noticed, and the way back when weights keep changing."""

from __future__ import annotations

import torch
from torch import nn

from fxopt.capture.freeze import MAX_REFREEZES, refreeze
from fxopt.ir.graph import Phase, Role
from tests.capture.recording import Recorder


def roles(graph):
    return [i.role for i in graph.inputs]


def frozen_linear():
    recorder, model = Recorder(freeze=True), nn.Linear(4, 3)
    compiled = recorder.compile(model)
    x = torch.randn(2, 4)

    def check():
        with torch.no_grad():
            torch.testing.assert_close(compiled(x), model(x))

    check()
    return recorder, model, check


def test_weights_become_constants():
    recorder, _, check = frozen_linear()
    check()
    (graph,) = recorder.graphs
    assert sorted(r.value for r in roles(graph)) == ["constant", "constant", "user"]
    values = {tuple(i.value.shape) for i in graph.inputs if i.role is Role.CONSTANT}
    assert values == {(3, 4), (3,)}
    assert not any(i.value.requires_grad for i in graph.inputs if i.value is not None)


def test_without_the_option_nothing_is_frozen():
    recorder = Recorder()
    with torch.no_grad():
        recorder.compile(nn.Linear(4, 3))(torch.randn(2, 4))
    assert Role.CONSTANT not in roles(recorder.graphs[0])


def test_training_graphs_are_not_frozen():
    recorder = Recorder(freeze=True)
    recorder.compile(nn.Linear(4, 3))(torch.randn(2, 4)).sum().backward()
    assert all(Role.CONSTANT not in roles(g) for g in recorder.graphs)


def test_mutated_buffers_stay_state():
    class Counting(nn.Module):
        def __init__(self):
            super().__init__()
            self.register_buffer("count", torch.zeros(3))
            self.register_buffer("head", self.count[:2])  # shares its storage with what is written
            self.weight = nn.Parameter(torch.ones(3))

        def forward(self, x):
            self.count.add_(1)
            return x * self.weight + self.count

    recorder, model = Recorder(freeze=True), Counting()
    compiled = recorder.compile(model)
    with torch.no_grad():
        compiled(torch.ones(3))
        assert torch.equal(compiled(torch.ones(3)), torch.full((3,), 3.0))
    by_role = {role: sum(r is role for r in roles(recorder.graphs[0])) for role in Role}
    assert by_role[Role.CONSTANT] == 1 and by_role[Role.STATE] == 1


def test_in_place_changes_and_replaced_data_are_noticed():
    recorder, model, check = frozen_linear()
    with torch.no_grad():
        model.weight.mul_(2)
    check()
    assert len(recorder.graphs) == 2
    model.bias.data = torch.randn(3)
    check()
    assert len(recorder.graphs) == 3
    check()
    assert len(recorder.graphs) == 3


def test_weights_that_keep_changing_are_thawed():
    recorder, model, check = frozen_linear()
    for _ in range(MAX_REFREEZES + 3):
        with torch.no_grad():
            model.weight.add_(1)
        check()
    assert len(recorder.graphs) == 1 + MAX_REFREEZES + 1
    assert Role.CONSTANT not in roles(recorder.graphs[-1])


def test_refreeze_after_writes_that_torch_does_not_count():
    recorder, model, check = frozen_linear()
    model.weight.data.mul_(3)
    assert refreeze(nn.Linear(2, 2)) == 0
    assert refreeze(model) == 1
    check()
    assert len(recorder.graphs) == 2


def test_refreeze_after_thawing():
    recorder, model, check = frozen_linear()
    for _ in range(MAX_REFREEZES + 1):
        with torch.no_grad():
            model.weight.add_(1)
        check()
    refreeze(model)
    check()
    assert Role.CONSTANT in roles(recorder.graphs[-1])


def test_shared_between_calls_with_symbolic_sizes():
    recorder, model = Recorder(freeze=True), nn.Linear(4, 3)
    compiled = recorder.compile(model, dynamic=True)
    with torch.no_grad():
        for batch in (2, 5):
            x = torch.randn(batch, 4)
            torch.testing.assert_close(compiled(x), model(x))
        model.weight.mul_(2)
        torch.testing.assert_close(compiled(x), model(x))
    assert [g.phase for g in recorder.graphs] == [Phase.INFERENCE] * 2


def test_inference_tensors_can_be_frozen():
    with torch.inference_mode():
        weight = torch.randn(3, 3)
    model = nn.Module()
    model.register_buffer("weight", weight)
    model.forward = lambda x: x @ model.weight
    recorder = Recorder(freeze=True)
    x = torch.randn(2, 3)
    with torch.inference_mode():
        torch.testing.assert_close(recorder.compile(model)(x), x @ weight)


def test_a_failing_compiler_keeps_the_weights_as_inputs():
    recorder = Recorder(freeze=True, strict=False)

    def broken(*_):
        raise RuntimeError("no")

    recorder.compile_graph = broken
    model, x = nn.Linear(4, 3), torch.randn(2, 4)
    compiled = recorder.compile(model)
    with torch.no_grad():
        torch.testing.assert_close(compiled(x), model(x))
        model.weight.add_(1)
        torch.testing.assert_close(compiled(x), model(x))
