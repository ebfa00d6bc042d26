"""Short forms for building plans in tests."""

from __future__ import annotations

from typing import Any

import torch

from fxopt.ir.exprs import Int, Sym, contiguous_strides, prod, symbol
from fxopt.ir.region import BufferSpec
from fxopt.runtime.plan import InputSpec, Launch, Plan

CPU = torch.device("cpu")
F32 = torch.float32
S0 = symbol(Sym("s0", lo=0))


def tensor(name: str, *shape: Int, dtype: torch.dtype = F32, **kwargs: Any) -> InputSpec:
    return InputSpec(name, dtype=dtype, device=CPU, shape=shape, strides=contiguous_strides(shape), **kwargs)


def buffer(name: str, *shape: Int, dtype: torch.dtype = F32, strides: tuple[Int, ...] | None = None) -> BufferSpec:
    return BufferSpec(name, dtype, CPU, shape, contiguous_strides(shape) if strides is None else strides)


def launch(entry: str, *buffers: str, sizes: tuple[Int, ...], **kwargs: Any) -> Launch:
    """A C++ launch whose last buffer is its output."""
    return Launch(entry, "cpp", entry, buffers, (buffers[-1],), CPU, sizes, **kwargs)


def increment(source: str, target: str, *shape: Int, **kwargs: Any) -> Launch:
    return launch("increment", source, target, sizes=(prod(shape),), **kwargs)


def plan(inputs: list[InputSpec], buffers: list[BufferSpec], steps: list[Any], outputs: list[Any], **kwargs: Any) -> Plan:
    constants = kwargs.pop("constants", ())
    symbols = kwargs.pop("symbols", ())
    return Plan(
        "test", tuple(inputs), tuple(constants), tuple(symbols), tuple(buffers), tuple(steps), tuple(outputs), **kwargs
    )
