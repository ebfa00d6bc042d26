"""Before autograd: attention that is written out becomes a call of `scaled_dot_product_attention`.

What is looked for is a softmax over the last dimension between two products (score_chain.py reads what lies between them,
products.py the products themselves). It is replaced where a fused kernel exists (written.py) and every value stays
what it was, gradients included: score_mask.py says how masks are carried over, scored.py what becomes an op of ours. Two
differences remain: intermediate roundings to a half type are not made, and what score_mask.py names.
"""

from __future__ import annotations

import operator
from typing import Any

import torch
import torch.nn.functional as F
from torch import fx

from fxopt.passes.context import Context
from fxopt.passes.dynamo_facts import example
from fxopt.passes.hand_attention.groups import shared_heads
from fxopt.passes.hand_attention.mask_plan import Call, MaskForm, emit_mask, plan_mask
from fxopt.passes.hand_attention.products import Operand
from fxopt.passes.hand_attention.score_chain import SOFTMAX, after, before
from fxopt.passes.hand_attention.score_mask import in_heads, literal, with_lead, with_nan_results, without_hidden_rows
from fxopt.passes.hand_attention.scored import ScoredForm, emit_scored, plan_scored
from fxopt.passes.hand_attention.written import WrittenAttention, obstacle
from fxopt.passes.in_place import WrittenMemory
from fxopt.passes.sizes import Sizes


def hand_attention(context: Context) -> None:
    sizes = Sizes(context.nodes)
    for node in context.nodes:
        if context.exhausted:
            return
        if node.op != "call_function" or node.target not in SOFTMAX:
            continue
        first, second = before(node, sizes), after(node)
        if first is None or second is None:
            continue
        written = WrittenAttention(node, first, second)
        form = _form_of(written, sizes, context.options.fallback_random)
        if isinstance(form, str):
            context.reject("hand_attention", form)
        else:
            context.spend("scored" if isinstance(form, ScoredForm) else "written_out", written.result)
            _replace(context, written, form)


def _form_of(written: WrittenAttention, sizes: Sizes, fallback_random: bool) -> MaskForm | ScoredForm | str:
    """What an attention becomes, or why it stays as it is written.

    What the library computes is its call. With dropout and a mask an op of ours comes first: of the library's backends only
    the memory-efficient one takes both, and its generator keeps it out of CUDA graphs.
    """
    if written.after.drop and fallback_random:
        return "dropout with eager's own bits"
    form = obstacle(written) or plan_mask(written.scores, sizes)
    if isinstance(form, str) or (written.after.drop and form not in (MaskForm.NONE, MaskForm.CAUSAL)):
        scored = plan_scored(written, sizes)
        return form if isinstance(scored, str) else scored
    return form


def _replace(context: Context, written: WrittenAttention, form: MaskForm | ScoredForm) -> None:
    """Put the fused call where the second product stands, and take away what it replaces."""
    result, scores = written.result, written.scores

    def call(function: Any, *args: Any, **kwargs: Any) -> fx.Node:
        return context.call(function, args, result, kwargs)

    def operand(given: Operand, transposed: bool = False) -> fx.Node:
        x = given.node if given.order is None else call(torch.permute, given.node, given.order)
        x = call(torch.transpose, x, -1, -2) if transposed else x
        if len(written.leads[0]) != 2 or written.heads is not None:
            x = call(in_heads, x, literal(written.leads[0]) if written.heads else None, written.heads)
        if x.meta["example_value"].dtype != scores.dtype:
            x = call(torch.Tensor.to, x, scores.dtype)  # as autocast has it
        return x if x.meta["example_value"].stride(-1) == 1 else call(torch.Tensor.contiguous, x)

    first = written.before.product.first
    if written.before.factors:
        x = first.node if first.order is None else call(torch.permute, first.node, first.order)
        for factor in written.before.factors:
            x = call(torch.mul, x, factor)
        first = Operand(x)
    query, key = operand(first), operand(written.before.product.second, transposed=True)
    value = operand(written.after.product.second)
    if isinstance(form, ScoredForm):
        shared = shared_heads(written.before.product.second, transposed=True), shared_heads(written.after.product.second)
        memory = WrittenMemory(context.nodes)  # they were copied before, and are read here
        if written.heads is None and all(x is not None and x not in memory for x in shared):
            key, value = (operand(Operand(x)) for x in shared if x is not None)
        out = emit_scored(call, written, form, (query, key, value))
    else:
        if written.one_for_all_heads:
            heads = query.meta["example_value"].shape[1]
            key, value = (
                call(torch.Tensor.contiguous, call(torch.Tensor.expand, x, -1, heads, -1, -1)) for x in (key, value)
            )
        out = _fused(call, written, form, (query, key, value))
    new = _as_result(call, written, out)
    new.meta["example_value"] = result.meta["example_value"]
    result.replace_all_uses_with(new)
    for node in (result, *reversed(written.inner)):  # dead in-place calls would not go by themselves
        context.graph.gm.graph.erase_node(node)


def _fused(call: Call, written: WrittenAttention, form: MaskForm, operands: tuple[fx.Node, fx.Node, fx.Node]) -> fx.Node:
    """The library's call [B, H, S, E]."""
    query, key, value = operands
    mask = emit_mask(call, written.scores, form)
    if mask.hidden is not None:
        query = call(without_hidden_rows, query, mask.hidden)
    options = {"dropout_p": written.after.drop, "is_causal": form is MaskForm.CAUSAL, "scale": written.before.scale}
    out = call(F.scaled_dot_product_attention, query, key, value, attn_mask=mask.mask, **options)
    return call(with_nan_results, out, value, mask.hidden) if form is MaskForm.NAN_RESULTS else out


def _as_result(call: Call, written: WrittenAttention, out: fx.Node) -> fx.Node:
    """A fused result [B, H, S, E] in the shape of the product that it replaces, and where that shows, in its strides."""
    result, order = written.result, written.after.product.order
    shows = not _only_copied(result)
    permuted = order is not None and not result.meta["example_value"].is_contiguous()
    if permuted and shows:
        out = call(torch.Tensor.contiguous, out)
    if written.heads is not None:
        out = call(with_lead, out, literal(written.leads[-1]))
    elif len(written.leads[-1]) < 2:
        out = call(operator.getitem, out, (0,) * (2 - len(written.leads[-1])))
    if order is not None:
        out = call(torch.permute, out, order)
    return call(torch.Tensor.contiguous, out) if shows and not permuted else out


def _only_copied(result: fx.Node) -> bool:
    """Whether a result is only permuted and then copied, so that its strides do not show."""
    if len(result.users) != 1 or len((swap := next(iter(result.users))).users) != 1:
        return False
    copy = next(iter(swap.users))
    shown = example(copy)
    if shown is None or swap.target not in SWAPS or copy.target not in COPIES:
        return False
    return copy.args[0] is swap and shown.is_contiguous()


SWAPS = frozenset({torch.transpose, torch.permute, "permute"})
COPIES = frozenset({"contiguous", "reshape", "flatten"})
