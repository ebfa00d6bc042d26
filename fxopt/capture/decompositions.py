"""Which ATen ops are taken apart before autograd's graphs reach fxopt: core ATen, with the exceptions listed here.

The op set that remains (`ir/ops.py` sorts it into categories):

- pointwise ops, reductions, scans, indexing and views of core ATen, `aten._to_copy` for every cast (no `prims`);
- contractions, whole: mm, addmm, bmm, baddbmm, convolution and convolution_backward;
- attention, whole: the scaled-dot-product ops that torch dispatches to (flash, efficient, cuDNN), both ways;
- var_mean, cumsum, index_put, scatter, gather, embedding: whole, since a loop nest of their own is better than their pieces.
  `embedding` stays because, unlike `index`, it refuses negative indices;
- softmax, log-softmax, log-sum-exp and their gradients: in pieces (amax, subtract, exp, sum, log; capture/softmax.py), so
  that the partitioner may save two numbers of a row instead of the row; lower/online.py computes the two in one pass;
- layer, group, batch and RMS norm, forward and backward: in pieces (var_mean, rsqrt, multiply), so that what stands around
  them fuses. Their decompositions compute in float32 for float16 and bfloat16, as do those of gelu, silu and embedding's
  backward; between pointwise pieces nothing is rounded, because a kernel computes in float32 and rounds what it stores;
- list ops (`_foreach_*`): one op per tensor (capture/foreach.py), where sizes are static not before they are traced;
- pooling, sorting and other ops that torch has good kernels for: whole.
"""

from __future__ import annotations

import functools
import hashlib
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch._decomp import decomposition_table, get_decompositions

from fxopt.capture import private
from fxopt.capture.foreach import FOREACH
from fxopt.capture.softmax import SOFTMAX

aten = torch.ops.aten
prims = torch.ops.prims

KEPT_WHOLE = (
    "baddbmm",
    "scaled_dot_product_attention",
    "_scaled_dot_product_attention_math",
    "_scaled_dot_product_flash_attention_for_cpu",
    "select_scatter",  # may change a part in place, where a selection over all elements reads and writes them all
    "bernoulli",  # capture/random.py turns it into a function of a seed, or leaves it to eager
)
"""aten ops that core ATen would decompose and fxopt does not."""

ALSO_DECOMPOSED = (
    "native_layer_norm",
    "native_group_norm",
    "native_batch_norm",
    "_native_batch_norm_legit",
    "_native_batch_norm_legit_functional",
    "_native_batch_norm_legit_no_training",
    "_batch_norm_with_update",
    "_batch_norm_with_update_functional",
    "_batch_norm_no_update",
    "batch_norm_backward",
    "upsample_nearest2d",
    "upsample_bilinear2d",
    "dist",
    "grid_sampler_2d",
    "bucketize",
    "addmv",
    "tril_indices",
    "triu_indices",
)
"""aten ops that core ATen keeps and fxopt decomposes."""


BATCH_NORMS = (
    aten.native_batch_norm,
    aten._native_batch_norm_legit,
    aten._native_batch_norm_legit_functional,
    aten._batch_norm_with_update,
    aten._batch_norm_with_update_functional,
)


class Decompositions(Mapping[Any, Callable[..., Any]]):
    """The table for AOTAutograd, OpOverload to a Python function of fewer kinds of op, made when it is first looked at.

    A warm start never looks: what core ATen decomposes is all ops of all libraries sorted through, a tenth of a second.
    Without `lists`, list ops stay whole, for `foreach.take_lists_apart`.
    """

    def __init__(self, *, lists: bool = True) -> None:
        self._lists = lists

    @functools.cached_property
    def _made(self) -> dict[Any, Callable[..., Any]]:
        table = decompositions()
        return table if self._lists else {op: f for op, f in table.items() if op not in FOREACH}

    def __getitem__(self, op: Any) -> Callable[..., Any]:
        return self._made[op]

    def __iter__(self) -> Iterator[Any]:
        return iter(self._made)

    def __len__(self) -> int:
        return len(self._made)


def decompositions() -> dict[Any, Callable[..., Any]]:
    """The table itself."""
    table = _table(_registered())
    if hasattr(prims, "fma"):  # exists once Dynamo has met an addcmul_ or addcdiv_ with a factor
        table[prims.fma.default] = _fma
    return table


def fingerprint() -> str | None:
    """A hash of which functions torch has registered for its own ops, from which, with fxopt's source and torch's version,
    the table follows; None when some of them are not torch's code."""
    lines = []
    for op, function in _registered():
        if op.namespace not in ("aten", "prims"):
            continue
        inner = function.func if isinstance(function, functools.partial) else function
        module = str(getattr(inner, "__module__", ""))
        if module.partition(".")[0] != "torch":
            return None
        lines.append(f"{op} {module} {getattr(inner, '__qualname__', '')}")
    return hashlib.sha256("\n".join(sorted(lines)).encode()).hexdigest()


def _registered() -> tuple[tuple[Any, Callable[..., Any]], ...]:
    """torch's registry, which core ATen's table is picked from: other code may have changed it."""
    return tuple((op, f) for op, f in decomposition_table.items() if isinstance(op, torch._ops.OpOverload))


@functools.lru_cache(maxsize=1)
def _table(registered: tuple[tuple[Any, Callable[..., Any]], ...]) -> dict[Any, Callable[..., Any]]:
    """The table that belongs to these entries of torch's registry."""
    table = private.core_decompositions()
    for name in KEPT_WHOLE:
        packet = getattr(aten, name)
        for overload in packet.overloads():
            table.pop(getattr(packet, overload), None)
    table.update(get_decompositions([getattr(aten, name) for name in ALSO_DECOMPOSED if hasattr(aten, name)]))
    table.update(SOFTMAX)
    table.update(FOREACH)
    table[prims.convert_element_type.default] = _convert_element_type
    table[aten.soft_margin_loss_backward.default] = _soft_margin_loss_backward
    table[aten.native_group_norm.default] = _native_group_norm
    for packet in BATCH_NORMS:
        for name in packet.overloads():
            overload = getattr(packet, name)
            if overload in table:
                table[overload] = _with_wide_statistics(table[overload])
    return table


def _fma(a: torch.Tensor, b: torch.Tensor, c: torch.Tensor) -> torch.Tensor:
    """As the eager op computes it, with a rounding after the product."""
    return a * b + c


def _convert_element_type(a: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """torch's decompositions cast with a prim; in the graph a cast is always `aten._to_copy`."""
    return aten._to_copy.default(a, dtype=dtype)


def _with_wide_statistics(decomposition: Callable[..., Any]) -> Callable[..., Any]:
    """`decomposition` of a batch norm, with statistics in the type of its parameters.

    torch's saves them in the input's type on CPUs. Eager does not where the two differ, as under autocast: a mean rounded to
    bfloat16 is far too coarse for the backward.
    """

    def batch_norm(x: torch.Tensor, weight: torch.Tensor | None, *rest: Any) -> Any:
        parameters = [p for p in (weight, *rest) if isinstance(p, torch.Tensor)]
        if x.device.type != "cpu" or not parameters or parameters[0].dtype == x.dtype:
            return decomposition(x, weight, *rest)
        out, *statistics = decomposition(x.to(parameters[0].dtype), weight, *rest)
        return (out.to(x.dtype), *statistics)

    return batch_norm


def _native_group_norm(
    x: torch.Tensor,
    weight: torch.Tensor | None,
    bias: torch.Tensor | None,
    N: int,
    C: int,
    HxW: int,
    group: int,
    eps: float,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Normalized, then scaled, in one domain of (image, group, channel of the group, place), so that it is one kernel.

    torch's form for CPUs first folds weight and statistics into a scale and a shift per channel, in tensors of their own.
    """
    wide = x.to(torch.promote_types(x.dtype, torch.float32))
    grouped = wide.reshape(N, group, C // group, HxW)
    variance, mean = torch.var_mean(grouped, (2, 3), unbiased=False, keepdim=True)
    rstd = torch.rsqrt(variance + eps)
    out = (grouped - mean) * rstd
    per_channel = (1, group, C // group, 1)
    if weight is not None:
        out = out * weight.reshape(per_channel)
    if bias is not None:
        out = out + bias.reshape(per_channel)
    out = out.reshape(x.shape).to(x.dtype)
    if x.device.type == "cpu":  # as eager: elsewhere the result is contiguous
        layout = {4: torch.channels_last, 5: torch.channels_last_3d}.get(x.dim())
        if layout is not None and x.is_contiguous(memory_format=layout) and not x.is_contiguous():
            out = out.contiguous(memory_format=layout)
    return out, mean.reshape(N, group).to(x.dtype), rstd.reshape(N, group).to(x.dtype)


def _soft_margin_loss_backward(grad: torch.Tensor, x: torch.Tensor, target: torch.Tensor, reduction: int) -> torch.Tensor:
    """torch's form, sigmoid(target * x) - 1, cancels to nothing where the margin is wide; sigmoid(-target * x) does not."""
    wide, sign = (t.to(torch.promote_types(t.dtype, torch.float32)) for t in (x, target))
    slope = -sign * grad * torch.sigmoid(-sign * wide)
    mean = reduction == 1  # at::Reduction::Mean
    return (slope / x.numel() if mean else slope).to(x.dtype)
