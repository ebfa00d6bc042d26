"""OpInfo's samples, numbered so that any process finds the same one again."""

from __future__ import annotations

import functools
import random
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch.testing._internal import common_methods_invocations
from torch.testing._internal.common_methods_invocations import op_db
from torch.utils import _pytree as pytree

from tests.opinfo.skips import NOT_RUN

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "int64": torch.int64, "bool": torch.bool}
MODES = ("forward", "training")
LAYOUTS = ("given", "noncontiguous")
DEVICES = {"cpp": "cpu", "interpreter": "cpu", "triton": "cuda"}
"""The executors, each with the device that its samples are on."""


def _plainly(op: Any, *args: Any, **kwargs: Any) -> Any:
    return op(*args, **kwargs)


# Random ops of op_db seed the generator themselves, inside the function: traced, that would be a constant of the graph.
common_methods_invocations.wrapper_set_seed = _plainly


@dataclass(frozen=True, order=True)
class Item:
    """One sample of one op to be compiled one way. `op` is OpInfo.formatted_name.

    The device is that of a whole sweep and its file of records: it is no part of the key.
    """

    op: str
    dtype: str
    mode: str
    layout: str
    number: int
    device: str = "cpu"

    @property
    def key(self) -> str:
        return f"{self.op}|{self.dtype}|{self.mode}|{self.layout}|{self.number}"


@functools.cache
def ops() -> dict[str, Any]:
    """Every OpInfo of op_db by formatted name, in op_db's order."""
    return {op.formatted_name: op for op in op_db}


def supports(op: Any, dtype: str, mode: str, device: str = "cpu") -> bool:
    """Whether the op has samples of `dtype` on `device`, differentiable ones for training."""
    if op.formatted_name in NOT_RUN[device] or not op.supports_dtype(DTYPES[dtype], device):
        return False
    if mode == "forward":
        return True
    return bool(op.supports_autograd and DTYPES[dtype] in op.supported_backward_dtypes(device))


@functools.lru_cache(maxsize=8)
def samples_of(name: str, dtype: str, mode: str, device: str) -> tuple[Any, ...]:
    """The SampleInputs of an op, the same in every process."""
    seed = zlib.crc32(f"{name}|{dtype}".encode())
    torch.manual_seed(seed)
    random.seed(seed)
    np.random.seed(seed)
    return tuple(ops()[name].sample_inputs(device, DTYPES[dtype], requires_grad=mode == "training"))


def spread(count: int, most: int) -> list[int]:
    """Up to `most` numbers below `count`, evenly spread, first and last included; all of them when `most` is 0."""
    if most == 0 or count <= most:
        return list(range(count))
    return sorted({round(k * (count - 1) / max(most - 1, 1)) for k in range(most)})


def items(name: str, dtype: str, mode: str, layout: str, most: int, device: str = "cpu") -> list[Item]:
    """The items of one op; those of layout "noncontiguous" only where the sample has a tensor that can be."""
    samples = samples_of(name, dtype, mode, device)
    numbers = spread(len(samples), most)
    if layout == "noncontiguous":
        numbers = [n for n in numbers if any(t.dim() and t.numel() for t in tensors_of(samples[n]))]
    return [Item(name, dtype, mode, layout, n, device) for n in numbers]


def tensors_of(sample: Any) -> Iterator[torch.Tensor]:
    for leaf in pytree.tree_leaves((sample.input, sample.args, sample.kwargs)):
        if isinstance(leaf, torch.Tensor):
            yield leaf


@dataclass
class Problem:
    """One item as a function of tensors only: `call(tensors)` gives the op's result as OpInfo means it to be looked at.

    `tensors` are the sample's distinct tensors; everything else of the sample is fixed.
    """

    item: Item
    op: Any
    sample: Any
    tensors: list[torch.Tensor]
    leaves: list[Any]
    spec: Any
    position: dict[int, int]

    @classmethod
    def of(cls, item: Item) -> Problem:
        sample = samples_of(item.op, item.dtype, item.mode, item.device)[item.number]
        if item.layout == "noncontiguous":
            sample = sample.noncontiguous()
        leaves, spec = pytree.tree_flatten((sample.input, sample.args, sample.kwargs))
        distinct = list({id(t): t for t in leaves if isinstance(t, torch.Tensor)}.values())
        places = {id(t): k for k, t in enumerate(distinct)}
        position = {k: places[id(leaf)] for k, leaf in enumerate(leaves) if isinstance(leaf, torch.Tensor)}
        return cls(item, ops()[item.op], sample, distinct, leaves, spec, position)

    def call(self, tensors: list[torch.Tensor]) -> Any:
        """The op on `tensors` in place of the sample's own."""
        leaves = [tensors[self.position[k]] if k in self.position else leaf for k, leaf in enumerate(self.leaves)]
        given, args, kwargs = pytree.tree_unflatten(leaves, self.spec)
        return self.sample.output_process_fn_grad(self.op(given, *args, **kwargs))

    def inputs(self) -> list[torch.Tensor]:
        """Fresh copies of the tensors, strides and requires_grad included."""
        return [fresh_copy(t) for t in self.tensors]


def fresh_copy(x: torch.Tensor) -> torch.Tensor:
    """A leaf with `x`'s values, strides and requires_grad in memory of its own; overlapping elements still overlap."""
    plain = x.detach()
    if x.layout != torch.strided or x.is_conj() or x.is_neg() or x.is_nested:
        copy = plain.clone()
    else:
        reach = sum((n - 1) * s for n, s in zip(x.shape, x.stride(), strict=True))
        memory = plain.as_strided((1 + reach if x.numel() else 0,), (1,), x.storage_offset()).clone()
        copy = memory.as_strided(x.shape, x.stride()) if x.numel() else x.new_empty_strided(x.shape, x.stride())
    return copy.requires_grad_(x.requires_grad)


_WIDE = {
    torch.float32: torch.float64,
    torch.float16: torch.float64,
    torch.bfloat16: torch.float64,
    torch.complex64: torch.complex128,
}


def widened(problem: Problem, dtypes: bool) -> Problem:
    """The problem in float64 (complex128); `dtypes`: dtypes among the arguments too."""

    def convert(leaf: Any) -> Any:
        return _WIDE.get(leaf, leaf) if dtypes and isinstance(leaf, torch.dtype) else leaf

    tensors = [t.detach().to(_WIDE.get(t.dtype, t.dtype)).requires_grad_(t.requires_grad) for t in problem.tensors]
    return Problem(
        problem.item,
        problem.op,
        problem.sample,
        tensors,
        [convert(x) for x in problem.leaves],
        problem.spec,
        problem.position,
    )
