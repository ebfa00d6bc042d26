"""Attention among the calls of a lowered graph: what each computes on which operands, and how it is given a backend.

`tune/attention.py` decides which backend is fastest. A backward is no call to decide about: it goes by its forward.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch

from fxopt.ir import ops
from fxopt.ir.attention_backends import Settings
from fxopt.ir.attention_op import attention, attention_forward
from fxopt.ir.exprs import Int
from fxopt.ir.region import Alias, Alternatives, BufferSpec, Call, Ref
from fxopt.lower.calls import overload_name
from fxopt.lower.lowering import Lowered

OPS = {overload_name(op): op for op in (attention, attention_forward)}
TENSORS = ("query", "key", "value", "attn_mask")


@dataclass(frozen=True)
class Operand:
    """A strided tensor, `offset` elements into its buffer."""

    dtype: torch.dtype
    device: torch.device
    shape: tuple[Int, ...]
    strides: tuple[Int, ...]
    offset: Int

    @property
    def numbers(self) -> tuple[Int, ...]:
        return (*self.shape, *self.strides, self.offset)


@dataclass(frozen=True)
class AttentionCall:
    """`call` computes fxopt::attention or attention_forward on `operands`, by the names of its schema. `results` are the
    layouts that the plan relies on, None for one that nobody reads."""

    call: Call
    operands: dict[str, Operand]
    settings: Settings
    results: tuple[BufferSpec | None, ...]

    def __hash__(self) -> int:
        return hash(self.call)

    @property
    def device(self) -> torch.device:
        return self.operands["query"].device

    @property
    def is_static(self) -> bool:
        return all(isinstance(n, int) for operand in self.operands.values() for n in operand.numbers)


def find_attention(lowered: Lowered) -> list[AttentionCall]:
    """Every attention forward among the calls of `lowered`, those of alternatives included, whose operands are known
    tensors, in order."""
    views = {s.name: s for s in lowered.steps if isinstance(s, Alias)}
    ways = [way for s in lowered.steps if isinstance(s, Alternatives) for way in s.ways]
    steps = dict.fromkeys(s for s in (*lowered.steps, *(s for way in ways for s in way.steps)) if isinstance(s, Call))
    calls = [s for s in steps if s.op in OPS]
    return [found for call in calls if (found := _described(call, lowered, views)) is not None]


def with_backends(lowered: Lowered, backends: Mapping[AttentionCall, str]) -> Lowered:
    """`lowered` with each of these calls told its backend."""
    told = {id(found.call): replace(found.call, kwargs={**found.call.kwargs, "backend": b}) for found, b in backends.items()}

    def of(step: Any) -> Any:
        if isinstance(step, Alternatives):
            return replace(step, ways=tuple(replace(way, steps=tuple(map(of, way.steps))) for way in step.ways))
        return told.get(id(step), step)

    return replace(lowered, steps=[of(step) for step in lowered.steps])


def _described(call: Call, lowered: Lowered, views: Mapping[str, Alias]) -> AttentionCall | None:
    op = OPS[call.op]
    given = {a.name: a.default_value for a in ops.schema(op).arguments}
    given.update(zip(given, call.args, strict=False))
    given.update(call.kwargs)
    refs = {name: given[name] for name in TENSORS if given.get(name) is not None}
    operands = {name: _operand(ref, lowered, views) for name, ref in refs.items()}
    known = {name: operand for name, operand in operands.items() if operand is not None}
    literals = (given["is_causal"], given["scale"], given["enable_gqa"])
    if len(known) < len(refs) or not _are_literals(literals) or given.get("dropout_p"):
        return None
    settings = Settings(bool(literals[0]), None if literals[1] is None else float(literals[1]), bool(literals[2]))
    results = tuple(None if name is None else lowered.buffers.get(name) for name in call.outputs)
    return AttentionCall(call, known, settings, results)


def _are_literals(values: Iterable[Any]) -> bool:
    return all(value is None or isinstance(value, (bool, int, float)) for value in values)


def _operand(ref: Any, lowered: Lowered, views: Mapping[str, Alias]) -> Operand | None:
    if not isinstance(ref, Ref):
        return None
    view = views.get(ref.name)
    spec = lowered.buffers.get(ref.name if view is None else view.of)
    if spec is None:
        return None
    if view is None:
        return Operand(spec.dtype, spec.device, spec.shape, spec.strides, 0)
    return Operand(spec.dtype, spec.device, view.shape, view.strides, view.offset)
