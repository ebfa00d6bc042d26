"""Before autograd: attention that needs no gradient becomes `fxopt::attention`, whose backend is chosen at run time.

On CUDA, what `scaled_dot_product_attention` turns into while it is traced is not what eager runs (see ir/attention_op.py).
With gradients the traced form has a backward that fits it, so those calls stay as they are. The attention inside
`multi_head_attention_forward`, which Dynamo does not look into, is reached by tracing a copy of that function.
"""

from __future__ import annotations

import types
from typing import Any

import torch
import torch.nn.functional as F
from torch import fx

from fxopt.ir.attention_op import attention as attention_op
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
DTYPES = frozenset({torch.float16, torch.bfloat16, torch.float32})


def chooses_late(device: torch.device) -> bool:
    """Whether a device has several backends among which eager chooses at run time (on CPUs the traced choice is eager's)."""
    return device.type == "cuda"


def attention(context: Context) -> None:
    for node, grad_mode in with_grad_mode(context):
        if context.exhausted:
            return
        if node.op != "call_function" or node.target not in (*SPELLINGS, F.multi_head_attention_forward):
            continue
        reason = _obstacle(node, grad_mode)
        if reason is not None:
            context.reject("attention", reason)
        elif node.target in SPELLINGS:
            context.spend("without_gradient", node)
            node.target = attention_op
        else:
            context.spend("inside_multi_head", node)
            node.target = multi_head_attention


def _obstacle(node: fx.Node, grad_mode: bool) -> str | None:
    """Why this call has to stay, or None. For multi-head attention, `attend` decides about the attention inside it."""
    tensors = [x for a in node.all_input_nodes if (x := example(a)) is not None]
    if any(map(is_special, tensors)):
        return "a tensor subclass, a transformed or a nested tensor"
    if grad_mode and any(x.requires_grad for x in tensors):
        return "a gradient is wanted"
    if node.target not in SPELLINGS:
        return None
    given: dict[str, Any] = dict(zip(PARAMETERS, node.args, strict=False)) | dict(node.kwargs)
    operands = [x for name in PARAMETERS[:3] if (x := example(given.get(name))) is not None]
    if len(operands) < 3 or any(isinstance(given.get(name), fx.Node) for name in PARAMETERS[4:]):
        return "a parameter that is not a literal"
    return _unsuitable(*operands, dropout=given.get("dropout_p", 0.0), grouped=bool(given.get("enable_gqa")))


def _unsuitable(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, *, dropout: float, grouped: bool = False
) -> str | None:
    """What no fused backend takes is better decomposed, and fused with its neighbours."""
    if dropout != 0:
        return "dropout"
    if not chooses_late(query.device):
        return f"{query.device.type} has its backend chosen already"
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
    if _unsuitable(query, key, value, dropout=dropout_p) is None:
        return attention_op(query, key, value, attn_mask, dropout_p, is_causal, **options)
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
