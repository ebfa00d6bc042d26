"""What a plan's values are in the text of its function: sizes, constants and arguments, tensors, addresses and their memory.

Memory comes into being before the first step that mentions it. On CPUs all shared storages lie in one block that is taken
for the call, on GPUs each is a storage of its own.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from fxopt.ir.exprs import Atom, Expr, Int
from fxopt.ir.region import Alias, BufferSpec, Call, Ref, Size, refs
from fxopt.runtime.plan import Free, Launch, Plan, allocated

ALIGNMENT = 16
"""Bytes; what `Launch.aligned` promises a kernel."""
LINE = 64
"""Bytes of a CPU's cache line."""


class ValueWriter:
    """The values of one plan: writes `lines`, and before them `prologue`; `names` are the globals that these need.

    `helpers` are the runtime functions that the text calls by name.
    """

    def __init__(self, plan: Plan, constants: Mapping[str, torch.Tensor], helpers: Mapping[str, Any]) -> None:
        self.plan, self.constants, self.helpers = plan, constants, helpers
        self.lines: list[str] = []
        self.names: dict[str, Any] = dict(helpers)
        self.own = allocated(plan)
        self.symbols = {s.name: f"y{i}" for i, s in enumerate(plan.symbols)}
        self.tensors: dict[str, str] = {x.name: f"v{i}" for i, x in enumerate(plan.inputs)}
        self.addresses: dict[str, str] = {}
        self.expressions: dict[Expr, str] = {}
        self.prologue: list[str] = []
        self.materialized = _needs_tensor(plan)
        self.tenants = [{n for n, s in plan.placement.items() if s == i} for i in range(len(plan.slots))]
        self.uniform = [len({(plan.offsets.get(n, 0), *self._layout(n)) for n in names}) <= 1 for names in self.tenants]
        self.open_slots: set[int] = set()
        self.known: dict[Any, str] = {}
        self.offsets: list[Int] = []
        self.workspace: Int = 0
        self._lay_out_workspace()
        self.views: dict[tuple[Any, ...], str] = {}
        self.counter = len(plan.inputs)
        launched = [s.device.index or 0 for s in plan.steps if isinstance(s, Launch) and s.language != "cpp"]
        self.device = next(iter(launched), 0)
        self.streams = sorted(set(launched))
        self.current = self.device if len(self.streams) == 1 else None  # the GPU that is current throughout a call

    # --- values

    def _emit(self, line: str) -> None:
        self.lines.append(line)

    def _fresh(self, letter: str) -> str:
        self.counter += 1
        return f"{letter}{self.counter}"

    def _constant(self, value: Any) -> str:
        """The global that holds `value`; equal dtypes, devices and the like share one."""
        plain = isinstance(value, (torch.dtype, torch.device, torch.layout, torch.memory_format))
        if plain and value in self.known:
            return self.known[value]
        name = self._fresh("k")
        self.names[name] = value
        if plain:
            self.known[value] = name
        return name

    def _size(self, x: Int) -> str:
        """Source of an integer: a literal, or a local computed once at the start of the call."""
        if isinstance(x, int):
            return repr(x)
        if x not in self.expressions:
            self.expressions[x] = f"e{len(self.expressions)}"
            self.prologue.append(f"{self.expressions[x]} = {self._polynomial(x)}")
        return self.expressions[x]

    def _polynomial(self, x: Int) -> str:
        if isinstance(x, int):
            return repr(x)
        terms = []
        for monomial, coefficient in x.terms:
            factors = [self._atom(a) if isinstance(a, Atom) else self.symbols[a.name] for a in monomial]
            terms.append("*".join([repr(coefficient), *factors] if coefficient != 1 or not factors else factors))
        return "(" + " + ".join(terms) + ")"

    def _atom(self, atom: Atom) -> str:
        a, b = self._polynomial(atom.a), self._polynomial(atom.b)
        operator = {"floordiv": "//", "mod": "%"}.get(atom.kind)
        return f"({a} {operator} {b})" if operator else f"{atom.kind}({a}, {b})"

    def _shape(self, xs: tuple[Int, ...]) -> str:
        return "(" + "".join(f"{self._size(x)}, " for x in xs) + ")"

    def _value(self, value: Any) -> str:
        """Source of an op argument or output."""
        match value:
            case Ref(name):
                return self.tensors[name]
            case Size(expr):
                return self._size(expr)
            case None | bool() | int() | str():
                return repr(value)
            case list():
                return "[" + ", ".join(self._value(x) for x in value) + "]"
            case tuple():
                return "(" + "".join(f"{self._value(x)}, " for x in value) + ")"
            case dict():
                return "{" + ", ".join(f"{k!r}: {self._value(v)}" for k, v in value.items()) + "}"
        return self._constant(value)

    # --- memory

    def _layout(self, name: str) -> tuple[torch.dtype, tuple[Int, ...], tuple[Int, ...]]:
        spec = self.own[name]
        return spec.dtype, spec.shape, spec.strides

    def _allocate(self, name: str) -> None:
        """Bring an allocated buffer into being before the first step that mentions it."""
        if name not in self.own or name in self.tensors or name in self.addresses:
            return
        slot = self.plan.placement.get(name)
        if slot is None:
            self.tensors[name] = self._fresh("v")
            self._emit(f"{self.tensors[name]} = {self._empty(self.own[name])}")
        else:
            self._place(name, slot)

    def _empty(self, spec: BufferSpec) -> str:
        dtype, device = self._constant(spec.dtype), self._constant(spec.device)
        quick = "empty_cpu" if spec.device.type == "cpu" else "empty_cuda"
        here = spec.device.type == "cpu" or (spec.device.type == "cuda" and (spec.device.index or 0) == self.current)
        if here and quick in self.helpers:
            return f"{quick}({self._shape(spec.shape)}, {self._shape(spec.strides)}, {dtype})"
        return f"empty({self._shape(spec.shape)}, {self._shape(spec.strides)}, dtype={dtype}, device={device})"

    def _lay_out_workspace(self) -> None:
        """Where each CPU slot begins in the call's one block of memory; other slots are storages themselves."""
        for slot in self.plan.slots:
            self.offsets.append(self.workspace if slot.device.type == "cpu" else 0)
            if slot.device.type == "cpu":
                # A few lines apart: slots a power of two long would else meet in the same cache sets.
                self.workspace = self.workspace + (slot.nbytes + (LINE - 1)) // LINE * LINE + 3 * LINE

    def _open_workspace(self) -> list[str]:
        used = [
            f"q{slot} = Q + {self._size(self.offsets[slot])}" for slot in sorted(self.open_slots) if self._in_workspace(slot)
        ]
        typed = [f"{text} = W.view({key[1]})" for key, text in self.views.items() if key[0] == "typed"]
        return [f"W = take({self._size(self.workspace)})", "Q = W.data_ptr()", *used, *typed]

    def _in_workspace(self, slot: int | None) -> bool:
        return slot is not None and self.plan.slots[slot].device.type == "cpu"

    def _place(self, name: str, slot: int) -> None:
        """Make `name` a tenant of a shared storage, allocating that for its first tenant."""
        offset = self.plan.offsets.get(name, 0)
        self.addresses[name] = f"q{slot} + {offset}" if offset else f"q{slot}"
        if self._in_workspace(slot):
            self.open_slots.add(slot)
        elif slot not in self.open_slots:
            self.open_slots.add(slot)
            alone = self._empty(self.own[name] if self.uniform[slot] else self._bytes(slot))
            self._emit(f"m{slot} = {alone}")
            self._emit(f"q{slot} = m{slot}.data_ptr()")
        if not self._in_workspace(slot) and self.uniform[slot]:
            self.tensors[name] = f"m{slot}"
        elif name in self.materialized:
            self.tensors[name] = self._view_into(slot, name)

    def _view_into(self, slot: int, name: str) -> str:
        """`name` as a tensor; tenants with equal layouts at one place are the same tensor object."""
        spec, offset = self.own[name], self.plan.offsets.get(name, 0)
        layout = ("view", slot, offset, *self._layout(name))
        if layout not in self.views:
            dtype = self._constant(spec.dtype)
            first = self._size((self.offsets[slot] + offset) // spec.dtype.itemsize)
            if self._in_workspace(slot):
                base = self.views.setdefault(("typed", dtype), f"W_{dtype}")
            elif ("bytes", slot, dtype) in self.views:
                base = self.views["bytes", slot, dtype]
            else:
                base = self.views["bytes", slot, dtype] = self._fresh("v")
                self._emit(f"{base} = m{slot}.view({dtype})")
            self.views[layout] = self._fresh("v")
            self._emit(f"{self.views[layout]} = {self._untracked_view(base, spec.shape, spec.strides, first)}")
        return self.views[layout]

    def _untracked_view(self, base: str, shape: tuple[Int, ...], strides: tuple[Int, ...], offset: str) -> str:
        """`base`, which begins where its storage does, in another layout and with versions of its own."""
        layout = f"{self._shape(shape)}, {self._shape(strides)}, {offset}"
        return f"reinterpret({base}, {layout})" if "reinterpret" in self.helpers else f"{base}.as_strided({layout})"

    def _bytes(self, slot: int) -> BufferSpec:
        """The slot as bytes, rounded up so that it can be viewed as any dtype."""
        size = (self.plan.slots[slot].nbytes + (ALIGNMENT - 1)) // ALIGNMENT * ALIGNMENT
        return BufferSpec("", torch.uint8, self.plan.slots[slot].device, (size,), (1,))

    def _address(self, name: str) -> str:
        """Source of a buffer's address, computed once."""
        if name not in self.addresses:
            tensor = self.tensors[name]
            self.addresses[name] = self._fresh("p")
            self._emit(f"{self.addresses[name]} = {tensor}.data_ptr()")
        return self.addresses[name]

    def _fetch_addresses(self, buffers: tuple[str, ...]) -> None:
        """The addresses of all of `buffers` in one statement, which takes two thirds of the time of one for each."""
        names = [n for n in dict.fromkeys(buffers) if n not in self.addresses and n not in self.constants]
        if not names:
            return
        for name in names:
            self.addresses[name] = self._fresh("p")
        targets = "".join(f"{self.addresses[n]}, " for n in names)
        self._emit(f"{targets}= map(data_ptr, ({''.join(f'{self.tensors[n]}, ' for n in names)}))")

    def _free(self, step: Free) -> None:
        gone = []
        for name in step.names:
            slot = self.plan.placement.get(name)
            if slot is None:
                tensor = self.tensors.get(name)
                if tensor is not None and name not in self.constants:
                    gone.append(tensor)
            elif not self._in_workspace(slot):
                self.tenants[slot].discard(name)
                if not self.tenants[slot]:
                    views = (text for key, text in self.views.items() if key[0] in ("view", "bytes") and key[1] == slot)
                    gone += [f"m{slot}", *views]
        if gone:
            self._emit(f"del {', '.join(gone)}")


def _needs_tensor(plan: Plan) -> set[str]:
    """Names that must exist as tensor objects: seen by library calls or callers, or misaligned perhaps; others are
    addresses."""
    out = set(refs(plan.outputs))
    own = allocated(plan)
    for step in plan.steps:
        if isinstance(step, Call):
            out.update(refs(step.args), refs(step.kwargs))
        if isinstance(step, Launch) and step.language != "cpp":
            out.update(n for n in (step.buffers[i] for i in step.aligned) if n not in own)
    for step in reversed(plan.steps):
        if isinstance(step, Alias) and step.name in out:
            out.add(step.of)
    return out
