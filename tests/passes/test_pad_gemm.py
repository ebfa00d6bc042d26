"""Padding of unaligned products, with CPUs counted among the devices that want alignment: when, how, and the same values."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

from fxopt.ir import ops
from fxopt.passes import pad_gemm as pass_module
from fxopt.passes.context import Context
from tests.numerics import assert_closer, check_compiled, to_float64
from tests.passes.graphs import aliasing, calls, capture, execute, optimize

HALF = torch.bfloat16


@pytest.fixture(autouse=True)
def _cpus_want_alignment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pass_module, "wants_alignment", lambda device: True)


@pytest.fixture
def always(monkeypatch: pytest.MonkeyPatch) -> None:
    """Small products pay, too."""
    monkeypatch.setattr(pass_module, "MARGIN", 1e9)


def half(*shape: int) -> torch.Tensor:
    return torch.randn(*shape).to(HALF)


def check(fn: Callable[..., Any], *args: torch.Tensor) -> list[str]:
    """Optimize, checked after every pass; values, strides and aliasing are eager's. Returns the ops called."""
    graph, context = optimize(fn, args)
    got, want = execute(graph, args), fn(*args)
    want = want if isinstance(want, tuple) else (want,)
    wide = fn(*to_float64(args))
    assert_closer(got, want, wide if isinstance(wide, tuple) else (wide,))
    assert [g.stride() for g in got] == [w.stride() for w in want]
    assert aliasing(args, got) == aliasing(args, want)
    assert any(r.rule == "pad_gemm.aligned" for r in context.log)
    return calls(graph)


def shapes(fn: Callable[..., Any], *args: torch.Tensor) -> list[tuple[tuple[int, ...], ...]]:
    """Shapes of the operands of every product that is left."""
    graph, _ = optimize(fn, args)
    products = [n for n in graph.gm.graph.nodes if n.op == "call_function" and ops.category(n.target) == "contraction"]
    return [tuple(tuple(a.meta["val"].shape) for a in n.all_input_nodes) for n in products]


CASES: dict[str, tuple[Callable[..., Any], tuple[torch.Tensor, ...], list[tuple[int, ...]]]] = {
    "the result": (torch.mm, (half(16, 24), half(24, 13)), [(16, 24), (24, 16)]),
    "a weight stored transposed": (lambda x, w: x @ w.t(), (half(16, 24), half(13, 24)), [(16, 24), (24, 16)]),
    "what is summed over": (torch.mm, (half(16, 13), half(13, 24)), [(16, 16), (16, 24)]),
    "rows of a transposed operand": (lambda a, b: a.t() @ b, (half(24, 13), half(24, 32)), [(16, 24), (24, 32)]),
    "a transposed operand, summed": (lambda a, b: a @ b.t(), (half(16, 13), half(24, 13)), [(16, 16), (16, 24)]),
    "every dimension": (torch.mm, (half(5, 7), half(7, 9)), [(5, 8), (8, 16)]),
    "a batch": (torch.bmm, (half(3, 16, 13), half(3, 13, 9)), [(3, 16, 16), (3, 16, 16)]),
    "a batch, transposed": (lambda a, b: a @ b.mT, (half(2, 16, 24), half(2, 13, 24)), [(2, 16, 24), (2, 24, 16)]),
    "a bias": (lambda b, x, w: torch.addmm(b, x, w), (half(13), half(16, 24), half(24, 13)), [(16,), (16, 24), (24, 16)]),
    "a residual": (
        lambda r, x, w: torch.addmm(r, x.t(), w, beta=0.5, alpha=2.0), (half(9, 13), half(24, 9), half(24, 13)),
        [(16, 16), (16, 24), (24, 16)],
    ),
    "a bias that broadcasts": (
        lambda b, x, w: torch.addmm(b, x, w), (half(1), half(16, 24), half(24, 13)), [(1,), (16, 24), (24, 16)]
    ),
}  # fmt: skip


@pytest.mark.usefixtures("always")
@pytest.mark.parametrize("name", CASES)
def test_padded_to_multiples_of_eight(name: str) -> None:
    fn, args, operands = CASES[name]
    check(fn, *args)
    assert shapes(fn, *args) == [tuple(operands)]


@pytest.mark.usefixtures("always")
def test_infinities_do_not_leak_out_of_the_padding() -> None:
    a, b = half(4, 7), half(7, 5)
    a[1, 2] = b[3, 1] = float("inf")
    graph, _ = optimize(torch.mm, (a, b))
    torch.testing.assert_close(execute(graph, (a, b))[0], a @ b, equal_nan=True)


@pytest.mark.usefixtures("always")
def test_products_of_one_tensor_share_its_padded_form() -> None:
    """The gradient of a vocabulary's logits: used against the weight and, transposed, against the activations."""

    def backward(dlogits: torch.Tensor, weight: torch.Tensor, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        return torch.mm(dlogits, weight), torch.mm(dlogits.t(), x)

    made = check(backward, half(16, 13), half(13, 24), half(16, 24))
    assert made.count("constant_pad_nd") == 2


@pytest.mark.usefixtures("always")
def test_views_and_consumers_of_the_result_keep_their_layout() -> None:
    check(lambda x, w: (x @ w).view(2, 8, 13).float().log_softmax(-1), half(16, 24), half(24, 13))
    check(lambda x, w: ((y := x @ w), y.view(-1), y.relu().sum(0)), half(16, 24), half(24, 13))


@pytest.mark.usefixtures("always")
@pytest.mark.parametrize(
    "args",
    [
        (half(16, 24), half(24, 32)),
        (half(5, 24), half(24, 32)),
        (torch.randn(16, 24), torch.randn(24, 13)),
        (half(16, 16)[:, :13], half(16, 24)[:13]),
        (half(0, 7), half(7, 9)),
    ],
    ids=["aligned", "an odd number of rows", "float32", "aligned rows with a gap", "nothing"],
)
def test_left_alone(args: tuple[torch.Tensor, ...]) -> None:
    assert "constant_pad_nd" not in calls(optimize(torch.mm, args)[0])


@pytest.mark.usefixtures("always")
def test_symbolic_sizes_are_left_alone() -> None:
    assert "constant_pad_nd" not in calls(optimize(torch.mm, (half(16, 13), half(13, 24)), dynamic=True)[0])


@pytest.mark.usefixtures("always")
def test_a_frozen_weight_is_padded_once() -> None:
    made = calls(optimize(lambda x, w: torch.mm(x, w.t()).relu(), (half(16, 24), half(13, 24)), frozen=(1,))[0])
    assert "constant_pad_nd" not in made
    assert "mm" in made


def test_the_vocabulary_pays_and_small_products_do_not() -> None:
    def rewrites(m: int, k: int, n: int) -> int:
        args = torch.empty(m, k, dtype=HALF), torch.empty(n, k, dtype=HALF)
        context = Context.without_options(capture(lambda a, w: (a @ w.t()).relu(), args))
        pass_module.pad_gemm(context)
        return len(context.log)

    assert rewrites(4096, 768, 50257) == 1
    assert rewrites(4096, 768, 50256) == 0
    assert rewrites(64, 768, 1001) == 0
    assert rewrites(8, 768, 50257) == 0


@pytest.mark.usefixtures("always")
def test_compiled_values() -> None:
    args = half(16, 24), half(24, 13), half(13)
    check_compiled(lambda x, w, b: torch.softmax(x @ w + b, -1), *args)
