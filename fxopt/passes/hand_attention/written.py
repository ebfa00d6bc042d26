"""One attention that is written out, as a value, and what keeps it from being replaced by a fused call."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import fx

from fxopt.ir.spec import known_different, known_equal
from fxopt.passes.attention import DTYPES, chooses_late
from fxopt.passes.dynamo_facts import example, is_special
from fxopt.passes.hand_attention.mask_plan import MaskedScores
from fxopt.passes.hand_attention.products import Operand
from fxopt.passes.hand_attention.score_chain import After, Before, softmax_dim
from fxopt.passes.hand_attention.score_mask import UNKNOWN, Lead, literal
from fxopt.passes.in_place import WrittenMemory, writes

MIN_CPU_SCORES = 1 << 15
"""Scores of a head (S * T) from which the fused kernel is faster on CPUs; below, generated code between two products is."""

MAX_CUDA_HEAD = 256
CUDA_HEAD_MULTIPLE = 8
"""Head sizes that the fused CUDA kernels take as they are."""


@dataclass(frozen=True)
class WrittenAttention:
    """One attention as it is written out."""

    softmax: fx.Node
    before: Before
    after: After

    @property
    def result(self) -> fx.Node:
        return self.after.nodes[-1]

    @cached_property
    def inner(self) -> tuple[fx.Node, ...]:
        """What disappears, but for the result."""
        return (*self.before.nodes, self.softmax, *self.after.nodes[:-1])

    @cached_property
    def operands(self) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """What query [*lead, S, E], key [*lead, T, E] and value [*lead, T, Ev] look like."""
        product = self.before.product
        return _shown(product.first), _shown(product.second).mT, _shown(self.after.product.second)

    @cached_property
    def one_for_all_heads(self) -> bool:
        """Whether all heads of a batch broadcast one head of keys and one of values (multi-query attention)."""
        query, key, value = self.operands
        if query.dim() != 4 or self.reshaped or self.before.product.order is not None or known_equal(query.shape[1], 1):
            return False
        return all(known_equal(x.shape[0], query.shape[0]) and known_equal(x.shape[1], 1) for x in (key, value))

    @cached_property
    def leads(self) -> list[Lead]:
        """The leading sizes of the scores and probabilities, step by step."""
        return [tuple(shown.shape[:-2]) for node in self.inner if (shown := example(node)) is not None]

    @cached_property
    def reshaped(self) -> bool:
        """Whether the leading sizes have to be viewed as two; otherwise 1s in front make two of them."""
        first = self.leads[0]
        return len(first) > 2 or not all(_same(lead, first) for lead in self.leads)

    @cached_property
    def heads(self) -> tuple[int, int] | None:
        """The two leading sizes of the fused call, where they have to be given; UNKNOWN for one that is a symbol."""
        if not self.reshaped:
            return None
        *rest, last = literal(next((lead for lead in self.leads if len(lead) == 2), self.leads[0]))
        return (UNKNOWN if UNKNOWN in rest else math.prod(rest)), last

    @property
    def scores(self) -> MaskedScores:
        """What the mask is planned from."""
        query, key, _ = self.operands
        result = self.result.meta["example_value"]
        rows, columns = query.shape[-2], key.shape[-2]
        return MaskedScores(self.before.masks, self.heads, rows, columns, result.dtype, result.requires_grad)


def obstacle(written: WrittenAttention) -> str | None:
    """Why an attention has to stay as it is written, masks aside (see mask_plan.py), or None."""
    return next((reason for check in CHECKS if (reason := check(written))), None)


def obstacle_to_scoring(written: WrittenAttention) -> str | None:
    """As `obstacle`, for an op that caps scores, has a gradient for what is added to them, and values of any size."""
    lifted = (_cap, _mask_gradients, _value_size)
    return next((reason for check in CHECKS if check not in lifted and (reason := check(written))), None)


def _dropout(written: WrittenAttention) -> str | None:
    drop, result = written.after.drop, example(written.result)
    if not drop:
        return None
    if result is None or not chooses_late(result.device):
        return "dropout, on a device without a fused kernel for it"
    return None if drop < 1 else "dropout of everything"


def _other_use(written: WrittenAttention) -> str | None:
    """Also of kinds that a count of users does not show: the scores as their own mask, the probabilities as the values."""
    inner = set(written.inner)
    operands = [*written.before.product.operands, written.after.product.second.node, *(m.mask for m in written.before.masks)]
    if any(len(_readers(node)) != 1 for node in inner) or inner.intersection(operands):
        return "the scores or the probabilities have another use"
    return None


def _readers(node: fx.Node) -> list[fx.Node]:
    """The users of a value, without those that only ask for its type."""
    return [user for user in node.users if user.target != "type_as" or user.args[0] is node]


def _special(written: WrittenAttention) -> str | None:
    nodes = {a for node in (*written.inner, written.result) for a in (node, *node.all_input_nodes)}
    tensors = [shown for node in nodes if (shown := example(node)) is not None]
    return "a tensor subclass, a transformed or a nested tensor" if any(map(is_special, tensors)) else None


def _axes(written: WrittenAttention) -> str | None:
    scores = example(written.softmax)
    if scores is None or softmax_dim(written.softmax) not in (-1, scores.dim() - 1):
        return "the softmax is not over the last dimension"
    shapes = [shown.shape[-2:] for node in written.inner if (shown := example(node)) is not None]
    return None if all(_same(shape, shapes[0]) for shape in shapes) else "the scores change their shape"


def _types(written: WrittenAttention) -> str | None:
    """The products have one type, autocast's or the operands'; in between float32 is as good."""
    shown = [example(node) for node in (*written.inner, written.result)]
    scores, result = shown[0], shown[-1]
    if scores is None or result is None or result.dtype not in DTYPES:
        return "element types without a fused kernel"
    if scores.dtype != result.dtype and not all(_widened(x, result.dtype) for x in written.before.product.operands):
        return "element types without a fused kernel"
    if any(x is None or x.dtype not in (result.dtype, torch.float32) or x.device != result.device for x in shown):
        return "element types or devices that change on the way"
    return None


def _widened(node: fx.Node, dtype: torch.dtype) -> bool:
    """Whether a float32 tensor has values of `dtype`, which a fused kernel multiplies as exactly (as GPT-J has it)."""
    while node.op in ("call_method", "call_function") and node.target in REARRANGING and node.args:
        source = node.args[0]
        if not isinstance(source, fx.Node):
            return False
        node = source
    if node.op != "call_method" or node.target not in CASTS:
        return False
    shown, source = example(node), example(node.args[0])
    return shown is not None and source is not None and shown.dtype == torch.float32 and source.dtype == dtype


REARRANGING = frozenset({torch.transpose, torch.permute, "transpose", "permute", "contiguous", "view", "reshape"})
CASTS = frozenset({"to", "float", "type"})


def _shapes(written: WrittenAttention) -> str | None:
    query, key, value = written.operands
    if not (query.dim() == key.dim() == value.dim()):
        return "operands of different dimensions"
    if not all(_same(x.shape[:-2], query.shape[:-2]) for x in (key, value)) and not written.one_for_all_heads:
        return "batch or heads that broadcast"
    if any(not known_different(size, 0) for x in (query, key, value) for size in x.shape):
        return "sizes that may be zero"
    return _views(written) if written.reshaped else None


def _value_size(written: WrittenAttention) -> str | None:
    query, _, value = written.operands
    return None if known_equal(query.shape[-1], value.shape[-1]) else "values of another size than keys"


def _views(written: WrittenAttention) -> str | None:
    *_, last = written.heads or (1,)
    if last == UNKNOWN or (any(UNKNOWN in literal(lead) for lead in written.leads) and max(map(len, written.leads)) > 2):
        return "symbolic sizes in a view of the scores"
    first, *others = (math.prod(lead) for lead in written.leads)
    return None if all(known_equal(size, first) for size in others) else "scores that are broadcast"


def _gradients(written: WrittenAttention) -> str | None:
    scores, result = example(written.before.nodes[0]), example(written.result)
    query, key, _ = written.operands
    if scores is None or result is None or not result.requires_grad:
        return None
    shown = (query, key, example(written.before.product.added))
    if scores.requires_grad is not any(x is not None and x.requires_grad for x in shown):
        return "the grad mode changes between the products"
    return None


def _mask_gradients(written: WrittenAttention) -> str | None:
    result = example(written.result)
    if result is None or not result.requires_grad:
        return None
    masks = [shown for m in written.before.masks if (shown := example(m.mask)) is not None]
    return "a gradient is wanted for the mask" if any(m.requires_grad for m in masks) else None


def _write_between(written: WrittenAttention) -> str | None:
    """What was read before the second product is read there now: nothing may have written into it."""
    inner, read = set(written.inner), list[fx.Node]()
    node = written.before.nodes[0]
    while node is not written.result:
        if node in inner:
            read += node.all_input_nodes
        elif writes(node):
            memory = WrittenMemory([node])
            if any(operand in memory for operand in read):
                return "an operand is written in place between the products"
        node = node.next
    return None


def _layout(written: WrittenAttention) -> str | None:
    """Dynamo has chosen by the result's strides what follows: they must be a matrix product's, permuted or not."""
    result, order = example(written.result), written.after.product.order
    inverse = None if order is None else [order.index(dim) for dim in range(len(order))]
    known = result is not None and (result.is_contiguous() or (inverse and result.permute(inverse).is_contiguous()))
    return None if known else "a result of unusual strides"


def _kernel(written: WrittenAttention) -> str | None:
    query, key, _ = written.operands
    rows, columns, size, device = query.shape[-2], key.shape[-2], query.shape[-1], query.device.type
    if device == "cuda":
        fits = isinstance(size, int) and size <= MAX_CUDA_HEAD and size % CUDA_HEAD_MULTIPLE == 0
        return None if fits else "a head size without a fused kernel"
    if device != "cpu":
        return f"no fused kernel for {device}"
    small = isinstance(rows, int) and isinstance(columns, int) and rows * columns < MIN_CPU_SCORES
    return "too few scores for the fused kernel to be faster" if small else None


def _shown(operand: Operand) -> torch.Tensor:
    """What an operand looks like as [*batch, rows, columns]."""
    shown: torch.Tensor = operand.node.meta["example_value"]
    return shown if operand.order is None else shown.permute(operand.order)


def _same(sizes: Lead, others: Lead) -> bool:
    return len(sizes) == len(others) and all(map(known_equal, sizes, others))


def _cap(written: WrittenAttention) -> str | None:
    return "capped scores" if written.before.cap is not None else None


def _scale(written: WrittenAttention) -> str | None:
    factors = (written.before.scale, written.before.cap or 0.0)
    return None if all(map(math.isfinite, factors)) else "a scale that is not a finite literal"


CHECKS: tuple[Callable[[WrittenAttention], str | None], ...] = (
    *(_dropout, _cap, _scale, _other_use, _special, _axes, _types, _shapes, _value_size, _gradients, _mask_gradients),
    *(_write_between, _layout, _kernel),
)
"""Each says why an attention stays as it is written, or None."""
