"""Lifetimes: when each value of a plan dies, and which buffers may take the same storage in turn.

Storage is shared only among buffers that the executor allocates for kernels and whose every use is in sight. Inputs,
constants and outputs (saved activations are outputs) keep their own; so does whatever is handed to a library op that might
keep it or return an alias of it. Placement is greedy in execution order, best fit first: a buffer takes the smallest dead
storage that holds it, else enlarges the largest dead one, else gets a new one (the scheme of MXNet's and TVM's graph
planners).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field, replace

import torch

from fxopt.ir.exprs import Int, contiguous_strides
from fxopt.ir.region import Alias, BufferSpec, Call, Ref, refs
from fxopt.runtime.plan import Free, Launch, Plan, PlanStep, Slot, allocated, defined, used

_KEPT_OR_RETURNED = frozenset({"native_dropout", "lift"})
"""ATen ops that may return their own argument though no annotation says so. Names with "unsafe" in them are others."""


_KNOWN_NAMESPACES = frozenset({"aten", "mkldnn", "mkl", "fxopt"})
"""Where schemas can be trusted to tell which results alias arguments, and ops do not keep their arguments."""


def nbytes(spec: BufferSpec) -> Int:
    """Bytes from a buffer's first element to the end of its last."""
    return spec.extent * spec.dtype.itemsize


def plan_memory(plan: Plan, fresh: Callable[[str], bool] | None = None) -> Plan:
    """`plan` with a Free after each value's last use, and with slots for the buffers that can share storage.

    `fresh(op)` says that a Call of `op` neither keeps its tensor arguments nor returns anything that aliases one; by default
    ATen's own annotations decide and custom ops are not trusted. Matrix products on the CPU write into planned buffers
    instead of allocating their results. Free steps already in the plan are replaced.
    """
    steps = tuple(_into_buffer(s, plan) for s in plan.steps if not isinstance(s, Free))
    plain = replace(plan, steps=steps, slots=(), placement={})
    life = Lifetimes.of(plain)
    slots, placement = _place(plain, life, shareable(plain, fresh or returns_fresh))
    return replace(plain, steps=_with_frees(plain, life), slots=slots, placement=placement)


def returns_fresh(op: str) -> bool:
    """True when `op` is one of torch's own whose results never alias its arguments and which keeps no argument."""
    namespace, _, rest = op.partition("::")
    if namespace not in _KNOWN_NAMESPACES:
        return False
    packet, _, overload = rest.partition(".")
    target = getattr(getattr(getattr(torch.ops, namespace), packet, None), overload or "default", None)
    if target is None or target.is_view or "unsafe" in packet or packet in _KEPT_OR_RETURNED:
        return False
    composite = target.has_kernel_for_dispatch_key(torch.DispatchKey.CompositeImplicitAutograd)
    return not composite and not packet.endswith("_") and "out" not in overload


_WRITES_INTO = {f"aten::{op}.default": f"aten::{op}.out" for op in ("mm", "addmm", "bmm", "baddbmm")}
"""Library calls that can write into a given buffer at no cost, by their variant that does."""


def _into_buffer(step: PlanStep, plan: Plan) -> PlanStep:
    """A library call on the CPU whose result can live in a planned buffer, writing there; any other step as it is."""
    if not isinstance(step, Call) or step.op not in _WRITES_INTO or step.outputs in ((), (None,)):
        return step
    (name,) = step.outputs
    spec = next((b for b in plan.buffers if b.name == name), None)
    if name is None or spec is None or spec.device.type != "cpu" or name in refs(plan.outputs):
        return step
    if spec.strides != contiguous_strides(spec.shape):
        return step
    out = {**step.kwargs, "out": Ref(name)}
    return replace(step, op=_WRITES_INTO[step.op], kwargs=out, outputs=(), writes=(*step.writes, name))


@dataclass(frozen=True)
class Lifetimes:
    """First and last step that mentions each name; `len(steps)` stands for the outputs. `root` resolves aliases of
    aliases."""

    first: dict[str, int]
    last: dict[str, int]
    root: dict[str, str]

    @staticmethod
    def of(plan: Plan) -> Lifetimes:
        first: dict[str, int] = {}
        last: dict[str, int] = {}
        root: dict[str, str] = {}
        for i, step in enumerate(plan.steps):
            for name in (*used(step), *defined(step)):
                first.setdefault(name, i)
                last[name] = i
            if isinstance(step, Alias):
                root[step.name] = root.get(step.of, step.of)
        last.update(dict.fromkeys(refs(plan.outputs), len(plan.steps)))
        return Lifetimes(first, last, root)

    def storage_last(self) -> dict[str, int]:
        """For each name that is not an alias, the last step that mentions it or an alias of it."""
        out = {name: i for name, i in self.last.items() if name not in self.root}
        for name, owner in self.root.items():
            out[owner] = max(out[owner], self.last[name])
        return out


def shareable(plan: Plan, fresh: Callable[[str], bool]) -> dict[str, BufferSpec]:
    """The buffers that may share storage: allocated, not part of an output, and seen by kernels and `fresh` calls only."""
    life = Lifetimes.of(plan)
    kept = set(refs(plan.outputs))
    for step in plan.steps:
        if isinstance(step, Call) and not fresh(step.op) and not _only_writes(step):
            kept.update(used(step))
    kept_roots = {life.root.get(name, name) for name in kept}
    return {name: spec for name, spec in allocated(plan).items() if name in life.first and name not in kept_roots}


def _only_writes(call: Call) -> bool:
    """An ATen op such as copy_ whose result nobody looks at keeps nothing alive."""
    return call.op.startswith("aten::") and not any(call.outputs)


@dataclass
class _Pool:
    """Slots while they are being filled: sizes grow, dead slots wait for the next buffer."""

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


def _place(plan: Plan, life: Lifetimes, share: dict[str, BufferSpec]) -> tuple[tuple[Slot, ...], dict[str, int]]:
    pool = _Pool()
    placement: dict[str, int] = {}
    last = life.storage_last()
    born = _by_step(life.first, share)
    dying = _by_step(last, share)
    for i, step in enumerate(plan.steps):
        taken = _take_over(step, i, share, life, last, placement)
        for name in born.get(i, ()):
            if name not in placement:
                placement[name] = pool.take(share[name].device, nbytes(share[name]))
        pool.dead += [placement[name] for name in dying.get(i, ()) if name not in taken]
    return _only_shared(pool, placement)


def _by_step(when: dict[str, int], names: Iterable[str]) -> dict[int, list[str]]:
    out: dict[int, list[str]] = {}
    for name in names:
        out.setdefault(when[name], []).append(name)
    return out


def _take_over(
    step: PlanStep,
    i: int,
    share: dict[str, BufferSpec],
    life: Lifetimes,
    last: dict[str, int],
    placement: dict[str, int],
) -> set[str]:
    """Give this launch's in-place outputs their dying inputs' slots; returns those inputs."""
    taken: set[str] = set()
    for new, old in step.inplace if isinstance(step, Launch) else ():
        both = new in share and old in share and old not in taken and new not in placement
        if both and life.first[new] == i and last[old] == i and _same_storage(share[new], share[old]):
            placement[new] = placement[old]
            taken.add(old)
    return taken


def _same_storage(a: BufferSpec, b: BufferSpec) -> bool:
    return a.device == b.device and nbytes(a) == nbytes(b) and a.dtype.itemsize == b.dtype.itemsize


def _only_shared(pool: _Pool, placement: dict[str, int]) -> tuple[tuple[Slot, ...], dict[str, int]]:
    """Slots with more than one tenant, renumbered. A lone tenant is simpler as a plain allocation, but on the CPU a slot
    spares its page faults (`runtime/workspace.py`)."""
    tenants: dict[int, list[str]] = {}
    for name, slot in placement.items():
        tenants.setdefault(slot, []).append(name)
    shared = [slot for slot, names in tenants.items() if len(names) > 1 or pool.devices[slot].type == "cpu"]
    number = {slot: i for i, slot in enumerate(shared)}
    slots = tuple(Slot(pool.devices[s], pool.sizes[s]) for s in shared)
    return slots, {name: number[slot] for name, slot in placement.items() if slot in number}


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
