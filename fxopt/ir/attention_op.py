"""Scaled-dot-product attention as ops whose backend is an argument, chosen after tracing.

Traced under FakeTensors, `aten::scaled_dot_product_attention` has to pick a backend before there are tensors, and what it
picks is often the decomposed form, several times slower than the fused kernels that eager would take; nor does eager's rule
always pick the fastest kernel. These ops postpone the choice. Importing the module registers

    fxopt::attention(query, key, value, attn_mask=None, dropout_p=0.0, is_causal=False, *, scale=None, enable_gqa=False,
                     backend="auto")
    fxopt::attention_forward(query, key, value, attn_mask=None, is_causal=False, *, scale=None, enable_gqa=False,
                             backend="auto")
    fxopt::attention_backward(grad, query, key, value, attn_mask, out, statistics, number, is_causal=False, *, scale=None,
                              enable_gqa=False)

with the parameters of `torch.nn.functional.scaled_dot_product_attention`, restricted to query [B, H, S, E], key
[B, G, T, E], value [B, G, T, Ev] of one floating dtype (G = H unless enable_gqa) and dropout_p = 0. `backend` is "auto",
which follows eager's rule when the op runs, or one of those that attention_backends.py describes; where that one cannot do
the problem, or the user has switched it off, eager's rule holds again.

The first is for calls without a gradient: its result is [B, H, S, Ev]. The second also returns statistics of the rows,
[B, H, S] in float32 (float64 for float64), and torch's number of the backend that ran, int64 [] on the CPU; it is
differentiable in query, key and value, once, by means of the third, which returns their gradients. That one takes no
backend of its own: it obeys the number, which is data, so that no record, plan or refusal can pair a forward with the
backward of another backend. Reading it does not wait for the device. Under autocast, floating tensors are cast as eager's
are.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fxopt.errors import GradientError
from fxopt.ir.attention_backends import (
    AUTO,
    BY_NUMBER,
    NUMBERS,
    Computed,
    Inputs,
    Settings,
    backward,
    forward,
    forward_for_training,
)

_SHARED = "*, float? scale=None, bool enable_gqa=False"
_CHOICE = f'str backend="{AUTO}"'
_OPERANDS = "Tensor query, Tensor key, Tensor value, Tensor? attn_mask"
SCHEMA = f"attention({_OPERANDS}=None, float dropout_p=0.0, bool is_causal=False, {_SHARED}, {_CHOICE}) -> Tensor"
FORWARD_SCHEMA = (
    f"attention_forward({_OPERANDS}=None, bool is_causal=False, {_SHARED}, {_CHOICE}) -> (Tensor, Tensor, Tensor)"
)
BACKWARD_SCHEMA = (
    f"attention_backward(Tensor grad, {_OPERANDS}, Tensor out, Tensor statistics, Tensor number, bool is_causal=False, "
    f"{_SHARED}) -> (Tensor, Tensor, Tensor)"
)

_AUTOCAST_KEYS = {"cuda": "AutocastCUDA", "cpu": "AutocastCPU"}


def attend(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    *,
    scale: float | None = None,
    enable_gqa: bool = False,
    backend: str = AUTO,
) -> Tensor:
    """What `fxopt::attention` computes, for callers that have no use for a dispatcher in between."""
    given = Inputs(query, key, value, attn_mask, Settings(is_causal, scale, enable_gqa))
    result = forward(given, backend)
    return result.clone() if _shares_memory(result, value) else result


def attend_forward(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    is_causal: bool = False,
    *,
    scale: float | None = None,
    enable_gqa: bool = False,
    backend: str = AUTO,
) -> tuple[Tensor, Tensor, Tensor]:
    """What `fxopt::attention_forward` computes."""
    given = Inputs(query, key, value, attn_mask, Settings(is_causal, scale, enable_gqa))
    result, statistics, taken = forward_for_training(given, backend)
    number = torch.scalar_tensor(NUMBERS[taken], dtype=torch.int64, device="cpu")
    return result.clone() if _shares_memory(result, value) else result, statistics, number


def attend_backward(
    grad: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None,
    out: Tensor,
    statistics: Tensor,
    number: Tensor,
    is_causal: bool = False,
    *,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> tuple[Tensor, Tensor, Tensor]:
    """What `fxopt::attention_backward` computes. Raises KeyError for a number that no backend has."""
    given = Inputs(query, key, value, attn_mask, Settings(is_causal, scale, enable_gqa))
    return backward(given, grad, Computed(out, statistics, BY_NUMBER[int(number)]))


def _shares_memory(result: Tensor, value: Tensor) -> bool:
    """Whether a decomposed attention over a single key returned a view of its value: results of an op are fresh memory."""
    return result.untyped_storage().data_ptr() == value.untyped_storage().data_ptr() and result.numel() > 0


# ---------------------------------------------------------------------- layouts


def _only_efficient(query: Tensor, value: Tensor) -> bool:
    """Whether of the fused kernels only the memory-efficient ones take these tensors; they give [B, S, H, E]."""
    return (query.device.type == "cuda" and query.dtype == torch.float32) or query.shape[-1] != value.shape[-1]


def _heads_last(x: Tensor, width: Any) -> Tensor:
    batch, heads, length, _ = x.shape
    return x.new_empty((batch, length, heads, width)).transpose(1, 2)


def _fake(query: Tensor, key: Tensor, value: Tensor, *args: Any, **kwargs: Any) -> Tensor:
    """The layout that fused kernels give: flash and cuDNN follow the query's; the memory-efficient one is [B, S, H, Ev].

    A backend that gives another layout costs a copy, nothing else.
    """
    return _heads_last(query, value.shape[-1]) if _only_efficient(query, value) else torch.empty_like(query)


def _fake_forward(query: Tensor, key: Tensor, value: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor, Tensor]:
    wide = torch.promote_types(query.dtype, torch.float32)
    number = torch.empty((), dtype=torch.int64, device="cpu")
    return _fake(query, key, value), query.new_empty(query.shape[:3], dtype=wide), number


def _fake_backward(
    grad: Tensor, query: Tensor, key: Tensor, value: Tensor, *args: Any, **kwargs: Any
) -> tuple[Tensor, Tensor, Tensor]:
    return empty_gradients(query, key, value)


def empty_gradients(query: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Uninitialized gradients in the layouts that fused kernels give: flash and cuDNN follow each tensor's own."""
    if _only_efficient(query, value):
        of_query, of_key, of_value = (_heads_last(x, x.shape[-1]) for x in (query, key, value))
    else:
        of_query, of_key, of_value = (torch.empty_like(x) for x in (query, key, value))
    return of_query, of_key, of_value


# ---------------------------------------------------------------------- autograd and autocast


def _save_for_backward(
    ctx: Any, inputs: tuple[Any, ...], keyword_only_inputs: dict[str, Any], output: tuple[Tensor, Tensor, Tensor]
) -> None:
    query, key, value, mask, ctx.is_causal = inputs
    ctx.options = {name: keyword_only_inputs[name] for name in ("scale", "enable_gqa")}
    ctx.mark_non_differentiable(*output[1:])
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(query, key, value, mask, *output)


def _differentiate(ctx: Any, grad: Tensor | None, *_: Any) -> tuple[Tensor | None, ...]:
    wanted = ctx.needs_input_grad  # of the arguments that were given
    if any(wanted[3:]):
        raise GradientError(
            "fxopt::attention_forward has no gradient for its mask; FXOPT_DISABLE=attention leaves attention to torch"
        )
    if grad is None:
        return (None,) * len(wanted)
    found = attention_backward(grad, *ctx.saved_tensors, ctx.is_causal, **ctx.options)
    kept = [gradient if w else None for gradient, w in zip(found, wanted, strict=False)]
    return (*kept, *(None,) * (len(wanted) - len(kept)))


def _no_second_derivative(*_: Any) -> Any:
    raise GradientError(
        "attention is differentiable once: fxopt::attention_backward has no derivative, nor have eager's fused backends;"
        " torch.nn.attention.sdpa_kernel(SDPBackend.MATH) inside the model has one"
    )


def _under_autocast(op: Any, device_type: str) -> Any:
    """What autocast does to `scaled_dot_product_attention`: floating tensors other than float64 take the lower precision."""

    def cast(x: Any, dtype: torch.dtype) -> Any:
        here = isinstance(x, Tensor) and x.device.type == device_type
        return x.to(dtype) if here and x.is_floating_point() and x.dtype != torch.float64 else x

    def lowered(*args: Any, **kwargs: Any) -> Any:
        dtype = torch.get_autocast_dtype(device_type)
        given = [cast(a, dtype) for a in args]
        named = {k: cast(a, dtype) for k, a in kwargs.items()}
        with torch.autocast(device_type, enabled=False):
            return op(*given, **named)

    return lowered


_LIBRARY = torch.library.Library("fxopt", "FRAGMENT")
for _schema, _kernel, _layout in (
    (SCHEMA, attend, _fake),
    (FORWARD_SCHEMA, attend_forward, _fake_forward),
    (BACKWARD_SCHEMA, attend_backward, _fake_backward),
):
    _name = _schema.partition("(")[0]
    _LIBRARY.define(_schema, tags=(torch.Tag.pt2_compliant_tag,))
    _LIBRARY.impl(_name, _kernel, "CompositeExplicitAutograd")
    torch.library.register_fake(f"fxopt::{_name}", _layout, lib=_LIBRARY)

attention = torch.ops.fxopt.attention.default
attention_forward = torch.ops.fxopt.attention_forward.default
attention_backward = torch.ops.fxopt.attention_backward.default

torch.library.register_autograd("fxopt::attention_forward", _differentiate, setup_context=_save_for_backward, lib=_LIBRARY)
torch.library.register_autograd("fxopt::attention_backward", _no_second_derivative, lib=_LIBRARY)
for _device_type, _key in _AUTOCAST_KEYS.items():
    for _op in (attention, attention_forward):
        _LIBRARY.impl(_op._schema.name.partition("::")[2], _under_autocast(_op, _device_type), _key)
