"""A linear layer under a cross-entropy: which spellings the early pass takes, and that losses and gradients stay eager's."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from fxopt.ir import linear_cross_entropy_op as op
from fxopt.journal import RECENT
from fxopt.passes import linear_cross_entropy as early_pass
from tests.numerics import assert_closer, to_float64

BATCH, TOKENS, FEATURES, CLASSES = 2, 7, 8, 19
Step = Callable[..., Tensor]


@pytest.fixture(autouse=True)
def _small_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Few rows go through several chunks and blocks."""
    monkeypatch.setattr(early_pass, "MIN_BYTES", 0)
    monkeypatch.setattr(early_pass, "MIN_CLASSES", 2)
    monkeypatch.setattr(op, "chunk_rows", lambda rows, features: 5)
    monkeypatch.setattr(op, "_block_rows", lambda classes, dtype, device: 2)


def operands(dtype: torch.dtype = torch.float32, **wanted: bool) -> tuple[Tensor, ...]:
    """hidden [2, 7, 8], weight [19, 8], bias [19], labels [2, 7]; `wanted` names operands without a gradient."""
    shapes = {"hidden": (BATCH, TOKENS, FEATURES), "weight": (CLASSES, FEATURES), "bias": (CLASSES,)}
    made = (torch.randn(s).to(dtype).requires_grad_(wanted.get(name, True)) for name, s in shapes.items())
    labels = torch.randint(0, CLASSES, (BATCH, TOKENS))
    labels[0, 2] = labels[1, 0] = -100
    return (*made, labels)


def with_gradients(step: Step, *args: Any, grad: Any = None) -> tuple[Any, ...]:
    """The loss, and the gradient of every argument that wants one (None: it does not depend on it)."""
    loss = step(*args)
    wanted = [a for a in args if isinstance(a, Tensor) and a.requires_grad]
    if not loss.requires_grad:
        return (loss,)
    given = torch.ones_like(loss) if grad is None else torch.as_tensor(grad, dtype=loss.dtype).expand(loss.shape)
    return loss.detach(), *torch.autograd.grad(loss, wanted, given, allow_unused=True)


def events() -> list[tuple[str, str]]:
    """What the early passes noted since `compiled` was called."""
    return [note for journal in RECENT if journal.graph == "capture" for note in journal.notes]


def compiled(step: Step, *, dynamic: bool | None = None, **options: Any) -> Step:
    torch.compiler.reset()
    RECENT.clear()
    return torch.compile(step, backend="fxopt", dynamic=dynamic, options={"strict": True, **options})


def check(step: Step, *args: Any, taken: bool = True, grad: Any = None, dynamic: bool | None = None, k: float = 4.0) -> None:
    """`step` compiled is as close to float64 as eager is, in the loss and all gradients; `taken`: by the op."""
    actual = with_gradients(compiled(step, dynamic=dynamic), *args, grad=grad)
    assert (("rewrite", "linear_cross_entropy.chunked x1") in events()) is taken, events()
    exact = with_gradients(step, *to_float64(args), grad=grad)
    assert_closer(actual, with_gradients(step, *args, grad=grad), exact, k=k)


# ---------------------------------------------------------------------- spellings


def flat(x: Tensor) -> Tensor:
    return x.view(-1, x.shape[-1])


def shifted(logits: Tensor, labels: Tensor) -> Tensor:
    kept = logits[..., :-1, :].contiguous()
    return F.cross_entropy(kept.view(-1, CLASSES), labels[..., 1:].contiguous().view(-1))


def padded_labels(logits: Tensor, labels: Tensor) -> Tensor:
    moved = F.pad(labels, (0, 1), value=-100)[..., 1:].contiguous()
    return F.cross_entropy(logits.float().view(-1, CLASSES), moved.view(-1), ignore_index=-100, reduction="mean")


SPELLINGS: dict[str, Step] = {
    "linear": lambda h, w, b, y: F.cross_entropy(flat(F.linear(h, w, b)), y.view(-1)),
    "linear, bias by name": lambda h, w, b, y: F.cross_entropy(flat(F.linear(h, w, bias=b)), y.view(-1)),
    "no bias": lambda h, w, b, y: F.cross_entropy(flat(F.linear(h, w)), y.view(-1)) + b.sum(),
    "operator and T": lambda h, w, b, y: F.cross_entropy(flat(h @ w.T + b), y.flatten()),
    "matmul and t": lambda h, w, b, y: F.cross_entropy(torch.matmul(h, w.t()).add(b).flatten(0, 1), y.reshape(-1)),
    "addmm": lambda h, w, b, y: F.cross_entropy(torch.addmm(b, h.flatten(0, 1), w.transpose(0, 1)), y.view(-1)),
    "rows first": lambda h, w, b, y: F.cross_entropy(F.linear(flat(h), w, b), y.view(-1)),
    "shifted": lambda h, w, b, y: shifted(F.linear(h, w, b), y),
    "shifted, wide": lambda h, w, b, y: shifted(F.linear(h, w, b).float(), y),
    "padded labels": lambda h, w, b, y: padded_labels(F.linear(h, w, b), y),
    "last tokens": lambda h, w, b, y: F.cross_entropy(flat(F.linear(h[:, -3:, :], w, b)), y[:, -3:].flatten()),
    "one token": lambda h, w, b, y: F.cross_entropy(F.linear(h, w, b)[:, -1], y[:, -1]),
    "double": lambda h, w, b, y: F.cross_entropy(flat(F.linear(h, w, b)).to(torch.float64), y.view(-1)),
    "nll": lambda h, w, b, y: F.nll_loss(flat(F.log_softmax(F.linear(h, w, b), -1)), y.view(-1)),
    "nll, wide": lambda h, w, b, y: F.nll_loss(flat(F.linear(h, w, b).log_softmax(2, dtype=torch.float64)), y.view(-1)),
    "transposed weight": lambda h, w, b, y: F.cross_entropy(flat(h @ w.t().contiguous() + b), y.view(-1)),
    "in arithmetic": lambda h, w, b, y: 0.5 * F.cross_entropy(flat(F.linear(h, w, b)), y.view(-1)) + h.square().mean(),
}


@pytest.mark.parametrize("name", SPELLINGS)
def test_every_spelling_is_taken(name: str) -> None:
    check(SPELLINGS[name], *operands())


NEAR_MISSES: dict[str, tuple[Step, str]] = {
    "accuracy": (
        lambda h, w, b, y: F.cross_entropy(z := flat(F.linear(h, w, b)), y.view(-1)) + z.argmax(-1).sum(),
        "the logits have another use",
    ),
    "probabilities": (
        lambda h, w, b, y: F.cross_entropy(flat(F.linear(h, w, b)), torch.ones(BATCH * TOKENS, CLASSES, dtype=h.dtype)),
        "labels that are not class numbers",
    ),
    "classes second": (
        lambda h, w, b, y: F.cross_entropy(F.linear(h, w, b).transpose(1, 2), y),
        "the logits are not a matrix",
    ),
    "scaled": (
        lambda h, w, b, y: F.cross_entropy(flat(F.linear(h, w, b) / 3), y.view(-1)),
        "the logits are not what a linear layer gives",
    ),
    "fewer classes": (
        lambda h, w, b, y: F.cross_entropy(F.linear(h, w, b)[..., :12].reshape(-1, 12), y.view(-1).clamp(max=11)),
        "the logits are not what a linear layer gives",
    ),
    "softmax of a softmax": (
        lambda h, w, b, y: F.cross_entropy(flat(F.linear(h, w, b)).log_softmax(-1), y.view(-1)),
        "not one softmax",
    ),
    "two softmaxes": (
        lambda h, w, b, y: F.nll_loss(flat(F.linear(h, w, b)).log_softmax(-1).log_softmax(-1), y.view(-1)),
        "not one softmax",
    ),
    "narrower": (
        lambda h, w, b, y: F.cross_entropy(flat(F.linear(h, w, b)).to(torch.bfloat16).float(), y.view(-1)),
        "the logits are rounded to a narrower type",
    ),
    "old reduction": (
        lambda h, w, b, y: F.cross_entropy(flat(F.linear(h, w, b)), y.view(-1), reduce=False).sum(),
        "the reduction is not named",
    ),
}


@pytest.mark.filterwarnings("ignore:size_average and reduce")
@pytest.mark.parametrize("name", NEAR_MISSES)
def test_near_misses_stay(name: str) -> None:
    step, reason = NEAR_MISSES[name]
    check(step, *operands(), taken=False, k=100.0)
    assert ("rejected", f"linear_cross_entropy: {reason} x1") in events()
