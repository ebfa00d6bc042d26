"""`fxopt::linear_cross_entropy`: a linear layer and the cross-entropy of its logits, a few rows of logits at a time.

With a large vocabulary the logits, their logarithmic softmax and two gradients of that size are most of a training step's
memory. Here rows are taken in chunks: a chunk's logits become losses and then, in place, the gradient of the logits, which
goes into the gradients of the operands at once. So the forward of a training step does all three products, as many as eager
does, and the backward only scales. Rows whose label is `ignore_index` are left out from the start: they cost nothing.

Where the gradient of the loss has to be known first, the backward computes the logits again (a fourth product): for
reduction "none", which has one such gradient per row, and for float16, whose range a gradient scaler's factor has to fit.

Importing the module registers two ops, whose operands are

    hidden [N, K], weight [V, K], bias [V] or None     of one floating dtype
    labels [N]                                         int64, each in [0, V) or ignore_index
    class_weight [V] or None                           of the loss's dtype

- `fxopt::linear_cross_entropy(hidden, weight, bias, labels, class_weight, reduction, ignore_index, label_smoothing, dtype,
  wanted)`: (loss, gradient of hidden, of weight, of bias); what `wanted` (three booleans) leaves out has no elements. The
  loss has `dtype`, shape [N] for reduction "none" and () for "mean" and "sum". Logits are rounded to hidden's dtype as a
  linear layer's are; their softmax is computed in `dtype`, or float32 where that is wider.
- `fxopt::linear_cross_entropy_backward(grad_loss, <the same>)`: the three gradients.

Both raise IndexError on CPUs for a label that is out of range; on CUDA a device-side assertion fails, as in eager. The
number of rows that count has to be known on the host, so on CUDA the op waits for the labels. There it is what remains for
dynamic sizes: otherwise lowering takes it apart (lower/ops/linear_cross_entropy.py), into chunks that `plan_chunks` decides.

- `fxopt::add_product_(total, a, b, keep)`: total = a @ b, plus its old value if `keep`. Before it is added to a wider total,
  the product is not rounded to the type of a and b, where the device has that.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

_OPERANDS = (
    "Tensor hidden, Tensor weight, Tensor? bias, Tensor labels, Tensor? class_weight, str reduction, int ignore_index, "
    "float label_smoothing, ScalarType dtype, bool[3] wanted"
)

MIN_CHUNK, MAX_CHUNK, CHUNKS = 512, 4096, 4
"""Rows of a chunk: with fewer, reading the weight and its gradient once a chunk takes longer than multiplying; with more,
nothing is gained. And into how many chunks even few rows are split."""

BLOCK_BYTES = {"cpu": 32 << 20, "cuda": 128 << 20}
"""Logits whose softmax is computed at a time: about a CPU's cache, and enough that its threads seldom wait for each other;
on a GPU, work for all of it."""


def chunk_rows(rows: int, features: int) -> int:
    """Rows of one chunk, as even as can be.

    With as many rows as features, the logits of a chunk take as much memory as the weight, of which the gradient needs a
    second copy anyway when it is scaled or rounded.
    """
    limit = max(1, min(max(features, MIN_CHUNK), MAX_CHUNK, -(-rows // CHUNKS)))
    return -(-rows // -(-rows // limit)) if rows else 1


SHARE = 6
"""What chunks may need of the memory that eager needs for three tensors of logits in the loss's type: a sixth, so that with
the gradient of the hidden states and a library's workspace it is a fifth."""

MOST_ROUNDINGS, MOST_CHUNKS = 8, 32
"""Into how many chunks rows are split to need no more than SHARE, and however many rows there are."""


@dataclass(frozen=True)
class Chunks:
    """Rows of a chunk (the last may have fewer), and the type in which the chunks' gradients of the weight are summed."""

    rows: int
    sums: torch.dtype


def plan_chunks(
    rows: int, features: int, dtype: torch.dtype, loss_dtype: torch.dtype, differentiated: bool, sums_weight: bool
) -> Chunks:
    """The chunks of an op that is taken apart, whose operands have `dtype`.

    Chunks are as large as memory allows, up to MAX_CHUNK rows: each reads and writes the sums of the weight's gradient once.
    Those are in float32 for half precision, unless they alone would take what SHARE allows: then bfloat16, rounded once for
    each of at most MOST_ROUNDINGS chunks (once in eager). float16 has no range for sums of scaled gradients.
    """
    spare = 3 * rows * loss_dtype.itemsize // SHARE  # bytes a class, as is all below
    fewest = max(MIN_CHUNK, -(-rows // MOST_ROUNDINGS)) * dtype.itemsize
    sums = torch.promote_types(dtype, torch.float32)
    needed = 0
    if differentiated and sums_weight:
        needed = features * (sums.itemsize + (dtype.itemsize if sums != dtype else 0))
        if dtype == torch.bfloat16 and needed + fewest > spare:
            sums, needed = dtype, features * dtype.itemsize
    limit = min(max(spare - needed, fewest) // dtype.itemsize, MAX_CHUNK)
    count = -(-rows // max(limit, -(-rows // MOST_CHUNKS)))
    even = next((n for n in range(count, 2 * count) if rows % n == 0), count)  # a last chunk of its own size is more kernels
    return Chunks(-(-rows // even), sums)


def _block_rows(classes: int, dtype: torch.dtype, device: torch.device) -> int:
    rows = BLOCK_BYTES.get(device.type, BLOCK_BYTES["cuda"]) // (classes * dtype.itemsize)
    return max(rows, torch.get_num_threads() if device.type == "cpu" else 1)


def _slices(start: int, stop: int, step: int) -> Iterator[slice]:
    return (slice(i, min(i + step, stop)) for i in range(start, stop, step))


@dataclass(frozen=True)
class _Loss:
    """The rows that count (None: all), what depends on their labels, and how their losses are put together.

    `labels` [n] int64; `row_weight` [n] and `class_weight` [V] in `dtype`, None where all are 1; `every` is the sum of all
    classes' weights.
    """

    rows: Tensor | None
    labels: Tensor
    row_weight: Tensor | None
    class_weight: Tensor | None
    every: Tensor | int
    reduction: str
    smoothing: float
    classes: int
    dtype: torch.dtype

    @classmethod
    def of(
        cls,
        labels: Tensor,
        class_weight: Tensor | None,
        reduction: str,
        ignore_index: int,
        smoothing: float,
        classes: int,
        dtype: torch.dtype,
    ) -> _Loss:
        """Raises IndexError for a label out of range on a CPU."""
        kept = (labels != ignore_index).nonzero().squeeze(1)
        rows = None if len(kept) == len(labels) else kept
        counted = labels if rows is None else labels[rows]
        _check_range(counted, classes)
        wide = torch.promote_types(dtype, torch.float32)
        class_weight = None if class_weight is None else class_weight.to(wide)
        row_weight = None if class_weight is None else class_weight[counted]
        every = classes if class_weight is None else class_weight.sum()
        return cls(rows, counted, row_weight, class_weight, every, reduction, smoothing, classes, wide)

    def counted(self, x: Tensor) -> Tensor:
        """The rows of `x` [N, ...] that count."""
        return x if self.rows is None else x.index_select(0, self.rows)

    def total(self) -> Tensor:
        """What a mean divides by: the labels' weights summed, in `dtype`."""
        weights = self.labels.new_ones(self.labels.shape, dtype=self.dtype) if self.row_weight is None else self.row_weight
        return weights.sum()

    def reduce(self, losses: Tensor, count: int, dtype: torch.dtype) -> Tensor:
        """The loss from those of the rows that count; of all `count` rows, the others have none."""
        if self.reduction == "none":
            return _spread(losses, self.rows, count).to(dtype)
        return (losses.sum() / self.total() if self.reduction == "mean" else losses.sum()).to(dtype)

    def per_row(self, grad_loss: Tensor) -> Tensor:
        """The factor of each counted row's gradient, [n] in `dtype`."""
        grad_loss = grad_loss.to(self.dtype)
        if self.reduction == "none":
            return self.counted(grad_loss)
        factor = grad_loss / self.total() if self.reduction == "mean" else grad_loss
        return factor.expand(len(self.labels))

    def label_and_spread(self, logits: Tensor, p: Tensor, rows: slice) -> tuple[Tensor, Tensor | None]:
        """Overwrite `p` [r, V] with the softmax of `logits` [r, V] (the same memory, or of `dtype`).

        Returns the label's log p_t [r, 1] and, for label smoothing, the sum over c of w_c log p_c [r, 1].
        """
        top = logits.amax(1, keepdim=True).to(self.dtype)
        at_label = logits.gather(1, self.labels[rows, None]).to(self.dtype)
        spread = self._over_classes(logits) if self.smoothing else None
        torch.ops.aten.softmax.int_out(logits, 1, self.dtype, out=p)
        log_total = top - p.amax(1, keepdim=True).log()  # the largest p is at least 1 / V: its logarithm is accurate
        if spread is not None:
            spread -= log_total * self.every
        return at_label - log_total, spread

    def _over_classes(self, x: Tensor) -> Tensor:
        """The sum over c of w_c x_c, [r, 1]."""
        if self.class_weight is None:
            return x.sum(1, keepdim=True, dtype=self.dtype)
        return x.to(self.dtype) @ self.class_weight[:, None]

    def losses(self, log_p: Tensor, spread: Tensor | None, rows: slice) -> Tensor:
        """The losses of `rows` from what `label_and_spread` returned.

        As `torch.nn.functional.cross_entropy` defines them: (1 - s) w_t (-log p_t) + s / V * sum over c of w_c (-log p_c).
        """
        out = -log_p
        if self.row_weight is not None:
            out *= self.row_weight[rows, None]
        if spread is not None:
            out = (1 - self.smoothing) * out - self.smoothing / self.classes * spread
        return out.squeeze(1)

    def make_slopes(self, p: Tensor, log_p: Tensor, rows: slice, factor: Tensor | None) -> None:
        """Turn `p` [r, V] into the gradient of the rows' losses in the logits, times `factor` [n].

        It is a * p_c - s / V * w_c, with a = (1 - s) w_t + s / V * sum of w, less (1 - s) w_t for the label's class: there
        from log p_t, in a form that does not cancel where p_t is close to 1.
        """
        at_label, share = torch.expm1(log_p), self.smoothing / self.classes
        if self.row_weight is not None:
            own = self.row_weight[rows, None]
            scale = (1 - self.smoothing) * own + share * self.every
            p *= scale
            at_label = scale * at_label + share * (self.every - own)
        elif self.smoothing:
            at_label += share * (self.classes - 1)
        if self.smoothing:
            p -= share if self.class_weight is None else share * self.class_weight
        p.scatter_(1, self.labels[rows, None], at_label)
        if factor is not None:
            p *= factor[rows, None]


class _Gradients:
    """The gradients of hidden (the rows that count), weight and bias, chunk by chunk; None where not wanted.

    Those of weight and bias are sums over chunks, in float32 at least: in half precision each chunk would round them.
    """

    def __init__(self, hidden: Tensor, weight: Tensor, wanted: Sequence[bool]) -> None:
        self.weight, wide = weight, torch.promote_types(hidden.dtype, torch.float32)
        self.of_hidden = hidden.new_empty(hidden.shape) if wanted[0] else None
        empty = weight.new_empty if len(hidden) else weight.new_zeros
        self.of_weight = empty(weight.shape, dtype=wide) if wanted[1] else None
        self.of_bias = weight.new_zeros(len(weight), dtype=wide) if wanted[2] else None

    def add(self, rows: slice, hidden: Tensor, slopes: Tensor) -> None:
        """Take in `rows`, whose operand is `hidden` [c, K] and whose logits have the gradient `slopes` [c, V]."""
        if self.of_hidden is not None:
            torch.mm(slopes, self.weight, out=self.of_hidden[rows])
        if self.of_weight is not None:
            _add_product(self.of_weight, slopes.t(), hidden, beta=1 if rows.start else 0)
        if self.of_bias is not None:
            self.of_bias += slopes.sum(0, dtype=self.of_bias.dtype)

    def finished(self, rows: Tensor | None, count: int, divisor: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
        """All three, divided by `divisor`, in the weight's dtype; hidden's for all `count` rows, of which `rows` counted."""
        found = []
        for gradient in (self.of_hidden, self.of_weight, self.of_bias):
            if gradient is None:
                found.append(self.weight.new_empty(0))
                continue
            if divisor is not None:
                gradient /= divisor
            found.append(gradient.to(self.weight.dtype))
        hidden, weight, bias = found
        return hidden if self.of_hidden is None else _spread(hidden, rows, count), weight, bias


def _add_product(total: Tensor, a: Tensor, b: Tensor, beta: int) -> None:
    """total = beta * total + a @ b, the product unrounded where the device has that. With beta 0, total may be unset."""
    if total.dtype == a.dtype:
        total.addmm_(a, b, beta=beta)
    elif _adds_wide_products(a.device, a.dtype, total.dtype):
        torch.addmm(total, a, b, out_dtype=total.dtype, beta=beta, out=total)
    elif beta:
        total += a @ b
    else:
        total.copy_(a @ b)


def _add_product_in_place(total: Tensor, a: Tensor, b: Tensor, keep: bool) -> None:
    _add_product(total, a, b, int(keep))


@functools.cache
def _adds_wide_products(device: torch.device, dtype: torch.dtype, wide: torch.dtype) -> bool:
    """Whether `addmm` on this device takes operands of `dtype` and adds their product to a tensor of `wide`.

    Some versions of torch want the operands' dtype there, and CPUs have no such product at all.
    """
    ones, total = torch.ones((16, 16), dtype=dtype, device=device), torch.ones((16, 16), dtype=wide, device=device)
    try:
        torch.addmm(total, ones, ones, out_dtype=wide, out=total)
    except (RuntimeError, TypeError):
        return False
    return bool((total == 17).all())


def _spread(x: Tensor, rows: Tensor | None, count: int) -> Tensor:
    """`x` [n, ...] as `rows` of zeros [count, ...]; rows None: `x` is all of them."""
    return x if rows is None else x.new_zeros((count, *x.shape[1:])).index_copy_(0, rows, x)


def _check_range(labels: Tensor, classes: int) -> None:
    if labels.device.type != "cpu":
        return
    wrong = labels[(labels < 0) | (labels >= classes)]
    if len(wrong):
        raise IndexError(f"Target {int(wrong[0])} is out of bounds.")


def _compute(
    grad_loss: Tensor | None,
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    labels: Tensor,
    class_weight: Tensor | None,
    reduction: str,
    ignore_index: int,
    label_smoothing: float,
    dtype: torch.dtype,
    wanted: Sequence[bool],
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The loss and the wanted gradients; those times `grad_loss`, if it is known."""
    classes = len(weight)
    terms = _Loss.of(labels, class_weight, reduction, ignore_index, label_smoothing, classes, dtype)
    counted = terms.counted(hidden)
    count = len(counted)
    factor = None if grad_loss is None else terms.per_row(grad_loss)
    gradients = _Gradients(counted, weight, wanted)
    losses = hidden.new_empty(count, dtype=terms.dtype)
    chunk = chunk_rows(*counted.shape)
    block = min(chunk, _block_rows(classes, terms.dtype, hidden.device))
    all_logits = hidden.new_empty((chunk, classes))
    wide = None if terms.dtype == hidden.dtype else hidden.new_empty((block, classes), dtype=terms.dtype)
    for rows in _slices(0, count, chunk):
        logits = all_logits[: rows.stop - rows.start]
        _linear(counted[rows], weight, bias, out=logits)
        for part in _slices(rows.start, rows.stop, block):
            here = logits[part.start - rows.start : part.stop - rows.start]
            p = here if wide is None else wide[: len(here)]
            log_p, spread = terms.label_and_spread(here, p, part)
            losses[part] = terms.losses(log_p, spread, part)
            if any(wanted):
                terms.make_slopes(p, log_p, part, factor)
                here.copy_(p)
        gradients.add(rows, counted[rows], logits)
    del all_logits, wide  # casts of the gradients may need as much
    divisor = terms.total() if reduction == "mean" and factor is None and count else None
    loss = terms.reduce(losses, len(labels), dtype)
    return (loss, *gradients.finished(terms.rows, len(labels), divisor))


def _linear(hidden: Tensor, weight: Tensor, bias: Tensor | None, out: Tensor) -> None:
    if bias is None:
        torch.mm(hidden, weight.t(), out=out)
    else:
        torch.addmm(bias, hidden, weight.t(), out=out)


def _fake_gradients(hidden: Tensor, weight: Tensor, wanted: Sequence[bool]) -> tuple[Tensor, Tensor, Tensor]:
    shapes = (hidden.shape, weight.shape, weight.shape[:1])
    of_hidden, of_weight, of_bias = (weight.new_empty(s if w else (0,)) for s, w in zip(shapes, wanted, strict=True))
    return of_hidden, of_weight, of_bias


def _fake(hidden: Tensor, weight: Tensor, *rest: Any) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    _, labels, _, reduction, _, _, dtype, wanted = rest
    loss = hidden.new_empty(labels.shape if reduction == "none" else (), dtype=dtype)
    return (loss, *_fake_gradients(hidden, weight, wanted))


def _forward(*operands: Any) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    return _compute(None, *operands)


def _backward(grad_loss: Tensor, *operands: Any) -> tuple[Tensor, Tensor, Tensor]:
    return _compute(grad_loss, *operands)[1:]


def _fake_backward(grad_loss: Tensor, hidden: Tensor, weight: Tensor, *rest: Any) -> tuple[Tensor, Tensor, Tensor]:
    return _fake_gradients(hidden, weight, rest[-1])


_TENSORS = 5
"""The first operands are tensors (or None), the others settings, `wanted` last."""


def _save_for_backward(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    ctx.set_materialize_grads(False)
    *ctx.settings, ctx.found = inputs[_TENSORS:]
    ctx.operands = len(inputs)
    ctx.save_for_backward(*(output[1:] if any(ctx.found) else inputs[:_TENSORS]))


def _differentiate(ctx: Any, grad_loss: Tensor | None, *_: Any) -> tuple[Tensor | None, ...]:
    if grad_loss is None:
        return (None,) * ctx.operands
    wanted = list(ctx.needs_input_grad[:3])
    if any(ctx.found):
        found = [_scaled(saved, grad_loss) for saved in ctx.saved_tensors]
    else:
        found = linear_cross_entropy_backward(grad_loss, *ctx.saved_tensors, *ctx.settings, wanted)
    kept = [x if w else None for x, w in zip(found, wanted, strict=True)]
    return (*kept, *(None,) * (ctx.operands - len(kept)))


def _scaled(gradient: Tensor, factor: Tensor) -> Tensor:
    return (gradient.to(factor.dtype) * factor).to(gradient.dtype)


def linear_cross_entropy(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    labels: Tensor,
    class_weight: Tensor | None,
    reduction: str,
    ignore_index: int,
    label_smoothing: float,
    dtype: torch.dtype,
) -> Tensor:
    """The loss alone, differentiable in hidden, weight and bias: what a rewritten graph calls. Parameters: see above."""
    at_once = torch.is_grad_enabled() and reduction != "none" and hidden.dtype != torch.float16
    wanted = [at_once and x is not None and x.requires_grad for x in (hidden, weight, bias)]
    settings = (reduction, ignore_index, label_smoothing, dtype)
    loss: Tensor = linear_cross_entropy_op(hidden, weight, bias, labels, class_weight, *settings, wanted)[0]
    return loss


_LIBRARY = torch.library.Library("fxopt", "FRAGMENT")
_TAGS = (torch.Tag.pt2_compliant_tag,)
_LIBRARY.define(f"linear_cross_entropy({_OPERANDS}) -> (Tensor, Tensor, Tensor, Tensor)", tags=_TAGS)
_LIBRARY.define(f"linear_cross_entropy_backward(Tensor grad_loss, {_OPERANDS}) -> (Tensor, Tensor, Tensor)", tags=_TAGS)
_LIBRARY.define("add_product_(Tensor(a!) total, Tensor a, Tensor b, bool keep) -> ()", tags=_TAGS)
_LIBRARY.impl("add_product_", _add_product_in_place, "CompositeExplicitAutograd")
_LIBRARY.impl("linear_cross_entropy", _forward, "CompositeExplicitAutograd")
_LIBRARY.impl("linear_cross_entropy_backward", _backward, "CompositeExplicitAutograd")
torch.library.register_fake("fxopt::linear_cross_entropy", _fake, lib=_LIBRARY)
torch.library.register_fake("fxopt::linear_cross_entropy_backward", _fake_backward, lib=_LIBRARY)
torch.library.register_autograd(
    "fxopt::linear_cross_entropy", _differentiate, setup_context=_save_for_backward, lib=_LIBRARY
)

linear_cross_entropy_op = torch.ops.fxopt.linear_cross_entropy.default
linear_cross_entropy_backward = torch.ops.fxopt.linear_cross_entropy_backward.default
