"""Quantized layers in eager: the arithmetic of each precision in floating point, on any device.

What a layer's result would be is known without kernels for it: operands are rounded to their grids and multiplied, which is
what the kernels compute, up to the order of their sums. So a search tries hundreds of decisions without compiling them.

Layers are found where the compiler finds them, in the ATen products that a model runs, and have its names: that of the
module whose forward runs the product, `name#1` for a second one of that module in one call of the model.
"""

from __future__ import annotations

import dataclasses
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from fxopt.ir.layers import attention_name
from fxopt.ir.quantized_ops import dequantized, quantize_weight
from fxopt.precision import PRECISIONS, Refinement, Table, convolution_misfit, group_of, misfit
from fxopt.quant.emulate_attention import Attend, Attentions
from fxopt.quant.ranges import GRIDS, Grid

_FLOATING = (torch.float16, torch.bfloat16, torch.float32)


@dataclass(frozen=True)
class Window:
    """How the window of a convolution goes over images: what `aten::convolution` takes beside its operands."""

    stride: tuple[int, ...]
    padding: tuple[int, ...]
    dilation: tuple[int, ...]
    transposed: bool
    output_padding: tuple[int, ...]
    groups: int


@dataclass(frozen=True)
class LayerCall:
    """One product as it runs: x [M, K], weight [N, K], bias [N] or None; what it should return is [M, N].

    With a `window` it is a convolution: x [N, C, ...], and the weight as its module has it.
    """

    name: str
    x: Tensor
    weight: Tensor
    bias: Tensor | None
    window: Window | None = None

    def exact(self) -> Tensor:
        return self.product(self.x, self.weight, self.bias)

    def product(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        """That of other operands of these shapes."""
        if self.window is None:
            return torch.nn.functional.linear(x, weight, bias)
        return torch.ops.aten.convolution.default(x, weight, bias, *dataclasses.astuple(self.window))

    @property
    def rows(self) -> int:
        """M; of a convolution, the places of its window in all images."""
        if self.window is None:
            return len(self.x)
        x, weight = (torch.empty_like(t, device="meta") for t in (self.x, self.weight))
        result = self.product(x, weight, None)
        return result.numel() // result.shape[1]


Treatment = Callable[[LayerCall], Tensor | None]
"""What a layer returns instead of its product; None leaves it as it is."""


@contextmanager
def treated(model: nn.Module, treat: Treatment, attend: Attend | None = None) -> Iterator[None]:
    """While this lasts, each layer that `model`, or a part of it, runs returns what `treat` makes of it, and each attention
    what `attend` does.

    Layers are products with a weight that is a parameter or buffer of `model`. Those in autocast regions are not found:
    their weights are copies.
    """
    stack = _Modules(model)
    try:
        with ExitStack() as modes:
            modes.enter_context(layer_by_layer())
            modes.enter_context(_Products(model, stack, treat))
            if attend is not None:
                modes.enter_context(Attentions(attend, stack.attention))
            yield
    finally:
        stack.remove()


@contextmanager
def layer_by_layer() -> Iterator[None]:
    """While this lasts, `nn.TransformerEncoder` and `nn.MultiheadAttention` run layer by layer, as they are compiled.

    Else they are single operators where no gradient is recorded, and what is padding becomes zero in a nested tensor.
    """
    before = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        yield
    finally:
        torch.backends.mha.set_fastpath_enabled(before)


class _Modules:
    """The qualified names of the modules whose forward runs now, the innermost last."""

    def __init__(self, model: nn.Module) -> None:
        self.names: list[str] = []
        self.seen = Counter[str]()
        self._handles = []
        for name, module in model.named_modules():
            self._handles.append(module.register_forward_pre_hook(self._entering(name), prepend=True))
            self._handles.append(module.register_forward_hook(self._left, always_call=True))

    def _entering(self, name: str) -> Callable[..., None]:
        def enter(module: nn.Module, args: object) -> None:
            if not self.names:
                self.seen.clear()
            self.names.append(name)

        return enter

    def _left(self, module: nn.Module, args: object, result: object) -> None:
        self.names.pop()

    def layer(self) -> str:
        """The name of the next product."""
        name = self.names[-1]
        self.seen[name] += 1
        return name if self.seen[name] == 1 else f"{name}#{self.seen[name] - 1}"

    def attention(self) -> str | None:
        """The name of the next attention; None outside of the model."""
        if not self.names:
            return None
        bare = attention_name(self.names[-1], 0)
        self.seen[bare] += 1
        return attention_name(self.names[-1], self.seen[bare] - 1)

    def remove(self) -> None:
        for handle in self._handles:
            handle.remove()


class _Products(TorchDispatchMode):
    def __init__(self, model: nn.Module, stack: _Modules, treat: Treatment) -> None:
        super().__init__()
        self._stack, self._treat = stack, treat
        held = [*model.parameters(), *model.buffers()]
        self._weights = {t.untyped_storage().data_ptr() for t in held if t.ndim >= 2}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        call = self._layer(func, args, kwargs)
        if call is not None:
            if call.window is None:
                result = self._treat(dataclasses.replace(call, x=call.x.reshape(-1, call.x.shape[-1])))
            else:
                result = self._treat(call)
            if result is not None:
                return result if call.window is not None else result.reshape(*call.x.shape[:-1], call.weight.shape[0])
        return func(*args, **kwargs)

    def _layer(self, func: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> LayerCall | None:
        aten, window = torch.ops.aten, None
        if func is aten.mm.default:
            x, weight, bias = args[0], args[1].t(), None
        elif func is aten.addmm.default and kwargs.get("beta", 1) == 1 and kwargs.get("alpha", 1) == 1:
            x, weight, bias = args[1], args[2].t(), args[0]
        elif func is aten.linear.default:
            x, weight, bias = args[0], args[1], args[2] if len(args) > 2 else None
        elif func is aten.convolution.default:
            x, weight, bias, stride, padding, dilation, transposed, output_padding, groups = args
            window = Window(tuple(stride), tuple(padding), tuple(dilation), transposed, tuple(output_padding), groups)
        else:
            return None
        floating = x.is_floating_point() and self._stack.names
        if not floating or weight.untyped_storage().data_ptr() not in self._weights:
            return None
        return LayerCall(self._stack.layer(), x, weight, bias, window)


def obstacle(call: LayerCall, precision: str) -> str | None:
    """Why the layer cannot be had in `precision`; None if it can."""
    if call.x.dtype not in _FLOATING or call.weight.dtype != call.x.dtype:
        return f"its operands are {call.x.dtype} and {call.weight.dtype}"
    if call.window is not None:
        problem = convolution_misfit(precision, call.weight.dim(), call.window.groups, call.window.transposed)
        if problem is not None:
            return problem
    columns, inner = call.weight.shape[:2]
    return misfit(precision, columns, inner, call.weight.device.type)


def with_table(call: LayerCall, precision: str, table: Table, name: str) -> Tensor:
    """`quantized` with what `table` says of its layer `name`."""
    given = PRECISIONS[precision]
    scale: float | Tensor | None = table.scale(name, precision) if given.is_static else None
    zero = 0 if scale is None else table.zero_point(name, precision)
    if scale is not None and given.has_groups and call.window is None:
        scale = table.group_scales(name, precision)
    return quantized(call, precision, scale, table.channels(name), zero, table.refinement(name, precision))


def quantized(
    call: LayerCall,
    precision: str,
    scale: float | Tensor | None = None,
    channels: Tensor | None = None,
    zero_point: int = 0,
    refinement: Refinement | None = None,
) -> Tensor:
    """The layer's result in `precision`, which is not "high", in x's dtype, as passes/quantize.py computes it.

    `scale`: of the quantized activations, for all rows, in a precision of groups float32 [groups]; None for those of each
    row. `zero_point`: what they have for zero.
    `channels`, float32 [K], of a convolution [C_in]: what x is divided by and the weight multiplied by before. Raises
    KeyError for an unknown precision, ValueError for a layer that has an `obstacle`.
    """
    given = PRECISIONS[precision]
    problem = obstacle(call, precision)
    if problem is not None:
        raise ValueError(f"layer {call.name!r} cannot be {precision}: {problem}")
    if call.window is not None:
        if scale is None:
            raise ValueError(f"convolution {call.name!r} takes its scale from a calibration")
        return _quantized_convolution(call, precision, float(scale), channels, refinement)
    group = (group_of(call.weight.shape[1]) or 0) if given.group else 0
    x, weight = call.x.float(), call.weight
    if channels is not None:
        divisors = channels.to(x.device)
        x, weight = x / divisors, weight.float() * divisors
    limits, correction = (None, None) if refinement is None else (refinement.limits, refinement.correction)
    parts = quantize_weight(weight, getattr(torch, str(given.weights)), given.bits, group, limits)
    if given.activations is not None:
        x = _on_grid(x, GRIDS[given.activations], scale, group) if not zero_point else _shifted(x, scale or 0.0, zero_point)
    result = x @ dequantized(*parts, given.bits, group).t()
    if correction is not None:
        result = result + correction.to(result.device)
    return (result if call.bias is None else result + call.bias.float()).to(call.x.dtype)


def _shifted(x: Tensor, scale: float | Tensor, zero_point: int) -> Tensor:
    """What int8 with a zero point stands for."""
    steps = x.new_tensor(float(scale))
    return ((x * steps.reciprocal() + zero_point).round().clamp(-128.0, 127.0) - zero_point) * steps


def _quantized_convolution(
    call: LayerCall, precision: str, scale: float, channels: Tensor | None, refinement: Refinement | None
) -> Tensor:
    """Of values on their grids, which TF32 holds exactly, and scaled afterwards, as kernels do."""
    given = PRECISIONS[precision]
    columns = [1, -1, *[1] * (call.x.dim() - 2)]
    x, weight = call.x.float(), call.weight
    if channels is not None:
        divisors = channels.to(x.device).view(columns)
        x, weight = x / divisors, weight.float() * divisors
    limits, correction = (None, None) if refinement is None else (refinement.limits, refinement.correction)
    stored, scales = quantize_weight(weight.flatten(1), getattr(torch, str(given.weights)), limits=limits)
    steps = x.new_tensor(scale)
    values = GRIDS[str(given.activations)].rounded(x * steps.reciprocal()).float()
    result = call.product(values, stored.float().view_as(weight), None) * steps * scales.view(columns)
    for offset in (correction, call.bias):
        if offset is not None:
            result = result + offset.to(result.device, torch.float32).view(columns)
    return result.to(call.x.dtype)


def _on_grid(x: Tensor, grid: Grid, scale: float | Tensor | None, group: int) -> Tensor:
    parts = x.unflatten(1, (-1, group)) if group else x
    if scale is None:
        steps = (parts.abs().amax(-1, keepdim=True) / grid.largest).clamp_min(torch.finfo(torch.float32).tiny)
    else:
        steps = scale.to(x.device)[:, None] if isinstance(scale, Tensor) else x.new_tensor(scale)
    return (grid.rounded(parts * steps.reciprocal()).to(x.dtype) * steps).view_as(x)
