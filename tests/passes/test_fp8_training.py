"""Training in fp8: which products of forward and backward are rewritten, and their values."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fxopt import journal
from fxopt.journal import RECENT

FP8 = torch.float8_e4m3fn


@pytest.fixture(autouse=True)
def _fresh(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(journal, "_told", set())
    torch.compiler.reset()
    RECENT.clear()
    yield
    torch.compiler.reset()


def notes() -> list[str]:
    return [text for each in RECENT for topic, text in each.notes if topic == "precision"]


def compiled(model: nn.Module, precision: Any = "fp8") -> Any:
    return torch.compile(model, backend="fxopt", options={"precision": precision})


def on_grid(x: Tensor) -> Tensor:
    """Rows scaled to float8's range, and back."""
    scale = (x.abs().amax(1, keepdim=True) * (1.0 / 448)).clamp_min(torch.finfo(torch.float32).tiny)
    return (x * scale.reciprocal()).clamp(-448, 448).to(FP8).float() * scale


class Reference(torch.autograd.Function):
    """A linear layer whose three products are of operands on the grid."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, w: Tensor) -> Tensor:
        ctx.save_for_backward(x, w)
        return on_grid(x) @ on_grid(w).t()

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor, Tensor]:
        x, w = ctx.saved_tensors
        return on_grid(dy) @ on_grid(w.t()).t(), on_grid(dy.t()) @ on_grid(x.t()).t()


class Net(nn.Module):
    """A layer without bias, one with, and one that a rule may leave as it is."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first, self.second, self.head = nn.Linear(32, 48, bias=False), nn.Linear(48, 32), nn.Linear(32, 16)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.second(F.gelu(self.first(x))))


def test_values_of_results_and_gradients() -> None:
    model, x = Net(), torch.randn(4, 16, 32, requires_grad=True)
    result = compiled(model, {"*": "fp8", "head": "high"})(x)
    result.square().sum().backward()
    got = [x.grad, *(p.grad for p in model.parameters())]
    twin, y = Net(), x.detach().clone().requires_grad_()
    rows = F.gelu(Reference.apply(y.reshape(-1, 32), twin.first.weight))
    expected = twin.head(Reference.apply(rows, twin.second.weight) + twin.second.bias).reshape(4, 16, 16)
    expected.square().sum().backward()
    torch.testing.assert_close(result, expected, rtol=1e-3, atol=1e-3)
    for mine, theirs in zip(got, [y.grad, *(p.grad for p in twin.parameters())], strict=True):
        assert mine is not None and theirs is not None
        assert float((mine - theirs).norm() / theirs.norm()) < 2e-2, (
            "an element near the middle of a step may round either way"
        )
    assert notes() == ["first: trains in fp8, 3 of 3 products", "second: trains in fp8, 3 of 3 products"]


def test_the_first_layer_of_a_model_has_two_products() -> None:
    """Its input wants no gradient."""
    compiled(Net())(torch.randn(16, 32)).sum().backward()
    assert [n.partition(" of ")[0].rpartition(" ")[2] for n in notes()] == ["2", "3", "3"]


@pytest.mark.parametrize("precision", ["int8", "int4-weight", "high"])
def test_other_precisions_train_as_they_are(precision: str) -> None:
    x = torch.randn(16, 32)
    result = compiled(Net(), precision)(x)
    expected = [] if precision == "high" else ["training has fp8 and fp8-dynamic only"] * 3
    assert [n.partition(": ")[2] for n in notes()] == expected
    torch.compiler.reset()
    assert torch.equal(result, torch.compile(Net(), backend="fxopt")(x))


def test_weights_that_two_layers_share_keep_their_gradient() -> None:
    class Tied(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.randn(32, 32) * 0.1)

        def forward(self, x: Tensor) -> Tensor:
            return F.linear(torch.tanh(F.linear(x, self.weight)), self.weight)

    tied, x = Tied(), torch.randn(16, 32)
    compiled(tied)(x).square().sum().backward()
    got = tied.weight.grad
    tied.weight.grad = None
    tied(x).square().sum().backward()
    assert got is not None and tied.weight.grad is not None
    assert float((got - tied.weight.grad).norm() / tied.weight.grad.norm()) < 0.1
