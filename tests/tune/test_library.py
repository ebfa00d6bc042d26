"""CPU matrix products: every form computes the same, the fastest is taken and remembered, time is bounded."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

from fxopt.journal import RECENT
from fxopt.lower.cpu_products import ATEN, ONEDNN, PACKED, Product
from fxopt.tune import library
from tests.numerics import assert_closer, to_float64

pytestmark = [
    pytest.mark.usefixtures("fresh_cache"),
    pytest.mark.skipif(not torch.backends.mkldnn.is_available(), reason="torch without oneDNN"),
]
LINEAR = "mkldnn::_linear_pointwise.default"


@pytest.fixture
def fastest(monkeypatch: pytest.MonkeyPatch) -> Callable[[str], list[Product]]:
    """fastest(form) makes that form win every contest; the list returned receives the products that were measured."""

    def make(form: str) -> list[Product]:
        measured: list[Product] = []

        def measure(product: Product) -> dict[str, float]:
            measured.append(product)
            return {f: 0.5 if f == form else 1.0 for f in product.forms}

        monkeypatch.setattr(library, "_measure", measure)
        return measured

    return make


def run(fn: Callable[..., Any], *args: Any, dynamic: bool | None = None, **options: Any) -> Any:
    torch.compiler.reset()
    RECENT.clear()
    with torch.no_grad():
        return torch.compile(fn, backend="fxopt", dynamic=dynamic, options={"strict": True, **options})(*args)


def calls() -> list[str]:
    return [op for journal in RECENT for op, _ in journal.library]


X = torch.randn(6, 20)
FUNCTIONS: dict[str, tuple[Callable[..., torch.Tensor], tuple[torch.Tensor, ...]]] = {
    "mm": (lambda x, w: x @ w, (X, torch.randn(20, 9))),
    "transposed weight": (lambda x, w: x @ w.t(), (X, torch.randn(9, 20))),
    "addmm": (lambda x, w, b: torch.addmm(b, x, w.t()), (X, torch.randn(9, 20), torch.randn(9))),
    "slice of a weight": (lambda x, w: x.exp() @ w[:, 2:7], (X, torch.randn(20, 9))),
    "computed operands": (lambda x, w: (x * 2) @ (w + 1).t() + 1, (X, torch.randn(9, 20))),
    "one row": (lambda x, w: x[:1] @ w, (X, torch.randn(20, 9))),
    "columns of x": (lambda x, w: x.t() @ w, (X, torch.randn(6, 9))),
}


@pytest.mark.parametrize("name", FUNCTIONS)
@pytest.mark.parametrize("form", [ATEN, ONEDNN])
def test_each_form_computes_the_product(name: str, form: str, fastest: Callable[[str], list[Product]]) -> None:
    fastest(form)
    fn, args = FUNCTIONS[name]
    assert_closer(run(fn, *args), fn(*args), fn(*to_float64(args)))
    assert (LINEAR in calls()) == (form == ONEDNN)


def test_any_number_of_rows(fastest: Callable[[str], list[Product]]) -> None:
    fastest(ONEDNN)
    fn, (_, w) = FUNCTIONS["transposed weight"]
    torch.compiler.reset()
    compiled = torch.compile(fn, backend="fxopt", dynamic=True)
    for rows in (4, 33, 7):
        x = torch.randn(rows, 20)
        torch.testing.assert_close(compiled(x, w), fn(x, w))


def test_packed_weights_are_packed_once(fastest: Callable[[str], list[Product]]) -> None:
    fastest(PACKED)
    layer = nn.Linear(20, 20)

    def twice(x: torch.Tensor) -> torch.Tensor:
        return layer(layer(x).relu())

    with torch.no_grad():
        torch.testing.assert_close(run(twice, X, freeze=True), twice(X))
    assert calls().count(LINEAR) == 2


def test_what_is_not_frozen_is_not_packed(fastest: Callable[[str], list[Product]]) -> None:
    measured = fastest(PACKED)
    run(nn.Linear(20, 9), X)
    assert [p.forms for p in measured] == [(ATEN, ONEDNN)]


def test_a_shape_is_measured_once(fastest: Callable[[str], list[Product]]) -> None:
    measured = fastest(ONEDNN)
    fn, args = FUNCTIONS["mm"]
    run(fn, *args)
    run(lambda x, w: (x @ w).relu(), *args)
    assert len(measured) == 1


def test_a_tie_goes_to_torch(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(library, "_measure", lambda product: {form: 1.0 - 0.02 * k for k, form in enumerate(product.forms)})
    fn, args = FUNCTIONS["mm"]
    run(fn, *args)
    assert calls() == ["aten::mm.default"]


def test_without_time_torch_s_own_is_taken_and_nothing_remembered(
    fastest: Callable[[str], list[Product]], monkeypatch: pytest.MonkeyPatch
) -> None:
    measured = fastest(ONEDNN)
    fn, args = FUNCTIONS["mm"]
    with monkeypatch.context() as patch:
        patch.setattr(library, "BUDGET_SECONDS", dict.fromkeys(library.BUDGET_SECONDS, 0.0))
        run(fn, *args)
        assert calls() == ["aten::mm.default"]
        assert any("budget" in text for journal in RECENT for topic, text in journal.notes if topic == "library")
    run(fn, *args)
    assert calls() == [LINEAR]
    assert len(measured) == 1


def test_measuring_leaves_the_user_s_generator_alone() -> None:
    fn, args = FUNCTIONS["addmm"]
    torch.manual_seed(3)
    before = torch.get_rng_state()
    run(fn, *args)
    assert torch.equal(torch.get_rng_state(), before)


def test_a_form_that_is_hopeless_has_one_turn(monkeypatch: pytest.MonkeyPatch) -> None:
    turns: list[str] = []

    def made(form: str, *_: Any) -> Callable[[], str]:
        return lambda: form

    def timed(run: Callable[[], str]) -> float:
        turns.append(run())
        return {ATEN: 0.001, ONEDNN: 0.002}[run()]

    monkeypatch.setattr(library, "_run", made)
    monkeypatch.setattr(library, "_timed", timed)
    fn, args = FUNCTIONS["mm"]
    run(fn, *args)
    assert turns == [ATEN, ONEDNN]
