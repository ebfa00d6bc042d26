"""How long a layer takes in each precision on this device: layers of equal shapes are measured once, each precision compiled
with its casts and what they fuse with."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fxopt.ir.layers import AT_ATTENTION, OPERANDS
from fxopt.precision import HIGH, PRECISIONS
from fxopt.quant.batches import compiled_apart
from fxopt.quant.emulate import Window
from fxopt.quant.table import Calibration
from fxopt.report.measure import interleaved

READER = 16
"""Channels of the convolution that reads a measured one: few, so that it costs little beside what it reads."""

NOISE = 0.02
"""Of a layer's time: a precision that saves less is not faster."""


@dataclass(frozen=True)
class LayerShape:
    """x [rows, inner] by a weight [columns, inner], with or without bias."""

    rows: int
    inner: int
    columns: int
    bias: bool
    dtype: torch.dtype
    device: torch.device


@dataclass(frozen=True)
class ConvolutionShape:
    """Images of shape `given` under a window with a weight of shape `weight`, with or without bias."""

    given: tuple[int, ...]
    weight: tuple[int, ...]
    window: Window
    bias: bool
    dtype: torch.dtype
    device: torch.device
    channels_last: bool

    @property
    def columns(self) -> int:
        return self.weight[0]


def unavailable(precision: str, device: torch.device) -> str | None:
    """Why a device has no arithmetic for a precision, so that nothing needs to be measured; None if it has."""
    if PRECISIONS[precision].activations != "float8_e4m3fn":
        return None
    if device.type != "cuda":
        return "a CPU has no products in float8"
    return None if torch.cuda.get_device_capability(device) >= (8, 9) else "this GPU has no products in float8"


@dataclass(frozen=True)
class AttentionShape:
    """query [batch, heads, rows, width], key and value [batch, groups, keys, width]."""

    batch: int
    heads: int
    groups: int
    rows: int
    keys: int
    width: int
    value_width: int
    causal: bool
    dtype: torch.dtype
    device: torch.device


class _AttentionRegion(nn.Module):
    """Attention behind products by elements, which stand for what its casts fuse with."""

    def __init__(self, shape: AttentionShape) -> None:
        super().__init__()
        self.causal, self.grouped = shape.causal, shape.heads != shape.groups

    def forward(self, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        out: Tensor = F.scaled_dot_product_attention(
            query * 2, key * 2, value * 2, is_causal=self.causal, enable_gqa=self.grouped
        )
        return out.transpose(1, 2).flatten(2)


class _Region(nn.Module):
    """A layer behind a product by elements, which stands for the norm or activation that a cast fuses with."""

    def __init__(self, shape: LayerShape) -> None:
        super().__init__()
        where: dict[str, Any] = {"dtype": shape.dtype, "device": shape.device}
        self.gain = nn.Parameter(torch.rand(shape.inner, **where) + 0.5)
        self.layer = nn.Linear(shape.inner, shape.columns, bias=shape.bias, **where)

    def forward(self, x: Tensor) -> Tensor:
        result: Tensor = self.layer(x * self.gain)
        return result


class _Images(nn.Module):
    """A convolution behind a product by elements, and what reads its activation: a layer of a chain is worth quantizing for
    what it writes, too."""

    def __init__(self, shape: ConvolutionShape) -> None:
        super().__init__()
        where: dict[str, Any] = {"dtype": shape.dtype, "device": shape.device}
        columns, inner, *window = shape.weight
        self.gain = nn.Parameter(torch.rand(inner, 1, 1, **where) + 0.5)
        geometry = (tuple(window), shape.window.stride, shape.window.padding, shape.window.dilation)
        self.layer = nn.Conv2d(inner, columns, *geometry, bias=shape.bias, **where)  # type: ignore[arg-type]  # pairs
        self.reader = nn.Conv2d(columns, READER, 1, bias=False, **where)

    def forward(self, x: Tensor) -> Tensor:
        result: Tensor = self.reader(torch.relu(self.layer(x * self.gain)))
        return result


def measured(
    shape: LayerShape | ConvolutionShape,
    precisions: Iterable[str],
    calibration: Calibration,
    layer: str,
    backend: Any,
    seconds: float,
) -> dict[str, float]:
    """Seconds of the layer in each of `precisions` and in "high", as they are when calls follow each other.

    `layer` is one of `calibration` that has this shape; its scale is compiled in. `seconds` is the time for measuring all.
    """
    # As a user has it: who asks for random numbers later gets the same.
    devices = [shape.device] if shape.device.type == "cuda" else []
    with torch.random.fork_rng(devices=devices), torch.no_grad():
        torch.manual_seed(0)
        region, x = _region(shape)
        own = dataclasses.replace(calibration[layer], name="layer", precision=None)
        known = [own]
        if isinstance(shape, ConvolutionShape):
            reader = (READER, shape.columns, 1, 1)
            known.append(dataclasses.replace(own, name="reader", shape=reader, scale=0.05, channels=None))
        table = dataclasses.replace(calibration, layers=tuple(known))
        calls = {name: _compiled(region, x, name, table, backend) for name in (HIGH, *precisions)}
        for call in calls.values():
            call()
        timings = interleaved(calls, shape.device, seconds=seconds, ahead=shape.device.type == "cuda")
    return {name: timing.median for name, timing in timings.items()}


def _region(shape: LayerShape | ConvolutionShape) -> tuple[nn.Module, Tensor]:
    """What is measured for a layer, and what it is given."""
    if isinstance(shape, LayerShape):
        return _Region(shape).eval(), torch.randn(shape.rows, shape.inner, dtype=shape.dtype, device=shape.device)
    layout = torch.channels_last if shape.channels_last else torch.contiguous_format
    x = torch.randn(shape.given, dtype=shape.dtype, device=shape.device)
    region = _Images(shape).eval()
    region.to(memory_format=layout)  # type: ignore[call-overload]  # torch's stubs leave it out
    return region, x.to(memory_format=layout)


def _compiled(region: nn.Module, x: Tensor, precision: str, table: Calibration, backend: Any) -> Any:
    options: dict[str, Any] = {"freeze": True, "precision": precision}
    if PRECISIONS[precision].is_static:
        options["calibration"] = table
    compiled = compiled_apart(region, backend, options, dynamic=False)
    return lambda: compiled(x)


def measured_attention(
    shape: AttentionShape, precisions: Iterable[str], calibration: Calibration, layer: str, backend: Any, seconds: float
) -> dict[str, float]:
    """`measured` of attention; without a mask, which costs every precision the same."""
    devices = [shape.device] if shape.device.type == "cuda" else []
    with torch.random.fork_rng(devices=devices), torch.no_grad():
        torch.manual_seed(0)

        def made(heads: int, rows: int, width: int) -> Tensor:
            sizes = (shape.batch, rows, heads, width)
            return torch.randn(sizes, dtype=shape.dtype, device=shape.device).transpose(1, 2)

        keys = made(shape.groups, shape.keys, shape.width), made(shape.groups, shape.keys, shape.value_width)
        args = (made(shape.heads, shape.rows, shape.width), *keys)
        region = _AttentionRegion(shape).eval()
        own = tuple(dataclasses.replace(calibration[f"{layer}.{x}"], name=f"{AT_ATTENTION}.{x}") for x in OPERANDS)
        calls = {}
        for name in (HIGH, *precisions):
            options: dict[str, Any] = {"freeze": True, "precision": {f"*{AT_ATTENTION}": name}}
            if name != HIGH:
                options["calibration"] = dataclasses.replace(calibration, layers=own)
            compiled = compiled_apart(region, backend, options, dynamic=False)
            calls[name] = functools.partial(compiled, *args)
        for call in calls.values():
            call()
        timings = interleaved(calls, shape.device, seconds=seconds, ahead=shape.device.type == "cuda")
    return {name: timing.median for name, timing in timings.items()}
