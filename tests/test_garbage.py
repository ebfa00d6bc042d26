"""Garbage collection is off while fxopt compiles, and afterwards as it was."""

from __future__ import annotations

import gc
from collections.abc import Iterator

import pytest
import torch

from fxopt.garbage import collection_paused


@pytest.fixture(autouse=True)
def _collector_stays_on() -> Iterator[None]:
    assert gc.isenabled()
    yield
    gc.enable()


def test_blocks_nest_and_the_last_one_restores() -> None:
    with collection_paused():
        assert not gc.isenabled()
        with collection_paused():
            pass
        assert not gc.isenabled()
    assert gc.isenabled()


def test_an_error_ends_the_pause() -> None:
    with pytest.raises(KeyError), collection_paused():
        raise KeyError
    assert gc.isenabled()


def test_a_collector_that_is_off_stays_off() -> None:
    gc.disable()
    with collection_paused():
        pass
    assert not gc.isenabled()


@pytest.mark.parametrize("backend", ["fxopt", "aot_eager"])
def test_dynamo_traces_for_fxopt_without_collections(backend: str) -> None:
    torch.compile(lambda x: x + 1, backend="fxopt")(torch.zeros(2))  # what `reset` has forgotten is registered anew
    seen: list[bool] = []
    note = torch._dynamo.callback.callback_handler.register_start_callback(lambda _: seen.append(gc.isenabled()))
    torch.compile(lambda x: x * 2 + 1, backend=backend)(torch.zeros(2))
    torch._dynamo.callback.callback_handler.remove_start_callback(note)
    assert seen == [backend != "fxopt"]
    assert gc.isenabled()


def test_a_trace_that_fails_ends_the_pause() -> None:
    def fails(x: torch.Tensor) -> torch.Tensor:
        raise ValueError("of the user's")

    with pytest.raises(ValueError, match="of the user's"):
        torch.compile(fails, backend="fxopt")(torch.zeros(2))
    assert gc.isenabled()


def test_forward_and_backward_are_compiled_without_collections() -> None:
    torch.compiler.reset()
    seen: list[bool] = []

    def compile_graph(graph: object, example_inputs: object, options: object, journal: object) -> object:
        seen.append(gc.isenabled())
        raise NotImplementedError  # the graph runs as it is

    from fxopt.backend import compile_dynamo_graph
    from fxopt.options import Options

    def backend(gm: torch.fx.GraphModule, inputs: object) -> object:
        return compile_dynamo_graph(gm, inputs, Options(), compile_graph)  # type: ignore[arg-type]

    x = torch.randn(3, requires_grad=True)
    torch.compile(lambda x: x.sin().sum(), backend=backend)(x).backward()
    assert seen == [False, False]
    assert gc.isenabled()
