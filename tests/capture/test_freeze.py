"""Frozen weights: constants in the graph, changes noticed, and the way back when weights keep changing."""

from __future__ import annotations

import gc
import threading
import warnings
import weakref

import numpy as np
import pytest
import torch
from torch import nn

from fxopt import journal
from fxopt.capture.freeze import MAX_REFREEZES, refreeze
from fxopt.errors import RetreatError
from fxopt.ir.graph import Phase, Role
from fxopt.journal import RECENT
from tests.capture.recording import Recorder


@pytest.fixture(autouse=True)
def fresh_warnings(monkeypatch):
    monkeypatch.setattr(journal, "_told", set())


def roles(graph):
    return [i.role for i in graph.inputs]


def frozen_notes():
    return [text for journal in RECENT for topic, text in journal.notes if topic == "freeze"]


class Folding(Recorder):
    """Copies constants, as folding and packing do: what runs has no memory in common with the weights."""

    def compile_graph(self, graph, example_inputs, options, journal):
        for given in graph.inputs:
            given.value = None if given.value is None else given.value.clone()
        return super().compile_graph(graph, example_inputs, options, journal)


def frozen_linear(recorder=None):
    recorder, model = recorder or Recorder(freeze=True), nn.Linear(4, 3)
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


def test_training_graphs_are_not_frozen_and_say_so_once():
    recorder = Recorder(freeze=True)
    RECENT.clear()
    with pytest.warns(UserWarning, match=r"torch\.no_grad\(\) or torch\.inference_mode\(\)"):
        recorder.compile(nn.Linear(4, 3))(torch.randn(2, 4)).sum().backward()
    assert all(Role.CONSTANT not in roles(g) for g in recorder.graphs)
    assert len(frozen_notes()) == 1 and "no_grad" in frozen_notes()[0]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        recorder.compile(nn.Linear(4, 3))(torch.randn(2, 4)).sum().backward()
    assert len(frozen_notes()) == 2


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


def buffer_parameter(buffer):
    return nn.Parameter(torch.from_numpy(buffer), requires_grad=False)


def test_a_replaced_parameter_at_the_same_address_is_noticed():
    buffer = np.ones((3, 4), dtype=np.float32)
    _, model, check = frozen_linear(Folding(freeze=True))
    model.weight = buffer_parameter(buffer)
    check()
    was = model.weight.data_ptr(), model.weight._version
    del model.weight
    buffer[:] = 2
    model.weight = buffer_parameter(buffer)
    assert was == (model.weight.data_ptr(), model.weight._version)
    check()


def test_data_replaced_twice_that_ends_at_the_same_address_is_noticed():
    buffer = np.ones((3, 4), dtype=np.float32)
    _, model, check = frozen_linear(Folding(freeze=True))
    model.weight.data = torch.from_numpy(buffer)
    check()
    was = model.weight.data_ptr(), model.weight._version
    model.weight.data = torch.zeros(3, 4)
    buffer[:] = 2
    model.weight.data = torch.from_numpy(buffer)
    assert was == (model.weight.data_ptr(), model.weight._version)
    check()


def test_a_version_counts_for_one_tensor_only():
    """Another parameter over the same memory has a counter of its own, which may stand where the first one's stood."""
    _, model, check = frozen_linear(Folding(freeze=True))
    with torch.no_grad():
        other = nn.Parameter(model.weight.data)
        while other._version < model.weight._version:
            other.add_(1)
        model.weight = other
    check()


def test_what_replaced_weights_were_is_not_kept():
    recorder, model, _ = frozen_linear(Folding(freeze=True))
    recorder.graphs.clear()
    weight, storage = weakref.ref(model.weight), weakref.ref(model.weight.untyped_storage())
    model.weight = nn.Parameter(torch.randn(3, 4))
    gc.collect()
    assert weight() is None and storage() is None


def test_an_unchanged_model_is_compiled_once_whatever_the_mode():
    recorder, model, _ = frozen_linear()
    model.requires_grad_(False)
    compiled, x = recorder.compile(model), torch.randn(2, 4)
    recorder.graphs.clear()
    for grad in (torch.enable_grad, torch.no_grad, torch.inference_mode):
        with grad():
            for _ in range(3):
                torch.testing.assert_close(compiled(x), model(x))
        gc.collect()
    assert len(recorder.graphs) == 3 and all(roles(g).count(Role.CONSTANT) == 2 for g in recorder.graphs)


@pytest.mark.parametrize("error", [KeyboardInterrupt, RetreatError])
def test_an_interrupted_refreeze_is_taken_up_again(error):
    class Interrupted(Folding):
        builds = 0

        def compile_graph(self, *args):
            self.builds += 1
            if self.builds == 2:
                raise error
            return super().compile_graph(*args)

    recorder, model, check = frozen_linear(Interrupted(freeze=True))
    with torch.no_grad():
        model.weight.mul_(2)
    with pytest.raises(error):
        check()
    check()
    assert recorder.builds == 3


def test_a_call_during_a_refreeze_gets_the_new_weights():
    building, finish, results = threading.Event(), threading.Event(), []

    class Slow(Folding):
        def compile_graph(self, *args):
            if self.graphs:
                building.set()
                assert finish.wait(30)
            return super().compile_graph(*args)

    recorder, model, check = frozen_linear(Slow(freeze=True))
    with torch.no_grad():
        model.weight.mul_(3)

    def call():
        try:
            check()
            results.append("right")
        except AssertionError:
            results.append("wrong")

    threads = [threading.Thread(target=call) for _ in range(2)]
    threads[0].start()
    assert building.wait(30)
    threads[1].start()
    threads[1].join(0.5)
    finish.set()
    for thread in threads:
        thread.join(30)
    assert results == ["right", "right"]
    assert len(recorder.graphs) == 2


def test_a_write_during_a_refreeze_is_noticed_at_the_next_call():
    class Writing(Folding):
        def compile_graph(self, *args):
            run = super().compile_graph(*args)
            if len(self.graphs) == 2:
                with torch.no_grad():
                    model.bias.add_(1)
            return run

    recorder, model, check = frozen_linear(Writing(freeze=True))
    with torch.no_grad():
        model.weight.mul_(3)
    with pytest.raises(AssertionError):
        check()
    check()
    assert len(recorder.graphs) == 3


def test_weights_that_keep_changing_are_thawed():
    recorder, model, check = frozen_linear()
    RECENT.clear()

    def change():
        with torch.no_grad():
            model.weight.add_(1)
        check()

    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for _ in range(MAX_REFREEZES):
            change()
    with pytest.warns(UserWarning, match=r"no longer frozen.*fxopt\.refreeze"):
        change()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        change()
    assert len(recorder.graphs) == 1 + MAX_REFREEZES + 1
    assert Role.CONSTANT not in roles(recorder.graphs[-1])
    assert len(frozen_notes()) == 1 and "refreeze" in frozen_notes()[0]


@pytest.mark.filterwarnings("ignore:.*no longer frozen")
def test_refreeze_finds_weights_that_were_replaced_when_thawed():
    recorder, model, check = frozen_linear()
    for _ in range(MAX_REFREEZES + 1):
        model.weight, model.bias = nn.Parameter(torch.randn(3, 4)), nn.Parameter(torch.randn(3))
        check()
    assert Role.CONSTANT not in roles(recorder.graphs[-1])
    assert refreeze(model) == 1
    check()
    assert Role.CONSTANT in roles(recorder.graphs[-1])


def test_refreeze_after_writes_that_torch_does_not_count():
    recorder, model, check = frozen_linear()
    model.weight.data.mul_(3)
    assert refreeze(nn.Linear(2, 2)) == 0
    assert refreeze(model) == 1
    check()
    assert len(recorder.graphs) == 2


@pytest.mark.filterwarnings("ignore:.*no longer frozen")
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


def test_inference_tensors_stay_inputs():
    """Torch counts no version for them, so that a change in place would go unseen."""
    with torch.inference_mode():
        model = nn.Linear(3, 3)
    model.bias = nn.Parameter(torch.randn(3))
    recorder, x = Recorder(freeze=True), torch.randn(2, 3)
    RECENT.clear()
    compiled = recorder.compile(model)
    with torch.inference_mode():
        torch.testing.assert_close(compiled(x), model(x))
        model.weight.mul_(3)
        torch.testing.assert_close(compiled(x), model(x))
    assert sorted(r.value for r in roles(recorder.graphs[0])) == ["constant", "parameter", "user"]
    assert [note for note in frozen_notes() if "inference tensor" in note and note.startswith("1 weight")]


def test_weights_replaced_by_inference_tensors_become_inputs():
    recorder, model, check = frozen_linear()
    with torch.inference_mode():
        replacement = nn.Parameter(torch.randn(3, 4), requires_grad=False)
    model.weight = replacement
    check()
    with torch.inference_mode():
        model.weight.mul_(3)
    check()
    assert roles(recorder.graphs[-1]).count(Role.CONSTANT) == 1


def test_sparse_buffers_stay_inputs():
    model = nn.Module()
    model.register_buffer("adjacency", torch.eye(3).to_sparse())
    model.register_buffer("scale", torch.randn(3))
    model.forward = lambda x: torch.sparse.mm(model.adjacency, x) * model.scale
    x = torch.randn(3, 3)
    with torch.no_grad():
        torch.testing.assert_close(Recorder(freeze=True, strict=False).compile(model)(x), model.forward(x))


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


def test_refreezing_takes_a_module() -> None:
    with pytest.raises(TypeError, match="takes the module whose weights changed, not 'int'"):
        refreeze(3)  # type: ignore[arg-type]
