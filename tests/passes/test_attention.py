"""The early attention pass: which calls it takes, which it leaves, and that values stay eager's."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from fxopt.backend import compile_dynamo_graph
from fxopt.capture.aot import as_it_is
from fxopt.ir.attention_op import attention as attention_op
from fxopt.ir.attention_op import attention_forward
from fxopt.ir.graph import Graph
from fxopt.journal import RECENT, Journal
from fxopt.options import Options
from fxopt.passes import attention as attention_pass
from fxopt.passes.context import DefaultOptions
from fxopt.passes.pipeline import run_early
from tests.numerics import check_compiled

QKV = tuple(torch.randn(2, 3, 7, 8) for _ in range(3))


@pytest.fixture(autouse=True)
def _on_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(attention_pass, "chooses_late", lambda device: True)


def rewritten(fn: Callable[..., Any], *args: Any, target: Any = attention_op) -> tuple[int, Journal]:
    """How many calls of `target` the early passes made of `fn`, and their journal. Runs `fn`."""
    made, journal = [], Journal("test")

    def backend(gm: torch.fx.GraphModule, inputs: Any) -> Any:
        run_early(gm, DefaultOptions(), journal)
        gm.recompile()
        made.extend(gm.graph.find_nodes(op="call_function", target=target))
        return gm.forward

    torch.compiler.reset()
    torch.testing.assert_close(torch.compile(fn, backend=backend)(*args), fn(*args))
    return len(made), journal


def sdpa(*args: Any, **kwargs: Any) -> torch.Tensor:
    return F.scaled_dot_product_attention(*args, **kwargs)


MASK = torch.ones(7, 7).tril().bool()
SPELLINGS: dict[str, Callable[..., Any]] = {
    "positional": lambda q, k, v: sdpa(q, k, v, MASK, 0.0, False),
    "keywords": lambda q, k, v: sdpa(query=q, key=k, value=v, attn_mask=None, dropout_p=0.0, is_causal=True, scale=0.2),
    "aten packet": torch.ops.aten.scaled_dot_product_attention,
    "aten overload": torch.ops.aten.scaled_dot_product_attention.default,
    "private module": torch._C._nn.scaled_dot_product_attention,
    "grouped": lambda q, k, v: sdpa(q, k[:, :1], v[:, :1], enable_gqa=True),
}


@pytest.mark.parametrize("name", SPELLINGS)
def test_every_spelling_is_taken(name: str) -> None:
    assert rewritten(lambda q, k, v: SPELLINGS[name](q, k, v), *QKV)[0] == 1


@pytest.mark.parametrize("wants_weights", [False, True])
def test_inside_multi_head_attention(wants_weights: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.backends.mha, "_is_fastpath_enabled", False)
    layer = nn.MultiheadAttention(8, 2, batch_first=True).eval().requires_grad_(False)
    padding, x = torch.tensor([[False, False, True], [False, False, False]]), torch.randn(2, 3, 8)

    def call(x: torch.Tensor) -> Any:
        return layer(x, x + 1, x - 1, key_padding_mask=padding, need_weights=wants_weights)

    seen: list[Any] = []

    def compile_graph(graph: Graph, inputs: Any, options: Options, journal: Journal) -> Any:
        seen.extend(n.target for n in graph.gm.graph.nodes)
        return as_it_is(graph.gm)

    backend = functools.partial(compile_dynamo_graph, options=Options(strict=True), compile_graph=compile_graph)
    torch.compiler.reset()
    torch.testing.assert_close(torch.compile(call, backend=backend)(x), call(x))
    assert (attention_op in seen) is not wants_weights


@pytest.mark.parametrize(("dropout", "learns_mask", "taken"), [(0.0, False, True), (0.5, False, False), (0.0, True, False)])
def test_inside_multi_head_attention_in_training(dropout: float, learns_mask: bool, taken: bool) -> None:
    """Strict: a fallback would raise. Dropout has its own random numbers, so that its values are not compared."""
    layer = nn.MultiheadAttention(8, 2, dropout=dropout, batch_first=True)
    x = torch.randn(2, 3, 8, requires_grad=True)
    mask = torch.randn(3, 3, requires_grad=learns_mask)

    def call(x: torch.Tensor) -> Any:
        return layer(x, x + 1, x - 1, attn_mask=mask, need_weights=False)[0]

    torch.compiler.reset()
    RECENT.clear()
    got, want = torch.compile(call, backend="fxopt", options={"strict": not dropout})(x), call(x)
    leaves = [x, *layer.parameters(), *([mask] if learns_mask else [])]
    own, eagers = (torch.autograd.grad(y.square().sum(), leaves) for y in (got, want))
    if not dropout:
        torch.testing.assert_close(got, want)
        torch.testing.assert_close(own, eagers)
    called = {op for journal in RECENT for op, _ in journal.library}
    ours = {"fxopt::attention_forward.default", "fxopt::attention_backward.default"}
    assert called & ours == (ours if taken else set())


def test_without_grad_mode_parameters_may_want_gradients() -> None:
    q, k, v = (nn.Parameter(x.clone()) for x in QKV)
    assert rewritten(sdpa, q, k, v)[0] == 0
    assert rewritten(sdpa, q, k, v, target=attention_forward)[0] == 1
    with torch.no_grad():
        assert rewritten(sdpa, q, k, v)[0] == 1


def test_grad_mode_inside_the_graph_counts() -> None:
    q = QKV[0].clone().requires_grad_()

    def mixed(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> tuple[torch.Tensor, ...]:
        with torch.no_grad():
            first = sdpa(q, k, v)
        with torch.enable_grad():
            return first, sdpa(q, k, v)

    for mode in (True, False):
        with torch.set_grad_enabled(mode):
            count, journal = rewritten(mixed, q, *QKV[1:])
        assert count == 1
        assert ("rewrite", "attention.with_gradient x1") in journal.notes


LEFT: dict[str, tuple[Callable[..., Any], tuple[torch.Tensor, ...], str]] = {
    "three dimensions": (sdpa, tuple(x[0] for x in QKV), "not four-dimensional"),
    "float64": (sdpa, tuple(x.double() for x in QKV), "an element type without a fused backend"),
    "broadcast heads": (sdpa, (QKV[0], QKV[1][:, :1], QKV[2][:, :1]), "batch or heads that broadcast"),
    "vmap": (torch.func.vmap(sdpa), tuple(x.expand(3, 2, 3, 7, 8) for x in QKV), "a tensor subclass, a transformed"),
}


def trained(*, mask: torch.Tensor | None = None, groups: int = 3) -> tuple[int, Journal]:
    q, k, v = (nn.Parameter(x.clone()) for x in (QKV[0], QKV[1][:, :groups], QKV[2][:, :groups]))
    return rewritten(lambda q, k, v, m: sdpa(q, k, v, m, enable_gqa=groups < 3), q, k, v, mask, target=attention_forward)


def test_what_is_left_alone_in_training() -> None:
    assert trained(mask=torch.randn(7, 7))[0] == 1
    count, journal = trained(mask=nn.Parameter(torch.randn(7, 7)))
    assert count == 0
    assert ("rejected", "attention: a mask that learns x1") in journal.notes
    count, journal = trained(groups=1)
    assert count == 0
    assert any("no fused backward" in text for _, text in journal.notes)


def test_deterministic_training_is_left_alone() -> None:
    torch.use_deterministic_algorithms(True)
    try:
        count, journal = trained()
    finally:
        torch.use_deterministic_algorithms(False)
    assert count == 0
    assert ("rejected", "attention: deterministic algorithms are asked for x1") in journal.notes


def test_backends_named_in_the_graph_hold() -> None:
    def fn(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        with torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH):
            return sdpa(q, k, v)

    count, journal = rewritten(fn, *QKV)
    assert count == 0
    assert ("rejected", "attention: the graph says which backends to use x1") in journal.notes


@pytest.mark.parametrize("dynamic", [False, True])
@pytest.mark.parametrize("masked", [False, True])
def test_compiled_training_has_eagers_gradients(masked: bool, dynamic: bool) -> None:
    """Strict: a fallback would raise."""

    def fn(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        mask = torch.ones(q.shape[2], k.shape[2], dtype=torch.bool).tril() if masked else None
        return sdpa(q * 2, k, v, mask).transpose(1, 2).flatten(2) + 1

    torch.compiler.reset()
    RECENT.clear()
    leaves = [x.clone().requires_grad_() for x in QKV]
    got, want = torch.compile(fn, backend="fxopt", dynamic=dynamic, options={"strict": True})(*leaves), fn(*leaves)
    torch.testing.assert_close(got, want)
    grad = torch.randn_like(want)
    own, eagers = (torch.autograd.grad(x, leaves, grad) for x in (got, want))
    torch.testing.assert_close(own, eagers)
    called = {op for journal in RECENT for op, _ in journal.library}
    assert {"fxopt::attention_forward.default", "fxopt::attention_backward.default"} <= called


@pytest.mark.filterwarnings("ignore:There is a performance drop")
@pytest.mark.parametrize("name", LEFT)
def test_what_is_left_alone(name: str) -> None:
    fn, args, reason = LEFT[name]
    count, journal = rewritten(lambda *given: fn(*given), *args)
    assert count == 0
    assert any(topic == "rejected" and reason in text for topic, text in journal.notes)


def test_dropout_stays() -> None:
    def backend(gm: torch.fx.GraphModule, inputs: Any) -> Any:
        run_early(gm, DefaultOptions(), journal)
        return gm.forward

    journal = Journal("test")
    torch.compiler.reset()
    torch.compile(lambda *a: sdpa(*a, dropout_p=0.1), backend=backend)(*QKV)
    assert ("rejected", "attention: dropout x1") in journal.notes


@pytest.mark.parametrize("dynamic", [False, True])
def test_compiled_it_is_a_planned_library_call(dynamic: bool) -> None:
    """Strict: a fallback would raise."""
    check_compiled(lambda q, k, v: sdpa(q * 2, k, v, is_causal=True).transpose(1, 2).flatten(2) + 1, *QKV, dynamic=dynamic)


@pytest.mark.parametrize("outside", [True, False])
def test_autocast_around_and_inside(outside: bool) -> None:
    def inside(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        with torch.autocast("cpu", torch.bfloat16, enabled=True):
            return sdpa(q, k, v)

    torch.compiler.reset()
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16, enabled=outside):
        got = torch.compile(sdpa if outside else inside, backend="fxopt", options={"strict": True})(*QKV)
    assert got.dtype == torch.bfloat16
    assert torch.equal(got, inside(*QKV))
