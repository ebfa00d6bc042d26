"""Before autograd: torch's fast path of a transformer's encoder layer is taken apart into the calls of its slow path.

Where no gradient is recorded, `nn.TransformerEncoderLayer` is one operator, `torch._transformer_encoder_layer_fwd`. Nothing
fuses with what is inside it, and calibration and quantization do not see its layers. Here it becomes linear layers, norms
and a call of `scaled_dot_product_attention`, attributed to the modules whose weights they read: the layers have the names
that they have where gradients are recorded.

Values are the operator's. They differ from the slow path's in three ways: whatever is not zero in a mask hides, a row that
is hidden throughout is NaN, and on CUDA GELU is its approximation by tanh. Nested tensors are left to the operator.
"""

from __future__ import annotations

import math
import operator
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import fx, nn

from fxopt.passes.context import Context
from fxopt.passes.dynamo_facts import example, is_special, with_grad_mode
from fxopt.passes.hand_attention.mask_plan import MaskedScores, MaskForm, emit_mask, plan_mask
from fxopt.passes.hand_attention.score_mask import Filled
from fxopt.passes.in_place import WrittenMemory
from fxopt.passes.sizes import Sizes

OPERATOR = torch.ops.aten._transformer_encoder_layer_fwd
SPELLINGS = frozenset({torch._transformer_encoder_layer_fwd, OPERATOR, OPERATOR.default})
PARAMETERS = tuple(argument.name for argument in OPERATOR.default._schema.arguments)

ROWS_AND_COLUMNS, PADDING, WHOLE = 0, 1, 2
"""The operator's types of mask: [L, L] for all, [B, L] of keys, [B, H, L, L]."""


def encoder_layer(context: Context) -> None:
    for node, grad_mode in with_grad_mode(context):
        if context.exhausted:
            return
        if node.op != "call_function" or node.target not in SPELLINGS:
            continue
        given = dict(zip(PARAMETERS, node.args, strict=False)) | dict(node.kwargs)
        reason = _obstacle(node, given, grad_mode)
        if reason is not None:
            context.reject("encoder_layer", reason)
            continue
        context.spend("taken_apart", node)
        result = _layer(_Emitter(context, node), given)
        node.replace_all_uses_with(result)
        context.graph.gm.graph.erase_node(node)


def _obstacle(node: fx.Node, given: dict[str, Any], grad_mode: bool) -> str | None:
    """Why this call has to stay, or None."""
    tensors = [x for a in node.all_input_nodes if (x := example(a)) is not None]
    src, mask = example(given["src"]), given.get("mask")
    if src is None or any(map(is_special, tensors)):
        return "a tensor subclass, a transformed or a nested tensor"
    if grad_mode and any(x.requires_grad for x in tensors):
        return "a gradient is wanted, which the operator does not have"
    literals = ("embed_dim", "num_heads", "use_gelu", "norm_first", "mask_type")
    if any(isinstance(given.get(name), fx.Node) for name in literals):
        return "a parameter that is not a literal"
    if src.dim() != 3 or src.shape[2] != given["embed_dim"] or given["embed_dim"] % given["num_heads"]:  # a linear's guard
        return "sizes that the operator refuses"
    if any(x.dtype != src.dtype for x in tensors if x is not example(mask)):
        return "weights of another type"
    dims: dict[int | None, int] = {ROWS_AND_COLUMNS: 2, PADDING: 2, WHOLE: 4}
    if mask is not None and ((shown := example(mask)) is None or shown.dim() != dims.get(given.get("mask_type"))):
        return "a mask of an unknown kind"
    return None


@dataclass(frozen=True)
class _Emitter:
    """Adds calls to the graph in the place of `origin`, attributed to its module or to the module `child` of that."""

    context: Context
    origin: fx.Node
    child: str | None = None

    def __call__(self, function: Any, *args: Any, **kwargs: Any) -> fx.Node:
        node = self.context.call(function, args, self.origin, kwargs)
        if self.child is not None:
            node.meta["nn_module_stack"] = _stack_of_child(self.origin, self.child)
        return node

    def inside(self, child: str) -> _Emitter:
        return replace(self, child=child)


def _stack_of_child(node: fx.Node, child: str) -> dict[str, Any]:
    """The modules that `node` comes from and, if the last is an encoder layer of torch's, its module `child`."""
    stack: dict[str, Any] = dict(node.meta.get("nn_module_stack") or {})
    if stack:
        key, (path, kind) = list(stack.items())[-1]
        if isinstance(kind, type) and issubclass(kind, nn.TransformerEncoderLayer):
            stack[f"{key}.{child}"] = (f"{path}.{child}", CHILDREN[child])
    return stack


CHILDREN: dict[str, type[nn.Module]] = {
    "self_attn": nn.MultiheadAttention,
    "norm1": nn.LayerNorm,
    "norm2": nn.LayerNorm,
    "linear1": nn.Linear,
    "linear2": nn.Linear,
}
"""The modules of `nn.TransformerEncoderLayer` whose weights the operator is given."""


def _layer(call: _Emitter, given: dict[str, Any]) -> fx.Node:
    """The layer's result [B, L, E], and calls for all of it."""

    def norm(x: fx.Node, number: int) -> fx.Node:
        weights = given[f"norm_weight_{number}"], given[f"norm_bias_{number}"]
        return call.inside(f"norm{number}")(F.layer_norm, x, (given["embed_dim"],), *weights, given["eps"])

    def feed_forward(x: fx.Node) -> fx.Node:
        inner = call.inside("linear1")(F.linear, x, given["ffn_weight_1"], given["ffn_bias_1"])
        inner = call(F.gelu, inner, approximate=approximate) if given["use_gelu"] else call(F.relu, inner)
        return call.inside("linear2")(F.linear, inner, given["ffn_weight_2"], given["ffn_bias_2"])

    x = given["src"]
    approximate = "tanh" if x.meta["example_value"].is_cuda else "none"
    if given["norm_first"]:
        x = call(torch.add, _self_attention(call, norm(x, 1), given), x)
        return call(torch.add, feed_forward(norm(x, 2)), x)
    x = norm(call(torch.add, _self_attention(call, x, given), x), 1)
    return norm(call(torch.add, feed_forward(x), x), 2)


def _self_attention(call: _Emitter, x: fx.Node, given: dict[str, Any]) -> fx.Node:
    """[B, L, E] of x [B, L, E]."""
    inside = call.inside("self_attn")
    heads = given["num_heads"], given["embed_dim"] // given["num_heads"]
    packed = inside(F.linear, x, given["qkv_weight"], given["qkv_bias"])
    parts = inside(torch.unflatten, packed, -1, (3, *heads))
    query, key, value = (inside(torch.transpose, inside(torch.select, parts, 2, k), 1, 2) for k in range(3))
    options = _mask_options(call, given, query)
    out = inside(F.scaled_dot_product_attention, query, key, value, **options)
    out = inside(torch.flatten, inside(torch.transpose, out, 1, 2), -2)
    return inside(F.linear, out, given["proj_weight"], given["proj_bias"])


def _mask_options(call: _Emitter, given: dict[str, Any], query: fx.Node) -> dict[str, Any]:
    """What says to `scaled_dot_product_attention` which keys are hidden."""
    if given.get("mask") is None:
        return {}
    mask = _without_repeats(call.context, given["mask"], WrittenMemory(call.context.nodes))
    if mask.meta["example_value"].dtype != torch.bool:
        mask = call(operator.ne, mask, 0)
    if given["mask_type"] == PADDING:
        mask = call(torch.unsqueeze, call(torch.unsqueeze, mask, 1), 1)
    batch, heads, rows, _ = query.meta["example_value"].shape
    hidden = Filled(mask, inverted=False, value=-math.inf, lead=(batch, heads))
    scores = MaskedScores((hidden,), None, rows, rows, query.meta["example_value"].dtype, trains=False)
    form = plan_mask(scores, Sizes(call.context.nodes))
    assert isinstance(form, MaskForm), form  # a boolean that hides by minus infinity has one
    return {"attn_mask": emit_mask(call, scores, form).mask, "is_causal": form is MaskForm.CAUSAL}


def _without_repeats(context: Context, mask: fx.Node, written: WrittenMemory) -> fx.Node:
    """`mask`, or the smaller one that it repeats for each head and sequence. A sum whose memory is `written` stays."""
    if mask.op == "call_method" and mask.target == "expand":
        given = mask.args[0]
        shown = example(given)
        if isinstance(given, fx.Node) and shown is not None and shown.dim() == mask.meta["example_value"].dim():
            return given
    added = mask.target is operator.add and len(mask.args) == 2 and all(isinstance(a, fx.Node) for a in mask.args)
    if added and mask not in written:
        parts = tuple(_without_repeats(context, a, written) for a in mask.args if isinstance(a, fx.Node))
        if parts != mask.args:
            return context.call(operator.add, parts, mask)
    return mask
