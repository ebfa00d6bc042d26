"""The Plan: what runs, as pure data.

A plan is ordered steps over named values, with where each value comes from: an input, a constant that is handed in when the
plan is bound, an allocation, or a step. It holds no tensors, no functions and no torch graph, so its bytes are all there is
to it: `Plan.from_json(plan.to_json())` is what the executor runs, in this process or another one.

Order of the steps is execution order. A buffer that no input, constant, Call or Alias defines is allocated before the first
step that mentions it. `Free` drops names; `slots` are the storages that several buffers take in turn (`runtime/memory.py`
fills in both).
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Union

import torch

from fxopt.errors import PlanError
from fxopt.ir.exprs import Int, free_symbols
from fxopt.ir.exprs_json import to_json
from fxopt.ir.graph import Role
from fxopt.ir.region import Alias, BufferSpec, Call, refs
from fxopt.runtime.encoding import Field, decode_value, encode_value, size_values, sizes_json, torch_name

PLAN_VERSION = 6

OFFSET_ALIGNMENT = 16
"""Bytes, of which offsets in slots are multiples: what kernels that assume aligned operands rely on."""


@dataclass(frozen=True)
class InputSpec:
    """One position of the list the executor is called with.

    `kind` is "tensor", "int", "float" or "other" (passed on to calls untouched); dtype, device, shape and strides (in
    elements) describe tensors only.
    """

    name: str
    kind: str = "tensor"
    role: Role = Role.USER
    dtype: torch.dtype | None = None
    device: torch.device | None = None
    shape: tuple[Int, ...] = ()
    strides: tuple[Int, ...] = ()

    @property
    def is_static(self) -> bool:
        """Whether nothing of its layout is symbolic."""
        return all(isinstance(n, int) for n in (*self.shape, *self.strides))


@dataclass(frozen=True)
class SymbolSource:
    """Where a size symbol's value is read: `what` is "size" or "stride" (of dimension `dim`) or "value" (the input is the
    integer), of input number `input`. The number found there is times * symbol + plus.
    """

    name: str
    input: int
    what: str = "size"
    dim: int = 0
    times: int = 1
    plus: int = 0


@dataclass(frozen=True)
class Slot:
    """A storage of `nbytes` bytes in which buffers lie; those whose lifetimes overlap do not overlap there."""

    device: torch.device
    nbytes: Int


@dataclass(frozen=True)
class Launch:
    """One run of a generated kernel.

    `kernel` is the artifact's key, `buffers` its pointer arguments in order, `sizes` the integer arguments after them,
    `grid` the blocks to launch (CUDA only), `errors` the messages of its error codes 1, 2, ... `writes` names the buffers it
    stores to. `aligned` lists the positions in `buffers` that the code assumes 16-byte aligned (CUDA only). `inplace` pairs
    (output, input): the output may take over the input's storage if the input dies here, because the kernel reads and writes
    each element at the same index. `label` is for profilers and reports.

    With `early` the kernel itself waits for the one before it to end: right after another launch it is not held back until
    then (`runtime/launch.py`).

    A batched kernel has `members`, the number of elements of each, and does `block` of them in a program: its `buffers` are
    not arguments but go into a table (`runtime/batch.py`), as many for each member, one member's after another's.
    """

    kernel: str
    language: str
    entry: str
    buffers: tuple[str, ...]
    writes: tuple[str, ...]
    device: torch.device
    sizes: tuple[Int, ...] = ()
    grid: tuple[Int, Int, Int] = (1, 1, 1)
    errors: tuple[str, ...] = ()
    aligned: tuple[int, ...] = ()
    inplace: tuple[tuple[str, str], ...] = ()
    label: str = ""
    members: tuple[int, ...] = ()
    block: int = 0
    early: bool = False


@dataclass(frozen=True)
class Free:
    """These names are not used any more."""

    names: tuple[str, ...]


PlanStep = Union[Launch, Call, Alias, Free]


@dataclass(frozen=True)
class Plan:
    """Everything that running a compiled graph takes, kernels' machine code and constants' contents aside.

    `constants` are tensors handed in by name when the plan is bound. `buffers` describes every other named tensor (for a
    Call's output: the layout that later steps rely on). `placement` maps a buffer to the slot whose storage it uses; a
    buffer without one has its own. `offsets` says at which byte of the slot a buffer begins, if not at the first.
    `outputs` holds Ref, Size or plain constants; the last `saved` of them are kept for a backward.
    """

    name: str
    inputs: tuple[InputSpec, ...]
    constants: tuple[BufferSpec, ...]
    symbols: tuple[SymbolSource, ...]
    buffers: tuple[BufferSpec, ...]
    steps: tuple[PlanStep, ...]
    outputs: tuple[Any, ...]
    slots: tuple[Slot, ...] = ()
    placement: dict[str, int] = field(default_factory=dict)
    offsets: dict[str, int] = field(default_factory=dict)
    saved: int = 0
    from_bytes: bool = field(default=False, init=False, compare=False, repr=False)

    def to_json(self) -> str:
        """The plan as JSON text. Raises PlanError naming the field that holds something a plan cannot."""
        data = {
            "version": PLAN_VERSION,
            "name": self.name,
            "inputs": [_input_json(x) for x in self.inputs],
            "constants": [_buffer_json(x) for x in self.constants],
            "symbols": [[s.name, s.input, s.what, s.dim, s.times, s.plus] for s in self.symbols],
            "buffers": [_buffer_json(x) for x in self.buffers],
            "slots": [[str(s.device), to_json(s.nbytes)] for s in self.slots],
            "placement": self.placement,
            "offsets": self.offsets,
            "steps": [_step_json(x, f"plan.steps[{i}]") for i, x in enumerate(self.steps)],
            "outputs": [encode_value(x, f"plan.outputs[{i}]") for i, x in enumerate(self.outputs)],
            "saved": self.saved,
        }
        return json.dumps(data, separators=(",", ":"), allow_nan=False)

    @staticmethod
    def from_json(text: str | bytes) -> Plan:
        """The plan that `to_json` wrote, checked throughout. Raises PlanError naming the field that is wrong."""
        try:
            root = Field(json.loads(text, parse_constant=_no_constant), "plan")
        except (ValueError, RecursionError) as error:
            raise PlanError(f"plan: not JSON: {error}") from error
        version = root["version"].integer()
        if version != PLAN_VERSION:
            raise PlanError(f"plan.version: this fxopt reads version {PLAN_VERSION}, found {version}; compile again")
        plan = _read_plan(root)
        check(plan)
        object.__setattr__(plan, "from_bytes", True)
        return plan


def _no_constant(text: str) -> Any:
    raise ValueError(f"{text} is not JSON")


def _read_plan(root: Field) -> Plan:
    return Plan(
        name=root["name"].text(),
        inputs=root["inputs"].each(_read_input),
        constants=root["constants"].each(_read_buffer),
        symbols=root["symbols"].each(_read_symbol),
        buffers=root["buffers"].each(_read_buffer),
        steps=root["steps"].each(_read_step),
        outputs=root["outputs"].each(decode_value),
        slots=root["slots"].each(_read_slot),
        placement=_read_integers(root["placement"]),
        offsets=_read_integers(root["offsets"]),
        saved=root["saved"].integer(),
    )


def _read_integers(x: Field) -> dict[str, int]:
    if not isinstance(x.data, dict):
        raise x.fail("an object")
    return {name: x[name].integer() for name in x.data}


# --- records ---------------------------------------------------------------------------------------------------------------


def _input_json(x: InputSpec) -> dict[str, Any]:
    out: dict[str, Any] = {"name": x.name, "kind": x.kind, "role": x.role.value}
    if x.kind == "tensor":
        if x.dtype is None or x.device is None:
            raise PlanError(f"plan.inputs: tensor input {x.name!r} has no dtype or device")
        out.update(_layout_json(x.dtype, x.device, x.shape, x.strides))
    return out


def _layout_json(
    dtype: torch.dtype, device: torch.device, shape: tuple[Int, ...], strides: tuple[Int, ...]
) -> dict[str, Any]:
    return {"dtype": torch_name(dtype), "device": str(device), "shape": sizes_json(shape), "strides": sizes_json(strides)}


def _read_input(x: Field) -> InputSpec:
    name, role = x["name"].text(), Role(x["role"].choice(*(r.value for r in Role)))
    kind = x["kind"].choice("tensor", "int", "float", "other")
    if kind != "tensor":
        return InputSpec(name, kind, role)
    return InputSpec(name, kind, role, x["dtype"].dtype(), x["device"].device(), *_read_layout(x))


def _read_layout(x: Field) -> tuple[tuple[Int, ...], tuple[Int, ...]]:
    shape, strides = x["shape"].sizes(), x["strides"].sizes()
    if len(shape) != len(strides):
        raise x["strides"].fail(f"{len(shape)} strides")
    return shape, strides


def _buffer_json(x: BufferSpec) -> dict[str, Any]:
    return {"name": x.name, **_layout_json(x.dtype, x.device, x.shape, x.strides)}


def _read_buffer(x: Field) -> BufferSpec:
    return BufferSpec(x["name"].text(), x["dtype"].dtype(), x["device"].device(), *_read_layout(x))


def _parts(x: Field, count: int) -> list[Field]:
    parts = x.items()
    if len(parts) != count:
        raise x.fail(f"{count} entries")
    return parts


def _read_symbol(x: Field) -> SymbolSource:
    name, number, what, dim, times, plus = _parts(x, 6)
    place = what.choice("size", "stride", "value")
    return SymbolSource(name.text(), number.integer(), place, dim.integer(), times.integer(), plus.integer())


def _read_slot(x: Field) -> Slot:
    device, nbytes = _parts(x, 2)
    return Slot(device.device(), nbytes.size())


# --- steps -----------------------------------------------------------------------------------------------------------------


def _step_json(step: PlanStep, path: str) -> dict[str, Any]:
    match step:
        case Launch():
            return _launch_json(step)
        case Call():
            return {
                "step": "call",
                "op": step.op,
                "args": [encode_value(x, f"{path}.args[{i}]") for i, x in enumerate(step.args)],
                "kwargs": {k: encode_value(v, f"{path}.kwargs.{k}") for k, v in step.kwargs.items()},
                "outputs": list(step.outputs),
                "origin": step.origin,
                "writes": list(step.writes),
                "effect": step.effect,
            }
        case Alias():
            shape, strides = sizes_json(step.shape), sizes_json(step.strides)
            return {
                "step": "alias",
                "name": step.name,
                "of": step.of,
                "shape": shape,
                "strides": strides,
                "offset": to_json(step.offset),
            }
        case Free():
            return {"step": "free", "names": list(step.names)}
    raise PlanError(f"{path}: a plan cannot hold a {type(step).__name__}")


def _launch_json(x: Launch) -> dict[str, Any]:
    return {
        "step": "launch",
        "kernel": x.kernel,
        "language": x.language,
        "entry": x.entry,
        "buffers": list(x.buffers),
        "writes": list(x.writes),
        "device": str(x.device),
        "sizes": sizes_json(x.sizes),
        "grid": sizes_json(x.grid),
        "errors": list(x.errors),
        "aligned": list(x.aligned),
        "inplace": [list(pair) for pair in x.inplace],
        "label": x.label,
        "members": list(x.members),
        "block": x.block,
        "early": x.early,
    }


def _read_step(x: Field) -> PlanStep:
    return _STEP_READERS[x["step"].choice(*_STEP_READERS)](x)


def _read_launch(x: Field) -> Launch:
    gx, gy, gz = _parts(x["grid"], 3)
    return Launch(
        kernel=x["kernel"].text(),
        language=x["language"].choice("cpp", "triton"),
        entry=x["entry"].text(),
        buffers=x["buffers"].names(),
        writes=x["writes"].names(),
        device=x["device"].device(),
        sizes=x["sizes"].sizes(),
        grid=(gx.size(), gy.size(), gz.size()),
        errors=x["errors"].names(),
        aligned=x["aligned"].each(Field.integer),
        inplace=x["inplace"].each(_read_pair),
        label=x["label"].text(),
        members=x["members"].each(Field.integer),
        block=x["block"].integer(),
        early=x["early"].boolean(),
    )


def _read_pair(x: Field) -> tuple[str, str]:
    a, b = _parts(x, 2)
    return a.text(), b.text()


def _read_call(x: Field) -> Call:
    kwargs = x["kwargs"]
    if not isinstance(kwargs.data, dict):
        raise kwargs.fail("an object")
    return Call(
        op=x["op"].text(),
        args=x["args"].each(decode_value),
        kwargs={k: decode_value(kwargs[k]) for k in kwargs.data},
        outputs=x["outputs"].each(lambda o: None if o.data is None else o.text()),
        origin=x["origin"].text(),
        writes=x["writes"].names(),
        effect=x["effect"].boolean(),
    )


def _read_alias(x: Field) -> Alias:
    return Alias(x["name"].text(), x["of"].text(), *_read_layout(x), x["offset"].size())


_STEP_READERS: dict[str, Callable[[Field], PlanStep]] = {
    "launch": _read_launch,
    "call": _read_call,
    "alias": _read_alias,
    "free": lambda x: Free(x["names"].names()),
}


# --- what a step mentions --------------------------------------------------------------------------------------------------


def used(step: PlanStep) -> list[str]:
    """Names that a step reads or writes and that exist before it (or are allocated for it)."""
    match step:
        case Launch():
            return list(step.buffers)
        case Call():
            return refs(step.args) + refs(step.kwargs)
        case Alias():
            return [step.of]
    return []


def defined(step: PlanStep) -> list[str]:
    """Names that a step brings into being."""
    match step:
        case Call():
            return [name for name in step.outputs if name is not None]
        case Alias():
            return [step.name]
    return []


def expressions(step: PlanStep) -> list[Int]:
    """Every integer expression that a step evaluates."""
    match step:
        case Launch():
            return [*step.sizes, *step.grid]
        case Call():
            return size_values(step.args) + size_values(step.kwargs)
        case Alias():
            return [*step.shape, *step.strides, step.offset]
    return []


def allocated(plan: Plan) -> dict[str, BufferSpec]:
    """The buffers that the executor allocates, by name."""
    made = {x.name for x in plan.inputs} | {x.name for x in plan.constants} | {n for s in plan.steps for n in defined(s)}
    return {b.name: b for b in plan.buffers if b.name not in made}


# --- validity --------------------------------------------------------------------------------------------------------------


def check(plan: Plan) -> None:
    """Raise PlanError, naming the field, unless every name, symbol, slot and position that the plan mentions exists."""
    _check_symbols(plan)
    own = allocated(plan)
    live = {x.name for x in plan.inputs} | {x.name for x in plan.constants} | set(own)
    if len(live) != len(plan.inputs) + len(plan.constants) + len(own) or len({b.name for b in plan.buffers}) != len(
        plan.buffers
    ):
        raise PlanError("plan.buffers: a name is defined twice")
    freed: set[str] = set()
    for i, step in enumerate(plan.steps):
        _check_step(step, f"plan.steps[{i}]", live)
        if isinstance(step, Free):
            live.difference_update(step.names)
            freed.update(step.names)
        for name in defined(step):
            if name in live or name in freed:
                raise PlanError(f"plan.steps[{i}]: {name!r} is defined twice")
            live.add(name)
    for name in refs(plan.outputs):
        _known(name, live, "plan.outputs")
    _check_placement(plan, own)


def _known(name: str, live: set[str], path: str) -> None:
    if name not in live:
        raise PlanError(f"{path}: {name!r} is not defined here")


def _check_step(step: PlanStep, path: str, live: set[str]) -> None:
    for name in used(step) if not isinstance(step, Free) else step.names:
        _known(name, live, path)
    if isinstance(step, Launch):
        for position in step.aligned:
            if not 0 <= position < len(step.buffers):
                raise PlanError(f"{path}.aligned: the kernel has no argument {position}")
        for name in (*step.writes, *(n for pair in step.inplace for n in pair)):
            if name not in step.buffers:
                raise PlanError(f"{path}: {name!r} is not an argument of the kernel")
        if step.members:
            _check_batch(step, path)


def _check_batch(step: Launch, path: str) -> None:
    if step.block < 1 or min(step.members) < 1:
        raise PlanError(f"{path}.members: a batched kernel has at least one element in each member and in a block")
    if len(step.buffers) % len(step.members) or step.language != "triton" or step.sizes or step.aligned:
        raise PlanError(f"{path}.buffers: not the table of a batched kernel of {len(step.members)} members")


def _check_symbols(plan: Plan) -> None:
    for i, source in enumerate(plan.symbols):
        if not 0 <= source.input < len(plan.inputs):
            raise PlanError(f"plan.symbols[{i}]: there is no input {source.input}")
        spec = plan.inputs[source.input]
        if (spec.kind == "tensor") == (source.what == "value"):
            raise PlanError(f"plan.symbols[{i}]: input {spec.name!r} ({spec.kind}) has no {source.what}")
        if source.what in ("size", "stride") and not 0 <= source.dim < len(spec.shape):
            raise PlanError(f"plan.symbols[{i}]: input {spec.name!r} has no dimension {source.dim}")
        if source.times == 0:
            raise PlanError(f"plan.symbols[{i}]: zero times {source.name} does not tell its value")
    names = {s.name for s in plan.symbols}
    for path, x in _all_expressions(plan):
        for symbol in free_symbols(x):
            if symbol.name not in names:
                raise PlanError(f"{path}: size symbol {symbol.name!r} has no source among the inputs")


def _all_expressions(plan: Plan) -> list[tuple[str, Int]]:
    """Every expression that is evaluated at run time (an input's own shape is only documentation), with its field."""
    out = [(f"plan.buffers.{b.name}", x) for b in plan.buffers for x in (*b.shape, *b.strides)]
    out += [(f"plan.slots[{i}]", s.nbytes) for i, s in enumerate(plan.slots)]
    out += [(f"plan.steps[{i}]", x) for i, s in enumerate(plan.steps) for x in expressions(s)]
    return out + [("plan.outputs", x) for x in size_values(plan.outputs)]


def _check_placement(plan: Plan, own: dict[str, BufferSpec]) -> None:
    for name, slot in plan.placement.items():
        if name not in own:
            raise PlanError(f"plan.placement.{name}: not a buffer that the plan allocates")
        if not 0 <= slot < len(plan.slots):
            raise PlanError(f"plan.placement.{name}: there is no slot {slot}")
        if plan.slots[slot].device != own[name].device:
            raise PlanError(f"plan.placement.{name}: the slot is on another device")
    for name, offset in plan.offsets.items():
        if name not in plan.placement:
            raise PlanError(f"plan.offsets.{name}: the buffer is in no slot")
        end, size = offset + own[name].extent * own[name].dtype.itemsize, plan.slots[plan.placement[name]].nbytes
        if offset < 0 or offset % OFFSET_ALIGNMENT or not isinstance(end, int) or not isinstance(size, int) or end > size:
            raise PlanError(f"plan.offsets.{name}: {offset} is not an aligned place within its slot")
