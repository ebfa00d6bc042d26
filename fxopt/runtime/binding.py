"""From a plan to one straight-line Python function.

Everything that can be decided once is decided here: which op overload, which constants, which sizes are literals, which
buffers need a tensor object and which are only an address. What remains is source text in which each step is a line or two,
compiled with `compile()`. Names in the text are the writer's own (v: tensors, p: addresses, m: shared storages, y: size
symbols, e: size expressions, k: constants); nothing from the plan's bytes is pasted in but integers, checked strings as
literals and known operators.

Pointer and size arguments of native kernels live in two arrays per running call (a frame), prefilled with what never
changes. Frames are taken from a list and put back, so that threads never share one.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch

from fxopt.errors import PlanError
from fxopt.ir.graph import Role
from fxopt.ir.region import Alias, BufferSpec, Call, Ref, refs
from fxopt.runtime.binding_values import ALIGNMENT, ValueWriter
from fxopt.runtime.lifetimes import Lifetimes, only_writes, returns_fresh
from fxopt.runtime.plan import Free, Launch, Plan, PlanStep
from fxopt.runtime.plan_ops import DIRECT

MANY = 16
"""Buffers of one launch whose addresses are asked for together."""


@dataclass
class Binding:
    """The result of writing a plan down: `source` defines `run`; `names` are the globals it needs, beside `new_frame` and
    `frames`. `pointers` and `sizes` prefill a frame's arrays; `cuda` lists the launches that need a prebound CUDA
    launcher, each with whether it is an early one."""

    source: str
    names: dict[str, Any]
    pointers: list[int]
    sizes: list[int]
    cuda: list[tuple[Launch, bool]]


class Writer(ValueWriter):
    """Writes the source of one plan. `helpers` are the runtime functions that the text calls by name."""

    def __init__(
        self,
        plan: Plan,
        constants: Mapping[str, torch.Tensor],
        natives: Mapping[str, Callable[[int, int], int]],
        ops: Mapping[str, Callable[..., Any]],
        helpers: Mapping[str, Any],
        profile: bool = False,
    ) -> None:
        super().__init__(plan, constants, helpers)
        self.natives, self.ops, self.profile = natives, ops, profile
        self.pointers: list[int] = []
        self.sizes: list[int] = []
        self.cuda: list[tuple[Launch, bool]] = []
        self.specs: dict[str, BufferSpec] = {s.name: s for s in plan.buffers}
        self.parameters = {x.name for x in plan.inputs if x.role is Role.PARAMETER and x.is_static}
        self.roots = Lifetimes.of(plan).root
        self.before: Launch | None = None
        self.tracked = _tracked(plan, self.roots)

    # --- the whole

    def write(self) -> Binding:
        for name, tensor in self.constants.items():
            self.tensors[name] = self._constant(tensor)
        for step in self.plan.steps:
            self._step(step)
        returned = self._outputs()
        workspace = self._open_workspace() if self.workspace != 0 else []
        opening = [*self._unpack(), *self.prologue, *workspace, *self._open_frame()]
        closing = [*(["give(W)"] if workspace else []), *self._close_frame(), f"return {returned}"]
        body = [*opening, *self.lines, *closing]
        source = "def run(inputs):\n" + "".join(f"    {line}\n" for line in body)
        return Binding(source, self.names, self.pointers, self.sizes, self.cuda)

    def _unpack(self) -> list[str]:
        targets = "".join(f"v{i}, " for i in range(len(self.plan.inputs)))
        out = [f"{targets}= inputs"] if targets else []
        out.append("inputs.clear()")
        for symbol, source in zip(self.symbols.values(), self.plan.symbols, strict=True):
            found = f"v{source.input}" + ("" if source.what == "value" else f".{source.what}({source.dim})")
            solved = found if (source.times, source.plus) == (1, 0) else f"({found} - {source.plus}) // {source.times}"
            out.append(f"{symbol} = {solved}")
        return out

    def _has_frame(self) -> bool:
        return bool(self.pointers or self.sizes or self.cuda)

    def _open_frame(self) -> list[str]:
        if not self._has_frame():
            return []
        return ["try: frame = frames.pop()", "except IndexError: frame = new_frame()", "P, S, A, B, L = frame"]

    def _close_frame(self) -> list[str]:
        return ["frames.append(frame)"] if self._has_frame() else []

    def _outputs(self) -> str:
        for name in dict.fromkeys(refs(self.plan.outputs)):
            self._allocate(name)
        views = {step.name for step in self.plan.steps if isinstance(step, Alias)}
        return "(" + "".join(f"{self._output(x, views)}, " for x in self.plan.outputs) + ")"

    def _output(self, value: Any, views: set[str]) -> str:
        """Views are handed out detached: an output without gradient must not be known to autograd as a view of one with."""
        text = self._value(value)
        return f"{text}.detach()" if isinstance(value, Ref) and value.name in views else text

    def _step(self, step: PlanStep) -> None:
        match step:
            case Launch():
                self._launch(step)
            case Call():
                self._call(step)
            case Alias():
                self._alias(step)
            case Free():
                self._free(step)

    # --- steps

    def _alias(self, step: Alias) -> None:
        self._allocate(step.of)
        offset = self._size(step.offset)
        if step.name not in self.materialized:
            moved = "" if offset == "0" else f" + {offset}*{self._itemsize(step.of)}"
            source = f"{self._address(step.of)}{moved}"
            self.addresses[step.name] = self._fresh("p")
            self._emit(f"{self.addresses[step.name]} = {source}")
            return
        base = self.tensors[step.of]
        self.tensors[step.name] = self._fresh("v")
        view = self._view_of(step, base, offset)
        if step.of in self.parameters and step.name not in refs(self.plan.outputs):
            self._remembered_view(step, view)
        else:
            self._emit(f"{self.tensors[step.name]} = {view}")

    def _view_of(self, step: Alias, base: str, offset: str) -> str:
        layout = f"{self._shape(step.shape)}, {self._shape(step.strides)}"
        if step.name not in self.tracked and "reinterpret" in self.helpers:
            return f"reinterpret({base}, {layout}, {offset})"
        if step.of not in self.own or self._begins_later(step.of):
            # The plan's offsets count from the base's first element, as_strided's from its storage's.
            offset = f"{base}.storage_offset()" + ("" if offset == "0" else f" + {offset}")
        return f"{base}.as_strided({layout}, {offset})"

    def _begins_later(self, name: str) -> bool:
        """Whether a buffer's first element may not be the first of the storage that its tensor has."""
        return name in self.plan.offsets or self._in_workspace(self.plan.placement.get(name))

    def _remembered_view(self, step: Alias, view: str) -> None:
        """A view of a parameter is made again only when the parameter's memory has moved.

        The remembered view keeps that memory alive, so an equal address is the same memory. Entries are read once and
        replaced whole, since threads with other weights may do so at any moment.
        """
        held, entry, address = self._constant([(None, None)]), self.tensors[step.name], self._address(step.of)
        self._emit(f"{entry} = {held}[0]")
        self._emit(f"if {entry}[0] != {address}: {held}[0] = {entry} = ({address}, {view})")
        self._emit(f"{entry} = {entry}[1]")

    def _itemsize(self, name: str) -> str:
        root = self.roots.get(name, name)
        return str(self.specs[root].dtype.itemsize) if root in self.specs else f"{self.tensors[root]}.element_size()"

    def _call(self, step: Call) -> None:
        for name in refs(step.args) + refs(step.kwargs):
            self._allocate(name)
        self.before = None
        if step.op not in self.ops:
            raise PlanError(f"plan.steps: nothing was given for {step.op!r}")
        arguments = [self._value(x) for x in step.args]
        arguments += [f"**{self._value(step.kwargs)}"] if step.kwargs else []
        text = f"{self._constant(self.ops[step.op])}({', '.join(arguments)})"
        if step.op.startswith("local:"):  # it may leave another stream the current one
            self._run_call(step, text)
            for device in self.streams:
                self._emit(f"h{device} = stream({device})")
        else:
            self._run_call(step, text)

    def _run_call(self, step: Call, text: str) -> None:
        if not any(step.outputs):
            self._emit(text)
            return
        targets = [self._fresh("v") if name else "_" for name in step.outputs]
        several = len(targets) > 1
        if several:
            self._emit(f"{', '.join(targets)} = flat({text})")
        else:
            self._emit(f"{targets[0]} = {text if step.op in DIRECT else f'one({text})'}")
        if "_" in targets:
            self._emit("_ = None")
        for output, target in zip(step.outputs, targets, strict=True):
            if output:
                self.tensors[output] = target
                self._check_layout(output, target)

    def _check_layout(self, name: str, target: str) -> None:
        """A library may choose other strides than the plan was made with; kernels and callers rely on the plan's."""
        spec = self.specs.get(name)
        if spec is not None and spec.shape:
            shape, strides = self._shape(spec.shape), self._shape(spec.strides)
            self._emit(f"if {target}.stride() != {strides}: {target} = relayout({target}, {shape}, {strides})")

    def _launch(self, step: Launch) -> None:
        for name in step.buffers:
            self._allocate(name)
        if self._writes_nothing(step):
            return
        emitted = len(self.lines)
        if len(step.buffers) > MANY:
            self._fetch_addresses(step.buffers)
        addresses, copies = self._aligned_addresses(step)
        if step.language == "cpp":
            self._launch_native(step, addresses)
        else:
            self._launch_cuda(step, addresses)
        self.lines += copies
        self._announce(step)
        if self.profile:
            inside = self.lines[emitted:]
            label = self._constant(step.label or step.entry)
            self.lines[emitted:] = [f"with record_function({label}):", *(f"    {line}" for line in inside)]

    def _announce(self, step: Launch) -> None:
        """Kernels write behind torch's back: bump the version counters of inputs, which autograd may be watching."""
        inputs = {x.name for x in self.plan.inputs}
        written = dict.fromkeys(root for n in step.writes if (root := self.roots.get(n, n)) in inputs)
        if written:
            self._emit(f"changed(({''.join(f'{self.tensors[n]}, ' for n in written)}))")

    def _writes_nothing(self, step: Launch) -> bool:
        specs = [self.specs.get(name) for name in step.writes]
        return bool(specs) and all(spec is not None and any(s == 0 for s in spec.shape) for spec in specs)

    def _launch_native(self, step: Launch, addresses: list[str]) -> None:
        first, first_size = len(self.pointers), len(self.sizes)
        for name, address in zip(step.buffers, addresses, strict=True):
            if name in self.constants:
                self.pointers.append(self.constants[name].data_ptr())
            else:
                self._emit(f"P[{len(self.pointers)}] = {address}")
                self.pointers.append(0)
        for size in step.sizes:
            if not isinstance(size, int):
                self._emit(f"S[{len(self.sizes)}] = {self._size(size)}")
            self.sizes.append(size if isinstance(size, int) else 0)
        kernel, errors = self._constant(self.natives[step.kernel]), self._constant(step)
        self._emit(f"r = {kernel}(A + {first * 8}, B + {first_size * 8})")
        self._emit(f"if r: fail({errors}, r)")

    def _launch_cuda(self, step: Launch, addresses: list[str]) -> None:
        grid = [self._size(g) for g in step.grid]
        device = step.device.index or 0
        stream = f"h{device}"
        opening = f"{stream} = stream({device})"
        if opening not in self.prologue:
            self.prologue.append(opening)
        if step.members:
            self.before = None
            self._enter_device(device)
            self._emit(f"{self._launcher(step)}({stream}, ({''.join(f'{a}, ' for a in addresses)}))")
            return
        arguments = [stream, *grid, *addresses, *(self._size(s) for s in step.sizes)]
        skip = " and ".join(g for g, size in zip(grid, step.grid, strict=True) if not isinstance(size, int))
        if any(size == 0 for size in step.grid):
            return
        self._enter_device(device)
        launcher = self._launcher_after(self.before, step)
        self._emit((f"if {skip}: " if skip else "") + f"{launcher}({', '.join(arguments)})")
        self.before = None if skip else step

    def _launcher(self, step: Launch, early: bool = False) -> str:
        self.cuda.append((step, early))
        return f"L[{len(self.cuda) - 1}]"

    def _launcher_after(self, before: Launch | None, step: Launch) -> str:
        """Early launches are those right after a kernel of this run, which itself began when all that was enqueued before
        the run had ended. Not after a copy for alignment's sake: it writes what kernels do not wait for, like weights."""
        if before is None or not step.early or before.device != step.device:
            return self._launcher(step)
        early = self._launcher(step, early=True)
        return f"({early} if t is None else {self._launcher(step)})" if self._doubtful(step) else early

    def _enter_device(self, device: int) -> None:
        if device != self.device:
            self.device = device
            self._emit(f"set_device({device})")

    # --- alignment

    def _aligned_addresses(self, step: Launch) -> tuple[list[str], list[str]]:
        """Addresses to pass, and lines to run afterwards: a kernel that assumes alignment gets copies of what has none."""
        addresses = {name: self._address(name) for name in dict.fromkeys(step.buffers) if name not in self.constants}
        addresses |= {name: repr(self.constants[name].data_ptr()) for name in step.buffers if name in self.constants}
        doubtful = self._doubtful(step)
        if not doubtful:
            return [addresses[name] for name in step.buffers], []
        passed = {name: self._fresh("p") for name in doubtful}
        originals = " | ".join(addresses[name] for name in doubtful)
        tensors = "".join(f"{self.tensors[name]}, " for name in doubtful)
        targets, sources = ("".join(f"{x[name]}, " for name in doubtful) for x in (passed, addresses))
        self._emit(f"{targets}= {sources}")
        self._emit("t = None")
        self._emit(f"if ({originals}) & {ALIGNMENT - 1}: t, {targets}= align({tensors})")
        written = [(i, self.tensors[name]) for i, name in enumerate(doubtful) if name in step.writes]
        after = [f"if t is not None and t[{i}] is not {tensor}: {tensor}.copy_(t[{i}])" for i, tensor in written]
        return [passed.get(name, addresses[name]) for name in step.buffers], [*after, "t = None"]

    def _doubtful(self, step: Launch) -> list[str]:
        """Buffers that the kernel takes to be aligned, and of which only the call can tell."""
        assumed = dict.fromkeys(step.buffers[i] for i in step.aligned)
        return [n for n in assumed if n not in self.own and n not in self.constants and step.language != "cpp"]


def _tracked(plan: Plan, roots: Mapping[str, str]) -> set[str]:
    """Views that must share their base's version counter: those that leave the plan, perhaps by way of an op that returns
    what it is given, and those of inputs that the plan changes."""
    out = set(refs(plan.outputs))
    for step in plan.steps:
        if isinstance(step, Call) and not returns_fresh(step.op) and not only_writes(step):
            out.update(refs(step.args), refs(step.kwargs))
    for step in reversed(plan.steps):
        if isinstance(step, Alias) and step.name in out:
            out.add(step.of)
    inputs = {x.name for x in plan.inputs}
    written = {roots.get(n, n) for step in plan.steps if isinstance(step, Launch | Call) for n in step.writes} & inputs
    return out | {step.name for step in plan.steps if isinstance(step, Alias) and roots.get(step.name) in written}
