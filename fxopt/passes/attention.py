"""Before autograd: attention becomes an op of fxopt's, whose backend is chosen later (tune/attention.py).

On CUDA, what `scaled_dot_product_attention` turns into while it is traced is not what eager runs, nor what is fastest (see
ir/attention_op.py). A call that needs no gradient becomes `fxopt::attention`, one that does `fxopt::attention_forward`.
Where the user says in the graph which backends to use, calls stay as they are. The attention inside
`multi_head_attention_forward`, which Dynamo does not look into, is reached by tracing a copy of that function.
"""

from __future__ import annotations

import operator
import types
from typing import Any

import torch
import torch.nn.attention
import torch.nn.functional as F
from torch import fx

from fxopt.ir.attention_op import attention as attention_op
from fxopt.ir.attention_op import attention_forward
from fxopt.ir.spec import known_equal
from fxopt.passes.context import Context
from fxopt.passes.dynamo_facts import example, is_special, with_grad_mode

SPELLINGS = frozenset(
    {
        F.scaled_dot_product_attention,
        torch.ops.aten.scaled_dot_product_attention,
        torch.ops.aten.scaled_dot_product_attention.default,
    }
)
"""Every call target that Dynamo leaves in a graph; all take the same parameters under the same names."""

PARAMETERS = ("query", "key", "value", "attn_mask", "dropout_p", "is_causal", "scale", "enable_gqa")
SETS_BACKENDS = torch.nn.attention._sdpa_kernel
"""What Dynamo leaves of `torch.nn.attention.sdpa_kernel` in a graph."""

DTYPES = frozenset({torch.float16, torch.bfloat16, torch.float32})


def chooses_late(device: torch.device) -> bool:
    """Whether a device has several backends among which eager chooses at run time (on CPUs the traced choice is eager's)."""
    return device.type == "cuda"


def attention(context: Context) -> None:
    chosen = any(node.target is SETS_BACKENDS for node in context.nodes)
    for node, grad_mode in with_grad_mode(context):
        if context.exhausted:
            return
        if node.op != "call_function" or node.target not in (*SPELLINGS, F.multi_head_attention_forward):
            continue
        tensors = [x for a in node.all_input_nodes if (x := example(a)) is not None]
        trains = grad_mode and any(x.requires_grad for x in tensors)
        reason = "the graph says which backends to use" if chosen else _obstacle(node, tensors, trains)
        if reason is not None:
            context.reject("attention", reason)
        elif node.target not in SPELLINGS:
            context.spend("inside_multi_head", node)
            node.target = multi_head_attention
        elif trains:
            context.spend("with_gradient", node)
            _make_differentiable(context, node)
        else:
            context.spend("without_gradient", node)
            node.target = attention_op


def _obstacle(node: fx.Node, tensors: list[torch.Tensor], trains: bool) -> str | None:
    """Why this call has to stay, or None. For multi-head attention, `attend` decides about the attention inside it."""
    if any(map(is_special, tensors)):
        return "a tensor subclass, a transformed or a nested tensor"
    if node.target not in SPELLINGS:
        return _chosen_already(tensors)
    given = _given(node)
    operands = [x for name in PARAMETERS[:3] if (x := example(given.get(name))) is not None]
    if len(operands) < 3 or any(isinstance(given.get(name), fx.Node) for name in PARAMETERS[4:]):
        return "a parameter that is not a literal"
    reason = _unsuitable(*operands, dropout=given.get("dropout_p", 0.0), grouped=bool(given.get("enable_gqa")))
    return reason or (_unsuitable_for_training(operands, example(given.get("attn_mask"))) if trains else None)


def _given(node: fx.Node) -> dict[str, Any]:
    """The arguments of a call by name, as far as they are there."""
    return dict(zip(PARAMETERS, node.args, strict=False)) | dict(node.kwargs)


def _unsuitable_for_training(operands: list[torch.Tensor], mask: torch.Tensor | None) -> str | None:
    query, key, _ = operands
    if torch.are_deterministic_algorithms_enabled():
        return "deterministic algorithms are asked for"
    if mask is not None and mask.requires_grad:
        return "a mask that learns"
    if not known_equal(query.shape[1], key.shape[1]) and (mask is not None or query.dtype == torch.float32):
        return "grouped heads, with a mask or in float32: no fused backward"
    return None


def _make_differentiable(context: Context, node: fx.Node) -> None:
    """Put `fxopt::attention_forward` in the place of a call; plain ops, so that a warm start knows the graph."""
    given = _given(node)
    args = (*(given[name] for name in PARAMETERS[:3]), given.get("attn_mask"), bool(given.get("is_causal", False)))
    options = {"scale": given.get("scale"), "enable_gqa": bool(given.get("enable_gqa", False))}
    pair = context.call(attention_forward, args, node, options)
    new = context.emit(operator.getitem, (pair, 0), node)
    node.replace_all_uses_with(new)
    context.graph.gm.graph.erase_node(node)


def _chosen_already(tensors: list[torch.Tensor]) -> str | None:
    return None if any(chooses_late(x.device) for x in tensors) else "a device that has its backend chosen already"


def _unsuitable(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, *, dropout: float, grouped: bool = False
) -> str | None:
    """What no fused backend takes is better decomposed, and fused with its neighbours."""
    if dropout != 0:
        return "dropout"
    if (reason := _chosen_already([query])) is not None:
        return reason
    if any(x.dtype not in DTYPES for x in (query, key, value)):
        return "an element type without a fused backend"
    if any(x.dim() != 4 for x in (query, key, value)):
        return "not four-dimensional"
    same = (0,) if grouped else (0, 1)
    if not all(known_equal(query.shape[d], x.shape[d]) for x in (key, value) for d in same):
        return "batch or heads that broadcast"
    return None


def attend(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attn_mask: torch.Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    **options: Any,
) -> torch.Tensor:
    """`scaled_dot_product_attention` as a traced function meets it: the late form where this call allows it."""
    operands = [query, key, value]
    masks = [] if attn_mask is None else [attn_mask]
    if _unsuitable(*operands, dropout=dropout_p) is None:
        if not torch.is_grad_enabled() or not any(x.requires_grad for x in (*operands, *masks)):
            return attention_op(query, key, value, attn_mask, dropout_p, is_causal, **options)
        if _unsuitable_for_training(operands, attn_mask) is None:
            out: torch.Tensor = attention_forward(query, key, value, attn_mask, is_causal, **options)[0]
            return out
    return F.scaled_dot_product_attention(query, key, value, attn_mask, dropout_p, is_causal, **options)


def _calling_attend(function: Any, name: str) -> Any:
    """A copy, called `name`, of a Python function of torch's in which `scaled_dot_product_attention` means `attend`.

    Dynamo leaves such functions whole, so that the call inside is out of reach of a graph rewrite.
    """
    names = {**function.__globals__, "scaled_dot_product_attention": attend}
    copy = types.FunctionType(function.__code__, names, name, function.__defaults__, function.__closure__)
    copy.__kwdefaults__ = function.__kwdefaults__
    names[function.__name__] = copy  # under a tracer's mode it hands itself to that mode by its name
    copy.__module__, copy.__qualname__ = __name__, name  # a graph's generated code refers to functions by these
    return copy


multi_head_attention = _calling_attend(F.multi_head_attention_forward, "multi_head_attention")
