"""Optimizer steps over BERT-base's parameters: torch's own (foreach, and fused where there is one) and Lion written out."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from benchmarks.workload import Sizes, Values, Workload
from fxopt.report.cases import FORWARD, Case, Tensors

POSITIONS = 512


def bert_shapes(hidden: int, layers: int, vocab: int) -> list[tuple[int, ...]]:
    """The parameters of transformers' BertForMaskedLM, in its order: 202 of BERT-base."""
    norm = [(hidden,), (hidden,)]

    def linear(out: int, inside: int) -> list[tuple[int, ...]]:
        return [(out, inside), (out,)]

    attention = [*(3 * linear(hidden, hidden)), *linear(hidden, hidden), *norm]
    layer = [*attention, *linear(4 * hidden, hidden), *linear(hidden, 4 * hidden), *norm]
    embeddings = [(vocab, hidden), (POSITIONS, hidden), (2, hidden), *norm]
    return [*embeddings, *(layers * layer), (vocab,), *linear(hidden, hidden), *norm]


class Lion:
    """Lion (Chen et al. 2023, "Symbolic discovery of optimization algorithms"), one list operation a line."""

    def __init__(self, parameters: Iterable[Tensor], lr: float = 1e-4, decay: float = 0.01) -> None:
        self.parameters = list(parameters)
        self.momenta = [torch.zeros_like(p) for p in self.parameters]
        self.lr, self.decay = lr, decay

    @torch.no_grad()
    def step(self) -> None:
        gradients = [p.grad for p in self.parameters if p.grad is not None]
        updates = torch._foreach_mul(self.momenta, 0.9)
        torch._foreach_add_(updates, gradients, alpha=0.1)
        torch._foreach_sign_(updates)
        torch._foreach_mul_(self.parameters, 1 - self.lr * self.decay)
        torch._foreach_add_(self.parameters, updates, alpha=-self.lr)
        torch._foreach_lerp_(self.momenta, gradients, 0.01)


Make = Callable[..., Any]


def _sgd(parameters: Sequence[Tensor], **implementation: bool) -> Any:
    return torch.optim.SGD(parameters, lr=1e-3, momentum=0.9, **implementation)


def _adam(parameters: Sequence[Tensor], **implementation: bool) -> Any:
    return torch.optim.Adam(parameters, lr=1e-3, **implementation)


def _adamw(parameters: Sequence[Tensor], **implementation: bool) -> Any:
    return torch.optim.AdamW(parameters, lr=1e-3, weight_decay=0.01, **implementation)


def _lion(parameters: Sequence[Tensor], foreach: bool = True) -> Lion:
    return Lion(parameters)


def _moments(optimizer: Any, parameters: Sequence[Tensor]) -> list[Tensor]:
    """What the optimizer keeps of the same shape as each parameter."""
    return optimizer.momenta if isinstance(optimizer, Lion) else [v for v in _kept(optimizer, parameters) if v.dim()]


def _counts(optimizer: Any, parameters: Sequence[Tensor]) -> list[Tensor]:
    """How many steps each parameter has had."""
    return [] if isinstance(optimizer, Lion) else [v for v in _kept(optimizer, parameters) if not v.dim()]


def _kept(optimizer: Any, parameters: Sequence[Tensor]) -> list[Tensor]:
    return [v for p in parameters for v in optimizer.state[p].values() if isinstance(v, Tensor)]


@torch.no_grad()
def _case(make: Make, values: Sequence[Tensor], gradients: Sequence[Tensor], **implementation: bool) -> Case:
    """One step of `make`'s optimizer from parameters `values`, moments of a tenth of the squared gradients and step 10.

    Lion's momenta have the gradients' signs: where the two cancel, the sign of their sum is a matter of rounding, and a step
    in the other direction is no error.
    """
    parameters = [torch.nn.Parameter(v.clone()) for v in values]
    for parameter, gradient in zip(parameters, gradients, strict=True):
        parameter.grad = gradient
    optimizer = make(parameters, **implementation)
    optimizer.step()  # torch's make their state in the first step
    moments = _moments(optimizer, parameters)
    signed = isinstance(optimizer, Lion)
    start = [g * (g.abs() if signed else g) / 10 for g in gradients for _ in range(len(moments) // len(parameters))]

    def reset() -> None:
        with torch.no_grad():
            torch._foreach_copy_(parameters, list(values))
            torch._foreach_copy_(moments, start)
            for count in _counts(optimizer, parameters):  # torch.compile puts new ones on the device
                count.fill_(10)

    reset()
    units = 3 + 2 * len(moments) // len(parameters)  # a parameter, its gradient and moments are read, all but it written
    nbytes = units * sum(p.numel() * p.itemsize for p in parameters)
    return Case(optimizer.step, (), reset=reset, state=(*parameters, *moments), traffic={FORWARD: nbytes})


def _optimizer(name: str, make: Make, fused: bool) -> Workload:
    def build(sizes: Sizes, device: torch.device, dtype: torch.dtype) -> Case:
        draw = Values(device, dtype)
        shapes = bert_shapes(sizes["hidden"], sizes["layers"], sizes["vocab"])
        values, gradients = ([draw(*shape) for shape in shapes] for _ in range(2))

        def reference(outputs: Tensors) -> Tensors:
            wide = _case(make, [v.double() for v in values], [g.double() for g in gradients], foreach=True)
            return wide.drive(wide.module)

        case = _case(make, values, gradients, foreach=True)
        case.random, case.reference = True, reference
        if fused:
            case.alternatives = {
                "fused": lambda: replace(_case(make, values, gradients, fused=True), random=True, reference=reference)
            }
        return case

    full, tiny = {"hidden": 768, "layers": 12, "vocab": 30522}, {"hidden": 16, "layers": 2, "vocab": 97}
    return Workload(name, "optimizer", build, full, tiny)


OPTIMIZERS = (
    _optimizer("sgd-momentum", _sgd, True),
    _optimizer("adam", _adam, True),
    _optimizer("adamw", _adamw, True),
    _optimizer("lion", _lion, False),
)
