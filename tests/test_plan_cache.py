"""Plans on disk: loaded where nothing that compilation looks at has changed, and only there."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from fxopt import compiler
from fxopt.errors import RetreatError
from fxopt.journal import RECENT, Journal
from tests.no_compiler import no_compiler
from tests.numerics import assert_closer, to_float64

pytestmark = pytest.mark.usefixtures("fresh_cache")
X = torch.randn(5, 8)


@pytest.fixture
def lowerings(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Names of the graphs that were lowered, that is, not loaded."""
    real, seen = compiler.lower_graph, []

    def lower(graph: Any, *rest: Any) -> Any:
        seen.append(graph.name)
        return real(graph, *rest)

    monkeypatch.setattr(compiler, "lower_graph", lower)
    return seen


def run(fn: Callable[..., Any], *args: Any, dynamic: bool | None = None, **options: Any) -> Any:
    """`fn` compiled as a new process would, apart from what is on disk."""
    torch.compiler.reset()
    RECENT.clear()
    return torch.compile(fn, backend="fxopt", dynamic=dynamic, options=options or None)(*args)


def journal() -> Journal:
    return next(j for j in RECENT if j.graph.startswith("graph "))


def told(record: Journal) -> tuple[Any, ...]:
    notes = [n for n in record.notes if n[0] != "plan"]
    return record.kernels, record.library, record.retreats, notes, [p[:2] for p in record.passes]


def network(x: torch.Tensor, w: torch.Tensor) -> torch.Tensor:
    return torch.softmax(torch.tanh(x) @ w + torch.arange(4), -1)


W = torch.randn(8, 4)


def test_a_graph_compiled_before_is_loaded(lowerings: list[str]) -> None:
    first, before = run(network, X, W), journal()
    second, after = run(network, X, W), journal()
    assert len(lowerings) == 1
    assert torch.equal(first, second)
    assert told(before) == told(after)
    assert any(topic == "plan" for topic, _ in after.notes)
    assert before.graph != after.graph


def test_forward_and_backward(lowerings: list[str]) -> None:
    model = nn.Sequential(nn.Linear(8, 8), nn.LayerNorm(8), nn.Dropout(0.5), nn.GELU())

    def step() -> list[torch.Tensor]:
        torch.manual_seed(0)
        model.zero_grad()
        run(model, X).square().sum().backward()
        return [p.grad.clone() for p in model.parameters()]  # type: ignore[union-attr]

    first, second = step(), step()
    assert len(lowerings) == 2
    torch.testing.assert_close(first, second, rtol=0, atol=0)


def test_other_sizes_of_a_loaded_plan(lowerings: list[str]) -> None:
    run(network, X, W, dynamic=True)
    for rows in (5, 3, 117):
        x = torch.randn(rows, 8)
        got = run(network, x, W, dynamic=True)
        assert_closer(got, network(x, W), network(*to_float64((x, W))))
    assert len(lowerings) == 1


CHANGES: dict[str, tuple[Callable[..., Any], tuple[Any, ...]]] = {
    "a literal": (lambda x, w: torch.softmax(torch.tanh(x) @ w + torch.arange(1, 5), -1), (X, W)),
    "a tensor literal": (lambda x, w: torch.tanh(x) @ w + torch.tensor([1.0, 2.0, 3.0, 4.0]), (X, W)),
    "another tensor literal": (lambda x, w: torch.tanh(x) @ w + torch.tensor([1.0, 2.0, 3.0, 5.0]), (X, W)),
    "an op": (lambda x, w: torch.softmax(torch.sinh(x) @ w + torch.arange(4), -1), (X, W)),
    "a dtype": (network, (X.double(), W.double())),
    "a size": (network, (torch.randn(6, 8), W)),
    "strides": (network, (torch.randn(8, 5).t(), W)),
    "strides of another input": (network, (X, torch.randn(4, 8).t())),
    "a mutation": (lambda x, w: network(x.mul_(2), w), (X.clone(), W)),
}


def test_anything_that_changes_is_another_plan(lowerings: list[str]) -> None:
    run(network, X, W)
    for count, (what, (fn, args)) in enumerate(CHANGES.items(), 2):
        want = fn(*(a.clone(memory_format=torch.preserve_format) for a in args))
        got = run(fn, *(a.clone(memory_format=torch.preserve_format) for a in args))
        torch.testing.assert_close(got, want, msg=what)
        assert len(lowerings) == count, what


@pytest.fixture
def flags() -> Iterator[None]:
    threads, dtype = torch.get_num_threads(), torch.get_default_dtype()
    yield
    torch.set_num_threads(threads)
    torch.set_default_dtype(dtype)
    torch.use_deterministic_algorithms(False)


@pytest.mark.usefixtures("flags")
def test_options_and_flags_are_part_of_the_key(lowerings: list[str]) -> None:
    def fn(x: torch.Tensor) -> torch.Tensor:
        return x.exp() + 1

    run(fn, X)
    changes = (
        lambda: run(fn, X, disable=["cse"]),
        lambda: run(fn, X, fuel=0),
        lambda: (torch.use_deterministic_algorithms(True), run(fn, X)),
        lambda: (torch.set_num_threads(torch.get_num_threads() + 1), run(fn, X)),
        lambda: (torch.set_default_dtype(torch.float64), run(fn, X)),
    )
    for count, change in enumerate(changes, 2):
        change()
        assert len(lowerings) == count


def test_dumps_show_every_pass_again(lowerings: list[str], tmp_path: Path) -> None:
    for _ in range(2):
        run(network, X, W, dump=str(tmp_path))
    assert len(lowerings) == 2


def test_strict_compiles_what_would_retreat(lowerings: list[str]) -> None:
    def fn(x: torch.Tensor) -> torch.Tensor:
        return torch.linalg.svdvals(x) + 1

    run(fn, X)
    run(fn, X)
    assert len(lowerings) == 1
    with pytest.raises(Exception, match="svd") as caught:
        run(fn, X, strict=True)
    assert isinstance(caught.value.__cause__ or caught.value, RetreatError) or "RetreatError" in str(caught.value)


def test_frozen_weights_are_never_taken_from_a_plan(lowerings: list[str]) -> None:
    """A document that held them would be as large as the model, and stale as soon as they change."""
    x = torch.randn(3, 600)
    with torch.no_grad():
        for _ in range(2):
            model = nn.Linear(600, 600)
            torch.testing.assert_close(run(model, x, freeze=True), model(x))
    assert len(lowerings) == 2


def test_a_frozen_weight_whose_last_stride_is_not_one(lowerings: list[str]) -> None:
    """A 1x1 convolution's in channels-last: contiguous by torch's rule, with strides of its own where the size is 1."""
    model = nn.Conv2d(8, 4, 1).to(memory_format=torch.channels_last)
    assert model.weight.is_contiguous() and model.weight.stride(-1) == 8
    x = torch.randn(2, 8, 3, 3).contiguous(memory_format=torch.channels_last)
    with torch.no_grad():
        torch.testing.assert_close(run(model, x, freeze=True, strict=True), model(x))
        torch.testing.assert_close(run(model, x, freeze=True, strict=True), model(x))
    assert len(lowerings) == 1


def test_subgraphs_have_no_key(lowerings: list[str]) -> None:
    def fn(x: torch.Tensor) -> torch.Tensor:
        return torch.cond(x.sum() > 0, lambda x: x.sin(), lambda x: x.cos(), (x,))

    for _ in range(2):
        torch.testing.assert_close(run(fn, X), fn(X))
    assert len(lowerings) != 1


def documents(cache: Path) -> list[Path]:
    return sorted((cache / "plans").glob("*.json"))


DAMAGES: dict[str, Callable[[Path], object]] = {
    "cut short": lambda p: p.write_text(p.read_text()[: p.stat().st_size // 2]),
    "another checksum": lambda p: p.write_text(p.read_text().replace('"format"', '"formal"')),
    "empty": lambda p: p.write_text(""),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_plan_is_made_again(damage: str, fresh_cache: Path, lowerings: list[str]) -> None:
    want = run(network, X, W)
    (document,) = documents(fresh_cache)
    DAMAGES[damage](document)
    with pytest.warns(UserWarning, match="damaged file"):
        assert torch.equal(run(network, X, W), want)
    assert torch.equal(run(network, X, W), want)
    assert len(lowerings) == 2
    assert documents(fresh_cache) == [document]


def test_a_sound_document_that_is_no_plan(fresh_cache: Path, lowerings: list[str]) -> None:
    from fxopt.runtime.artifacts import default_store

    want = run(network, X, W)
    (document,) = documents(fresh_cache)
    body = json.loads(document.read_text())["body"]
    body["plan"]["steps"][0] = {"kind": "nonsense"}
    default_store().cache.put_document("plans", document.stem, body)
    with pytest.warns(UserWarning, match="not a plan"):
        assert torch.equal(run(network, X, W), want)
    assert len(lowerings) == 2


def test_kernels_that_are_gone_are_built_again(fresh_cache: Path, lowerings: list[str]) -> None:
    want = run(network, X, W)
    for entry in (fresh_cache / "entries").glob("*.json"):
        entry.unlink()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert torch.equal(run(network, X, W), want)
    assert len(lowerings) == 2
    run(network, X, W)
    assert len(lowerings) == 2


def test_what_was_compiled_without_a_compiler_is_not_remembered(fresh_cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with no_compiler(monkeypatch):
        run(network, X, W)
        assert journal().retreats
    assert documents(fresh_cache) == []
    run(network, X, W)
    assert not journal().retreats
    assert len(documents(fresh_cache)) == 1


PROGRAM = """
import sys, torch
import fxopt.lower.lowering
if sys.argv[1] == "second":
    def refuse(*_):
        raise AssertionError("lowered again")
    fxopt.lower.lowering.Lowering.run = refuse
torch.manual_seed(0)
x, w = torch.randn(5, 8), torch.randn(8, 4)
f = torch.compile(lambda x, w: torch.softmax(torch.tanh(x) @ w, -1), backend="fxopt", options={"strict": True})
print(f(x, w).double().sum(0).tolist())
"""


def test_another_process_lowers_nothing(fresh_cache: Path) -> None:
    environment = {**os.environ, "FXOPT_CACHE_DIR": str(fresh_cache)}
    results = [
        subprocess.run(
            [sys.executable, "-c", PROGRAM, which], capture_output=True, text=True, check=True, env=environment
        ).stdout
        for which in ("first", "second")
    ]
    assert results[0] == results[1] != ""
