"""view(mm(x, w)) + bias, the form of a linear layer on batched inputs: the bias moves into the product, below the view."""

from __future__ import annotations

import torch

from fxopt.passes.fusions.mm_bias import guard
from fxopt.passes.pattern import Pattern, Sample


def pattern(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor, shape: list[int]) -> torch.Tensor:
    return torch.mm(x, weight).view(shape) + bias


def replacement(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor, shape: list[int]) -> torch.Tensor:
    return torch.addmm(bias, x, weight).view(shape)


def samples() -> list[Sample]:
    def operands() -> tuple[torch.Tensor, ...]:
        return torch.randn(2, 3, 5), torch.randn(5, 7), torch.randn(7)

    def flattened(x: torch.Tensor, w: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
        return (torch.mm(x.view(-1, 5), w).view(2, 3, 7) + b).relu()

    return [
        Sample("batched matmul", lambda x, w, b: x @ w + b, operands),
        Sample("linear, bias added apart", lambda x, w, b: torch.tanh(b + torch.nn.functional.linear(x, w.t())), operands),
        Sample("flattened by hand", flattened, operands),
        Sample("tensordot", lambda x, w, b: (torch.tensordot(x, w, dims=1) + b).exp(), operands),
    ]


def near_misses() -> list[Sample]:
    def operands() -> tuple[torch.Tensor, ...]:
        return torch.randn(2, 3, 4), torch.randn(4, 4), torch.randn(4)

    def heads(x: torch.Tensor, w: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
        return ((x @ w).view(2, 3, 2, 2) + b[:2]).relu()

    def turned(x: torch.Tensor, w: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
        return ((x.view(6, 4) @ w).t().reshape(4, 6)[:, :4] + b).relu()

    return [
        Sample("the columns are split", heads, operands),
        Sample("the product is transposed", turned, operands),
        Sample("a residual", lambda x, w, b: (x @ w + x).relu() + b, operands),
        Sample("the product is used twice", lambda x, w, b: (p := x @ w).relu() + (p + b).tanh(), operands),
    ]


def _example(b: int, m: int, k: int, n: int) -> tuple[object, ...]:
    return torch.ones(b * m, k), torch.ones(k, n), torch.ones(n), [b, m, n]


MM_VIEW_BIAS = Pattern(
    "mm_view_bias",
    pattern,
    replacement,
    (_example(2, 3, 5, 4), _example(3, 5, 7, 6)),
    guard,
    samples,
    near_misses,
    needs=(torch.ops.aten.mm.default, torch.ops.aten.add.Tensor),
)
