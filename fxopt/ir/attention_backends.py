"""torch's implementations of scaled-dot-product attention, each called by its name.

`Inputs` are a query [B, H, S, E], key [B, G, T, E] and value [B, G, T, Ev] of one floating dtype on one device, H a multiple
of G (G = H unless enable_gqa), and an optional mask (boolean, true where a key is seen, or an addend) that broadcasts to
[B, H, S, T]; there is no dropout. Backends are

    flash       FlashAttention: half types, no mask
    efficient   xFormers' memory-efficient attention: no grouped heads
    cudnn       cuDNN's: half types; builds a plan at the first call of each new problem
    math        products and a softmax that stores all scores; any device and floating dtype

Forward and backward are one decision. What a forward leaves for its backward, the result and a statistic of each row
[B, H, S], means something to that backend's backward only, and in that backend's own memory layout: none of them checks what
it is given, so that another one, or another layout, yields wrong gradients. The name of the backend therefore goes with
them (`Computed`), and `backward` goes by it.

A backend that cannot do a problem raises RuntimeError. `forward` and `forward_for_training` then follow eager's rule
instead, and do not ask that backend again; `backward` computes the forward again by another one. Nothing here waits for the
device.
"""

from __future__ import annotations

import functools
import logging
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend

AUTO, FLASH, EFFICIENT, CUDNN, MATH = "auto", "flash", "efficient", "cudnn", "math"
BACKENDS = (FLASH, EFFICIENT, CUDNN, MATH)

MASK_ALIGNMENT = 8
"""Elements that the strides of a mask have to be multiples of for the memory-efficient kernels."""

STATISTICS_ALIGNMENT = 32
"""The memory-efficient backward reads the statistics of rows up to a multiple of this; +inf past the last."""

Strides = tuple[int, ...]

aten = torch.ops.aten
log = logging.getLogger("fxopt")


class Settings(NamedTuple):
    """The parameters of a call that are not tensors; `scale` None is 1 / sqrt(E)."""

    is_causal: bool = False
    scale: float | None = None
    enable_gqa: bool = False


class Inputs(NamedTuple):
    """What is attended (see above)."""

    query: Tensor
    key: Tensor
    value: Tensor
    mask: Tensor | None
    settings: Settings

    @property
    def scaling(self) -> float:
        scale = self.settings.scale
        return float(self.query.shape[-1]) ** -0.5 if scale is None else scale

    @property
    def bias(self) -> Tensor | None:
        """The mask as an addend."""
        return None if self.mask is None else additive(self.mask, self.query.dtype)

    def wanting_gradients(self) -> Inputs:
        query, key, value = (x.detach().requires_grad_() for x in self[:3])
        return Inputs(query, key, value, self.mask, self.settings)


Outputs = tuple[Tensor, Tensor | None]
"""The result [B, H, S, Ev], and the statistics of the rows where they are asked for."""

Gradients = tuple[Tensor, Tensor, Tensor]
"""Of query, key and value."""


class Computed(NamedTuple):
    """A forward as its backward needs it: the result [B, H, S, Ev], the statistics [B, H, S] in float32 (float64 for
    float64) and the backend that both are from."""

    out: Tensor
    statistics: Tensor
    backend: str


# ---------------------------------------------------------------------- which backend


NUMBERS = {
    MATH: int(SDPBackend.MATH),  # type: ignore[call-overload]
    FLASH: int(SDPBackend.FLASH_ATTENTION),  # type: ignore[call-overload]
    EFFICIENT: int(SDPBackend.EFFICIENT_ATTENTION),  # type: ignore[call-overload]
    CUDNN: int(SDPBackend.CUDNN_ATTENTION),  # type: ignore[call-overload]
}
"""torch's numbers of the backends."""

BY_NUMBER = {number: name for name, number in NUMBERS.items()}

_ENABLED: dict[str, Callable[[], bool]] = {
    FLASH: torch.backends.cuda.flash_sdp_enabled,
    EFFICIENT: torch.backends.cuda.mem_efficient_sdp_enabled,
    CUDNN: torch.backends.cuda.cudnn_sdp_enabled,
    MATH: torch.backends.cuda.math_sdp_enabled,
}
_SUPPORTS: dict[str, Callable[[Any], bool]] = {
    FLASH: torch.backends.cuda.can_use_flash_attention,
    EFFICIENT: torch.backends.cuda.can_use_efficient_attention,
    CUDNN: torch.backends.cuda.can_use_cudnn_attention,
}


def enabled_backends() -> list[str]:
    """Those that the user allows now (`torch.backends.cuda.enable_flash_sdp` and the like, `sdpa_kernel`)."""
    return [name for name in BACKENDS if _ENABLED[name]()]


def supports(backend: str, x: Inputs, trains: bool) -> bool:
    """Whether torch takes `backend` for such tensors, on CUDA: the user has not switched it off, and shapes, layouts and
    the device suit it; `trains` when they want gradients, which some backends have for fewer problems."""
    if backend == MATH:
        return _ENABLED[MATH]()
    given = x.wanting_gradients() if trains else x
    with torch.set_grad_enabled(trains):
        shown = (*given[:4], 0.0, x.settings.is_causal, x.settings.enable_gqa)
        return bool(_SUPPORTS[backend](torch.backends.cuda.SDPAParams(*shown)))


def eagers_choice(x: Inputs, trains: bool) -> str:
    """The backend that `scaled_dot_product_attention` would take for these tensors, `trains` when they want gradients."""
    if x.query.device.type != "cuda":
        return MATH
    given, settings = x.wanting_gradients() if trains else x, x.settings
    options: dict[str, Any] = {"scale": settings.scale, "enable_gqa": settings.enable_gqa}
    with torch.set_grad_enabled(trains):
        number = torch._fused_sdp_choice(*given[:4], 0.0, settings.is_causal, **options)
    return BY_NUMBER.get(number, MATH)


def forward(x: Inputs, backend: str) -> Tensor:
    """The result alone, by `backend`, or by eager's rule where that is AUTO, refuses, or has been switched off by the user
    meanwhile."""
    found = _tried(x, backend, statistics=False)
    if found is not None:
        return found[0]
    options: dict[str, Any] = {"scale": x.settings.scale, "enable_gqa": x.settings.enable_gqa}
    return F.scaled_dot_product_attention(*x[:4], 0.0, x.settings.is_causal, **options)


def forward_for_training(x: Inputs, backend: str) -> Computed:
    """By `backend` or eager's rule, as `forward`."""
    found = _tried(x, backend, statistics=True)
    if found is None:
        backend = _eagers_choice_or_math(x)
        found = forward_by(backend, x, statistics=True)
    out, statistics = found
    assert statistics is not None
    return Computed(out, statistics, backend)


def backward(x: Inputs, grad: Tensor, computed: Computed) -> Gradients:
    """From the gradient of the result and what `forward_for_training` returned, by the same backend.

    Where that one's backward refuses, the forward is computed again, by eager's choice or MATH, and its backward follows.
    """
    out, statistics, backend = computed
    if _may_try(backend, x):
        try:
            return backward_by(backend, x, grad, out, statistics)
        except RuntimeError as error:
            _refused(backend, x, error)
    other = _eagers_choice_or_math(x)
    again, sums = forward_by(other, x, statistics=True)
    assert sums is not None
    return backward_by(other, x, grad, again, sums)


def forward_by(backend: str, x: Inputs, statistics: bool) -> Outputs:
    """By this backend or none: raises RuntimeError where it refuses."""
    out, sums = _FORWARD[backend](x, statistics)
    if sums is not None and x.mask is not None:
        # Of a row that is hidden throughout, backends write several things; probabilities exp(score - inf) are zero.
        sums = sums.nan_to_num(torch.inf, torch.inf, torch.inf)
    return out, sums


def backward_by(backend: str, x: Inputs, grad: Tensor, out: Tensor, statistics: Tensor) -> Gradients:
    """By this backend or none, which has to have computed `out` and `statistics`: raises RuntimeError where it refuses."""
    return _BACKWARD[backend](x, grad, out, statistics)


def _tried(x: Inputs, backend: str, statistics: bool) -> Outputs | None:
    """By `backend`, or None where it is not to be asked or refuses."""
    if backend == AUTO or not _ENABLED[backend]() or not _may_try(backend, x):
        return None
    try:
        return forward_by(backend, x, statistics)
    except RuntimeError as error:
        _refused(backend, x, error)
        return None


def _eagers_choice_or_math(x: Inputs) -> str:
    """What eager would train with, unless that has refused the problem; MATH takes every one."""
    choice = eagers_choice(x, trains=True)
    return choice if _may_try(choice, x) else MATH


_refusals: set[tuple[Any, ...]] = set()


def _problem(backend: str, x: Inputs) -> tuple[Any, ...]:
    layouts = ((t.shape, t.stride()) for t in x[:4] if t is not None)
    return (backend, x.query.dtype, x.settings, *layouts)


def _may_try(backend: str, x: Inputs) -> bool:
    return not _refusals or _problem(backend, x) not in _refusals


def _refused(backend: str, x: Inputs, error: RuntimeError) -> None:
    """Remember it, for finding out may take a backend long. Running out of memory says nothing about the problem, nor does
    what a stream refuses that is being captured, and after MATH there is no other."""
    capturing = x.query.device.type == "cuda" and torch.cuda.is_current_stream_capturing()
    if backend == MATH or isinstance(error, torch.OutOfMemoryError) or capturing:
        raise error
    _refusals.add(_problem(backend, x))
    problem, reason = f"{tuple(x.query.shape)} over {tuple(x.key.shape)}", str(error).partition("\n")[0]
    log.warning("attention of %s: eager's rule chooses, because %s refuses it: %s", problem, backend, reason)


# ---------------------------------------------------------------------- forward
# (by torch's own bindings: some microseconds less than through torch.ops)


def _flash(x: Inputs, statistics: bool) -> Outputs:
    if x.mask is not None:
        raise RuntimeError("FlashAttention takes no mask")
    query, key, value = (_padded(t) for t in (x.query, x.key, x.value))
    found = torch._scaled_dot_product_flash_attention(query, key, value, 0.0, x.settings.is_causal, scale=x.scaling)
    return found[0][..., : x.query.shape[-1]], found[1]


def _efficient(x: Inputs, statistics: bool) -> Outputs:
    _refuse_groups(x)
    given = (x.query, x.key, x.value, _aligned_bias(x), statistics, 0.0, x.settings.is_causal)
    out, sums, _, _ = torch._scaled_dot_product_efficient_attention(*given, scale=x.settings.scale)
    return out, sums[..., : x.query.shape[2]] if statistics else None


def _cudnn(x: Inputs, statistics: bool) -> Outputs:
    given = (x.query, x.key, x.value, x.bias, statistics, 0.0, x.settings.is_causal)
    found = torch._scaled_dot_product_cudnn_attention(*given, scale=x.settings.scale)
    return found[0], found[1].reshape(x.query.shape[:3]) if statistics else None


def _math(x: Inputs, statistics: bool) -> Outputs:
    options: dict[str, Any] = {"scale": x.settings.scale, "enable_gqa": x.settings.enable_gqa}
    given = (x.query, x.key, x.value, x.bias, 0.0, x.settings.is_causal)
    out = torch._scaled_dot_product_attention_math(*given, **options)[0]
    return out, torch.logsumexp(_scores(x, ungrouped(x.query, x.key)), -1) if statistics else None


_FORWARD: dict[str, Callable[[Inputs, bool], Outputs]] = {FLASH: _flash, EFFICIENT: _efficient, CUDNN: _cudnn, MATH: _math}


# ---------------------------------------------------------------------- backward


def _flash_backward(x: Inputs, grad: Tensor, out: Tensor, statistics: Tensor) -> Gradients:
    # The forward takes no mask, so that one which is there now was found to hide nothing.
    given = [_padded(t) for t in (grad, x.query, x.key, x.value, out)]
    state = torch.empty(2, dtype=torch.uint64, device=grad.device)  # of dropout, which there is none of
    sizes = (None, None, x.query.shape[2], x.key.shape[2])
    found = aten._scaled_dot_product_flash_attention_backward.default(
        *given, statistics.contiguous(), *sizes, 0.0, x.settings.is_causal, state, state, scale=x.scaling
    )
    of_query, of_key, of_value = (g[..., : t.shape[-1]] for g, t in zip(found, x[:3], strict=True))
    return of_query, of_key, of_value


def _efficient_backward(x: Inputs, grad: Tensor, out: Tensor, statistics: Tensor) -> Gradients:
    _refuse_groups(x)
    missing = -statistics.shape[-1] % STATISTICS_ALIGNMENT
    padded = F.pad(statistics, (0, missing), value=torch.inf) if missing else statistics.contiguous()
    state = torch.empty((), dtype=torch.int64, device=grad.device)
    _, heads, rows, width = out.shape
    out = _arranged(out, (rows * heads * width, width, heads * width, 1))  # the kernel takes this for granted
    given = (grad, x.query, x.key, x.value, _aligned_bias(x), out, padded, state, state, 0.0)
    wanted = [True, True, True, False]
    found = aten._scaled_dot_product_efficient_attention_backward.default(
        *given, wanted, x.settings.is_causal, scale=x.settings.scale
    )
    return found[0], found[1], found[2]


def _cudnn_backward(x: Inputs, grad: Tensor, out: Tensor, statistics: Tensor) -> Gradients:
    state = torch.empty((), dtype=torch.int64, device=grad.device)
    given = (grad, x.query, x.key, x.value, out, statistics.unsqueeze(-1), state, state, x.bias)
    sizes = (None, None, x.query.shape[2], x.key.shape[2])
    return cudnn_backward(*given, *sizes, 0.0, x.settings.is_causal, scale=x.settings.scale)


def cudnn_backward(
    grad: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    out: Tensor,
    statistics: Tensor,
    seed: Tensor,
    offset: Tensor,
    bias: Tensor | None,
    rows: Tensor | None,
    keys: Tensor | None,
    most_rows: int,
    most_keys: int,
    dropout_p: float,
    is_causal: bool,
    *,
    scale: float | None = None,
) -> Gradients:
    """`aten::_scaled_dot_product_cudnn_attention_backward`, right whatever has been called before.

    torch remembers cuDNN's plans by the layouts of query, key, value and bias, while a plan also holds those of the other
    operands: a call that differs from the first in its gradient's layout gets garbage (torch 2.11, cuDNN 9.19, H100). So
    the others are brought into one layout. Eager's calls have their own, and must neither find our plans nor leave us
    theirs: the key compares bytes, and minus zero is no dropout either.
    """
    strides = dense_strides(tuple(out.shape), query.stride())
    grad, out, statistics = _arranged(grad, strides), _arranged(out, strides), statistics.contiguous()
    given = (grad, query, key, value, out, statistics, seed, offset, bias, rows, keys, most_rows, most_keys)
    found: Gradients = aten._scaled_dot_product_cudnn_attention_backward.default(
        *given, dropout_p or -0.0, is_causal, scale=scale
    )
    return found


def _math_backward(x: Inputs, grad: Tensor, out: Tensor, statistics: Tensor) -> Gradients:
    dtype, wide = grad.dtype, torch.promote_types(grad.dtype, torch.float32)
    keys, values = (ungrouped(x.query, t).to(wide) for t in (x.key, x.value))
    grad, out = grad.to(wide), out.to(wide)
    p = torch.exp(_scores(x, keys) - statistics.unsqueeze(-1))
    slopes = grad @ values.transpose(-1, -2) - (grad * out).sum(-1, keepdim=True)
    slopes = slopes.mul_(p).mul_(x.scaling)
    of_key = grouped(slopes.transpose(-1, -2) @ x.query.to(wide), x.key)
    of_value = grouped(p.transpose(-1, -2) @ grad, x.value)
    return (slopes @ keys).to(dtype), of_key.to(dtype), of_value.to(dtype)


_BACKWARD: dict[str, Callable[[Inputs, Tensor, Tensor, Tensor], Gradients]] = {
    FLASH: _flash_backward,
    EFFICIENT: _efficient_backward,
    CUDNN: _cudnn_backward,
    MATH: _math_backward,
}


# ---------------------------------------------------------------------- operands as backends want them


def additive(mask: Tensor, dtype: torch.dtype) -> Tensor:
    """A boolean mask as what is added to scores, others as they are."""
    return torch.zeros_like(mask, dtype=dtype).masked_fill_(~mask, -torch.inf) if mask.dtype == torch.bool else mask


def _padded(x: Tensor) -> Tensor:
    """FlashAttention takes multiples of eight features; zeros add nothing to products."""
    return F.pad(x, (0, -x.shape[-1] % 8)) if x.shape[-1] % 8 else x


def _aligned_bias(x: Inputs) -> Tensor | None:
    """The mask as the memory-efficient kernels take it: an aligned addend of shape [B, H, S, T]."""
    bias = x.bias
    if bias is None:
        return None
    if bias.stride(-1) != 1 or any(stride % MASK_ALIGNMENT for stride in bias.stride()[:-1]):
        columns = bias.shape[-1]
        bias = F.pad(bias, (0, MASK_ALIGNMENT - columns % MASK_ALIGNMENT))[..., :columns]
    return bias.expand(*x.query.shape[:3], x.key.shape[2])


@functools.lru_cache(maxsize=1024)
def dense_strides(shape: tuple[int, ...], order: Strides) -> Strides:
    """Strides of a dense tensor of `shape` whose dimensions lie in memory in the order of those with strides `order`."""
    strides, below = [0] * len(shape), 1
    for dim in sorted(range(len(shape)), key=lambda d: (order[d], -d)):
        strides[dim] = below
        below *= shape[dim]
    return tuple(strides)


def _arranged(x: Tensor, strides: Strides) -> Tensor:
    """`x`, copied unless its elements lie in memory as `strides` say."""
    if all(size == 1 or own == wanted for size, own, wanted in zip(x.shape, x.stride(), strides, strict=True)):
        return x
    return torch.empty_strided(x.shape, strides, dtype=x.dtype, device=x.device).copy_(x)


def _refuse_groups(x: Inputs) -> None:
    if x.query.shape[1] != x.key.shape[1]:
        raise RuntimeError("memory-efficient attention takes no grouped heads")


def _scores(x: Inputs, keys: Tensor) -> Tensor:
    """Scaled and masked scores [B, H, S, T] in float32 at least. A causal mask begins at the first row and key."""
    wide = torch.promote_types(x.query.dtype, torch.float32)
    scores = x.query.to(wide) @ keys.to(wide).transpose(-1, -2) * x.scaling
    if x.settings.is_causal:
        seen = torch.ones(scores.shape[-2:], dtype=torch.bool, device=scores.device).tril()
        scores = scores.masked_fill_(~seen, -torch.inf)
    return scores if x.mask is None else scores.add_(additive(x.mask, wide))


def ungrouped(query: Tensor, x: Tensor) -> Tensor:
    """`x` [B, G, T, ...] with as many heads as `query`."""
    groups = query.shape[1] // x.shape[1]
    return x if groups == 1 else x.repeat_interleave(groups, 1)


def grouped(gradient: Tensor, x: Tensor) -> Tensor:
    """The gradient of `x` [B, G, T, ...] from that of `ungrouped`."""
    return gradient if gradient.shape[1] == x.shape[1] else gradient.unflatten(1, (x.shape[1], -1)).sum(2)
