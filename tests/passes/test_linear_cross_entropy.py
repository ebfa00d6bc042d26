"""A linear layer under a cross-entropy: which spellings the early pass takes, and that losses and gradients stay eager's."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from fxopt.ir import linear_cross_entropy_op as op
from fxopt.journal import RECENT
from fxopt.lower.ops import linear_cross_entropy as lowering
from fxopt.passes import linear_cross_entropy as early_pass
from tests.numerics import assert_closer, to_float64

BATCH, TOKENS, FEATURES, CLASSES = 2, 7, 8, 19
both_forms = pytest.mark.parametrize("_small_chunks", ["op", "apart"], indirect=True)
Step = Callable[..., Tensor]


@pytest.fixture(autouse=True)
def _small_chunks(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Few rows go through several chunks and blocks: of the op, or with the parameter "apart" taken apart as on GPUs."""
    form = getattr(request, "param", "op")
    monkeypatch.setattr(early_pass, "MIN_BYTES", 0)
    monkeypatch.setattr(early_pass, "MIN_CLASSES", 2)
    monkeypatch.setattr(op, "chunk_rows", lambda rows, features: 5)
    monkeypatch.setattr(op, "_block_rows", lambda classes, dtype, device: 2)
    monkeypatch.setattr(lowering, "runs_apart", lambda device: form == "apart")
    # Keys of plans do not know of what is replaced here.
    monkeypatch.setenv("FXOPT_CACHE_DIR", os.path.join(os.environ["FXOPT_CACHE_DIR"], form))
    monkeypatch.setattr(lowering, "plan_chunks", lambda rows, features, dtype, *rest: op.Chunks(5, wide(dtype)))


def wide(dtype: torch.dtype) -> torch.dtype:
    return torch.promote_types(dtype, torch.float32)


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
    given = torch.as_tensor(1.0 if grad is None else grad).to(loss).expand(loss.shape)
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


@pytest.mark.parametrize(("bytes_", "classes"), [(1 << 20, 2), (0, CLASSES + 1)])
def test_small_logits_stay(bytes_: int, classes: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(early_pass, "MIN_BYTES", bytes_)
    monkeypatch.setattr(early_pass, "MIN_CLASSES", classes)
    check(SPELLINGS["linear"], *operands(), taken=False)
    assert ("rejected", "linear_cross_entropy: the logits are small x1") in events()


def test_operands_written_in_between_stay() -> None:
    def step(h: Tensor, w: Tensor, b: Tensor, y: Tensor) -> Tensor:
        scratch = h.clone()
        logits = flat(F.linear(scratch, w, b))
        scratch.zero_()
        return F.cross_entropy(logits, y.view(-1))

    check(step, *operands(weight=False), taken=False)
    assert ("rejected", "linear_cross_entropy: a tensor is written before the loss x1") in events()


def test_logits_made_without_gradients_stay() -> None:
    def step(h: Tensor, w: Tensor, b: Tensor, y: Tensor) -> Tensor:
        with torch.no_grad():
            logits = flat(F.linear(h, w, b))
        return F.cross_entropy(logits, y.view(-1)) + h.sum()

    check(step, *operands(), taken=False)
    assert ("rejected", "linear_cross_entropy: the grad mode changes before the loss x1") in events()


def test_disabled_by_name() -> None:
    step, args = SPELLINGS["linear"], operands()
    compiled(step, disable=("linear_cross_entropy",))(*args)
    assert not any("linear_cross_entropy" in text for _, text in events())


# ---------------------------------------------------------------------- what the loss is told


def loss_of(**settings: Any) -> Step:
    def step(h: Tensor, w: Tensor, b: Tensor, y: Tensor, class_weight: Tensor | None = None) -> Tensor:
        return F.cross_entropy(flat(F.linear(h, w, b)), y.view(-1), class_weight, **settings)

    return step


@both_forms
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("smoothing", [0.0, 0.2])
@pytest.mark.parametrize("weighted", [False, True])
def test_reductions_smoothing_and_class_weights(reduction: str, smoothing: float, weighted: bool) -> None:
    step = loss_of(reduction=reduction, label_smoothing=smoothing)
    rows = torch.arange(1.0, BATCH * TOKENS + 1) if reduction == "none" else 3.0
    check(step, *operands(), torch.rand(CLASSES) if weighted else None, grad=rows)


@both_forms
@pytest.mark.parametrize("ignored", [-1, 4, CLASSES + 5])
def test_any_label_may_be_the_ignored_one(ignored: int) -> None:
    *args, labels = operands()
    labels[labels == -100] = ignored
    check(loss_of(ignore_index=ignored, label_smoothing=0.1), *args, labels)


@both_forms
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
def test_every_row_ignored(reduction: str) -> None:
    *args, labels = operands()
    check(loss_of(reduction=reduction, label_smoothing=0.1), *args, torch.full_like(labels, -100))


@both_forms
def test_classes_without_weight() -> None:
    *args, labels = operands()
    class_weight = torch.rand(CLASSES)
    class_weight[labels[0, :2]] = 0.0
    check(loss_of(), *args, labels, class_weight)


@both_forms
def test_weights_of_labels_that_sum_to_zero() -> None:
    check(loss_of(), *operands(), torch.zeros(CLASSES))


@both_forms
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
def test_no_rows(reduction: str) -> None:
    _, weight, bias, labels = operands()
    hidden = torch.empty(BATCH, 0, FEATURES, requires_grad=True)

    def step(h: Tensor, w: Tensor, b: Tensor, y: Tensor) -> Tensor:
        return F.cross_entropy(F.linear(h, w, b).reshape(-1, CLASSES), y.reshape(-1), reduction=reduction)

    check(step, hidden, weight, bias, labels[:, :0])


@both_forms
@pytest.mark.parametrize("label", [CLASSES, -1])
def test_labels_out_of_range_raise_as_in_eager(label: int) -> None:
    *args, labels = operands()
    labels[1, 3] = label
    for step in (SPELLINGS["linear"], compiled(SPELLINGS["linear"])):
        with pytest.raises(IndexError, match="out of bounds"):
            step(*args, labels)


def test_labels_of_another_type_stay() -> None:
    *args, labels = operands()
    compiled(SPELLINGS["linear"])(*args, labels.int())
    assert ("rejected", "linear_cross_entropy: labels that are not class numbers x1") in events()


# ---------------------------------------------------------------------- dtypes, layouts, gradients


@both_forms
@pytest.mark.parametrize("wide", [False, True])
@pytest.mark.parametrize("reduction", ["mean", "none"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_dtypes(dtype: torch.dtype, reduction: str, wide: bool) -> None:
    def step(h: Tensor, w: Tensor, b: Tensor, y: Tensor) -> Tensor:
        logits = F.linear(h, w, b)
        logits = logits.float() if wide and h.dtype != torch.float64 else logits
        return F.cross_entropy(flat(logits), y.view(-1), reduction=reduction)

    check(step, *operands(dtype), grad=0.3)


@both_forms
def test_a_gradient_scaler_keeps_small_gradients_of_float16() -> None:
    """Scaled only after rounding to float16, most of them would be zero."""
    hidden, weight, bias, labels = operands(torch.float16)
    small = (hidden.detach() * 2**-14).requires_grad_()
    step = loss_of(reduction="mean")
    check(step, small, weight, bias, labels, grad=2.0**12)


@both_forms
@pytest.mark.parametrize("frozen", [("weight",), ("hidden", "bias"), ("hidden", "weight", "bias")])
def test_operands_without_gradient(frozen: tuple[str, ...]) -> None:
    check(SPELLINGS["linear"], *operands(**dict.fromkeys(frozen, False)))


@both_forms
@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_without_grad_mode(reduction: str) -> None:
    with torch.no_grad():
        check(loss_of(reduction=reduction), *operands())


@both_forms
def test_operands_that_are_not_contiguous() -> None:
    hidden, _, bias, labels = operands()
    turned = hidden.detach().transpose(0, 1).contiguous().transpose(0, 1).requires_grad_()
    strided = torch.randn(FEATURES, CLASSES).t().requires_grad_()

    def step(h: Tensor, w: Tensor, b: Tensor, y: Tensor) -> Tensor:
        return F.cross_entropy(F.linear(h, w, b).reshape(-1, CLASSES), y.reshape(-1))

    check(step, turned, strided, bias, labels.t().contiguous().t())


@both_forms
def test_one_compilation_for_many_sizes() -> None:
    step = loss_of(label_smoothing=0.1)
    many = compiled(step, dynamic=True)
    for rows in (3, 4, 11):
        _, weight, bias, _ = operands()
        args = torch.randn(rows, 2, FEATURES, requires_grad=True), weight, bias, torch.randint(0, CLASSES, (rows, 2))
        exact = with_gradients(step, *to_float64(args))
        assert_closer(with_gradients(many, *args), with_gradients(step, *args), exact)
    assert events().count(("rewrite", "linear_cross_entropy.chunked x1")) == 1


def all_inside(h: Tensor, w: Tensor, b: Tensor, y: Tensor) -> Tensor:
    with torch.autocast("cpu", torch.bfloat16):
        return F.cross_entropy(flat(F.linear(h, w, b)), y.view(-1))


def product_inside(h: Tensor, w: Tensor, b: Tensor, y: Tensor) -> Tensor:
    with torch.autocast("cpu", torch.bfloat16):
        logits = F.linear(h, w, b)
    return F.cross_entropy(flat(logits), y.view(-1))


ONE_ROUNDING = 0.5 * torch.finfo(torch.bfloat16).eps / torch.finfo(torch.float32).eps
"""Results in float32 of products in bfloat16: one value more or less may be rounded on the way."""


@both_forms
@pytest.mark.parametrize("step", [all_inside, product_inside])
def test_autocast_inside(step: Step) -> None:
    check(step, *operands(), k=ONE_ROUNDING)


def test_autocast_around_the_call() -> None:
    with torch.autocast("cpu", torch.bfloat16):
        check(SPELLINGS["linear"], *operands(), k=ONE_ROUNDING)


@both_forms
def test_the_same_bits_each_time() -> None:
    step, args = compiled(SPELLINGS["linear"]), operands()
    first, second = (with_gradients(step, *args) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


class TiedModel(nn.Module):
    """Tokens [b, t] to the loss of predicting the next one; the head's weight is the embedding's."""

    def __init__(self, checkpointed: bool = False) -> None:
        super().__init__()
        self.embedding, self.layer = nn.Embedding(CLASSES, FEATURES), nn.Linear(FEATURES, FEATURES)
        self.head = nn.Linear(FEATURES, CLASSES, bias=False)
        self.head.weight = self.embedding.weight
        self.checkpointed = checkpointed

    def forward(self, tokens: Tensor) -> Tensor:
        hidden = self.embedding(tokens)
        if self.checkpointed:
            hidden = checkpoint(self.block, hidden, use_reentrant=False)
        else:
            hidden = self.block(hidden)
        return shifted(self.head(hidden), tokens)

    def block(self, hidden: Tensor) -> Tensor:
        return torch.tanh(self.layer(hidden))


def trained(model: nn.Module, step: Step, batches: list[Tensor]) -> list[Tensor]:
    """Losses of the batches and gradients accumulated over them."""
    model.zero_grad(set_to_none=True)
    losses = []
    for batch in batches:
        loss = step(batch) / len(batches)
        loss.backward(retain_graph=True)
        loss.backward()
        losses.append(loss.detach())
    return [*losses, *(p.grad for p in model.parameters() if p.grad is not None)]


@both_forms
@pytest.mark.parametrize("checkpointed", [False, True])
def test_tied_weights_accumulated_gradients_and_a_second_backward(checkpointed: bool) -> None:
    model = TiedModel(checkpointed)
    batches = [torch.randint(0, CLASSES, (BATCH, TOKENS)) for _ in range(2)]
    actual = trained(model, compiled(model), batches)
    assert ("rewrite", "linear_cross_entropy.chunked x1") in events()
    eager = trained(model, model, batches)
    exact = to_float64(model)
    assert_closer(actual, eager, trained(exact, exact, batches))


def test_a_checkpointed_head_stays_right() -> None:
    def step(h: Tensor, w: Tensor, b: Tensor, y: Tensor) -> Tensor:
        loss: Tensor = checkpoint(SPELLINGS["linear"], h, w, b, y, use_reentrant=False)
        return loss

    check(step, *operands(), taken=False)


# ---------------------------------------------------------------------- plans


def test_a_plan_of_another_process_finds_the_ops() -> None:
    code = """
from fxopt.runtime.plan_ops import resolve_op
for name in ("linear_cross_entropy", "linear_cross_entropy_backward"):
    resolve_op(f"fxopt::{name}.default")
"""
    subprocess.run([sys.executable, "-c", code], check=True)


@both_forms
def test_finished_plans_are_kept(fresh_cache: Path) -> None:
    step, args = loss_of(reduction="none"), operands()
    first = with_gradients(compiled(step), *args)
    again = with_gradients(compiled(step), *args)
    assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))
    assert sum(topic == "plan" for journal in RECENT for topic, _ in journal.notes) == 2


# ---------------------------------------------------------------------- whole models


def tiny(name: str) -> nn.Module:
    """A small language model of transformers with a vocabulary of 61, dropout off."""
    transformers = pytest.importorskip("transformers")
    sizes = {"vocab_size": 61, "hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 32}
    model: nn.Module
    if name == "gpt2":
        special = {"bos_token_id": 0, "eos_token_id": 0}
        model = transformers.GPT2LMHeadModel(
            transformers.GPT2Config(vocab_size=61, n_embd=16, n_layer=1, n_head=2, n_positions=32, **special)
        )
        model.loss_type = "ForCausalLM"  # otherwise a warning that it is unknown breaks the graph between logits and loss
    elif name == "llama":
        model = transformers.LlamaForCausalLM(transformers.LlamaConfig(**sizes, num_key_value_heads=1))
    else:
        model = transformers.BertForMaskedLM(transformers.BertConfig(**sizes))
    return model.eval()


@pytest.mark.parametrize("name", ["gpt2", "llama", "bert"])
def test_models_that_return_their_loss(name: str) -> None:
    """All gradients are judged as one vector: that of BERT's key bias is zero but for rounding."""
    model = tiny(name)
    tokens = torch.randint(1, 61, (2, 12))
    labels = tokens.clone()
    labels[:, :3] = -100

    def results(module: nn.Module, compile_: Callable[[Step], Step]) -> tuple[Tensor, Tensor]:
        loss, *gradients = trained(module, compile_(lambda x: module(input_ids=x, labels=labels).loss), [tokens])
        return loss, torch.cat([g.flatten() for g in gradients])

    actual = results(model, compiled)
    assert ("rewrite", "linear_cross_entropy.chunked x1") in events(), events()
    assert_closer(actual, results(model, lambda step: step), results(to_float64(model), lambda step: step))
