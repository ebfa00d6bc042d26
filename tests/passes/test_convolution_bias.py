"""Biases of convolutions as ops of their own, with CPUs counted among the devices that add them apart."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fxopt.journal import RECENT
from fxopt.passes import convolution_bias as pass_module
from tests.numerics import assert_closer, check_compiled, to_float64
from tests.passes.graphs import calls, execute, optimize

BF16 = torch.bfloat16


@pytest.fixture(autouse=True)
def _cpus_add_bias_apart(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pass_module, "adds_bias_apart", lambda device: True)


CASES: dict[str, tuple[Callable[..., Any], tuple[Tensor, ...]]] = {
    "one dimension": (F.conv1d, (torch.randn(2, 4, 9), torch.randn(6, 4, 3), torch.randn(6))),
    "two": (F.conv2d, (torch.randn(2, 4, 9, 8), torch.randn(6, 4, 3, 3), torch.randn(6))),
    "three": (F.conv3d, (torch.randn(2, 4, 5, 4, 6), torch.randn(6, 4, 3, 3, 3), torch.randn(6))),
    "transposed": (F.conv_transpose2d, (torch.randn(2, 4, 9, 8), torch.randn(4, 6, 3, 3), torch.randn(6))),
    "half precision": (
        F.conv2d, (torch.randn(2, 4, 9, 8).to(BF16), torch.randn(6, 4, 3, 3).to(BF16), torch.randn(6).to(BF16))
    ),
    "followed by more": (
        lambda x, w, b: F.conv2d(x, w, b).relu(), (torch.randn(2, 4, 9, 8), torch.randn(6, 4, 3, 3), torch.randn(6))
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", CASES)
def test_added_apart(name: str) -> None:
    fn, args = CASES[name]
    graph, context = optimize(fn, args, only="convolution_bias")
    assert_closer(execute(graph, args)[0], fn(*args), fn(*to_float64(args)))
    assert [r.rule for r in context.log] == ["convolution_bias.bias_apart"]
    assert calls(graph)[:3] == ["convolution", "view", "add"]
    (output,) = graph.gm.graph.output_node().args[0]
    assert output.meta["val"].stride() == fn(*args).stride()


@pytest.mark.parametrize(
    ("fn", "args"),
    [
        (F.conv2d, (torch.randn(2, 4, 9, 8), torch.randn(6, 4, 3, 3))),
        (lambda x, w, b: F.conv2d(x, w, b, groups=4), (torch.randn(2, 4, 9, 8), torch.randn(4, 1, 3, 3), torch.randn(4))),
    ],
    ids=["no bias", "depthwise"],
)
def test_left_alone(fn: Callable[..., Any], args: tuple[Tensor, ...]) -> None:
    assert not optimize(fn, args, only="convolution_bias")[1].log


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.one, self.two = nn.Conv2d(3, 8, 3, padding=1), nn.Conv2d(8, 4, 1)
        self.up = nn.ConvTranspose2d(4, 4, 2, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.up(F.silu(self.two(F.gelu(self.one(x)))))


@pytest.mark.usefixtures("fresh_cache")
@pytest.mark.parametrize("dynamic", [False, True])
def test_compiled_inference(dynamic: bool) -> None:
    RECENT.clear()
    model, x = Net().eval(), torch.randn(2, 3, 8, 8)
    with torch.no_grad():
        check_compiled(model, x, k=8, dynamic=dynamic)
    assert "convolution_bias.bias_apart x3" in [text for journal in RECENT for _, text in journal.notes]


@pytest.mark.usefixtures("fresh_cache")
@pytest.mark.parametrize("dtype", [torch.float32, BF16])
@pytest.mark.parametrize("trained", ["everything", "biases"])
def test_compiled_training(dtype: torch.dtype, trained: str) -> None:
    RECENT.clear()
    torch.compiler.reset()
    model, x = Net().to(dtype), torch.randn(2, 3, 8, 8).to(dtype)
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(trained == "everything" or "bias" in name)
    eager, wide = copy.deepcopy(model), to_float64(model)

    def step(module: Any, original: nn.Module, given: Tensor) -> list[Tensor]:
        result = module(given)
        return [
            result.detach(),
            *torch.autograd.grad(result.square().mean(), [p for p in original.parameters() if p.requires_grad]),
        ]

    actual = step(torch.compile(model, backend="fxopt", options={"strict": True}), model, x)
    assert_closer(actual, step(eager, eager, x), step(wide, wide, x.double()), k=16)
    notes = [text for journal in RECENT for _, text in journal.notes]
    assert "convolution_bias.bias_apart x3" in notes
    assert "convolution_bias.bias_gradient_apart x3" in notes
