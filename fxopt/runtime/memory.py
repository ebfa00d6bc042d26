"""When each value of a plan dies, and which buffers may take the same storage in turn.

Storage is shared only among buffers that the executor allocates for kernels and whose every use is in sight. Inputs,
constants and outputs (saved activations are outputs) keep their own; so does whatever is handed to a library op that might
keep it or return an alias of it. On a GPU, buffers of known size lie in few blocks of memory (`runtime/arena.py`).

Others are placed greedily in execution order, best fit first: a buffer takes the smallest dead storage that holds it, else
enlarges the largest dead one, else gets a new one (the scheme of MXNet's and TVM's graph planners).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field, replace

import torch

from fxopt.ir.exprs import Int, contiguous_strides
from fxopt.ir.region import BufferSpec, Call, Ref, refs
from fxopt.runtime.arena import blocks
from fxopt.runtime.footprint import holdings, standing
from fxopt.runtime.lifetimes import Lifetimes, Tenancy, nbytes, returns_fresh, shareable, tenancies
from fxopt.runtime.packing import Interval
from fxopt.runtime.plan import Free, Plan, PlanStep, Slot


def plan_memory(plan: Plan, fresh: Callable[[str], bool] | None = None) -> Plan:
    """`plan` with a Free after each value's last use, and with slots for the buffers that can share storage.

    `fresh(op)` says that a Call of `op` neither keeps its tensor arguments nor returns anything that aliases one; by default
    ATen's own annotations decide and custom ops are not trusted. Matrix products write into planned buffers instead of
    allocating their results. Free steps already in the plan are replaced.
    """
    returned = set(refs(plan.outputs))
    own = {b.name: b for b in plan.buffers if b.name not in returned}
    steps = tuple(_into_buffer(s, own) for s in plan.steps if not isinstance(s, Free))
    plain = replace(plan, steps=steps, slots=(), placement={}, offsets={})
    life = Lifetimes.of(plain)
    return _with_slots(replace(plain, steps=_with_frees(plain, life)), plain, life, fresh or returns_fresh)


_WRITES_INTO = {f"aten::{op}.default": f"aten::{op}.out" for op in ("mm", "addmm", "bmm", "baddbmm")}
"""Library calls that can write into a given buffer at no cost, by their variant that does."""


def _into_buffer(step: PlanStep, own: dict[str, BufferSpec]) -> PlanStep:
    """A library call whose result can be one of the buffers `own`, writing there; any other step as it is."""
    if not isinstance(step, Call) or step.op not in _WRITES_INTO or step.outputs in ((), (None,)):
        return step
    (name,) = step.outputs
    spec = own.get(name or "")
    if name is None or spec is None or spec.strides != contiguous_strides(spec.shape):
        return step
    out = {**step.kwargs, "out": Ref(name)}
    return replace(step, op=_WRITES_INTO[step.op], kwargs=out, outputs=(), writes=(*step.writes, name))


# --- slots -----------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Storage:
    """What becomes a slot: a piece of memory, its tenants and where in it they begin."""

    device: torch.device
    size: Int
    tenants: dict[str, int]


def _with_slots(plan: Plan, plain: Plan, life: Lifetimes, fresh: Callable[[str], bool]) -> Plan:
    """`plan`, which is `plain` with Free steps, with slots."""
    found = tenancies(plain, life, shareable(plain, life, fresh))
    in_blocks: dict[torch.device, list[tuple[Tenancy, int]]] = {}
    others = []
    for tenancy in found:
        size, device = nbytes(tenancy.spec), tenancy.spec.device
        if isinstance(size, int) and device.type == "cuda":
            in_blocks.setdefault(device, []).append((tenancy, size))
        else:
            others.append(tenancy)
    storages = _greedy(others)
    for device, own in in_blocks.items():
        storages += _blocks(plain, life, device, own)
    # A lone tenant is simpler as a plain allocation, but on the CPU a slot spares its page faults (`runtime/workspace.py`).
    storages = [s for s in storages if len(s.tenants) > 1 or s.device.type == "cpu"]
    placement = {name: k for k, storage in enumerate(storages) for name in storage.tenants}
    offsets = {name: offset for storage in storages for name, offset in storage.tenants.items() if offset}
    slots = tuple(Slot(s.device, s.size) for s in storages)
    return replace(plan, slots=slots, placement=placement, offsets=offsets)


def _blocks(plain: Plan, life: Lifetimes, device: torch.device, own: Sequence[tuple[Tenancy, int]]) -> list[_Storage]:
    """Blocks for the tenancies `own` and their bytes, all of `device`."""
    intervals = [Interval(t.first, t.last, size) for t, size in own]
    placed = {name for t, _ in own for name in t.names}
    others = [h for h in holdings(plain, life) if h.device == device and h.name not in placed]
    out = []
    for block in blocks(intervals, standing(others, len(plain.steps) + 1)):
        offsets = zip(block.members, block.packing.offsets, strict=True)
        tenants = {name: offset for k, offset in offsets for name in own[k][0].names}
        out.append(_Storage(device, block.packing.height, tenants))
    return out


@dataclass
class _Pool:
    """Storages while they are being filled: sizes grow, dead ones wait for the next buffer."""

    devices: list[torch.device] = field(default_factory=list)
    sizes: list[Int] = field(default_factory=list)
    dead: list[int] = field(default_factory=list)

    def take(self, device: torch.device, size: Int) -> int:
        slot = self._fitting(device, size)
        if slot is None:
            self.devices.append(device)
            self.sizes.append(size)
            return len(self.sizes) - 1
        self.dead.remove(slot)
        return slot

    def _fitting(self, device: torch.device, size: Int) -> int | None:
        candidates = [s for s in self.dead if self.devices[s] == device]
        equal = [s for s in candidates if self.sizes[s] == size]
        if equal:
            return equal[-1]  # the latest to die is the likeliest still in a cache
        sized = {s: n for s in candidates if isinstance(n := self.sizes[s], int)}
        if not sized or not isinstance(size, int):
            return None
        larger = [s for s, n in sized.items() if n >= size]
        if larger:
            return min(larger, key=sized.__getitem__)
        largest = max(sized, key=sized.__getitem__)
        self.sizes[largest] = size
        return largest


def _greedy(found: Sequence[Tenancy]) -> list[_Storage]:
    """Storages that tenancies take in turn, in order of first use."""
    pool = _Pool()
    taken: dict[int, list[Tenancy]] = {}
    waiting: list[tuple[int, int]] = []  # (last step, storage) of those alive
    for tenancy in found:
        gone = sorted(w for w in waiting if w[0] < tenancy.first)
        pool.dead += [slot for _, slot in gone]
        waiting = [w for w in waiting if w[0] >= tenancy.first]
        slot = pool.take(tenancy.spec.device, nbytes(tenancy.spec))
        taken.setdefault(slot, []).append(tenancy)
        waiting.append((tenancy.last, slot))
    return [
        _Storage(pool.devices[slot], pool.sizes[slot], {name: 0 for t in own for name in t.names})
        for slot, own in taken.items()
    ]


# --- ends of lives ---------------------------------------------------------------------------------------------------------


def _with_frees(plan: Plan, life: Lifetimes) -> tuple[PlanStep, ...]:
    out: list[PlanStep] = []
    unused = tuple(x.name for x in plan.inputs if x.name not in life.last)
    if unused:
        out.append(Free(unused))
    constants = {x.name for x in plan.constants}
    last = life.last | life.storage_last()  # an alias may be no more than an address: what it points into outlives it
    dying = _by_step(last, (name for name in last if name not in constants))
    for i, step in enumerate(plan.steps):
        out.append(step)
        if i in dying:
            out.append(Free(tuple(dying[i])))
    return tuple(out)


def _by_step(when: dict[str, int], names: Iterable[str]) -> dict[int, list[str]]:
    out: dict[int, list[str]] = {}
    for name in names:
        out.setdefault(when[name], []).append(name)
    return out
