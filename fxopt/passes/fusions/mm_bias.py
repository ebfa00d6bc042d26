"""mm(x, w) + bias is addmm: one library call whose epilogue adds the bias before the product is rounded."""

from __future__ import annotations

import torch

from fxopt.ir.spec import known_equal
from fxopt.passes.matcher import Match
from fxopt.passes.pattern import Pattern, Sample


def pattern(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor) -> torch.Tensor:
    return torch.mm(x, weight) + bias


def replacement(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor) -> torch.Tensor:
    return torch.addmm(bias, x, weight)


def guard(match: Match) -> str | None:
    """A bias is one value per column: libraries fuse that; a full matrix is better added by the neighbouring kernel."""
    if not match.is_tensor("bias"):
        return "the addend is a scalar"
    bias, result, columns = match.tensor("bias"), match.result(), match.tensor("weight").shape[1]
    if bias.dim() != 1 or not known_equal(bias.shape[0], columns) or not known_equal(result.shape[-1], columns):
        return "the addend is not one value per column"
    if not bias.dtype == match.tensor("x").dtype == result.dtype or bias.device != result.device:
        return "the addend has another dtype or device"
    return None if result.is_floating_point() else "the product is not floating-point"


def samples() -> list[Sample]:
    def operands() -> tuple[torch.Tensor, ...]:
        return torch.randn(6, 5), torch.randn(5, 7), torch.randn(7)

    return [
        Sample("x @ w + b", lambda x, w, b: x @ w + b, operands),
        Sample("b + x.mm(w)", lambda x, w, b: b + x.mm(w), operands),
        Sample("weight stored transposed", lambda x, w, b: torch.add(torch.matmul(x, w.t()), b), _transposed),
        Sample("einsum", lambda x, w, b: torch.einsum("ik,kn->in", x, w) + b, operands),
        Sample("bfloat16", lambda x, w, b: x @ w + b, lambda: tuple(t.bfloat16() for t in operands())),
    ]


def _transposed() -> tuple[torch.Tensor, ...]:
    return torch.randn(6, 5), torch.randn(7, 5), torch.randn(7)


def near_misses() -> list[Sample]:
    def with_addend(*shape: int) -> tuple[torch.Tensor, ...]:
        return torch.randn(6, 5), torch.randn(5, 7), torch.randn(*shape)

    return [
        Sample("a residual, not a bias", lambda x, w, r: x @ w + r, lambda: with_addend(6, 7)),
        Sample("one value per row", lambda x, w, b: x @ w + b, lambda: with_addend(6, 1)),
        Sample("the product is used twice", lambda x, w, b: (p := x @ w) + b + p.relu(), lambda: with_addend(7)),
        Sample("the product is an output too", lambda x, w, b: ((p := x @ w) + b, p), lambda: with_addend(7)),
        Sample("a scaled bias", lambda x, w, b: torch.add(x @ w, b, alpha=2), lambda: with_addend(7)),
        Sample("a scalar", lambda x, w, b: x @ w + 1.5 + b.sum(), lambda: with_addend(7)),
        Sample("broadcasting the product", lambda x, w, b: (x[:, :] @ w) + b, lambda: with_addend(2, 6, 7)),
        Sample("a wider bias", lambda x, w, b: x @ w + b.double(), lambda: with_addend(7)),
    ]


def _example(m: int, k: int, n: int) -> tuple[torch.Tensor, ...]:
    return torch.ones(m, k), torch.ones(k, n), torch.ones(n)


MM_BIAS = Pattern(
    "mm_bias",
    pattern,
    replacement,
    (_example(2, 3, 4), _example(5, 6, 7)),
    guard,
    samples,
    near_misses,
    needs=(torch.ops.aten.mm.default, torch.ops.aten.add.Tensor),
)
