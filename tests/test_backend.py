"""The entry point: options checked, nothing fails because of the compiler, strict says so, Dynamo's own signals pass."""

from __future__ import annotations

import functools
import importlib.metadata
import re
import weakref
from pathlib import Path

import pytest
import torch
from torch import nn
from torch._dynamo.exc import BackendCompilerFailed, SkipFrame, TensorifyScalarRestartAnalysis

import fxopt
from fxopt import backend
from fxopt.capture.aot import as_it_is
from fxopt.errors import UnsupportedError
from fxopt.journal import RECENT
from fxopt.options import Options


def compile_with(compile_graph, fn, strict=False, **kwargs):
    torch._dynamo.reset()
    RECENT.clear()
    options = Options.parse(None, {"strict": strict})

    def call(gm, inputs):
        return backend.compile_dynamo_graph(gm, inputs, options, compile_graph)

    return torch.compile(fn, backend=call, **kwargs)


def interpreting(graph, *_):
    """A compile_graph whose function keeps no state between calls (an Interpreter does)."""
    return lambda args: torch.fx.Interpreter(graph.gm).boxed_run(args)


def failing(error, *_):
    raise error


@pytest.mark.parametrize("error", [UnsupportedError("not today"), ValueError("a bug\nwith details"), KeyError("x")])
def test_a_graph_that_cannot_be_compiled_runs_as_it_was(error):
    model, x = nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4)), torch.randn(3, 4, requires_grad=True)
    compiled = compile_with(functools.partial(failing, error), model)
    out = compiled(x)
    out.sum().backward()
    assert x.grad is not None
    with torch.no_grad():
        torch.testing.assert_close(compile_with(functools.partial(failing, error), model.eval())(x), model(x))
    retreats = [r for journal in RECENT for r in journal.retreats]
    assert retreats and all(what == "the whole graph" for what, _ in retreats)
    assert "\n" not in retreats[0][1]


def test_strict_turns_a_retreat_into_an_error():
    compiled = compile_with(functools.partial(failing, UnsupportedError("not today")), lambda x: x + 1, strict=True)
    with pytest.raises(BackendCompilerFailed, match="not today"):
        compiled(torch.ones(2))


@pytest.mark.parametrize("signal", [SkipFrame, TensorifyScalarRestartAnalysis])
def test_dynamos_signals_pass_through(signal):
    calls = []

    def compile_graph(graph, *_):
        calls.append(graph)
        if len(calls) == 1:
            raise signal()
        return interpreting(graph)

    compiled = compile_with(compile_graph, lambda x: x + 1, strict=True)
    assert torch.equal(compiled(torch.ones(2)), torch.full((2,), 2.0))
    assert not [r for journal in RECENT for r in journal.retreats]


def test_capture_that_fails_runs_dynamos_graph(monkeypatch):
    monkeypatch.setattr(backend, "compile_with_autograd", functools.partial(failing_capture))
    compiled = compile_with(None, lambda x: x.sin() + 1)
    x = torch.randn(4, requires_grad=True)
    compiled(x).sum().backward()
    torch.testing.assert_close(x.grad, x.detach().cos())
    assert [r for journal in RECENT for r in journal.retreats] == [("the whole Dynamo graph", "RuntimeError: capture broke")]


def failing_capture(*_, **__):
    raise RuntimeError("capture broke")


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [({"mode": "fastest"}, "unknown mode 'fastest'"), ({"options": {"frozen": True}}, "unknown option 'frozen'")],
)
def test_bad_options_are_named(kwargs, message):
    torch._dynamo.reset()
    with pytest.raises(BackendCompilerFailed, match=message):
        torch.compile(lambda x: x + 1, backend=backend.fxopt, **kwargs)(torch.ones(2))


def test_the_entry_point_is_declared():
    try:
        points = importlib.metadata.entry_points(group="torch_dynamo_backends")
    except importlib.metadata.PackageNotFoundError:
        pytest.skip("not installed")
    found = [p for p in points if p.name == "fxopt"]
    if not found:
        pytest.skip("fxopt runs from its source tree, not installed")
    assert found[0].value == "fxopt.backend:fxopt"


def test_the_compiler_works_outside_tracing_modes():
    seen = []

    def compile_graph(graph, example_inputs, options, journal):
        seen.append((type(torch.ones(2) + 1), torch.is_autocast_enabled("cpu"), torch.is_grad_enabled()))
        return interpreting(graph)

    def fn(x):
        return x @ x

    with torch.autocast("cpu", dtype=torch.bfloat16):
        compile_with(compile_graph, fn)(torch.ones(2, 2, requires_grad=True)).sum().backward()
    assert len(seen) == 2 and set(seen) == {(torch.Tensor, False, False)}


def test_a_graph_that_runs_as_it_was_frees_its_inputs():
    x = torch.randn(8)
    alive = weakref.ref(x)
    graph = torch.fx.Graph()
    y = graph.call_function(torch.sin, (graph.placeholder("x"),))
    still_alive = graph.call_function(lambda _: alive() is not None, (y,))
    graph.output((y, still_alive))
    args = [x]
    del x
    run = as_it_is(torch.fx.GraphModule(torch.nn.Module(), graph))
    assert run(args)[1] is False
    assert args == []


def test_several_threads_may_compile():
    import concurrent.futures

    def work(i):
        x = torch.randn(5, requires_grad=True)
        y = torch.compile(lambda x: (x * i).sin(), backend=call)(x)
        y.sum().backward()
        torch.testing.assert_close(x.grad, i * (x.detach() * i).cos())

    options = Options.parse()

    def call(gm, inputs):
        return backend.compile_dynamo_graph(gm, inputs, options, interpreting)

    torch._dynamo.reset()
    with concurrent.futures.ThreadPoolExecutor(2) as pool:
        list(pool.map(work, range(1, 5)))


def test_a_pass_that_does_not_exist_cannot_be_disabled(monkeypatch):
    compiled = torch.compile(lambda x: x + 1, backend="fxopt", options={"disable": ["cze"]})
    with pytest.raises(BackendCompilerFailed, match="no pass is called 'cze'; did you mean 'cse'"):
        compiled(torch.ones(2))
    monkeypatch.setenv("FXOPT_DISABLE", "wievs")
    torch._dynamo.reset()
    with pytest.warns(UserWarning, match="FXOPT_DISABLE: no pass is called 'wievs'; did you mean 'views'"):
        assert torch.compile(lambda x: x + 2, backend="fxopt")(torch.ones(2))[0] == 3


@pytest.mark.parametrize("name", ["batching", "contractions", "merged_products"])
def test_steps_after_the_passes_can_be_disabled_too(name):
    compiled = torch.compile(lambda x: x + 3, backend="fxopt", options={"disable": [name]})
    assert compiled(torch.ones(2))[0] == 4


def _switches() -> list[str]:
    """What switches off parts of lowering and running: NAME in their modules."""
    folders = (Path(fxopt.__file__).parent / part for part in ("lower", "runtime"))
    texts = (path.read_text() for folder in folders for path in sorted(folder.rglob("*.py")))
    return [name for text in texts for name in re.findall(r'^NAME = "(.+)"$', text, re.MULTILINE)]


def test_every_name_that_is_obeyed_is_known():
    assert "attention_kernels" in _switches() and "cuda-graphs" in _switches()
    given = {"disable": _switches()}
    backend._check_disabled(Options.parse(None, given), given)
