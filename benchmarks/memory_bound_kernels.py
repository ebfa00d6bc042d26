"""Memory-bound kernels with their backward, over any number of rows of any length: what `memory_bound` sweeps.

`rows` x `cols` elements are the main input, in whatever shape the kernel takes it; `cols` is the length of what it reduces,
or of what lies contiguous where it reduces nothing.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks import liger
from benchmarks.kernels import add_rms_norm, column_sum, cross_entropy, gelu_mul, layer_norm, softmax, swiglu
from benchmarks.workload import ANY_LENGTH, Sizes, Values, Workload
from fxopt.report.cases import Case, Tensors, tensors_of, widened

RESIDENT = (32768, 32768)
"""Rows that fit on chip, which a statistic of the row and what is made of it then read once."""
CHANNELS, GROUPS, HEADS, IMAGE, TOKENS = 32, 8, 8, 64, 64
KEPT = 0.9


def rms_norm(x: Tensor, weight: Tensor) -> Tensor:
    wide = x.float() if x.dtype == torch.bfloat16 else x
    return (wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + 1e-6)).to(x.dtype) * weight


def dropout_add_layer_norm(x: Tensor, residual: Tensor, weight: Tensor, bias: Tensor) -> tuple[Tensor, Tensor]:
    return _add_layer_norm(F.dropout(x, 1 - KEPT), residual, weight, bias)


def _add_layer_norm(x: Tensor, residual: Tensor, weight: Tensor, bias: Tensor) -> tuple[Tensor, Tensor]:
    total = x + residual
    return layer_norm(total, weight, bias), total


def dropout_add_rms_norm(x: Tensor, residual: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
    """The residual stream is float32; its norm is cast to the dtype of `x`."""
    return _add_rms_norm(F.dropout(x, 1 - KEPT), residual, weight)


def _add_rms_norm(x: Tensor, residual: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
    total = x + residual
    return (total * torch.rsqrt(total.square().mean(-1, keepdim=True) + 1e-6)).to(x.dtype) * weight, total


def group_norm(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    return F.group_norm(x, GROUPS, weight, bias)


def group_norm_silu(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    return F.silu(F.group_norm(x, GROUPS, weight, bias))


def batch_norm_relu(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    return F.relu(F.batch_norm(x, None, None, weight, bias, training=True))


def masked_softmax(x: Tensor, mask: Tensor) -> Tensor:
    return F.softmax((x * 0.125).masked_fill(mask, float("-inf")), -1)


def weighted_cross_entropy(logits: Tensor, target: Tensor, weight: Tensor) -> Tensor:
    return F.cross_entropy(logits, target, weight, ignore_index=-100, label_smoothing=0.1)


def gelu(x: Tensor) -> Tensor:
    return F.gelu(x)


def bias_gelu(x: Tensor, bias: Tensor) -> Tensor:
    return F.gelu(x + bias)


def turn(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    first, second = x.chunk(2, -1)
    return x * cos + torch.cat((-second, first), -1) * sin


def rotary(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
    return turn(q, cos, sin), turn(k, cos, sin)


def norm_rotary(
    q: Tensor, k: Tensor, query_weight: Tensor, key_weight: Tensor, cos: Tensor, sin: Tensor
) -> tuple[Tensor, Tensor]:
    return turn(rms_norm(q, query_weight), cos, sin), turn(rms_norm(k, key_weight), cos, sin)


def embedding_norm(ids: Tensor, table: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    return layer_norm(F.embedding(ids, table), weight, bias)


def mean_pool(x: Tensor, mask: Tensor) -> Tensor:
    """The mean of the tokens that `mask` (1 or 0) keeps: [batch, tokens, width] -> [batch, width]."""
    return (x * mask).sum(1) / mask.sum(1).clamp(min=1)


def average_pool(x: Tensor) -> Tensor:
    return F.avg_pool2d(x, 2)


def max_pool(x: Tensor) -> Tensor:
    return F.max_pool2d(x, 3, 2, 1)


Inputs = Callable[[Values, int, int], tuple[Any, ...]]
Reference = Callable[[Case, Tensors], Tensors]


def _kernel(
    name: str,
    function: Callable[..., Any],
    inputs: Inputs,
    *,
    lengths: tuple[int, int] = (64, 1 << 17),
    one_pass: tuple[int, int] = (ANY_LENGTH, ANY_LENGTH),
    backward_reads: tuple[int, ...] = (0,),
    training: bool = True,
    reference: Reference | None = None,
) -> Workload:
    """`inputs(values, rows, cols)` makes the function's; `lengths` are the row lengths that it is used with."""

    def build(sizes: Sizes, device: torch.device, dtype: torch.dtype) -> Case:
        values = Values(device, dtype, grad=training)
        tensors = inputs(values, sizes["rows"], sizes["cols"])
        gradients = _gradients(function, tensors, values) if training else None
        case = Case(function, tensors, training, gradients, backward_reads=backward_reads)
        if reference is not None:
            case.random, case.reference = True, lambda outputs: reference(case, outputs)
        if name in liger.IMPLEMENTATIONS:
            case.alternatives = {"liger": lambda: _restored(replace(case, module=liger.IMPLEMENTATIONS[name]))}
        return case

    full, tiny = {"rows": 16384, "cols": max(lengths[0], 4096)}, {"rows": 128, "cols": 16}
    return Workload(name, "kernel", build, full, tiny, {"cols": lengths}, training, one_pass)


def _gradients(function: Callable[..., Any], tensors: tuple[Any, ...], values: Values) -> Tensors | None:
    """Gradients in the layout of the outputs; None for a scalar."""
    with torch.no_grad():
        outputs = tensors_of(function(*tensors))
    return None if outputs[0].dim() == 0 else tuple(values.like(o) for o in outputs)


def _restored(case: Case) -> Case:
    """`case` with a `reset` for implementations that write over their inputs or gradients."""
    tensors = tensors_of((case.inputs, case.grad_output))
    saved = [t.detach().clone() for t in tensors]

    def reset() -> None:
        with torch.no_grad():
            for tensor, value in zip(tensors, saved, strict=True):
                tensor.copy_(value)

    case.reset = reset
    return case


def _with_shown_mask(without_dropout: Callable[..., Any]) -> Reference:
    """float64 with the dropout mask that the outputs show, for functions of x and a residual that return their sum second.

    Where x was dropped its gradient is zero and the sum is the residual, both exactly. Either alone may be so by rounding.
    """

    def reference(case: Case, outputs: Tensors) -> Tensors:
        gradient = outputs[-sum(t.requires_grad for t in tensors_of(case.inputs))]
        kept = (gradient != 0) | (outputs[1] != case.inputs[1].detach())
        share, deviation = kept.double().mean().item(), (KEPT * (1 - KEPT) / kept.numel()) ** 0.5
        if abs(share - KEPT) > 6 * deviation + 1e-3:
            raise ValueError(f"dropout kept {share:.4f} of the elements instead of {KEPT}")
        mask = kept.double() / KEPT

        def masked(x: Tensor, *rest: Tensor) -> Any:
            return without_dropout(x * mask, *rest)

        return Case(masked, widened(case.inputs), True, widened(case.grad_output)).drive(masked)

    return reference


def _rows(*shapes: str) -> Inputs:
    """Tensors of `rows` x `cols` ("rc"), twice as wide ("r2c") or of `cols` ("c")."""

    def make(values: Values, rows: int, cols: int) -> tuple[Tensor, ...]:
        sizes = {"rc": (rows, cols), "r2c": (rows, 2 * cols), "c": (cols,)}
        return tuple(values(*sizes[shape]) for shape in shapes)

    return make


def _wide_residual(values: Values, rows: int, cols: int) -> tuple[Tensor, ...]:
    return values(rows, cols), values(rows, cols, dtype=torch.float32), values(cols)


def _groups(values: Values, rows: int, cols: int) -> tuple[Tensor, ...]:
    """One row is one group of CHANNELS / GROUPS channels."""
    space = max(1, cols * GROUPS // CHANNELS)
    return values(max(1, rows // GROUPS), CHANNELS, space), values(CHANNELS), values(CHANNELS)


def _channels_first(values: Values, rows: int, cols: int) -> tuple[Tensor, ...]:
    return values(max(2, rows // CHANNELS), CHANNELS, cols), values(CHANNELS), values(CHANNELS)


def _pixels(values: Values, rows: int, cols: int) -> tuple[Tensor, ...]:
    """Images of IMAGE pixels, channels last."""
    side = int(IMAGE**0.5)
    images = values.constant(max(2, rows // IMAGE), side, side, cols).permute(0, 3, 1, 2)
    return (images.requires_grad_(values.grad),)


def _pixels_and_channels(values: Values, rows: int, cols: int) -> tuple[Tensor, ...]:
    return *_pixels(values, rows, cols), values(cols), values(cols)


def _masked(values: Values, rows: int, cols: int) -> tuple[Tensor, ...]:
    return values(rows, cols), values.constant(cols) > 1.2


def _logits(values: Values, rows: int, cols: int) -> tuple[Tensor, ...]:
    return values(rows, cols), values.classes(rows, cols)


def _weighted_logits(values: Values, rows: int, cols: int) -> tuple[Tensor, ...]:
    target = values.classes(rows, cols)
    target[::7] = -100
    return values(rows, cols), target, values.constant(cols).abs()


def _heads(values: Values, rows: int, cols: int) -> tuple[Tensor, ...]:
    """Queries and keys [batch, HEADS, tokens, cols] as projections leave them: one token's heads side by side."""
    tokens = max(1, min(2048, rows // HEADS))
    batch = max(1, rows // HEADS // tokens)
    q, k = (values.constant(batch, tokens, HEADS, cols).transpose(1, 2).requires_grad_(values.grad) for _ in range(2))
    angles = values.constant(tokens, cols // 2, dtype=torch.float32)
    cos, sin = (torch.cat((t, t), -1).to(values.dtype) for t in (angles.cos(), angles.sin()))
    return q, k, cos, sin


def _normed_heads(values: Values, rows: int, cols: int) -> tuple[Tensor, ...]:
    q, k, cos, sin = _heads(values, rows, cols)
    return q, k, values(cols), values(cols), cos, sin


def _tokens(values: Values, rows: int, cols: int) -> tuple[Tensor, ...]:
    """Ids of a vocabulary of which every word occurs eight times on average."""
    vocabulary = max(2, rows // 8)
    return values.classes(rows, vocabulary), values(vocabulary, cols), values(cols), values(cols)


def _sentences(values: Values, rows: int, cols: int) -> tuple[Tensor, ...]:
    batch = max(1, rows // TOKENS)
    return values(batch, TOKENS, cols), (values.constant(batch, TOKENS, 1) < 1).to(values.dtype)


_SHORT, _CHANNELS, _CLASSES = (64, 256), (64, 8192), (1024, 1 << 17)
SWEEP = (
    _kernel("rms-norm", rms_norm, _rows("rc", "c"), one_pass=RESIDENT, backward_reads=(0, 1)),
    _kernel("add-rms-norm", add_rms_norm, _rows("rc", "rc", "c"), one_pass=RESIDENT, backward_reads=(0, 2)),
    _kernel(
        "dropout-add-rms-norm-cast",
        dropout_add_rms_norm,
        _wide_residual,
        one_pass=RESIDENT,
        backward_reads=(1, 2),
        reference=_with_shown_mask(_add_rms_norm),
    ),
    _kernel("layer-norm", layer_norm, _rows("rc", "c", "c"), one_pass=RESIDENT, backward_reads=(0, 1)),
    _kernel(
        "dropout-add-layer-norm",
        dropout_add_layer_norm,
        _rows("rc", "rc", "c", "c"),
        one_pass=RESIDENT,
        backward_reads=(1, 2),
        reference=_with_shown_mask(_add_layer_norm),
    ),
    _kernel("group-norm", group_norm, _groups, one_pass=RESIDENT, backward_reads=(0, 1)),
    _kernel("group-norm-silu", group_norm_silu, _groups, one_pass=RESIDENT, backward_reads=(0, 1, 2)),
    _kernel("batch-norm-relu-nchw", batch_norm_relu, _channels_first, one_pass=(0, 0), backward_reads=(0, 1, 2)),
    _kernel(
        "batch-norm-relu-nhwc",
        batch_norm_relu,
        _pixels_and_channels,
        lengths=_CHANNELS,
        one_pass=(0, 0),
        backward_reads=(0, 1, 2),
    ),
    _kernel("softmax", softmax, _rows("rc"), one_pass=RESIDENT),
    _kernel("masked-softmax", masked_softmax, _masked, one_pass=RESIDENT),
    _kernel("cross-entropy", cross_entropy, _logits, lengths=_CLASSES, backward_reads=(0, 1)),
    _kernel("cross-entropy-weighted", weighted_cross_entropy, _weighted_logits, lengths=_CLASSES, backward_reads=(0, 1, 2)),
    _kernel("gelu", gelu, _rows("rc")),
    _kernel("bias-gelu", bias_gelu, _rows("rc", "c"), backward_reads=(0, 1)),
    _kernel("geglu", gelu_mul, _rows("rc", "rc"), backward_reads=(0, 1)),
    _kernel("swiglu", swiglu, _rows("r2c")),
    _kernel("rotary", rotary, _heads, lengths=_SHORT, backward_reads=(2, 3)),
    _kernel("qk-norm-rotary", norm_rotary, _normed_heads, lengths=_SHORT, backward_reads=(0, 1, 2, 3, 4, 5)),
    _kernel("embedding-norm", embedding_norm, _tokens, one_pass=(RESIDENT[0], 0), backward_reads=(0, 1, 2)),
    _kernel("mean-pool", mean_pool, _sentences, backward_reads=(1,)),
    _kernel("average-pool", average_pool, _pixels, lengths=_CHANNELS, backward_reads=()),
    _kernel("max-pool", max_pool, _pixels, lengths=_CHANNELS, one_pass=(ANY_LENGTH, 0), backward_reads=()),
    _kernel("column-sum", column_sum, _rows("rc"), training=False),
)
