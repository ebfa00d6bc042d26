"""How much memory a plan holds at each of its steps, as far as that is known before it runs."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

import torch

from fxopt.ir.graph import Role
from fxopt.ir.region import BufferSpec, Call
from fxopt.runtime.lifetimes import Lifetimes, nbytes, returns_fresh
from fxopt.runtime.packing import Interval, sums
from fxopt.runtime.plan import Plan, allocated, defined

PLANNED, OWN, LIBRARY, INPUT = "planned", "own", "library", "input"
"""What memory is: a slot of the plan's, a buffer with a storage of its own (outputs among them), what a library call has
allocated for its result, an input that the caller may have given up."""


@dataclass(frozen=True)
class Holding:
    """A piece of memory, and the steps from its allocation to its end."""

    name: str
    kind: str
    device: torch.device
    interval: Interval


@dataclass(frozen=True)
class Footprint:
    """Most bytes that a call holds at a time beside its inputs, and the parts of that; `outputs` is what it returns.

    Within library calls more may be allocated for a while, of which nothing is known.
    """

    peak: int
    planned: int
    own: int
    library: int
    outputs: int


def footprint(plan: Plan, device: torch.device) -> Footprint | None:
    """What a call of `plan` holds on `device`; None where sizes are known only at run time."""
    found = _held(plan, device)
    if found is None:
        return None
    times = len(plan.steps) + 1
    total = sums([h.interval for h in found], times)
    at = max(range(times), key=total.__getitem__)
    parts = {kind: sums([h.interval for h in found if h.kind == kind], times)[at] for kind in (PLANNED, OWN, LIBRARY)}
    outputs = sums([h.interval for h in found if h.kind != PLANNED], times)[-1]
    return Footprint(total[at], parts[PLANNED], parts[OWN], parts[LIBRARY], outputs)


def peak_with(plan: Plan, device: torch.device, given: Iterable[tuple[Sequence[str], int]]) -> int | None:
    """Most bytes that a call of `plan` holds on `device` at a time, with memory that it is `given`: names of inputs in one
    piece of memory, which ends with the last use of any of them, and its bytes. None where sizes are known only at run
    time."""
    found = _held(plan, device)
    if found is None:
        return None
    last = Lifetimes.of(plan).storage_last()
    inputs = [Interval(0, max(last.get(name, 0) for name in names), size) for names, size in given]
    return max(sums([*(h.interval for h in found), *inputs], len(plan.steps) + 1))


def _held(plan: Plan, device: torch.device) -> list[Holding] | None:
    """What a call holds on `device` beside its inputs; None where sizes are known only at run time."""
    if any(not isinstance(n, int) for n in (*map(nbytes, plan.buffers), *(s.nbytes for s in plan.slots))):
        return None
    life = Lifetimes.of(plan)
    return [h for h in (*holdings(plan, life), *_slots(plan, life)) if h.device == device and h.kind != INPUT]


def holdings(plan: Plan, life: Lifetimes) -> Iterator[Holding]:
    """The memory of known size that a call of `plan` holds outside of slots."""
    last, end = life.storage_last(), len(plan.steps)
    specs = {b.name: b for b in plan.buffers}
    library = {name for step in plan.steps if isinstance(step, Call) and _allocates(step.op) for name in defined(step)}
    for name, spec in allocated(plan).items():
        if name not in plan.placement and name in last:
            yield from _holding(spec, OWN, life.first.get(name, end), last[name])
    for name in library & specs.keys():
        yield from _holding(specs[name], LIBRARY, life.first[name], last[name])
    for x in plan.inputs:
        if x.role is Role.USER and x.dtype is not None and x.device is not None:
            spec = BufferSpec(x.name, x.dtype, x.device, x.shape, x.strides)
            yield from _holding(spec, INPUT, 0, last.get(x.name, 0))


def standing(found: Sequence[Holding], times: int) -> list[list[int]]:
    """The bytes of `found` at each of `times` steps: when inputs end with their last use, and when the caller keeps them."""
    own = [h.interval for h in found if h.kind != INPUT]
    given = [h.interval for h in found if h.kind == INPUT]
    kept = [Interval(0, times - 1, x.nbytes) for x in given]
    return [sums([*own, *inputs], times) for inputs in (given, kept)]


def _holding(spec: BufferSpec, kind: str, first: int, last: int) -> Iterator[Holding]:
    size = nbytes(spec)
    if isinstance(size, int):
        yield Holding(spec.name, kind, spec.device, Interval(first, last, size))


def _slots(plan: Plan, life: Lifetimes) -> Iterator[Holding]:
    last = life.storage_last()
    for k, slot in enumerate(plan.slots):
        tenants = [name for name, other in plan.placement.items() if other == k]
        size = slot.nbytes
        assert isinstance(size, int)
        interval = Interval(min(life.first[n] for n in tenants), max(last[n] for n in tenants), size)
        if slot.device.type == "cpu":  # a part of the call's one block
            interval = Interval(0, len(plan.steps), size)
        yield Holding(f"slot {k}", PLANNED, slot.device, interval)


def _allocates(op: str) -> bool:
    """Whether results of `op` are in memory of their own; ops of which nothing is known are thought to be so."""
    return returns_fresh(op) or not op.startswith("aten::")
