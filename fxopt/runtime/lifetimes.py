"""When each value of a plan is first and last mentioned, and whose storage may be shared."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch

from fxopt.ir.exprs import Int
from fxopt.ir.region import Alias, BufferSpec, Call, refs
from fxopt.runtime.plan import Launch, Plan, allocated, defined, used

_KEPT_OR_RETURNED = frozenset({"native_dropout", "lift"})
"""ATen ops that may return their own argument though no annotation says so. Names with "unsafe" in them are others."""

_KNOWN_NAMESPACES = frozenset({"aten", "mkldnn", "mkl", "fxopt"})
"""Where schemas can be trusted to tell which results alias arguments, and ops do not keep their arguments."""


def nbytes(spec: BufferSpec) -> Int:
    """Bytes from a buffer's first element to the end of its last."""
    return spec.extent * spec.dtype.itemsize


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


def shareable(plan: Plan, life: Lifetimes, fresh: Callable[[str], bool]) -> dict[str, BufferSpec]:
    """The buffers that may share storage: allocated, not part of an output, and seen by kernels and `fresh` calls only."""
    kept = set(refs(plan.outputs))
    for step in plan.steps:
        if isinstance(step, Call) and not fresh(step.op) and not only_writes(step):
            kept.update(used(step))
    kept_roots = {life.root.get(name, name) for name in kept}
    return {name: spec for name, spec in allocated(plan).items() if name in life.first and name not in kept_roots}


def only_writes(call: Call) -> bool:
    """An ATen op such as copy_ whose result nobody looks at keeps nothing alive."""
    return call.op.startswith("aten::") and not any(call.outputs)


@dataclass
class Tenancy:
    """Buffers that are one piece of memory: each after the first takes over from the one before it, in place.

    It is needed from step `first` to step `last`, both included.
    """

    names: list[str]
    spec: BufferSpec
    first: int
    last: int


def tenancies(plan: Plan, life: Lifetimes, share: dict[str, BufferSpec]) -> list[Tenancy]:
    """The buffers in `share` by the memory that they need, in order of first use.

    An output of a launch takes over the memory of an operand that dies there, where the launch allows it.
    """
    last = life.storage_last()
    of: dict[str, Tenancy] = {}
    for name in sorted(share, key=life.first.__getitem__):
        step = plan.steps[life.first[name]]
        for new, old in step.inplace if isinstance(step, Launch) else ():
            dies = old in of and of[old].names[-1] == old and last[old] == life.first[name]
            if new == name and dies and _same_storage(share[new], share[old]):
                of[name] = of[old]
                of[name].names.append(name)
                of[name].last = last[name]
                break
        else:
            of[name] = Tenancy([name], share[name], life.first[name], last[name])
    return list({id(t): t for t in of.values()}.values())


def _same_storage(a: BufferSpec, b: BufferSpec) -> bool:
    return a.device == b.device and nbytes(a) == nbytes(b) and a.dtype.itemsize == b.dtype.itemsize
